//! What the guest reads and writes: device registers on a bus.

/// Registers that a guest reaches through loads and stores (MMIO) or through
/// port instructions.
///
/// Calls come from any vCPU thread, several at a time; a device takes its own
/// locks. An access that the device does not know reads as zeroes or is
/// ignored: a guest's mistake is never an error of the VMM. `data` holds 1, 2,
/// 4 or 8 bytes as the guest's bus carries them (little-endian for the devices
/// in this crate).
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}
