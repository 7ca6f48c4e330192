//! A bare-metal payload that uses what unmodified kernels use: FP and SIMD, the
//! MMU, atomics, an exception, an interrupt of the virtual timer.
//!
//! It runs at EL1 on a machine as this architecture plans it, with either GIC.
//! When something is not as it must be, it powers off by PSCI instead of going
//! on.

use crossvisor_vmm::arch::{RegisterState, SelfTest};

use super::asm::{Code, Reg, System};
use super::layout;

/// Where the payload reports: a free page below RAM.
const REPORT: u64 = 0x0b00_0000;

// The payload's RAM.
const CODE: u64 = layout::RAM_BASE;
const VECTORS: u64 = CODE + 0x2000;
const TABLE: u64 = CODE + 0x3000;
const SCRATCH: u64 = CODE + 0x4000;
const RAM_SIZE: u64 = 2 << 20;

const STEPS: &[&str] = &[
    "floating point and SIMD",
    "address translation",
    "atomic operations",
    "a data abort",
    "an interrupt of the virtual timer",
];

// The translation table has one level: a block of 1 GiB for each entry.
const GIB: u64 = 1 << 30;
/// Where the payload sees its RAM a second time.
const ALIAS: u64 = 3 * GIB;
/// Where nothing is mapped.
const NOWHERE: u64 = 2 * GIB;

const CPACR_EL1: System = System(3, 0, 1, 0, 2);
const SCTLR_EL1: System = System(3, 0, 1, 0, 0);
const TTBR0_EL1: System = System(3, 0, 2, 0, 0);
const TCR_EL1: System = System(3, 0, 2, 0, 2);
const MAIR_EL1: System = System(3, 0, 10, 2, 0);
const VBAR_EL1: System = System(3, 0, 12, 0, 0);
const ESR_EL1: System = System(3, 0, 5, 2, 0);
const FAR_EL1: System = System(3, 0, 6, 0, 0);
const ELR_EL1: System = System(3, 0, 4, 0, 1);
const ID_AA64ISAR0_EL1: System = System(3, 0, 0, 6, 0);
const CNTV_TVAL_EL0: System = System(3, 3, 14, 3, 0);
const CNTV_CTL_EL0: System = System(3, 3, 14, 3, 1);
const ICC_PMR_EL1: System = System(3, 0, 4, 6, 0);
const ICC_IAR1_EL1: System = System(3, 0, 12, 12, 0);
const ICC_EOIR1_EL1: System = System(3, 0, 12, 12, 1);
const ICC_SRE_EL1: System = System(3, 0, 12, 12, 5);
const ICC_IGRPEN1_EL1: System = System(3, 0, 12, 12, 7);

// ESR_EL1.EC.
const EC_UNKNOWN: u64 = 0;
const EC_DATA_ABORT: u64 = 0x25;
/// A class that no exception has.
const EC_NONE: u64 = 0x40;

/// INTID of the virtual timer: private interrupt 11.
const TIMER_INTID: u64 = 27;
/// Ticks until the timer interrupts: a fraction of a millisecond.
const TIMER_TICKS: u64 = 5000;

// Registers with a fixed use; x0 to x9 are free.
const STEP: Reg = 19;
const REPORT_TO: Reg = 20;
/// Exception class that the handler is to expect, and the one that it saw.
const EXPECTED: Reg = 21;
const SEEN: Reg = 22;
const FAULT: Reg = 23;
/// Whether the GIC is a v3.
const V3: Reg = 24;
/// The interrupt that the handler saw; 0 before.
const INTERRUPT: Reg = 25;
const GIC_CPU: Reg = 26;

/// The payload.
pub fn self_test() -> SelfTest {
    SelfTest {
        ram_size: RAM_SIZE,
        ram_base: layout::RAM_BASE,
        image: vec![
            (CODE, main().bytes()),
            (VECTORS, vectors()),
            (TABLE, table()),
        ],
        registers: RegisterState(vec![("pc", CODE), ("pstate", super::load::PSTATE)]),
        report: REPORT,
        steps: STEPS,
    }
}

fn main() -> Code {
    let mut code = Code::default();
    code.mov(STEP, 0)
        .mov(REPORT_TO, REPORT)
        .mov(EXPECTED, EC_NONE)
        .mov(0, VECTORS)
        .msr(VBAR_EL1, 0)
        .isb();
    floating_point(&mut code);
    done(&mut code);
    translation(&mut code);
    done(&mut code);
    atomics(&mut code);
    done(&mut code);
    data_abort(&mut code);
    done(&mut code);
    timer(&mut code);
    done(&mut code);
    power_off(&mut code);
    code
}

/// Reports one step more.
fn done(code: &mut Code) {
    code.add(STEP, STEP, 1).str32(STEP, REPORT_TO, 0);
}

/// PSCI's SYSTEM_OFF.
fn power_off(code: &mut Code) {
    code.mov(0, 0x8400_0008).hvc().b(0);
}

/// Goes on if `a` and `b` are equal. Changes no register then.
fn require_equal(code: &mut Code, a: Reg, b: Reg) {
    let mut off = Code::default();
    power_off(&mut off);
    code.cmp(a, b).b_eq(1 + off.len() as i32);
    code.append(off);
}

fn floating_point(code: &mut Code) {
    // FPEN: no traps.
    code.mov(0, 3 << 20).msr(CPACR_EL1, 0).isb();
    code.mov(0, 1.5f64.to_bits())
        .fmov_to(1, 0)
        .mov(0, 2.25f64.to_bits())
        .fmov_to(2, 0)
        .fadd(3, 1, 2)
        .fmov_from(0, 3)
        .mov(1, 3.75f64.to_bits());
    require_equal(code, 0, 1);
    code.mov(0, 1 << 40)
        .dup(1, 0)
        .mov(0, 5)
        .dup(2, 0)
        .add_vector(3, 1, 2)
        .umov_upper(0, 3)
        .mov(1, 5 | 1 << 40);
    require_equal(code, 0, 1);
}

/// Turns the MMU on and reads through one address what another wrote.
fn translation(code: &mut Code) {
    // Attribute 0 is device memory (nGnRnE), attribute 1 write-back memory.
    code.mov(0, 0xff00).msr(MAIR_EL1, 0);
    // T0SZ: 39 bits of addresses, so that the table is of level 1; write-back,
    // inner shareable walks; 4K granule; EPD1: no walks by TTBR1_EL1.
    let tcr = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23;
    code.mov(0, tcr).msr(TCR_EL1, 0);
    code.mov(0, TABLE).msr(TTBR0_EL1, 0);
    code.dsb().tlbi().dsb().isb();
    // M, C and I.
    code.mrs(0, SCTLR_EL1)
        .mov(1, 1 | 1 << 2 | 1 << 12)
        .orr(0, 0, 1)
        .msr(SCTLR_EL1, 0)
        .isb();
    code.mov(0, SCRATCH)
        .mov(1, 0x0123_4567_89ab_cdef)
        .str(1, 0)
        .mov(0, SCRATCH - layout::RAM_BASE + ALIAS)
        .ldr(2, 0);
    require_equal(code, 1, 2);
}

/// Adds to a counter by exclusives, and by LSE where the CPU has it.
fn atomics(code: &mut Code) {
    code.mov(0, SCRATCH).mov(1, 40).str(1, 0);
    code.ldxr(2, 0).add(2, 2, 1).stxr(3, 2, 0).cbnz(3, -3);
    code.ldr(2, 0).mov(1, 41);
    require_equal(code, 1, 2);
    let mut lse = Code::default();
    lse.mov(1, 1).ldadd(1, 2, 0).ldr(2, 0).mov(1, 42);
    require_equal(&mut lse, 1, 2);
    // ID_AA64ISAR0_EL1.Atomic
    code.mrs(4, ID_AA64ISAR0_EL1)
        .ubfx(4, 4, 20, 4)
        .cbz(4, 1 + lse.len() as i32);
    code.append(lse);
}

fn data_abort(code: &mut Code) {
    code.mov(EXPECTED, EC_DATA_ABORT)
        .mov(SEEN, EC_NONE)
        .mov(0, NOWHERE + 0x128)
        .ldr(1, 0);
    require_equal(code, SEEN, EXPECTED);
    require_equal(code, FAULT, 0);
    code.mov(EXPECTED, EC_NONE);
}

fn timer(code: &mut Code) {
    // Only a GICv3 has its CPU interface in system registers: on a GICv2,
    // ICC_SRE_EL1 is undefined or stays 0.
    code.mov(EXPECTED, EC_UNKNOWN)
        .mov(0, 1)
        .msr(ICC_SRE_EL1, 0)
        .isb()
        .mov(V3, 0)
        .mrs(V3, ICC_SRE_EL1)
        .ubfx(V3, V3, 0, 1)
        .mov(EXPECTED, EC_NONE);

    let mut v3 = Code::default();
    // GICD_CTLR: affinity routing, group 1.
    v3.mov(0, layout::GIC_DISTRIBUTOR.base)
        .mov(1, 1 << 4 | 1 << 1)
        .str32(1, 0, 0);
    // GICR_IGROUPR0 and GICR_ISENABLER0, in the redistributor's second frame.
    v3.mov(0, layout::REDISTRIBUTORS + 0x1_0000)
        .mov(1, 1 << TIMER_INTID)
        .str32(1, 0, 0x80)
        .str32(1, 0, 0x100);
    v3.mov(1, 0xf0)
        .msr(ICC_PMR_EL1, 1)
        .mov(1, 1)
        .msr(ICC_IGRPEN1_EL1, 1)
        .isb();

    let mut v2 = Code::default();
    // GICD_CTLR and GICD_ISENABLER0.
    v2.mov(0, layout::GIC_DISTRIBUTOR.base)
        .mov(1, 1)
        .str32(1, 0, 0)
        .mov(1, 1 << TIMER_INTID)
        .str32(1, 0, 0x100);
    // GICC_PMR and GICC_CTLR.
    v2.mov(GIC_CPU, layout::GICV2_CPU_INTERFACE.base)
        .mov(1, 0xf0)
        .str32(1, GIC_CPU, 4)
        .mov(1, 1)
        .str32(1, GIC_CPU, 0);

    v3.b(1 + v2.len() as i32);
    code.cbz(V3, 1 + v3.len() as i32);
    code.append(v3);
    code.append(v2);
    code.dsb().isb();

    // CNTV_CTL_EL0.ENABLE.
    code.mov(INTERRUPT, 0)
        .mov(0, TIMER_TICKS)
        .msr(CNTV_TVAL_EL0, 0)
        .mov(0, 1)
        .msr(CNTV_CTL_EL0, 0)
        .isb();
    // A masked interrupt ends the wait, too, so none is missed.
    code.mask_irq()
        .cbnz(INTERRUPT, 5)
        .wfi()
        .unmask_irq()
        .isb()
        .b(-5);
    code.mov(0, TIMER_INTID);
    require_equal(code, INTERRUPT, 0);
}

/// The vector table: what the payload expects, and a power-off for the rest.
fn vectors() -> Vec<u8> {
    let handlers: Vec<Code> = (0..16)
        .map(|vector| match vector {
            // From the current EL with its own stack pointer.
            4 => synchronous(),
            5 => interrupt(),
            _ => {
                let mut code = Code::default();
                power_off(&mut code);
                code
            }
        })
        .collect();
    let mut table = Vec::new();
    for handler in handlers {
        let mut bytes = handler.bytes();
        bytes.resize(0x80, 0);
        table.extend(bytes);
    }
    table
}

/// Notes an expected exception and skips the instruction.
fn synchronous() -> Code {
    let mut code = Code::default();
    code.mrs(SEEN, ESR_EL1).ubfx(SEEN, SEEN, 26, 6);
    require_equal(&mut code, SEEN, EXPECTED);
    code.mrs(FAULT, FAR_EL1)
        .mrs(9, ELR_EL1)
        .add(9, 9, 4)
        .msr(ELR_EL1, 9)
        .eret();
    code
}

/// Turns the timer off and acknowledges.
fn interrupt() -> Code {
    let mut code = Code::default();
    code.mov(9, 0).msr(CNTV_CTL_EL0, 9).isb();
    let mut v3 = Code::default();
    v3.mrs(INTERRUPT, ICC_IAR1_EL1)
        .msr(ICC_EOIR1_EL1, INTERRUPT);
    let mut v2 = Code::default();
    // GICC_IAR and GICC_EOIR.
    v2.ldr32(INTERRUPT, GIC_CPU, 0xc)
        .str32(INTERRUPT, GIC_CPU, 0x10);
    v3.b(1 + v2.len() as i32);
    code.cbz(V3, 1 + v3.len() as i32);
    code.append(v3);
    code.append(v2);
    code.eret();
    code
}

/// The translation table: devices below 1 GiB, RAM at its place and once more.
fn table() -> Vec<u8> {
    // Block descriptors: access flag, attribute index; execute-never (PXN, UXN)
    // for devices; inner shareable for RAM.
    let block = 1 | 1 << 10;
    let device = block | 3 << 53;
    let normal = block | 1 << 2 | 3 << 8;
    let mut entries = [0u64; 512];
    entries[0] = device;
    entries[1] = layout::RAM_BASE | normal;
    entries[(ALIAS / GIB) as usize] = layout::RAM_BASE | normal;
    entries
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
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
        assert!(SCRATCH + 8 <= test.ram_base + test.ram_size);
        assert!(!(test.ram_base..test.ram_base + test.ram_size).contains(&test.report));
    }

    #[test]
    fn hardware_finds_its_tables_aligned() {
        // VBAR_EL1 ignores 11 bits, TTBR0_EL1 12.
        assert_eq!(VECTORS % 0x800, 0);
        assert_eq!(TABLE % 0x1000, 0);
        assert_eq!(vectors().len(), 0x800);
        assert_eq!(table().len(), 0x1000);
    }

    #[test]
    fn handlers_fit_their_vectors() {
        assert!(synchronous().bytes().len() <= 0x80);
        assert!(interrupt().bytes().len() <= 0x80);
    }

    #[test]
    fn reports_as_often_as_it_has_steps() {
        let mut report = Code::default();
        report.str32(STEP, REPORT_TO, 0);
        let store = report.bytes();
        let code = main().bytes();
        let stores = code.chunks(4).filter(|word| *word == store).count();
        assert_eq!(stores, STEPS.len());
    }
}
