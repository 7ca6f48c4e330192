//! A VM's life: built from a plan, run, and taken apart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use crossvisor_devices::GuestMem;
use crossvisor_devices::chardev::ConsoleInput;
use crossvisor_devices::pci::access::Ecam;
use crossvisor_devices::pci::root::PciRoot;
use crossvisor_devices::pci::window::PciWindow;
use crossvisor_devices::virtio::VirtioDevice;
use crossvisor_devices::virtio::ccw::{self, VirtioCcw};
use crossvisor_devices::virtio::console::Outputs;
use crossvisor_devices::virtio::mmio::VirtioMmio;
use crossvisor_devices::virtio::pci::VirtioPci;
use vm_memory::GuestMemoryMmap;

use crate::arch::{Machine, RegisterState};
use crate::bus::Bus;
use crate::config::BootImages;
use crate::error::{Error, Result};
use crate::exit::End;
use crate::hv;
use crate::irq::Routes;
use crate::kvm::{Kvm, KvmVm};
use crate::memory;
use crate::plan::{self, Plan, Range, Slot};
use crate::power::{Event, Power};
use crate::resources::Resources;
use crate::vcpu::{Gate, Shared, Threads};
use crate::wiring::Wiring;

/// A VM that is ready to run.
pub struct Vm {
    machine: Arc<dyn Machine>,
    memory: GuestMemoryMmap,
    registers: RegisterState,
    shared: Arc<Shared>,
    vcpus: Vec<Box<dyn hv::Vcpu>>,
    console_input: Option<Arc<dyn ConsoleInput>>,
    outputs: Vec<Outputs>,
    power_button: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Vm {
    /// Builds the VM of `machine` on the host's KVM.
    ///
    /// # Errors
    /// See [`Error`]: the host, a file or KVM does not allow it. Nothing has
    /// run then.
    pub fn new(
        kvm: &Kvm,
        machine: Arc<dyn Machine>,
        images: &BootImages,
        resources: &Resources,
        power: &Power,
    ) -> Result<Self> {
        let memory = memory::allocate(machine.plan(), resources.hugepages())?;
        // Loading comes first: it is what most often fails, and says so best.
        let registers = machine.load(images, &memory)?;
        let vm = Arc::new(KvmVm::new(kvm, machine.clone(), &memory)?);
        Self::assemble(vm, machine, memory, registers, resources, power)
    }

    /// Puts the devices of `machine` into `vm`.
    ///
    /// # Errors
    /// As for [`Vm::new`].
    pub fn assemble(
        vm: Arc<dyn hv::Vm>,
        machine: Arc<dyn Machine>,
        memory: GuestMemoryMmap,
        registers: RegisterState,
        resources: &Resources,
        power: &Power,
    ) -> Result<Self> {
        let plan = machine.plan().clone();
        let vcpus = (0..plan.cpus)
            .map(|index| vm.create_vcpu(index))
            .collect::<Result<Vec<_>>>()?;
        vm.finish()?;
        let wires = machine.routes();
        if !wires.is_empty() {
            vm.set_routes(&wires)
                .map_err(|source| Error::io("KVM_SET_GSI_ROUTING", source))?;
        }
        let mut wiring = Wiring {
            memory_bus: Bus::default(),
            port_bus: Bus::default(),
            vm: vm.clone(),
            machine: machine.clone(),
            memory: GuestMem::new(memory.clone()),
            power: power.clone(),
            pci: None,
            channel_subsystem: None,
            lines: None,
            shared: BTreeMap::new(),
            native_console: resources.console_is_native(),
            console_output: resources.native_console(),
            console_input: None,
            power_button: None,
        };
        if let Some(pci) = &plan.pci {
            place_pci(&mut wiring, pci)?;
        }
        let handler = machine.attach(&mut wiring)?;
        let routes = Routes::new(vm, machine.clone());
        let outputs = place_virtio(&mut wiring, &plan, &routes, resources)?;
        let shared = Arc::new(Shared {
            memory_bus: wiring.memory_bus,
            port_bus: wiring.port_bus,
            handler,
            power: wiring.power,
            gates: (0..plan.cpus).map(|_| Gate::default()).collect(),
            stopping: AtomicBool::new(false),
        });
        Ok(Self {
            machine,
            memory,
            registers,
            shared,
            vcpus,
            console_input: wiring.console_input,
            outputs,
            power_button: wiring.power_button,
        })
    }

    /// Where what the user types goes.
    pub fn console_input(&self) -> Option<Arc<dyn ConsoleInput>> {
        self.console_input.clone()
    }

    /// Runs the guest until its end, and until the host has taken what the
    /// guest has written to its ports. `events` is where the requests made
    /// through the VM's [`Power`] arrive.
    ///
    /// # Errors
    /// A vCPU's thread could not be made.
    pub fn run(self, events: &Receiver<Event>) -> Result<End> {
        let secondaries = !self.machine.starts_secondaries();
        let mut threads = Threads::spawn(self.shared.clone(), self.vcpus)?;
        for (index, gate) in self.shared.gates.iter().enumerate() {
            match index {
                0 => gate.start(Some(self.registers.clone())),
                _ if secondaries => gate.start(None),
                _ => {}
            }
        }
        let mut asked = false;
        let (end, data) = loop {
            match events.recv() {
                Ok(Event::End { end, data }) => break (end, data),
                Ok(Event::AskPowerOff) => match &self.power_button {
                    Some(press) if !asked => {
                        asked = true;
                        press();
                    }
                    _ => break (End::Killed, Vec::new()),
                },
                // Every handle is gone, which the VM's own one prevents.
                Err(_) => break (End::Killed, Vec::new()),
            }
        };
        threads.stop();
        if !matches!(end, End::Quit | End::Killed) && !drained(&self.outputs, events) {
            return Ok(End::Killed);
        }
        let panicked = end == End::Reset && self.machine.reset_is_panic(&self.memory, &data);
        Ok(if panicked { End::Panic } else { end })
    }
}

/// How often a VM that waits for its outputs looks whether it is to end.
const DRAIN_STEP: Duration = Duration::from_millis(50);

/// Waits until the host has taken what the guest has written; false when
/// somebody asks for the end first.
fn drained(outputs: &[Outputs], events: &Receiver<Event>) -> bool {
    outputs.iter().all(|outputs| {
        while !outputs.drain(DRAIN_STEP) {
            if events.try_recv().is_ok() {
                return false;
            }
        }
        true
    })
}

/// Puts the PCI root of the plan on the bus.
fn place_pci(wiring: &mut Wiring, pci: &plan::Pci) -> Result<()> {
    let windows = [pci.mmio32, pci.mmio64].map(|window| PciWindow {
        guest_base: window.range.base,
        pci_base: window.bus_address,
        size: window.range.size,
    });
    let root = PciRoot::new(&windows);
    for (window, bus) in root.windows() {
        wiring.place_at(Range::new(window.guest_base, window.size), bus)?;
    }
    if let Some(range) = pci.ecam {
        wiring.place_at(range, Arc::new(Ecam::new(root.clone())))?;
    }
    wiring.pci = Some(root);
    Ok(())
}

/// Makes the virtio devices of the plan and puts each where the plan has it.
/// Returns the outputs that the end of the VM waits for.
fn place_virtio(
    wiring: &mut Wiring,
    plan: &Plan,
    routes: &Arc<Routes>,
    resources: &Resources,
) -> Result<Vec<Outputs>> {
    let mut outputs = Vec::new();
    for planned in &plan.devices {
        let made = resources.device(planned)?;
        outputs.extend(made.outputs);
        if made.console_input.is_some() {
            wiring.console_input = made.console_input;
        }
        if made.power_button.is_some() {
            wiring.power_button = made.power_button;
        }
        match planned.slot {
            Slot::Pci { device } => place_virtio_pci(wiring, plan, routes, made.device, device)?,
            Slot::Mmio { range, gsi } => {
                let line = wiring.edge_line(gsi)?;
                let (memory, bells) = (wiring.memory(), wiring.doorbells());
                let transport = VirtioMmio::new(made.device, memory, line, bells, range.base)
                    .map_err(|source| Error::io(planned.name.clone(), source))?;
                wiring.place_at(range, Arc::new(transport))?;
            }
            Slot::Ccw { devno } => {
                let newest = match resources.virtio_legacy() {
                    true => ccw::LEGACY,
                    false => ccw::NEWEST,
                };
                place_virtio_ccw(wiring, routes, made.device, devno, newest)?;
            }
        }
    }
    Ok(outputs)
}

/// Puts a virtio device behind a subchannel, with revisions up to `newest`. It
/// gets a vector for each queue.
fn place_virtio_ccw(
    wiring: &mut Wiring,
    routes: &Arc<Routes>,
    device: Box<dyn VirtioDevice>,
    devno: u16,
    newest: u16,
) -> Result<()> {
    let Some(css) = wiring.channel_subsystem.clone() else {
        return Err(Error::Boot(
            "internal error: a channel device on a machine without a channel subsystem".into(),
        ));
    };
    let name = device.name().to_string();
    let failed = |source| Error::io(name.clone(), source);
    let queues = u16::try_from(device.queue_sizes().len()).unwrap_or(u16::MAX);
    let vectors = routes.adapter_vectors(queues).map_err(failed)?;
    let subchannel = css.add(devno).map_err(failed)?;
    VirtioCcw::connect(
        device,
        wiring.memory(),
        &subchannel,
        Some(vectors),
        wiring.doorbells(),
        newest,
    )
    .map_err(failed)?;
    Ok(())
}

/// Puts a virtio device into a slot of the PCI bus. It gets a vector for each
/// queue and one for configuration changes.
fn place_virtio_pci(
    wiring: &mut Wiring,
    plan: &Plan,
    routes: &Arc<Routes>,
    device: Box<dyn VirtioDevice>,
    slot: u8,
) -> Result<()> {
    let (Some(pci), Some(root)) = (&plan.pci, wiring.pci()) else {
        return Err(Error::Boot(
            "internal error: a PCI device on a machine without PCI".into(),
        ));
    };
    let name = device.name().to_string();
    let failed = |source| Error::io(name.clone(), source);
    let vectors = match pci.msi {
        true => {
            let count = device.queue_sizes().len().saturating_add(1);
            let count = u16::try_from(count).unwrap_or(u16::MAX);
            Some(routes.vectors(count).map_err(failed)?)
        }
        false => None,
    };
    // Pin INTA#.
    let wire = pci.intx_gsi(slot, 1);
    let transport = VirtioPci::new(
        device,
        wiring.memory(),
        vectors,
        wiring.level_line(wire),
        wiring.doorbells(),
    )
    .map_err(failed)?;
    root.add(Arc::new(transport), Some(slot))
        .map_err(|error| Error::Boot(format!("{name}: {error}")))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Console, VmConfig};
    use crate::double::{ScriptedVm, Step};
    use crate::exit::{Action, ArchExit};
    use crate::power::Requests;
    use crate::resources::ConsoleOutput;
    use crate::testing::PlainMachine;

    fn resources() -> Resources {
        let config = VmConfig {
            console: Console::None,
            entropy: false,
            ..VmConfig::default()
        };
        Resources::open(&config, ConsoleOutput::Stdout, Vec::new()).unwrap()
    }

    /// Runs one script for each vCPU; what ends the run must be in them.
    fn run(scripts: Vec<Vec<Step>>) -> (End, ScriptedVm) {
        let vm = ScriptedVm::new(scripts.clone());
        let machine = Arc::new(PlainMachine::new(scripts.len() as u32));
        let memory = memory::allocate(machine.plan(), false).unwrap();
        let (requests, events) = Requests::new();
        let power = Power::new(&requests);
        let registers = RegisterState(vec![("pc", 0x1000)]);
        let built = Vm::assemble(
            Arc::new(vm.clone()),
            machine,
            memory,
            registers,
            &resources(),
            &power,
        );
        (built.unwrap().run(&events).unwrap(), vm)
    }

    #[test]
    fn ends_are_told_apart() {
        assert_eq!(
            run(vec![vec![Step::SystemEvent(1, vec![])]]).0,
            End::PowerOff
        );
        assert_eq!(run(vec![vec![Step::SystemEvent(2, vec![0])]]).0, End::Reset);
        assert_eq!(run(vec![vec![Step::SystemEvent(2, vec![1])]]).0, End::Panic);
        assert_eq!(run(vec![vec![Step::SystemEvent(3, vec![])]]).0, End::Panic);
        let crashes = [
            Step::Shutdown,
            Step::SystemEvent(99, vec![]),
            Step::Arch(77, vec![]),
        ];
        for step in crashes {
            let (end, _) = run(vec![vec![step]]);
            assert!(matches!(end, End::Crash(_)), "{end:?}");
        }
    }

    #[test]
    fn the_boot_vcpu_gets_the_registers_and_the_others_wait_for_the_kernel() {
        let (_, vm) = run(vec![
            vec![Step::Load(0, 1), Step::SystemEvent(1, vec![])],
            vec![],
            vec![],
        ]);
        let mut starts = vm.record().starts.clone();
        starts.sort_by_key(|(vcpu, _)| *vcpu);
        let boot = RegisterState(vec![("pc", 0x1000)]);
        assert_eq!(starts.first(), Some(&(0, Some(boot))));
        assert!(starts.iter().skip(1).all(|(_, start)| start.is_none()));
    }

    #[test]
    fn nobody_answers_where_nothing_is() {
        let (_, vm) = run(vec![vec![
            Step::Load(0x2000_0000, 4),
            Step::In(0x80, 1),
            Step::Store(0x2000_0000, vec![1]),
            Step::Out(0x80, vec![1]),
            Step::SystemEvent(1, vec![]),
        ]]);
        assert_eq!(vm.record().reads, [vec![0xff; 4], vec![0xff]]);
    }

    #[test]
    fn the_host_bridge_is_behind_the_ecam() {
        let (_, vm) = run(vec![vec![
            Step::Load(0x3000_0000, 4),
            Step::Load(0x3000_0000 + (1 << 15), 4),
            Step::SystemEvent(1, vec![]),
        ]]);
        let record = vm.record();
        assert_ne!(record.reads[0], [0xff; 4]);
        assert_eq!(record.reads[1], [0xff; 4]);
    }

    /// Starts vCPU 1 from vCPU 0 and parks vCPU 1 when it says so.
    struct StartAndPark;

    impl crate::arch::ExitHandler for StartAndPark {
        fn handle(&self, vcpu: u32, exit: ArchExit<'_>) -> Action {
            match (vcpu, exit.reason) {
                (0, 1) => Action::Start {
                    vcpu: 1,
                    registers: RegisterState(vec![("pc", 0x2000)]),
                },
                (1, 2) => Action::Park,
                _ => Action::End(End::PowerOff),
            }
        }
    }

    #[test]
    fn the_vmm_starts_and_parks_vcpus() {
        let park_then_end = vec![Step::Arch(2, vec![]), Step::Arch(3, vec![])];
        let vm = ScriptedVm::new(vec![vec![Step::Arch(1, vec![])], park_then_end]);
        let (requests, events) = Requests::new();
        let shared = Arc::new(Shared {
            memory_bus: Bus::default(),
            port_bus: Bus::default(),
            handler: Box::new(StartAndPark),
            power: Power::new(&requests),
            gates: vec![Gate::default(), Gate::default()],
            stopping: AtomicBool::new(false),
        });
        let vcpus = (0..2).map(|index| hv::Vm::create_vcpu(&vm, index).unwrap());
        let mut threads = Threads::spawn(shared.clone(), vcpus.collect()).unwrap();
        shared.gates[0].start(None);
        // vCPU 1 starts, and parks.
        let parked = || vm.record().unions.len() == 2;
        while !parked() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(events.recv_timeout(Duration::from_millis(20)).is_err());
        assert_eq!(
            vm.record().starts[..],
            [(0, None), (1, Some(RegisterState(vec![("pc", 0x2000)])))]
        );
        // Started again, it goes on, whether it has come to its gate or not.
        shared.gates[1].start(None);
        assert!(events.recv_timeout(Duration::from_secs(60)).is_ok());
        assert_eq!(vm.record().parks, [1]);
        threads.stop();
    }
}
