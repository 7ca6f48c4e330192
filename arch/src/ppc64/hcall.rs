//! Hypercalls (Linux on Power Architecture Reference, chapter 14) that KVM hands
//! on: those of the terminal, of the partition's mode, of what the processor does
//! about speculation, of RTAS, and of a XIVE (`xive::calls`).
//!
//! Those about memory, scheduling and the XICS are KVM's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossvisor_devices::hvterm::{Hvterm, MAX_CHARS};
use crossvisor_vmm::arch::{ExitHandler, RegisterState};
use crossvisor_vmm::exit::{Action, ArchExit, End};
use crossvisor_vmm::hv;

use super::fdt;
use super::mmu::Mmu;
use super::rtas::{H_RTAS, Rtas};
use super::xive::calls::{H_INT_SET_SOURCE_CONFIG, XiveCalls};

/// KVM_EXIT_PAPR_HCALL.
const EXIT_PAPR_HCALL: u32 = 19;

// Function numbers (table 14.1).
const H_GET_TERM_CHAR: u64 = 0x54;
const H_PUT_TERM_CHAR: u64 = 0x58;
const H_VIO_SIGNAL: u64 = 0x104;
const H_GET_CPU_CHARACTERISTICS: u64 = 0x1c8;
/// H_SET_MODE, which KVM hands on where it concerns more than one vCPU.
pub const H_SET_MODE: u64 = 0x31c;
const H_REGISTER_PROC_TBL: u64 = 0x37c;

// Return codes.
pub const H_SUCCESS: i64 = 0;
pub const H_HARDWARE: i64 = -1;
const H_FUNCTION: i64 = -2;
pub const H_PARAMETER: i64 = -4;
pub const H_P2: i64 = -55;
pub const H_P3: i64 = -56;
pub const H_P4: i64 = -57;
pub const H_P5: i64 = -58;
const H_UNSUPPORTED_FLAG: i64 = -256;

// H_SET_MODE's resources.
const MODE_ADDRESS_TRANSLATION: u64 = 3;
const MODE_ENDIAN: u64 = 4;

/// LPCR.ILE: interrupts are taken in little-endian mode.
pub const LPCR_ILE: u64 = 1 << 25;
/// LPCR.AIL: how interrupts are taken while translation is on.
pub const LPCR_AIL: u64 = 3 << 23;

// H_REGISTER_PROC_TBL's flags.
const TABLE_GTSE: u64 = 1 << 0;
const TABLE_HASH: u64 = 1 << 1;
const TABLE_RADIX: u64 = 1 << 2;
const TABLE_REGISTER: u64 = 1 << 3;
const TABLE_MODIFY: u64 = 1 << 4;
/// The partition table entry's mark of a radix guest.
const PATE1_GR: u64 = 1 << 63;
/// The largest process table: 2^(12 + 24) bytes.
const TABLE_SIZE_MAX: u64 = 24;

// KVM_PPC_CONFIGURE_V3_MMU's flags.
const MMUV3_RADIX: u64 = 1 << 0;
const MMUV3_GTSE: u64 = 1 << 1;

/// The return code of a hypercall, and the words after it in r4 and on.
pub type Answer = (i64, Vec<u64>);

/// Handles a machine's hypercalls.
pub struct Hypercalls {
    vm: Arc<dyn hv::Vm>,
    rtas: Rtas,
    terminal: Option<Arc<Hvterm>>,
    xive: Option<XiveCalls>,
    /// What H_GET_CPU_CHARACTERISTICS answers, where the host knows.
    characteristics: Option<[u64; 2]>,
    /// The bits of LPCR that H_SET_MODE chooses, which all vCPUs have.
    lpcr: AtomicU64,
    /// The partition table entry: where the process table is.
    process_table: AtomicU64,
}

impl Hypercalls {
    /// Handles the hypercalls of `vm`, whose guests translate by `mmu`: KVM has them
    /// in that mode before they register a table.
    pub fn new(
        vm: Arc<dyn hv::Vm>,
        rtas: Rtas,
        terminal: Option<Arc<Hvterm>>,
        xive: Option<XiveCalls>,
        characteristics: Option<[u64; 2]>,
        mmu: Mmu,
    ) -> Self {
        Self {
            vm,
            rtas,
            terminal,
            xive,
            characteristics,
            lpcr: AtomicU64::new(0),
            process_table: AtomicU64::new(match mmu {
                Mmu::Radix => PATE1_GR,
                Mmu::Hpt => 0,
            }),
        }
    }

    /// The terminal called `unit`; 0 stands for the first one in early kernel
    /// code.
    fn terminal(&self, unit: u64) -> Option<&Hvterm> {
        let known = [0, u64::from(fdt::VTY)].contains(&unit);
        self.terminal.as_deref().filter(|_| known)
    }

    /// Characters are in registers from the most significant byte on.
    fn get_term_char(&self, unit: u64) -> Answer {
        let Some(terminal) = self.terminal(unit) else {
            return (H_PARAMETER, Vec::new());
        };
        let chars = terminal.get();
        let mut registers = [0; MAX_CHARS];
        for (place, char) in registers.iter_mut().zip(&chars) {
            *place = *char;
        }
        let (words, _) = registers.as_chunks::<8>();
        let words = words.iter().map(|word| u64::from_be_bytes(*word));
        let count = chars.len() as u64;
        (H_SUCCESS, std::iter::once(count).chain(words).collect())
    }

    fn put_term_char(&self, unit: u64, count: u64, words: [u64; 2]) -> i64 {
        let Some(terminal) = self.terminal(unit) else {
            return H_PARAMETER;
        };
        let bytes = words.map(u64::to_be_bytes);
        let chars = usize::try_from(count)
            .ok()
            .and_then(|count| bytes.as_flattened().get(..count));
        match chars {
            None => H_PARAMETER,
            Some(chars) => {
                terminal.put(chars);
                H_SUCCESS
            }
        }
    }

    /// H_SET_MODE. What it chooses holds for the whole partition. The calling
    /// vCPU has it at once and others when they start: a kernel chooses before it
    /// starts them. Those that kexec leaves spinning for a kernel of the other
    /// byte order keep what they had, until they stop and start.
    fn set_mode(&self, flags: u64, resource: u64, values: [u64; 2]) -> (i64, Action) {
        let (mask, bits) = match (resource, flags) {
            (MODE_ENDIAN, 0) => (LPCR_ILE, 0),
            (MODE_ENDIAN, 1) => (LPCR_ILE, LPCR_ILE),
            // Interrupts with translation off, or on at 0xc000000000004000: what
            // KVM-HV has.
            (MODE_ADDRESS_TRANSLATION, 0) => (LPCR_AIL, 0),
            (MODE_ADDRESS_TRANSLATION, 3) => (LPCR_AIL, LPCR_AIL),
            (MODE_ENDIAN | MODE_ADDRESS_TRANSLATION, _) => {
                return (H_UNSUPPORTED_FLAG, Action::Continue);
            }
            _ => return (H_P2, Action::Continue),
        };
        match values {
            [0, 0] => {}
            [0, _] => return (H_P4, Action::Continue),
            _ => return (H_P3, Action::Continue),
        }
        let update = |lpcr| Some(lpcr & !mask | bits);
        let order = Ordering::AcqRel;
        let old = self.lpcr.fetch_update(order, Ordering::Acquire, update);
        let lpcr = old.map_or(0, |old| old & !mask | bits);
        (H_SUCCESS, Action::Set(RegisterState(vec![("lpcr", lpcr)])))
    }

    /// H_REGISTER_PROC_TBL: where translations of processes are.
    fn register_process_table(&self, flags: u64, base: u64, page: u64, size: u64) -> i64 {
        let radix = flags & TABLE_RADIX != 0;
        let known = TABLE_GTSE | TABLE_HASH | TABLE_RADIX | TABLE_REGISTER | TABLE_MODIFY;
        if flags & !known != 0 {
            return H_PARAMETER;
        }
        let old = self.process_table.load(Ordering::Acquire);
        let entry = match (flags & TABLE_MODIFY != 0, flags & TABLE_REGISTER != 0) {
            (true, true) if radix => match (base, page, size) {
                _ if base & 0xfff != 0 || base >> 60 != 0 => return H_P2,
                (_, 1.., _) => return H_P3,
                _ if size > TABLE_SIZE_MAX => return H_P4,
                _ => PATE1_GR | base | size,
            },
            (true, true) => match (base, page, size) {
                _ if base >> 38 != 0 => return H_P2,
                (_, 8.., _) => return H_P3,
                _ if size > TABLE_SIZE_MAX => return H_P4,
                _ => base << 25 | page << 5 | size,
            },
            (true, false) => old & PATE1_GR,
            // Only the other flags change.
            (false, _) if radix != (old & PATE1_GR != 0) => return H_PARAMETER,
            (false, _) => old,
        };
        let mmu = [(MMUV3_RADIX, radix), (MMUV3_GTSE, flags & TABLE_GTSE != 0)];
        let mmu = mmu.iter().filter(|(_, on)| *on);
        let mmu = mmu.fold(0, |flags, (flag, _)| flags | flag);
        let registers = RegisterState(vec![("process_table", entry), ("mmu_flags", mmu)]);
        match self.vm.set_registers(&registers) {
            Ok(()) => {
                self.process_table.store(entry, Ordering::Release);
                H_SUCCESS
            }
            Err(error) => {
                log::warn!("the guest's process table: {error}");
                H_HARDWARE
            }
        }
    }

    fn dispatch(&self, vcpu: u32, number: u64, args: &[u64; 9]) -> (Answer, Action) {
        let [a, b, c, d, ..] = *args;
        let code = |code| (code, Vec::new());
        match number {
            H_GET_TERM_CHAR => (self.get_term_char(a), Action::Continue),
            H_PUT_TERM_CHAR => (code(self.put_term_char(a, b, [c, d])), Action::Continue),
            // The terminal interrupts whether it is asked to or not.
            H_VIO_SIGNAL if self.terminal(a).is_some() => (code(H_SUCCESS), Action::Continue),
            H_SET_MODE => {
                let (status, action) = self.set_mode(a, b, [c, d]);
                (code(status), action)
            }
            H_REGISTER_PROC_TBL => {
                let status = self.register_process_table(a, b, c, d);
                (code(status), Action::Continue)
            }
            H_GET_CPU_CHARACTERISTICS => {
                let told = self.characteristics.map(|words| (H_SUCCESS, words.into()));
                (told.unwrap_or(code(H_FUNCTION)), Action::Continue)
            }
            number if number == u64::from(H_RTAS) => {
                let lpcr = self.lpcr.load(Ordering::Acquire);
                match self.rtas.call(vcpu, a, lpcr) {
                    Some(action) => (code(H_SUCCESS), action),
                    None => (code(H_PARAMETER), Action::Continue),
                }
            }
            _ => {
                let xive = self.xive.as_ref();
                let answer = xive.and_then(|xive| xive.call(number, args));
                if number == H_INT_SET_SOURCE_CONFIG && answer.is_some() {
                    self.rtas.remind();
                }
                (answer.unwrap_or(code(H_FUNCTION)), Action::Continue)
            }
        }
    }
}

/// `papr_hcall` of `struct kvm_run`: the function, the return code, and nine
/// registers from r4 on, which are arguments and then results. They are in the
/// host's byte order.
const RETURN: usize = 1;
const ARGS: usize = 2;
const COUNT: usize = 9;

impl ExitHandler for Hypercalls {
    fn handle(&self, vcpu: u32, exit: ArchExit<'_>) -> Action {
        if exit.reason != EXIT_PAPR_HCALL {
            return Action::End(End::Crash(format!(
                "vCPU {vcpu} left with KVM exit reason {}, which this machine does not have",
                exit.reason
            )));
        }
        let (words, _) = exit.data.as_chunks_mut::<8>();
        let word = |index: usize| words.get(index).map_or(0, |word| u64::from_ne_bytes(*word));
        let args: [u64; COUNT] = std::array::from_fn(|index| word(ARGS + index));
        let ((status, results), action) = self.dispatch(vcpu, word(0), &args);
        let mut set = |index: usize, value: u64| {
            if let Some(word) = words.get_mut(index) {
                *word = value.to_ne_bytes();
            }
        };
        set(RETURN, status as u64);
        for (index, value) in results.into_iter().enumerate().take(COUNT) {
            set(ARGS + index, value);
        }
        action
    }
}

#[cfg(test)]
#[path = "hcall_tests.rs"]
mod tests;
