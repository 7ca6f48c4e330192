//! IPL parameters: the block that DIAGNOSE 0x308 stores and sets (Linux
//! `arch/s390/include/uapi/asm/ipl.h`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ebcdic;

/// Size in bytes of a block for a channel device.
const CCW_SIZE: usize = 200;
/// The most that a block may have.
pub const MAX: usize = 4096;
/// The least: its header, and that of the first block in it.
const MIN: usize = 16;
/// A block for a channel device (IPL_PBT_CCW).
const TYPE_CCW: u8 = 0x02;

/// The IPL parameters of a machine, which outlive its resets.
#[derive(Clone, Debug, Default)]
pub struct IplParameters(Arc<Mutex<Option<Vec<u8>>>>);

impl IplParameters {
    /// As if the machine had been loaded from the device `devno`; none when
    /// there is no such device.
    pub fn new(devno: Option<u16>) -> Self {
        Self(Arc::new(Mutex::new(devno.map(from_device))))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block.
    pub fn get(&self) -> Option<Vec<u8>> {
        self.lock().clone()
    }

    /// Takes a block that the guest sets. Returns whether it is one.
    pub fn set(&self, block: Vec<u8>) -> bool {
        let valid = (MIN..=MAX).contains(&block.len());
        if valid {
            *self.lock() = Some(block);
        }
        valid
    }
}

fn from_device(devno: u16) -> Vec<u8> {
    let mut block = vec![0; CCW_SIZE];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = block.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    // Linux knows version 0 (IPL_MAX_SUPPORTED_VERSION). Then come the length of
    // what follows the header, and its type.
    put(0, &(CCW_SIZE as u32).to_be_bytes());
    put(8, &(CCW_SIZE as u32 - 8).to_be_bytes());
    put(12, &[TYPE_CCW]);
    put(16, &ebcdic::field::<8>(""));
    put(110, &devno.to_be_bytes());
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_by_its_number() {
        let block = IplParameters::new(Some(0x1234)).get().unwrap();
        assert_eq!(block.len(), 200);
        assert_eq!(block[..8], [0, 0, 0, 200, 0, 0, 0, 0]);
        assert_eq!(block[8..13], [0, 0, 0, 192, 2]);
        assert_eq!(block[16..24], [0x40; 8]);
        assert_eq!(block[110..112], [0x12, 0x34]);
    }

    #[test]
    fn what_a_guest_sets_stays() {
        let parameters = IplParameters::new(None);
        assert_eq!(parameters.get(), None);
        assert!(!parameters.set(vec![0; 8]) && !parameters.set(vec![0; 5000]));
        assert!(parameters.clone().set(vec![7; 64]));
        assert_eq!(parameters.get(), Some(vec![7; 64]));
    }
}
