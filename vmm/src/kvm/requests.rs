//! The numbers of KVM's ioctls (Linux `include/uapi/linux/kvm.h`), in both
//! encodings that Linux has.
//!
//! A number holds the direction of the argument, its size, the type (KVMIO)
//! and the number proper. Most architectures give the size 14 bits and the
//! direction 2 (`asm-generic/ioctl.h`); powerpc gives the size 13 and the
//! direction 3, and counts directions otherwise (`asm/ioctl.h`). All of this is
//! pure, and tested for both on every host against what the headers say.

use std::marker::PhantomData;
use std::mem::size_of;

use libc::c_ulong;

/// The type of all of KVM's ioctls.
const KVMIO: u32 = 0xae;

/// How an architecture packs an ioctl's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// `asm-generic/ioctl.h`: x86, arm64, s390, riscv.
    Generic,
    /// powerpc's `asm/ioctl.h`.
    Powerpc,
}

impl Encoding {
    /// That of the host.
    pub const HOST: Self = match cfg!(target_arch = "powerpc64") {
        true => Encoding::Powerpc,
        false => Encoding::Generic,
    };
}

/// Which way the argument goes, as the caller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// There is none, or it is a value.
    None,
    /// The kernel reads it.
    Write,
    /// The kernel writes it.
    Read,
    /// Both.
    ReadWrite,
}

/// An ioctl of KVM whose argument is a pointer to a `T`; a value, or nothing,
/// when that is `()`.
#[derive(Debug)]
pub struct Request<T> {
    number: u8,
    direction: Direction,
    argument: PhantomData<fn(T) -> T>,
}

impl<T> Clone for Request<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Request<T> {}

impl<T> Request<T> {
    const fn new(number: u8, direction: Direction) -> Self {
        Self {
            number,
            direction,
            argument: PhantomData,
        }
    }

    /// `_IOW(KVMIO, number, T)`.
    pub const fn write(number: u8) -> Self {
        Self::new(number, Direction::Write)
    }

    /// `_IOR(KVMIO, number, T)`.
    pub const fn read(number: u8) -> Self {
        Self::new(number, Direction::Read)
    }

    /// `_IOWR(KVMIO, number, T)`.
    pub const fn read_write(number: u8) -> Self {
        Self::new(number, Direction::ReadWrite)
    }

    /// The number that the host's kernel takes.
    pub const fn host_code(self) -> c_ulong {
        self.code(Encoding::HOST) as c_ulong
    }

    /// The number that a kernel takes.
    pub const fn code(self, encoding: Encoding) -> u32 {
        let (size_bits, none, write, read) = match encoding {
            Encoding::Generic => (14, 0, 1, 2),
            Encoding::Powerpc => (13, 1, 4, 2),
        };
        let (direction, size) = match self.direction {
            Direction::None => (none, 0),
            Direction::Write => (write, size_of::<T>()),
            Direction::Read => (read, size_of::<T>()),
            Direction::ReadWrite => (read | write, size_of::<T>()),
        };
        assert!(size < 1 << size_bits);
        direction << (16 + size_bits) | (size as u32) << 16 | KVMIO << 8 | self.number as u32
    }
}

impl Request<()> {
    /// `_IO(KVMIO, number)`.
    pub const fn none(number: u8) -> Self {
        Self::new(number, Direction::None)
    }
}

/// The requests that every architecture has, with the structures of one.
macro_rules! common {
    () => {
        pub const KVM_GET_API_VERSION: Request<()> = Request::none(0x00);
        pub const KVM_CREATE_VM: Request<()> = Request::none(0x01);
        pub const KVM_CHECK_EXTENSION: Request<()> = Request::none(0x03);
        pub const KVM_GET_VCPU_MMAP_SIZE: Request<()> = Request::none(0x04);
        pub const KVM_CREATE_VCPU: Request<()> = Request::none(0x41);
        pub const KVM_SET_USER_MEMORY_REGION: Request<kvm_userspace_memory_region> =
            Request::write(0x46);
        pub const KVM_IRQ_LINE: Request<kvm_irq_level> = Request::write(0x61);
        pub const KVM_SET_GSI_ROUTING: Request<kvm_irq_routing> = Request::write(0x6a);
        pub const KVM_IRQFD: Request<kvm_irqfd> = Request::write(0x76);
        pub const KVM_IOEVENTFD: Request<kvm_ioeventfd> = Request::write(0x79);
        pub const KVM_CREATE_DEVICE: Request<kvm_create_device> = Request::read_write(0xe0);
        pub const KVM_SET_DEVICE_ATTR: Request<kvm_device_attr> = Request::write(0xe1);
        pub const KVM_GET_DEVICE_ATTR: Request<kvm_device_attr> = Request::write(0xe2);
        pub const KVM_HAS_DEVICE_ATTR: Request<kvm_device_attr> = Request::write(0xe3);
        pub const KVM_RUN: Request<()> = Request::none(0x80);
        pub const KVM_GET_REGS: Request<kvm_regs> = Request::read(0x81);
        pub const KVM_SET_REGS: Request<kvm_regs> = Request::write(0x82);
        pub const KVM_GET_SREGS: Request<kvm_sregs> = Request::read(0x83);
        pub const KVM_SET_SREGS: Request<kvm_sregs> = Request::write(0x84);
        pub const KVM_INTERRUPT: Request<kvm_interrupt> = Request::write(0x86);
        pub const KVM_SET_FPU: Request<kvm_fpu> = Request::write(0x8d);
        pub const KVM_SET_MP_STATE: Request<kvm_mp_state> = Request::write(0x99);
        pub const KVM_ENABLE_CAP: Request<kvm_enable_cap> = Request::write(0xa3);
        pub const KVM_GET_ONE_REG: Request<kvm_one_reg> = Request::write(0xab);
        pub const KVM_SET_ONE_REG: Request<kvm_one_reg> = Request::write(0xac);
    };
}

/// Those of powerpc.
#[allow(missing_docs)]
pub mod powerpc {
    use super::Request;
    use crate::kvm::abi::powerpc::*;

    common!();

    pub const KVM_PPC_GET_SMMU_INFO: Request<kvm_ppc_smmu_info> = Request::read(0xa6);
    pub const KVM_PPC_ALLOCATE_HTAB: Request<u32> = Request::read_write(0xa7);
    pub const KVM_PPC_RTAS_DEFINE_TOKEN: Request<kvm_rtas_token_args> = Request::write(0xac);
    pub const KVM_PPC_CONFIGURE_V3_MMU: Request<kvm_ppc_mmuv3_cfg> = Request::write(0xaf);
    pub const KVM_PPC_GET_RMMU_INFO: Request<kvm_ppc_rmmu_info> = Request::write(0xb0);
    pub const KVM_PPC_GET_CPU_CHAR: Request<kvm_ppc_cpu_char> = Request::read(0xb1);
}

/// Those of s390.
#[allow(missing_docs)]
pub mod s390 {
    use super::Request;
    use crate::kvm::abi::s390::*;

    common!();

    pub const KVM_S390_INITIAL_RESET: Request<()> = Request::none(0x97);
    pub const KVM_S390_MEM_OP: Request<kvm_s390_mem_op> = Request::write(0xb1);
    pub const KVM_S390_SET_SKEYS: Request<kvm_s390_skeys> = Request::write(0xb3);
    pub const KVM_S390_IRQ: Request<kvm_s390_irq> = Request::write(0xb4);
}

#[cfg(test)]
mod tests {
    use super::{Encoding, Request};

    #[test]
    fn powerpc_counts_otherwise() {
        const CREATE_VM: Request<()> = Request::none(1);
        assert_eq!(CREATE_VM.code(Encoding::Generic), 0xae01);
        assert_eq!(CREATE_VM.code(Encoding::Powerpc), 0x2000_ae01);
        const SET: Request<[u8; 32]> = Request::write(0x46);
        assert_eq!(SET.code(Encoding::Generic), 0x4020_ae46);
        assert_eq!(SET.code(Encoding::Powerpc), 0x8020_ae46);
        const GET: Request<[u8; 4]> = Request::read(0x98);
        assert_eq!(GET.code(Encoding::Generic), 0x8004_ae98);
        assert_eq!(GET.code(Encoding::Powerpc), 0x4004_ae98);
        const BOTH: Request<[u8; 12]> = Request::read_write(0xe0);
        assert_eq!(BOTH.code(Encoding::Generic), 0xc00c_aee0);
        assert_eq!(BOTH.code(Encoding::Powerpc), 0xc00c_aee0);
    }

    /// Compares requests with the numbers that clang made of the headers.
    macro_rules! as_the_headers_say {
        ($encoding:ident, $module:ident: $($name:ident / $number:ident),* $(,)?) => {
            $(assert_eq!(
                super::$module::$name.code(Encoding::$encoding),
                crate::kvm::abi::$module::$number,
                stringify!($name)
            );)*
        };
    }

    macro_rules! common_as_the_headers_say {
        ($encoding:ident, $module:ident) => {
            as_the_headers_say!($encoding, $module:
                KVM_GET_API_VERSION / NUMBER_KVM_GET_API_VERSION,
                KVM_CREATE_VM / NUMBER_KVM_CREATE_VM,
                KVM_CHECK_EXTENSION / NUMBER_KVM_CHECK_EXTENSION,
                KVM_GET_VCPU_MMAP_SIZE / NUMBER_KVM_GET_VCPU_MMAP_SIZE,
                KVM_CREATE_VCPU / NUMBER_KVM_CREATE_VCPU,
                KVM_SET_USER_MEMORY_REGION / NUMBER_KVM_SET_USER_MEMORY_REGION,
                KVM_IRQ_LINE / NUMBER_KVM_IRQ_LINE,
                KVM_SET_GSI_ROUTING / NUMBER_KVM_SET_GSI_ROUTING,
                KVM_IRQFD / NUMBER_KVM_IRQFD,
                KVM_IOEVENTFD / NUMBER_KVM_IOEVENTFD,
                KVM_CREATE_DEVICE / NUMBER_KVM_CREATE_DEVICE,
                KVM_SET_DEVICE_ATTR / NUMBER_KVM_SET_DEVICE_ATTR,
                KVM_GET_DEVICE_ATTR / NUMBER_KVM_GET_DEVICE_ATTR,
                KVM_HAS_DEVICE_ATTR / NUMBER_KVM_HAS_DEVICE_ATTR,
                KVM_RUN / NUMBER_KVM_RUN,
                KVM_GET_REGS / NUMBER_KVM_GET_REGS,
                KVM_SET_REGS / NUMBER_KVM_SET_REGS,
                KVM_GET_SREGS / NUMBER_KVM_GET_SREGS,
                KVM_SET_SREGS / NUMBER_KVM_SET_SREGS,
                KVM_INTERRUPT / NUMBER_KVM_INTERRUPT,
                KVM_SET_FPU / NUMBER_KVM_SET_FPU,
                KVM_SET_MP_STATE / NUMBER_KVM_SET_MP_STATE,
                KVM_ENABLE_CAP / NUMBER_KVM_ENABLE_CAP,
                KVM_GET_ONE_REG / NUMBER_KVM_GET_ONE_REG,
                KVM_SET_ONE_REG / NUMBER_KVM_SET_ONE_REG,
            );
        };
    }

    #[test]
    fn numbers_on_powerpc() {
        common_as_the_headers_say!(Powerpc, powerpc);
        as_the_headers_say!(Powerpc, powerpc:
            KVM_PPC_GET_SMMU_INFO / NUMBER_KVM_PPC_GET_SMMU_INFO,
            KVM_PPC_ALLOCATE_HTAB / NUMBER_KVM_PPC_ALLOCATE_HTAB,
            KVM_PPC_RTAS_DEFINE_TOKEN / NUMBER_KVM_PPC_RTAS_DEFINE_TOKEN,
            KVM_PPC_CONFIGURE_V3_MMU / NUMBER_KVM_PPC_CONFIGURE_V3_MMU,
            KVM_PPC_GET_RMMU_INFO / NUMBER_KVM_PPC_GET_RMMU_INFO,
            KVM_PPC_GET_CPU_CHAR / NUMBER_KVM_PPC_GET_CPU_CHAR,
        );
    }

    #[test]
    fn numbers_on_s390() {
        common_as_the_headers_say!(Generic, s390);
        as_the_headers_say!(Generic, s390:
            KVM_S390_INITIAL_RESET / NUMBER_KVM_S390_INITIAL_RESET,
            KVM_S390_MEM_OP / NUMBER_KVM_S390_MEM_OP,
            KVM_S390_SET_SKEYS / NUMBER_KVM_S390_SET_SKEYS,
            KVM_S390_IRQ / NUMBER_KVM_S390_IRQ,
        );
    }
}
