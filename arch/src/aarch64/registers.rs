//! KVM's numbers for registers (KVM API, section 4.68, KVM_SET_ONE_REG), and
//! what is read from them.

// KVM_REG_ARM64 | KVM_REG_SIZE_U64.
const U64: u64 = 0x6030_0000_0000_0000;
// Core registers: the offset in struct kvm_regs in units of 32 bits.
const CORE: u64 = U64 | 0x10_0000;
// Offsets in bytes: struct user_pt_regs is first, with x0 to x30.
const SP: u64 = 31 * 8;
const PC: u64 = 32 * 8;
const PSTATE: u64 = 33 * 8;
const SP_EL1: u64 = 34 * 8;
const ELR_EL1: u64 = 35 * 8;
const SPSR_EL1: u64 = 36 * 8;
// System registers: op0, op1, CRn, CRm, op2.
const SYSREG: u64 = U64 | 0x13_0000;
// Pseudo-registers of KVM's firmware services.
const FIRMWARE: u64 = U64 | 0x14_0000;

const fn system(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    SYSREG | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

const fn core(offset: u64) -> u64 {
    CORE | (offset / 4)
}

/// KVM_REG_ARM_PSCI_VERSION.
pub const PSCI_VERSION: u64 = FIRMWARE;
/// ID_AA64MMFR0_EL1.
pub const ID_AA64MMFR0_EL1: u64 = system(3, 0, 0, 7, 0);
const SCTLR_EL1: u64 = system(3, 0, 1, 0, 0);
const TTBR0_EL1: u64 = system(3, 0, 2, 0, 0);
const TTBR1_EL1: u64 = system(3, 0, 2, 0, 1);
const ESR_EL1: u64 = system(3, 0, 5, 2, 0);
const FAR_EL1: u64 = system(3, 0, 6, 0, 0);
const VBAR_EL1: u64 = system(3, 0, 12, 0, 0);

/// The number of the register called `name`: `x0` to `x30`, `sp` (of EL0),
/// `sp_el1`, `pc`, `pstate`.
pub fn id(name: &str) -> Option<u64> {
    Some(match name {
        "sp" => core(SP),
        "pc" => core(PC),
        "pstate" => core(PSTATE),
        "sp_el1" => core(SP_EL1),
        _ => {
            let number: u64 = name.strip_prefix('x')?.parse().ok()?;
            (number <= 30).then(|| core(number * 8))?
        }
    })
}

/// A vCPU's registers as text, as `read` finds them.
pub fn dump(read: impl Fn(u64) -> Option<u64>) -> String {
    let named = [
        ("pc", core(PC)),
        ("pstate", core(PSTATE)),
        ("lr", core(30 * 8)),
        ("sp_el0", core(SP)),
        ("sp_el1", core(SP_EL1)),
        ("elr_el1", core(ELR_EL1)),
        ("spsr_el1", core(SPSR_EL1)),
        ("esr_el1", ESR_EL1),
        ("far_el1", FAR_EL1),
        ("vbar_el1", VBAR_EL1),
        ("sctlr_el1", SCTLR_EL1),
        ("ttbr0_el1", TTBR0_EL1),
        ("ttbr1_el1", TTBR1_EL1),
    ];
    let general = (0..30).map(|number| (format!("x{number}"), core(number * 8)));
    let all = named.map(|(name, id)| (name.to_owned(), id));
    let mut text = String::new();
    for (position, (name, id)) in all.into_iter().chain(general).enumerate() {
        if position > 0 {
            text.push(if position % 4 == 0 { '\n' } else { ' ' });
        }
        match read(id) {
            Some(value) => text.push_str(&format!("{name}={value:016x}")),
            None => text.push_str(&format!("{name}=?")),
        }
    }
    text
}

// ID_AA64MMFR0_EL1's fields of translation granules (Arm Architecture Reference
// Manual, D24.2); they do not agree on what says that it is missing.

/// Whether pages of 4 KiB are there.
pub fn has_granule_4k(mmfr0: u64) -> bool {
    mmfr0 >> 28 & 0xf != 0xf
}

/// Whether pages of 16 KiB are there.
pub fn has_granule_16k(mmfr0: u64) -> bool {
    mmfr0 >> 20 & 0xf != 0
}

/// Whether pages of 64 KiB are there.
pub fn has_granule_64k(mmfr0: u64) -> bool {
    mmfr0 >> 24 & 0xf != 0xf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_kvms() {
        // From the table in the KVM API's section 4.68.
        assert_eq!(id("x0"), Some(0x6030_0000_0010_0000));
        assert_eq!(id("x1"), Some(0x6030_0000_0010_0002));
        assert_eq!(id("x30"), Some(0x6030_0000_0010_003c));
        assert_eq!(id("sp"), Some(0x6030_0000_0010_003e));
        assert_eq!(id("pc"), Some(0x6030_0000_0010_0040));
        assert_eq!(id("pstate"), Some(0x6030_0000_0010_0042));
        assert_eq!(id("sp_el1"), Some(0x6030_0000_0010_0044));
        assert_eq!(core(ELR_EL1), 0x6030_0000_0010_0046);
        assert_eq!(core(SPSR_EL1), 0x6030_0000_0010_0048);
        assert_eq!(ID_AA64MMFR0_EL1, 0x6030_0000_0013_c038);
        assert_eq!(PSCI_VERSION, 0x6030_0000_0014_0000);
    }

    #[test]
    fn unknown_names_have_no_number() {
        for name in ["x31", "x-1", "x", "", "w0", "pcs", "x99999999999999999999"] {
            assert_eq!(id(name), None, "{name}");
        }
    }

    #[test]
    fn dumps_what_can_be_read() {
        let text = dump(|id| (id != ESR_EL1).then_some(id));
        assert!(text.starts_with("pc=6030000000100040 pstate="), "{text}");
        assert!(text.contains("esr_el1=?"), "{text}");
        assert!(text.contains("\n"), "{text}");
        assert!(text.contains("x29=603000000010003a"), "{text}");
    }

    #[test]
    fn granules_of_known_cores() {
        // Cortex-A72: 4K and 64K.
        let a72 = 0x0000_1124;
        assert!(has_granule_4k(a72) && has_granule_64k(a72) && !has_granule_16k(a72));
        // TGran4 and TGran64 of 0xf, TGran16 of 1: 16K alone.
        let only_16k = 0xff10_0000;
        assert!(!has_granule_4k(only_16k) && !has_granule_64k(only_16k));
        assert!(has_granule_16k(only_16k));
    }
}
