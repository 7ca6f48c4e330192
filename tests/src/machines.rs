//! What the tests expect of each architecture's guests and of each lab machine,
//! as data: a new one is a new row.

/// What guests of one architecture are like.
#[derive(Debug)]
pub struct Arch {
    /// Its name.
    pub name: &'static str,
    /// Whether the matrix shows on it what all have in common; an architecture
    /// with ACPI and one with a device tree do for it.
    pub shows_common: bool,
    /// Whether its emulator interprets each instruction, so that the matrix leaves
    /// out on it what takes minutes there.
    pub interpreted: bool,
    /// By what limits of time are multiplied. They are there to end what hangs,
    /// and must not end what is slow: machines of one CI differ by a factor of
    /// two, and emulators by more.
    pub patience: u64,
    /// Words for the guest's kernel by which it leaves out what takes long there
    /// and is nothing of the VMM's.
    pub cmdline: &'static str,
    /// The machine's own console, as Linux calls it.
    pub console: &'static str,
    /// The kernel formats that it boots, as the lab names them.
    pub formats: &'static [&'static str],
    /// The clock source that Linux takes.
    pub clock: &'static str,
    /// Features that programs look for, as /proc/cpuinfo spells them: a guest
    /// has those that the host has.
    pub features: &'static [&'static str],
    /// What `--transport` takes.
    pub transports: &'static [&'static str],
    /// How many virtio devices every guest has: the power key of machines that
    /// have no other.
    pub own_devices: u64,
    /// The least memory that the stock kernel starts a shell in, in MiB.
    pub least_memory: u64,
}

/// Every architecture.
const ARCHITECTURES: &[Arch] = &[
    Arch {
        name: "x86_64",
        shows_common: true,
        interpreted: false,
        patience: 3,
        cmdline: "",
        console: "ttyS0",
        formats: &["bzimage", "elf"],
        clock: "kvm-clock",
        features: &[
            "cx16", "sse4_2", "popcnt", "aes", "avx", "avx2", "bmi2", "rdrand", "xsave",
        ],
        transports: &["pci", "mmio"],
        own_devices: 0,
        least_memory: 88,
    },
    Arch {
        name: "aarch64",
        shows_common: true,
        interpreted: false,
        patience: 4,
        cmdline: "",
        console: "ttyS0",
        formats: &["image", "gzip", "zboot"],
        clock: "arch_sys_counter",
        features: &["fp", "asimd", "aes", "sha2", "crc32", "atomics", "cpuid"],
        transports: &["pci", "mmio"],
        own_devices: 0,
        least_memory: 64,
    },
    Arch {
        name: "ppc64le",
        shows_common: false,
        interpreted: false,
        patience: 4,
        cmdline: "",
        console: "hvc0",
        formats: &["vmlinux", "vmlinux-gzip"],
        clock: "timebase",
        features: &[],
        // Firmware of PAPR tells of no devices but those on PCI.
        transports: &["pci"],
        own_devices: 0,
        // Linux counts memory by 16 MiB here; with 80 it stops before it has a
        // console.
        least_memory: 96,
    },
    Arch {
        name: "riscv64",
        shows_common: false,
        interpreted: false,
        // A guest that touches much memory was seen to take two minutes where
        // its machine had half a CPU.
        patience: 5,
        cmdline: "",
        console: "ttyS0",
        formats: &["image", "gzip", "zboot"],
        clock: "riscv_clocksource",
        features: &[
            "rv64imafdc",
            "zicbom",
            "zicboz",
            "zba",
            "zbb",
            "zbs",
            "zfa",
            "zawrs",
            "sstc",
        ],
        transports: &["pci", "mmio"],
        own_devices: 1,
        // A table of memory sections takes 32 MiB of it (sparse_init).
        least_memory: 88,
    },
    Arch {
        name: "s390x",
        shows_common: false,
        // Hercules has no just-in-time compiler.
        interpreted: true,
        patience: 8,
        // Another test of ciphers, and certificates, whose signatures take an
        // eighth of the boot to check.
        cmdline: "initcall_blacklist=crypto_kdf108_init,load_system_certificate_list",
        console: "ttysclp0",
        formats: &["image"],
        clock: "tod",
        features: &["esan3", "zarch", "stfle", "msa", "ldisp", "eimm", "dfp"],
        transports: &["ccw"],
        own_devices: 0,
        least_memory: 64,
    },
];

/// The names of all architectures.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|arch| arch.name)
}

/// An interrupt controller that guests of a machine can have.
#[derive(Debug)]
pub struct Irqchip {
    /// What `--irqchip` calls it.
    pub name: &'static str,
    /// How /proc/interrupts of a guest shows that its devices use it.
    pub shown: &'static str,
    /// vCPUs to try it with.
    pub cpus: u32,
}

const fn irqchip(name: &'static str, shown: &'static str, cpus: u32) -> Irqchip {
    Irqchip { name, shown, cpus }
}

/// In what the machines of one architecture differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The interrupt controller.
    Interrupts,
    /// The size of the host's or the guest's pages.
    Pages,
    /// What the KVM underneath is: the machine's own, or nested. Which MMUs and
    /// interrupt controllers guests can have follows from it.
    Nesting,
}

/// What the tests expect of a lab machine besides what its architecture has.
#[derive(Debug)]
struct Board {
    /// Its name.
    name: &'static str,
    /// In what it is not as the first machine of its architecture.
    differs: &'static [Difference],
    /// Capabilities that `doctor` finds, or does not.
    capabilities: &'static [(&'static str, bool)],
    /// The interrupt controllers to try.
    irqchips: &'static [Irqchip],
    /// Whether devices on PCI interrupt by messages.
    messages: bool,
    /// As in [`Arch`], where its guests' kernel takes another amount.
    least_memory: Option<u64>,
    /// One that the machine rules out, and what the refusal names.
    other_irqchip: Option<(&'static str, &'static str)>,
    /// The kinds of MMU to try with `--mmu`, with what /proc/cpuinfo of a guest
    /// calls each.
    mmus: &'static [(&'static str, &'static str)],
    /// A kind that `--mmu` refuses, and what the refusal names.
    other_mmu: (&'static str, &'static str),
}

const GICV3: &[Irqchip] = &[
    irqchip("gicv3-its", "ITS-PCI-MSIX", 4),
    irqchip("gicv3", "GICv3", 2),
];
const GICV3_FOUND: &[(&str, bool)] = &[("gicv3", true), ("gicv3-its", true), ("gicv2", false)];
const POWER_FOUND: &[(&str, bool)] = &[
    ("nested", true),
    ("KVM_CAP_PPC_MMU_RADIX", true),
    ("KVM_CAP_PPC_MMU_HASH_V3", false),
    ("KVM_CAP_IRQ_XICS", true),
    ("KVM_CAP_PPC_IRQ_XIVE", false),
    ("CPU character", true),
    ("CPU behaviour", true),
];
const XICS: Irqchip = irqchip("xics", "XICS", 2);
const PLIC: Irqchip = irqchip("plic", "SiFive PLIC", 2);

const fn board(
    name: &'static str,
    differs: &'static [Difference],
    capabilities: &'static [(&'static str, bool)],
    irqchips: &'static [Irqchip],
    other_irqchip: Option<(&'static str, &'static str)>,
) -> Board {
    Board {
        name,
        differs,
        capabilities,
        irqchips,
        messages: true,
        least_memory: None,
        other_irqchip,
        mmus: &[],
        other_mmu: ("radix", "one kind"),
    }
}

/// A POWER partition, whose KVM is nested and has radix trees and an XICS.
const fn partition(name: &'static str, differs: &'static [Difference]) -> Board {
    Board {
        other_mmu: ("hpt", "radix"),
        ..board(name, differs, POWER_FOUND, &[XICS], Some(("xive", "xics")))
    }
}

/// Where the guests' kernel is Debian's with pages of 64 KiB on POWER; with 96
/// it ends deadlocked on memory.
const LEAST_WITH_64K: Option<u64> = Some(128);

/// The lab machines that differ in more than their architecture.
const BOARDS: &[Board] = &[
    board("x86_64", &[], &[("KVM_CAP_IRQFD", true)], &[], None),
    board(
        "aarch64",
        &[],
        GICV3_FOUND,
        GICV3,
        Some(("gicv2", "gicv3-its")),
    ),
    board(
        "aarch64-16k",
        &[Difference::Pages],
        GICV3_FOUND,
        GICV3,
        Some(("gicv2", "gicv3-its")),
    ),
    board(
        "aarch64-gicv2",
        &[Difference::Interrupts],
        &[("gicv3", false), ("gicv3-its", false), ("gicv2", true)],
        &[
            irqchip("gicv2m", "GICv2m-PCI-MSIX", 4),
            irqchip("gicv2", "GIC-0", 2),
        ],
        Some(("gicv3", "gicv2m")),
    ),
    partition("ppc64le", &[]),
    Board {
        least_memory: LEAST_WITH_64K,
        ..partition("ppc64le-power10", &[Difference::Pages])
    },
    partition("ppc64le-64k", &[Difference::Pages]),
    Board {
        least_memory: LEAST_WITH_64K,
        mmus: &[("hpt", "Hash")],
        other_mmu: ("sv39", "radix, hpt"),
        ..board(
            "ppc64le-powernv",
            &[Difference::Nesting],
            &[
                ("nested", false),
                ("KVM_CAP_PPC_MMU_RADIX", true),
                ("KVM_CAP_PPC_MMU_HASH_V3", true),
                ("KVM_CAP_IRQ_XICS", true),
                ("KVM_CAP_PPC_IRQ_XIVE", true),
                // QEMU's machine has no fw-features for the kernel to read.
                ("CPU behaviour", false),
            ],
            &[irqchip("xive", "XIVE", 4), XICS],
            None,
        )
    },
    board(
        "riscv64",
        &[],
        &[("aia-ids", true), ("ssaia", true), ("sbi-dbcn", true)],
        &[irqchip("aia", "PCI-MSIX", 4), PLIC],
        None,
    ),
    Board {
        messages: false,
        ..board(
            "riscv64-plic",
            &[Difference::Interrupts],
            &[("aia-ids", false), ("ssaia", false), ("sbi-dbcn", true)],
            &[PLIC],
            Some(("aia", "plic")),
        )
    },
    board(
        "s390x",
        &[],
        &[
            ("pgste", true),
            ("KVM_CAP_S390_COW", false),
            ("KVM_CAP_S390_CSS_SUPPORT", true),
            ("flic", true),
            ("KVM_CAP_S390_IRQCHIP", true),
            ("KVM_CAP_IRQFD", true),
            ("facilities", true),
            ("KVM_CAP_S390_VECTOR_REGISTERS", false),
        ],
        &[],
        None,
    ),
];

/// A machine of the lab, and what is expected of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine<'a> {
    /// Name, such as `aarch64-16k`.
    pub name: &'a str,
}

impl Machine<'_> {
    /// The architecture: the name up to its first dash.
    pub fn arch(&self) -> &str {
        self.name.split('-').next().unwrap_or_default()
    }

    /// What its guests are like; `None` for an architecture without a row.
    pub fn guests(&self) -> Option<&'static Arch> {
        ARCHITECTURES.iter().find(|arch| arch.name == self.arch())
    }

    /// The least memory that the kernel of its guests starts a shell in, in MiB.
    pub fn least_memory(&self) -> Option<u64> {
        let own = self.board().and_then(|board| board.least_memory);
        own.or(self.guests().map(|arch| arch.least_memory))
    }

    /// By what limits of time are multiplied on it.
    pub fn patience(&self) -> u64 {
        self.guests().map_or(1, |arch| arch.patience)
    }

    fn board(&self) -> Option<&'static Board> {
        BOARDS.iter().find(|board| board.name == self.name)
    }

    /// Whether it is not as the first machine of its architecture in this.
    pub fn differs_in(&self, what: Difference) -> bool {
        self.board()
            .is_none_or(|board| board.differs.contains(&what))
    }

    /// Whether its guests boot kernels of `format`.
    pub fn boots(&self, format: &str) -> bool {
        self.guests()
            .is_some_and(|arch| arch.formats.contains(&format))
    }

    /// Whether its guests can have virtio by `transport`.
    pub fn has_transport(&self, transport: &str) -> bool {
        self.guests()
            .is_some_and(|arch| arch.transports.contains(&transport))
    }

    /// The interrupt controller called `name`, if it is to be tried here.
    pub fn irqchip(&self, name: &str) -> Option<&'static Irqchip> {
        let irqchips = self.board().map_or(&[][..], |board| board.irqchips);
        irqchips.iter().find(|irqchip| irqchip.name == name)
    }

    /// Whether its guests' devices on PCI interrupt by messages.
    pub fn has_messages(&self) -> bool {
        self.board().is_none_or(|board| board.messages)
    }

    /// An interrupt controller that the machine rules out, and what the refusal
    /// names.
    pub fn other_irqchip(&self) -> Option<(&'static str, &'static str)> {
        self.board().and_then(|board| board.other_irqchip)
    }

    /// What /proc/cpuinfo of a guest calls the kind of MMU `name`, if it is to be
    /// tried here.
    pub fn mmu(&self, name: &str) -> Option<&'static str> {
        let mmus = self.board().map_or(&[][..], |board| board.mmus);
        let mut found = mmus.iter().filter(|(mmu, _)| *mmu == name);
        found.next().map(|(_, shown)| *shown)
    }

    /// A kind of MMU that `--mmu` refuses, and what its message names.
    pub fn other_mmu(&self) -> (&'static str, &'static str) {
        let board = self.board();
        board.map_or(("sv39", "--mmu"), |board| board.other_mmu)
    }

    /// Capabilities that `doctor` finds here, or does not.
    pub fn capabilities(&self) -> &'static [(&'static str, bool)] {
        self.board().map_or(&[], |board| board.capabilities)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_board_is_of_an_architecture_with_a_row() {
        for board in BOARDS {
            let machine = Machine { name: board.name };
            assert!(machine.guests().is_some(), "{}", board.name);
            assert!(!machine.capabilities().is_empty(), "{}", board.name);
        }
        for arch in ARCHITECTURES {
            let first = Machine { name: arch.name };
            assert!(first.board().is_some(), "{}", arch.name);
        }
    }

    #[test]
    fn the_first_machine_of_an_architecture_is_what_others_differ_from() {
        for board in BOARDS {
            let first = ARCHITECTURES.iter().any(|arch| arch.name == board.name);
            assert_eq!(first, board.differs.is_empty(), "{}", board.name);
        }
    }

    #[test]
    fn machines_differ() {
        let machine = |name| Machine { name };
        assert!(machine("aarch64-16k").boots("zboot"));
        assert!(!machine("x86_64").boots("zboot"));
        assert!(!machine("ppc64le-64k").has_transport("mmio"));
        assert!(machine("riscv64-plic").irqchip("plic").is_some());
        assert!(machine("riscv64-plic").irqchip("aia").is_none());
        assert!(machine("vax").guests().is_none());
    }
}
