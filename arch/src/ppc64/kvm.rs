//! The KVM side: probing the host, vCPU registers, the interrupt controller, and
//! how guests translate.

use std::fs;

use crossvisor_vmm::arch::{Host, KvmArchitecture, KvmMachine, RegisterState};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::kvm::bindings::{
    KVM_CAP_IRQ_XICS, KVM_CAP_PPC_ENABLE_HCALL, KVM_CAP_PPC_IRQ_XIVE, KVM_CAP_PPC_PAPR,
    KVM_DEV_XICS_GRP_CTRL, KVM_DEV_XICS_GRP_SOURCES, KVM_DEV_XICS_NR_SERVERS,
    KVM_DEV_XIVE_GRP_CTRL, KVM_DEV_XIVE_GRP_SOURCE, KVM_DEV_XIVE_NR_SERVERS, KVM_VM_PPC_HV,
    KVM_XICS_LEVEL_SENSITIVE, KVM_XICS_MASKED, KVM_XICS_PRIORITY_SHIFT, KVM_XIVE_LEVEL_SENSITIVE,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_XICS,
    kvm_device_type_KVM_DEV_TYPE_XIVE, kvm_enable_cap, kvm_ppc_mmuv3_cfg, kvm_regs,
};
use crossvisor_vmm::kvm::{Cap, DeviceFd, Kvm, VcpuFd, VmFd};
use crossvisor_vmm::plan::Plan;
use rustix::io::Errno;

use super::irqchip::Irqchip;
use super::mmu::{HashTable, Mmu};
use super::sources::{self, Trigger};
use super::xive::Xive;
use super::{Ppc64, Ppc64Machine, hcall, host, rtas, speculation};

/// KVM_REG_PPC_LPCR_64 (KVM API, section 4.68).
const LPCR: u64 = 0x1030_0000_0000_00b5;
/// The bits of LPCR that a guest chooses.
const LPCR_CHOSEN: u64 = hcall::LPCR_ILE | hcall::LPCR_AIL;

/// Real address bits of a POWER9, of which a guest may have all.
const PHYSICAL_BITS: u32 = 51;

/// The priority of a source that interrupts nobody.
const LEAST_FAVOURED: u64 = 0xff;

impl KvmArchitecture for Ppc64 {
    fn probe(&self, kvm: &Kvm) -> Result<Host> {
        let vm = create_vm(kvm)?;
        let pvr = match vm.create_vcpu(0).and_then(|vcpu| vcpu.get_sregs()) {
            Ok(registers) => registers.pvr,
            Err(errno) => return Err(Error::io("a vCPU's processor version", errno)),
        };
        let radix = vm.get_rmmu_info().unwrap_or_default();
        let told = vm.get_cpu_char().unwrap_or_default();
        let masks = [told.character_mask, told.behaviour_mask];
        let speculation = speculation::known(told.character, told.behaviour, masks);
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let capabilities = host::capabilities(|name| {
            if let Some((_, value)) = speculation.iter().find(|(known, _)| *known == name) {
                return *value;
            }
            let page = host::RADIX_PAGES.iter().find(|(page, ..)| *page == name);
            match (name, page) {
                (_, Some((.., wanted))) => {
                    // The same size, by whatever AP value.
                    let size = |encoding: u32| encoding & 0x1fff_ffff;
                    let encodings = radix.ap_encodings.iter();
                    let mut found = encodings.filter(|known| size(**known) == size(*wanted));
                    found.next().map_or(0, |encoding| (*encoding).into())
                }
                ("PVR", _) => pvr.into(),
                ("nested", _) => (cpu_info(&cpuinfo, "platform") == Some("pSeries")).into(),
                ("timebase", _) => cpu_info(&cpuinfo, "timebase")
                    .and_then(|value| value.parse().ok())
                    .unwrap_or(0),
                (name, _) => capability(name).map_or(0, |cap| vm.check_extension_int(cap).into()),
            }
        });
        Ok(Host {
            page_size: rustix::param::page_size() as u64,
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            physical_bits: PHYSICAL_BITS,
            capabilities,
        })
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    kvm.create_vm_with_type(KVM_VM_PPC_HV.into())
        .map_err(|errno| {
            Error::io(
                "KVM_CREATE_VM for a guest of KVM-HV (is the module kvm-hv loaded?)",
                errno,
            )
        })
}

/// The value after `name` in the text of /proc/cpuinfo.
fn cpu_info<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

fn capability(name: &str) -> Option<Cap> {
    Some(match name {
        "KVM_CAP_PPC_PAPR" => Cap::PpcPapr,
        "KVM_CAP_PPC_MMU_RADIX" => Cap::PpcMmuRadix,
        "KVM_CAP_PPC_MMU_HASH_V3" => Cap::PpcMmuHashV3,
        "KVM_CAP_IRQ_XICS" => Cap::IrqXics,
        "KVM_CAP_PPC_IRQ_XIVE" => Cap::PpcIrqXive,
        "KVM_CAP_PPC_RTAS" => Cap::PpcRtas,
        "KVM_CAP_PPC_ENABLE_HCALL" => Cap::PpcEnableHcall,
        "KVM_CAP_IRQFD" => Cap::Irqfd,
        "KVM_CAP_IOEVENTFD" => Cap::Ioeventfd,
        "KVM_CAP_IMMEDIATE_EXIT" => Cap::ImmediateExit,
        _ => return None,
    })
}

/// Makes a controller of KVM's.
fn create_controller(vm: &VmFd, kind: u32, name: &str) -> Result<DeviceFd> {
    let mut device = kvm_create_device {
        type_: kind,
        fd: 0,
        flags: 0,
    };
    vm.create_device(&mut device)
        .map_err(|errno| Error::io(format!("KVM_CREATE_DEVICE for {name}"), errno))
}

/// An attribute of a controller's, to be set to `value` while that is there.
fn attribute<T>(group: u32, attr: u32, value: &T) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group,
        attr: attr.into(),
        addr: &raw const *value as u64,
    }
}

/// Tells a controller of KVM's of one of its sources.
fn create_source(controller: &DeviceFd, group: u32, source: u32, state: u64) -> Result<()> {
    controller
        .set_device_attr(&attribute(group, source, &state))
        .map_err(|errno| Error::io(format!("interrupt source {source:#x}"), errno))
}

/// Tells a controller of KVM's how many vCPUs it interrupts, where it asks: an XICS
/// that is all software takes nothing of the machine's. One on the machine's XIVE
/// would take as much as the most vCPUs need.
fn set_servers(controller: &DeviceFd, group: u32, attr: u32, servers: u32) -> Result<()> {
    let attribute = attribute(group, attr, &servers);
    if controller.has_device_attr(&attribute).is_err() {
        return Ok(());
    }
    controller
        .set_device_attr(&attribute)
        .map_err(|errno| Error::io(format!("a controller for {servers} vCPUs"), errno))
}

/// An XICS, with every source of the machine masked.
fn create_xics(vm: &VmFd, plan: &Plan) -> Result<DeviceFd> {
    let xics = create_controller(vm, kvm_device_type_KVM_DEV_TYPE_XICS, "an XICS")?;
    set_servers(
        &xics,
        KVM_DEV_XICS_GRP_CTRL,
        KVM_DEV_XICS_NR_SERVERS,
        plan.cpus,
    )?;
    for (source, trigger) in sources::sources(plan) {
        let level = match trigger {
            Trigger::Level => KVM_XICS_LEVEL_SENSITIVE,
            Trigger::Edge => 0,
        };
        let state = LEAST_FAVOURED << KVM_XICS_PRIORITY_SHIFT | KVM_XICS_MASKED | level;
        create_source(&xics, KVM_DEV_XICS_GRP_SOURCES, source, state)?;
    }
    Ok(xics)
}

/// A XIVE, with every source of the machine masked.
fn create_xive(vm: &VmFd, xive: &Xive) -> Result<DeviceFd> {
    let device = create_controller(vm, kvm_device_type_KVM_DEV_TYPE_XIVE, "a XIVE")?;
    set_servers(
        &device,
        KVM_DEV_XIVE_GRP_CTRL,
        KVM_DEV_XIVE_NR_SERVERS,
        xive.cpus(),
    )?;
    for (source, trigger) in xive.sources() {
        let level = match trigger {
            Trigger::Level => KVM_XIVE_LEVEL_SENSITIVE,
            Trigger::Edge => 0,
        };
        create_source(&device, KVM_DEV_XIVE_GRP_SOURCE, *source, level.into())?;
    }
    Ok(device)
}

impl KvmMachine for Ppc64Machine {
    fn vm_type(&self) -> u64 {
        KVM_VM_PPC_HV.into()
    }

    fn create_controllers(&self, vm: &VmFd) -> Result<Vec<DeviceFd>> {
        if self.mmu == Mmu::Hpt {
            let memory = self.plan.memory_size();
            let order = HashTable::new(memory, self.backing_page).order;
            vm.allocate_htab(order).map_err(|errno| {
                Error::io(
                    format!("KVM_PPC_ALLOCATE_HTAB for 2^{order} bytes (--mmu chooses)"),
                    errno,
                )
            })?;
        }
        // Debug registers, which H_SET_MODE sets too, are KVM's.
        let enable = kvm_enable_cap {
            cap: KVM_CAP_PPC_ENABLE_HCALL,
            args: [hcall::H_SET_MODE, 1, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&enable)
            .map_err(|errno| Error::io("KVM_CAP_PPC_ENABLE_HCALL for H_SET_MODE", errno))?;
        if let Some(xive) = self.xive() {
            return Ok(vec![create_xive(vm, &xive)?]);
        }
        for (name, token) in rtas::XICS_TOKENS {
            vm.define_rtas_token(name, token.into())
                .map_err(|errno| Error::io(format!("KVM_PPC_RTAS_DEFINE_TOKEN: {name}"), errno))?;
        }
        Ok(vec![create_xics(vm, &self.plan)?])
    }

    fn init_vcpu(
        &self,
        _vm: &VmFd,
        controllers: &[DeviceFd],
        vcpu: &VcpuFd,
        index: u32,
    ) -> Result<()> {
        let enable = |cap, args, what: &str| {
            let enable = kvm_enable_cap {
                cap,
                args,
                ..Default::default()
            };
            vcpu.enable_cap(&enable)
                .map_err(|errno| Error::io(format!("{what} of vCPU {index}"), errno))
        };
        enable(KVM_CAP_PPC_PAPR, [0; 4], "KVM_CAP_PPC_PAPR")?;
        let controller = controllers.first().ok_or_else(|| {
            Error::Boot("internal error: there is no interrupt controller".into())
        })?;
        let fd = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(controller)).unwrap_or(u64::MAX);
        // A vCPU's server number is its index.
        let args = [fd, index.into(), 0, 0];
        match self.irqchip {
            Irqchip::Xive => enable(KVM_CAP_PPC_IRQ_XIVE, args, "KVM_CAP_PPC_IRQ_XIVE"),
            Irqchip::Xics => enable(KVM_CAP_IRQ_XICS, args, "KVM_CAP_IRQ_XICS"),
        }
    }

    fn finish_controllers(&self, _vm: &VmFd) -> Result<Vec<DeviceFd>> {
        Ok(Vec::new())
    }

    fn start_vcpu(
        &self,
        vcpu: &mut VcpuFd,
        index: u32,
        registers: Option<&RegisterState>,
    ) -> Result<()> {
        let mut state = kvm_regs::default();
        let mut lpcr = 0;
        for (name, value) in registers.iter().flat_map(|state| &state.0) {
            let register = match *name {
                "pc" => Some(&mut state.pc),
                "msr" => Some(&mut state.msr),
                "lpcr" => Some(&mut lpcr),
                name => name
                    .strip_prefix('r')
                    .and_then(|number| number.parse::<usize>().ok())
                    .and_then(|number| state.gpr.get_mut(number)),
            };
            let register = register.ok_or_else(|| unknown(name))?;
            *register = *value;
        }
        vcpu.set_regs(&state)
            .map_err(|errno| Error::io(format!("registers of vCPU {index}"), errno))?;
        set_lpcr(vcpu, lpcr)
    }

    /// `process_table` and `mmu_flags`, at once.
    fn set_vm_registers(&self, vm: &VmFd, registers: &RegisterState) -> Result<()> {
        let value = |name| registers.get(name).ok_or_else(|| unknown(name));
        let configuration = kvm_ppc_mmuv3_cfg {
            flags: value("mmu_flags")?,
            process_table: value("process_table")?,
        };
        vm.configure_v3_mmu(&configuration)
            .map_err(|errno| Error::io("KVM_PPC_CONFIGURE_V3_MMU", errno))
    }

    fn set_vcpu_registers(&self, vcpu: &mut VcpuFd, registers: &RegisterState) -> Result<()> {
        for (name, value) in &registers.0 {
            match *name {
                "lpcr" => set_lpcr(vcpu, *value)?,
                name => return Err(unknown(name)),
            }
        }
        Ok(())
    }

    /// KVM writes the results of a hypercall into registers when it is next told
    /// to run the vCPU, over those that a start has set: so it is told now, and to
    /// come back at once.
    fn park_vcpu(&self, vcpu: &mut VcpuFd) -> Result<()> {
        vcpu.set_kvm_immediate_exit(1);
        let left = vcpu.run().map(drop);
        vcpu.set_kvm_immediate_exit(0);
        match left {
            Err(errno) if Errno::from_raw_os_error(errno.errno()) != Errno::INTR => {
                Err(Error::io("stopping a vCPU", errno))
            }
            _ => Ok(()),
        }
    }

    fn dump_vcpu(&self, vcpu: &VcpuFd) -> String {
        let registers = match vcpu.get_regs() {
            Ok(registers) => registers,
            Err(error) => return error.to_string(),
        };
        let mut text = format!(
            "pc={:016x} msr={:016x} lr={:016x} ctr={:016x}\nsrr0={:016x} srr1={:016x} cr={:08x} \
             xer={:08x}",
            registers.pc,
            registers.msr,
            registers.lr,
            registers.ctr,
            registers.srr0,
            registers.srr1,
            registers.cr,
            registers.xer
        );
        for (number, value) in registers.gpr.iter().enumerate() {
            text.push(if number % 4 == 0 { '\n' } else { ' ' });
            text.push_str(&format!("r{number}={value:016x}"));
        }
        text
    }
}

fn unknown(name: &str) -> Error {
    Error::Boot(format!("internal error: no register is called {name}"))
}

/// Sets the bits of LPCR that a guest chooses; the others are KVM's.
fn set_lpcr(vcpu: &VcpuFd, bits: u64) -> Result<()> {
    let failed = |errno| Error::io("LPCR", errno);
    let mut lpcr = [0; 8];
    vcpu.get_one_reg(LPCR, &mut lpcr).map_err(failed)?;
    let lpcr = u64::from_ne_bytes(lpcr) & !LPCR_CHOSEN | bits & LPCR_CHOSEN;
    vcpu.set_one_reg(LPCR, &lpcr.to_ne_bytes())
        .map(drop)
        .map_err(failed)
}
