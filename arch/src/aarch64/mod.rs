//! The aarch64 machine: RAM from 1 GiB, a GICv2 or GICv3, PSCI, a device tree,
//! and virtio on PCI or MMIO.

mod asm;
mod fdt;
pub mod gic;
mod host;
mod layout;
mod load;
mod payload;
pub mod registers;
mod v2m;

cfg_if::cfg_if! {
    if #[cfg(target_arch = "aarch64")] {
        mod kvm;

        fn kvm_architecture(arch: &Aarch64) -> Option<&dyn KvmArchitecture> {
            Some(arch)
        }

        fn kvm_machine(machine: &Aarch64Machine) -> Option<&dyn KvmMachine> {
            Some(machine)
        }
    } else {
        fn kvm_architecture(_: &Aarch64) -> Option<&dyn KvmArchitecture> {
            None
        }

        fn kvm_machine(_: &Aarch64Machine) -> Option<&dyn KvmMachine> {
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
use crossvisor_devices::pl061::Pl061;
use crossvisor_devices::rtc::Pl031;
use crossvisor_devices::serial::Serial;
use crossvisor_vmm::arch::{
    Architecture, Description, ExitHandler, Host, KvmArchitecture, KvmMachine, Machine,
    NoArchExits, RegisterState, SelfTest,
};
use crossvisor_vmm::config::{BootImages, Console, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::plan::Plan;
use crossvisor_vmm::wiring::Wiring;
use vm_memory::GuestMemoryMmap;

use self::fdt::Contents;
use self::gic::Gic;
use self::layout::name;
use self::v2m::V2mFrame;
use crate::shared::fdt::Loading;

/// The architecture's canonical name.
const NAME: &str = "aarch64";

/// KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2 (KVM API, section 5,
/// KVM_EXIT_SYSTEM_EVENT): the guest called SYSTEM_RESET2.
const RESET_FLAG_PSCI_RESET2: u64 = 1 << 0;

/// The aarch64 architecture.
#[derive(Debug)]
pub struct Aarch64;

impl Architecture for Aarch64 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["arm64"]
    }

    fn machine(&self, config: &VmConfig, host: &Host) -> Result<Box<dyn Machine>> {
        Ok(Box::new(Aarch64Machine::new(config, host)?))
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

/// A planned aarch64 machine.
#[derive(Debug)]
pub struct Aarch64Machine {
    plan: Plan,
    gic: Gic,
    console: Console,
    host: Host,
    ipa_bits: u32,
}

impl Aarch64Machine {
    /// Plans a machine for `config` on `host`.
    ///
    /// # Errors
    /// Names the option that cannot be met and what would work.
    pub fn new(config: &VmConfig, host: &Host) -> Result<Self> {
        host::require(host)?;
        let gic = Gic::choose(config.irqchip.as_deref(), host)?;
        let (plan, ipa_bits) = layout::plan(config, host, gic)?;
        Ok(Self {
            plan,
            gic,
            console: config.console,
            host: host.clone(),
            ipa_bits,
        })
    }

    /// Its interrupt controller.
    pub fn gic(&self) -> Gic {
        self.gic
    }

    /// Width of its guest-physical address space in bits.
    pub fn ipa_bits(&self) -> u32 {
        self.ipa_bits
    }

    /// Whether vCPUs have a PMU.
    fn has_pmu(&self) -> bool {
        self.host.has("KVM_CAP_ARM_PMU_V3")
    }

    fn contents(&self) -> Contents<'_> {
        Contents {
            plan: &self.plan,
            gic: self.gic,
            pmu: self.has_pmu(),
            console: self.console,
        }
    }
}

impl Machine for Aarch64Machine {
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
        load::load(&self.contents(), &self.host, images, memory)
    }

    fn attach(&self, wiring: &mut Wiring) -> Result<Box<dyn ExitHandler>> {
        if let Some(gsi) = wiring.region(name::UART)?.gsi {
            let line = wiring.edge_line(gsi)?;
            let serial = Serial::new(line, wiring.console_output(), 0)
                .map_err(|source| Error::io("the UART", source))?;
            let serial = Arc::new(serial);
            wiring.place(name::UART, serial.clone())?;
            wiring.set_console_input(serial);
        }
        wiring.place(name::RTC, Arc::new(Pl031::new()))?;
        if let Some(gsi) = wiring.region(name::GPIO)?.gsi {
            let gpio = Arc::new(Pl061::new(wiring.level_line(gsi)));
            wiring.place(name::GPIO, gpio.clone())?;
            wiring.set_power_button(move || {
                // It fails when the host is out of threads: the user presses again.
                let _ = gpio.press_power_button();
            });
        }
        if self.gic == Gic::V2m {
            wiring.place(name::GIC_V2M, Arc::new(V2mFrame))?;
        }
        Ok(Box::new(NoArchExits))
    }

    fn routes(&self) -> Vec<(u32, Route)> {
        gic::wire_routes()
    }

    fn route_msi(&self, message: MsiMessage) -> Option<Route> {
        self.gic.route_msi(message)
    }

    fn irq_line(&self, gsi: u32) -> u32 {
        gic::irq_line(gsi)
    }

    /// Linux resets by PSCI's SYSTEM_RESET2 when the reset is a warm one, which
    /// the default command line asks for after a panic only
    /// (drivers/firmware/psci/psci.c, psci_sys_reset), and KVM tells which call
    /// it was (arch/arm64/kvm/psci.c, kvm_psci_system_reset2).
    fn reset_is_panic(&self, _memory: &GuestMemoryMmap, event: &[u64]) -> bool {
        event
            .first()
            .is_some_and(|flags| flags & RESET_FLAG_PSCI_RESET2 != 0)
    }

    fn kvm(&self) -> Option<&dyn KvmMachine> {
        kvm_machine(self)
    }
}
