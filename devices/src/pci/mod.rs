//! PCI: configuration space, base address registers, interrupts, the root bus.

pub mod access;
pub mod config;
pub mod function;
pub mod msix;
pub mod root;
pub mod window;

use std::fmt;

pub use access::{ConfigMechanism1, ECAM_BUS_SIZE, Ecam};
pub use function::{ConfigEffect, PciFunction};
pub use root::{PciError, PciRoot};
pub use window::PciWindow;

/// Where a function sits (PCI Local Bus Specification 3.0, section 3.2.2.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl Bdf {
    /// The 16-bit requester ID, as MSI carries it.
    pub fn requester_id(self) -> u16 {
        u16::from(self.bus) << 8
            | u16::from(self.device & 0x1f) << 3
            | u16::from(self.function & 0x7)
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// Which of a host bridge's four wires an INTx pin is connected to, 0 to 3: for
/// `pin` 1 (INTA#) to 4 of the device in `slot`, rotated by slot so that
/// devices spread over the wires (PCI-to-PCI Bridge Architecture Specification
/// 1.2, section 9.1). What describes the machine to the guest, and what
/// connects the wires, both go by this.
pub const fn intx_gsi_index(slot: u8, pin: u8) -> u8 {
    slot.wrapping_add(pin).wrapping_sub(1) % 4
}
