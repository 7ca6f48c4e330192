//! The common configuration structure of virtio over PCI (virtio 1.2, section
//! 4.1.4.3).

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::super::queue_config::{QueueArea, QueueConfig};
use super::super::transport::{Transport, high, low};
use super::interrupt::PciInterrupt;

/// Size of the structure, in bytes.
pub(super) const COMMON_SIZE: u64 = 0x3c;

// Offsets in the structure.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC_LOW: u64 = 0x20;
const QUEUE_DESC_HIGH: u64 = 0x24;
const QUEUE_DRIVER_LOW: u64 = 0x28;
const QUEUE_DRIVER_HIGH: u64 = 0x2c;
const QUEUE_DEVICE_LOW: u64 = 0x30;
const QUEUE_DEVICE_HIGH: u64 = 0x34;

/// The structure's selectors; everything else is the transport's or the
/// interrupt's.
#[derive(Debug, Default)]
pub(super) struct Common {
    device_feature_select: AtomicU32,
    driver_feature_select: AtomicU32,
    queue_select: AtomicU16,
}

impl Common {
    /// Resets the selectors.
    pub(super) fn reset(&self) {
        self.device_feature_select.store(0, Ordering::Relaxed);
        self.driver_feature_select.store(0, Ordering::Relaxed);
        self.queue_select.store(0, Ordering::Relaxed);
    }

    /// Reads one field, at its own width; a 64-bit field by halves or whole.
    /// Other accesses are not defined and read as zeroes.
    pub(super) fn read(
        &self,
        transport: &Transport,
        interrupt: &PciInterrupt,
        offset: u64,
        data: &mut [u8],
    ) {
        data.fill(0);
        if let [byte] = data {
            *byte = match offset {
                DEVICE_STATUS => transport.status(),
                CONFIG_GENERATION => (transport.config_generation() & 0xff) as u8,
                _ => 0,
            };
        } else if let Ok(half) = <&mut [u8; 2]>::try_from(&mut *data) {
            *half = self.read16(transport, interrupt, offset).to_le_bytes();
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data) {
            *word = self.read32(transport, offset).to_le_bytes();
        } else if let ([low, high], []) = data.as_chunks_mut::<4>()
            && is_wide(offset)
        {
            *low = self.read32(transport, offset).to_le_bytes();
            *high = self.read32(transport, offset + 4).to_le_bytes();
        }
    }

    /// Writes one field, likewise. `reset` is called when the driver resets the
    /// device.
    pub(super) fn write(
        &self,
        transport: &Transport,
        interrupt: &PciInterrupt,
        offset: u64,
        data: &[u8],
        reset: impl FnOnce(),
    ) {
        if let [byte] = *data {
            match (offset, byte) {
                (DEVICE_STATUS, 0) => reset(),
                (DEVICE_STATUS, status) => transport.set_status(status),
                _ => {}
            }
        } else if let Ok(half) = <[u8; 2]>::try_from(data) {
            self.write16(transport, interrupt, offset, u16::from_le_bytes(half));
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write32(transport, offset, u32::from_le_bytes(word));
        } else if let ([low, high], []) = data.as_chunks::<4>()
            && is_wide(offset)
        {
            self.write32(transport, offset, u32::from_le_bytes(*low));
            self.write32(transport, offset + 4, u32::from_le_bytes(*high));
        }
    }

    fn selected(&self) -> u16 {
        self.queue_select.load(Ordering::Relaxed)
    }

    fn queue(&self, transport: &Transport) -> Option<QueueConfig> {
        transport.queue(self.selected().into())
    }

    fn read16(&self, transport: &Transport, interrupt: &PciInterrupt, offset: u64) -> u16 {
        match offset {
            CONFIG_MSIX_VECTOR => interrupt.config_vector(),
            NUM_QUEUES => transport.queue_count(),
            QUEUE_SELECT => self.selected(),
            // A size of 0 says that there is no such queue.
            QUEUE_SIZE => self.queue(transport).map_or(0, |q| q.size),
            QUEUE_MSIX_VECTOR => interrupt.queue_vector(self.selected()),
            QUEUE_ENABLE => self.queue(transport).map_or(0, |q| q.enabled.into()),
            QUEUE_NOTIFY_OFF => self.queue(transport).map_or(0, |_| self.selected()),
            _ => 0,
        }
    }

    fn read32(&self, transport: &Transport, offset: u64) -> u32 {
        let address = |area| self.queue(transport).map_or(0, |q| q.address(area));
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select.load(Ordering::Relaxed),
            DEVICE_FEATURE => {
                transport.device_features(self.device_feature_select.load(Ordering::Relaxed))
            }
            DRIVER_FEATURE_SELECT => self.driver_feature_select.load(Ordering::Relaxed),
            DRIVER_FEATURE => {
                transport.driver_features(self.driver_feature_select.load(Ordering::Relaxed))
            }
            QUEUE_DESC_LOW => low(address(QueueArea::Descriptor)),
            QUEUE_DESC_HIGH => high(address(QueueArea::Descriptor)),
            QUEUE_DRIVER_LOW => low(address(QueueArea::Driver)),
            QUEUE_DRIVER_HIGH => high(address(QueueArea::Driver)),
            QUEUE_DEVICE_LOW => low(address(QueueArea::Device)),
            QUEUE_DEVICE_HIGH => high(address(QueueArea::Device)),
            _ => 0,
        }
    }

    fn write16(&self, transport: &Transport, interrupt: &PciInterrupt, offset: u64, value: u16) {
        let queue = self.selected();
        match offset {
            CONFIG_MSIX_VECTOR => interrupt.set_config_vector(value),
            QUEUE_SELECT => self.queue_select.store(value, Ordering::Relaxed),
            QUEUE_SIZE => transport.set_queue_size(queue.into(), value),
            QUEUE_MSIX_VECTOR => interrupt.set_queue_vector(queue, value),
            // Section 4.1.4.3.2: a driver cannot disable a queue by writing 0.
            QUEUE_ENABLE if value == 1 => transport.enable_queue(queue.into()),
            _ => {}
        }
    }

    fn write32(&self, transport: &Transport, offset: u64, value: u32) {
        let queue = self.selected().into();
        let set_low = |area| transport.set_queue_address(queue, area, Some(value), None);
        let set_high = |area| transport.set_queue_address(queue, area, None, Some(value));
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select.store(value, Ordering::Relaxed),
            DRIVER_FEATURE_SELECT => self.driver_feature_select.store(value, Ordering::Relaxed),
            DRIVER_FEATURE => transport
                .set_driver_features(self.driver_feature_select.load(Ordering::Relaxed), value),
            QUEUE_DESC_LOW => set_low(QueueArea::Descriptor),
            QUEUE_DESC_HIGH => set_high(QueueArea::Descriptor),
            QUEUE_DRIVER_LOW => set_low(QueueArea::Driver),
            QUEUE_DRIVER_HIGH => set_high(QueueArea::Driver),
            QUEUE_DEVICE_LOW => set_low(QueueArea::Device),
            QUEUE_DEVICE_HIGH => set_high(QueueArea::Device),
            _ => {}
        }
    }
}

/// Whether a 64-bit field starts at `offset`.
fn is_wide(offset: u64) -> bool {
    matches!(offset, QUEUE_DESC_LOW | QUEUE_DRIVER_LOW | QUEUE_DEVICE_LOW)
}
