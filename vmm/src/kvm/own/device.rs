//! Devices that KVM emulates (KVM API, section 4.79).

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use super::{Result, call_ref, requests};
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
}

impl AsRawFd for DeviceFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
