//! The Arm PrimeCell PL031 real-time clock.

use std::sync::{Mutex, PoisonError};

use vm_superio::Rtc;
use vm_superio::rtc_pl031::NoEvents;

use crate::bus::BusDevice;

/// A PL031 that counts the host's wall-clock seconds (UTC), without an alarm.
/// It takes 4 KiB.
pub struct Pl031(Mutex<Rtc<NoEvents>>);

impl Pl031 {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self(Mutex::new(Rtc::new()))
    }
}

impl Default for Pl031 {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for Pl031 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = u16::try_from(offset) else {
            return;
        };
        let mut value = [0; 4];
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, &mut value);
        for (byte, value) in data.iter_mut().zip(value) {
            *byte = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The registers are 32 bits wide, and so is each access.
        if let (Ok(offset), Ok(value)) = (u16::try_from(offset), <&[u8; 4]>::try_from(data)) {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn read(rtc: &Pl031, offset: u64) -> u32 {
        let mut data = [0; 4];
        rtc.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identifies_itself_and_shows_the_time() {
        let rtc = Pl031::new();
        let id = (0..4).fold(0, |id, i| id | read(&rtc, 0xfe0 + 4 * i) << (8 * i));
        assert_eq!(id & 0x000f_ffff, 0x0004_1031);
        let cell = (0..4).fold(0, |id, i| id | read(&rtc, 0xff0 + 4 * i) << (8 * i));
        assert_eq!(cell, 0xb105_f00d);
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        assert!(u64::from(read(&rtc, 0)).abs_diff(now) <= 1);
    }

    #[test]
    fn can_be_set_and_survives_odd_accesses() {
        let rtc = Pl031::new();
        rtc.write(8, &1000u32.to_le_bytes());
        assert!(read(&rtc, 0).abs_diff(1000) <= 1);
        rtc.write(8, &[1, 2]);
        assert!(read(&rtc, 0).abs_diff(1000) <= 1);
        rtc.read(u64::MAX, &mut [0; 8]);
        rtc.write(u64::MAX, &[0; 4]);
        let mut narrow = [0; 1];
        rtc.read(0xfe0, &mut narrow);
        assert_eq!(narrow, [0x31]);
        let mut wide = [0xff; 8];
        rtc.read(0xfe0, &mut wide);
        assert_eq!(wide, [0x31, 0, 0, 0, 0, 0, 0, 0]);
    }
}
