//! Run-time abstraction services (Linux on Power Architecture Reference,
//! chapter 7).
//!
//! The guest calls a stub in its own memory, which makes a hypercall with the
//! address of the arguments: big-endian words, whatever the guest's byte order
//! (section 7.2.1).

pub mod clock;
pub mod events;
pub mod nvram;
pub mod pci;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossvisor_devices::GuestMem;
use crossvisor_devices::hvterm::Hvterm;
use crossvisor_devices::pci::PciRoot;
use crossvisor_vmm::exit::{Action, End};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, Permissions,
};

use self::clock::Clock;
use self::events::Events;
use self::nvram::Nvram;
use self::pci::PciCalls;
use super::load;

/// The hypercall that the stub makes. Numbers from 0xf000 on are the
/// platform's; KVM looks for its own RTAS calls behind this one (KVM API,
/// section 4.66, KVM_PPC_RTAS_DEFINE_TOKEN; `KVMPPC_H_RTAS`).
pub const H_RTAS: u32 = 0xf000;

// Status words (section 7.2.1, table 11).
const SUCCESS: i32 = 0;
const HARDWARE_ERROR: i32 = -1;
const PARAMETER_ERROR: i32 = -3;

/// Words of arguments and results that a call has room for, as KVM and Linux
/// have it.
const MAX_WORDS: u32 = 16;

/// Address bits that name a place in memory: the top four are not looked at, as
/// KVM does with the same argument (`KVM_PAM`).
const ADDRESS_MASK: u64 = 0x0fff_ffff_ffff_ffff;

// Tokens.
/// Early debugging code of Linux's has display-character's built in. No tree
/// tells of it: Linux writes to an operator's panel by it, of which there is none,
/// and the terminal has enough of its own.
const DISPLAY_CHARACTER: u32 = 0x0a;
const GET_TIME_OF_DAY: u32 = 0x10;
const SET_TIME_OF_DAY: u32 = 0x11;
const POWER_OFF: u32 = 0x12;
const SYSTEM_REBOOT: u32 = 0x13;
const OS_TERM: u32 = 0x14;
const NVRAM_FETCH: u32 = 0x15;
const NVRAM_STORE: u32 = 0x16;
const START_CPU: u32 = 0x20;
const STOP_SELF: u32 = 0x21;
const QUERY_CPU_STOPPED_STATE: u32 = 0x22;
const READ_PCI_CONFIG: u32 = 0x30;
const WRITE_PCI_CONFIG: u32 = 0x31;
const IBM_READ_PCI_CONFIG: u32 = 0x32;
const IBM_WRITE_PCI_CONFIG: u32 = 0x33;
const CHANGE_MSI: u32 = 0x34;
const QUERY_INTERRUPT_SOURCE: u32 = 0x35;
const CHECK_EXCEPTION: u32 = 0x40;
const GET_SENSOR_STATE: u32 = 0x41;

/// The calls that KVM handles once it knows their tokens.
pub const XICS_TOKENS: [(&str, u32); 4] = [
    ("ibm,set-xive", 0x50),
    ("ibm,get-xive", 0x51),
    ("ibm,int-off", 0x52),
    ("ibm,int-on", 0x53),
];

/// Every call that kernels are told of, with its token: the properties of `/rtas`.
pub const TOKENS: [(&str, u32); 22] = [
    ("get-time-of-day", GET_TIME_OF_DAY),
    ("set-time-of-day", SET_TIME_OF_DAY),
    ("power-off", POWER_OFF),
    ("system-reboot", SYSTEM_REBOOT),
    ("ibm,os-term", OS_TERM),
    ("nvram-fetch", NVRAM_FETCH),
    ("nvram-store", NVRAM_STORE),
    ("start-cpu", START_CPU),
    ("stop-self", STOP_SELF),
    ("query-cpu-stopped-state", QUERY_CPU_STOPPED_STATE),
    ("read-pci-config", READ_PCI_CONFIG),
    ("write-pci-config", WRITE_PCI_CONFIG),
    ("ibm,read-pci-config", IBM_READ_PCI_CONFIG),
    ("ibm,write-pci-config", IBM_WRITE_PCI_CONFIG),
    ("ibm,change-msi", CHANGE_MSI),
    ("ibm,query-interrupt-source-number", QUERY_INTERRUPT_SOURCE),
    ("check-exception", CHECK_EXCEPTION),
    ("get-sensor-state", GET_SENSOR_STATE),
    XICS_TOKENS[0],
    XICS_TOKENS[1],
    XICS_TOKENS[2],
    XICS_TOKENS[3],
];

/// The stub that the guest calls RTAS by: five instructions, big-endian. It
/// makes the hypercall with the address of the arguments, which came in r3, in
/// r4.
pub fn stub() -> Vec<u8> {
    let instructions = [
        // mr r4,r3
        0x7c64_1b78,
        // li r3,0
        0x3860_0000,
        // ori r3,r3,H_RTAS
        0x6063_0000 | H_RTAS,
        // sc 1
        0x4400_0022,
        // blr
        0x4e80_0020_u32,
    ];
    instructions.iter().flat_map(|i| i.to_be_bytes()).collect()
}

/// A call as the guest made it.
#[derive(Debug)]
struct Call {
    token: u32,
    args: Vec<u32>,
    /// How many words of results there is room for.
    results: usize,
}

/// What a call comes to: its status, and the words after it.
type Results = Result<Vec<u32>, i32>;

/// Reads the call at `address`; none where it has more words than fit, or is
/// not in RAM with the room for its results: nothing is done whose outcome
/// cannot be told.
fn read(memory: &GuestMem, address: u64) -> Option<Call> {
    let mut header = [0; 12];
    let memory = memory.memory();
    memory.read_slice(&mut header, GuestAddress(address)).ok()?;
    let word = |bytes: &[u8]| bytes.first_chunk::<4>().map(|b| u32::from_be_bytes(*b));
    let token = word(&header)?;
    let args = word(header.get(4..)?)?;
    let results = word(header.get(8..)?)?;
    if args.checked_add(results)? > MAX_WORDS {
        return None;
    }
    let mut bytes = vec![0; args as usize * 4];
    let first = GuestAddress(address.checked_add(12)?);
    memory.read_slice(&mut bytes, first).ok()?;
    let results = results as usize;
    let end = first.checked_add(bytes.len() as u64)?;
    if !is_writable(&memory, end, results * 4) {
        return None;
    }
    Some(Call {
        token,
        args: bytes.chunks(4).filter_map(word).collect(),
        results,
    })
}

/// Whether `len` bytes from `address` on are RAM.
fn is_writable(memory: &GuestMemoryMmap, address: GuestAddress, len: usize) -> bool {
    len == 0 || memory.check_range(address, len, Permissions::Write)
}

/// Writes as many words of `results` as the guest has room for, after the
/// arguments of the call at `address`.
fn write(memory: &GuestMem, address: u64, call: &Call, results: &[u32]) -> Option<()> {
    let bytes: Vec<u8> = results
        .iter()
        .take(call.results)
        .flat_map(|word| word.to_be_bytes())
        .collect();
    let offset = 12 + call.args.len() as u64 * 4;
    let first = GuestAddress(address.checked_add(offset)?);
    memory.memory().write_slice(&bytes, first).ok()
}

/// Which vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CpuState {
    Stopped,
    Running,
}

/// The services of one run of a machine.
pub struct Rtas {
    memory: GuestMem,
    cpus: Mutex<Vec<CpuState>>,
    clock: Clock,
    nvram: Nvram,
    events: Arc<Events>,
    pci: Option<PciCalls>,
    terminal: Option<Arc<Hvterm>>,
}

impl Rtas {
    /// Services for `cpus` vCPUs, of which the first runs.
    pub fn new(
        memory: GuestMem,
        cpus: u32,
        events: Arc<Events>,
        pci: Option<Arc<PciRoot>>,
        terminal: Option<Arc<Hvterm>>,
    ) -> Self {
        let state = |index| match index {
            0 => CpuState::Running,
            _ => CpuState::Stopped,
        };
        Self {
            memory,
            cpus: Mutex::new((0..cpus).map(state).collect()),
            clock: Clock::default(),
            nvram: Nvram::default(),
            events,
            pci: pci.map(PciCalls::new),
            terminal,
        }
    }

    /// Makes the call at `address` for vCPU `vcpu`. `None` when there is no call
    /// there. `lpcr` is what a vCPU that is started has in common with the
    /// others.
    pub fn call(&self, vcpu: u32, address: u64, lpcr: u64) -> Option<Action> {
        let address = address & ADDRESS_MASK;
        let call = read(&self.memory, address)?;
        let (results, action) = self.dispatch(&call, lpcr);
        let words: Vec<u32> = match results {
            Ok(words) => std::iter::once(SUCCESS as u32).chain(words).collect(),
            Err(status) => vec![status as u32],
        };
        write(&self.memory, address, &call, &words)?;
        // Whoever sees it stopped may use its memory, results and all.
        if action == Action::Park
            && let Some(state) = self.cpus().get_mut(vcpu as usize)
        {
            *state = CpuState::Stopped;
        }
        Some(action)
    }

    fn dispatch(&self, call: &Call, lpcr: u64) -> (Results, Action) {
        let mut action = Action::Continue;
        let results = match (call.token, call.args.as_slice()) {
            (DISPLAY_CHARACTER, [character]) => {
                self.display(*character as u8);
                Ok(Vec::new())
            }
            (GET_TIME_OF_DAY, []) => Ok(self.clock.get().to_vec()),
            (SET_TIME_OF_DAY, args) => self.clock.set(args).ok_or(PARAMETER_ERROR).map(|()| vec![]),
            (POWER_OFF, [_, _]) => {
                action = Action::End(End::PowerOff);
                Ok(Vec::new())
            }
            (SYSTEM_REBOOT, []) => {
                action = Action::End(End::Reset);
                Ok(Vec::new())
            }
            // The guest has said why on its console. Linux calls it from a panic
            // notifier: before it hands its log to those who keep it (kmsg_dump).
            (OS_TERM, [_]) => {
                action = Action::End(End::Panic);
                Ok(Vec::new())
            }
            (NVRAM_FETCH, [index, buffer, len]) => {
                let done = self.nvram.fetch(&self.memory, *index, *buffer, *len);
                done.map(|()| vec![*len]).ok_or(PARAMETER_ERROR)
            }
            (NVRAM_STORE, [index, buffer, len]) => {
                let done = self.nvram.store(&self.memory, *index, *buffer, *len);
                done.map(|()| vec![*len]).ok_or(PARAMETER_ERROR)
            }
            (START_CPU, [cpu, start, argument]) => match self.start(*cpu) {
                true => {
                    let mut registers = load::entry_state((*start).into(), (*argument).into());
                    registers.0.push(("lpcr", lpcr));
                    let vcpu = *cpu;
                    action = Action::Start { vcpu, registers };
                    Ok(Vec::new())
                }
                false => Err(PARAMETER_ERROR),
            },
            (STOP_SELF, []) => {
                action = Action::Park;
                Ok(Vec::new())
            }
            (QUERY_CPU_STOPPED_STATE, [cpu]) => match self.cpus().get(*cpu as usize) {
                Some(CpuState::Stopped) => Ok(vec![0]),
                Some(CpuState::Running) => Ok(vec![2]),
                None => Err(PARAMETER_ERROR),
            },
            (CHECK_EXCEPTION, args) => self.check_exception(args),
            (GET_SENSOR_STATE, [sensor, index]) => match self.events.sensor(*sensor, *index) {
                Some(state) => Ok(vec![state]),
                None => Err(PARAMETER_ERROR),
            },
            (token, args) => match &self.pci {
                Some(pci) => pci.call(token, args, call.results),
                None => Err(HARDWARE_ERROR),
            },
        };
        (results, action)
    }

    /// Interrupts again for events that the guest has not taken.
    pub fn remind(&self) {
        if let Err(error) = self.events.remind() {
            log::warn!("cannot tell the guest of an event: {error}");
        }
    }

    /// Marks vCPU `cpu` as started, if there is one and it is stopped.
    fn start(&self, cpu: u32) -> bool {
        match self.cpus().get_mut(cpu as usize) {
            Some(state @ CpuState::Stopped) => {
                *state = CpuState::Running;
                true
            }
            _ => false,
        }
    }

    fn cpus(&self) -> MutexGuard<'_, Vec<CpuState>> {
        self.cpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn display(&self, character: u8) {
        if let Some(terminal) = &self.terminal {
            terminal.put(&[character]);
        }
    }

    /// check-exception (section 7.3.3): vector, information, mask of events,
    /// whether it is urgent, buffer and its length; with seven arguments the
    /// third is the upper half of the information.
    fn check_exception(&self, args: &[u32]) -> Results {
        let (mask, buffer, len) = match args {
            [_, _, mask, _, buffer, len] => (*mask, *buffer, *len),
            [_, _, mask, _, buffer, len, _] => (*mask, *buffer, *len),
            _ => return Err(PARAMETER_ERROR),
        };
        let memory = self.memory.memory();
        let (buffer, len) = (GuestAddress(buffer.into()), len as usize);
        // An event that cannot be told of is not taken.
        if !is_writable(&memory, buffer, len) {
            return Err(PARAMETER_ERROR);
        }
        let Some(log) = self.events.take(mask) else {
            // No event of these kinds.
            return Err(1);
        };
        match memory.write_slice(log.get(..len).unwrap_or(&log), buffer) {
            Ok(()) => Ok(Vec::new()),
            Err(_) => Err(PARAMETER_ERROR),
        }
    }
}

#[cfg(test)]
#[path = "rtas_tests.rs"]
mod tests;
