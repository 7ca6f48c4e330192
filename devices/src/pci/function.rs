//! What the root bus asks of a PCI function.

use super::Bdf;
use super::config::{Bar, DecodedBar};

/// What a write to the configuration space means to the bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigEffect {
    /// The result of [`PciFunction::decoded_bars`] has changed.
    pub decode: bool,
}

/// A PCI function on a bus.
///
/// Calls come from any vCPU thread, several at a time. Offsets and lengths
/// come from the guest, with `data` of 1, 2, 4 or 8 bytes, little-endian.
pub trait PciFunction: Send + Sync {
    /// Tells the function where it sits, and so its requester ID, before the
    /// guest can reach it.
    fn attach(&self, bdf: Bdf);

    /// The BARs that need addresses, with their numbers.
    fn bars(&self) -> Vec<(u8, Bar)>;

    /// Places a BAR at a PCI bus address, as firmware would; a reset goes back
    /// to it.
    fn place_bar(&self, bar: u8, address: u64);

    /// Reads the configuration space at `register`, 0 to 4095; what the
    /// function does not have reads as all ones.
    fn config_read(&self, register: u16, data: &mut [u8]);

    /// Writes the configuration space.
    fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect;

    /// The PCI bus addresses that the function answers now.
    fn decoded_bars(&self) -> Vec<DecodedBar>;

    /// Tells the function at which guest-physical addresses its BARs now
    /// appear; a BAR that is not listed appears nowhere. Called with the bus
    /// locked: it must not call back into it.
    fn bars_mapped(&self, mapped: &[(u8, u64)]);

    /// Reads at `offset` of BAR `bar`.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes at `offset` of BAR `bar`.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// Resets the function and its configuration space, as at the reset of the
    /// machine.
    fn reset(&self);
}
