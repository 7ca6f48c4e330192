//! The machines that the lab emulates, as data.
//!
//! Each offers /dev/kvm although this machine may not: QEMU's TCG emulates the
//! virtualization extension too, and Hercules that of s390x. A new machine is
//! a new row.

use crate::emulator::{Kind, Qemu};
use crate::error::{Error, Result};
use crate::targets::Target;

/// A machine that the lab emulates ("L1"); crossvisor runs in it, and its
/// guests are "L2".
#[derive(Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its name on the command line and in the table of results.
    pub name: &'static str,
    /// What it stands for.
    pub about: &'static str,
    /// Its architecture, as in [`Target::arch`].
    pub arch: &'static str,
    /// What emulates it.
    pub emulator: Kind,
    /// Debian's meta package of the kernel that it runs.
    pub kernel: &'static str,
    /// Debian's meta package of the kernel that guests run.
    pub guest_kernel: &'static str,
    /// Kernel modules that it loads, dependencies aside.
    pub modules: &'static [&'static str],
    /// Its kernel's command line, beyond the console.
    pub cmdline: &'static str,
    /// Whether its guest tests run without it or its architecture being named:
    /// all of them have been seen to pass on it.
    pub settled: bool,
}

/// Modules for what crossvisor uses on every host: taps, and the machine's own
/// disks.
pub const COMMON_MODULES: [&str; 2] = ["tun", "virtio_blk"];

/// A partition that may be a hypervisor itself, entered without the seconds that
/// Open Firmware takes. What TCG lacks of the mitigations is left out by name,
/// or QEMU warns of each at every start.
const PSERIES: &str = "pseries,cap-nested-hv=on,x-vof=on,cap-cfpc=broken,cap-sbbc=broken,\
                       cap-ibs=broken,cap-ccf-assist=off";

/// As many CPUs as a guest of the tests has at most: with two, a guest with four
/// was seen to hold up the whole machine in one of two runs.
const fn pseries(cpu: &'static str) -> [&'static str; 8] {
    [
        "-machine", PSERIES, "-cpu", cpu, "-serial", "null", "-smp", "4",
    ]
}

/// A server by itself, which firmware of OPAL's boots; a management controller
/// is there to power it off. Each of its PCI ports has room for one device: a
/// bridge to slots for all is what it has.
const POWERNV: [&str; 18] = [
    "-machine",
    "powernv9",
    "-cpu",
    "POWER9",
    "-serial",
    "null",
    "-smp",
    "4",
    "-device",
    "ipmi-bmc-sim,id=management",
    "-device",
    "isa-ipmi-bt,bmc=management,irq=10",
    "-device",
    "pnv-phb,id=bridge,chip-id=0,index=0",
    "-device",
    "pnv-phb-root-port,id=root,bus=bridge",
    "-device",
    "pcie-pci-bridge,id=slots,bus=root",
];

const fn power(options: &'static [&'static str], bus: Option<&'static str>) -> Kind {
    Kind::Qemu(Qemu {
        bus,
        program: "qemu-system-ppc64",
        package: "qemu-system-ppc",
        options,
        counts: true,
    })
}

const POWER9: Kind = power(&const { pseries("POWER9") }, None);
const POWER10: Kind = power(&const { pseries("POWER10") }, None);

/// A processor with all that QEMU has, and a GICv3 with ITS.
const GICV3: Kind = Kind::Qemu(Qemu {
    program: "qemu-system-aarch64",
    package: "qemu-system-arm",
    bus: None,
    options: &[
        "-machine",
        "virt,virtualization=on,gic-version=3",
        "-cpu",
        "max,pauth-impdef=on",
    ],
    counts: true,
});

/// The kernel does not start without a terminal of the firmware's, which then is
/// its hvc0: the console is the next one. Its watchdogs have nothing to tell on
/// an emulated machine but that it is slow.
const POWER_CMDLINE: &str = "console=hvc1 nowatchdog nosoftlockup";

/// Every machine.
pub const MACHINES: [Machine; 11] = [
    Machine {
        name: "x86_64",
        about: "an AMD EPYC server with nested paging",
        arch: "x86_64",
        emulator: Kind::Qemu(Qemu {
            program: "qemu-system-x86_64",
            package: "qemu-system-x86",
            bus: None,
            options: &[
                "-machine",
                "q35",
                // What TCG lacks of this processor is left out by name, or QEMU
                // warns of each at every start.
                "-cpu",
                "EPYC,fxsr-opt=off,misalignsse=off,osvw=off,topoext=off,nrip-save=off,xsavec=off",
            ],
            counts: false,
        }),
        kernel: "linux-image-cloud-amd64",
        guest_kernel: "linux-image-cloud-amd64",
        modules: &["kvm-amd"],
        cmdline: "",
        settled: true,
    },
    Machine {
        name: "aarch64",
        about: "a server with GICv3 and ITS",
        arch: "aarch64",
        emulator: GICV3,
        kernel: "linux-image-arm64",
        guest_kernel: "linux-image-arm64",
        modules: &[],
        cmdline: "kvm-arm.mode=nvhe",
        settled: true,
    },
    Machine {
        name: "aarch64-gicv2",
        about: "a Raspberry Pi 4: Cortex-A72 with GICv2",
        arch: "aarch64",
        emulator: Kind::Qemu(Qemu {
            program: "qemu-system-aarch64",
            package: "qemu-system-arm",
            bus: None,
            options: &[
                "-machine",
                "virt,virtualization=on,gic-version=2",
                "-cpu",
                "cortex-a72",
            ],
            counts: true,
        }),
        kernel: "linux-image-arm64",
        guest_kernel: "linux-image-arm64",
        modules: &[],
        cmdline: "",
        settled: true,
    },
    Machine {
        name: "aarch64-16k",
        about: "a Raspberry Pi 5 or the like: pages of 16 KiB",
        arch: "aarch64",
        emulator: GICV3,
        kernel: "linux-image-arm64-16k",
        guest_kernel: "linux-image-arm64",
        modules: &[],
        cmdline: "kvm-arm.mode=nvhe",
        settled: true,
    },
    Machine {
        name: "ppc64le",
        about: "a POWER9 partition, with KVM-HV in it",
        arch: "ppc64le",
        emulator: POWER9,
        kernel: "linux-image-powerpc64le",
        guest_kernel: "linux-image-powerpc64le",
        modules: &["kvm-hv"],
        cmdline: POWER_CMDLINE,
        settled: true,
    },
    Machine {
        name: "ppc64le-power10",
        about: "a POWER10 partition whose guests have pages of 64 KiB",
        arch: "ppc64le",
        emulator: POWER10,
        kernel: "linux-image-powerpc64le",
        guest_kernel: "linux-image-powerpc64le-64k",
        modules: &["kvm-hv"],
        cmdline: POWER_CMDLINE,
        settled: true,
    },
    Machine {
        name: "ppc64le-64k",
        about: "a POWER9 partition with pages of 64 KiB",
        arch: "ppc64le",
        emulator: POWER9,
        kernel: "linux-image-powerpc64le-64k",
        guest_kernel: "linux-image-powerpc64le",
        modules: &["kvm-hv"],
        cmdline: POWER_CMDLINE,
        settled: true,
    },
    Machine {
        name: "ppc64le-powernv",
        about: "a POWER9 server, with KVM-HV on the bare machine",
        arch: "ppc64le",
        emulator: power(&POWERNV, Some("slots")),
        // KVM keeps a XIVE's queues in pages of 64 KiB. Guests have the same
        // kernel: QEMU takes no initramfs of more than 128 MiB here, and with
        // two kernels in it this one would be larger.
        kernel: "linux-image-powerpc64le-64k",
        guest_kernel: "linux-image-powerpc64le-64k",
        modules: &["kvm-hv"],
        cmdline: POWER_CMDLINE,
        settled: true,
    },
    Machine {
        name: "riscv64",
        about: "a server with AIA",
        arch: "riscv64",
        emulator: Kind::Qemu(Qemu {
            program: "qemu-system-riscv64",
            package: "qemu-system-riscv",
            bus: None,
            options: &[
                "-machine",
                "virt,aia=aplic-imsic,aia-guests=4",
                "-cpu",
                "rv64,h=true,smaia=true,ssaia=true",
            ],
            counts: true,
        }),
        kernel: "linux-image-riscv64",
        guest_kernel: "linux-image-riscv64",
        modules: &["kvm"],
        cmdline: "",
        settled: true,
    },
    Machine {
        name: "riscv64-plic",
        about: "a board with a PLIC and no AIA",
        arch: "riscv64",
        emulator: Kind::Qemu(Qemu {
            program: "qemu-system-riscv64",
            package: "qemu-system-riscv",
            bus: None,
            options: &["-machine", "virt", "-cpu", "rv64,h=true"],
            counts: true,
        }),
        kernel: "linux-image-riscv64",
        guest_kernel: "linux-image-riscv64",
        modules: &["kvm"],
        cmdline: "",
        settled: true,
    },
    Machine {
        name: "s390x",
        about: "a mainframe's partition, z10 to z196, with SIE",
        arch: "s390x",
        emulator: Kind::Hercules,
        kernel: "linux-image-s390x",
        guest_kernel: "linux-image-s390x",
        modules: &["kvm", "tape_34xx", "dasd_fba_mod"],
        // The kernel's tests of its own ciphers, and the signatures of its
        // certificates, are a good part of a boot where each instruction is
        // interpreted.
        cmdline: "kvm.hpage=1 cryptomgr.notests initcall_blacklist=jent_mod_init,crypto_kdf108_init,\
                  load_system_certificate_list",
        settled: true,
    },
];

impl Machine {
    /// The machine called `name`.
    ///
    /// # Errors
    ///
    /// When there is none; the error lists those there are.
    pub fn named(name: &str) -> Result<&'static Self> {
        MACHINES.iter().find(|m| m.name == name).ok_or_else(|| {
            let known: Vec<&str> = MACHINES.iter().map(|m| m.name).collect();
            Error::said(format!(
                "the lab has no machine {name}; it has {}",
                known.join(", ")
            ))
        })
    }

    /// The first machine of an architecture, on which `cargo lab run` runs.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn of(target: &Target) -> Result<&'static Self> {
        Self::all(Some(target))
            .next()
            .ok_or_else(|| Error::said(format!("the lab has no machine for {}", target.arch)))
    }

    /// The machines of one architecture, or of all.
    pub fn all(target: Option<&Target>) -> impl Iterator<Item = &'static Self> {
        let arch = target.map(|t| t.arch);
        MACHINES
            .iter()
            .filter(move |m| arch.is_none_or(|arch| m.arch == arch))
    }

    /// Its architecture.
    ///
    /// # Errors
    ///
    /// When the table is at odds with itself.
    pub fn target(&self) -> Result<&'static Target> {
        Target::named(self.arch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_architectures_known() {
        let names: BTreeSet<&str> = MACHINES.iter().map(|m| m.name).collect();
        assert_eq!(names.len(), MACHINES.len());
        for machine in &MACHINES {
            let target = machine.target().unwrap();
            // Debian's names of the architecture and of its kernels differ.
            let names = [target.debian, target.arch, "powerpc64le"];
            let named = |kernel: &str| names.iter().any(|name| kernel.contains(name));
            assert!(named(machine.kernel) && named(machine.guest_kernel));
            assert_eq!(Machine::named(machine.name).unwrap(), machine);
        }
    }

    #[test]
    fn each_architecture_has_a_machine_of_its_name() {
        for target in &crate::targets::TARGETS {
            let first = Machine::all(Some(target)).next();
            assert!(first.is_none_or(|machine| machine.name == target.arch));
        }
        assert!(Machine::named("vax").is_err());
    }
}
