//! A machine of no architecture, for the core's own tests.

use crossvisor_devices::irq::MsiMessage;
use vm_memory::GuestMemoryMmap;

use crate::arch::{Description, ExitHandler, KvmMachine, Machine, NoArchExits, RegisterState};
use crate::config::BootImages;
use crate::error::Result;
use crate::hv::Route;
use crate::plan::{Pci, PciWindow, Plan, Range};
use crate::wiring::Wiring;

/// What the plain machine has: 16 wires, one route for each of the first two.
pub struct PlainMachine(pub Plan);

impl PlainMachine {
    /// A message to this address stands for the source that is its data.
    pub const SOURCES: u64 = 0x400_0000_0000;

    /// A machine with `cpus` vCPUs, 1 MiB of RAM and a PCI root.
    pub fn new(cpus: u32) -> Self {
        let window = |base| PciWindow {
            range: Range::new(base, 0x1000_0000),
            bus_address: base,
        };
        Self(Plan {
            arch: "plain",
            cpus,
            memory: vec![Range::new(0, 1 << 20)],
            irqchip: "none",
            mmu: None,
            regions: Vec::new(),
            first_free_gsi: 16,
            pci: Some(Pci {
                ecam: Some(Range::new(0x3000_0000, 1 << 20)),
                mmio32: window(0x4000_0000),
                mmio64: window(0x8000_0000_0000),
                intx: [8, 9, 10, 11],
                msi: true,
            }),
            devices: Vec::new(),
            cmdline: String::new(),
            guest_modules: Vec::new(),
            power_off_is_ctrl_alt_del: false,
        })
    }
}

impl Machine for PlainMachine {
    fn plan(&self) -> &Plan {
        &self.0
    }

    fn describe(&self) -> Result<Vec<Description>> {
        Ok(Vec::new())
    }

    fn load(&self, _: &BootImages, _: &GuestMemoryMmap) -> Result<RegisterState> {
        Ok(RegisterState(vec![("pc", 0x1000)]))
    }

    fn attach(&self, _: &mut Wiring) -> Result<Box<dyn ExitHandler>> {
        Ok(Box::new(NoArchExits))
    }

    fn routes(&self) -> Vec<(u32, Route)> {
        (0..2)
            .map(|gsi| (gsi, Route::Irqchip { chip: 0, pin: gsi }))
            .collect()
    }

    fn route_msi(&self, message: MsiMessage) -> Option<Route> {
        match message.address {
            0 => None,
            Self::SOURCES => Some(Route::Source(message.data)),
            address => Some(Route::Msi {
                address,
                data: message.data,
                device_id: Some(message.device_id),
            }),
        }
    }

    fn irq_line(&self, gsi: u32) -> u32 {
        gsi + 100
    }

    fn reset_is_panic(&self, _: &GuestMemoryMmap, event: &[u64]) -> bool {
        event == [1]
    }

    fn kvm(&self) -> Option<&dyn KvmMachine> {
        None
    }
}
