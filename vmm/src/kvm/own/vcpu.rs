//! A vCPU's calls.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use super::run_page::RunPage;
use super::{Error, Result, call_mut, call_ref, enter, get, requests};
use crate::kvm::bindings::*;

/// Why a vCPU left the guest. What only one architecture knows is read from the
/// run page ([`VcpuFd::get_kvm_run`]).
#[derive(Debug)]
pub enum VcpuExit<'a> {
    /// KVM_EXIT_IO, in: port and bytes to fill.
    IoIn(u16, &'a mut [u8]),
    /// KVM_EXIT_IO, out: port and bytes.
    IoOut(u16, &'a [u8]),
    /// KVM_EXIT_MMIO, a load: address and bytes to fill.
    MmioRead(u64, &'a mut [u8]),
    /// KVM_EXIT_MMIO, a store: address and bytes.
    MmioWrite(u64, &'a [u8]),
    /// KVM_EXIT_HLT.
    Hlt,
    /// KVM_EXIT_SHUTDOWN.
    Shutdown,
    /// KVM_EXIT_FAIL_ENTRY: the hardware's reason and processor.
    FailEntry(u64, u32),
    /// KVM_EXIT_INTR.
    Intr,
    /// KVM_EXIT_SYSTEM_EVENT: type and data.
    SystemEvent(u32, &'a [u64]),
    /// Any other reason.
    Unsupported(u32),
}

/// A vCPU.
#[derive(Debug)]
pub struct VcpuFd {
    vcpu: File,
    page: RunPage,
}

impl VcpuFd {
    pub(super) fn new(vcpu: File, page: RunPage) -> Self {
        Self { vcpu, page }
    }

    /// KVM_RUN.
    ///
    /// # Errors
    /// EINTR after a signal or with `immediate_exit`; anything else says that
    /// KVM cannot run the vCPU.
    pub fn run(&mut self) -> Result<VcpuExit<'_>> {
        enter::run(&self.vcpu)?;
        let run = self.page.get_mut();
        let exit = &mut run.__bindgen_anon_1;
        // SAFETY (all blocks of this match): the exit's reason says which member
        // of the union KVM filled in, and any bits are a valid value of each.
        Ok(match run.exit_reason {
            KVM_EXIT_MMIO => {
                // SAFETY: as above.
                let mmio = unsafe { &mut exit.mmio };
                let most = mmio.data.len();
                let data = &mut mmio.data[..most.min(mmio.len as usize)];
                match mmio.is_write {
                    0 => VcpuExit::MmioRead(mmio.phys_addr, data),
                    _ => VcpuExit::MmioWrite(mmio.phys_addr, data),
                }
            }
            KVM_EXIT_HLT => VcpuExit::Hlt,
            KVM_EXIT_SHUTDOWN => VcpuExit::Shutdown,
            KVM_EXIT_INTR => VcpuExit::Intr,
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let fail = unsafe { exit.fail_entry };
                VcpuExit::FailEntry(fail.hardware_entry_failure_reason, fail.cpu)
            }
            KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: as above.
                let event = unsafe { &exit.system_event };
                // SAFETY: as above.
                let data = unsafe { &event.__bindgen_anon_1.data };
                let data = &data[..data.len().min(event.ndata as usize)];
                VcpuExit::SystemEvent(event.type_, data)
            }
            reason => VcpuExit::Unsupported(reason),
        })
    }

    /// The run page, to be written.
    pub fn get_kvm_run(&mut self) -> &mut kvm_run {
        self.page.get_mut()
    }

    /// The run page as KVM left it.
    pub fn kvm_run(&self) -> &kvm_run {
        self.page.get()
    }

    /// Whether the next [`run`](Self::run) returns at once (KVM_CAP_IMMEDIATE_EXIT).
    pub fn set_kvm_immediate_exit(&mut self, value: u8) {
        self.page.get_mut().immediate_exit = value;
    }

    /// KVM_GET_REGS.
    ///
    /// # Errors
    /// KVM refused.
    pub fn get_regs(&self) -> Result<kvm_regs> {
        get(self, requests::KVM_GET_REGS)
    }

    /// KVM_SET_REGS.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_regs(&mut self, registers: &kvm_regs) -> Result<()> {
        call_ref(self, requests::KVM_SET_REGS, registers).map(drop)
    }

    /// KVM_GET_SREGS.
    ///
    /// # Errors
    /// KVM refused.
    pub fn get_sregs(&self) -> Result<kvm_sregs> {
        get(self, requests::KVM_GET_SREGS)
    }

    /// KVM_GET_ONE_REG: the register's value in `data`, in the host's byte
    /// order. Returns its size in bytes.
    ///
    /// # Errors
    /// `data` is shorter than the register, or KVM does not know it.
    pub fn get_one_reg(&self, id: u64, data: &mut [u8]) -> Result<usize> {
        let size = register_size(id, data.len())?;
        let mut register = kvm_one_reg {
            id,
            addr: data.as_mut_ptr() as u64,
        };
        // The kernel writes as many bytes as the register's ID says.
        call_mut(self, requests::KVM_GET_ONE_REG, &mut register)?;
        Ok(size)
    }

    /// KVM_SET_ONE_REG. Returns the register's size in bytes.
    ///
    /// # Errors
    /// `data` is shorter than the register, or KVM refused.
    pub fn set_one_reg(&self, id: u64, data: &[u8]) -> Result<usize> {
        let size = register_size(id, data.len())?;
        let register = kvm_one_reg {
            id,
            addr: data.as_ptr() as u64,
        };
        call_ref(self, requests::KVM_SET_ONE_REG, &register)?;
        Ok(size)
    }

    /// KVM_SET_MP_STATE.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_mp_state(&self, state: kvm_mp_state) -> Result<()> {
        call_ref(self, requests::KVM_SET_MP_STATE, &state).map(drop)
    }

    /// KVM_ENABLE_CAP.
    ///
    /// # Errors
    /// KVM refused.
    pub fn enable_cap(&self, capability: &kvm_enable_cap) -> Result<()> {
        call_ref(self, requests::KVM_ENABLE_CAP, capability).map(drop)
    }
}

/// The size of register `id`, which must fit into `room` bytes.
fn register_size(id: u64, room: usize) -> Result<usize> {
    let size = 1_usize << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT);
    match size <= room {
        true => Ok(size),
        false => Err(Error::new(libc::EINVAL)),
    }
}

impl AsRawFd for VcpuFd {
    fn as_raw_fd(&self) -> RawFd {
        self.vcpu.as_raw_fd()
    }
}
