//! The architectures that the lab builds for and emulates.

use crate::error::{Error, Result};
use crate::stored;

/// One architecture under the names that it has in each world.
#[derive(Debug, PartialEq, Eq)]
pub struct Target {
    /// Crossvisor's name.
    pub arch: &'static str,
    /// Other names that users type.
    pub aliases: &'static [&'static str],
    /// Rust's name of the architecture (`std::env::consts::ARCH`).
    pub rust: &'static str,
    /// Rust's target, always with the GNU C library.
    pub triple: &'static str,
    /// Debian's name of the architecture.
    pub debian: &'static str,
    /// The GNU triplet, as in library folders.
    pub gnu: &'static str,
    /// Debian's package of the linker.
    pub binutils: &'static str,
    /// QEMU's name, of its user-mode emulator.
    pub qemu: &'static str,
    /// The formats in which its guests' kernels boot, as
    /// [`images::conversion`](crate::images::conversion) knows them; the first
    /// is Debian's.
    pub formats: &'static [&'static str],
}

/// Every architecture.
pub const TARGETS: [Target; 5] = [
    Target {
        arch: "x86_64",
        rust: "x86_64",
        aliases: &["amd64", "x86-64"],
        triple: "x86_64-unknown-linux-gnu",
        debian: "amd64",
        gnu: "x86_64-linux-gnu",
        binutils: "binutils-x86-64-linux-gnu",
        qemu: "x86_64",
        formats: &["bzimage", "elf"],
    },
    Target {
        arch: "aarch64",
        rust: "aarch64",
        aliases: &["arm64"],
        triple: "aarch64-unknown-linux-gnu",
        debian: "arm64",
        gnu: "aarch64-linux-gnu",
        binutils: "binutils-aarch64-linux-gnu",
        qemu: "aarch64",
        formats: &["image", "gzip", "zboot"],
    },
    Target {
        arch: "ppc64le",
        aliases: &["powerpc64le", "ppc64el"],
        rust: "powerpc64",
        triple: "powerpc64le-unknown-linux-gnu",
        debian: "ppc64el",
        gnu: "powerpc64le-linux-gnu",
        binutils: "binutils-powerpc64le-linux-gnu",
        qemu: "ppc64le",
        formats: &["vmlinux", "vmlinux-gzip"],
    },
    Target {
        arch: "s390x",
        aliases: &["s390"],
        rust: "s390x",
        triple: "s390x-unknown-linux-gnu",
        debian: "s390x",
        gnu: "s390x-linux-gnu",
        binutils: "binutils-s390x-linux-gnu",
        qemu: "s390x",
        formats: &["image", stored::FORMAT],
    },
    Target {
        arch: "riscv64",
        aliases: &["rv64", "riscv64gc"],
        rust: "riscv64",
        triple: "riscv64gc-unknown-linux-gnu",
        debian: "riscv64",
        gnu: "riscv64-linux-gnu",
        binutils: "binutils-riscv64-linux-gnu",
        qemu: "riscv64",
        formats: &["image", "gzip", "zboot"],
    },
];

impl Target {
    /// The architecture called `name`.
    ///
    /// # Errors
    ///
    /// When the lab does not know it; the error lists what it knows.
    pub fn named(name: &str) -> Result<&'static Self> {
        TARGETS
            .iter()
            .find(|t| t.arch == name || t.aliases.contains(&name))
            .ok_or_else(|| {
                let known: Vec<&str> = TARGETS.iter().map(|t| t.arch).collect();
                Error::said(format!(
                    "the lab has no architecture {name}; it has {}",
                    known.join(", ")
                ))
            })
    }

    /// The architecture of the machine that the lab runs on.
    ///
    /// # Errors
    ///
    /// When the lab has no such architecture.
    pub fn native() -> Result<&'static Self> {
        let native = TARGETS.iter().find(|target| target.is_native());
        native.ok_or_else(|| {
            Error::said(format!(
                "the lab does not run on {} machines",
                std::env::consts::ARCH
            ))
        })
    }

    /// Whether it is the architecture of the machine that the lab runs on.
    pub fn is_native(&self) -> bool {
        self.rust == std::env::consts::ARCH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_aliases_lead_to_one_architecture() {
        assert_eq!(Target::named("arm64").unwrap().arch, "aarch64");
        assert_eq!(Target::named("x86_64").unwrap().debian, "amd64");
        assert_eq!(Target::named("ppc64el").unwrap().rust, "powerpc64");
        assert_eq!(Target::native().unwrap().rust, std::env::consts::ARCH);
        let error = Target::named("vax").unwrap_err().to_string();
        assert!(
            error.contains("vax") && error.contains("aarch64"),
            "{error}"
        );
    }
}
