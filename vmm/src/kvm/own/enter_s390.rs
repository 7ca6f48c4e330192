//! KVM_RUN on s390.

use std::os::fd::AsRawFd;

use super::{Result, call, requests};

/// Runs a vCPU until it exits.
pub fn run(vcpu: &impl AsRawFd) -> Result<()> {
    call(vcpu, requests::KVM_RUN).map(drop)
}
