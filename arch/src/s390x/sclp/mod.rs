//! SCLP, the service-call logical processor: what the machine is made of, the
//! consoles, the request to shut down. Its commands and blocks are described by
//! Linux's drivers (`arch/s390/include/asm/sclp.h`, `drivers/s390/char/sclp*`).

mod console;
mod events;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossvisor_devices::chardev::ConsoleInput;
use crossvisor_devices::output::Output;
use crossvisor_vmm::hv;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use self::console::Consoles;
use super::cpu::{Cpu, Result, Stop};
use super::ebcdic;
use super::interrupt::{self, program};

/// Command words; the second byte may hold a parameter.
mod command {
    pub const MASK: u32 = 0xffff_00ff;
    pub const READ_CPU_INFO: u32 = 0x0001_0001;
    pub const READ_SCP_INFO: u32 = 0x0002_0001;
    pub const READ_SCP_INFO_FORCED: u32 = 0x0012_0001;
    pub const WRITE_EVENT_DATA: u32 = 0x0076_0005;
    pub const READ_EVENT_DATA: u32 = 0x0077_0005;
    pub const WRITE_EVENT_MASK: u32 = 0x0078_0005;
}

/// Response codes.
mod response {
    pub const NORMAL_READ: u16 = 0x0010;
    pub const NORMAL: u16 = 0x0020;
    pub const BOUNDARY: u16 = 0x0100;
    pub const INVALID_COMMAND: u16 = 0x01f0;
    pub const TOO_SHORT: u16 = 0x0300;
    pub const NO_EVENTS: u16 = 0x60f0;
    pub const INVALID_FUNCTION: u16 = 0x40f0;
    pub const INVALID_BUFFER: u16 = 0x72f0;
    pub const INCONSISTENT: u16 = 0x73f0;
    pub const INVALID_MASK_LENGTH: u16 = 0x74f0;
    pub const EXCEEDS_SCCB: u16 = 0x75f0;
}

/// Size of an SCCB's header in bytes: length, function code, control mask,
/// response code.
const HEADER: usize = 8;
/// The most that an SCCB holds: it must not cross a page.
const PAGE: usize = 4096;
/// Where the list of CPUs begins: behind all fields of read SCP info that are
/// filled in.
const CPU_LIST: usize = 144;
/// One CPU of the list.
const CPU_ENTRY: usize = 16;
/// Facility: read CPU information (SCLP_HAS_CPU_INFO).
const HAS_CPU_INFO: u64 = 0x0800_0000_0000_0000;

/// Bit of byte 134: DIAGNOSE 0x318 (`sclp_early_facilities_detect`).
const HAS_CONTROL_PROGRAM: u8 = 0x80;

/// Storage is counted in increments of so many MiB.
const INCREMENT_MIB: u64 = 1;

/// What SCLP tells of the machine.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of CPUs; their addresses are 0 to one less.
    pub cpus: u32,
    /// Whether there are consoles: Linux takes one of SCLP's if there is any.
    pub consoles: bool,
    /// Whether there is DIAGNOSE 0x318.
    pub control_program: bool,
}

/// The service-call logical processor.
pub struct Sclp {
    facts: Facts,
    vm: Arc<dyn hv::Vm>,
    state: Mutex<events::State>,
    consoles: Mutex<Consoles>,
    room: EventFd,
}

impl Sclp {
    /// SCLP of a machine of which `facts` are to be told, with consoles that
    /// print to `output`.
    ///
    /// # Errors
    /// An event could not be made.
    pub fn new(facts: Facts, vm: Arc<dyn hv::Vm>, output: Arc<Output>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            facts,
            vm,
            state: Mutex::default(),
            consoles: Mutex::new(Consoles::new(output)),
            room: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)?,
        }))
    }

    fn state(&self) -> MutexGuard<'_, events::State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the guest's event masks and what waits for it.
    pub fn reset(&self) {
        *self.state() = events::State::default();
    }

    /// Asks the guest to shut down.
    pub fn quiesce(&self) {
        self.state().quiesce();
        self.announce();
    }

    /// Tells the guest of events that it listens to.
    fn announce(&self) {
        if self.state().has_events() {
            self.signal(0);
        }
    }

    /// The service signal: for the SCCB at `address`, or for events alone.
    fn signal(&self, address: u32) {
        let pending = u32::from(self.state().has_events());
        let interrupt = interrupt::service(address & !7 | pending);
        if let Err(error) = self.vm.inject(None, &interrupt) {
            log::warn!("SCLP cannot interrupt: {error}");
        }
    }

    /// SERVICE CALL: `code` is the command word, `address` the SCCB's real
    /// address. Returns the condition code.
    ///
    /// # Errors
    /// A program interruption: the SCCB is where none may be.
    pub fn call(&self, cpu: &Cpu<'_>, code: u64, address: u64) -> Result<u8> {
        cpu.require_supervisor()?;
        // Below 2 GiB, on a doubleword, not where prefixing tears memory apart.
        let low = address & !0x1fff;
        let misplaced = address >> 31 != 0 || address & 7 != 0 || low == 0;
        if misplaced || low == cpu.prefix() {
            return Err(Stop::Program(program::SPECIFICATION));
        }
        let memory = cpu.memory.memory();
        let at = GuestAddress(address);
        let length: u16 = memory
            .read_obj::<[u8; 2]>(at)
            .map(u16::from_be_bytes)
            .map_err(|_| Stop::Program(program::ADDRESSING))?;
        let length = usize::from(length);
        if length < HEADER {
            return Err(Stop::Program(program::SPECIFICATION));
        }
        let mut sccb = vec![0; length.min(PAGE)];
        memory
            .read_slice(&mut sccb, at)
            .map_err(|_| Stop::Program(program::ADDRESSING))?;
        let crosses = (address & 0xfff) as usize + length > PAGE;
        let code = (code & u64::from(command::MASK)) as u32;
        let response = match crosses {
            true => response::BOUNDARY,
            false => self.execute(code, &mut sccb),
        };
        put(&mut sccb, 6, &response.to_be_bytes());
        memory
            .write_slice(&sccb, at)
            .map_err(|_| Stop::Program(program::ADDRESSING))?;
        self.signal(address as u32);
        Ok(0)
    }

    /// Executes a command on an SCCB and returns the response code.
    fn execute(&self, code: u32, sccb: &mut [u8]) -> u16 {
        match code {
            command::READ_SCP_INFO | command::READ_SCP_INFO_FORCED => self.read_scp_info(sccb),
            command::READ_CPU_INFO => self.read_cpu_info(sccb),
            command::WRITE_EVENT_MASK => self.state().write_mask(sccb, self.facts.consoles),
            command::WRITE_EVENT_DATA => {
                let mut consoles = self.consoles.lock().unwrap_or_else(PoisonError::into_inner);
                events::write_data(sccb, &mut consoles)
            }
            command::READ_EVENT_DATA => {
                let mut state = self.state();
                let response = state.read_data(sccb);
                if state.has_room() {
                    // It fails only when it is signalled already.
                    let _ = self.room.write(1);
                }
                response
            }
            _ => response::INVALID_COMMAND,
        }
    }

    /// Memory, CPUs, facilities (Linux `struct read_info_sccb`).
    fn read_scp_info(&self, sccb: &mut [u8]) -> u16 {
        let needed = CPU_LIST + self.facts.cpus as usize * CPU_ENTRY;
        if let Some(response) = too_short(sccb, needed) {
            return response;
        }
        let increments = self.facts.memory >> 20;
        let increments = increments / INCREMENT_MIB;
        // Counts that do not fit are in the wider fields.
        match u16::try_from(increments) {
            Ok(count) => put(sccb, 8, &count.to_be_bytes()),
            Err(_) => put(sccb, 104, &increments.to_be_bytes()),
        }
        put(sccb, 10, &[INCREMENT_MIB as u8]);
        put(sccb, 16, &(self.facts.cpus as u16).to_be_bytes());
        put(sccb, 18, &(CPU_LIST as u16).to_be_bytes());
        put(sccb, 24, &ebcdic::field::<8>(""));
        put(sccb, 48, &HAS_CPU_INFO.to_be_bytes());
        // The highest address that a CPU can have.
        let highest = self.facts.cpus.saturating_sub(1) as u16;
        put(sccb, 120, &highest.to_be_bytes());
        if self.facts.control_program {
            put(sccb, 134, &[HAS_CONTROL_PROGRAM]);
        }
        self.list_cpus(sccb, CPU_LIST);
        response::NORMAL_READ
    }

    fn read_cpu_info(&self, sccb: &mut [u8]) -> u16 {
        const LIST: usize = 16;
        let needed = LIST + self.facts.cpus as usize * CPU_ENTRY;
        if let Some(response) = too_short(sccb, needed) {
            return response;
        }
        put(sccb, 8, &(self.facts.cpus as u16).to_be_bytes());
        put(sccb, 10, &(LIST as u16).to_be_bytes());
        // None is in standby; that list is empty, behind the other.
        put(sccb, 12, &0u16.to_be_bytes());
        put(sccb, 14, &(needed as u16).to_be_bytes());
        self.list_cpus(sccb, LIST);
        response::NORMAL_READ
    }

    /// Entries with the CPU's address; type 0 is a general-purpose one.
    fn list_cpus(&self, sccb: &mut [u8], at: usize) {
        for cpu in 0..self.facts.cpus {
            let mut entry = [0; CPU_ENTRY];
            entry[0] = cpu as u8;
            put(sccb, at + cpu as usize * CPU_ENTRY, &entry);
        }
    }
}

/// The response when an SCCB cannot hold `needed` bytes; it then says how many
/// are needed.
fn too_short(sccb: &mut [u8], needed: usize) -> Option<u16> {
    let short = sccb.len() < needed;
    if short {
        put(sccb, 0, &(needed as u16).to_be_bytes());
    } else if let Some(data) = sccb.get_mut(HEADER..) {
        data.fill(0);
    }
    short.then_some(response::TOO_SHORT)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

impl ConsoleInput for Sclp {
    fn push(&self, bytes: &[u8]) -> usize {
        let taken = self.state().type_in(bytes);
        self.announce();
        taken
    }

    fn room(&self) -> &EventFd {
        &self.room
    }
}

#[cfg(test)]
mod tests;
