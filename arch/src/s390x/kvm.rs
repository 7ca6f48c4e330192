//! The KVM side: probing the host, the CPU model, the FLIC, registers of vCPUs.

use std::fmt::Write as _;
use std::io;

use crossvisor_vmm::arch::{Host, KvmArchitecture, KvmMachine, RegisterState};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::kvm::bindings::{
    KVM_CAP_S390_CPU_TOPOLOGY, KVM_CAP_S390_CSS_SUPPORT, KVM_CAP_S390_HPAGE_1M,
    KVM_CAP_S390_IRQCHIP, KVM_CAP_S390_USER_SIGP, KVM_CAP_S390_USER_STSI,
    KVM_CAP_S390_VECTOR_REGISTERS, KVM_DEV_FLIC_ADAPTER_REGISTER, KVM_MP_STATE_OPERATING,
    KVM_MP_STATE_STOPPED, KVM_SYNC_ACRS, KVM_SYNC_ARCH0, KVM_SYNC_CRS, KVM_SYNC_DIAG318,
    KVM_SYNC_FPRS, KVM_SYNC_GPRS, KVM_SYNC_PREFIX, KVM_SYNC_VRS, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_FLIC, kvm_enable_cap, kvm_mp_state,
    kvm_s390_io_adapter, kvm_s390_vm_cpu_processor,
};
use crossvisor_vmm::kvm::{Cap, DeviceFd, Kvm, VcpuFd, VmFd};

use super::{S390x, S390xMachine, host, registers};

/// How many interruption subclasses there are, and so adapters.
const SUBCLASSES: u8 = 8;

/// KVM_CREATE_VM's answer where page tables have no storage keys.
const EINVAL: i32 = 22;

impl KvmArchitecture for S390x {
    fn probe(&self, kvm: &Kvm) -> Result<Host> {
        let vm = match kvm.create_vm() {
            Ok(vm) => Some(vm),
            Err(errno) if errno.errno() == EINVAL => None,
            Err(errno) => return Err(Error::io("KVM_CREATE_VM", errno)),
        };
        let vm = vm.as_ref();
        let check = |cap| match vm {
            Some(vm) => vm.check_extension_int(cap),
            None => kvm.check_extension_int(cap),
        };
        let vector = check(Cap::S390VectorRegisters) != 0;
        let processor = vm.map(|vm| set_processor(vm, vector)).transpose()?;
        let facilities =
            processor.map_or_else(Vec::new, |processor| host::facilities(&processor.fac_list));
        let flic = kvm_device_type_KVM_DEV_TYPE_FLIC;
        let limit = vm.and_then(|vm| vm.memory_limit().ok());
        let capabilities = host::capabilities(
            |name| match name {
                host::PGSTE => vm.is_some().into(),
                "flic" => vm.is_some_and(|vm| vm.offers_device(flic)).into(),
                "topology" => facilities.contains(&host::TOPOLOGY).into(),
                name => capability(name).map_or(0, |cap| check(cap).into()),
            },
            &facilities,
        );
        Ok(Host {
            page_size: rustix::param::page_size() as u64,
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            physical_bits: limit
                .filter(|limit| *limit > 0)
                .map_or(44, |limit| limit.ilog2()),
            capabilities,
        })
    }
}

/// Gives the guest of `vm`, which has no vCPUs yet, its processor: vector
/// registers where `vector` says so, and every facility that KVM grants. The
/// rest is as KVM has it: the CPU's number with the version that marks a
/// guest's, and no SIE of the guest's own.
fn set_processor(vm: &VmFd, vector: bool) -> Result<kvm_s390_vm_cpu_processor> {
    if vector {
        let name = "KVM_CAP_S390_VECTOR_REGISTERS";
        enable(vm, KVM_CAP_S390_VECTOR_REGISTERS, name)?;
    }
    // It also has KVM answer for the topology; older kernels do not know it.
    if enable(vm, KVM_CAP_S390_CPU_TOPOLOGY, "the topology facility").is_err() {
        log::debug!("KVM has no KVM_CAP_S390_CPU_TOPOLOGY");
    }
    let failed = |what: &'static str| move |errno| Error::io(what, errno);
    let machine = vm.cpu_machine().map_err(failed("the host's CPU model"))?;
    let mut guest = vm
        .cpu_processor()
        .map_err(failed("the guest's CPU model"))?;
    host::grant(&mut guest.fac_list, &machine.fac_list, &machine.fac_mask);
    vm.set_cpu_processor(&guest)
        .map_err(failed("setting the guest's CPU model"))?;
    Ok(guest)
}

fn capability(name: &str) -> Option<Cap> {
    Some(match name {
        "KVM_CAP_S390_COW" => Cap::S390Cow,
        "KVM_CAP_S390_CSS_SUPPORT" => Cap::S390CssSupport,
        "KVM_CAP_IRQFD" => Cap::Irqfd,
        "KVM_CAP_S390_IRQCHIP" => Cap::S390Irqchip,
        "KVM_CAP_S390_HPAGE_1M" => Cap::S390Hpage1m,
        "KVM_CAP_IOEVENTFD" => Cap::Ioeventfd,
        "KVM_CAP_IMMEDIATE_EXIT" => Cap::ImmediateExit,
        "KVM_CAP_S390_USER_SIGP" => Cap::S390UserSigp,
        "KVM_CAP_S390_USER_STSI" => Cap::S390UserStsi,
        "KVM_CAP_S390_MEM_OP" => Cap::S390MemOp,
        "KVM_CAP_S390_INJECT_IRQ" => Cap::S390InjectIrq,
        "KVM_CAP_S390_VECTOR_REGISTERS" => Cap::S390VectorRegisters,
        "KVM_CAP_S390_DIAG318" => Cap::S390Diag318,
        _ => return None,
    })
}

fn enable(vm: &VmFd, cap: u32, name: &str) -> Result<()> {
    let cap = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    vm.enable_cap(&cap)
        .map_err(|errno| Error::io(format!("enabling {name}"), errno))
}

/// After an initial reset only the prefix may be another.
fn set_prefix(vcpu: &mut VcpuFd, registers: &RegisterState) {
    let page = vcpu.get_kvm_run();
    page.s.regs.prefix = registers.get(registers::PREFIX).unwrap_or(0);
    page.kvm_dirty_regs = KVM_SYNC_PREFIX.into();
}

/// Tells the host's hardware what the control program says of itself, where
/// `registers` name it.
fn set_control_program(vcpu: &mut VcpuFd, registers: &RegisterState) {
    if let Some(codes) = registers.get(registers::CONTROL_PROGRAM) {
        let page = vcpu.get_kvm_run();
        page.s.regs.diag318 = codes;
        page.kvm_dirty_regs |= u64::from(KVM_SYNC_DIAG318);
    }
}

impl S390xMachine {
    /// The FLIC, with an adapter for each interruption subclass.
    fn create_flic(&self, vm: &VmFd) -> Result<DeviceFd> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_FLIC,
            ..Default::default()
        };
        let flic = vm
            .create_device(&mut device)
            .map_err(|errno| Error::io("KVM_CREATE_DEVICE for the FLIC", errno))?;
        for isc in 0..SUBCLASSES {
            let adapter = kvm_s390_io_adapter {
                id: isc.into(),
                isc,
                maskable: 0,
                // Bits count from the left.
                swap: 1,
                flags: 0,
            };
            let attribute = kvm_device_attr {
                flags: 0,
                group: KVM_DEV_FLIC_ADAPTER_REGISTER,
                attr: 0,
                addr: &raw const adapter as u64,
            };
            flic.set_device_attr(&attribute)
                .map_err(|errno| Error::io("an adapter of the FLIC", errno))?;
        }
        Ok(flic)
    }
}

impl KvmMachine for S390xMachine {
    fn vm_type(&self) -> u64 {
        0
    }

    fn create_controllers(&self, vm: &VmFd) -> Result<Vec<DeviceFd>> {
        enable(vm, KVM_CAP_S390_USER_SIGP, "KVM_CAP_S390_USER_SIGP")?;
        if self.host.has("KVM_CAP_S390_USER_STSI") {
            enable(vm, KVM_CAP_S390_USER_STSI, "KVM_CAP_S390_USER_STSI")?;
        }
        if self.hugepages() {
            enable(vm, KVM_CAP_S390_HPAGE_1M, "KVM_CAP_S390_HPAGE_1M")?;
        }
        if self.host.has("KVM_CAP_S390_IRQCHIP") {
            // What it takes for routes, by the KVM API; some kernels do not ask.
            enable(vm, KVM_CAP_S390_IRQCHIP, "KVM_CAP_S390_IRQCHIP")?;
        }
        set_processor(vm, self.has_vector())?;
        let flic = self.create_flic(vm)?;
        if !self.host.has("KVM_CAP_S390_COW") {
            // Without ESOP a store to a page that the host maps read-only, such
            // as the zero page under fresh memory, reaches the guest as a
            // protection exception. A process with storage keys has no zero
            // pages.
            vm.set_storage_keys(0, &[0])
                .map_err(|errno| Error::io("KVM_S390_SET_SKEYS", errno))?;
        }
        Ok(vec![flic])
    }

    fn init_vcpu(
        &self,
        _vm: &VmFd,
        _controllers: &[DeviceFd],
        vcpu: &VcpuFd,
        index: u32,
    ) -> Result<()> {
        // For the whole VM, but KVM takes it at a vCPU.
        let cap = kvm_enable_cap {
            cap: KVM_CAP_S390_CSS_SUPPORT,
            ..Default::default()
        };
        vcpu.enable_cap(&cap)
            .map_err(|errno| Error::io("enabling KVM_CAP_S390_CSS_SUPPORT", errno))?;
        self.set_state(vcpu, KVM_MP_STATE_STOPPED)
            .map_err(|errno| Error::io(format!("stopping vCPU {index}"), errno))
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
        // A CPU that was only stopped keeps what is pending for it. Of one that a
        // CPU reset left the registers of, all are set again.
        let kept = |registers: &RegisterState| {
            registers::is_whole(registers) && registers.get(registers::RESET).is_none()
        };
        if !registers.is_some_and(kept) {
            vcpu.initial_reset()
                .map_err(|errno| Error::io(format!("resetting vCPU {index}"), errno))?;
        }
        if let Some(registers) = registers {
            self.set_registers(vcpu, registers);
        }
        // KVM drops an order to stop that is pending when a CPU that operates
        // becomes stopped: one that starts itself anew still operates.
        [KVM_MP_STATE_STOPPED, KVM_MP_STATE_OPERATING]
            .into_iter()
            .try_for_each(|state| self.set_state(vcpu, state))
            .map_err(|errno| Error::io(format!("starting vCPU {index}"), errno))
    }

    /// Of what an exit sets there is only the control program's name.
    fn set_vcpu_registers(&self, vcpu: &mut VcpuFd, registers: &RegisterState) -> Result<()> {
        set_control_program(vcpu, registers);
        Ok(())
    }

    fn park_vcpu(&self, vcpu: &mut VcpuFd) -> Result<()> {
        self.set_state(vcpu, KVM_MP_STATE_STOPPED)
            .map_err(|errno| Error::io("stopping a vCPU", errno))
    }

    fn dump_vcpu(&self, vcpu: &VcpuFd) -> String {
        let (mask, address) = vcpu.psw();
        let mut text = format!("psw={mask:016x} {address:016x}");
        if let Ok(general) = vcpu.get_regs() {
            for (number, value) in general.gprs.iter().enumerate() {
                // Writing to a string does not fail.
                let _ = write!(text, " r{number}={value:x}");
            }
        }
        text
    }
}

impl S390xMachine {
    fn set_state(&self, vcpu: &VcpuFd, state: u32) -> io::Result<()> {
        let state = kvm_mp_state { mp_state: state };
        Ok(vcpu.set_mp_state(state)?)
    }

    /// Sets registers of a vCPU after a reset, by the run page.
    fn set_registers(&self, vcpu: &mut VcpuFd, registers: &RegisterState) {
        let value = |name| registers.get(name).unwrap_or(0);
        vcpu.set_psw(value(registers::PSW_MASK), value(registers::PSW_ADDRESS));
        // What is not named stays as the reset left it, which the page has only
        // after a run.
        match registers::is_whole(registers) {
            true => self.set_all(vcpu, registers),
            false => set_prefix(vcpu, registers),
        }
        set_control_program(vcpu, registers);
    }

    fn set_all(&self, vcpu: &mut VcpuFd, registers: &RegisterState) {
        let vector = self.has_vector();
        // What is none of these registers stays as it is: KVM has some of a vCPU's
        // state nowhere else (its etokens).
        let sync = vcpu.sync_regs();
        for (name, value) in &registers.0 {
            if let Some(place) = registers::place(name, vector) {
                registers::set(sync, place, *value);
            }
        }
        let page = vcpu.get_kvm_run();
        let floating = if vector { KVM_SYNC_VRS } else { KVM_SYNC_FPRS };
        page.kvm_dirty_regs = u64::from(
            KVM_SYNC_PREFIX
                | KVM_SYNC_GPRS
                | KVM_SYNC_ACRS
                | KVM_SYNC_CRS
                | KVM_SYNC_ARCH0
                | floating,
        );
    }
}
