//! What crossvisor is measured against, as data: a new peer is a new row.

use std::collections::BTreeSet;
use std::path::Path;

use crossvisor_boot::initramfs::Executable;

use crate::archive::{Archive, Root};
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::l1::Initramfs;
use crate::targets::Target;

/// A VMM that crossvisor is measured against on one architecture.
#[derive(Debug, PartialEq)]
pub struct Peer {
    /// Its name in the report.
    pub name: &'static str,
    /// The architecture, as in [`Target::arch`].
    pub arch: &'static str,
    /// Debian's package of it.
    pub package: &'static str,
    /// Its program, a path in the package.
    pub program: &'static str,
    /// Other files that it opens, each in the package or what that depends on.
    pub data: &'static [&'static str],
    /// Its arguments, in pieces. `{kernel}`, `{initrd}`, `{cpus}`, `{memory}` (in MiB) and
    /// `{cmdline}` stand for the run's own. The console is its standard output.
    pub arguments: &'static [&'static [&'static str]],
    /// What its kernel calls the console.
    pub console: &'static str,
    /// The part of its boot time that crossvisor is to take at most.
    pub aim: Option<f64>,
}

/// What every QEMU is told besides its machine.
const QEMU: &[&str] = &[
    "-accel",
    "kvm",
    "-cpu",
    "host",
    "-smp",
    "{cpus}",
    "-m",
    "{memory}M",
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-serial",
    "stdio",
    "-kernel",
    "{kernel}",
    "-initrd",
    "{initrd}",
    "-append",
    "{cmdline}",
];

/// Every peer. Each is set up as its documentation advises for a start without
/// detours: devices that the guest does not need are left out, the kernel is
/// loaded directly.
pub const PEERS: [Peer; 4] = [
    Peer {
        name: "QEMU microvm",
        arch: "x86_64",
        package: "qemu-system-x86",
        // Debian's build with no other machine, a quarter of the usual size.
        program: "usr/bin/qemu-system-x86_64-microvm",
        data: &["usr/share/qemu/qboot.rom"],
        arguments: &[
            &[
                // Without an RTC, Debian's kernel waits for one.
                "-M",
                "microvm,x-option-roms=off,pic=off,pit=off,rtc=on",
                "-bios",
                "qboot.rom",
            ],
            QEMU,
        ],
        console: "ttyS0",
        aim: Some(0.45),
    },
    Peer {
        name: "QEMU virt",
        arch: "aarch64",
        package: "qemu-system-arm",
        program: "usr/bin/qemu-system-aarch64",
        data: &[],
        arguments: &[&["-M", "virt,gic-version=host"], QEMU],
        console: "ttyAMA0",
        aim: None,
    },
    Peer {
        name: "QEMU pseries",
        arch: "ppc64le",
        package: "qemu-system-ppc",
        program: "usr/bin/qemu-system-ppc64",
        data: &["usr/share/qemu/vof.bin"],
        arguments: &[
            &[
                "-M",
                // Open Firmware as hypercalls of QEMU's rather than a guest's
                // program, and the interrupt controller that KVM has. What the
                // lab machine's processor lacks is left out, or it does not
                // start.
                "pseries,x-vof=on,ic-mode=xics,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,\
                 cap-ccf-assist=off,cap-hpt-max-page-size=4k",
            ],
            QEMU,
        ],
        console: "hvc0",
        aim: None,
    },
    Peer {
        name: "QEMU virt",
        arch: "riscv64",
        package: "qemu-system-riscv",
        program: "usr/bin/qemu-system-riscv64",
        data: &[],
        arguments: &[&["-M", "virt,aia=aplic-imsic"], QEMU],
        console: "ttyS0",
        aim: None,
    },
];

impl Peer {
    /// The peers on one architecture.
    pub fn all(target: &Target) -> impl Iterator<Item = &'static Self> {
        let arch = target.arch;
        PEERS.iter().filter(move |peer| peer.arch == arch)
    }

    /// Puts the program, its libraries and its data into a lab machine, each
    /// under the path that it has on Debian; returns the program's.
    ///
    /// # Errors
    ///
    /// When the package is not to be had, or lacks a file.
    pub fn install(
        &self,
        cache: &Cache,
        target: &Target,
        initramfs: &mut Initramfs,
    ) -> Result<String> {
        // What runs this machine's own lab machines serves here too.
        let name = match target.is_native() {
            true => self.package.to_owned(),
            false => format!("{}-{}", self.package, target.debian),
        };
        let root = Archive::new(cache).root(&Root {
            name: &name,
            closure: &[self.package],
            alone: &[],
            foreign: (!target.is_native()).then_some(target.debian),
        })?;
        let libraries = format!("usr/lib/{}", target.gnu);
        let names = closure(&root.join(self.program), &root.join(&libraries))?;
        for name in names {
            let file = format!("{libraries}/{name}");
            initramfs.add_file(&root.join(&file), &format!("/{file}"))?;
        }
        if let Some(loader) = executable(&root.join(self.program))?.interpreter {
            let name = Path::new(&loader).file_name().unwrap_or_default();
            initramfs.add_file(&root.join(&libraries).join(name), &loader)?;
        }
        for file in self.data.iter().chain([&self.program]) {
            initramfs.add_file(&root.join(file), &format!("/{file}"))?;
        }
        Ok(format!("/{}", self.program))
    }
}

fn executable(path: &Path) -> Result<Executable> {
    Executable::open(path).map_err(|error| Error::said(format!("{}: {error}", path.display())))
}

/// The names of the libraries in `folder` that `program` is linked with, and
/// that those are linked with.
fn closure(program: &Path, folder: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut wanted = executable(program)?.needed;
    while let Some(name) = wanted.pop() {
        if !found.contains(&name) {
            wanted.extend(executable(&folder.join(&name))?.needed);
            found.insert(name);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_on_architectures_of_the_lab_and_take_what_a_run_gives() {
        for peer in &PEERS {
            Target::named(peer.arch).unwrap();
            let line = peer.arguments.concat().join(" ");
            for word in ["{kernel}", "{initrd}", "{cpus}", "{memory}", "{cmdline}"] {
                assert!(line.contains(word), "{}: no {word}", peer.name);
            }
        }
    }

    #[test]
    fn a_library_that_is_missing_is_named() {
        let exe = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir().unwrap();
        // Linked with the C library, wherever this is built dynamically.
        if executable(&exe).unwrap().needed.is_empty() {
            return;
        }
        let error = closure(&exe, dir.path()).unwrap_err().to_string();
        assert!(error.contains(".so"), "{error}");
    }
}
