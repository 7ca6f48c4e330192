//! KVM's numbers for registers (KVM API, section 4.68, KVM_SET_ONE_REG).

// KVM_REG_RISCV | KVM_REG_SIZE_U64.
const U64: u64 = 0x8030_0000_0000_0000;
const CONFIG: u64 = U64 | 0x0100_0000;
const CORE: u64 = U64 | 0x0200_0000;
const CSR: u64 = U64 | 0x0300_0000;
const TIMER: u64 = U64 | 0x0400_0000;
const ISA_EXTENSION: u64 = U64 | 0x0700_0000;
const SBI_EXTENSION: u64 = U64 | 0x0800_0000;

/// `struct kvm_riscv_core`: what the ABI calls the registers, by position.
const CORE_NAMES: [&str; 33] = [
    "pc", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4", "a5",
    "a6", "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5",
    "t6", "mode",
];

/// `struct kvm_riscv_csr`.
const CSR_NAMES: [&str; 10] = [
    "sstatus",
    "sie",
    "stvec",
    "sscratch",
    "sepc",
    "scause",
    "stval",
    "sip",
    "satp",
    "scounteren",
];

/// `struct kvm_riscv_config`: the size of the block of cbo.clean and its like.
pub const ZICBOM_BLOCK_SIZE: u64 = CONFIG | 1;
/// mvendorid.
pub const MVENDORID: u64 = CONFIG | 2;
/// marchid.
pub const MARCHID: u64 = CONFIG | 3;
/// mimpid.
pub const MIMPID: u64 = CONFIG | 4;
/// The size of the block of cbo.zero.
pub const ZICBOZ_BLOCK_SIZE: u64 = CONFIG | 5;
/// The largest mode of satp.
pub const SATP_MODE: u64 = CONFIG | 6;
/// `struct kvm_riscv_timer`: ticks per second.
pub const TIMER_FREQUENCY: u64 = TIMER;
/// KVM_RISCV_SBI_EXT_DBCN: whether the debug console is there.
pub const SBI_DBCN: u64 = SBI_EXTENSION | 9;

/// Whether the vCPU has the extension with KVM's number `number`.
pub const fn isa_extension(number: u64) -> u64 {
    ISA_EXTENSION | number
}

/// The number of the register called `name`: `pc`, `a0` and so on as the ABI
/// calls them, `mode` (1 is supervisor, 0 user), and the supervisor's CSRs.
pub fn id(name: &str) -> Option<u64> {
    let position = |names: &[&str]| names.iter().position(|other| *other == name);
    position(&CORE_NAMES)
        .map(|index| CORE | index as u64)
        .or_else(|| position(&CSR_NAMES).map(|index| CSR | index as u64))
}

/// A vCPU's registers as text, as `read` finds them.
pub fn dump(read: impl Fn(u64) -> Option<u64>) -> String {
    let names = CORE_NAMES.iter().chain(&CSR_NAMES);
    let mut text = String::new();
    for (position, name) in names.enumerate() {
        if position > 0 {
            text.push(if position % 4 == 0 { '\n' } else { ' ' });
        }
        match id(name).and_then(&read) {
            Some(value) => text.push_str(&format!("{name}={value:016x}")),
            None => text.push_str(&format!("{name}=?")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_kvms() {
        // From the table in the KVM API's section 4.68.
        assert_eq!(id("pc"), Some(0x8030_0000_0200_0000));
        assert_eq!(id("ra"), Some(0x8030_0000_0200_0001));
        assert_eq!(id("a0"), Some(0x8030_0000_0200_000a));
        assert_eq!(id("a1"), Some(0x8030_0000_0200_000b));
        assert_eq!(id("t6"), Some(0x8030_0000_0200_001f));
        assert_eq!(id("mode"), Some(0x8030_0000_0200_0020));
        assert_eq!(id("sstatus"), Some(0x8030_0000_0300_0000));
        assert_eq!(id("satp"), Some(0x8030_0000_0300_0008));
        assert_eq!(TIMER_FREQUENCY, 0x8030_0000_0400_0000);
        assert_eq!(isa_extension(14), 0x8030_0000_0700_000e);
    }

    #[test]
    fn unknown_names_have_no_number() {
        for name in ["", "x10", "a8", "PC", "s12"] {
            assert_eq!(id(name), None, "{name}");
        }
    }

    #[test]
    fn dumps_what_can_be_read() {
        let text = dump(|register| (Some(register) != id("sip")).then_some(register));
        assert!(text.starts_with("pc=8030000002000000 ra="), "{text}");
        assert!(text.contains("sip=?"), "{text}");
        assert!(text.contains('\n'), "{text}");
    }
}
