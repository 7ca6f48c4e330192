//! Dispatch of guest accesses to devices.

use std::sync::Arc;

use crossvisor_devices::bus::BusDevice;

use crate::error::{Error, Result};
use crate::plan::Range;

/// Address space of one kind (memory or ports): a table sorted by address,
/// fixed once the VM runs, so that a look-up takes no lock. Windows whose
/// contents move (PCI) are one device here and dispatch further themselves.
#[derive(Default)]
pub struct Bus {
    devices: Vec<(Range, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Puts `device` at `range`.
    ///
    /// # Errors
    /// The range is empty or overlaps that of another device.
    pub fn insert(&mut self, range: Range, device: Arc<dyn BusDevice>) -> Result<()> {
        let place = self
            .devices
            .partition_point(|(other, _)| other.base < range.base);
        let taken = self.devices.iter().any(|(other, _)| other.overlaps(&range));
        if taken || range.size == 0 {
            return Err(Error::Boot(format!(
                "internal error: no room for a device at {range}"
            )));
        }
        self.devices.insert(place, (range, device));
        Ok(())
    }

    /// The device at `address`, and the offset in it, when the whole access of
    /// `size` bytes is its own.
    fn find(&self, address: u64, size: usize) -> Option<(u64, &dyn BusDevice)> {
        let after = self
            .devices
            .partition_point(|(range, _)| range.base <= address);
        let (range, device) = self.devices.get(after.checked_sub(1)?)?;
        let offset = address - range.base;
        let last = offset.checked_add(size as u64)?;
        (last <= range.size).then_some((offset, device.as_ref()))
    }

    /// Reads; where no device is, all bits are ones, as on a bus that nobody
    /// drives.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; where no device is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn finds_the_device_and_the_offset() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(Range::new(0x2000, 0x10), Arc::new(Recorder::default()))
            .unwrap();
        bus.insert(Range::new(0x1000, 0x10), device.clone())
            .unwrap();
        bus.write(0x100c, &[1, 2, 3, 4]);
        assert_eq!(device.0.lock().unwrap()[..], [(0xc, vec![1, 2, 3, 4])]);
        let mut data = [0; 2];
        bus.read(0x2003, &mut data);
        assert_eq!(data, [3, 3]);
    }

    #[test]
    fn nobody_answers_outside_and_across_the_end() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(Range::new(0x1000, 0x10), device.clone())
            .unwrap();
        for address in [0, 0xfff, 0x100d, 0x1010, u64::MAX - 1, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            bus.write(address, &[0; 4]);
        }
        assert!(device.0.lock().unwrap().is_empty());
    }

    #[test]
    fn refuses_overlaps_and_nothing() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(Range::new(0x1000, 0x10), device.clone())
            .unwrap();
        for (base, size) in [(0xff1, 0x10), (0x1000, 0x10), (0x100f, 1), (0, 0)] {
            assert!(bus.insert(Range::new(base, size), device.clone()).is_err());
        }
        bus.insert(Range::new(0x1010, 1), device).unwrap();
    }
}
