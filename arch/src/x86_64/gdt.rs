//! The segments that a vCPU starts with (Intel SDM volume 3, section 3.4.5).

/// 64-bit code, the Linux boot protocol's `__BOOT_CS`.
pub const CODE_64: u16 = 0x10;
/// Flat data, the Linux boot protocol's `__BOOT_DS`.
pub const DATA: u16 = 0x18;
/// Flat 32-bit code.
pub const CODE_32: u16 = 0x20;
/// A busy 32-bit task state segment: VMX wants a task register.
pub const TASK: u16 = 0x28;

/// The global descriptor table.
pub const GDT: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x0000_8b00_0000_0067,
];

/// The limit of [`GDT`] in GDTR.
pub const LIMIT: u16 = (GDT.len() * 8 - 1) as u16;

/// A segment register with its hidden part, as virtualization hardware has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, whatever the granularity.
    pub limit: u32,
    /// Type, 4 bits.
    pub kind: u8,
    /// S: code or data rather than system.
    pub code_or_data: bool,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// P.
    pub present: bool,
    /// AVL.
    pub available: bool,
    /// L: 64-bit code.
    pub long: bool,
    /// D/B: 32-bit operands.
    pub default_32: bool,
    /// G: the limit counts pages.
    pub granularity: bool,
}

/// The bytes of the table as they are in memory.
pub fn bytes() -> Vec<u8> {
    GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// The segment that loading `selector` from [`GDT`] gives; an unusable one when
/// the table has none there.
pub fn segment(selector: u16) -> Segment {
    let Some(&descriptor) = GDT.get(usize::from(selector >> 3)) else {
        return Segment::default();
    };
    let field = |shift: u32, bits: u32| descriptor >> shift & ((1 << bits) - 1);
    let flag = |shift: u32| field(shift, 1) != 0;
    let limit = (field(48, 4) << 16 | field(0, 16)) as u32;
    let granularity = flag(55);
    Segment {
        selector,
        base: field(56, 8) << 24 | field(16, 24),
        limit: match granularity {
            true => limit << 12 | 0xfff,
            false => limit,
        },
        kind: field(40, 4) as u8,
        code_or_data: flag(44),
        dpl: field(45, 2) as u8,
        present: flag(47),
        available: flag(52),
        long: flag(53),
        default_32: flag(54),
        granularity,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_flat_segments() {
        let code = segment(CODE_64);
        assert!(code.long && !code.default_32 && code.present && code.code_or_data);
        assert_eq!((code.base, code.limit, code.kind), (0, u32::MAX, 0xb));
        let data = segment(DATA);
        assert!(!data.long && data.default_32);
        assert_eq!((data.base, data.limit, data.kind), (0, u32::MAX, 0x3));
        let code = segment(CODE_32);
        assert!(!code.long && code.default_32);
        assert_eq!((code.base, code.limit, code.kind), (0, u32::MAX, 0xb));
    }

    #[test]
    fn decodes_the_task_register() {
        let task = segment(TASK);
        assert!(task.present && !task.code_or_data && !task.granularity);
        assert_eq!((task.base, task.limit, task.kind), (0, 0x67, 0xb));
    }

    #[test]
    fn what_is_not_there_is_not_present() {
        assert!(!segment(0).present);
        assert!(!segment(0x30).present);
        assert!(!segment(u16::MAX).present);
    }
}
