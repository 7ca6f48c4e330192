//! The place of what only s390x says to KVM, on hosts that are none.

// The same signatures as s390x has them.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use super::bindings::kvm_run;
use super::{DeviceFd, VcpuFd};
use crate::exit::NoLogicalMemory;
use crate::hv::Interrupt;

/// No vCPU here takes such an interrupt.
pub fn inject(_vcpu: &OwnedFd, _interrupt: &Interrupt) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// No controller here takes such an interrupt.
pub fn inject_floating(_devices: &[DeviceFd], _interrupt: &Interrupt) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// There are no subchannels.
pub fn withdraw(_devices: &[DeviceFd], _id: u32) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// There is no PSW in the run page: `none` stands for it.
///
/// # Safety
/// Nothing is asked of the caller here.
pub unsafe fn psw(_run: *mut kvm_run, none: &mut [u64; 2]) -> &mut [u64; 2] {
    none
}

/// No vCPU here has its memory reached by logical addresses.
pub fn logical(_vcpu: &VcpuFd) -> NoLogicalMemory {
    NoLogicalMemory
}
