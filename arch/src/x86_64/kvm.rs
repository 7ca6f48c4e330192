//! The machine on the host's KVM.

use std::fmt::Write;
use std::sync::OnceLock;

use crossvisor_vmm::arch::{Host, KvmArchitecture, KvmMachine, RegisterState};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::kvm::bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs,
    kvm_cpuid_entry2, kvm_dtable, kvm_fpu, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment,
};
use crossvisor_vmm::kvm::{Cap, DeviceFd, Kvm, VcpuFd, VmFd};

use super::{X86_64, X86Machine, caps, cpuid, gdt, layout};

/// Fast string operations: Linux warns when firmware has them off.
const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
/// Memory is write-back where no MTRR says otherwise, as firmware leaves it.
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Local vector table of the local APIC: LINT1, by register offset.
const APIC_LVT_LINT1: usize = 0x360;
/// Delivery mode NMI, not masked.
const APIC_LVT_NMI: u32 = 4 << 8;

/// x87 control word and MXCSR as FINIT and reset leave them.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// The architecture's KVM side.
pub(super) fn architecture() -> Option<&'static dyn KvmArchitecture> {
    Some(&X86_64)
}

/// The machine's KVM side.
pub(super) fn machine(machine: &X86Machine) -> Option<&dyn KvmMachine> {
    Some(machine)
}

/// An error of a KVM call.
fn failed(call: impl Into<String>) -> impl FnOnce(crossvisor_vmm::kvm::Error) -> Error {
    let call = call.into();
    move |errno| Error::io(call, errno)
}

impl KvmArchitecture for X86_64 {
    fn probe(&self, kvm: &Kvm) -> Result<Host> {
        let supported = supported(kvm)?;
        Ok(Host {
            page_size: rustix::param::page_size() as u64,
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            physical_bits: cpuid::physical_bits(&supported),
            capabilities: caps::probe(|number| {
                kvm.check_extension_raw(number.into()).max(0).into()
            }),
        })
    }
}

/// What KVM supports of the host's CPUID.
fn supported(kvm: &Kvm) -> Result<Vec<cpuid::Entry>> {
    let all = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    let entries = all.as_slice().iter().map(|entry| cpuid::Entry {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    });
    Ok(entries.collect())
}

/// What a machine remembers of KVM.
#[derive(Debug, Default)]
pub struct KvmSide {
    /// KVM_GET_SUPPORTED_CPUID's answer: it is the same for every vCPU, and
    /// takes KVM a while.
    supported: OnceLock<Vec<cpuid::Entry>>,
}

impl KvmSide {
    fn supported(&self) -> Result<&[cpuid::Entry]> {
        if let Some(supported) = self.supported.get() {
            return Ok(supported);
        }
        let kvm = Kvm::new().map_err(failed("/dev/kvm"))?;
        let found = supported(&kvm)?;
        Ok(self.supported.get_or_init(|| found))
    }
}

impl KvmMachine for X86Machine {
    fn vm_type(&self) -> u64 {
        0
    }

    fn create_controllers(&self, vm: &VmFd) -> Result<Vec<DeviceFd>> {
        if vm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.base)
                .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        }
        vm.set_tss_address(layout::KVM_TSS.base as usize)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        Ok(Vec::new())
    }

    fn init_vcpu(
        &self,
        vm: &VmFd,
        _controllers: &[DeviceFd],
        vcpu: &VcpuFd,
        index: u32,
    ) -> Result<()> {
        let topology = cpuid::Topology {
            cpus: self.plan.cpus,
            cpu: index,
        };
        let timing = cpuid::Timing {
            tsc_deadline: vm.check_extension(Cap::TscDeadlineTimer),
            // Not on every host; the leaf is then left out.
            tsc_khz: vcpu.get_tsc_khz().ok().filter(|khz| *khz != 0),
        };
        let entries = cpuid::guest(self.kvm.supported()?, &topology, &timing);
        set_cpuid(vcpu, &entries)
    }

    fn finish_controllers(&self, _vm: &VmFd) -> Result<Vec<DeviceFd>> {
        Ok(Vec::new())
    }

    fn start_vcpu(
        &self,
        vcpu: &mut VcpuFd,
        _index: u32,
        registers: Option<&RegisterState>,
    ) -> Result<()> {
        set_msrs(vcpu)?;
        set_fpu(vcpu)?;
        set_lapic(vcpu)?;
        let mp_state = match registers {
            Some(registers) => {
                set_registers(vcpu, registers)?;
                KVM_MP_STATE_RUNNABLE
            }
            None => KVM_MP_STATE_UNINITIALIZED,
        };
        vcpu.set_mp_state(kvm_mp_state { mp_state })
            .map_err(failed("KVM_SET_MP_STATE"))
    }

    fn dump_vcpu(&self, vcpu: &VcpuFd) -> String {
        dump(vcpu).unwrap_or_else(|error| error.to_string())
    }
}

fn set_cpuid(vcpu: &VcpuFd, entries: &[cpuid::Entry]) -> Result<()> {
    let entries: Vec<_> = entries
        .iter()
        .map(|entry| kvm_cpuid_entry2 {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Default::default()
        })
        .collect();
    let entries = CpuId::from_entries(&entries)
        .map_err(|error| Error::Boot(format!("internal error: CPUID: {error:?}")))?;
    vcpu.set_cpuid2(&entries).map_err(failed("KVM_SET_CPUID2"))
}

fn set_msrs(vcpu: &VcpuFd) -> Result<()> {
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let wanted = [
        msr(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        msr(IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    for entry in wanted {
        let entries = Msrs::from_entries(&[entry])
            .map_err(|error| Error::Boot(format!("internal error: MSRs: {error:?}")))?;
        // A KVM that does not know one of these runs without it.
        vcpu.set_msrs(&entries).map_err(failed("KVM_SET_MSRS"))?;
    }
    Ok(())
}

fn set_fpu(vcpu: &VcpuFd) -> Result<()> {
    let fpu = kvm_fpu {
        fcw: FPU_CONTROL,
        mxcsr: MXCSR,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(failed("KVM_SET_FPU"))
}

/// LINT1 is the NMI, as the MADT says. LINT0 stays masked: there are no 8259s
/// behind it.
fn set_lapic(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    let bytes = APIC_LVT_NMI.to_le_bytes();
    for (register, byte) in lapic.regs.iter_mut().skip(APIC_LVT_LINT1).zip(bytes) {
        *register = byte as _;
    }
    vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))
}

/// Everything that `registers` name; what they do not is as at reset.
fn set_registers(vcpu: &VcpuFd, registers: &RegisterState) -> Result<()> {
    let get = |name| registers.get(name).unwrap_or(0);
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    sregs.cs = segment(get("cs"));
    sregs.ds = segment(get("ds"));
    sregs.es = segment(get("es"));
    sregs.fs = segment(get("fs"));
    sregs.gs = segment(get("gs"));
    sregs.ss = segment(get("ss"));
    sregs.tr = segment(get("tr"));
    sregs.gdt = table(get("gdtr_base"), get("gdtr_limit"));
    sregs.idt = table(get("idtr_base"), get("idtr_limit"));
    sregs.cr0 = get("cr0");
    sregs.cr3 = get("cr3");
    sregs.cr4 = get("cr4");
    sregs.efer = get("efer");
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: get("rip"),
        rsp: get("rsp"),
        rbx: get("rbx"),
        rsi: get("rsi"),
        rflags: get("rflags"),
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

fn table(base: u64, limit: u64) -> kvm_dtable {
    kvm_dtable {
        base,
        limit: limit as u16,
        ..Default::default()
    }
}

fn segment(selector: u64) -> kvm_segment {
    let segment = gdt::segment(selector as u16);
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.kind,
        present: segment.present.into(),
        dpl: segment.dpl,
        db: segment.default_32.into(),
        s: segment.code_or_data.into(),
        l: segment.long.into(),
        g: segment.granularity.into(),
        avl: segment.available.into(),
        unusable: (!segment.present).into(),
        padding: 0,
    }
}

fn dump(vcpu: &VcpuFd) -> Result<String> {
    let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let mut text = String::new();
    let values = [
        ("rip", regs.rip),
        ("rsp", regs.rsp),
        ("rflags", regs.rflags),
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("efer", sregs.efer),
    ];
    for (name, value) in values {
        let space = if text.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = write!(text, "{space}{name}={value:#x}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use crossvisor_vmm::kvm::bindings;

    use super::*;

    /// The numbers that the pure table has are the KVM API's.
    #[test]
    fn capability_numbers() {
        let numbers = [
            ("KVM_CAP_USER_MEMORY", bindings::KVM_CAP_USER_MEMORY),
            ("KVM_CAP_EXT_CPUID", bindings::KVM_CAP_EXT_CPUID),
            ("KVM_CAP_IRQCHIP", bindings::KVM_CAP_IRQCHIP),
            ("KVM_CAP_IRQ_ROUTING", bindings::KVM_CAP_IRQ_ROUTING),
            ("KVM_CAP_IRQFD", bindings::KVM_CAP_IRQFD),
            ("KVM_CAP_IOEVENTFD", bindings::KVM_CAP_IOEVENTFD),
            ("KVM_CAP_MP_STATE", bindings::KVM_CAP_MP_STATE),
            ("KVM_CAP_SET_TSS_ADDR", bindings::KVM_CAP_SET_TSS_ADDR),
            (
                "KVM_CAP_SET_IDENTITY_MAP_ADDR",
                bindings::KVM_CAP_SET_IDENTITY_MAP_ADDR,
            ),
            ("KVM_CAP_IMMEDIATE_EXIT", bindings::KVM_CAP_IMMEDIATE_EXIT),
            (
                "KVM_CAP_TSC_DEADLINE_TIMER",
                bindings::KVM_CAP_TSC_DEADLINE_TIMER,
            ),
            ("KVM_CAP_CLOCKSOURCE", bindings::KVM_CAP_CLOCKSOURCE),
            ("KVM_CAP_GET_TSC_KHZ", bindings::KVM_CAP_GET_TSC_KHZ),
            ("KVM_CAP_SIGNAL_MSI", bindings::KVM_CAP_SIGNAL_MSI),
            ("KVM_CAP_PIT2", bindings::KVM_CAP_PIT2),
            ("KVM_CAP_X2APIC_API", bindings::KVM_CAP_X2APIC_API),
            ("KVM_CAP_READONLY_MEM", bindings::KVM_CAP_READONLY_MEM),
            ("KVM_CAP_NESTED_STATE", bindings::KVM_CAP_NESTED_STATE),
        ];
        let known: Vec<_> = caps::KNOWN
            .iter()
            .map(|known| (known.name, known.number))
            .collect();
        assert_eq!(known, numbers);
    }

    #[test]
    fn segments_say_whether_they_are_usable() {
        assert_eq!(segment(0).unusable, 1);
        let code = segment(gdt::CODE_64.into());
        assert_eq!((code.unusable, code.l, code.db), (0, 1, 0));
        assert_eq!((code.limit, code.type_, code.s), (u32::MAX, 0xb, 1));
    }
}
