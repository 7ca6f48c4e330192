//! Thin KVM access.
//!
//! The names are kvm-ioctls'. Where that crate does not build, a module of our
//! own offers the same ones.

pub use kvm_bindings as bindings;
pub use kvm_ioctls::{Cap, DeviceFd, Error, Kvm, VcpuFd, VmFd};

mod vm;

pub use vm::{KvmVm, open};
