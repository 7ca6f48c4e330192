//! A scripted hypervisor: machine models run through exits without /dev/kvm.
//!
//! A test says which exits each vCPU takes and then looks at what the guest
//! would have read, and at what the machine asked of the hypervisor.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crossvisor_devices::notify::Doorbell;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::RegisterState;
use crate::error::Result;
use crate::exit::{ArchExit, Exit, NoLogicalMemory, RUN_UNION_SIZE, SYNC_REGS_SIZE};
use crate::hv::{Interrupt, Route, Vcpu, Vm};

/// One exit of a script.
#[derive(Clone, Debug)]
pub enum Step {
    /// Port input of so many bytes.
    In(u16, usize),
    /// Port output.
    Out(u16, Vec<u8>),
    /// A load of so many bytes.
    Load(u64, usize),
    /// A store.
    Store(u64, Vec<u8>),
    /// KVM_EXIT_SHUTDOWN.
    Shutdown,
    /// KVM_EXIT_SYSTEM_EVENT.
    SystemEvent(u32, Vec<u64>),
    /// An exit of the architecture's own, with the start of its union.
    Arch(u32, Vec<u8>),
}

/// What happened while a script ran.
#[derive(Debug, Default)]
pub struct Record {
    /// What each `In` and `Load` read, in the order of the steps.
    pub reads: Vec<Vec<u8>>,
    /// The union after each `Arch` exit.
    pub unions: Vec<Vec<u8>>,
    /// KVM_IRQ_LINE calls.
    pub lines: Vec<(u32, bool)>,
    /// KVM_INTERRUPT calls, by vCPU.
    pub pins: Vec<(u32, bool)>,
    /// GSIs with an irqfd.
    pub irqfds: Vec<u32>,
    /// GSIs that an irqfd was ever given to.
    pub attached: Vec<u32>,
    /// The last table of routes.
    pub routes: Vec<(u32, Route)>,
    /// Doorbells with an event.
    pub doorbells: Vec<(Doorbell, Option<u32>)>,
    /// Interrupts that are neither wires nor messages, by vCPU.
    pub injected: Vec<(Option<u32>, Interrupt)>,
    /// vCPUs, as they parked.
    pub parks: Vec<u32>,
    /// By vCPU: the registers that it was started with.
    pub starts: Vec<(u32, Option<RegisterState>)>,
    /// Registers of the VM that were set.
    pub vm_registers: Vec<RegisterState>,
    /// Attributes of the controller that were set: group, attribute, value.
    pub attributes: Vec<(u32, u64, Vec<u8>)>,
    /// Addresses in the controller's pages that were loaded from, and that were
    /// stored to, with the value.
    pub controller: Vec<(u64, Option<u64>)>,
    /// Registers that were set between two exits, by vCPU.
    pub registers: Vec<(u32, RegisterState)>,
    /// Routes that no table may have.
    refused: Vec<Route>,
}

/// A VM that is a record.
#[derive(Clone, Debug, Default)]
pub struct ScriptedVm {
    record: Arc<Mutex<Record>>,
    scripts: Arc<Vec<Vec<Step>>>,
}

impl ScriptedVm {
    /// A VM whose vCPUs take these exits, one script for each vCPU; a vCPU
    /// whose script has ended idles.
    pub fn new(scripts: Vec<Vec<Step>>) -> Self {
        Self {
            record: Arc::default(),
            scripts: Arc::new(scripts),
        }
    }

    /// What every load from the controller's pages returns.
    pub const LOADED: u64 = 0x0123_4567_89ab_cdef;

    /// Refuses tables with `route` from here on, as KVM does messages that lead
    /// nowhere.
    pub fn refuse(&self, route: Route) {
        self.record().refused.push(route);
    }

    /// What has happened so far.
    pub fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vm for ScriptedVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let script = self.scripts.get(index as usize).cloned();
        let mut steps = script.unwrap_or_default();
        steps.reverse();
        Ok(Box::new(ScriptedVcpu {
            vm: self.clone(),
            index,
            steps,
        }))
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn set_irq_line(&self, line: u32, asserted: bool) -> io::Result<()> {
        self.record().lines.push((line, asserted));
        Ok(())
    }

    fn set_interrupt_pin(&self, vcpu: u32, asserted: bool) -> io::Result<()> {
        self.record().pins.push((vcpu, asserted));
        Ok(())
    }

    fn attach_irqfd(&self, _event: &EventFd, gsi: u32) -> io::Result<()> {
        let mut record = self.record();
        record.irqfds.push(gsi);
        record.attached.push(gsi);
        Ok(())
    }

    fn detach_irqfd(&self, _event: &EventFd, gsi: u32) -> io::Result<()> {
        self.record().irqfds.retain(|other| *other != gsi);
        Ok(())
    }

    fn set_routes(&self, routes: &[(u32, Route)]) -> io::Result<()> {
        let mut record = self.record();
        if routes
            .iter()
            .any(|(_, route)| record.refused.contains(route))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        record.routes = routes.to_vec();
        Ok(())
    }

    fn attach_doorbell(
        &self,
        bell: Doorbell,
        datamatch: Option<u32>,
        _event: &EventFd,
    ) -> io::Result<()> {
        self.record().doorbells.push((bell, datamatch));
        Ok(())
    }

    fn detach_doorbell(
        &self,
        bell: Doorbell,
        datamatch: Option<u32>,
        _event: &EventFd,
    ) -> io::Result<()> {
        self.record()
            .doorbells
            .retain(|other| *other != (bell, datamatch));
        Ok(())
    }

    fn set_registers(&self, registers: &RegisterState) -> Result<()> {
        self.record().vm_registers.push(registers.clone());
        Ok(())
    }

    fn set_controller(&self, group: u32, attribute: u64, value: &[u8]) -> io::Result<()> {
        let set = (group, attribute, value.to_vec());
        self.record().attributes.push(set);
        Ok(())
    }

    fn load_controller(&self, address: u64) -> io::Result<u64> {
        self.record().controller.push((address, None));
        Ok(Self::LOADED)
    }

    fn store_controller(&self, address: u64, value: u64) -> io::Result<()> {
        self.record().controller.push((address, Some(value)));
        Ok(())
    }

    fn inject(&self, vcpu: Option<u32>, interrupt: &Interrupt) -> io::Result<()> {
        self.record().injected.push((vcpu, *interrupt));
        Ok(())
    }

    fn withdraw(&self, _id: u32) -> io::Result<()> {
        Ok(())
    }
}

struct ScriptedVcpu {
    vm: ScriptedVm,
    index: u32,
    /// Steps still to come, the next one last.
    steps: Vec<Step>,
}

impl Vcpu for ScriptedVcpu {
    fn start(&mut self, registers: Option<&RegisterState>) -> Result<()> {
        let start = (self.index, registers.cloned());
        self.vm.record().starts.push(start);
        Ok(())
    }

    fn park(&mut self) -> Result<()> {
        self.vm.record().parks.push(self.index);
        Ok(())
    }

    fn run(&mut self, handle: &mut dyn FnMut(Exit<'_>)) -> Result<()> {
        match self.steps.pop() {
            None => {
                thread::sleep(Duration::from_millis(1));
                handle(Exit::Interrupted);
            }
            Some(Step::In(port, size)) => {
                let mut data = vec![0; size];
                let exit = Exit::IoIn {
                    port,
                    data: &mut data,
                };
                handle(exit);
                self.vm.record().reads.push(data);
            }
            Some(Step::Out(port, data)) => handle(Exit::IoOut { port, data: &data }),
            Some(Step::Load(address, size)) => {
                let mut data = vec![0; size];
                let exit = Exit::MmioRead {
                    address,
                    data: &mut data,
                };
                handle(exit);
                self.vm.record().reads.push(data);
            }
            Some(Step::Store(address, data)) => {
                let data = &data;
                handle(Exit::MmioWrite { address, data });
            }
            Some(Step::Shutdown) => handle(Exit::Shutdown),
            Some(Step::SystemEvent(kind, data)) => {
                let data = &data;
                handle(Exit::SystemEvent { kind, data });
            }
            Some(Step::Arch(reason, start)) => {
                let mut data = [0; RUN_UNION_SIZE];
                for (byte, value) in data.iter_mut().zip(start) {
                    *byte = value;
                }
                let mut sync_regs = [0; SYNC_REGS_SIZE];
                let exit = ArchExit {
                    reason,
                    data: &mut data,
                    sync_regs: &mut sync_regs,
                    psw: &mut [0; 2],
                    logical: &NoLogicalMemory,
                };
                handle(Exit::Arch(exit));
                self.vm.record().unions.push(data.to_vec());
            }
        }
        Ok(())
    }

    fn set_registers(&mut self, registers: &RegisterState) -> Result<()> {
        let set = (self.index, registers.clone());
        self.vm.record().registers.push(set);
        Ok(())
    }

    fn dump(&self) -> String {
        String::new()
    }
}
