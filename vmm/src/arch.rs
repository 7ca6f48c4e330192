//! The seam: what the core asks of an architecture.
//!
//! | question | asked by | pure |
//! |---|---|---|
//! | plan | [`Architecture::machine`] | yes |
//! | describe | [`Machine::describe`] | yes |
//! | load | [`Machine::load`] | writes guest memory |
//! | create controllers | [`KvmMachine::create_controllers`], [`KvmMachine::finish_controllers`] | no |
//! | route interrupts | [`Machine::routes`], [`Machine::route_msi`], [`Machine::irq_line`], [`Machine::controller_pages`] | yes |
//! | start a vCPU | [`KvmMachine::init_vcpu`], [`KvmMachine::start_vcpu`] | no |
//! | platform devices | [`Machine::attach`] | yes |
//! | exits of its own | [`ExitHandler`], made by [`Machine::attach`] | yes |
//!
//! Everything pure is compiled and tested on every host for every architecture.
//! Only the [`KvmArchitecture`] and [`KvmMachine`] of the host's own
//! architecture exist in a binary; elsewhere the methods that hand them out
//! return `None`.

use std::fmt;

use crossvisor_devices::irq::{AdapterIndicator, MsiMessage};
use serde::Serialize;
use vm_memory::GuestMemoryMmap;

use crate::config::{BootImages, VmConfig};
use crate::error::{Error, Result};
use crate::exit::{Action, ArchExit};
use crate::hv::Route;
use crate::kvm;
use crate::plan::{Plan, Range};
use crate::wiring::Wiring;

/// A guest architecture. It holds no state: one constant of each is in the list
/// of architectures.
pub trait Architecture: Send + Sync {
    /// Canonical name, as `--arch` takes it and Debian or the kernel spell it
    /// (`x86_64`, `aarch64`, `ppc64le`, `s390x`, `riscv64`).
    fn name(&self) -> &'static str;

    /// Other names that `--arch` takes (`amd64`, `arm64`).
    fn aliases(&self) -> &'static [&'static str];

    /// Plans a machine for `config` on `host` (pure).
    ///
    /// # Errors
    /// Names the option that cannot be met and what would work.
    fn machine(&self, config: &VmConfig, host: &Host) -> Result<Box<dyn Machine>>;

    /// A host to plan for when this is not the host's architecture, or when
    /// there is no KVM to ask: what common hardware of the architecture offers.
    fn typical_host(&self) -> Host;

    /// A payload that shows whether a KVM runs unmodified kernels.
    fn self_test(&self) -> Option<SelfTest>;

    /// The KVM side, on a host of this architecture.
    fn kvm(&self) -> Option<&dyn KvmArchitecture>;
}

/// A planned machine.
pub trait Machine: Send + Sync {
    /// Where everything is.
    fn plan(&self) -> &Plan;

    /// What the guest reads about the machine (FDT, ACPI tables), as files: for
    /// `plan`, and for tests to parse back. What only loading decides (where an
    /// initrd is) is left out.
    ///
    /// # Errors
    /// A table cannot be built.
    fn describe(&self) -> Result<Vec<Description>>;

    /// Writes kernel, initrd, command line and the machine's description into
    /// guest memory and returns the boot vCPU's registers.
    ///
    /// # Errors
    /// The image is of a wrong kind or does not fit; names the file.
    fn load(&self, images: &BootImages, memory: &GuestMemoryMmap) -> Result<RegisterState>;

    /// Adds the machine's own devices (UART, RTC, power control) to the VM and
    /// returns what handles the exits that only this architecture has.
    ///
    /// # Errors
    /// A device could not be made.
    fn attach(&self, wiring: &mut Wiring) -> Result<Box<dyn ExitHandler>>;

    /// The routes of the interrupt wires: those of a routing table that are not
    /// messages. Empty where KVM has no routing table.
    fn routes(&self) -> Vec<(u32, Route)>;

    /// Turns a message that a device was programmed with into a route. `None`
    /// when the message leads nowhere on this machine.
    fn route_msi(&self, message: MsiMessage) -> Option<Route>;

    /// Turns the indicator of a channel device's adapter interruptions into a
    /// route. `None` when the machine has no such routes: the device's own
    /// thread then sets the bits and interrupts.
    fn route_adapter(&self, indicator: AdapterIndicator) -> Option<Route> {
        let _ = indicator;
        None
    }

    /// KVM_IRQ_LINE's number for the wire `gsi`.
    fn irq_line(&self, gsi: u32) -> u32;

    /// The pages by which the guest reaches the controller in the kernel
    /// itself. Empty where KVM needs no mapping for that.
    fn controller_pages(&self) -> Vec<ControllerPages> {
        Vec::new()
    }

    /// Whether a reset that the guest asked for came from a kernel's panic. By
    /// default a machine's command line makes Linux reset warm after a panic
    /// and cold otherwise; `event` is the data of KVM_EXIT_SYSTEM_EVENT and
    /// then [`KvmMachine::system_event_registers`], empty for a reset by a
    /// device.
    fn reset_is_panic(&self, memory: &GuestMemoryMmap, event: &[u64]) -> bool;

    /// Whether vCPUs other than the first are started by the VMM
    /// ([`Action::Start`]) rather than by what KVM emulates.
    fn starts_secondaries(&self) -> bool {
        false
    }

    /// The KVM side, on a host of this architecture.
    fn kvm(&self) -> Option<&dyn KvmMachine>;
}

/// Pages of an interrupt controller in the kernel, which KVM has mapped from
/// the controller's file descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerPages {
    /// Where in the file they begin, in bytes.
    pub offset: u64,
    /// Their guest-physical addresses.
    pub range: Range,
    /// The parts that the guest may reach; the others are only the VMM's
    /// ([`Vm::load_controller`](crate::hv::Vm::load_controller)).
    pub visible: Vec<Range>,
}

/// Handles the exits that only one architecture has. Called from every vCPU
/// thread, several at a time.
pub trait ExitHandler: Send + Sync {
    /// Handles one exit of vCPU `vcpu`. What a guest asks for and does not get
    /// is answered in the architecture's own way; an exit that KVM should not
    /// have handed over ends the VM with [`End::Crash`](crate::exit::End::Crash).
    fn handle(&self, vcpu: u32, exit: ArchExit<'_>) -> Action;

    /// vCPU `vcpu`, which was held back or parked, has its registers and runs:
    /// from here on the hypervisor takes interrupts for it.
    fn started(&self, vcpu: u32) {
        let _ = vcpu;
    }
}

/// For machines all of whose exits are the core's.
#[derive(Debug)]
pub struct NoArchExits;

impl ExitHandler for NoArchExits {
    fn handle(&self, vcpu: u32, exit: ArchExit<'_>) -> Action {
        Action::End(crate::exit::End::Crash(format!(
            "vCPU {vcpu} left with KVM exit reason {}, which this machine does not have",
            exit.reason
        )))
    }
}

/// What the guest reads about its machine, as a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// File name, such as `machine.dtb` or `dsdt.aml`.
    pub name: &'static str,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// Initial registers of a vCPU, as data: names as the architecture's manual
/// spells them, in lower case. Registers that are not named are as the
/// architecture's reset leaves them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RegisterState(pub Vec<(&'static str, u64)>);

impl RegisterState {
    /// The value of `name`.
    pub fn get(&self, name: &str) -> Option<u64> {
        let found = self.0.iter().find(|(register, _)| *register == name);
        found.map(|(_, value)| *value)
    }
}

impl fmt::Display for RegisterState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (name, value)) in self.0.iter().enumerate() {
            let space = if position == 0 { "" } else { " " };
            write!(f, "{space}{name}={value:#x}")?;
        }
        Ok(())
    }
}

/// What a host offers, as data: probed from its KVM, or typical for an
/// architecture.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Page size in bytes.
    pub page_size: u64,
    /// How many vCPUs KVM allows (KVM_CAP_MAX_VCPUS).
    pub max_vcpus: u32,
    /// Guest-physical address width in bits.
    pub physical_bits: u32,
    /// What the machine models use, or would use, of KVM.
    pub capabilities: Vec<Capability>,
}

impl Host {
    /// The value of the capability called `name`; 0 when it is not there.
    pub fn capability(&self, name: &str) -> i64 {
        let found = self.capabilities.iter().find(|cap| cap.name == name);
        found.map_or(0, |cap| cap.value)
    }

    /// Whether the capability called `name` is there.
    pub fn has(&self, name: &str) -> bool {
        self.capability(name) != 0
    }
}

/// Something of KVM that a machine model uses when it is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Name, in the KVM API's or the architecture's words.
    pub name: &'static str,
    /// Its value; 0 when it is not there.
    pub value: i64,
    /// What crossvisor does, given that value.
    pub effect: String,
}

/// A bare-metal payload that uses what unmodified kernels use.
///
/// After each of its `steps` it stores the number of steps done, as 32 bits, to
/// `report`; no device is needed but this address.
#[derive(Clone, Debug)]
pub struct SelfTest {
    /// Size of the RAM from address `ram_base`, in bytes.
    pub ram_size: u64,
    /// Where that RAM starts.
    pub ram_base: u64,
    /// What to write into it: address and bytes.
    pub image: Vec<(u64, Vec<u8>)>,
    /// Initial registers.
    pub registers: RegisterState,
    /// Address, outside RAM, that the payload stores to.
    pub report: u64,
    /// What each step does, in order, such as `cmpxchg16b`.
    pub steps: &'static [&'static str],
}

/// The KVM side of an architecture: only the host's own exists.
pub trait KvmArchitecture: Send + Sync {
    /// Asks the host's KVM what it offers.
    ///
    /// # Errors
    /// KVM does not answer.
    fn probe(&self, kvm: &kvm::Kvm) -> Result<Host>;
}

/// The KVM side of a machine: what the core does not know how to say to KVM.
pub trait KvmMachine: Send + Sync {
    /// The machine type for KVM_CREATE_VM.
    fn vm_type(&self) -> u64;

    /// Creates the interrupt controllers and what else must exist before vCPUs.
    /// The device handles live as long as the VM.
    ///
    /// # Errors
    /// KVM refused; the text names what, and what would work.
    fn create_controllers(&self, vm: &kvm::VmFd) -> Result<Vec<kvm::DeviceFd>>;

    /// KVM's number for vCPU `index`.
    fn vcpu_id(&self, index: u32) -> u64 {
        u64::from(index)
    }

    /// Sets up a fresh vCPU: features, CPUID, everything but its start state.
    /// `controllers` are what [`create_controllers`](Self::create_controllers)
    /// made.
    ///
    /// # Errors
    /// KVM refused.
    fn init_vcpu(
        &self,
        vm: &kvm::VmFd,
        controllers: &[kvm::DeviceFd],
        vcpu: &kvm::VcpuFd,
        index: u32,
    ) -> Result<()>;

    /// Creates what needs every vCPU to exist first.
    ///
    /// # Errors
    /// KVM refused; the text names what, and what would work.
    fn finish_controllers(&self, vm: &kvm::VmFd) -> Result<Vec<kvm::DeviceFd>>;

    /// Gives a vCPU its start state; see [`Vcpu::start`](crate::hv::Vcpu::start).
    ///
    /// # Errors
    /// KVM refused a register.
    fn start_vcpu(
        &self,
        vcpu: &mut kvm::VcpuFd,
        index: u32,
        registers: Option<&RegisterState>,
    ) -> Result<()>;

    /// Sets registers of the VM as a whole; see
    /// [`Vm::set_registers`](crate::hv::Vm::set_registers).
    ///
    /// # Errors
    /// KVM refused one, or the machine has none.
    fn set_vm_registers(&self, _vm: &kvm::VmFd, registers: &RegisterState) -> Result<()> {
        Err(no_such_registers(registers))
    }

    /// Sets registers of a vCPU between two runs; see
    /// [`Action::Set`](crate::exit::Action::Set).
    ///
    /// # Errors
    /// KVM refused one, or no exit of the machine sets any.
    fn set_vcpu_registers(&self, _vcpu: &mut kvm::VcpuFd, registers: &RegisterState) -> Result<()> {
        Err(no_such_registers(registers))
    }

    /// Registers of a vCPU that made a system event, where KVM leaves out of
    /// the event's data what [`Machine::reset_is_panic`] needs to know.
    ///
    /// # Errors
    /// KVM refused a register.
    fn system_event_registers(&self, _vcpu: &kvm::VcpuFd) -> Result<Vec<u64>> {
        Ok(Vec::new())
    }

    /// Tells KVM that a vCPU is stopped; see [`Vcpu::park`](crate::hv::Vcpu::park).
    ///
    /// # Errors
    /// KVM refused.
    fn park_vcpu(&self, _vcpu: &mut kvm::VcpuFd) -> Result<()> {
        Ok(())
    }

    /// Registers as text, for the report of a crash.
    fn dump_vcpu(&self, vcpu: &kvm::VcpuFd) -> String;
}

fn no_such_registers(registers: &RegisterState) -> Error {
    Error::Boot(format!(
        "internal error: this machine has no way to set {registers}"
    ))
}
