//! A guest that only makes hypercalls, run with known values in v20-v31: a
//! function in C preserves those (64-Bit ELF V2 ABI, section 2.2.1.1).

// Registers are set and looked at around a call, and KVM is called.
#![allow(unsafe_code)]

use std::arch::asm;
use std::os::fd::AsRawFd;

use crossvisor_vmm::kvm::bindings::{
    KVM_CAP_PPC_PAPR, KVM_EXIT_PAPR_HCALL, KVM_VM_PPC_HV, kvm_enable_cap, kvm_regs,
    kvm_userspace_memory_region,
};
use crossvisor_vmm::kvm::{VcpuFd, VmFd, open, requests};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::Losses;
use crate::check::{At, Result, ensure};

/// v20 to v31.
const REGISTERS: usize = 12;

/// The guest's RAM in bytes, and where in it its code is.
const RAM: usize = 1 << 20;
const CODE: u64 = 0x1000;

/// Makes hypercall 0xf000, which KVM hands on, for ever (Power ISA 3.0, Book I):
/// li r3,0; ori r3,r3,0xf000; sc 1; b to the first.
const HYPERCALLS: [u32; 4] = [0x3860_0000, 0x6063_f000, 0x4400_0022, 0x4bff_fff4];

/// 64-bit, big-endian, without translation, with floating point, vector and
/// vector-scalar registers, as kernels run.
const MSR: u64 = 1 << 63 | 1 << 25 | 1 << 23 | 1 << 13 | 1 << 12;

/// Runs the guest's vCPU until its next hypercall; 0, or a negative error number.
type Run = extern "C" fn(*mut VcpuFd) -> i64;

/// What is to outlive the vCPU.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Guest {
    fn new() -> Result<Self> {
        let kvm = open().at("KVM")?;
        let vm = kvm.create_vm_with_type(KVM_VM_PPC_HV.into());
        let vm = vm.at("KVM_CREATE_VM")?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).at("memory")?;
        let code = HYPERCALLS.map(u32::to_be_bytes);
        let code = code.as_flattened();
        memory.write_slice(code, GuestAddress(CODE)).at("memory")?;
        let host = memory.get_host_address(GuestAddress(0)).at("memory")?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: it is the whole of a mapping that `Guest` holds for longer
        // than the VM.
        unsafe { vm.set_user_memory_region(slot) }.at("KVM_SET_USER_MEMORY_REGION")?;
        let mut vcpu = vm.create_vcpu(0).at("KVM_CREATE_VCPU")?;
        let papr = kvm_enable_cap {
            cap: KVM_CAP_PPC_PAPR,
            ..Default::default()
        };
        vcpu.enable_cap(&papr).at("KVM_CAP_PPC_PAPR")?;
        let registers = kvm_regs {
            pc: CODE,
            msr: MSR,
            ..Default::default()
        };
        vcpu.set_regs(&registers).at("KVM_SET_REGS")?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    /// How many of `runs` by `run` lost a register.
    fn losses(&mut self, runs: u32, run: Run) -> Result<u32> {
        let mut losses = 0;
        for _ in 0..runs {
            let (returned, found) = watched(run, &mut self.vcpu);
            let reason = self.vcpu.kvm_run().exit_reason;
            ensure(returned == 0 && reason == KVM_EXIT_PAPR_HCALL, || {
                format!("KVM_RUN returned {returned}, and left for reason {reason}")
            })?;
            losses += u32::from(found != wanted());
        }
        Ok(losses)
    }
}

/// Looks at so many runs of each kind.
pub fn losses(runs: u32) -> Result<Losses> {
    let mut guest = Guest::new()?;
    Ok(Losses {
        bare: guest.losses(runs, bare)?,
        guarded: guest.losses(runs, guarded)?,
    })
}

/// As a C library calls ioctl.
extern "C" fn bare(vcpu: *mut VcpuFd) -> i64 {
    // SAFETY: `watched` hands over what it borrows.
    let fd = unsafe { &*vcpu }.as_raw_fd();
    let result;
    // SAFETY: KVM_RUN takes no pointer; what it writes is the run page, which is
    // read after it. What a call in C may change is marked as changed; the
    // error is told by the summary overflow bit of CR0.
    unsafe {
        asm!(
            "sc",
            "bns+ 2f",
            "neg 3, 3",
            "2:",
            // The number of ioctl (arch/powerpc/kernel/syscalls/syscall.tbl).
            inlateout("r0") 54_u64 => _,
            inlateout("r3") i64::from(fd) => result,
            inlateout("r4") requests::powerpc::KVM_RUN.host_code() => _,
            inlateout("r5") 0_u64 => _,
            clobber_abi("C"),
            options(nostack),
        );
    }
    result
}

/// As crossvisor does.
extern "C" fn guarded(vcpu: *mut VcpuFd) -> i64 {
    // SAFETY: `watched` hands over what it borrows.
    match unsafe { &mut *vcpu }.run() {
        Ok(_) => 0,
        Err(errno) => -i64::from(errno.errno()),
    }
}

#[repr(C, align(16))]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Registers([[u8; 16]; REGISTERS]);

/// What [`watched`] puts into v20 and on: 1, 2, 3 and so on in every byte.
fn wanted() -> Registers {
    Registers(std::array::from_fn(|index| [index as u8 + 1; 16]))
}

/// What `run` returns, and what v20-v31 hold after it.
fn watched(run: Run, vcpu: &mut VcpuFd) -> (i64, Registers) {
    let mut found = Registers::default();
    let returned: i64;
    // SAFETY: a call in C by the ELF V2 ABI: the function's address in r12, a
    // stack frame with room for what it saves, the TOC pointer put back. `run`
    // has the pointer only during the call. `found` has room for what is stored,
    // at an address that r14 keeps over the call, and is aligned for it. What
    // changes is marked as changed.
    unsafe {
        asm!(
            "vspltisb 20, 1", "vspltisb 21, 2", "vspltisb 22, 3", "vspltisb 23, 4",
            "vspltisb 24, 5", "vspltisb 25, 6", "vspltisb 26, 7", "vspltisb 27, 8",
            "vspltisb 28, 9", "vspltisb 29, 10", "vspltisb 30, 11", "vspltisb 31, 12",
            "stdu 1, -64(1)",
            "std 2, 24(1)",
            "mtctr 12",
            "bctrl",
            "ld 2, 24(1)",
            "addi 1, 1, 64",
            "stvx 20, 0, 14", "addi 14, 14, 16", "stvx 21, 0, 14", "addi 14, 14, 16",
            "stvx 22, 0, 14", "addi 14, 14, 16", "stvx 23, 0, 14", "addi 14, 14, 16",
            "stvx 24, 0, 14", "addi 14, 14, 16", "stvx 25, 0, 14", "addi 14, 14, 16",
            "stvx 26, 0, 14", "addi 14, 14, 16", "stvx 27, 0, 14", "addi 14, 14, 16",
            "stvx 28, 0, 14", "addi 14, 14, 16", "stvx 29, 0, 14", "addi 14, 14, 16",
            "stvx 30, 0, 14", "addi 14, 14, 16", "stvx 31, 0, 14",
            inlateout("r3") &raw mut *vcpu => returned,
            inlateout("r12") run => _,
            inlateout("r14") &raw mut found => _,
            out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            clobber_abi("C"),
        );
    }
    (returned, found)
}
