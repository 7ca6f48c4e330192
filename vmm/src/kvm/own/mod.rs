//! KVM access under kvm-ioctls' names, for hosts for which kvm-ioctls and
//! kvm-bindings do not build: powerpc64 and s390x.
//!
//! What crossvisor uses, and no more. The day those crates have these
//! architectures, this folder is deleted and nothing else changes. Calls that
//! only one architecture has are in `powerpc.rs` and `s390.rs`.

// Calls of the kernel, and what it maps and hands out.
#![allow(unsafe_code)]

mod cap;
mod device;
mod run_page;
mod system;
mod vcpu;
mod vm;

cfg_if::cfg_if! {
    if #[cfg(target_arch = "powerpc64")] {
        mod powerpc;
        mod enter_powerpc;
        use enter_powerpc as enter;
        use super::requests::powerpc as requests;
    } else {
        mod s390;
        mod enter_s390;
        use enter_s390 as enter;
        use super::requests::s390 as requests;
    }
}

use std::os::fd::AsRawFd;

use libc::c_int;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

pub use cap::Cap;
pub use device::DeviceFd;
pub use system::Kvm;
pub use vcpu::{VcpuExit, VcpuFd};
pub use vm::{IoEventAddress, NoDatamatch, VmFd};

use super::requests::Request;

/// An error of a KVM call.
pub type Error = errno::Error;
type Result<T> = std::result::Result<T, Error>;

fn checked(returned: c_int) -> Result<c_int> {
    match returned {
        0.. => Ok(returned),
        _ => Err(Error::last()),
    }
}

/// A call without an argument.
fn call(fd: &impl AsRawFd, request: Request<()>) -> Result<c_int> {
    // SAFETY: the kernel is given no pointer.
    checked(unsafe { ioctl(fd, request.host_code()) })
}

/// A call whose argument is a value. The callers see to it that the kernel does
/// not take it for an address.
fn call_value<T>(fd: &impl AsRawFd, request: Request<T>, value: u64) -> Result<c_int> {
    // SAFETY: the value is no address of this process.
    checked(unsafe { ioctl_with_val(fd, request.host_code(), value) })
}

/// A call that the kernel reads a structure for.
fn call_ref<T>(fd: &impl AsRawFd, request: Request<T>, argument: &T) -> Result<c_int> {
    // SAFETY: the number says that the kernel reads a `T`, and the reference is
    // valid for one. Addresses within it are the caller's to answer for.
    checked(unsafe { ioctl_with_ref(fd, request.host_code(), argument) })
}

/// A call that the kernel fills in a structure for.
fn call_mut<T>(fd: &impl AsRawFd, request: Request<T>, argument: &mut T) -> Result<c_int> {
    // SAFETY: the number says that the kernel reads and writes a `T`, all of
    // whose bit patterns are valid, and the reference is valid for one.
    // Addresses within it are the caller's to answer for.
    checked(unsafe { ioctl_with_mut_ref(fd, request.host_code(), argument) })
}

/// A call that returns a structure.
fn get<T: Default>(fd: &impl AsRawFd, request: Request<T>) -> Result<T> {
    let mut value = T::default();
    call_mut(fd, request, &mut value)?;
    Ok(value)
}
