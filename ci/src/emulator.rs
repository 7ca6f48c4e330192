//! The emulators of the lab's machines: the same versions on every host.

use std::path::PathBuf;
use std::process::Command;

use crate::archive::{Archive, Root};
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::program;
use crate::unpacked::Programs;

/// The oldest QEMU that is used from `PATH` where Debian's is not to be had.
const OLDEST_QEMU: u32 = 9;
/// The folder of Hercules' libraries and modules in Debian's package.
const HERCULES_LIBRARIES: &str = "usr/lib/hercules";

/// What emulates a machine, as data.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// QEMU's TCG.
    Qemu(Qemu),
    /// Hercules, which emulates SIE; QEMU's TCG does not.
    Hercules,
}

/// A machine of QEMU's.
#[derive(Debug, PartialEq, Eq)]
pub struct Qemu {
    /// The program.
    pub program: &'static str,
    /// Debian's package of it.
    pub package: &'static str,
    /// The bus for what the lab adds, where the machine has no room on its first.
    pub bus: Option<&'static str>,
    /// Arguments for the machine and its processor.
    pub options: &'static [&'static str],
    /// Whether its clocks can go by the instructions executed
    /// ([`Clocks::Instructions`](crate::l1::Clocks)).
    pub counts: bool,
}

impl Kind {
    /// Its name, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Qemu(_) => "QEMU",
            Self::Hercules => "Hercules",
        }
    }

    /// The program.
    pub fn program(&self) -> &'static str {
        match self {
            Self::Qemu(qemu) => qemu.program,
            Self::Hercules => "hercules",
        }
    }

    /// Debian's package of it.
    fn package(&self) -> &'static str {
        match self {
            Self::Qemu(qemu) => qemu.package,
            Self::Hercules => "hercules",
        }
    }

    /// Whether a person can work at the machine's console, and a command in it
    /// has a standard input.
    pub fn has_terminal(&self) -> bool {
        matches!(self, Self::Qemu(_))
    }

    /// What the machine calls its disk number `n`; at most 26 have names.
    pub fn disk(&self, n: usize) -> Option<String> {
        let letter = (b'a'..=b'z').nth(n).map(char::from)?;
        Some(match self {
            Self::Qemu(_) => format!("/dev/vd{letter}"),
            Self::Hercules => format!("/dev/dasd{letter}"),
        })
    }

    /// What this machine needs to have where the lab can't get it.
    fn wanted(&self) -> String {
        match self {
            Self::Qemu(qemu) => format!("{} {OLDEST_QEMU} or newer", qemu.program),
            Self::Hercules => "hercules 3.13".to_owned(),
        }
    }
}

/// An emulator that can be started.
#[derive(Debug)]
pub enum Emulator {
    /// Debian's, unpacked into the lab's cache.
    Unpacked {
        /// Where from.
        programs: Programs,
        /// Which one.
        kind: &'static Kind,
    },
    /// The machine's own.
    Installed(PathBuf),
}

impl Emulator {
    /// The emulator of a machine, from the Debian archive where there is apt.
    ///
    /// # Errors
    ///
    /// When it is not to be had.
    pub fn get(cache: &Cache, kind: &'static Kind) -> Result<Self> {
        if Archive::usable() {
            let root = Archive::new(cache).root(&Root {
                name: kind.package(),
                closure: &[kind.package()],
                alone: &[],
                foreign: None,
            })?;
            let mut programs = Programs::new(root)?;
            if *kind == Kind::Hercules {
                programs.add_libraries(HERCULES_LIBRARIES);
            }
            return Ok(Self::Unpacked { programs, kind });
        }
        let lacking = || {
            Error::said(format!(
                "this machine has neither apt-get, by which the lab gets {}, nor {}: install it",
                kind.name(),
                kind.wanted()
            ))
        };
        let path = program::find(kind.program()).ok_or_else(lacking)?;
        if let Kind::Qemu(_) = kind {
            let printed = program::output(Command::new(&path).arg("--version"))?;
            if major_version(&printed).is_none_or(|version| version < OLDEST_QEMU) {
                return Err(lacking());
            }
        }
        Ok(Self::Installed(path))
    }

    /// A command that runs it, its own files found.
    pub fn command(&self) -> Command {
        match self {
            Self::Installed(path) => Command::new(path),
            Self::Unpacked { programs, kind } => {
                let mut command = programs.command(&format!("usr/bin/{}", kind.program()));
                match kind {
                    Kind::Qemu(_) => {
                        for data in ["usr/share/qemu", "usr/share/seabios"] {
                            command.arg("-L").arg(programs.root().join(data));
                        }
                        command.env("QEMU_MODULE_DIR", programs.libraries().join("qemu"));
                    }
                    Kind::Hercules => {
                        let modules = programs.root().join(HERCULES_LIBRARIES);
                        command.arg("-p").arg(modules);
                    }
                }
                command
            }
        }
    }
}

/// The major version in `QEMU emulator version 10.0.13 (...)`.
fn major_version(printed: &str) -> Option<u32> {
    let (_, version) = printed.split_once("version ")?;
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_qemu_prints_them() {
        assert_eq!(
            major_version("QEMU emulator version 10.0.13 (Debian 1:10)\nCopyright"),
            Some(10)
        );
        assert_eq!(major_version("QEMU emulator version 7.2.1"), Some(7));
        assert_eq!(major_version("something else"), None);
    }

    #[test]
    fn disks_have_the_names_that_linux_gives_them() {
        assert_eq!(Kind::Hercules.disk(1).as_deref(), Some("/dev/dasdb"));
        assert_eq!(Kind::Hercules.disk(26), None);
    }
}
