//! Device models and transports of crossvisor.
//!
//! Nothing here knows an architecture: a device sees guest memory, byte ranges
//! that the guest reads and writes, and interrupts that it raises. Where a
//! device sits and which controller takes its interrupts is decided by the
//! architecture's plan and wired up by the core.

pub mod bus;
pub mod chardev;
pub mod irq;
pub mod notify;
pub mod pci;
pub mod virtio;

/// Guest RAM as devices see it: replaceable as a whole, so that memory can be
/// added to a running guest.
pub type GuestMem = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap>;
