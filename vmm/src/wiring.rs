//! Where a machine's own devices are put into the VM that is being built.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crossvisor_devices::GuestMem;
use crossvisor_devices::bus::BusDevice;
use crossvisor_devices::chardev::ConsoleInput;
use crossvisor_devices::css::ChannelSubsystem;
use crossvisor_devices::irq::{IrqLine, SharedLine};
use crossvisor_devices::notify::{Doorbell, Doorbells};
use crossvisor_devices::output::Output;
use crossvisor_devices::pci::root::PciRoot;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::Machine;
use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::hv;
use crate::irq::{EdgeLine, LevelLine};
use crate::plan::{Range, Region};
use crate::power::Power;

/// Makes the interrupt lines of a controller that is modelled in user space.
pub trait LineSource: Send + Sync {
    /// The level-triggered wire `gsi` of the controller.
    fn level_line(&self, gsi: u32) -> Arc<dyn IrqLine>;

    /// The edge-triggered wire `gsi`: each `set(true)` is an interrupt.
    fn edge_line(&self, gsi: u32) -> Arc<dyn IrqLine>;
}

/// Doorbells of a VM.
struct VmDoorbells(Arc<dyn hv::Vm>);

impl Doorbells for VmDoorbells {
    fn attach(&self, bell: Doorbell, datamatch: Option<u32>, event: &EventFd) -> io::Result<()> {
        self.0.attach_doorbell(bell, datamatch, event)
    }

    fn detach(&self, bell: Doorbell, datamatch: Option<u32>, event: &EventFd) -> io::Result<()> {
        self.0.detach_doorbell(bell, datamatch, event)
    }
}

/// The VM under construction, as its machine and its devices see it.
pub struct Wiring {
    pub(crate) memory_bus: Bus,
    pub(crate) port_bus: Bus,
    pub(crate) vm: Arc<dyn hv::Vm>,
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) memory: GuestMem,
    pub(crate) power: Power,
    pub(crate) pci: Option<Arc<PciRoot>>,
    pub(crate) channel_subsystem: Option<Arc<ChannelSubsystem>>,
    pub(crate) lines: Option<Arc<dyn LineSource>>,
    pub(crate) shared: BTreeMap<u32, Arc<SharedLine>>,
    /// Whether the guest's console is the machine's own.
    pub(crate) native_console: bool,
    pub(crate) console_output: Arc<Output>,
    pub(crate) console_input: Option<Arc<dyn ConsoleInput>>,
    pub(crate) power_button: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Wiring {
    /// Guest memory.
    pub fn memory(&self) -> GuestMem {
        self.memory.clone()
    }

    /// How a device powers off or resets the VM.
    pub fn power(&self) -> Power {
        self.power.clone()
    }

    /// The VM in the hypervisor, for what an exit handler asks of it.
    pub fn vm(&self) -> Arc<dyn hv::Vm> {
        self.vm.clone()
    }

    /// The PCI root, for machines that reach configuration space by other means
    /// than ECAM.
    pub fn pci(&self) -> Option<Arc<PciRoot>> {
        self.pci.clone()
    }

    /// The channel subsystem that devices with a subchannel go to.
    pub fn set_channel_subsystem(&mut self, css: Arc<ChannelSubsystem>) {
        self.channel_subsystem = Some(css);
    }

    /// The region of the plan called `name`.
    ///
    /// # Errors
    /// There is none: the machine's plan and its wiring disagree.
    pub fn region(&self, name: &str) -> Result<Region> {
        let region = self.machine.plan().region(name).cloned();
        region.ok_or_else(|| {
            Error::Boot(format!(
                "internal error: the plan has no region called {name}"
            ))
        })
    }

    /// Puts `device` where the plan has the region called `name`.
    ///
    /// # Errors
    /// There is no such region, or its place is taken.
    pub fn place(&mut self, name: &str, device: Arc<dyn BusDevice>) -> Result<()> {
        let region = self.region(name)?;
        let bus = match region.ports {
            true => &mut self.port_bus,
            false => &mut self.memory_bus,
        };
        bus.insert(region.range, device)
    }

    /// Puts `device` at a range of memory that the plan names otherwise.
    ///
    /// # Errors
    /// The place is taken.
    pub fn place_at(&mut self, range: Range, device: Arc<dyn BusDevice>) -> Result<()> {
        self.memory_bus.insert(range, device)
    }

    /// Event file descriptors on the guest's doorbells.
    pub fn doorbells(&self) -> Arc<dyn Doorbells> {
        Arc::new(VmDoorbells(self.vm.clone()))
    }

    /// The level-triggered wire `gsi`. Devices that ask for the same one share
    /// it: it is asserted while any of them asserts it.
    pub fn level_line(&mut self, gsi: u32) -> Arc<dyn IrqLine> {
        let shared = self.shared.entry(gsi).or_insert_with(|| {
            SharedLine::new(match &self.lines {
                Some(lines) => lines.level_line(gsi),
                None => Arc::new(LevelLine::new(self.vm.clone(), self.machine.irq_line(gsi))),
            })
        });
        shared.input()
    }

    /// The edge-triggered wire `gsi`: an irqfd, so that any thread raises it by
    /// a write.
    ///
    /// # Errors
    /// KVM refused the irqfd.
    pub fn edge_line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>> {
        if let Some(lines) = &self.lines {
            return Ok(lines.edge_line(gsi));
        }
        let line = EdgeLine::new(self.vm.clone(), gsi)
            .map_err(|source| Error::io(format!("irqfd for interrupt {gsi}"), source))?;
        Ok(Arc::new(line))
    }

    /// Takes interrupt lines from a controller in user space from here on.
    pub fn set_line_source(&mut self, lines: Arc<dyn LineSource>) {
        self.lines = Some(lines);
    }

    /// Where the machine's own console prints: the user's terminal, or nowhere
    /// when the console is another device.
    pub fn console_output(&self) -> Arc<Output> {
        self.console_output.clone()
    }

    /// Whether the guest's console is the machine's own.
    pub fn console_is_native(&self) -> bool {
        self.native_console
    }

    /// The input of the machine's own console: what the user types goes there
    /// unless the console is another device.
    pub fn set_console_input(&mut self, input: Arc<dyn ConsoleInput>) {
        if self.native_console {
            self.console_input = Some(input);
        }
    }

    /// How the host asks the guest to power off.
    pub fn set_power_button(&mut self, press: impl Fn() + Send + Sync + 'static) {
        self.power_button = Some(Box::new(press));
    }
}
