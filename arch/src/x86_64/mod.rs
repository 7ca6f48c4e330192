//! x86_64: a PC without firmware.
//!
//! APICs in the kernel, ACPI hardware-reduced (see [`acpi`]), PCI by ECAM and
//! by ports, one UART. What differs from a PC is what only firmware or old
//! systems need: there is no PIT, no 8259 that is connected, no VGA, no
//! keyboard.

pub mod acpi;
pub mod caps;
pub mod cpuid;
pub mod gdt;
pub mod layout;
pub mod load;
pub mod payload;

use std::sync::Arc;

use crossvisor_devices::Callback;
use crossvisor_devices::acpi_power::AcpiPower;
use crossvisor_devices::i8042::I8042;
use crossvisor_devices::irq::MsiMessage;
use crossvisor_devices::pci::ConfigMechanism1;
use crossvisor_devices::rtc::Cmos;
use crossvisor_devices::serial::Serial;
use crossvisor_vmm::arch::{
    Architecture, Description, ExitHandler, Host, KvmArchitecture, KvmMachine, Machine,
    NoArchExits, RegisterState, SelfTest,
};
use crossvisor_vmm::config::{BootImages, Console, Transport, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::plan::{self, Plan};
use crossvisor_vmm::wiring::Wiring;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

cfg_if::cfg_if! {
    if #[cfg(target_arch = "x86_64")] {
        mod kvm;
        use kvm::{KvmSide, architecture, machine};
    } else {
        /// Nothing to remember of a KVM.
        type KvmSide = ();

        /// There is no KVM for this architecture here.
        fn architecture() -> Option<&'static dyn KvmArchitecture> {
            None
        }

        /// There is no KVM for this architecture here.
        fn machine(machine: &X86Machine) -> Option<&dyn KvmMachine> {
            let () = machine.kvm;
            None
        }
    }
}

/// The in-kernel I/O APIC's number in a routing table (KVM_IRQCHIP_IOAPIC).
const IRQCHIP_IOAPIC: u32 = 2;
/// The interrupt controller's name for `--irqchip`.
const IRQCHIP: &str = "apic";

/// Bits of a message's address that make it an interrupt (Intel SDM volume 3,
/// section 11.11.1): 0xfee in bits 20 to 31, nothing above.
const MSI_ADDRESS: u64 = 0xfee;

/// The architecture.
#[derive(Debug)]
pub struct X86_64;

impl Architecture for X86_64 {
    fn name(&self) -> &'static str {
        "x86_64"
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["amd64", "x86-64", "x64"]
    }

    fn machine(&self, config: &VmConfig, host: &Host) -> Result<Box<dyn Machine>> {
        Ok(Box::new(X86Machine::new(config, host)?))
    }

    fn typical_host(&self) -> Host {
        Host {
            page_size: 4096,
            max_vcpus: 1024,
            // What desktop processors have had at least since 2010.
            physical_bits: 39,
            capabilities: caps::probe(|_| 1),
        }
    }

    fn self_test(&self) -> Option<SelfTest> {
        Some(payload::self_test())
    }

    fn kvm(&self) -> Option<&dyn KvmArchitecture> {
        architecture()
    }
}

/// A planned machine.
#[derive(Debug)]
pub struct X86Machine {
    plan: Plan,
    tables: Vec<acpi::Table>,
    /// Only `kvm.rs` looks into it.
    kvm: KvmSide,
}

impl X86Machine {
    /// Plans the machine of `config` on `host`.
    ///
    /// # Errors
    /// Names the option that cannot be met and what would work.
    pub fn new(config: &VmConfig, host: &Host) -> Result<Self> {
        caps::require(host)?;
        let max_cpus = host.max_vcpus.min(caps::MAX_VCPUS);
        if config.cpus == 0 || config.cpus > max_cpus {
            return Err(Error::config(
                "--cpus",
                format!("{} is not between 1 and {max_cpus}", config.cpus),
            ));
        }
        if config.memory < layout::MEMORY_MIN {
            return Err(Error::config(
                "--memory",
                format!("this machine needs at least {}M", layout::MEMORY_MIN >> 20),
            ));
        }
        if let Some(irqchip) = config.irqchip.as_deref().filter(|name| *name != IRQCHIP) {
            return Err(Error::config(
                "--irqchip",
                format!("{irqchip} is not known here: x86_64 machines have {IRQCHIP}"),
            ));
        }
        plan::one_mmu(config)?;
        let transport =
            plan::transport(config, Transport::Pci, &[Transport::Pci, Transport::Mmio])?;
        let memory = layout::memory(config.memory);
        let pci = match transport {
            Transport::Pci => Some(layout::pci(&memory, host)?),
            _ => None,
        };
        let plan = Plan {
            arch: X86_64.name(),
            cpus: config.cpus,
            regions: layout::regions(pci.is_some()),
            memory,
            irqchip: IRQCHIP,
            mmu: None,
            first_free_gsi: layout::IOAPIC_PINS,
            pci,
            devices: layout::devices(config, transport)?,
            cmdline: cmdline(config)?,
            guest_modules: vec!["button", "evdev"],
            power_off_is_ctrl_alt_del: false,
        };
        plan.check(host.page_size)?;
        let tables = acpi::tables(&plan)?;
        Ok(Self {
            plan,
            tables,
            kvm: KvmSide::default(),
        })
    }
}

/// The kernel command line of `config`.
fn cmdline(config: &VmConfig) -> Result<String> {
    let console = match config.console {
        Console::Native => "console=ttyS0",
        Console::Virtio => "console=hvc0",
        Console::None => "",
    };
    // After a panic, and then only, the kernel resets warm: see
    // `reset_is_panic`.
    let defaults: &[&str] = match config.default_cmdline {
        true => &[console, "panic=-1", "reboot=panic_warm"],
        false => &[],
    };
    let parts = defaults.iter().copied().chain([config.cmdline.as_str()]);
    // The kernel's own limit is known when it is loaded.
    let max = layout::CMDLINE_ROOM as usize - 1;
    crossvisor_boot::cmdline::join(parts, max)
        .map_err(|error| Error::config("--cmdline", error.to_string()))
}

impl Machine for X86Machine {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn describe(&self) -> Result<Vec<Description>> {
        let files = self.tables.iter().map(|table| Description {
            name: table.name,
            bytes: table.bytes.clone(),
        });
        Ok(files.collect())
    }

    fn load(&self, images: &BootImages, memory: &GuestMemoryMmap) -> Result<RegisterState> {
        load::load(&self.plan, &self.tables, images, memory)
    }

    fn attach(&self, wiring: &mut Wiring) -> Result<Box<dyn ExitHandler>> {
        let power = wiring.power();
        let reset: Callback = Arc::new({
            let power = power.clone();
            move || power.reset()
        });
        let off: Callback = Arc::new(move || power.power_off());

        let line = wiring.edge_line(layout::COM1_GSI)?;
        let serial = Serial::new(line, wiring.console_output(), 0)
            .map_err(|source| Error::io("serial port", source))?;
        let serial = Arc::new(serial);
        wiring.place("COM1", serial.clone())?;
        wiring.set_console_input(serial);

        wiring.place("RTC", Arc::new(Cmos::new()))?;
        wiring.place("i8042", Arc::new(I8042::new(reset.clone())))?;

        let line = wiring.edge_line(layout::ACPI_GSI)?;
        let acpi = Arc::new(AcpiPower::new(line, off, reset.clone()));
        wiring.place("ACPI power", acpi.clone())?;
        wiring.set_power_button(move || acpi.press_power_button());

        if let Some(root) = wiring.pci() {
            let reset = Box::new(move || reset());
            let config = ConfigMechanism1::new(root, Some(reset));
            wiring.place("PCI configuration", Arc::new(config))?;
        }
        Ok(Box::new(NoArchExits))
    }

    fn routes(&self) -> Vec<(u32, Route)> {
        // Not the 8259s, which KVM makes too: nobody programs them.
        let pins = 0..layout::IOAPIC_PINS;
        pins.map(|pin| {
            let chip = IRQCHIP_IOAPIC;
            (pin, Route::Irqchip { chip, pin })
        })
        .collect()
    }

    fn route_msi(&self, message: MsiMessage) -> Option<Route> {
        (message.address >> 20 == MSI_ADDRESS).then_some(Route::Msi {
            address: message.address,
            data: message.data,
            device_id: None,
        })
    }

    fn irq_line(&self, gsi: u32) -> u32 {
        gsi
    }

    fn reset_is_panic(&self, memory: &GuestMemoryMmap, _event: &[u64]) -> bool {
        // Linux tells a PC's firmware here whether it resets warm or cold
        // (native_machine_emergency_restart).
        let mut flag = [0; 2];
        let read = memory.read_slice(&mut flag, GuestAddress(layout::RESET_FLAG));
        read.is_ok() && u16::from_le_bytes(flag) == layout::RESET_FLAG_WARM
    }

    fn kvm(&self) -> Option<&dyn KvmMachine> {
        machine(self)
    }
}

#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod tests;
