//! Device models and transports of crossvisor.
//!
//! Nothing here knows an architecture: a device sees guest memory, byte ranges
//! that the guest reads and writes, and interrupts that it raises. Where a
//! device sits and which controller takes its interrupts is decided by the
//! architecture's plan and wired up by the core.

pub mod acpi_power;
pub mod bus;
pub mod byte_order;
pub mod chardev;
pub mod css;
pub mod disk;
pub mod fd;
pub mod hvterm;
pub mod i8042;
pub mod irq;
pub mod notify;
pub mod output;
pub mod pci;
pub mod pl061;
pub mod rtc;
pub mod serial;
pub mod tap;
#[cfg(test)]
mod testing;
pub mod virtio;

/// Guest RAM as devices see it: replaceable as a whole, so that memory can be
/// added to a running guest.
pub type GuestMem = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap>;

/// What a device does to its machine, such as a reset; called on a vCPU thread.
pub type Callback = std::sync::Arc<dyn Fn() + Send + Sync>;
