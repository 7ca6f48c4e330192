//! A vCPU's registers in `struct kvm_sync_regs` (Linux
//! `arch/s390/include/uapi/asm/kvm.h`) and as data.

use crossvisor_vmm::arch::RegisterState;
use crossvisor_vmm::exit::SYNC_REGS_SIZE;

/// Offsets in the structure.
pub mod offset {
    /// Prefix.
    pub const PREFIX: usize = 0;
    /// General registers.
    pub const GPRS: usize = 8;
    /// Access registers, 32 bits each.
    pub const ACRS: usize = 136;
    /// Control registers.
    pub const CRS: usize = 200;
    /// TOD programmable register.
    pub const TODPR: usize = 328;
    /// CPU timer.
    pub const CPU_TIMER: usize = 336;
    /// Clock comparator.
    pub const CLOCK_COMPARATOR: usize = 344;
    /// Program parameter.
    pub const PROGRAM_PARAMETER: usize = 352;
    /// Breaking-event address.
    pub const BREAKING_EVENT: usize = 360;
    /// Floating-point registers, or vector registers of 16 bytes each, of whose
    /// first sixteen they are the left halves.
    pub const VECTORS: usize = 392;
    /// Floating-point control register, 32 bits.
    pub const FPC: usize = 1416;
}

/// General registers by name.
pub const GENERAL: [&str; 16] = [
    "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// Access registers by name.
pub const ACCESS: [&str; 16] = [
    "a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8", "a9", "a10", "a11", "a12", "a13", "a14",
    "a15",
];
/// Control registers by name.
pub const CONTROL: [&str; 16] = [
    "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9", "c10", "c11", "c12", "c13", "c14",
    "c15",
];
/// Floating-point registers by name: the left halves of vector registers 0 to
/// 15.
pub const FLOATING: [&str; 16] = [
    "f0", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9", "f10", "f11", "f12", "f13", "f14",
    "f15",
];
/// The right halves of vector registers by name.
pub const VECTOR_RIGHT: [&str; 32] = [
    "v0_right",
    "v1_right",
    "v2_right",
    "v3_right",
    "v4_right",
    "v5_right",
    "v6_right",
    "v7_right",
    "v8_right",
    "v9_right",
    "v10_right",
    "v11_right",
    "v12_right",
    "v13_right",
    "v14_right",
    "v15_right",
    "v16_right",
    "v17_right",
    "v18_right",
    "v19_right",
    "v20_right",
    "v21_right",
    "v22_right",
    "v23_right",
    "v24_right",
    "v25_right",
    "v26_right",
    "v27_right",
    "v28_right",
    "v29_right",
    "v30_right",
    "v31_right",
];
/// The left halves of vector registers 16 to 31 by name.
pub const VECTOR_LEFT: [&str; 16] = [
    "v16_left", "v17_left", "v18_left", "v19_left", "v20_left", "v21_left", "v22_left", "v23_left",
    "v24_left", "v25_left", "v26_left", "v27_left", "v28_left", "v29_left", "v30_left", "v31_left",
];
/// PSW, its first doubleword.
pub const PSW_MASK: &str = "psw_mask";
/// PSW, the instruction address.
pub const PSW_ADDRESS: &str = "psw_addr";
/// Prefix register.
pub const PREFIX: &str = "prefix";
/// TOD programmable register.
pub const TODPR: &str = "todpr";
/// CPU timer.
pub const CPU_TIMER: &str = "cputm";
/// Clock comparator.
pub const CLOCK_COMPARATOR: &str = "ckc";
/// Program parameter.
pub const PROGRAM_PARAMETER: &str = "pp";
/// Breaking-event address.
pub const BREAKING_EVENT: &str = "gbea";
/// Floating-point control.
pub const FPC: &str = "fpc";
/// Name and version of the control program, as DIAGNOSE 0x318 was told them.
pub const CONTROL_PROGRAM: &str = "diag318";

/// No register: whether what was pending for the CPU is gone since it stopped,
/// as its reset has it.
pub const RESET: &str = "reset";

/// Where a register is kept: offset and size in bytes. None for the PSW, which
/// is elsewhere, and for names that are no register's.
pub fn place(name: &str, vector: bool) -> Option<(usize, usize)> {
    let within = |names: &[&str], base: usize, step: usize, size: usize| {
        let number = names.iter().position(|other| *other == name)?;
        Some((base + number * step, size))
    };
    match name {
        PREFIX => return Some((offset::PREFIX, 8)),
        TODPR => return Some((offset::TODPR, 8)),
        CPU_TIMER => return Some((offset::CPU_TIMER, 8)),
        CLOCK_COMPARATOR => return Some((offset::CLOCK_COMPARATOR, 8)),
        PROGRAM_PARAMETER => return Some((offset::PROGRAM_PARAMETER, 8)),
        BREAKING_EVENT => return Some((offset::BREAKING_EVENT, 8)),
        FPC => return Some((offset::FPC, 4)),
        _ => {}
    }
    let vectors = offset::VECTORS;
    within(&GENERAL, offset::GPRS, 8, 8)
        .or_else(|| within(&ACCESS, offset::ACRS, 4, 4))
        .or_else(|| within(&CONTROL, offset::CRS, 8, 8))
        .or_else(|| within(&FLOATING, vectors, if vector { 16 } else { 8 }, 8))
        .or_else(|| within(&VECTOR_RIGHT, vectors + 8, 16, 8).filter(|_| vector))
        .or_else(|| within(&VECTOR_LEFT, vectors + 256, 16, 8).filter(|_| vector))
}

/// The value at a place; values are in the host's byte order.
pub fn get(sync: &[u8; SYNC_REGS_SIZE], (offset, size): (usize, usize)) -> u64 {
    let bytes = sync.get(offset..).unwrap_or_default();
    match size {
        4 => bytes
            .first_chunk()
            .map_or(0, |bytes| u32::from_ne_bytes(*bytes).into()),
        _ => bytes
            .first_chunk()
            .map_or(0, |bytes| u64::from_ne_bytes(*bytes)),
    }
}

/// Sets the value at a place.
pub fn set(sync: &mut [u8; SYNC_REGS_SIZE], (offset, size): (usize, usize), value: u64) {
    let (word, doubleword) = ((value as u32).to_ne_bytes(), value.to_ne_bytes());
    let bytes: &[u8] = if size == 4 { &word } else { &doubleword };
    if let Some(place) = sync.get_mut(offset..offset + size) {
        place.copy_from_slice(bytes);
    }
}

/// Every register of a vCPU that has stopped.
pub fn save(psw: [u64; 2], sync: &[u8; SYNC_REGS_SIZE], vector: bool) -> RegisterState {
    let mut names = vec![
        PREFIX,
        TODPR,
        CPU_TIMER,
        CLOCK_COMPARATOR,
        PROGRAM_PARAMETER,
        BREAKING_EVENT,
        FPC,
    ];
    for group in [&GENERAL, &ACCESS, &CONTROL, &FLOATING] {
        names.extend(group);
    }
    if vector {
        names.extend(VECTOR_RIGHT);
        names.extend(VECTOR_LEFT);
    }
    let [mask, address] = psw;
    let mut registers = vec![(PSW_MASK, mask), (PSW_ADDRESS, address)];
    let value = |name| Some((name, get(sync, place(name, vector)?)));
    registers.extend(names.into_iter().filter_map(value));
    RegisterState(registers)
}

/// Whether the state has every register: it was saved, not made for a CPU that
/// is reset.
pub fn is_whole(state: &RegisterState) -> bool {
    state.get(FPC).is_some()
}

/// Sets `name` in a state.
pub fn assign(state: &mut RegisterState, name: &'static str, value: u64) {
    match state.0.iter_mut().find(|(other, _)| *other == name) {
        Some((_, old)) => *old = value,
        None => state.0.push((name, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_vcpu_s_registers_are_saved_and_come_back() {
        for vector in [false, true] {
            let mut sync = [0; SYNC_REGS_SIZE];
            for (at, byte) in sync.iter_mut().enumerate() {
                *byte = (at % 251) as u8;
            }
            let saved = save([1, 2], &sync, vector);
            let mut back = [0; SYNC_REGS_SIZE];
            for (name, value) in &saved.0 {
                match place(name, vector) {
                    Some(at) => set(&mut back, at, *value),
                    None => assert!(name.starts_with("psw")),
                }
            }
            assert_eq!(back[..368], sync[..368]);
            let size = if vector { 512 } else { 128 };
            assert_eq!(back[392..392 + size], sync[392..392 + size]);
            assert_eq!(back[1416..1420], sync[1416..1420]);
            assert_eq!(
                (saved.get("psw_mask"), saved.get("psw_addr")),
                (Some(1), Some(2))
            );
        }
        assert!(is_whole(&save([0; 2], &[0; SYNC_REGS_SIZE], false)));
        let mut reset = RegisterState::default();
        assign(&mut reset, PREFIX, 0x2000);
        assert!(!is_whole(&reset));
        assert_eq!(place("r16", true), None);
        assert_eq!(place("v3_right", false), None);
    }
}
