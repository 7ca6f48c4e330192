//! The KVM side: probing the host, vCPU features and registers, and the
//! interrupt controllers that KVM emulates.

use std::fs::File;
use std::io;
use std::os::fd::IntoRawFd;

use crossvisor_vmm::arch::{Host, KvmArchitecture, KvmMachine, RegisterState};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::kvm::bindings::{
    KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT,
    KVM_ARM_VCPU_PMU_V3_IRQ, KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2,
    KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC, KVM_ARM_VCPU_SVE,
    KVM_CREATE_DEVICE_TEST, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_ITS_ADDR_TYPE,
    KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_vcpu_init,
};
use crossvisor_vmm::kvm::{Cap, DeviceFd, Kvm, VcpuFd, VmFd};

use super::{Aarch64, Aarch64Machine, fdt, gic::Gic, host, layout, registers};

/// EBUSY: the PMU is initialised, from the vCPU's first start.
const EBUSY: i32 = 16;

impl KvmArchitecture for Aarch64 {
    fn probe(&self, kvm: &Kvm) -> Result<Host> {
        let bits = kvm.check_extension_int(Cap::ArmVmIPASize);
        let physical_bits = match u32::try_from(bits) {
            Ok(bits) if bits > 0 => bits,
            _ => layout::DEFAULT_IPA_BITS,
        };
        let bits = if bits > 0 { physical_bits } else { 0 };
        let vm = kvm
            .create_vm_with_type(bits.into())
            .map_err(|errno| Error::io("KVM_CREATE_VM", errno))?;
        let cpu = probe_cpu(&vm);
        let capabilities = host::capabilities(|name| match name {
            "gicv2" => offers_device(&vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2),
            "gicv3" => offers_device(&vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3),
            "gicv3-its" => offers_device(&vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS),
            "PSCI" => cpu.psci.into(),
            "TGran4" => cpu.mmfr0.is_none_or(registers::has_granule_4k).into(),
            "TGran16" => cpu.mmfr0.is_none_or(registers::has_granule_16k).into(),
            "TGran64" => cpu.mmfr0.is_none_or(registers::has_granule_64k).into(),
            name => capability(name).map_or(0, |cap| vm.check_extension_int(cap).into()),
        });
        Ok(Host {
            page_size: rustix::param::page_size() as u64,
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            physical_bits,
            capabilities,
        })
    }
}

fn capability(name: &str) -> Option<Cap> {
    Some(match name {
        "KVM_CAP_IRQFD" => Cap::Irqfd,
        "KVM_CAP_IOEVENTFD" => Cap::Ioeventfd,
        "KVM_CAP_IRQ_ROUTING" => Cap::IrqRouting,
        "KVM_CAP_IMMEDIATE_EXIT" => Cap::ImmediateExit,
        "KVM_CAP_ARM_VM_IPA_SIZE" => Cap::ArmVmIPASize,
        "KVM_CAP_ARM_PSCI_0_2" => Cap::ArmPsci02,
        "KVM_CAP_ARM_PMU_V3" => Cap::ArmPmuV3,
        "KVM_CAP_ARM_SVE" => Cap::ArmSve,
        "KVM_CAP_ARM_PTRAUTH_ADDRESS" => Cap::ArmPtrAuthAddress,
        "KVM_CAP_ARM_PTRAUTH_GENERIC" => Cap::ArmPtrAuthGeneric,
        _ => return None,
    })
}

/// Whether KVM_CREATE_DEVICE would make a device of type `kind`.
fn offers_device(vm: &VmFd, kind: u32) -> i64 {
    // A test makes no file; kvm-ioctls takes the number that was there for one
    // and closes it. So a file goes in.
    let Ok(file) = File::open("/dev/null") else {
        return 0;
    };
    let mut device = kvm_create_device {
        type_: kind,
        fd: file.into_raw_fd() as u32,
        flags: KVM_CREATE_DEVICE_TEST,
    };
    vm.create_device(&mut device).is_ok().into()
}

/// What a vCPU of the host shows.
#[derive(Default)]
struct CpuProbe {
    /// PSCI version, major in the upper 16 bits; 0 when not known.
    psci: u32,
    /// ID_AA64MMFR0_EL1; without an answer a kernel of any page size is tried.
    mmfr0: Option<u64>,
}

fn probe_cpu(vm: &VmFd) -> CpuProbe {
    let read = || -> io::Result<CpuProbe> {
        let vcpu = vm.create_vcpu(0)?;
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init)?;
        init.features[0] = 1 << KVM_ARM_VCPU_PSCI_0_2;
        vcpu.vcpu_init(&init)?;
        let psci = get_register(&vcpu, registers::PSCI_VERSION).unwrap_or(0);
        Ok(CpuProbe {
            psci: u32::try_from(psci).unwrap_or(0),
            mmfr0: get_register(&vcpu, registers::ID_AA64MMFR0_EL1).ok(),
        })
    };
    read().unwrap_or_default()
}

impl Aarch64Machine {
    /// The words of KVM_ARM_VCPU_INIT for vCPU `index`.
    fn vcpu_features(&self, index: u32) -> u32 {
        let pointer_authentication = self.host.has("KVM_CAP_ARM_PTRAUTH_ADDRESS")
            && self.host.has("KVM_CAP_ARM_PTRAUTH_GENERIC");
        [
            // Secondaries wait for PSCI's CPU_ON.
            (KVM_ARM_VCPU_POWER_OFF, index != 0),
            (KVM_ARM_VCPU_PSCI_0_2, true),
            (KVM_ARM_VCPU_PMU_V3, self.has_pmu()),
            (KVM_ARM_VCPU_SVE, self.has_sve()),
            (KVM_ARM_VCPU_PTRAUTH_ADDRESS, pointer_authentication),
            (KVM_ARM_VCPU_PTRAUTH_GENERIC, pointer_authentication),
        ]
        .iter()
        .filter(|(_, wanted)| *wanted)
        .fold(0, |features, (bit, _)| features | 1 << bit)
    }

    fn has_sve(&self) -> bool {
        self.host.has("KVM_CAP_ARM_SVE")
    }

    fn set_up_pmu(&self, vcpu: &VcpuFd, index: u32) -> Result<()> {
        // Private interrupts are INTIDs from 16.
        let irq: u32 = fdt::PMU_PPI + 16;
        let address = &raw const irq as u64;
        let steps = [
            (KVM_ARM_VCPU_PMU_V3_IRQ, address),
            (KVM_ARM_VCPU_PMU_V3_INIT, 0),
        ];
        for (attr, addr) in steps {
            let attribute = kvm_device_attr {
                flags: 0,
                group: KVM_ARM_VCPU_PMU_V3_CTRL,
                attr: attr.into(),
                addr,
            };
            match vcpu.set_device_attr(&attribute) {
                Err(errno) if errno.errno() == EBUSY => {}
                done => done.map_err(|errno| Error::io(format!("PMU of vCPU {index}"), errno))?,
            }
        }
        Ok(())
    }

    fn create_gicv2(&self, vm: &VmFd) -> Result<Vec<DeviceFd>> {
        let gic = create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, "GICv2")?;
        set_irqs(&gic, self.gic)?;
        let cpu_interface = layout::GICV2_CPU_INTERFACE.base;
        set_address(
            &gic,
            KVM_VGIC_V2_ADDR_TYPE_DIST,
            layout::GIC_DISTRIBUTOR.base,
        )?;
        set_address(&gic, KVM_VGIC_V2_ADDR_TYPE_CPU, cpu_interface)?;
        initialise(&gic, "GICv2")?;
        Ok(vec![gic])
    }

    fn create_gicv3(&self, vm: &VmFd) -> Result<Vec<DeviceFd>> {
        let gic = create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, "GICv3")?;
        set_irqs(&gic, self.gic)?;
        set_address(
            &gic,
            KVM_VGIC_V3_ADDR_TYPE_DIST,
            layout::GIC_DISTRIBUTOR.base,
        )?;
        set_address(&gic, KVM_VGIC_V3_ADDR_TYPE_REDIST, layout::REDISTRIBUTORS)?;
        initialise(&gic, "GICv3")?;
        let mut devices = vec![gic];
        if self.gic == Gic::V3Its {
            let its = create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, "GICv3 ITS")?;
            set_address(&its, KVM_VGIC_ITS_ADDR_TYPE, layout::ITS.base)?;
            initialise(&its, "GICv3 ITS")?;
            devices.push(its);
        }
        Ok(devices)
    }
}

impl KvmMachine for Aarch64Machine {
    fn vm_type(&self) -> u64 {
        // KVM_VM_TYPE_ARM_IPA_SIZE; a KVM without the capability knows only 0,
        // which is 40 bits.
        match self.host.has("KVM_CAP_ARM_VM_IPA_SIZE") {
            true => self.ipa_bits.into(),
            false => 0,
        }
    }

    fn create_controllers(&self, _vm: &VmFd) -> Result<Vec<DeviceFd>> {
        // A GIC can only be initialised when every vCPU is there, and KVM takes
        // it as late as that.
        Ok(Vec::new())
    }

    fn init_vcpu(
        &self,
        vm: &VmFd,
        _controllers: &[DeviceFd],
        vcpu: &VcpuFd,
        index: u32,
    ) -> Result<()> {
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init)
            .map_err(|errno| Error::io("KVM_ARM_PREFERRED_TARGET", errno))?;
        init.features[0] = self.vcpu_features(index);
        vcpu.vcpu_init(&init)
            .map_err(|errno| Error::io(format!("KVM_ARM_VCPU_INIT of vCPU {index}"), errno))?;
        if self.has_sve() {
            let feature = KVM_ARM_VCPU_SVE as i32;
            vcpu.vcpu_finalize(&feature)
                .map_err(|errno| Error::io(format!("SVE of vCPU {index}"), errno))?;
        }
        Ok(())
    }

    fn finish_controllers(&self, vm: &VmFd) -> Result<Vec<DeviceFd>> {
        match self.gic.is_v3() {
            true => self.create_gicv3(vm),
            false => self.create_gicv2(vm),
        }
    }

    fn start_vcpu(
        &self,
        vcpu: &mut VcpuFd,
        index: u32,
        registers: Option<&RegisterState>,
    ) -> Result<()> {
        if self.has_pmu() {
            self.set_up_pmu(vcpu, index)?;
        }
        for (name, value) in registers.iter().flat_map(|state| &state.0) {
            let id = registers::id(name).ok_or_else(|| {
                Error::Boot(format!("internal error: no register is called {name}"))
            })?;
            vcpu.set_one_reg(id, &value.to_ne_bytes())
                .map_err(|errno| Error::io(format!("{name} of vCPU {index}"), errno))?;
        }
        Ok(())
    }

    fn dump_vcpu(&self, vcpu: &VcpuFd) -> String {
        registers::dump(|id| get_register(vcpu, id).ok())
    }
}

fn get_register(vcpu: &VcpuFd, id: u64) -> io::Result<u64> {
    let mut value = [0; 8];
    vcpu.get_one_reg(id, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

fn create(vm: &VmFd, kind: u32, name: &str) -> Result<DeviceFd> {
    let mut device = kvm_create_device {
        type_: kind,
        fd: 0,
        flags: 0,
    };
    vm.create_device(&mut device).map_err(|errno| {
        Error::io(
            format!("KVM_CREATE_DEVICE for a {name} (--irqchip chooses another)"),
            errno,
        )
    })
}

/// Sets an attribute whose value is what `addr` points to, or nothing.
fn set(device: &DeviceFd, group: u32, attr: u32, addr: u64, what: &str) -> Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group,
        attr: attr.into(),
        addr,
    };
    device
        .set_device_attr(&attribute)
        .map_err(|errno| Error::io(what, errno))
}

fn set_address(device: &DeviceFd, kind: u32, address: u64) -> Result<()> {
    let what = format!("interrupt controller at {address:#x}");
    let pointer = &raw const address as u64;
    set(device, KVM_DEV_ARM_VGIC_GRP_ADDR, kind, pointer, &what)
}

fn set_irqs(device: &DeviceFd, gic: Gic) -> Result<()> {
    let irqs = gic.irqs();
    let what = format!("interrupt controller with {irqs} interrupts");
    let pointer = &raw const irqs as u64;
    set(device, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, pointer, &what)
}

fn initialise(device: &DeviceFd, name: &str) -> Result<()> {
    let what = format!("initialisation of the {name}");
    set(
        device,
        KVM_DEV_ARM_VGIC_GRP_CTRL,
        KVM_DEV_ARM_VGIC_CTRL_INIT,
        0,
        &what,
    )
}
