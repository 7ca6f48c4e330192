//! Exits that only this architecture has: calls of the Supervisor Binary
//! Interface (RISC-V SBI Specification 3.0) that KVM hands over, and CSRs that
//! it does not emulate (KVM API, section 5, KVM_EXIT_RISCV_SBI and
//! KVM_EXIT_RISCV_CSR).
//!
//! Timers, interrupts between harts, fences, starting and stopping of harts
//! (HSM) and resets (SRST, which arrive as system events) are KVM's.

use std::sync::Arc;

use crossvisor_devices::GuestMem;
use crossvisor_devices::serial::Serial;
use crossvisor_vmm::arch::{ExitHandler, NoArchExits};
use crossvisor_vmm::exit::{Action, ArchExit, RUN_UNION_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use crate::shared::random;

/// KVM_EXIT_RISCV_SBI.
const EXIT_SBI: u32 = 35;
/// KVM_EXIT_RISCV_CSR.
const EXIT_CSR: u32 = 36;

// Words of `struct kvm_run`'s union at KVM_EXIT_RISCV_SBI.
const EXTENSION: usize = 0;
const FUNCTION: usize = 1;
const ARGUMENTS: usize = 2;
const ERROR: usize = 8;
const VALUE: usize = 9;
// At KVM_EXIT_RISCV_CSR.
const CSR_NUMBER: usize = 0;
const CSR_VALUE: usize = 3;

// Extensions: the legacy console (chapter 5) and the debug console (chapter
// 12).
const PUTCHAR: u64 = 1;
const GETCHAR: u64 = 2;
const DBCN: u64 = 0x4442_434e;
const DBCN_WRITE: u64 = 0;
const DBCN_READ: u64 = 1;
const DBCN_WRITE_BYTE: u64 = 2;

// Error codes (chapter 3).
const SUCCESS: u64 = 0;
const NOT_SUPPORTED: u64 = -2_i64 as u64;
const INVALID_PARAM: u64 = -3_i64 as u64;
/// What getchar returns when there is nothing.
const NO_CHARACTER: u64 = -1_i64 as u64;

/// The most that one call prints or reads, in bytes; a caller goes on with the
/// rest.
const PIECE: u64 = 4096;

/// The entropy source's CSR (RISC-V Cryptography Extensions, chapter 4): 16
/// bits of entropy under ES16 in the status field.
const SEED: u64 = 0x015;
const SEED_ES16: u64 = 2 << 30;

/// Handles the exits.
pub struct Sbi {
    memory: GuestMem,
    /// The UART, with which the debug console shares its line to the user.
    line: Arc<Serial>,
}

impl Sbi {
    /// A handler whose debug console is at the same line as `line`.
    pub fn new(memory: GuestMem, line: Arc<Serial>) -> Self {
        Self { memory, line }
    }

    /// Answers a call: error and value, or character.
    fn call(&self, extension: u64, function: u64, arguments: [u64; 3]) -> (u64, u64) {
        let [first, ..] = arguments;
        match (extension, function) {
            (PUTCHAR, _) | (DBCN, DBCN_WRITE_BYTE) => {
                self.line.print(&[first as u8]);
                (SUCCESS, 0)
            }
            (GETCHAR, _) => match self.line.take(1).first() {
                Some(character) => ((*character).into(), 0),
                None => (NO_CHARACTER, 0),
            },
            (DBCN, DBCN_WRITE) => self.write(arguments),
            (DBCN, DBCN_READ) => self.read(arguments),
            _ => (NOT_SUPPORTED, 0),
        }
    }

    /// The guest's buffer: length, low and high half of its address. `None`
    /// when it is not all memory.
    fn buffer(&self, [len, low, high]: [u64; 3]) -> Option<(GuestAddress, usize)> {
        let address = GuestAddress(low);
        let size = usize::try_from(len).ok()?;
        let whole = high == 0 && self.memory.memory().check_range(address, size);
        whole.then_some((address, len.min(PIECE) as usize))
    }

    fn write(&self, arguments: [u64; 3]) -> (u64, u64) {
        let Some((address, len)) = self.buffer(arguments) else {
            return (INVALID_PARAM, 0);
        };
        let mut bytes = vec![0; len];
        if self
            .memory
            .memory()
            .read_slice(&mut bytes, address)
            .is_err()
        {
            return (INVALID_PARAM, 0);
        }
        self.line.print(&bytes);
        (SUCCESS, len as u64)
    }

    fn read(&self, arguments: [u64; 3]) -> (u64, u64) {
        let Some((address, len)) = self.buffer(arguments) else {
            return (INVALID_PARAM, 0);
        };
        let bytes = self.line.take(len);
        match self.memory.memory().write_slice(&bytes, address) {
            Ok(()) => (SUCCESS, bytes.len() as u64),
            Err(_) => (INVALID_PARAM, 0),
        }
    }
}

fn word(data: &[u8; RUN_UNION_SIZE], index: usize) -> u64 {
    let bytes = data.get(index * 8..index * 8 + 8);
    let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
    u64::from_ne_bytes(bytes.unwrap_or_default())
}

fn set_word(data: &mut [u8; RUN_UNION_SIZE], index: usize, value: u64) {
    if let Some(bytes) = data.get_mut(index * 8..index * 8 + 8) {
        bytes.copy_from_slice(&value.to_ne_bytes());
    }
}

/// What a CSR that KVM does not emulate reads as.
fn csr(number: u64) -> u64 {
    let mut entropy = [0; 2];
    match number {
        // Without entropy: BIST, for which a guest tries again.
        SEED if random::fill(&mut entropy).is_err() => 0,
        SEED => SEED_ES16 | u64::from(u16::from_ne_bytes(entropy)),
        _ => 0,
    }
}

impl ExitHandler for Sbi {
    fn handle(&self, vcpu: u32, exit: ArchExit<'_>) -> Action {
        match exit.reason {
            EXIT_SBI => {
                let argument = |index| word(exit.data, ARGUMENTS + index);
                let arguments = [argument(0), argument(1), argument(2)];
                let (extension, function) = (word(exit.data, EXTENSION), word(exit.data, FUNCTION));
                let (error, value) = self.call(extension, function, arguments);
                set_word(exit.data, ERROR, error);
                set_word(exit.data, VALUE, value);
                Action::Continue
            }
            EXIT_CSR => {
                let value = csr(word(exit.data, CSR_NUMBER));
                set_word(exit.data, CSR_VALUE, value);
                Action::Continue
            }
            _ => NoArchExits.handle(vcpu, exit),
        }
    }
}

#[cfg(test)]
#[path = "sbi_tests.rs"]
mod tests;
