//! Devices that KVM emulates (KVM API, section 4.79).

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use super::{Result, call_mut, call_ref, requests};
use crate::kvm::bindings::kvm_device_attr;

/// A device in the kernel.
#[derive(Debug)]
pub struct DeviceFd(File);

impl DeviceFd {
    pub(super) fn new(file: File) -> Self {
        Self(file)
    }

    /// KVM_HAS_DEVICE_ATTR.
    ///
    /// # Errors
    /// The device does not have the attribute.
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

    /// KVM_GET_DEVICE_ATTR. Some attributes return a value, such as a length.
    ///
    /// # Errors
    /// KVM refused.
    ///
    /// # Safety
    /// The kernel writes the attribute to the address in `attribute`: that
    /// memory must be the caller's to be written, and large enough.
    pub unsafe fn get_device_attr(&self, attribute: &mut kvm_device_attr) -> Result<i32> {
        call_mut(self, requests::KVM_GET_DEVICE_ATTR, attribute)
    }
}

impl AsRawFd for DeviceFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
