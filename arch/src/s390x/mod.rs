//! The s390x machine: RAM from 0, a channel subsystem with virtio-ccw devices,
//! SCLP for consoles and the machine's description, the FLIC.

mod chsc;
mod cpu;
mod diag;
mod ebcdic;
mod handler;
pub mod host;
mod interrupt;
mod ipl;
mod layout;
mod load;
pub mod registers;
mod sclp;
mod sigp;
mod stsi;
#[cfg(test)]
mod testing;
mod watchdog;

cfg_if::cfg_if! {
    if #[cfg(target_arch = "s390x")] {
        mod kvm;

        fn kvm_architecture(arch: &S390x) -> Option<&dyn KvmArchitecture> {
            Some(arch)
        }

        fn kvm_machine(machine: &S390xMachine) -> Option<&dyn KvmMachine> {
            Some(machine)
        }
    } else {
        fn kvm_architecture(_: &S390x) -> Option<&dyn KvmArchitecture> {
            None
        }

        fn kvm_machine(_: &S390xMachine) -> Option<&dyn KvmMachine> {
            None
        }
    }
}

use std::sync::Arc;

use crossvisor_devices::css::ChannelSubsystem;
use crossvisor_devices::irq::{AdapterIndicator, MsiMessage};
use crossvisor_vmm::arch::{
    Architecture, Description, ExitHandler, Host, KvmArchitecture, KvmMachine, Machine,
    RegisterState, SelfTest,
};
use crossvisor_vmm::config::{BootImages, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::plan::{DeviceKind, Plan, Slot};
use crossvisor_vmm::wiring::Wiring;
use vm_memory::GuestMemoryMmap;

use self::handler::Handler;
use self::interrupt::Floating;
use self::ipl::IplParameters;
use self::sclp::{Facts, Sclp};
use self::sigp::{Cpus, Features};
use self::stsi::Identity;
use self::watchdog::Watchdog;

/// The architecture's canonical name.
const NAME: &str = "s390x";

/// The s390x architecture.
#[derive(Debug)]
pub struct S390x;

impl Architecture for S390x {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["s390"]
    }

    fn machine(&self, config: &VmConfig, host: &Host) -> Result<Box<dyn Machine>> {
        Ok(Box::new(S390xMachine::new(config, host)?))
    }

    fn typical_host(&self) -> Host {
        host::typical()
    }

    fn self_test(&self) -> Option<SelfTest> {
        // There is no memory but RAM that a payload could report to, and no
        // KVM here that emulates instructions: where it is, kernels run.
        None
    }

    fn kvm(&self) -> Option<&dyn KvmArchitecture> {
        kvm_architecture(self)
    }
}

/// A planned s390x machine.
#[derive(Debug)]
pub struct S390xMachine {
    plan: Plan,
    host: Host,
    identity: Identity,
    ipl: IplParameters,
    hugepages: bool,
}

impl S390xMachine {
    /// Plans a machine for `config` on `host`.
    ///
    /// # Errors
    /// Names the option that cannot be met and what would work.
    pub fn new(config: &VmConfig, host: &Host) -> Result<Self> {
        host::require(host)?;
        if config.hugepages {
            host::require_huge_pages(host)?;
        }
        let plan = layout::plan(config, host)?;
        // As if it had been loaded from the first disk.
        let first_disk = plan.devices.iter().find_map(|device| match device.slot {
            Slot::Ccw { devno } if device.kind == DeviceKind::Block => Some(devno),
            _ => None,
        });
        Ok(Self {
            plan,
            host: host.clone(),
            identity: Identity::new(&config.name),
            ipl: IplParameters::new(first_disk),
            hugepages: config.hugepages,
        })
    }

    /// Whether guest memory is in huge pages, which KVM must be told.
    pub fn hugepages(&self) -> bool {
        self.hugepages
    }

    /// Whether vCPUs have vector registers.
    fn has_vector(&self) -> bool {
        self.features().vector
    }

    /// What vCPUs have on this host.
    fn features(&self) -> Features {
        Features {
            vector: self.host.has("KVM_CAP_S390_VECTOR_REGISTERS"),
            control_program: self.host.has("KVM_CAP_S390_DIAG318"),
        }
    }
}

impl Machine for S390xMachine {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The IPL parameters; the rest a guest asks SCLP and the channel subsystem
    /// for.
    fn describe(&self) -> Result<Vec<Description>> {
        let block = self.ipl.get().map(|bytes| Description {
            name: "ipl-parameters.bin",
            bytes,
        });
        Ok(block.into_iter().collect())
    }

    fn load(&self, images: &BootImages, memory: &GuestMemoryMmap) -> Result<RegisterState> {
        if self.hugepages && !self.host.has("KVM_CAP_S390_COW") {
            // A huge page that is read first is mapped read-only, and without
            // ESOP the guest gets the exception when it writes there.
            load::touch(&self.plan, memory)?;
        }
        load::load(&self.plan, images, memory)
    }

    fn attach(&self, wiring: &mut Wiring) -> Result<Box<dyn ExitHandler>> {
        let (vm, memory) = (wiring.vm(), wiring.memory());
        let floating = Floating {
            vm: vm.clone(),
            vector: self.has_vector(),
        };
        let css = ChannelSubsystem::new(Arc::new(floating), memory.clone());
        wiring.set_channel_subsystem(css.clone());
        let facts = Facts {
            memory: self.plan.memory_size(),
            cpus: self.plan.cpus,
            consoles: wiring.console_is_native(),
            control_program: self.features().control_program,
        };
        let sclp = Sclp::new(facts, vm.clone(), wiring.console_output())
            .map_err(|source| Error::io("SCLP", source))?;
        wiring.set_console_input(sclp.clone());
        wiring.set_power_button({
            let sclp = sclp.clone();
            move || sclp.quiesce()
        });
        Ok(Box::new(Handler {
            cpus: Cpus::new(vm.clone(), memory.clone(), self.plan.cpus, self.features()),
            vm,
            memory,
            css,
            sclp,
            ipl: self.ipl.clone(),
            watchdog: Watchdog::new(wiring.power()),
            power: wiring.power(),
            identity: self.identity.clone(),
            count: self.plan.cpus,
        }))
    }

    fn routes(&self) -> Vec<(u32, Route)> {
        Vec::new()
    }

    fn route_msi(&self, _message: MsiMessage) -> Option<Route> {
        None
    }

    /// Each interruption subclass has an adapter of its number. KVM maps the
    /// page of the address alone and, before Linux 7.0, sets the bit wherever
    /// the guest says that it is from there (`adapter_indicators_set`): one in
    /// another page has no route.
    fn route_adapter(&self, indicator: AdapterIndicator) -> Option<Route> {
        const PAGE: u64 = 4096;
        /// The byte's last.
        const SUMMARY_BIT: u32 = 7;
        let routed = self.host.has("KVM_CAP_IRQFD") && self.host.has("KVM_CAP_S390_IRQCHIP");
        let in_page = indicator.bit / 8 < PAGE - indicator.address % PAGE;
        (routed && in_page).then_some(Route::Adapter {
            adapter: indicator.subclass.into(),
            address: indicator.address,
            bit: indicator.bit,
            summary: indicator.summary,
            summary_bit: SUMMARY_BIT,
        })
    }

    fn irq_line(&self, gsi: u32) -> u32 {
        gsi
    }

    /// A kernel that panics stops in a wait; what resets is a reboot.
    fn reset_is_panic(&self, _memory: &GuestMemoryMmap, _event: &[u64]) -> bool {
        false
    }

    fn starts_secondaries(&self) -> bool {
        true
    }

    fn kvm(&self) -> Option<&dyn KvmMachine> {
        kvm_machine(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What KVM would set somewhere else in the host's memory has no route.
    #[test]
    fn indicators_with_routes_are_in_the_page_of_their_address() {
        let host = host::typical();
        let machine = S390x.machine(&VmConfig::default(), &host).unwrap();
        let routed = |address, bit| {
            let indicator = AdapterIndicator {
                address,
                bit,
                summary: 0x8000,
                subclass: 3,
            };
            machine.route_adapter(indicator).is_some()
        };
        assert!(routed(0x5000, 0) && routed(0x5000, 4096 * 8 - 1));
        assert!(routed(0x5ff8, 63) && !routed(0x5ff8, 64));
        for beyond in [4096 * 8, 1 << 40, u64::MAX] {
            assert!(!routed(0x5000, beyond), "{beyond:#x}");
        }
    }
}
