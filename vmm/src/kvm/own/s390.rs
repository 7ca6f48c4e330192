//! Calls that only s390 has.

use super::{Error, Result, VcpuFd, VmFd, call, call_ref, requests};
use crate::exit::SYNC_REGS_SIZE;
use crate::kvm::bindings::*;

fn attribute(group: u32, attr: u32, addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group,
        attr: attr.into(),
        addr,
    }
}

impl VmFd {
    /// Reads an attribute whose structure is `T`.
    fn attribute<T: Default>(&self, group: u32, attr: u32) -> Result<T> {
        let mut value = T::default();
        let mut wanted = attribute(group, attr, &raw mut value as u64);
        // SAFETY: the callers below name a `T` that is what the kernel writes
        // for this attribute (KVM API, Documentation/virt/kvm/devices/vm.rst).
        unsafe { self.get_device_attr(&mut wanted) }?;
        Ok(value)
    }

    /// KVM_S390_VM_CPU_MACHINE: the host's CPU and the facilities that KVM can
    /// give to guests.
    ///
    /// # Errors
    /// KVM refused.
    pub fn cpu_machine(&self) -> Result<kvm_s390_vm_cpu_machine> {
        self.attribute(KVM_S390_VM_CPU_MODEL, KVM_S390_VM_CPU_MACHINE)
    }

    /// KVM_S390_VM_CPU_PROCESSOR: the guest's CPU.
    ///
    /// # Errors
    /// KVM refused.
    pub fn cpu_processor(&self) -> Result<kvm_s390_vm_cpu_processor> {
        self.attribute(KVM_S390_VM_CPU_MODEL, KVM_S390_VM_CPU_PROCESSOR)
    }

    /// Sets the guest's CPU, before there are vCPUs.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_cpu_processor(&self, cpu: &kvm_s390_vm_cpu_processor) -> Result<()> {
        let address = &raw const *cpu as u64;
        self.set_device_attr(&attribute(
            KVM_S390_VM_CPU_MODEL,
            KVM_S390_VM_CPU_PROCESSOR,
            address,
        ))
    }

    /// KVM_S390_VM_MEM_LIMIT_SIZE: the most guest memory, in bytes.
    ///
    /// # Errors
    /// KVM refused.
    pub fn memory_limit(&self) -> Result<u64> {
        self.attribute(KVM_S390_VM_MEM_CTRL, KVM_S390_VM_MEM_LIMIT_SIZE)
    }

    /// KVM_S390_SET_SKEYS: the storage keys of the pages from number `first`
    /// on. The first such call has KVM use storage keys, and makes the guest's
    /// memory present.
    ///
    /// # Errors
    /// No such memory, or a key that is none.
    pub fn set_storage_keys(&self, first: u64, keys: &[u8]) -> Result<()> {
        let arguments = kvm_s390_skeys {
            start_gfn: first,
            count: keys.len() as u64,
            skeydata_addr: keys.as_ptr() as u64,
            ..Default::default()
        };
        call_ref(self, requests::KVM_S390_SET_SKEYS, &arguments).map(drop)
    }
}

impl VcpuFd {
    /// The PSW, as the run page has it: mask and address.
    pub fn psw(&self) -> (u64, u64) {
        let run = self.kvm_run();
        (run.psw_mask, run.psw_addr)
    }

    /// Sets the PSW with which the vCPU runs on.
    pub fn set_psw(&mut self, mask: u64, address: u64) {
        let run = self.get_kvm_run();
        run.psw_mask = mask;
        run.psw_addr = address;
    }

    /// The registers that the run page has (KVM API, `kvm_sync_regs`), by their
    /// bytes.
    pub fn sync_regs(&mut self) -> &mut [u8; SYNC_REGS_SIZE] {
        let regs = &raw mut self.get_kvm_run().s;
        // SAFETY: the union is as large as its padding, these bytes, and any bit
        // pattern is valid in it; the borrow is that of the page.
        unsafe { &mut *regs.cast() }
    }

    /// KVM_S390_INITIAL_RESET.
    ///
    /// # Errors
    /// KVM refused.
    pub fn initial_reset(&mut self) -> Result<()> {
        call(self, requests::KVM_S390_INITIAL_RESET).map(drop)
    }

    fn memory_operation(
        &self,
        kind: u32,
        space: u8,
        address: u64,
        buffer: u64,
        size: usize,
    ) -> Result<bool> {
        let mut operation = kvm_s390_mem_op {
            gaddr: address,
            flags: KVM_S390_MEMOP_F_INJECT_EXCEPTION.into(),
            size: u32::try_from(size).map_err(|_| Error::new(libc::EINVAL))?,
            op: kind,
            buf: buffer,
            ..Default::default()
        };
        operation.__bindgen_anon_1.__bindgen_anon_1.ar = space;
        // A program interruption code is the guest's mistake.
        Ok(call_ref(self, requests::KVM_S390_MEM_OP, &operation)? == 0)
    }

    /// KVM_S390_MEM_OP: reads from a logical address, as the PSW has it, of the
    /// space that access register `space` names in access-register mode. False
    /// when the vCPU has no access there: the exception is pending.
    ///
    /// # Errors
    /// KVM refused, or cannot reach the memory behind (EFAULT).
    pub fn read_memory(&self, space: u8, address: u64, to: &mut [u8]) -> Result<bool> {
        let (buffer, size) = (to.as_mut_ptr() as u64, to.len());
        self.memory_operation(KVM_S390_MEMOP_LOGICAL_READ, space, address, buffer, size)
    }

    /// KVM_S390_MEM_OP: writes to a logical address; as
    /// [`read_memory`](Self::read_memory).
    ///
    /// # Errors
    /// As for that.
    pub fn write_memory(&self, space: u8, address: u64, from: &[u8]) -> Result<bool> {
        let (buffer, size) = (from.as_ptr() as u64, from.len());
        self.memory_operation(KVM_S390_MEMOP_LOGICAL_WRITE, space, address, buffer, size)
    }
}
