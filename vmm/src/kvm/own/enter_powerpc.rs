//! KVM_RUN on powerpc64, which may lose vector registers.
//!
//! v31 was seen zeroed after up to 6 in 20,000 calls, and often after none (Linux
//! 6.12, nested KVM-HV). A C library's ioctl does not save v20-v31, for a function's
//! callee preserves them and the kernel's system calls do too; so a value that the
//! compiler keeps there would be lost. Here the compiler is told that the call
//! destroys them.

use std::arch::asm;
use std::os::fd::AsRawFd;

use super::{Error, Result, requests};

/// Runs a vCPU until it exits.
pub fn run(vcpu: &impl AsRawFd) -> Result<()> {
    match ioctl(vcpu.as_raw_fd(), requests::KVM_RUN.host_code()) {
        0.. => Ok(()),
        errno => Err(Error::new(errno.unsigned_abs() as i32)),
    }
}

/// The system call ioctl without an argument; after it no vector register holds
/// what it held. Returns a negative error number, or what the call returns.
fn ioctl(fd: i32, request: u64) -> i64 {
    let result;
    // SAFETY: KVM_RUN takes no pointer; what it writes is the run page, which
    // only the vCPU's owner reads, after this. The summary overflow bit of CR0
    // tells an error (Linux Documentation/arch/powerpc/syscall64-abi.rst). All
    // that a call in C may change is marked as changed, and v20-v31 besides.
    unsafe {
        asm!(
            "sc",
            "bns+ 2f",
            "neg 3, 3",
            "2:",
            inlateout("r0") libc::SYS_ioctl => _,
            inlateout("r3") i64::from(fd) => result,
            inlateout("r4") request => _,
            inlateout("r5") 0_u64 => _,
            out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            clobber_abi("C"),
            options(nostack),
        );
    }
    result
}
