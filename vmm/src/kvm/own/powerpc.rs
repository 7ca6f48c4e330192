//! Calls that only powerpc has.

use super::{Error, Result, VmFd, call_mut, call_ref, get, requests};
use crate::kvm::bindings::*;

impl VmFd {
    /// KVM_PPC_GET_RMMU_INFO: what the radix MMU offers.
    ///
    /// # Errors
    /// KVM has no radix guests.
    pub fn get_rmmu_info(&self) -> Result<kvm_ppc_rmmu_info> {
        get(self, requests::KVM_PPC_GET_RMMU_INFO)
    }

    /// KVM_PPC_CONFIGURE_V3_MMU: radix or hash, and the process table.
    ///
    /// # Errors
    /// KVM refused.
    pub fn configure_v3_mmu(&self, configuration: &kvm_ppc_mmuv3_cfg) -> Result<()> {
        call_ref(self, requests::KVM_PPC_CONFIGURE_V3_MMU, configuration).map(drop)
    }

    /// KVM_PPC_ALLOCATE_HTAB: a hash table of 2 to the `order` bytes, empty.
    ///
    /// # Errors
    /// KVM has no hash guests, or not so much contiguous memory.
    pub fn allocate_htab(&self, order: u32) -> Result<()> {
        let mut order = order;
        call_mut(self, requests::KVM_PPC_ALLOCATE_HTAB, &mut order).map(drop)
    }

    /// KVM_PPC_RTAS_DEFINE_TOKEN: has the kernel handle the RTAS call `name`
    /// (`ibm,set-xive` and its like) under `token`; 0 takes it back.
    ///
    /// # Errors
    /// The kernel does not handle such a call.
    pub fn define_rtas_token(&self, name: &str, token: u64) -> Result<()> {
        let mut arguments = kvm_rtas_token_args {
            token,
            ..Default::default()
        };
        // The last byte stays NUL.
        if name.len() >= arguments.name.len() {
            return Err(Error::new(libc::EINVAL));
        }
        for (to, from) in arguments.name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        call_ref(self, requests::KVM_PPC_RTAS_DEFINE_TOKEN, &arguments).map(drop)
    }

    /// KVM_PPC_GET_CPU_CHAR: mitigations, for H_GET_CPU_CHARACTERISTICS.
    ///
    /// # Errors
    /// KVM does not know.
    pub fn get_cpu_char(&self) -> Result<kvm_ppc_cpu_char> {
        get(self, requests::KVM_PPC_GET_CPU_CHAR)
    }
}
