//! A vCPU's thread: enter the guest, handle the exit, enter again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::{ExitHandler, RegisterState};
use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::exit::{Action, End, Exit};
use crate::hv::Vcpu;
use crate::power::Power;

/// KVM_SYSTEM_EVENT_* (KVM API, section 5, KVM_EXIT_SYSTEM_EVENT).
mod system_event {
    pub const SHUTDOWN: u32 = 1;
    pub const RESET: u32 = 2;
    pub const CRASH: u32 = 3;
}

/// What all vCPUs of a VM share.
pub struct Shared {
    /// Devices in memory.
    pub memory_bus: Bus,
    /// Devices in port space.
    pub port_bus: Bus,
    /// The machine's own exits.
    pub handler: Box<dyn ExitHandler>,
    /// Where the end of the run is announced.
    pub power: Power,
    /// By vCPU: what it is to do next.
    pub gates: Vec<Gate>,
    /// Whether all vCPUs are to leave the guest.
    pub stopping: AtomicBool,
}

/// Holds a vCPU back until it is started.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
enum GateState {
    /// Waits to be started by another vCPU.
    #[default]
    Parked,
    /// To be started from these registers, or from where the kernel's own
    /// emulation says.
    Start(Option<RegisterState>),
    /// Running.
    Open,
    /// The VM is over.
    Closed,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the vCPU start. One that runs still starts when it parks: it may
    /// have said that it would and not be there yet.
    pub fn start(&self, registers: Option<RegisterState>) {
        let mut state = self.state();
        if !matches!(*state, GateState::Closed) {
            *state = GateState::Start(registers);
        }
        self.changed.notify_all();
    }

    /// The vCPU is to wait for its next start.
    fn park(&self) {
        let mut state = self.state();
        if matches!(*state, GateState::Open) {
            *state = GateState::Parked;
        }
    }

    /// Ends the wait, and any later one, for good.
    pub fn close(&self) {
        *self.state() = GateState::Closed;
        self.changed.notify_all();
    }

    /// Waits for the start; `None` when the VM is over.
    fn wait(&self) -> Option<Option<RegisterState>> {
        let mut state = self.state();
        loop {
            match &mut *state {
                GateState::Start(registers) => {
                    let registers = registers.take();
                    *state = GateState::Open;
                    return Some(registers);
                }
                GateState::Closed => return None,
                GateState::Parked | GateState::Open => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

impl Shared {
    /// What vCPU `index` does after `exit`.
    pub fn handle(&self, index: u32, exit: Exit<'_>) -> Action {
        match exit {
            Exit::MmioRead { address, data } => self.memory_bus.read(address, data),
            Exit::MmioWrite { address, data } => self.memory_bus.write(address, data),
            Exit::IoIn { port, data } => self.port_bus.read(port.into(), data),
            Exit::IoOut { port, data } => self.port_bus.write(port.into(), data),
            Exit::Interrupted => {}
            Exit::Arch(exit) => return self.handler.handle(index, exit),
            Exit::Shutdown => {
                return Action::End(End::Crash(format!(
                    "vCPU {index} shut down (on x86 a triple fault)"
                )));
            }
            Exit::Halt => {
                return Action::End(End::Crash(format!(
                    "vCPU {index} halted, and nothing in the kernel can wake it"
                )));
            }
            Exit::SystemEvent { kind, data } => return self.system_event(index, kind, data),
            Exit::FailEntry { reason } => {
                return Action::End(End::Crash(format!(
                    "the hardware refuses to enter vCPU {index} (reason {reason:#x})"
                )));
            }
            Exit::InternalError { suberror } => {
                let text = match suberror {
                    1 => "KVM could not emulate an instruction: this /dev/kvm cannot run \
                          unmodified kernels? `crossvisor doctor` says what it can run"
                        .to_string(),
                    other => format!("KVM reports internal error {other}"),
                };
                return Action::End(End::Crash(format!("vCPU {index}: {text}")));
            }
        }
        Action::Continue
    }

    fn system_event(&self, index: u32, kind: u32, data: &[u64]) -> Action {
        let end = match kind {
            system_event::SHUTDOWN => End::PowerOff,
            system_event::RESET => End::Reset,
            system_event::CRASH => End::Panic,
            other => End::Crash(format!("vCPU {index}: KVM system event {other}")),
        };
        self.power.end_with(end, data.to_vec());
        Action::Continue
    }

    /// The body of vCPU `index`'s thread.
    fn run(&self, index: u32, vcpu: &mut dyn Vcpu) -> Result<()> {
        let Some(gate) = self.gates.get(index as usize) else {
            return Ok(());
        };
        'start: while let Some(registers) = gate.wait() {
            vcpu.start(registers.as_ref())?;
            self.handler.started(index);
            while !self.stopping.load(Ordering::Acquire) && !self.power.ended() {
                let mut action = Action::Continue;
                vcpu.run(&mut |exit| action = self.handle(index, exit))?;
                match action {
                    Action::Continue => {}
                    Action::Park => {
                        vcpu.park()?;
                        gate.park();
                        continue 'start;
                    }
                    Action::Start {
                        vcpu: other,
                        registers,
                    } if other == index => {
                        gate.start(Some(registers));
                        continue 'start;
                    }
                    Action::Start { vcpu, registers } => {
                        if let Some(other) = self.gates.get(vcpu as usize) {
                            other.start(Some(registers));
                        }
                    }
                    Action::Set(registers) => vcpu.set_registers(&registers)?,
                    Action::End(end) => {
                        if let End::Crash(_) = end {
                            log::warn!("vCPU {index}: {}", vcpu.dump());
                        }
                        self.power.end(end);
                    }
                }
            }
            return Ok(());
        }
        Ok(())
    }
}

/// The running vCPUs of a VM.
pub struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

extern "C" fn nothing(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // The signal's only work is to interrupt KVM_RUN.
}

impl Threads {
    /// Starts a thread for each of `vcpus`; they wait at their gates.
    ///
    /// # Errors
    /// A thread could not be made.
    pub fn spawn(shared: Arc<Shared>, vcpus: Vec<Box<dyn Vcpu>>) -> Result<Self> {
        register_signal_handler(SIGRTMIN(), nothing)
            .map_err(|errno| Error::io("installing the vCPU signal's handler", errno))?;
        let mut threads = Self {
            shared,
            threads: Vec::new(),
        };
        for (index, mut vcpu) in (0..).zip(vcpus) {
            let shared = threads.shared.clone();
            let body = move || {
                // A panic here is the VMM's fault, never to be waited for.
                let result = catch_unwind(AssertUnwindSafe(|| shared.run(index, vcpu.as_mut())));
                match result {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => shared.power.end(End::Crash(error.to_string())),
                    Err(_) => shared.power.end(End::Crash(format!(
                        "internal error: the thread of vCPU {index} panicked"
                    ))),
                }
            };
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(body)
                .map_err(|source| Error::io(format!("thread for vCPU {index}"), source))?;
            threads.threads.push(thread);
        }
        Ok(threads)
    }

    /// Stops every vCPU and waits until all have left the guest.
    pub fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.gates.iter().for_each(Gate::close);
        for thread in self.threads.drain(..) {
            // A signal that comes between the thread's look at its gate and its
            // entry into KVM_RUN is lost; hence again until it is gone.
            while !thread.is_finished() {
                let _ = thread.kill(SIGRTMIN());
                thread::sleep(Duration::from_micros(200));
            }
            let _ = thread.join();
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
    }
}
