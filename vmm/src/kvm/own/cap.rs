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
    NrVcpus = KVM_CAP_NR_VCPUS,
    MaxVcpus = KVM_CAP_MAX_VCPUS,
    IrqRouting = KVM_CAP_IRQ_ROUTING,
    Irqfd = KVM_CAP_IRQFD,
    Ioeventfd = KVM_CAP_IOEVENTFD,
    OneReg = KVM_CAP_ONE_REG,
    ImmediateExit = KVM_CAP_IMMEDIATE_EXIT,
    #[cfg(target_arch = "powerpc64")]
    PpcPapr = KVM_CAP_PPC_PAPR,
    #[cfg(target_arch = "powerpc64")]
    PpcRtas = KVM_CAP_PPC_RTAS,
    #[cfg(target_arch = "powerpc64")]
    PpcEnableHcall = KVM_CAP_PPC_ENABLE_HCALL,
    #[cfg(target_arch = "powerpc64")]
    PpcMmuRadix = KVM_CAP_PPC_MMU_RADIX,
    #[cfg(target_arch = "powerpc64")]
    PpcMmuHashV3 = KVM_CAP_PPC_MMU_HASH_V3,
    #[cfg(target_arch = "powerpc64")]
    IrqXics = KVM_CAP_IRQ_XICS,
    #[cfg(target_arch = "powerpc64")]
    PpcIrqXive = KVM_CAP_PPC_IRQ_XIVE,
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
    S390VectorRegisters = KVM_CAP_S390_VECTOR_REGISTERS,
    #[cfg(target_arch = "s390x")]
    S390MemOp = KVM_CAP_S390_MEM_OP,
    #[cfg(target_arch = "s390x")]
    S390InjectIrq = KVM_CAP_S390_INJECT_IRQ,
    #[cfg(target_arch = "s390x")]
    S390Diag318 = KVM_CAP_S390_DIAG318,
}
