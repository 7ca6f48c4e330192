//! Doorbells: guest writes that wake a device thread without leaving the kernel.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Where a guest rings a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// A store to this guest-physical address.
    Mmio(u64),
    /// A port write (x86 only).
    Pio(u16),
    /// A virtio-ccw notify (DIAGNOSE 0x500, function 3) for this subchannel ID.
    Ccw(u32),
}

/// Attaches event file descriptors to doorbells (KVM_IOEVENTFD).
pub trait Doorbells: Send + Sync {
    /// Signals `event` at each write to `bell` of `datamatch`'s value, or of
    /// anything when it is `None`. For [`Doorbell::Ccw`] the value is the
    /// queue index.
    ///
    /// # Errors
    /// KVM refused, or has no ioeventfd for this kind: the transport then
    /// handles the write itself, from the vCPU thread.
    fn attach(&self, bell: Doorbell, datamatch: Option<u32>, event: &EventFd) -> io::Result<()>;

    /// Undoes [`attach`](Self::attach) with the same arguments.
    ///
    /// # Errors
    /// KVM refused.
    fn detach(&self, bell: Doorbell, datamatch: Option<u32>, event: &EventFd) -> io::Result<()>;
}
