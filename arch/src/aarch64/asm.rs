//! Instruction words for the payload (Arm Architecture Reference Manual for
//! A-profile, DDI 0487, chapter C6 and C7).

/// A general-purpose register, 0 to 30.
pub type Reg = u32;

/// A system register: op0, op1, CRn, CRm, op2.
#[derive(Clone, Copy)]
pub struct System(pub u32, pub u32, pub u32, pub u32, pub u32);

impl System {
    /// As MRS and MSR encode it.
    fn bits(self) -> u32 {
        (self.0 & 1) << 19 | self.1 << 16 | self.2 << 12 | self.3 << 8 | self.4 << 5
    }
}

/// DAIF's I bit, as MSR (immediate) takes it.
const DAIF_I: u32 = 1 << 1;

/// Code under construction. Branches go by words from the branch itself.
#[derive(Default)]
pub struct Code(Vec<u32>);

impl Code {
    /// The code as bytes: instructions are little-endian whatever the data is.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// How many words there are so far.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Appends other code, which must not branch out of itself.
    pub fn append(&mut self, other: Code) {
        self.0.extend(other.0);
    }

    fn word(&mut self, word: u32) -> &mut Self {
        self.0.push(word);
        self
    }

    /// MOVZ and as many MOVK as it takes: `d` = `value`.
    pub fn mov(&mut self, d: Reg, value: u64) -> &mut Self {
        self.word(0xd280_0000 | (value as u32 & 0xffff) << 5 | d);
        for part in 1..4 {
            let half = (value >> (16 * part)) as u32 & 0xffff;
            if half != 0 {
                self.word(0xf280_0000 | part << 21 | half << 5 | d);
            }
        }
        self
    }

    /// ADD (immediate), 64-bit.
    pub fn add(&mut self, d: Reg, n: Reg, immediate: u32) -> &mut Self {
        self.word(0x9100_0000 | (immediate & 0xfff) << 10 | n << 5 | d)
    }

    /// ORR (shifted register), 64-bit.
    pub fn orr(&mut self, d: Reg, n: Reg, m: Reg) -> &mut Self {
        self.word(0xaa00_0000 | m << 16 | n << 5 | d)
    }

    /// UBFX, 64-bit: `width` bits of `n` from bit `low`.
    pub fn ubfx(&mut self, d: Reg, n: Reg, low: u32, width: u32) -> &mut Self {
        self.word(0xd340_0000 | low << 16 | (low + width - 1) << 10 | n << 5 | d)
    }

    /// CMP (shifted register), 64-bit.
    pub fn cmp(&mut self, n: Reg, m: Reg) -> &mut Self {
        self.word(0xeb00_001f | m << 16 | n << 5)
    }

    /// B.EQ.
    pub fn b_eq(&mut self, words: i32) -> &mut Self {
        self.word(0x5400_0000 | (words as u32 & 0x7_ffff) << 5)
    }

    /// B.
    pub fn b(&mut self, words: i32) -> &mut Self {
        self.word(0x1400_0000 | words as u32 & 0x3ff_ffff)
    }

    /// CBZ, 64-bit.
    pub fn cbz(&mut self, t: Reg, words: i32) -> &mut Self {
        self.word(0xb400_0000 | (words as u32 & 0x7_ffff) << 5 | t)
    }

    /// CBNZ, 64-bit.
    pub fn cbnz(&mut self, t: Reg, words: i32) -> &mut Self {
        self.word(0xb500_0000 | (words as u32 & 0x7_ffff) << 5 | t)
    }

    /// LDR (immediate), 32-bit, at byte `offset`, a multiple of 4.
    pub fn ldr32(&mut self, t: Reg, n: Reg, offset: u32) -> &mut Self {
        self.word(0xb940_0000 | ((offset / 4) & 0xfff) << 10 | n << 5 | t)
    }

    /// STR (immediate), 32-bit, at byte `offset`, a multiple of 4.
    pub fn str32(&mut self, t: Reg, n: Reg, offset: u32) -> &mut Self {
        self.word(0xb900_0000 | ((offset / 4) & 0xfff) << 10 | n << 5 | t)
    }

    /// LDR (immediate), 64-bit, without an offset.
    pub fn ldr(&mut self, t: Reg, n: Reg) -> &mut Self {
        self.word(0xf940_0000 | n << 5 | t)
    }

    /// STR (immediate), 64-bit, without an offset.
    pub fn str(&mut self, t: Reg, n: Reg) -> &mut Self {
        self.word(0xf900_0000 | n << 5 | t)
    }

    /// LDXR, 64-bit.
    pub fn ldxr(&mut self, t: Reg, n: Reg) -> &mut Self {
        self.word(0xc85f_7c00 | n << 5 | t)
    }

    /// STXR, 64-bit; `s` is 0 when it stored.
    pub fn stxr(&mut self, s: Reg, t: Reg, n: Reg) -> &mut Self {
        self.word(0xc800_7c00 | s << 16 | n << 5 | t)
    }

    /// LDADD, 64-bit (FEAT_LSE): adds `s` to what `n` points to.
    pub fn ldadd(&mut self, s: Reg, t: Reg, n: Reg) -> &mut Self {
        self.word(0xf820_0000 | s << 16 | n << 5 | t)
    }

    /// FMOV from a general-purpose register to a double.
    pub fn fmov_to(&mut self, d: Reg, n: Reg) -> &mut Self {
        self.word(0x9e67_0000 | n << 5 | d)
    }

    /// FMOV from a double to a general-purpose register.
    pub fn fmov_from(&mut self, d: Reg, n: Reg) -> &mut Self {
        self.word(0x9e66_0000 | n << 5 | d)
    }

    /// FADD (scalar), double.
    pub fn fadd(&mut self, d: Reg, n: Reg, m: Reg) -> &mut Self {
        self.word(0x1e60_2800 | m << 16 | n << 5 | d)
    }

    /// DUP (general), 2 of 64 bits.
    pub fn dup(&mut self, d: Reg, n: Reg) -> &mut Self {
        self.word(0x4e08_0c00 | n << 5 | d)
    }

    /// ADD (vector), 2 of 64 bits.
    pub fn add_vector(&mut self, d: Reg, n: Reg, m: Reg) -> &mut Self {
        self.word(0x4ee0_8400 | m << 16 | n << 5 | d)
    }

    /// UMOV of the upper 64 bits.
    pub fn umov_upper(&mut self, d: Reg, n: Reg) -> &mut Self {
        self.word(0x4e18_3c00 | n << 5 | d)
    }

    /// MRS.
    pub fn mrs(&mut self, t: Reg, register: System) -> &mut Self {
        self.word(0xd530_0000 | register.bits() | t)
    }

    /// MSR (register).
    pub fn msr(&mut self, register: System, t: Reg) -> &mut Self {
        self.word(0xd510_0000 | register.bits() | t)
    }

    /// MSR DAIFSet: masks interrupts.
    pub fn mask_irq(&mut self) -> &mut Self {
        self.word(0xd503_40df | DAIF_I << 8)
    }

    /// MSR DAIFClr: unmasks interrupts.
    pub fn unmask_irq(&mut self) -> &mut Self {
        self.word(0xd503_40ff | DAIF_I << 8)
    }

    /// ISB.
    pub fn isb(&mut self) -> &mut Self {
        self.word(0xd503_3fdf)
    }

    /// DSB SY.
    pub fn dsb(&mut self) -> &mut Self {
        self.word(0xd503_3f9f)
    }

    /// TLBI VMALLE1.
    pub fn tlbi(&mut self) -> &mut Self {
        self.word(0xd508_871f)
    }

    /// WFI.
    pub fn wfi(&mut self) -> &mut Self {
        self.word(0xd503_207f)
    }

    /// ERET.
    pub fn eret(&mut self) -> &mut Self {
        self.word(0xd69f_03e0)
    }

    /// HVC #0.
    pub fn hvc(&mut self) -> &mut Self {
        self.word(0xd400_0002)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(write: impl Fn(&mut Code)) -> Vec<u32> {
        let mut code = Code::default();
        write(&mut code);
        code.0
    }

    /// Words as GNU as 2.44 assembles the instructions in the comments.
    #[test]
    fn encodes_as_the_assembler_does() {
        let got = words(|code| {
            code.mov(0, 0x8400_0008) // mov x0, #8; movk x0, #0x8400, lsl #16
                .mov(21, 0xffff_0000_0000_0000) // mov x21, #0; movk x21, #0xffff, lsl #48
                .add(10, 10, 4)
                .orr(3, 3, 4)
                .ubfx(5, 6, 20, 4)
                .cmp(1, 2)
                .b_eq(5)
                .b_eq(-2)
                .b(-1)
                .cbz(7, 3)
                .cbnz(7, -3)
                .ldr32(25, 26, 12)
                .str32(25, 26, 16)
                .ldr(1, 2)
                .str(1, 2)
                .ldxr(1, 2)
                .stxr(3, 1, 2)
                .ldadd(4, 5, 6)
                .fmov_to(1, 2)
                .fmov_from(1, 2)
                .fadd(0, 1, 2)
                .dup(1, 2)
                .add_vector(0, 1, 2)
                .umov_upper(3, 0)
                .mrs(0, System(3, 0, 5, 2, 0)) // mrs x0, esr_el1
                .msr(System(3, 3, 14, 3, 1), 1) // msr cntv_ctl_el0, x1
                .mask_irq()
                .unmask_irq()
                .isb()
                .dsb()
                .tlbi()
                .wfi()
                .eret()
                .hvc();
        });
        let want = ASSEMBLED;
        assert_eq!(got.len(), want.len());
        for (position, (got, want)) in got.iter().zip(want).enumerate() {
            assert_eq!(got, want, "word {position}: {got:#010x}, not {want:#010x}");
        }
    }

    const ASSEMBLED: &[u32] = &[
        0xd280_0100,
        0xf2b0_8000,
        0xd280_0015,
        0xf2ff_fff5,
        0x9100_114a,
        0xaa04_0063,
        0xd354_5cc5,
        0xeb02_003f,
        0x5400_00a0,
        0x54ff_ffc0,
        0x17ff_ffff,
        0xb400_0067,
        0xb5ff_ffa7,
        0xb940_0f59,
        0xb900_1359,
        0xf940_0041,
        0xf900_0041,
        0xc85f_7c41,
        0xc803_7c41,
        0xf824_00c5,
        0x9e67_0041,
        0x9e66_0041,
        0x1e62_2820,
        0x4e08_0c41,
        0x4ee2_8420,
        0x4e18_3c03,
        0xd538_5200,
        0xd51b_e321,
        0xd503_42df,
        0xd503_42ff,
        0xd503_3fdf,
        0xd503_3f9f,
        0xd508_871f,
        0xd503_207f,
        0xd69f_03e0,
        0xd400_0002,
    ];
}
