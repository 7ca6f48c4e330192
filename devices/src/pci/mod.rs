//! PCI: configuration space, base address registers, interrupts, the root bus.

use std::fmt;

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
