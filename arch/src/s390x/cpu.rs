//! A vCPU that has left the guest, as the machine's handlers see it: registers,
//! the PSW, operands and memory.

use crossvisor_devices::GuestMem;
use crossvisor_vmm::exit::{AccessError, ArchExit};

use super::interrupt::program;
use super::registers::{self, offset};

/// PSW: problem state.
const PSW_PROBLEM: u64 = 0x0001_0000_0000_0000;
/// PSW: condition code.
const PSW_CC_SHIFT: u32 = 44;
/// PSW: 64-bit and 31-bit addressing.
const PSW_EXTENDED: u64 = 0x0000_0001_0000_0000;
const PSW_BASIC: u64 = 0x0000_0000_8000_0000;

/// Why an instruction ends otherwise than with a condition code.
#[derive(Debug)]
pub enum Stop {
    /// By a program interruption, still to be made pending.
    Program(u16),
    /// By one that is pending already.
    Injected,
    /// KVM failed.
    Failed(String),
}

/// What an instruction comes to.
pub type Result<T> = std::result::Result<T, Stop>;

impl From<AccessError> for Stop {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Injected => Stop::Injected,
            AccessError::Failed(error) => Stop::Failed(format!("reaching guest memory: {error}")),
        }
    }
}

/// A vCPU between exit and entry.
pub struct Cpu<'a> {
    /// Its address, which is its index.
    pub address: u32,
    /// The exit.
    pub exit: ArchExit<'a>,
    /// Guest memory by absolute addresses.
    pub memory: &'a GuestMem,
}

/// The absolute address of a real one: the first 8 KiB and those at the prefix
/// change places.
pub fn absolute(real: u64, prefix: u64) -> u64 {
    match real & !0x1fff {
        0 => real + prefix,
        page if page == prefix => real - prefix,
        _ => real,
    }
}

impl Cpu<'_> {
    /// General register `number`.
    pub fn general(&self, number: u8) -> u64 {
        let at = offset::GPRS + usize::from(number & 15) * 8;
        registers::get(self.exit.sync_regs, (at, 8))
    }

    /// Sets general register `number`.
    pub fn set_general(&mut self, number: u8, value: u64) {
        let at = offset::GPRS + usize::from(number & 15) * 8;
        registers::set(self.exit.sync_regs, (at, 8), value);
    }

    /// Sets the right half of general register `number`.
    pub fn set_general_word(&mut self, number: u8, value: u32) {
        let left = self.general(number) & !0xffff_ffff;
        self.set_general(number, left | u64::from(value));
    }

    /// The PSW's first doubleword.
    pub fn psw_mask(&self) -> u64 {
        self.exit.psw[0]
    }

    /// The PSW's instruction address.
    pub fn psw_address(&self) -> u64 {
        self.exit.psw[1]
    }

    /// Sets the condition code.
    pub fn set_condition(&mut self, code: u8) {
        let [mask, _] = &mut *self.exit.psw;
        *mask = *mask & !(3 << PSW_CC_SHIFT) | u64::from(code & 3) << PSW_CC_SHIFT;
    }

    /// Refuses the problem state.
    pub fn require_supervisor(&self) -> Result<()> {
        match self.psw_mask() & PSW_PROBLEM {
            0 => Ok(()),
            _ => Err(Stop::Program(program::PRIVILEGED_OPERATION)),
        }
    }

    /// A base register's content, or 0 for register 0, and a displacement: an
    /// operand's address, as wide as the addressing mode has it.
    pub fn operand(&self, base: u8, displacement: u32) -> u64 {
        let base = match base {
            0 => 0,
            number => self.general(number),
        };
        self.wrap(base.wrapping_add(displacement.into()))
    }

    /// An address as wide as the addressing mode has it.
    pub fn wrap(&self, address: u64) -> u64 {
        match self.psw_mask() {
            mask if mask & PSW_EXTENDED != 0 => address,
            mask if mask & PSW_BASIC != 0 => address & 0x7fff_ffff,
            _ => address & 0x00ff_ffff,
        }
    }

    /// The prefix register.
    pub fn prefix(&self) -> u64 {
        registers::get(self.exit.sync_regs, (offset::PREFIX, 8)) & 0x7fff_e000
    }

    /// The absolute address of a real one.
    pub fn absolute(&self, real: u64) -> u64 {
        absolute(real, self.prefix())
    }

    /// Reads at a logical address, which is a real one while DAT is off.
    ///
    /// # Errors
    /// A program interruption that is pending already.
    pub fn read(&self, address: u64, space: u8, data: &mut [u8]) -> Result<()> {
        Ok(self.exit.logical.read(address, space, data)?)
    }

    /// Writes at a logical address.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn write(&self, address: u64, space: u8, data: &[u8]) -> Result<()> {
        Ok(self.exit.logical.write(address, space, data)?)
    }
}

/// A PSW of 64 bits, as an initial program load has it, as one of 128.
pub fn short_psw(psw: u64) -> [u64; 2] {
    // The bit that marks the short format does not exist in the long one.
    let mask = psw & 0xffff_ffff_8000_0000 & !0x0008_0000_0000_0000;
    [mask, psw & 0x7fff_ffff]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_psw_becomes_a_long_one() {
        assert_eq!(
            short_psw(0x0008_0000_8001_0000),
            [0x0000_0000_8000_0000, 0x1_0000]
        );
        assert_eq!(
            short_psw(0x000a_0000_0000_0fff),
            [0x0002_0000_0000_0000, 0xfff]
        );
    }
}
