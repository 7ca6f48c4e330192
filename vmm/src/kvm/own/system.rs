//! /dev/kvm.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use libc::c_ulong;

use super::{Cap, Error, Result, VmFd, call, call_value, requests};

/// What KVM says of itself without a VM.
#[derive(Debug)]
pub struct Kvm(File);

impl Kvm {
    /// Opens /dev/kvm.
    ///
    /// # Errors
    /// It is not there, or there is no permission.
    pub fn new() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        file.map(Self)
            .map_err(|error| Error::new(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    /// KVM_GET_API_VERSION; -1 when the call fails.
    pub fn get_api_version(&self) -> i32 {
        call(self, requests::KVM_GET_API_VERSION).unwrap_or(-1)
    }

    /// KVM_CHECK_EXTENSION of a number; 0 when KVM does not know it.
    pub fn check_extension_raw(&self, capability: c_ulong) -> i32 {
        call_value(self, requests::KVM_CHECK_EXTENSION, capability).unwrap_or(0)
    }

    /// KVM_CHECK_EXTENSION, for its value.
    pub fn check_extension_int(&self, capability: Cap) -> i32 {
        self.check_extension_raw(capability as c_ulong)
    }

    /// The most vCPUs of a VM.
    pub fn get_max_vcpus(&self) -> usize {
        let most = self.check_extension_int(Cap::MaxVcpus);
        let most = if most > 0 {
            most
        } else {
            self.check_extension_int(Cap::NrVcpus)
        };
        // The KVM API, section 4.4, says 4 where neither is there.
        usize::try_from(most)
            .ok()
            .filter(|most| *most > 0)
            .unwrap_or(4)
    }

    /// The size of a vCPU's mapping, in bytes.
    ///
    /// # Errors
    /// KVM does not answer.
    pub fn get_vcpu_mmap_size(&self) -> Result<usize> {
        call(self, requests::KVM_GET_VCPU_MMAP_SIZE).map(|size| size as usize)
    }

    /// KVM_CREATE_VM of the default type.
    ///
    /// # Errors
    /// KVM refused.
    pub fn create_vm(&self) -> Result<VmFd> {
        self.create_vm_with_type(0)
    }

    /// KVM_CREATE_VM.
    ///
    /// # Errors
    /// KVM refused. On s390x EINVAL says that this program's page tables have
    /// no room for the guest's storage keys: it was not linked with
    /// `--s390-pgste`, and the setting vm.allocate_pgste is 0.
    pub fn create_vm_with_type(&self, kind: u64) -> Result<VmFd> {
        let fd = call_value(self, requests::KVM_CREATE_VM, kind)?;
        // SAFETY: the kernel has just made this descriptor for this call.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(VmFd::new(file, self.get_vcpu_mmap_size()?))
    }
}

impl AsRawFd for Kvm {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
