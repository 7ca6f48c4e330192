//! Interrupts as a device raises them: a wire, or a set of message vectors.

use std::io;

/// A wire from a device into an interrupt controller.
///
/// What the wire is underneath (an irqfd, a KVM_IRQ_LINE call, a controller
/// modelled in user space) and whether it is edge- or level-triggered is the
/// plan's business. On an edge-triggered wire each `set(true)` is one
/// interrupt and `set(false)` does nothing.
pub trait IrqLine: Send + Sync {
    /// Drives the wire to `asserted`.
    ///
    /// # Errors
    /// The interrupt could not be delivered to the controller.
    fn set(&self, asserted: bool) -> io::Result<()>;
}

/// A message-signalled interrupt, as the guest programmed it (PCI Local Bus
/// Specification 3.0, section 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address that the device writes to.
    pub address: u64,
    /// Data that it writes.
    pub data: u32,
    /// The requester ID (bus, device, function) of the device that writes, by
    /// which a GICv3 ITS or an IOMMU tells devices apart.
    pub device_id: u32,
}

/// The message vectors of one device.
pub trait MsiVectors: Send + Sync {
    /// Number of vectors.
    fn count(&self) -> u16;

    /// Binds `vector` to a message, or unbinds it (masked or disabled).
    ///
    /// # Errors
    /// No such vector, or the route could not be installed.
    fn route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()>;

    /// Raises `vector`. While it is unbound, nothing happens: the transport
    /// keeps the pending bit.
    ///
    /// # Errors
    /// No such vector, or the interrupt could not be delivered.
    fn raise(&self, vector: u16) -> io::Result<()>;
}
