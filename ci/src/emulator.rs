//! QEMU for the lab's machines: the same version on every host.

use std::path::PathBuf;
use std::process::Command;

use crate::archive::{Archive, Root};
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::program;
use crate::unpacked::Programs;

/// The oldest QEMU that is used from `PATH` where Debian's is not to be had.
const OLDEST: u32 = 9;

/// A QEMU system emulator that can be started.
#[derive(Debug)]
pub enum Emulator {
    /// Debian's, unpacked into the lab's cache.
    Unpacked {
        /// Where from.
        programs: Programs,
        /// Its path there.
        program: String,
    },
    /// The machine's own.
    Installed(PathBuf),
}

impl Emulator {
    /// The emulator `program` (`qemu-system-aarch64`) from Debian's `package`.
    ///
    /// # Errors
    ///
    /// When it is not to be had.
    pub fn get(cache: &Cache, program: &str, package: &str) -> Result<Self> {
        if Archive::usable() {
            let root = Archive::new(cache).root(&Root {
                name: package,
                closure: &[package],
                alone: &[],
                foreign: None,
            })?;
            return Ok(Self::Unpacked {
                programs: Programs::new(root)?,
                program: format!("usr/bin/{program}"),
            });
        }
        let lacking = || {
            Error::said(format!(
                "this machine has neither apt-get, by which the lab gets QEMU, nor {program} \
                 {OLDEST} or newer: install it"
            ))
        };
        let path = program::find(program).ok_or_else(lacking)?;
        let printed = program::output(Command::new(&path).arg("--version"))?;
        if major_version(&printed).is_none_or(|version| version < OLDEST) {
            return Err(lacking());
        }
        Ok(Self::Installed(path))
    }

    /// A command that runs it, its own files found.
    pub fn command(&self) -> Command {
        match self {
            Self::Installed(path) => Command::new(path),
            Self::Unpacked { programs, program } => {
                let mut command = programs.command(program);
                for data in ["usr/share/qemu", "usr/share/seabios"] {
                    command.arg("-L").arg(programs.root().join(data));
                }
                command.env("QEMU_MODULE_DIR", programs.libraries().join("qemu"));
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
}
