//! A VM's calls.

use std::fs::File;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use libc::c_ulong;
use vmm_sys_util::eventfd::EventFd;

use super::run_page::RunPage;
use super::{Cap, DeviceFd, Error, Result, VcpuFd};
use super::{call_mut, call_ref, call_value, requests};
use crate::kvm::bindings::*;

/// What an ioeventfd is attached to.
#[derive(Clone, Copy, Debug)]
pub enum IoEventAddress {
    /// A port.
    Pio(u64),
    /// A guest-physical address.
    Mmio(u64),
    /// A subchannel ID, for virtio-ccw's notify (DIAGNOSE 0x500, function 3):
    /// its writes are 8 bytes long, the index of the queue.
    Ccw(u32),
}

/// Any value that is written.
#[derive(Clone, Copy, Debug)]
pub struct NoDatamatch;

impl From<NoDatamatch> for u64 {
    fn from(_: NoDatamatch) -> u64 {
        0
    }
}

/// A VM.
#[derive(Debug)]
pub struct VmFd {
    vm: File,
    run_size: usize,
}

impl VmFd {
    pub(super) fn new(vm: File, run_size: usize) -> Self {
        Self { vm, run_size }
    }

    /// KVM_CHECK_EXTENSION of a number; 0 when KVM does not know it.
    pub fn check_extension_raw(&self, capability: c_ulong) -> i32 {
        call_value(self, requests::KVM_CHECK_EXTENSION, capability).unwrap_or(0)
    }

    /// KVM_CHECK_EXTENSION, for its value.
    pub fn check_extension_int(&self, capability: Cap) -> i32 {
        self.check_extension_raw(capability as c_ulong)
    }

    /// KVM_ENABLE_CAP.
    ///
    /// # Errors
    /// KVM refused.
    pub fn enable_cap(&self, capability: &kvm_enable_cap) -> Result<()> {
        call_ref(self, requests::KVM_ENABLE_CAP, capability).map(drop)
    }

    /// KVM_SET_USER_MEMORY_REGION.
    ///
    /// # Errors
    /// KVM refused.
    ///
    /// # Safety
    /// The kernel reads and writes the memory that `slot` names for as long as
    /// the VM lives, or until the slot is changed: it must stay mapped, and be
    /// nobody's references.
    pub unsafe fn set_user_memory_region(&self, slot: kvm_userspace_memory_region) -> Result<()> {
        call_ref(self, requests::KVM_SET_USER_MEMORY_REGION, &slot).map(drop)
    }

    /// KVM_CREATE_VCPU.
    ///
    /// # Errors
    /// KVM refused.
    pub fn create_vcpu(&self, id: u64) -> Result<VcpuFd> {
        let fd = call_value(self, requests::KVM_CREATE_VCPU, id)?;
        // SAFETY: the kernel has just made this descriptor for this call.
        let vcpu = unsafe { File::from_raw_fd(fd) };
        let page = RunPage::map(&vcpu, self.run_size)?;
        Ok(VcpuFd::new(vcpu, page))
    }

    /// KVM_CREATE_DEVICE. `None` is for a device that was only tested for
    /// (KVM_CREATE_DEVICE_TEST).
    fn make_device(&self, device: &mut kvm_create_device) -> Result<Option<DeviceFd>> {
        call_mut(self, requests::KVM_CREATE_DEVICE, device)?;
        if device.flags & KVM_CREATE_DEVICE_TEST != 0 {
            return Ok(None);
        }
        let fd = RawFd::try_from(device.fd).map_err(|_| Error::new(libc::EBADF))?;
        // SAFETY: the kernel has just made this descriptor for this call.
        Ok(Some(DeviceFd::new(unsafe { File::from_raw_fd(fd) })))
    }

    /// KVM_CREATE_DEVICE.
    ///
    /// # Errors
    /// KVM refused, or `device` asks only whether it would
    /// ([`offers_device`](Self::offers_device) does that).
    pub fn create_device(&self, device: &mut kvm_create_device) -> Result<DeviceFd> {
        self.make_device(device)?.ok_or(Error::new(libc::EINVAL))
    }

    /// Whether KVM_CREATE_DEVICE would make a device of this type.
    pub fn offers_device(&self, kind: u32) -> bool {
        let mut device = kvm_create_device {
            type_: kind,
            fd: 0,
            flags: KVM_CREATE_DEVICE_TEST,
        };
        self.make_device(&mut device).is_ok()
    }

    /// KVM_HAS_DEVICE_ATTR.
    ///
    /// # Errors
    /// The VM does not have the attribute.
    pub fn has_device_attr(&self, attribute: &kvm_device_attr) -> Result<()> {
        call_ref(self, requests::KVM_HAS_DEVICE_ATTR, attribute).map(drop)
    }

    /// KVM_SET_DEVICE_ATTR.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_device_attr(&self, attribute: &kvm_device_attr) -> Result<()> {
        call_ref(self, requests::KVM_SET_DEVICE_ATTR, attribute).map(drop)
    }

    /// KVM_GET_DEVICE_ATTR.
    ///
    /// # Errors
    /// KVM refused.
    ///
    /// # Safety
    /// The kernel writes the attribute to the address in `attribute`: that
    /// memory must be the caller's to be written, and large enough.
    pub unsafe fn get_device_attr(&self, attribute: &mut kvm_device_attr) -> Result<()> {
        call_mut(self, requests::KVM_GET_DEVICE_ATTR, attribute).map(drop)
    }

    /// KVM_IRQ_LINE.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_irq_line(&self, irq: u32, active: bool) -> Result<()> {
        let mut level = kvm_irq_level {
            level: active.into(),
            ..Default::default()
        };
        level.__bindgen_anon_1.irq = irq;
        call_ref(self, requests::KVM_IRQ_LINE, &level).map(drop)
    }

    /// KVM_SET_GSI_ROUTING.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_gsi_routing(&self, table: &KvmIrqRouting) -> Result<()> {
        // The header's count says how many entries follow it, and the wrapper
        // holds so many.
        let header = table.as_fam_struct_ref();
        call_ref(self, requests::KVM_SET_GSI_ROUTING, header).map(drop)
    }

    fn irqfd(&self, fd: &EventFd, gsi: u32, flags: u32) -> Result<()> {
        let irqfd = kvm_irqfd {
            fd: fd.as_raw_fd() as u32,
            gsi,
            flags,
            ..Default::default()
        };
        call_ref(self, requests::KVM_IRQFD, &irqfd).map(drop)
    }

    /// KVM_IRQFD.
    ///
    /// # Errors
    /// KVM refused.
    pub fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.irqfd(fd, gsi, 0)
    }

    /// KVM_IRQFD, undone.
    ///
    /// # Errors
    /// KVM refused.
    pub fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.irqfd(fd, gsi, KVM_IRQFD_FLAG_DEASSIGN)
    }

    fn ioeventfd<T: Into<u64>>(
        &self,
        fd: &EventFd,
        address: &IoEventAddress,
        datamatch: T,
        mut flags: u32,
    ) -> Result<()> {
        let length = size_of::<T>();
        if length > 0 {
            flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
        }
        let (addr, kind, len) = match *address {
            IoEventAddress::Pio(port) => (port, 1 << kvm_ioeventfd_flag_nr_pio, length),
            IoEventAddress::Mmio(address) => (address, 0, length),
            IoEventAddress::Ccw(subchannel) => {
                let kind = 1 << kvm_ioeventfd_flag_nr_virtio_ccw_notify;
                (subchannel.into(), kind, size_of::<u64>())
            }
        };
        let event = kvm_ioeventfd {
            datamatch: datamatch.into(),
            addr,
            len: len as u32,
            fd: fd.as_raw_fd(),
            flags: flags | kind,
            ..Default::default()
        };
        call_ref(self, requests::KVM_IOEVENTFD, &event).map(drop)
    }

    /// KVM_IOEVENTFD. The type of `datamatch` gives the length of the writes.
    ///
    /// # Errors
    /// KVM refused.
    pub fn register_ioevent<T: Into<u64>>(
        &self,
        fd: &EventFd,
        address: &IoEventAddress,
        datamatch: T,
    ) -> Result<()> {
        self.ioeventfd(fd, address, datamatch, 0)
    }

    /// KVM_IOEVENTFD, undone.
    ///
    /// # Errors
    /// KVM refused.
    pub fn unregister_ioevent<T: Into<u64>>(
        &self,
        fd: &EventFd,
        address: &IoEventAddress,
        datamatch: T,
    ) -> Result<()> {
        let flags = 1 << kvm_ioeventfd_flag_nr_deassign;
        self.ioeventfd(fd, address, datamatch, flags)
    }
}

impl AsRawFd for VmFd {
    fn as_raw_fd(&self) -> RawFd {
        self.vm.as_raw_fd()
    }
}
