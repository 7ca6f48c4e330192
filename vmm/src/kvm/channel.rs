//! What only s390x says to KVM: interrupts that are neither wires nor messages,
//! the PSW in the run page, memory by logical addresses.

// A call on a vCPU that runs in another thread, and the PSW in the run page.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use vmm_sys_util::ioctl::ioctl_with_ref;

use super::bindings::{
    KVM_DEV_FLIC_CLEAR_IO_IRQ, KVM_DEV_FLIC_ENQUEUE, kvm_device_attr, kvm_run, kvm_s390_irq,
};
use super::requests::s390::KVM_S390_IRQ;
use super::{DeviceFd, VcpuFd};
use crate::exit::{AccessError, LogicalMemory};
use crate::hv::Interrupt;

fn irq(interrupt: &Interrupt) -> kvm_s390_irq {
    let mut irq = kvm_s390_irq {
        type_: interrupt.kind,
        ..Default::default()
    };
    irq.u.reserved = interrupt.data.map(|byte| byte as _);
    irq
}

/// KVM_S390_IRQ: makes `interrupt` pending on a vCPU.
pub fn inject(vcpu: &OwnedFd, interrupt: &Interrupt) -> io::Result<()> {
    let irq = irq(interrupt);
    // SAFETY: the call reads the structure and nothing else; it may be made
    // while the vCPU runs in its thread (kvm_arch_vcpu_async_ioctl).
    match unsafe { ioctl_with_ref(vcpu, KVM_S390_IRQ.host_code(), &irq) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn flic(devices: &[DeviceFd], group: u32, attr: u64, addr: u64) -> io::Result<()> {
    let flic = devices.first().ok_or(io::ErrorKind::NotFound)?;
    let attribute = kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr,
    };
    Ok(flic.set_device_attr(&attribute)?)
}

/// Makes a floating `interrupt` pending; the first of `devices` is the FLIC.
pub fn inject_floating(devices: &[DeviceFd], interrupt: &Interrupt) -> io::Result<()> {
    let irq = irq(interrupt);
    let size = size_of::<kvm_s390_irq>() as u64;
    flic(devices, KVM_DEV_FLIC_ENQUEUE, size, &raw const irq as u64)
}

/// Takes back the I/O interruptions of a subchannel.
pub fn withdraw(devices: &[DeviceFd], id: u32) -> io::Result<()> {
    let size = size_of::<u32>() as u64;
    flic(
        devices,
        KVM_DEV_FLIC_CLEAR_IO_IRQ,
        size,
        &raw const id as u64,
    )
}

/// The PSW in the run page.
///
/// # Safety
/// `run` is a vCPU's run page, and nothing else refers to its PSW for as long
/// as the reference lives.
pub unsafe fn psw(run: *mut kvm_run, _none: &mut [u64; 2]) -> &mut [u64; 2] {
    // SAFETY: the address follows the mask, both doublewords (the KVM API's
    // layout, which the tests of `abi` check); the caller keeps others away.
    unsafe { &mut *(&raw mut (*run).psw_mask).cast::<[u64; 2]>() }
}

/// A vCPU's memory by logical addresses.
#[derive(Debug)]
pub struct Logical<'a>(&'a VcpuFd);

/// The memory of `vcpu` by its logical addresses.
pub fn logical(vcpu: &VcpuFd) -> Logical<'_> {
    Logical(vcpu)
}

/// Without access the exception is pending.
fn explain(accessed: Result<bool, super::Error>) -> Result<(), AccessError> {
    match accessed {
        Ok(true) => Ok(()),
        Ok(false) => Err(AccessError::Injected),
        Err(errno) => Err(AccessError::Failed(errno.into())),
    }
}

impl LogicalMemory for Logical<'_> {
    fn read(&self, address: u64, space: u8, data: &mut [u8]) -> Result<(), AccessError> {
        explain(self.0.read_memory(space, address, data))
    }

    fn write(&self, address: u64, space: u8, data: &[u8]) -> Result<(), AccessError> {
        explain(self.0.write_memory(space, address, data))
    }
}
