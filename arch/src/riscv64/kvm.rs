//! The KVM side: probing the host, vCPU registers, and the interrupt controller
//! that KVM emulates (include/uapi `asm/kvm.h`, KVM_DEV_RISCV_AIA_*).

use crossvisor_vmm::arch::{Host, KvmArchitecture, KvmMachine, RegisterState};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::kvm::bindings::{
    KVM_DEV_RISCV_AIA_ADDR_APLIC, KVM_DEV_RISCV_AIA_CONFIG_HART_BITS, KVM_DEV_RISCV_AIA_CONFIG_IDS,
    KVM_DEV_RISCV_AIA_CONFIG_SRCS, KVM_DEV_RISCV_AIA_CTRL_INIT, KVM_DEV_RISCV_AIA_GRP_ADDR,
    KVM_DEV_RISCV_AIA_GRP_CONFIG, KVM_DEV_RISCV_AIA_GRP_CTRL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_RISCV_AIA,
};
use crossvisor_vmm::kvm::{self, Cap, DeviceFd, Kvm, VcpuFd, VmFd};

use super::irqchip::Irqchip;
use super::{Riscv64, Riscv64Machine, host, isa, layout, registers};

/// KVM_CAP_VM_GPA_BITS.
const CAP_VM_GPA_BITS: u64 = 207;
/// The guest-physical address width where KVM does not tell: that of Sv39x4,
/// which every KVM has.
const DEFAULT_GPA_BITS: u32 = 41;

/// Message numbers that a vCPU is given, the first that the host's IMSICs have:
/// one less than a multiple of 64 (KVM_DEV_RISCV_AIA_IDS_MIN), and at least one
/// for each wire.
const AIA_IDS: [u32; 2] = [255, 127];

impl KvmArchitecture for Riscv64 {
    fn probe(&self, kvm: &Kvm) -> Result<Host> {
        let vm = kvm
            .create_vm()
            .map_err(|errno| Error::io("KVM_CREATE_VM", errno))?;
        let vcpu = vm
            .create_vcpu(0)
            .map_err(|errno| Error::io("KVM_CREATE_VCPU", errno))?;
        let aia_ids = probe_aia(&vm);
        let register = |id| get_register(&vcpu, id).ok();
        let value = |id| register(id).and_then(|value| i64::try_from(value).ok());
        let capabilities = host::capabilities(|name| match name {
            host::AIA_IDS => aia_ids.into(),
            host::DBCN => register(registers::SBI_DBCN).is_some().into(),
            host::TIMEBASE => value(registers::TIMER_FREQUENCY).unwrap_or(0),
            host::SATP_MODE => value(registers::SATP_MODE).unwrap_or(0),
            host::CBOM_SIZE => value(registers::ZICBOM_BLOCK_SIZE).unwrap_or(0),
            host::CBOZ_SIZE => value(registers::ZICBOZ_BLOCK_SIZE).unwrap_or(0),
            host::VENDOR_ID => id_value(register(registers::MVENDORID)),
            host::ARCH_ID => id_value(register(registers::MARCHID)),
            host::IMP_ID => id_value(register(registers::MIMPID)),
            name => match capability(name) {
                Some(capability) => vm.check_extension_int(capability).into(),
                None => extension(&vcpu, name),
            },
        });
        let bits = kvm.check_extension_raw(CAP_VM_GPA_BITS);
        let bits = u32::try_from(bits).ok().filter(|bits| *bits > 0);
        Ok(Host {
            page_size: rustix::param::page_size() as u64,
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            physical_bits: bits.unwrap_or(DEFAULT_GPA_BITS),
            capabilities,
        })
    }
}

/// IDs use all 64 bits.
fn id_value(value: Option<u64>) -> i64 {
    value.unwrap_or(0).cast_signed()
}

fn capability(name: &str) -> Option<Cap> {
    Some(match name {
        host::IRQFD => Cap::Irqfd,
        "KVM_CAP_IOEVENTFD" => Cap::Ioeventfd,
        "KVM_CAP_IMMEDIATE_EXIT" => Cap::ImmediateExit,
        "KVM_CAP_ONE_REG" => Cap::OneReg,
        _ => return None,
    })
}

/// Whether `vcpu` has the extension called `name`.
fn extension(vcpu: &VcpuFd, name: &str) -> i64 {
    let number = isa::EXTENSIONS.iter().position(|other| *other == name);
    let id = number.map(|number| registers::isa_extension(number as u64));
    let value = id.and_then(|id| get_register(vcpu, id).ok());
    (value == Some(1)).into()
}

/// How many message numbers an AIA of this KVM may have; 0 if it has none.
fn probe_aia(vm: &VmFd) -> u32 {
    let Ok(device) = create_aia(vm) else {
        return 0;
    };
    let accepted = |ids: &u32| config(&device, KVM_DEV_RISCV_AIA_CONFIG_IDS, *ids).is_ok();
    AIA_IDS.into_iter().find(accepted).unwrap_or(0)
}

fn create_aia(vm: &VmFd) -> std::result::Result<DeviceFd, kvm::Error> {
    let mut device = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_RISCV_AIA,
        fd: 0,
        flags: 0,
    };
    vm.create_device(&mut device)
}

/// Sets an attribute whose value is what `addr` points to, or nothing.
fn set(device: &DeviceFd, group: u32, attr: u64, addr: u64) -> Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr,
    };
    device.set_device_attr(&attribute).map_err(|errno| {
        Error::io(
            format!("attribute {attr} of group {group} of the AIA (--irqchip plic needs none)"),
            errno,
        )
    })
}

fn config(device: &DeviceFd, attr: u32, value: u32) -> Result<()> {
    let pointer = &raw const value as u64;
    set(device, KVM_DEV_RISCV_AIA_GRP_CONFIG, attr.into(), pointer)
}

fn address(device: &DeviceFd, attr: u64, value: u64) -> Result<()> {
    let pointer = &raw const value as u64;
    set(device, KVM_DEV_RISCV_AIA_GRP_ADDR, attr, pointer)
}

impl KvmMachine for Riscv64Machine {
    fn vm_type(&self) -> u64 {
        0
    }

    fn create_controllers(&self, _vm: &VmFd) -> Result<Vec<DeviceFd>> {
        // An AIA can only be initialised when every vCPU is there, and KVM
        // takes it as late as that.
        Ok(Vec::new())
    }

    fn init_vcpu(
        &self,
        _vm: &VmFd,
        _controllers: &[DeviceFd],
        vcpu: &VcpuFd,
        index: u32,
    ) -> Result<()> {
        if self.has_debug_console() {
            vcpu.set_one_reg(registers::SBI_DBCN, &1u64.to_ne_bytes())
                .map_err(|errno| Error::io(format!("SBI DBCN of vCPU {index}"), errno))?;
        }
        Ok(())
    }

    fn finish_controllers(&self, vm: &VmFd) -> Result<Vec<DeviceFd>> {
        if self.irqchip == Irqchip::Plic {
            return Ok(Vec::new());
        }
        let aia = create_aia(vm).map_err(|errno| {
            Error::io(
                "KVM_CREATE_DEVICE for an AIA (--irqchip plic needs none)",
                errno,
            )
        })?;
        let ids = u32::try_from(self.host.capability(host::AIA_IDS)).unwrap_or(0);
        config(&aia, KVM_DEV_RISCV_AIA_CONFIG_IDS, ids)?;
        config(&aia, KVM_DEV_RISCV_AIA_CONFIG_SRCS, layout::WIRES)?;
        let cpus = self.plan.cpus;
        let hart_bits = cpus.next_power_of_two().trailing_zeros();
        config(&aia, KVM_DEV_RISCV_AIA_CONFIG_HART_BITS, hart_bits)?;
        let aplic = KVM_DEV_RISCV_AIA_ADDR_APLIC.into();
        address(&aia, aplic, layout::APLIC.base)?;
        for index in 0..u64::from(cpus) {
            // KVM_DEV_RISCV_AIA_ADDR_IMSIC.
            let imsic = layout::IMSICS + index * layout::IMSIC_SIZE;
            address(&aia, 1 + index, imsic)?;
        }
        let init = KVM_DEV_RISCV_AIA_CTRL_INIT.into();
        set(&aia, KVM_DEV_RISCV_AIA_GRP_CTRL, init, 0)?;
        Ok(vec![aia])
    }

    fn start_vcpu(
        &self,
        vcpu: &mut VcpuFd,
        index: u32,
        registers: Option<&RegisterState>,
    ) -> Result<()> {
        // Without registers: all vCPUs but the first wait for SBI HSM's
        // hart_start from their creation (kvm_arch_vcpu_postcreate).
        for (name, value) in registers.iter().flat_map(|state| &state.0) {
            let id = registers::id(name).ok_or_else(|| {
                Error::Boot(format!("internal error: no register is called {name}"))
            })?;
            vcpu.set_one_reg(id, &value.to_ne_bytes())
                .map_err(|errno| Error::io(format!("{name} of vCPU {index}"), errno))?;
        }
        Ok(())
    }

    fn system_event_registers(&self, vcpu: &VcpuFd) -> Result<Vec<u64>> {
        let id = registers::id("a0").unwrap_or_default();
        let kind = get_register(vcpu, id).map_err(|errno| Error::io("a0 at a reset", errno))?;
        Ok(vec![kind])
    }

    fn dump_vcpu(&self, vcpu: &VcpuFd) -> String {
        registers::dump(|id| get_register(vcpu, id).ok())
    }
}

fn get_register(vcpu: &VcpuFd, id: u64) -> std::result::Result<u64, kvm::Error> {
    let mut value = [0; 8];
    vcpu.get_one_reg(id, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossvisor_vmm::kvm::bindings;

    #[test]
    fn numbers_of_extensions_are_the_bindings() {
        let number = |name| isa::EXTENSIONS.iter().position(|other| *other == name);
        for (name, constant) in [
            ("a", bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_A),
            (
                "ssaia",
                bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_SSAIA,
            ),
            ("zkr", bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_ZKR),
            (
                "zvkt",
                bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_ZVKT,
            ),
            (
                "zcmop",
                bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_ZCMOP,
            ),
            (
                "svadu",
                bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_SVADU,
            ),
            (
                "zalrsc",
                bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_ZALRSC,
            ),
        ] {
            assert_eq!(number(name), Some(constant as usize), "{name}");
        }
        let count = bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_MAX;
        assert_eq!(isa::EXTENSIONS.len(), count as usize);
        let dbcn = bindings::KVM_RISCV_SBI_EXT_ID_KVM_RISCV_SBI_EXT_DBCN;
        assert_eq!(registers::SBI_DBCN & 0xffff, u64::from(dbcn));
    }
}
