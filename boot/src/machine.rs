//! The guest architectures that an image can be for.

use std::fmt;

/// The machine that a kernel or executable was built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Machine {
    /// 64-bit x86.
    X86_64,
    /// 64-bit Arm, either byte order.
    Aarch64,
    /// 64-bit POWER, big-endian. A pseries guest may be of either order.
    Ppc64,
    /// 64-bit POWER, little-endian.
    Ppc64le,
    /// 64-bit z/Architecture.
    S390x,
    /// 64-bit RISC-V.
    Riscv64,
    /// Something that crossvisor does not run, by its usual name.
    Other(&'static str),
}

impl Machine {
    /// The usual name, as `uname -m` prints it.
    pub fn name(self) -> &'static str {
        match self {
            Machine::X86_64 => "x86_64",
            Machine::Aarch64 => "aarch64",
            Machine::Ppc64 => "ppc64",
            Machine::Ppc64le => "ppc64le",
            Machine::S390x => "s390x",
            Machine::Riscv64 => "riscv64",
            Machine::Other(name) => name,
        }
    }

    /// From an ELF header's class, data encoding and `e_machine` (System V
    /// ABI, "ELF Header", and the processor supplements).
    pub(crate) fn from_elf(
        is_64: bool,
        little_endian: bool,
        e_machine: object::elf::Machine,
    ) -> Machine {
        use object::elf;
        match (e_machine, is_64, little_endian) {
            (elf::EM_X86_64, true, true) => Machine::X86_64,
            (elf::EM_AARCH64, true, _) => Machine::Aarch64,
            (elf::EM_PPC64, true, false) => Machine::Ppc64,
            (elf::EM_PPC64, true, true) => Machine::Ppc64le,
            (elf::EM_S390, true, false) => Machine::S390x,
            (elf::EM_RISCV, true, true) => Machine::Riscv64,
            (elf::EM_386, ..) => Machine::Other("32-bit x86"),
            (elf::EM_X86_64, ..) => Machine::Other("x32"),
            (elf::EM_ARM, ..) => Machine::Other("32-bit Arm"),
            (elf::EM_PPC, ..) => Machine::Other("32-bit PowerPC"),
            (elf::EM_S390, ..) => Machine::Other("31-bit s390"),
            (elf::EM_RISCV, ..) => Machine::Other("32-bit RISC-V"),
            (elf::EM_LOONGARCH, ..) => Machine::Other("LoongArch"),
            (elf::EM_MIPS, ..) => Machine::Other("MIPS"),
            _ => Machine::Other("unknown machine"),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
