//! The page that KVM shares with a vCPU's thread (KVM API, section 5).

use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::{Error, Result};
use crate::kvm::bindings::kvm_run;

/// The mapping of a vCPU's `struct kvm_run`.
#[derive(Debug)]
pub struct RunPage {
    page: NonNull<kvm_run>,
    size: usize,
}

// SAFETY: the mapping belongs to no thread. KVM writes to it during calls that
// run the vCPU or set its registers, for which it is borrowed mutably.
unsafe impl Send for RunPage {}

impl RunPage {
    /// Maps the first `size` bytes of `vcpu`: KVM_GET_VCPU_MMAP_SIZE.
    pub fn map(vcpu: &impl AsFd, size: usize) -> Result<Self> {
        if size < size_of::<kvm_run>() {
            return Err(Error::new(libc::EINVAL));
        }
        // SAFETY: a new mapping where the kernel finds room.
        let page = unsafe {
            mmap(
                ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                vcpu,
                0,
            )
        }
        .map_err(|errno| Error::new(errno.raw_os_error()))?;
        let page = NonNull::new(page.cast()).ok_or(Error::new(libc::ENOMEM))?;
        Ok(Self { page, size })
    }

    /// The structure.
    pub fn get(&self) -> &kvm_run {
        // SAFETY: the mapping is at least as large, lives as long as `self`,
        // and is written only by way of a mutable borrow.
        unsafe { self.page.as_ref() }
    }

    /// The structure, to be written.
    pub fn get_mut(&mut self) -> &mut kvm_run {
        // SAFETY: as above, and this borrow is the only one.
        unsafe { self.page.as_mut() }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: nothing borrows from the mapping any more. Unmapping what was
        // mapped does not fail.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), self.size) };
    }
}
