//! A bare-metal payload that uses what unmodified kernels use: floating point,
//! the MMU, atomics, an exception, an interrupt of the timer.
//!
//! It runs in supervisor mode on a machine as this architecture plans it. When
//! something is not as it must be, it powers off by the SBI instead of going on.

use crossvisor_vmm::arch::SelfTest;

use super::asm::{A0, A1, A6, A7, Code, Reg, T0, T1, T2, ZERO};
use super::{layout, load};

/// Where the payload reports: a free page below RAM.
const REPORT: u64 = 0x1100_0000;

// The payload's RAM.
const CODE: u64 = layout::RAM_BASE;
const HANDLER: u64 = CODE + 0x2000;
const TABLE: u64 = CODE + 0x3000;
const SCRATCH: u64 = CODE + 0x4000;
const RAM_SIZE: u64 = 2 << 20;

const STEPS: &[&str] = &[
    "floating point",
    "address translation",
    "atomic operations",
    "a page fault",
    "an interrupt of the timer",
];

// The translation table is Sv39's top level: a page of 1 GiB for each entry.
const GIB: u64 = 1 << 30;
/// Where the payload sees its RAM a second time.
const ALIAS: u64 = 4 * GIB;
/// Where nothing is mapped.
const NOWHERE: u64 = 3 * GIB;

// CSRs.
const SSTATUS: u32 = 0x100;
const SIE: u32 = 0x104;
const STVEC: u32 = 0x105;
const SEPC: u32 = 0x141;
const SCAUSE: u32 = 0x142;
const STVAL: u32 = 0x143;
const SATP: u32 = 0x180;
const TIME: u32 = 0xc01;

/// sstatus: interrupts enabled.
const SSTATUS_SIE: u64 = 1 << 1;
/// sstatus.FS: initial.
const SSTATUS_FS: u64 = 1 << 13;
/// sie: the timer's.
const SIE_TIMER: u64 = 1 << 5;

// scause.
const LOAD_PAGE_FAULT: u64 = 13;
const TIMER_INTERRUPT: u64 = 1 << 63 | 5;
/// A cause that no exception has.
const NO_CAUSE: u64 = 63;

/// Ticks until the timer interrupts: a fraction of a millisecond.
const TIMER_TICKS: u64 = 5000;
/// Ticks until it is set anew: some milliseconds.
const TIMER_PATIENCE: u64 = 200_000;

// SBI extensions: timer and system reset.
const SBI_TIME: u64 = 0x5449_4d45;
const SBI_SRST: u64 = 0x5352_5354;

// Registers with a fixed use; t0 to t2 and a0 to a7 are free.
const STEP: Reg = 18;
const REPORT_TO: Reg = 19;
/// Cause that the handler is to expect, and the one that it saw.
const EXPECTED: Reg = 20;
const SEEN: Reg = 21;
const FAULT: Reg = 22;
/// The interrupt that the handler saw; 0 before.
const INTERRUPT: Reg = 23;
/// The handler's own.
const OWN: Reg = 28;

/// The payload.
pub fn self_test() -> SelfTest {
    SelfTest {
        ram_size: RAM_SIZE,
        ram_base: layout::RAM_BASE,
        image: vec![
            (CODE, main().bytes()),
            (HANDLER, handler().bytes()),
            (TABLE, table()),
        ],
        registers: load::entry(CODE, 0),
        report: REPORT,
        steps: STEPS,
    }
}

fn main() -> Code {
    let mut code = Code::default();
    code.li(STEP, 0)
        .li(REPORT_TO, REPORT)
        .li(EXPECTED, NO_CAUSE)
        .li(T0, HANDLER)
        .csrw(STVEC, T0);
    floating_point(&mut code);
    done(&mut code);
    translation(&mut code);
    done(&mut code);
    atomics(&mut code);
    done(&mut code);
    page_fault(&mut code);
    done(&mut code);
    timer(&mut code);
    done(&mut code);
    power_off(&mut code);
    code
}

/// Reports one step more.
fn done(code: &mut Code) {
    code.addi(STEP, STEP, 1).sw(STEP, REPORT_TO);
}

/// SBI's system_reset, shutdown.
fn power_off(code: &mut Code) {
    code.li(A7, SBI_SRST)
        .li(A6, 0)
        .li(A0, 0)
        .li(A1, 0)
        .ecall()
        .j(0);
}

/// Goes on if `a` and `b` are equal. Changes no register then.
fn require_equal(code: &mut Code, a: Reg, b: Reg) {
    let mut off = Code::default();
    power_off(&mut off);
    code.beq(a, b, 1 + off.len() as i32);
    code.append(off);
}

fn floating_point(code: &mut Code) {
    code.li(T0, SSTATUS_FS).csrs(SSTATUS, T0);
    code.li(T0, 1.5f64.to_bits())
        .fmv_to(1, T0)
        .li(T0, 2.25f64.to_bits())
        .fmv_to(2, T0)
        .fadd(3, 1, 2)
        .fmv_from(T0, 3)
        .li(T1, 3.75f64.to_bits());
    require_equal(code, T0, T1);
}

/// Turns translation on and reads through one address what another wrote.
fn translation(code: &mut Code) {
    // Sv39.
    code.li(T0, 8 << 60 | TABLE >> 12)
        .csrw(SATP, T0)
        .sfence_vma();
    code.li(T0, SCRATCH)
        .li(T1, 0x0123_4567_89ab_cdef)
        .sd(T1, T0)
        .li(T0, SCRATCH - layout::RAM_BASE + ALIAS)
        .ld(T2, T0);
    require_equal(code, T1, T2);
}

/// Adds to a counter by a reservation, and by one instruction.
fn atomics(code: &mut Code) {
    code.li(T0, SCRATCH).li(T1, 40).sd(T1, T0);
    code.lr(T1, T0)
        .addi(T1, T1, 1)
        .sc(T2, T1, T0)
        .bne(T2, ZERO, -3);
    code.li(T1, 1).amoadd(T2, T1, T0);
    code.li(T1, 41);
    require_equal(code, T1, T2);
    code.ld(T2, T0).li(T1, 42);
    require_equal(code, T1, T2);
}

fn page_fault(code: &mut Code) {
    code.li(EXPECTED, LOAD_PAGE_FAULT)
        .li(SEEN, NO_CAUSE)
        .li(T0, NOWHERE + 0x128)
        .ld(T1, T0);
    require_equal(code, SEEN, EXPECTED);
    require_equal(code, FAULT, T0);
    code.li(EXPECTED, NO_CAUSE);
}

/// Sets the timer and spins until it interrupts. Sets it anew when nothing
/// comes: where KVM has Sstc, it loses what the SBI sets if the vCPU's thread is
/// scheduled out before it enters the guest again
/// (kvm_riscv_vcpu_update_vstimecmp of arch/riscv/kvm/vcpu_timer.c writes the
/// CSR, which kvm_riscv_vcpu_timer_save takes for saved). Kernels set it by
/// themselves there.
fn timer(code: &mut Code) {
    code.li(INTERRUPT, 0).li(T0, SIE_TIMER).csrs(SIE, T0);
    code.li(T0, SSTATUS_SIE).csrs(SSTATUS, T0);
    let mut set = Code::default();
    set.csrr(A0, TIME)
        .li(T0, TIMER_TICKS)
        .add(A0, A0, T0)
        .li(A7, SBI_TIME)
        .li(A6, 0)
        .ecall();
    set.csrr(T1, TIME).li(T0, TIMER_PATIENCE).add(T1, T1, T0);
    let len = set.len() as i32;
    code.append(set);
    code.bne(INTERRUPT, ZERO, 4)
        .csrr(T0, TIME)
        .blt(T0, T1, -2)
        .j(-3 - len);
    code.li(T0, TIMER_INTERRUPT);
    require_equal(code, INTERRUPT, T0);
}

/// Notes an expected exception and skips the instruction; turns the timer off.
fn handler() -> Code {
    let mut interrupt = Code::default();
    interrupt
        .csrr(INTERRUPT, SCAUSE)
        .li(OWN, SIE_TIMER)
        .csrc(SIE, OWN)
        .sret();
    let mut exception = Code::default();
    exception.csrr(SEEN, SCAUSE);
    require_equal(&mut exception, SEEN, EXPECTED);
    exception
        .csrr(FAULT, STVAL)
        .csrr(OWN, SEPC)
        .addi(OWN, OWN, 4)
        .csrw(SEPC, OWN)
        .sret();
    let mut code = Code::default();
    // The sign bit of scause says that it is an interrupt.
    code.csrr(OWN, SCAUSE)
        .blt(OWN, ZERO, 1 + exception.len() as i32);
    code.append(exception);
    code.append(interrupt);
    code
}

/// The translation table: devices below 1 GiB, RAM at its place and once more.
fn table() -> Vec<u8> {
    // V, R, W, X, A and D.
    let page = |address: u64| address >> 12 << 10 | 0b1100_1111;
    let mut entries = [0u64; 512];
    entries[0] = page(0);
    entries[(layout::RAM_BASE / GIB) as usize] = page(layout::RAM_BASE);
    entries[(ALIAS / GIB) as usize] = page(layout::RAM_BASE);
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
        // stvec's two lowest bits are its mode.
        assert_eq!(HANDLER % 4, 0);
        assert_eq!(TABLE % 0x1000, 0);
        assert_eq!(table().len(), 0x1000);
    }

    #[test]
    fn reports_as_often_as_it_has_steps() {
        let mut report = Code::default();
        report.sw(STEP, REPORT_TO);
        let store = report.bytes();
        let code = main().bytes();
        let stores = code.chunks(4).filter(|word| *word == store).count();
        assert_eq!(stores, STEPS.len());
    }
}
