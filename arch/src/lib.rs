//! The architectures of crossvisor, behind the core's seam
//! ([`crossvisor_vmm::arch`]).
//!
//! They know nothing of each other. All of each is compiled and tested on every
//! host, except its `kvm.rs`.

pub mod aarch64;
pub mod dts;
pub mod ppc64;
pub mod riscv64;
pub mod s390x;
mod shared;
pub mod x86_64;

use crossvisor_vmm::arch::Architecture;

/// Every architecture.
pub const ALL: &[&dyn Architecture] = &[
    &x86_64::X86_64,
    &aarch64::Aarch64,
    &ppc64::Ppc64,
    &s390x::S390x,
    &riscv64::Riscv64,
];

/// The architecture called `name`, or one of its aliases.
pub fn find(name: &str) -> Option<&'static dyn Architecture> {
    let called = |arch: &&&dyn Architecture| arch.name() == name || arch.aliases().contains(&name);
    ALL.iter().find(called).copied()
}

/// The architecture whose guests this binary's KVM runs.
pub fn host() -> Option<&'static dyn Architecture> {
    ALL.iter().find(|arch| arch.kvm().is_some()).copied()
}
