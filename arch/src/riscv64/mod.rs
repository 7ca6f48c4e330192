//! The riscv64 machine: RAM from 2 GiB, an AIA or a PLIC, SBI, a device tree,
//! and virtio on PCI or MMIO.

mod aplic;
mod asm;
mod fdt;
mod host;
pub mod irqchip;
mod isa;
mod layout;
mod load;
mod payload;
mod plic;
pub mod registers;
mod sbi;

cfg_if::cfg_if! {
    if #[cfg(target_arch = "riscv64")] {
        mod kvm;

        fn kvm_architecture(arch: &Riscv64) -> Option<&dyn KvmArchitecture> {
            Some(arch)
        }

        fn kvm_machine(machine: &Riscv64Machine) -> Option<&dyn KvmMachine> {
            Some(machine)
        }
    } else {
        fn kvm_architecture(_: &Riscv64) -> Option<&dyn KvmArchitecture> {
            None
        }

        fn kvm_machine(_: &Riscv64Machine) -> Option<&dyn KvmMachine> {
            None
        }
    }
}

#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crossvisor_devices::irq::MsiMessage;
use crossvisor_devices::rtc::Goldfish;
use crossvisor_devices::serial::Serial;
use crossvisor_vmm::arch::{
    Architecture, Description, ExitHandler, Host, KvmArchitecture, KvmMachine, Machine,
    RegisterState, SelfTest,
};
use crossvisor_vmm::config::{BootImages, Console, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::plan::Plan;
use crossvisor_vmm::wiring::Wiring;
use vm_memory::GuestMemoryMmap;

use self::fdt::Contents;
use self::irqchip::Irqchip;
use self::layout::name;
use self::plic::Plic;
use self::sbi::Sbi;
use crate::shared::fdt::Loading;

/// The architecture's canonical name.
const NAME: &str = "riscv64";

// Arguments of SBI's system_reset (RISC-V SBI Specification, chapter 10).
/// Reset type "warm reboot".
const RESET_WARM: u64 = 2;
/// Reset reason "system failure".
const RESET_SYSTEM_FAILURE: u64 = 1;

/// The riscv64 architecture.
#[derive(Debug)]
pub struct Riscv64;

impl Architecture for Riscv64 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["riscv"]
    }

    fn machine(&self, config: &VmConfig, host: &Host) -> Result<Box<dyn Machine>> {
        Ok(Box::new(Riscv64Machine::new(config, host)?))
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

/// A planned riscv64 machine.
#[derive(Debug)]
pub struct Riscv64Machine {
    plan: Plan,
    irqchip: Irqchip,
    console: Console,
    host: Host,
}

impl Riscv64Machine {
    /// Plans a machine for `config` on `host`.
    ///
    /// # Errors
    /// Names the option that cannot be met and what would work.
    pub fn new(config: &VmConfig, host: &Host) -> Result<Self> {
        host::require(host)?;
        let irqchip = Irqchip::choose(config.irqchip.as_deref(), host)?;
        Ok(Self {
            plan: layout::plan(config, host, irqchip)?,
            irqchip,
            console: config.console,
            host: host.clone(),
        })
    }

    /// Its interrupt controller.
    pub fn irqchip(&self) -> Irqchip {
        self.irqchip
    }

    /// Whether guests have the SBI's debug console. Linux makes its first hvc
    /// console of it, which is the virtio console's place when that is asked
    /// for.
    pub fn has_debug_console(&self) -> bool {
        self.host.has(host::DBCN) && self.console == Console::Native
    }

    fn contents(&self) -> Contents<'_> {
        Contents {
            plan: &self.plan,
            irqchip: self.irqchip,
            host: &self.host,
            console: self.console,
        }
    }
}

impl Machine for Riscv64Machine {
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
        let vm = wiring.vm();
        match self.irqchip {
            Irqchip::Aia => wiring.set_line_source(Arc::new(aplic::Wires(vm))),
            Irqchip::Plic => {
                let pin = Box::new(move |vcpu, asserted| vm.set_interrupt_pin(vcpu, asserted));
                let plic = Plic::new(self.plan.cpus, layout::WIRES, pin);
                wiring.place(name::PLIC, plic.clone())?;
                wiring.set_line_source(Arc::new(plic::Wires(plic)));
            }
        }
        let line =
            |region: &str, wiring: &Wiring| {
                let gsi = wiring.region(region)?.gsi;
                wiring.edge_line(gsi.ok_or_else(|| {
                    Error::Boot(format!("internal error: {region} has no interrupt"))
                })?)
            };
        let uart = line(name::UART, wiring)?;
        let serial = Serial::new(uart, wiring.console_output(), 0)
            .map_err(|source| Error::io("the UART", source))?;
        let serial = Arc::new(serial);
        wiring.place(name::UART, serial.clone())?;
        wiring.set_console_input(serial.clone());
        let rtc = Goldfish::new(line(name::RTC, wiring)?);
        wiring.place(name::RTC, Arc::new(rtc))?;
        Ok(Box::new(Sbi::new(wiring.memory(), serial)))
    }

    fn routes(&self) -> Vec<(u32, Route)> {
        self.irqchip.wire_routes()
    }

    fn route_msi(&self, message: MsiMessage) -> Option<Route> {
        self.irqchip.route_msi(message, self.plan.cpus)
    }

    /// Sources of the APLIC are GSIs.
    fn irq_line(&self, gsi: u32) -> u32 {
        gsi
    }

    /// Linux asks for a warm reboot in place of a cold one when that is its
    /// mode, which the default command line sets after a panic only
    /// (arch/riscv/kernel/sbi.c, sbi_srst_reboot). Of the call KVM passes on
    /// the reason, which Linux leaves at 0 (arch/riscv/kvm/vcpu_sbi.c,
    /// kvm_riscv_vcpu_sbi_system_reset); the type is still in a0, which
    /// `system_event_registers` adds.
    fn reset_is_panic(&self, _memory: &GuestMemoryMmap, event: &[u64]) -> bool {
        match event {
            [reason, .., kind] => *kind == RESET_WARM || *reason == RESET_SYSTEM_FAILURE,
            _ => false,
        }
    }

    fn kvm(&self) -> Option<&dyn KvmMachine> {
        kvm_machine(self)
    }
}
