//! A bare-metal payload that uses what unmodified kernels use: vector
//! registers, atomics, a hypercall, an interrupt of the decrementer.
//!
//! It runs little-endian and without translation. When something is not as it
//! must be, it makes a hypercall that nobody answers instead of going on.

use crossvisor_vmm::arch::{RegisterState, SelfTest};

use super::load;
use super::rtas::H_RTAS;

/// Where the payload reports: beyond its RAM.
const REPORT: u64 = 0x100_0000;

// The payload's RAM.
const VECTOR: u64 = 0x900;
const CODE: u64 = 0x1000;
const SCRATCH: u64 = 0x2000;
const RAM_SIZE: u64 = 2 << 20;

const STEPS: &[&str] = &[
    "loads and stores",
    "vector registers",
    "atomic operations",
    "a hypercall",
    "an interrupt of the decrementer",
];

/// MSR: vector, floating point and vector-scalar registers; little-endian.
const MSR: u64 = load::MSR | 1 << 25 | 1 << 13 | 1 << 23 | 1;

/// H_PROD, which KVM handles.
const H_PROD: u32 = 0xe4;
/// Ticks until the decrementer interrupts: a few microseconds.
const TICKS: u32 = 2000;

type Reg = u32;

// Registers with a fixed use.
const STEP: Reg = 20;
const REPORT_TO: Reg = 21;
const MEMORY: Reg = 22;
/// Set by the interrupt.
const SEEN: Reg = 23;

/// Instructions (Power ISA 3.0, Book I).
#[derive(Default)]
struct Code(Vec<u32>);

impl Code {
    fn word(&mut self, word: u32) -> &mut Self {
        self.0.push(word);
        self
    }

    /// li and ori: a number of 31 bits at most.
    fn set(&mut self, to: Reg, value: u32) -> &mut Self {
        self.word(0x3c00_0000 | to << 21 | value >> 16)
            .word(0x6000_0000 | to << 21 | to << 16 | value & 0xffff)
    }

    /// addi.
    fn add(&mut self, to: Reg, from: Reg, value: u32) -> &mut Self {
        self.word(0x3800_0000 | to << 21 | from << 16 | value & 0xffff)
    }

    /// stw, without an offset.
    fn store32(&mut self, from: Reg, at: Reg) -> &mut Self {
        self.word(0x9000_0000 | from << 21 | at << 16)
    }

    /// std, without an offset.
    fn store(&mut self, from: Reg, at: Reg) -> &mut Self {
        self.word(0xf800_0000 | from << 21 | at << 16)
    }

    /// ld, without an offset.
    fn load(&mut self, to: Reg, at: Reg) -> &mut Self {
        self.word(0xe800_0000 | to << 21 | at << 16)
    }

    /// ldarx.
    fn load_reserve(&mut self, to: Reg, at: Reg) -> &mut Self {
        self.word(0x7c00_00a8 | to << 21 | at << 11)
    }

    /// stdcx.
    fn store_conditional(&mut self, from: Reg, at: Reg) -> &mut Self {
        self.word(0x7c00_01ad | from << 21 | at << 11)
    }

    /// mtvsrd to a vector register.
    fn move_to_vector(&mut self, vector: u32, from: Reg) -> &mut Self {
        self.word(0x7c00_0167 | vector << 21 | from << 16)
    }

    /// mfvsrd from a vector register.
    fn move_from_vector(&mut self, to: Reg, vector: u32) -> &mut Self {
        self.word(0x7c00_0067 | vector << 21 | to << 16)
    }

    /// vaddudm.
    fn add_vectors(&mut self, to: u32, a: u32, b: u32) -> &mut Self {
        self.word(0x1000_00c0 | to << 21 | a << 16 | b << 11)
    }

    /// cmpldi, 64-bit.
    fn compare(&mut self, reg: Reg, value: u32) -> &mut Self {
        self.word(0x2820_0000 | reg << 16 | value & 0xffff)
    }

    /// beq, by so many instructions.
    fn branch_equal(&mut self, words: i32) -> &mut Self {
        self.word(0x4182_0000 | (words * 4) as u32 & 0xfffc)
    }

    /// bne, by so many instructions.
    fn branch_unequal(&mut self, words: i32) -> &mut Self {
        self.word(0x4082_0000 | (words * 4) as u32 & 0xfffc)
    }

    /// sc 1 with a number in r3.
    fn hypercall(&mut self, number: u32) -> &mut Self {
        self.set(3, number).word(0x4400_0022)
    }

    /// Gives up unless the last comparison found equality.
    fn require_equal(&mut self) -> &mut Self {
        self.branch_equal(5).hypercall(H_RTAS).word(0x4800_0000)
    }

    /// One step more is done.
    fn report(&mut self) -> &mut Self {
        self.add(STEP, STEP, 1).store32(STEP, REPORT_TO)
    }

    fn little_endian(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn big_endian(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_be_bytes()).collect()
    }
}

/// The payload.
pub fn self_test() -> SelfTest {
    SelfTest {
        ram_size: RAM_SIZE,
        ram_base: 0,
        // Interrupts are taken big-endian until H_SET_MODE says otherwise.
        image: vec![
            (VECTOR, interrupt().big_endian()),
            (CODE, main().little_endian()),
        ],
        registers: RegisterState(vec![("pc", CODE), ("msr", MSR)]),
        report: REPORT,
        steps: STEPS,
    }
}

fn main() -> Code {
    let mut code = Code::default();
    code.set(STEP, 0)
        .set(REPORT_TO, REPORT as u32)
        .set(MEMORY, SCRATCH as u32);

    code.set(4, 0x1234)
        .store(4, MEMORY)
        .load(5, MEMORY)
        .compare(5, 0x1234)
        .require_equal()
        .report();

    code.move_to_vector(31, 4)
        .add_vectors(20, 31, 31)
        .move_from_vector(5, 20)
        .compare(5, 0x2468)
        .require_equal()
        .report();

    // Until the store succeeds.
    code.load_reserve(5, MEMORY)
        .add(5, 5, 1)
        .store_conditional(5, MEMORY)
        .branch_unequal(-3)
        .load(5, MEMORY)
        .compare(5, 0x1235)
        .require_equal()
        .report();

    // Prods itself.
    code.set(4, 0)
        .hypercall(H_PROD)
        .compare(3, 0)
        .require_equal()
        .report();

    code.set(SEEN, 0)
        .set(5, TICKS)
        // mtdec r5; mfmsr r5; with EE; mtmsrd r5,1.
        .word(0x7cb6_03a6)
        .word(0x7ca0_00a6)
        .word(0x60a5_8000)
        .word(0x7ca1_0164)
        .compare(SEEN, 1)
        .branch_unequal(-1)
        .report();
    // b .
    code.word(0x4800_0000);
    code
}

/// The decrementer's interrupt: puts it off, and returns with interrupts
/// disabled.
fn interrupt() -> Code {
    let mut code = Code::default();
    code.set(SEEN, 1)
        .set(6, 0x7fff_ffff)
        // mtdec r6; mfsrr1 r6; without EE (rldicl r6,r6,48,1; rotldi r6,r6,16);
        // mtsrr1 r6; rfid.
        .word(0x7cd6_03a6)
        .word(0x7cdb_02a6)
        .word(0x78c6_8042)
        .word(0x78c6_8000)
        .word(0x7cdb_03a6)
        .word(0x4c00_0024);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_in_its_ram_and_apart() {
        let test = self_test();
        let mut end = test.ram_base;
        for (address, bytes) in &test.image {
            assert!(*address >= end, "{address:#x} is below {end:#x}");
            end = address + bytes.len() as u64;
        }
        assert!(end <= SCRATCH);
        assert!(!(0..test.ram_size).contains(&test.report));
        // The vector after the decrementer's is the hypervisor's.
        assert!(interrupt().big_endian().len() <= 0x80);
    }

    #[test]
    fn reports_as_often_as_it_has_steps() {
        let mut report = Code::default();
        report.store32(STEP, REPORT_TO);
        let stores = main().0.iter().filter(|word| **word == report.0[0]).count();
        assert_eq!(stores, STEPS.len());
    }

    #[test]
    fn instructions_are_encoded_as_an_assembler_does() {
        let mut code = Code::default();
        // lis r3,0x1234; ori r3,r3,0x5678; std r4,0(r22); ldarx r5,0,r22;
        // stdcx. r5,0,r22; mtvsrd vs63,r4; vaddudm v20,v31,v31; cmpldi r5,2.
        code.set(3, 0x1234_5678)
            .store(4, 22)
            .load_reserve(5, 22)
            .store_conditional(5, 22)
            .move_to_vector(31, 4)
            .add_vectors(20, 31, 31)
            .compare(5, 2)
            .branch_unequal(-1);
        let expected = [
            0x3c60_1234,
            0x6063_5678,
            0xf896_0000,
            0x7ca0_b0a8,
            0x7ca0_b1ad,
            0x7fe4_0167,
            0x129f_f8c0,
            0x2825_0002,
            0x4082_fffc,
        ];
        assert_eq!(code.0, expected);
    }
}
