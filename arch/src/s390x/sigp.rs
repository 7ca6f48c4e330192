//! SIGNAL PROCESSOR, as far as KVM leaves it to user space, and the states of
//! CPUs (Principles of Operation, chapter 4).
//!
//! KVM answers the orders that are frequent (sense, emergency signal, external
//! call). The others change the state of a CPU, which is kept here: while a CPU
//! is stopped, its registers are data, and whoever starts it hands them over.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossvisor_devices::GuestMem;
use crossvisor_vmm::arch::RegisterState;
use crossvisor_vmm::exit::{Action, End};
use crossvisor_vmm::hv;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::cpu::{Cpu, Result, Stop};
use super::interrupt;
use super::registers as register;

/// Order codes.
mod order {
    pub const START: u8 = 0x04;
    pub const STOP: u8 = 0x05;
    pub const RESTART: u8 = 0x06;
    pub const STOP_AND_STORE_STATUS: u8 = 0x09;
    pub const INITIAL_CPU_RESET: u8 = 0x0b;
    pub const CPU_RESET: u8 = 0x0c;
    pub const SET_PREFIX: u8 = 0x0d;
    pub const STORE_STATUS_AT_ADDRESS: u8 = 0x0e;
    pub const SET_ARCHITECTURE: u8 = 0x12;
    pub const STORE_ADDITIONAL_STATUS: u8 = 0x17;
}

/// In a CPU's prefix area: the restart old and new PSW.
const RESTART_OLD: u64 = 0x120;
const RESTART_NEW: u64 = 0x1a0;
/// Absolute addresses where the store-status operation stores: the status, and
/// which architecture it is of, z/Architecture being 1 ("Store Status").
const SAVE_AREA: u64 = 0x1200;
const ARCHITECTURE_ID: u64 = 163;
/// How often a CPU that waits for the others looks whether the VM is over.
const LOOK: Duration = Duration::from_millis(20);
/// Size and alignment of the area for additional status.
const ADDITIONAL_AREA: u64 = 1024;

/// What is to be done with a CPU once it has stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Then {
    store_status: bool,
    /// A CPU reset, which leaves the registers alone.
    reset: bool,
    initial_reset: bool,
}

#[derive(Debug)]
enum State {
    /// Told to start; its thread is not there yet, and the hypervisor, for which
    /// it is stopped, would drop what it was told.
    Starting,
    Operating,
    /// Told to stop; it has not left the guest yet.
    Stopping(Then),
    Stopped(RegisterState),
    /// It waits and takes no interruptions: what that means if no other CPU
    /// ever does anything, and its registers.
    ///
    /// Such a CPU operates, but SENSE says that it is stopped. KVM answers that
    /// order, from a state (KVM_SET_MP_STATE) that the CPU's own thread alone can
    /// set, and that is parked. Were it left as operating, STOP could not make
    /// it stopped: it would have to enter the guest again for that, also on
    /// behalf of a reset by another CPU. And Linux waits without a limit until
    /// SENSE says "stopped" of a CPU that it has told to stop (`smp_send_stop`).
    Waiting(End, RegisterState),
}

/// Why an order is not accepted.
enum Refused {
    /// Status to store.
    Status(u32),
    /// An order that came before has not been carried out.
    Busy,
}

/// How an order went.
type Ordered = std::result::Result<Option<Action>, Refused>;

// Status bits.
const INCORRECT_STATE: Refused = Refused::Status(0x200);
const INVALID_PARAMETER: Refused = Refused::Status(0x100);
const INVALID_ORDER: Refused = Refused::Status(0x002);

/// An order for the registers of a stopped CPU. `accept` carries it out, or
/// returns false for a parameter that does not do.
fn on_stopped(state: &mut State, accept: impl FnOnce(&mut RegisterState) -> bool) -> Ordered {
    match state {
        State::Stopped(registers) => match accept(registers) {
            true => Ok(None),
            false => Err(INVALID_PARAMETER),
        },
        State::Starting | State::Stopping(_) => Err(Refused::Busy),
        State::Operating | State::Waiting(..) => Err(INCORRECT_STATE),
    }
}

/// What CPUs may have or not, by their host.
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// Vector registers.
    pub vector: bool,
    /// DIAGNOSE 0x318.
    pub control_program: bool,
}

/// The CPUs of a machine.
pub struct Cpus {
    vm: Arc<dyn hv::Vm>,
    memory: GuestMem,
    states: Mutex<Vec<State>>,
    changed: Condvar,
    features: Features,
    /// What DIAGNOSE 0x318 was told last.
    control_program: AtomicU64,
}

impl Cpus {
    /// `count` CPUs, of which the first operates and the others are reset and
    /// stopped.
    pub fn new(vm: Arc<dyn hv::Vm>, memory: GuestMem, count: u32, features: Features) -> Self {
        let state = |cpu| match cpu {
            0 => State::Operating,
            _ => State::Stopped(RegisterState::default()),
        };
        Self {
            vm,
            memory,
            states: Mutex::new((0..count).map(state).collect()),
            changed: Condvar::new(),
            features,
            control_program: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SIGNAL PROCESSOR: `r1` and `r3` are its register numbers, `order` the
    /// order code. Sets the condition code.
    ///
    /// # Errors
    /// A program interruption.
    pub fn signal(&self, cpu: &mut Cpu<'_>, r1: u8, r3: u8, order: u8) -> Result<Action> {
        cpu.require_supervisor()?;
        let target = (cpu.general(r3) & 0xffff) as usize;
        // The parameter is in the odd register of the pair.
        let parameter = cpu.general(r1 | 1);
        let mut states = self.lock();
        let Some(state) = states.get_mut(target) else {
            cpu.set_condition(3);
            return Ok(Action::Continue);
        };
        let ordered = self
            .order(state, target as u32, order, parameter)
            .map_err(|error| Stop::Failed(format!("SIGNAL PROCESSOR: {error}")))?;
        match ordered {
            Ok(action) => {
                cpu.set_condition(0);
                Ok(action.unwrap_or(Action::Continue))
            }
            Err(Refused::Status(status)) => {
                cpu.set_general_word(r1, status);
                cpu.set_condition(1);
                Ok(Action::Continue)
            }
            Err(Refused::Busy) => {
                cpu.set_condition(2);
                Ok(Action::Continue)
            }
        }
    }

    fn order(
        &self,
        state: &mut State,
        target: u32,
        code: u8,
        parameter: u64,
    ) -> std::io::Result<Ordered> {
        let none = Then::default();
        Ok(match code {
            order::START => match state {
                State::Stopped(_) => Ok(self.start(state, target)),
                State::Stopping(_) => Err(Refused::Busy),
                State::Starting | State::Operating | State::Waiting(..) => Ok(None),
            },
            order::RESTART => match state {
                State::Stopped(registers) | State::Waiting(_, registers) => {
                    self.restart(registers);
                    Ok(self.start(state, target))
                }
                // The order to stop is still being carried out.
                State::Starting | State::Stopping(_) => Err(Refused::Busy),
                State::Operating => {
                    self.vm.inject(Some(target), &interrupt::restart())?;
                    Ok(None)
                }
            },
            order::STOP => self.stop(state, target, none)?,
            order::STOP_AND_STORE_STATUS => {
                let then = Then {
                    store_status: true,
                    ..none
                };
                self.stop(state, target, then)?
            }
            order::INITIAL_CPU_RESET => {
                let then = Then {
                    initial_reset: true,
                    ..none
                };
                self.stop(state, target, then)?
            }
            order::CPU_RESET => {
                let then = Then {
                    reset: true,
                    ..none
                };
                self.stop(state, target, then)?
            }
            order::SET_PREFIX => on_stopped(state, |registers| {
                let prefix = parameter & 0x7fff_e000;
                let there = self.is_memory(prefix, 0x2000);
                if there {
                    register::assign(registers, register::PREFIX, prefix);
                }
                there
            }),
            order::STORE_STATUS_AT_ADDRESS => on_stopped(state, |registers| {
                self.store_status(registers, parameter & 0x7fff_fe00)
            }),
            // With vector registers, but no guarded storage, the area is of the
            // smallest size, which the last bits say by being zero.
            order::STORE_ADDITIONAL_STATUS if self.features.vector => {
                on_stopped(state, |registers| {
                    let aligned = parameter.is_multiple_of(ADDITIONAL_AREA);
                    aligned && self.store_vectors(registers, parameter)
                })
            }
            // All CPUs are in the z/Architecture mode, and stay there.
            order::SET_ARCHITECTURE => Err(INVALID_PARAMETER),
            _ => Err(INVALID_ORDER),
        })
    }

    fn start(&self, state: &mut State, target: u32) -> Option<Action> {
        match std::mem::replace(state, State::Starting) {
            State::Stopped(registers) | State::Waiting(_, registers) => Some(Action::Start {
                vcpu: target,
                registers: self.told(registers),
            }),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Remembers what the control program says of itself, for the CPUs that start
    /// from now on. False when there is no DIAGNOSE 0x318.
    pub fn set_control_program(&self, codes: u64) -> bool {
        if self.features.control_program {
            self.control_program.store(codes, Ordering::Relaxed);
        }
        self.features.control_program
    }

    /// The registers of a CPU that starts, with what the control program has said
    /// of itself: no reset of a CPU's changes that.
    pub fn told(&self, mut registers: RegisterState) -> RegisterState {
        if self.features.control_program {
            let codes = self.control_program.load(Ordering::Relaxed);
            register::assign(&mut registers, register::CONTROL_PROGRAM, codes);
        }
        registers
    }

    /// Asks a CPU to stop, and for `then`; one that is stopped does it at once.
    fn stop(&self, state: &mut State, target: u32, then: Then) -> std::io::Result<Ordered> {
        match state {
            State::Operating => {
                self.vm.inject(Some(target), &interrupt::stop())?;
                *state = State::Stopping(then);
            }
            State::Stopping(before) => {
                before.store_status |= then.store_status;
                before.reset |= then.reset;
                before.initial_reset |= then.initial_reset;
            }
            State::Stopped(registers) => self.settle(registers, then),
            State::Waiting(_, registers) => {
                let mut registers = std::mem::take(registers);
                self.settle(&mut registers, then);
                *state = State::Stopped(registers);
            }
            State::Starting => return Ok(Err(Refused::Busy)),
        }
        Ok(Ok(None))
    }

    fn settle(&self, registers: &mut RegisterState, then: Then) {
        if then.store_status {
            let memory = self.memory.memory();
            // Both are in RAM, which begins at 0.
            let _ = memory.write_obj(1_u8, GuestAddress(ARCHITECTURE_ID));
            self.store_status(registers, SAVE_AREA);
        }
        if then.initial_reset {
            *registers = RegisterState::default();
        } else if then.reset && register::is_whole(registers) {
            // KVM is told when the CPU starts.
            register::assign(registers, register::RESET, 1);
        }
    }

    /// A CPU has left the guest because it was told to stop: it parks, and when
    /// it was the last one, the guest has powered off.
    pub fn stopped(&self, cpu: &Cpu<'_>) -> Action {
        let mut states = self.lock();
        let Some(state) = states.get_mut(cpu.address as usize) else {
            return Action::Continue;
        };
        let then = match state {
            State::Stopping(then) => *then,
            _ => Then::default(),
        };
        let mut registers = self.registers(cpu);
        self.settle(&mut registers, then);
        *state = State::Stopped(registers);
        self.changed.notify_all();
        self.left(&states)
    }

    /// A CPU waits with interruptions disabled, which is `end` when no other one
    /// operates.
    pub fn waits(&self, cpu: &Cpu<'_>, end: End) -> Action {
        let mut states = self.lock();
        match states.get_mut(cpu.address as usize) {
            // KVM does not run it again, and the order to stop comes to it here.
            None | Some(State::Stopping(_)) => {
                drop(states);
                self.stopped(cpu)
            }
            Some(state) => {
                *state = State::Waiting(end, self.registers(cpu));
                self.changed.notify_all();
                self.left(&states)
            }
        }
    }

    fn registers(&self, cpu: &Cpu<'_>) -> RegisterState {
        let psw = [cpu.psw_mask(), cpu.psw_address()];
        register::save(psw, cpu.exit.sync_regs, self.features.vector)
    }

    /// A CPU that does nothing any more parks, and the machine ends with the
    /// last: by what a wait says, and by a power-off when all have stopped.
    fn left(&self, states: &[State]) -> Action {
        let still = |state: &State| {
            matches!(
                state,
                State::Starting | State::Operating | State::Stopping(_)
            )
        };
        if states.iter().any(still) {
            return Action::Park;
        }
        let mut waits = states.iter().filter_map(|state| match state {
            State::Waiting(end, _) => Some(end.clone()),
            _ => None,
        });
        Action::End(waits.next().unwrap_or(End::PowerOff))
    }

    /// A CPU that was started runs.
    pub fn started(&self, address: u32) {
        let mut states = self.lock();
        if let Some(state @ State::Starting) = states.get_mut(address as usize) {
            *state = State::Operating;
        }
        self.changed.notify_all();
    }

    /// Stops all CPUs but `address`, resets them, and waits until they have
    /// stopped; that one is to start anew. To `clear` is to reset their registers,
    /// too, and to forget what the control program has said of itself; otherwise
    /// a kernel that is started to save the memory of another finds them. False
    /// when another CPU resets this one, or the VM is over.
    ///
    /// # Errors
    /// KVM refused.
    pub fn reset_others(
        &self,
        address: u32,
        clear: bool,
        over: impl Fn() -> bool,
    ) -> std::io::Result<bool> {
        let then = Then {
            reset: true,
            initial_reset: clear,
            ..Then::default()
        };
        let mut states = self.lock();
        let own = |states: &[State]| match states.get(address as usize) {
            Some(State::Stopping(then)) => then.reset || then.initial_reset,
            _ => false,
        };
        while !own(&states) && !over() {
            let mut stopped = true;
            for (target, state) in (0..).zip(states.iter_mut()) {
                if target != address {
                    // One that starts is busy, and told the next time.
                    let _ = self.stop(state, target, then)?;
                    stopped &= matches!(state, State::Stopped(_));
                }
            }
            if stopped {
                if let Some(state) = states.get_mut(address as usize) {
                    *state = State::Starting;
                }
                if clear {
                    self.set_control_program(0);
                }
                return Ok(true);
            }
            (states, _) = self
                .changed
                .wait_timeout(states, LOOK)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(false)
    }

    /// A restart interruption of a stopped CPU: PSWs change places.
    fn restart(&self, registers: &mut RegisterState) {
        let memory = self.memory.memory();
        let prefix = registers.get(register::PREFIX).unwrap_or(0);
        let old = [register::PSW_MASK, register::PSW_ADDRESS];
        let old = old.map(|name| registers.get(name).unwrap_or(0).to_be_bytes());
        // The prefix area is memory: the prefix was checked when it was set.
        let _ = memory.write_slice(&old.concat(), GuestAddress(prefix + RESTART_OLD));
        let mut new = [0; 16];
        let _ = memory.read_slice(&mut new, GuestAddress(prefix + RESTART_NEW));
        let [mask, address] = [0, 8].map(|at| {
            new.get(at..)
                .and_then(|bytes| bytes.first_chunk())
                .map_or(0, |bytes| u64::from_be_bytes(*bytes))
        });
        register::assign(registers, register::PSW_MASK, mask);
        register::assign(registers, register::PSW_ADDRESS, address);
    }

    fn is_memory(&self, address: u64, size: usize) -> bool {
        use vm_memory::GuestMemoryBackend;
        let memory = self.memory.memory();
        memory.check_range(GuestAddress(address), size)
    }

    /// Stores a CPU's vector registers from `address` on.
    fn store_vectors(&self, registers: &RegisterState, address: u64) -> bool {
        let value = |name: &str| registers.get(name).unwrap_or(0).to_be_bytes();
        let left = register::FLOATING.iter().chain(&register::VECTOR_LEFT);
        let area: Vec<u8> = left
            .zip(&register::VECTOR_RIGHT)
            .flat_map(|(left, right)| [value(left), value(right)].concat())
            .collect();
        let memory = self.memory.memory();
        self.is_memory(address, ADDITIONAL_AREA as usize)
            && memory.write_slice(&area, GuestAddress(address)).is_ok()
    }

    /// Stores a CPU's status in the 512 bytes from `address` on.
    fn store_status(&self, registers: &RegisterState, address: u64) -> bool {
        let mut area = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = area.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        let value = |name: &str| registers.get(name).unwrap_or(0);
        for number in 0..16 {
            put(number * 8, &value(register::FLOATING[number]).to_be_bytes());
            put(
                0x80 + number * 8,
                &value(register::GENERAL[number]).to_be_bytes(),
            );
            let access = value(register::ACCESS[number]) as u32;
            put(0x140 + number * 4, &access.to_be_bytes());
            put(
                0x180 + number * 8,
                &value(register::CONTROL[number]).to_be_bytes(),
            );
        }
        put(0x100, &value(register::PSW_MASK).to_be_bytes());
        put(0x108, &value(register::PSW_ADDRESS).to_be_bytes());
        put(0x118, &(value(register::PREFIX) as u32).to_be_bytes());
        put(0x11c, &(value(register::FPC) as u32).to_be_bytes());
        put(0x124, &(value(register::TODPR) as u32).to_be_bytes());
        put(0x128, &value(register::CPU_TIMER).to_be_bytes());
        // Without its last byte.
        put(
            0x130,
            &(value(register::CLOCK_COMPARATOR) >> 8).to_be_bytes(),
        );
        let memory = self.memory.memory();
        memory.write_slice(&area, GuestAddress(address)).is_ok()
    }
}

#[cfg(test)]
#[path = "sigp_tests.rs"]
mod tests;
