//! Capabilities (KVM API, section 4.4, KVM_CHECK_EXTENSION).

use crate::kvm::bindings::*;

macro_rules! capabilities {
    ($($(#[$condition:meta])? $name:ident = $number:ident),* $(,)?) => {
        /// Something that KVM_CHECK_EXTENSION is asked for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Cap {
            $(
                $(#[$condition])?
                #[doc = concat!("`", stringify!($number), "`.")]
                $name = $number,
            )*
        }
    };
}

capabilities! {
    UserMemory = KVM_CAP_USER_MEMORY,
    NrVcpus = KVM_CAP_NR_VCPUS,
    NrMemslots = KVM_CAP_NR_MEMSLOTS,
    MaxVcpus = KVM_CAP_MAX_VCPUS,
    MaxVcpuId = KVM_CAP_MAX_VCPU_ID,
    MpState = KVM_CAP_MP_STATE,
    IrqRouting = KVM_CAP_IRQ_ROUTING,
    Irqfd = KVM_CAP_IRQFD,
    IrqfdResample = KVM_CAP_IRQFD_RESAMPLE,
    Ioeventfd = KVM_CAP_IOEVENTFD,
    IoeventfdNoLength = KVM_CAP_IOEVENTFD_NO_LENGTH,
    SignalMsi = KVM_CAP_SIGNAL_MSI,
    OneReg = KVM_CAP_ONE_REG,
    ReadonlyMem = KVM_CAP_READONLY_MEM,
    DeviceCtrl = KVM_CAP_DEVICE_CTRL,
    EnableCap = KVM_CAP_ENABLE_CAP,
    EnableCapVm = KVM_CAP_ENABLE_CAP_VM,
    VmAttributes = KVM_CAP_VM_ATTRIBUTES,
    ImmediateExit = KVM_CAP_IMMEDIATE_EXIT,
    SyncMmu = KVM_CAP_SYNC_MMU,
    SyncRegs = KVM_CAP_SYNC_REGS,
    #[cfg(target_arch = "powerpc64")]
    PpcPapr = KVM_CAP_PPC_PAPR,
    #[cfg(target_arch = "powerpc64")]
    PpcGetPvinfo = KVM_CAP_PPC_GET_PVINFO,
    #[cfg(target_arch = "powerpc64")]
    PpcGetSmmuInfo = KVM_CAP_PPC_GET_SMMU_INFO,
    #[cfg(target_arch = "powerpc64")]
    PpcAllocHtab = KVM_CAP_PPC_ALLOC_HTAB,
    #[cfg(target_arch = "powerpc64")]
    PpcHtm = KVM_CAP_PPC_HTM,
    #[cfg(target_arch = "powerpc64")]
    PpcSmt = KVM_CAP_PPC_SMT,
    #[cfg(target_arch = "powerpc64")]
    PpcSmtPossible = KVM_CAP_PPC_SMT_POSSIBLE,
    #[cfg(target_arch = "powerpc64")]
    PpcRtas = KVM_CAP_PPC_RTAS,
    #[cfg(target_arch = "powerpc64")]
    PpcEnableHcall = KVM_CAP_PPC_ENABLE_HCALL,
    #[cfg(target_arch = "powerpc64")]
    PpcHwrng = KVM_CAP_PPC_HWRNG,
    #[cfg(target_arch = "powerpc64")]
    PpcMmuRadix = KVM_CAP_PPC_MMU_RADIX,
    #[cfg(target_arch = "powerpc64")]
    PpcMmuHashV3 = KVM_CAP_PPC_MMU_HASH_V3,
    #[cfg(target_arch = "powerpc64")]
    PpcNestedHv = KVM_CAP_PPC_NESTED_HV,
    #[cfg(target_arch = "powerpc64")]
    PpcFwnmi = KVM_CAP_PPC_FWNMI,
    #[cfg(target_arch = "powerpc64")]
    PpcGetCpuChar = KVM_CAP_PPC_GET_CPU_CHAR,
    #[cfg(target_arch = "powerpc64")]
    PpcRpti = KVM_CAP_PPC_RPT_INVALIDATE,
    #[cfg(target_arch = "powerpc64")]
    PpcAilMode3 = KVM_CAP_PPC_AIL_MODE_3,
    #[cfg(target_arch = "powerpc64")]
    IrqXics = KVM_CAP_IRQ_XICS,
    #[cfg(target_arch = "powerpc64")]
    PpcIrqXive = KVM_CAP_PPC_IRQ_XIVE,
    #[cfg(target_arch = "powerpc64")]
    SpaprTce = KVM_CAP_SPAPR_TCE,
    #[cfg(target_arch = "powerpc64")]
    SpaprTce64 = KVM_CAP_SPAPR_TCE_64,
    #[cfg(target_arch = "powerpc64")]
    SpaprMultitce = KVM_CAP_SPAPR_MULTITCE,
    #[cfg(target_arch = "s390x")]
    S390Psw = KVM_CAP_S390_PSW,
    #[cfg(target_arch = "s390x")]
    S390Gmap = KVM_CAP_S390_GMAP,
    #[cfg(target_arch = "s390x")]
    S390Cow = KVM_CAP_S390_COW,
    #[cfg(target_arch = "s390x")]
    S390CssSupport = KVM_CAP_S390_CSS_SUPPORT,
    #[cfg(target_arch = "s390x")]
    S390Irqchip = KVM_CAP_S390_IRQCHIP,
    #[cfg(target_arch = "s390x")]
    S390Hpage1m = KVM_CAP_S390_HPAGE_1M,
    #[cfg(target_arch = "s390x")]
    S390UserSigp = KVM_CAP_S390_USER_SIGP,
    #[cfg(target_arch = "s390x")]
    S390UserStsi = KVM_CAP_S390_USER_STSI,
    #[cfg(target_arch = "s390x")]
    S390UserInstr0 = KVM_CAP_S390_USER_INSTR0,
    #[cfg(target_arch = "s390x")]
    S390VectorRegisters = KVM_CAP_S390_VECTOR_REGISTERS,
    #[cfg(target_arch = "s390x")]
    S390Ri = KVM_CAP_S390_RI,
    #[cfg(target_arch = "s390x")]
    S390Gs = KVM_CAP_S390_GS,
    #[cfg(target_arch = "s390x")]
    S390Bpb = KVM_CAP_S390_BPB,
    #[cfg(target_arch = "s390x")]
    S390MemOp = KVM_CAP_S390_MEM_OP,
    #[cfg(target_arch = "s390x")]
    S390Skeys = KVM_CAP_S390_SKEYS,
    #[cfg(target_arch = "s390x")]
    S390InjectIrq = KVM_CAP_S390_INJECT_IRQ,
    #[cfg(target_arch = "s390x")]
    S390IrqState = KVM_CAP_S390_IRQ_STATE,
    #[cfg(target_arch = "s390x")]
    S390Ais = KVM_CAP_S390_AIS,
    #[cfg(target_arch = "s390x")]
    S390VcpuResets = KVM_CAP_S390_VCPU_RESETS,
    #[cfg(target_arch = "s390x")]
    S390Diag318 = KVM_CAP_S390_DIAG318,
    #[cfg(target_arch = "s390x")]
    S390Protected = KVM_CAP_S390_PROTECTED,
    #[cfg(target_arch = "s390x")]
    S390CpuTopology = KVM_CAP_S390_CPU_TOPOLOGY,
}
