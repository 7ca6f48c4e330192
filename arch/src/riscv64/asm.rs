//! Instruction words for the payload (The RISC-V Instruction Set Manual, volume
//! I, chapter "RV32/64G Instruction Set Listings", and volume II).

/// A general-purpose register, 0 to 31.
pub type Reg = u32;

// Registers by the ABI's names.
pub const ZERO: Reg = 0;
pub const T0: Reg = 5;
pub const T1: Reg = 6;
pub const T2: Reg = 7;
pub const A0: Reg = 10;
pub const A1: Reg = 11;
pub const A6: Reg = 16;
pub const A7: Reg = 17;

/// Code under construction. Branches go by words from the branch itself.
#[derive(Default)]
pub struct Code(Vec<u32>);

impl Code {
    /// The code as bytes: instructions are little-endian.
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

    fn i_type(&mut self, opcode: u32, funct3: u32, d: Reg, s: Reg, immediate: i32) -> &mut Self {
        let immediate = (immediate as u32) << 20;
        self.word(immediate | s << 15 | funct3 << 12 | d << 7 | opcode)
    }

    fn r_type(&mut self, base: u32, d: Reg, s1: Reg, s2: Reg) -> &mut Self {
        self.word(base | s2 << 20 | s1 << 15 | d << 7)
    }

    /// Loads a constant, 11 bits at a time.
    pub fn li(&mut self, d: Reg, value: u64) -> &mut Self {
        let pieces = (0..6)
            .rev()
            .map(|piece| (value >> (11 * piece)) as i32 & 0x7ff);
        let mut pieces = pieces.skip_while(|piece| *piece == 0);
        self.addi(d, ZERO, pieces.next().unwrap_or(0));
        for piece in pieces {
            self.slli(d, d, 11).ori(d, d, piece);
        }
        self
    }

    /// ADDI.
    pub fn addi(&mut self, d: Reg, s: Reg, immediate: i32) -> &mut Self {
        self.i_type(0x13, 0, d, s, immediate)
    }

    /// ORI.
    pub fn ori(&mut self, d: Reg, s: Reg, immediate: i32) -> &mut Self {
        self.i_type(0x13, 6, d, s, immediate)
    }

    /// SLLI.
    pub fn slli(&mut self, d: Reg, s: Reg, by: u32) -> &mut Self {
        self.i_type(0x13, 1, d, s, (by & 63) as i32)
    }

    /// ADD.
    pub fn add(&mut self, d: Reg, s1: Reg, s2: Reg) -> &mut Self {
        self.r_type(0x33, d, s1, s2)
    }

    fn branch(&mut self, funct3: u32, a: Reg, b: Reg, words: i32) -> &mut Self {
        let offset = (words * 4) as u32;
        let immediate = (offset >> 12 & 1) << 31
            | (offset >> 5 & 0x3f) << 25
            | (offset >> 1 & 0xf) << 8
            | (offset >> 11 & 1) << 7;
        self.word(immediate | b << 20 | a << 15 | funct3 << 12 | 0x63)
    }

    /// BEQ.
    pub fn beq(&mut self, a: Reg, b: Reg, words: i32) -> &mut Self {
        self.branch(0, a, b, words)
    }

    /// BNE.
    pub fn bne(&mut self, a: Reg, b: Reg, words: i32) -> &mut Self {
        self.branch(1, a, b, words)
    }

    /// BLT, signed.
    pub fn blt(&mut self, a: Reg, b: Reg, words: i32) -> &mut Self {
        self.branch(4, a, b, words)
    }

    /// JAL without a link.
    pub fn j(&mut self, words: i32) -> &mut Self {
        let offset = (words * 4) as u32;
        self.word(
            (offset >> 20 & 1) << 31
                | (offset >> 1 & 0x3ff) << 21
                | (offset >> 11 & 1) << 20
                | (offset >> 12 & 0xff) << 12
                | 0x6f,
        )
    }

    /// LD without an offset.
    pub fn ld(&mut self, d: Reg, at: Reg) -> &mut Self {
        self.i_type(0x03, 3, d, at, 0)
    }

    /// SW without an offset.
    pub fn sw(&mut self, s: Reg, at: Reg) -> &mut Self {
        self.word(s << 20 | at << 15 | 2 << 12 | 0x23)
    }

    /// SD without an offset.
    pub fn sd(&mut self, s: Reg, at: Reg) -> &mut Self {
        self.word(s << 20 | at << 15 | 3 << 12 | 0x23)
    }

    /// LR.D.
    pub fn lr(&mut self, d: Reg, at: Reg) -> &mut Self {
        self.r_type(0x1000_302f, d, at, 0)
    }

    /// SC.D; `d` is 0 when it stored.
    pub fn sc(&mut self, d: Reg, s: Reg, at: Reg) -> &mut Self {
        self.r_type(0x1800_302f, d, at, s)
    }

    /// AMOADD.D: adds `s` to what `at` points to.
    pub fn amoadd(&mut self, d: Reg, s: Reg, at: Reg) -> &mut Self {
        self.r_type(0x0000_302f, d, at, s)
    }

    /// FMV.D.X.
    pub fn fmv_to(&mut self, d: Reg, s: Reg) -> &mut Self {
        self.r_type(0xf200_0053, d, s, 0)
    }

    /// FMV.X.D.
    pub fn fmv_from(&mut self, d: Reg, s: Reg) -> &mut Self {
        self.r_type(0xe200_0053, d, s, 0)
    }

    /// FADD.D, with the dynamic rounding mode.
    pub fn fadd(&mut self, d: Reg, s1: Reg, s2: Reg) -> &mut Self {
        self.r_type(0x0200_7053, d, s1, s2)
    }

    /// CSRRW without a destination.
    pub fn csrw(&mut self, csr: u32, s: Reg) -> &mut Self {
        self.word(csr << 20 | s << 15 | 1 << 12 | 0x73)
    }

    /// CSRRS without a source.
    pub fn csrr(&mut self, d: Reg, csr: u32) -> &mut Self {
        self.word(csr << 20 | 2 << 12 | d << 7 | 0x73)
    }

    /// CSRRS without a destination: sets bits.
    pub fn csrs(&mut self, csr: u32, s: Reg) -> &mut Self {
        self.word(csr << 20 | s << 15 | 2 << 12 | 0x73)
    }

    /// CSRRC without a destination: clears bits.
    pub fn csrc(&mut self, csr: u32, s: Reg) -> &mut Self {
        self.word(csr << 20 | s << 15 | 3 << 12 | 0x73)
    }

    /// SFENCE.VMA for everything.
    pub fn sfence_vma(&mut self) -> &mut Self {
        self.word(0x1200_0073)
    }

    /// SRET.
    pub fn sret(&mut self) -> &mut Self {
        self.word(0x1020_0073)
    }

    /// ECALL.
    pub fn ecall(&mut self) -> &mut Self {
        self.word(0x0000_0073)
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
            code.addi(5, 6, -4) // addi t0, t1, -4
                .ori(5, 6, 0x7ff) // ori t0, t1, 0x7ff
                .slli(5, 5, 43) // slli t0, t0, 43
                .add(10, 11, 28) // add a0, a1, t3
                .beq(5, 6, 5) // beq t0, t1, .+20
                .bne(5, 6, -3) // bne t0, t1, .-12
                .blt(5, 0, 600) // blt t0, zero, .+2400
                .j(-5) // j .-20
                .j(700) // j .+2800
                .ld(5, 6) // ld t0, 0(t1)
                .sw(5, 6) // sw t0, 0(t1)
                .sd(5, 6) // sd t0, 0(t1)
                .lr(5, 6) // lr.d t0, (t1)
                .sc(7, 5, 6) // sc.d t2, t0, (t1)
                .amoadd(7, 5, 6) // amoadd.d t2, t0, (t1)
                .fmv_to(1, 5) // fmv.d.x f1, t0
                .fmv_from(5, 1) // fmv.x.d t0, f1
                .fadd(3, 1, 2) // fadd.d f3, f1, f2
                .csrw(0x105, 5) // csrw stvec, t0
                .csrr(5, 0x142) // csrr t0, scause
                .csrs(0x100, 5) // csrs sstatus, t0
                .csrc(0x104, 5) // csrc sie, t0
                .sfence_vma() // sfence.vma
                .sret() // sret
                .ecall(); // ecall
        });
        for (position, (got, want)) in got.iter().zip(ASSEMBLED).enumerate() {
            assert_eq!(got, want, "word {position}: {got:#010x}, not {want:#010x}");
        }
        assert_eq!(got.len(), ASSEMBLED.len());
    }

    const ASSEMBLED: &[u32] = &[
        0xffc3_0293,
        0x7ff3_6293,
        0x02b2_9293,
        0x01c5_8533,
        0x0062_8a63,
        0xfe62_9ae3,
        0x1602_c0e3,
        0xfedf_f06f,
        0x2f10_006f,
        0x0003_3283,
        0x0053_2023,
        0x0053_3023,
        0x1003_32af,
        0x1853_33af,
        0x0053_33af,
        0xf202_80d3,
        0xe200_82d3,
        0x0220_f1d3,
        0x1052_9073,
        0x1420_22f3,
        0x1002_a073,
        0x1042_b073,
        0x1200_0073,
        0x1020_0073,
        0x0000_0073,
    ];

    /// What a sequence of ADDI, ORI and SLLI on one register makes.
    fn evaluate(words: &[u32]) -> u64 {
        words.iter().fold(0, |value, word| {
            let immediate = (*word as i32 >> 20) as i64 as u64;
            match word >> 12 & 7 {
                0 => immediate,
                1 => value << immediate,
                _ => value | immediate,
            }
        })
    }

    #[test]
    fn constants_are_what_they_are() {
        for value in [
            0,
            1,
            0x7ff,
            0x800,
            0x8000_0000,
            0x0123_4567_89ab_cdef,
            u64::MAX,
        ] {
            let code = words(|code| {
                code.li(T0, value);
            });
            assert_eq!(evaluate(&code), value, "{value:#x}");
        }
    }
}
