//! What the core needs of a hypervisor, the same on every architecture.
//!
//! KVM is behind these traits, and so is the scripted double by which machine
//! models are tested without /dev/kvm.

use std::io;

use crossvisor_devices::notify::Doorbell;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::RegisterState;
use crate::exit::Exit;

/// Where an interrupt number (GSI) leads (KVM_SET_GSI_ROUTING).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A pin of an interrupt controller in the kernel.
    Irqchip {
        /// Controller number, as the architecture counts them.
        chip: u32,
        /// Pin of that controller.
        pin: u32,
    },
    /// A message.
    Msi {
        /// Address written to.
        address: u64,
        /// Data written.
        data: u32,
        /// Requester ID, where the controller looks at it (KVM_MSI_VALID_DEVID).
        device_id: Option<u32>,
    },
    /// An interrupt source that the controller in the kernel knows by a number
    /// of its own, which is the GSI: where KVM has no routing table (XICS).
    Source(u32),
    /// A bit in guest memory and an adapter interruption (s390x).
    Adapter {
        /// The adapter's number in the FLIC; it says which subclass.
        adapter: u32,
        /// Guest-physical address from which the device's bits count, the
        /// leftmost first.
        address: u64,
        /// The bit, from there.
        bit: u64,
        /// Guest-physical address of the byte that says that some bit is set.
        summary: u64,
        /// Which bit of that byte says it, the leftmost being 0.
        summary_bit: u32,
    },
}

/// An interrupt that is neither a wire nor a message, in KVM's encoding of it
/// for the architecture (s390x: KVM_S390_IRQ's `struct kvm_s390_irq`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// What it is.
    pub kind: u64,
    /// What comes with it, in the architecture's byte order.
    pub data: [u8; 64],
}

/// A virtual machine in the hypervisor.
pub trait Vm: Send + Sync {
    /// Makes vCPU `index` (0 is the boot vCPU).
    ///
    /// # Errors
    /// The hypervisor refused.
    fn create_vcpu(&self, index: u32) -> crate::Result<Box<dyn Vcpu>>;

    /// Completes what can only be made once every vCPU exists.
    ///
    /// # Errors
    /// The hypervisor refused; the text names what.
    fn finish(&self) -> crate::Result<()>;

    /// Drives a line of the controller in the kernel (KVM_IRQ_LINE). `line` is
    /// the number in KVM's encoding for the architecture.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn set_irq_line(&self, line: u32, asserted: bool) -> io::Result<()>;

    /// Drives the external interrupt pin of vCPU `vcpu` (KVM_INTERRUPT), from
    /// any thread: for a controller that is modelled in user space.
    ///
    /// # Errors
    /// There is no such vCPU, or the hypervisor refused.
    fn set_interrupt_pin(&self, vcpu: u32, asserted: bool) -> io::Result<()>;

    /// Raises `gsi` whenever `event` is signalled (KVM_IRQFD).
    ///
    /// # Errors
    /// The hypervisor refused or has no irqfd.
    fn attach_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()>;

    /// Undoes [`attach_irqfd`](Self::attach_irqfd).
    ///
    /// # Errors
    /// The hypervisor refused.
    fn detach_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()>;

    /// Replaces the whole table of routes (KVM_SET_GSI_ROUTING).
    ///
    /// # Errors
    /// The hypervisor refused.
    fn set_routes(&self, routes: &[(u32, Route)]) -> io::Result<()>;

    /// Signals `event` at a guest's write (KVM_IOEVENTFD).
    ///
    /// # Errors
    /// The hypervisor refused or has no ioeventfd of this kind.
    fn attach_doorbell(
        &self,
        bell: Doorbell,
        datamatch: Option<u32>,
        event: &EventFd,
    ) -> io::Result<()>;

    /// Undoes [`attach_doorbell`](Self::attach_doorbell).
    ///
    /// # Errors
    /// The hypervisor refused.
    fn detach_doorbell(
        &self,
        bell: Doorbell,
        datamatch: Option<u32>,
        event: &EventFd,
    ) -> io::Result<()>;

    /// Sets registers that belong to the VM rather than to one vCPU, by the
    /// architecture's names for them (ppc64: where the guest's process table
    /// is).
    ///
    /// # Errors
    /// The hypervisor refused.
    fn set_registers(&self, registers: &RegisterState) -> crate::Result<()>;

    /// Sets an attribute of the interrupt controller in the kernel
    /// (KVM_SET_DEVICE_ATTR). `value` is what the hypervisor reads for it, in
    /// the host's byte order: at most 64 bytes.
    ///
    /// # Errors
    /// The hypervisor refused, or there is no controller.
    fn set_controller(&self, group: u32, attribute: u64, value: &[u8]) -> io::Result<()>;

    /// Loads a big-endian doubleword from guest-physical `address`, which is in
    /// the [`controller_pages`](crate::arch::Machine::controller_pages).
    ///
    /// # Errors
    /// No controller is there.
    fn load_controller(&self, address: u64) -> io::Result<u64>;

    /// Stores one; as [`load_controller`](Self::load_controller).
    ///
    /// # Errors
    /// No controller is there.
    fn store_controller(&self, address: u64, value: u64) -> io::Result<()>;

    /// Makes `interrupt` pending on a vCPU, or on whichever takes it when
    /// `vcpu` is `None`. May be called from any thread.
    ///
    /// # Errors
    /// The hypervisor refused or knows no such interrupts.
    fn inject(&self, vcpu: Option<u32>, interrupt: &Interrupt) -> io::Result<()>;

    /// Takes back the I/O interruptions of a subchannel that no vCPU has taken
    /// yet (s390x; `id` is the subsystem identification word).
    ///
    /// # Errors
    /// The hypervisor refused or knows no such interrupts.
    fn withdraw(&self, id: u32) -> io::Result<()>;
}

/// A vCPU in the hypervisor. It belongs to one thread.
pub trait Vcpu: Send {
    /// Gives the vCPU its initial state: `Some` for one that starts at a place
    /// (the boot vCPU, or one that is started by the VMM), `None` for one that
    /// waits to be started by means that the kernel emulates (INIT and SIPI,
    /// PSCI, SBI HSM).
    ///
    /// # Errors
    /// The hypervisor refused a register.
    fn start(&mut self, registers: Option<&RegisterState>) -> crate::Result<()>;

    /// Tells the hypervisor that the vCPU is stopped until it is started again.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn park(&mut self) -> crate::Result<()>;

    /// Enters the guest until it exits, and hands the exit to `handle`. A read
    /// that `handle` answers is completed at the next call.
    ///
    /// # Errors
    /// The hypervisor cannot run the vCPU.
    fn run(&mut self, handle: &mut dyn FnMut(Exit<'_>)) -> crate::Result<()>;

    /// Sets some registers of a vCPU that has left the guest.
    ///
    /// # Errors
    /// The hypervisor refused a register.
    fn set_registers(&mut self, registers: &RegisterState) -> crate::Result<()>;

    /// Registers as text, for the report of a crash.
    fn dump(&self) -> String;
}
