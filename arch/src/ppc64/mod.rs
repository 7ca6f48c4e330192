//! The ppc64le machine: a PAPR partition ("pseries") with KVM-HV. RAM from 0,
//! a XIVE or an XICS, hypercalls and RTAS, a device tree, and virtio on PCI.
//!
//! The machine is the same for big-endian guests; its name is the hosts'.

mod fdt;
mod hcall;
mod host;
mod irqchip;
mod layout;
mod load;
pub mod mmu;
mod names;
mod payload;
mod rtas;
pub mod sources;
pub mod speculation;
mod xive;

cfg_if::cfg_if! {
    if #[cfg(target_arch = "powerpc64")] {
        mod kvm;

        fn kvm_architecture(arch: &Ppc64) -> Option<&dyn KvmArchitecture> {
            Some(arch)
        }

        fn kvm_machine(machine: &Ppc64Machine) -> Option<&dyn KvmMachine> {
            Some(machine)
        }
    } else {
        fn kvm_architecture(_: &Ppc64) -> Option<&dyn KvmArchitecture> {
            None
        }

        fn kvm_machine(_: &Ppc64Machine) -> Option<&dyn KvmMachine> {
            None
        }
    }
}

#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crossvisor_devices::chardev::ConsoleInput;
use crossvisor_devices::hvterm::Hvterm;
use crossvisor_devices::irq::MsiMessage;
use crossvisor_vmm::arch::{
    Architecture, ControllerPages, Description, ExitHandler, Host, KvmArchitecture, KvmMachine,
    Machine, RegisterState, SelfTest,
};
use crossvisor_vmm::config::{BootImages, Console, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::plan::Plan;
use crossvisor_vmm::wiring::Wiring;
use vm_memory::GuestMemoryMmap;

use self::fdt::{Contents, Loading};
use self::hcall::Hypercalls;
use self::irqchip::Irqchip;
use self::mmu::Mmu;
use self::rtas::Rtas;
use self::rtas::events::Events;
use self::xive::Xive;
use self::xive::calls::{Lines, XiveCalls};

/// The architecture's canonical name.
const NAME: &str = "ppc64le";

/// The ppc64le architecture.
#[derive(Debug)]
pub struct Ppc64;

impl Architecture for Ppc64 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["ppc64el", "powerpc64le", "ppc64"]
    }

    fn machine(&self, config: &VmConfig, host: &Host) -> Result<Box<dyn Machine>> {
        Ok(Box::new(Ppc64Machine::new(config, host)?))
    }

    fn typical_host(&self) -> Host {
        host::typical()
    }

    fn self_test(&self) -> Option<SelfTest> {
        Some(payload::self_test())
    }

    fn kvm(&self) -> Option<&dyn KvmArchitecture> {
        kvm_architecture(self)
    }
}

/// A planned ppc64le machine.
#[derive(Debug)]
pub struct Ppc64Machine {
    plan: Plan,
    mmu: Mmu,
    irqchip: Irqchip,
    console: Console,
    backing_page: u64,
    host: Host,
}

impl Ppc64Machine {
    /// Plans a machine for `config` on `host`.
    ///
    /// # Errors
    /// Names the option that cannot be met and what would work.
    pub fn new(config: &VmConfig, host: &Host) -> Result<Self> {
        host::require(host)?;
        let mmu = Mmu::choose(config.mmu.as_deref(), host)?;
        let irqchip = Irqchip::of(config, host)?;
        Ok(Self {
            plan: layout::plan(config, host, mmu, irqchip)?,
            mmu,
            irqchip,
            console: config.console,
            backing_page: host::backing_page(config, host),
            host: host.clone(),
        })
    }

    /// How its guests translate.
    pub fn mmu(&self) -> Mmu {
        self.mmu
    }

    /// The machine's XIVE, if it has one.
    fn xive(&self) -> Option<Xive> {
        match self.irqchip {
            Irqchip::Xive => Some(Xive::new(&self.plan, &self.host)),
            Irqchip::Xics => None,
        }
    }

    fn contents(&self) -> Contents<'_> {
        Contents {
            plan: &self.plan,
            mmu: self.mmu,
            backing_page: self.backing_page,
            xive: self.xive(),
            console: self.console,
            host: &self.host,
        }
    }
}

impl Machine for Ppc64Machine {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn describe(&self) -> Result<Vec<Description>> {
        Ok(vec![Description {
            name: "machine.dtb",
            bytes: fdt::build(&self.contents(), &Loading::default())?,
        }])
    }

    fn load(&self, images: &BootImages, memory: &GuestMemoryMmap) -> Result<RegisterState> {
        load::load(&self.contents(), images, memory)
    }

    fn attach(&self, wiring: &mut Wiring) -> Result<Box<dyn ExitHandler>> {
        let terminal = match self.console {
            Console::Native => {
                let line = wiring.edge_line(sources::VTY)?;
                let terminal = Hvterm::new(line, wiring.console_output())
                    .map_err(|source| Error::io("the virtual terminal", source))?;
                let terminal = Arc::new(terminal);
                wiring.set_console_input(terminal.clone() as Arc<dyn ConsoleInput>);
                Some(terminal)
            }
            Console::Virtio | Console::None => None,
        };
        let events = Arc::new(Events::new(wiring.edge_line(sources::EPOW)?));
        wiring.set_power_button({
            let events = events.clone();
            move || {
                if let Err(error) = events.press_power_button() {
                    log::warn!("cannot ask the guest to power off: {error}");
                }
            }
        });
        let rtas = Rtas::new(
            wiring.memory(),
            self.plan.cpus,
            events,
            wiring.pci(),
            terminal.clone(),
        );
        let xive = self.xive().map(|xive| {
            let lines = Arc::new(Lines::new(wiring.vm()));
            wiring.set_line_source(lines.clone());
            let memory = self.plan.memory.clone();
            XiveCalls::new(wiring.vm(), xive, memory, lines)
        });
        let characteristics = speculation::answer(&self.host);
        let calls = Hypercalls::new(wiring.vm(), rtas, terminal, xive, characteristics, self.mmu);
        Ok(Box::new(calls))
    }

    /// KVM has no routing table: a source's number is its GSI.
    fn routes(&self) -> Vec<(u32, Route)> {
        Vec::new()
    }

    fn route_msi(&self, message: MsiMessage) -> Option<Route> {
        sources::route_msi(message)
    }

    fn controller_pages(&self) -> Vec<ControllerPages> {
        self.xive().map_or_else(Vec::new, |xive| xive.pages())
    }

    fn irq_line(&self, gsi: u32) -> u32 {
        gsi
    }

    /// A panic does not come as a reset: Linux tells of it by ibm,os-term.
    fn reset_is_panic(&self, _memory: &GuestMemoryMmap, _event: &[u64]) -> bool {
        false
    }

    /// By RTAS, start-cpu.
    fn starts_secondaries(&self) -> bool {
        true
    }

    fn kvm(&self) -> Option<&dyn KvmMachine> {
        kvm_machine(self)
    }
}
