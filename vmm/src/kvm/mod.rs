//! Thin KVM access.
//!
//! The names are kvm-ioctls' and kvm-bindings'. Where those crates do not build
//! (powerpc64, s390x), a module of our own offers the same ones, and no caller
//! knows the difference.

pub mod abi;
pub mod requests;
mod vm;
mod window;

cfg_if::cfg_if! {
    if #[cfg(any(target_arch = "powerpc64", target_arch = "s390x"))] {
        mod own;

        pub use own::*;

        /// Structures and constants.
        pub mod bindings {
            #[cfg(target_arch = "powerpc64")]
            pub use super::abi::{PowerpcIrqRouting as KvmIrqRouting, powerpc::*};
            #[cfg(target_arch = "s390x")]
            pub use super::abi::{S390IrqRouting as KvmIrqRouting, s390::*};
        }

        /// What an ioeventfd for virtio-ccw's notify is attached to.
        fn ccw_address(subchannel: u32) -> Option<IoEventAddress> {
            Some(IoEventAddress::Ccw(subchannel))
        }
    } else {
        pub use kvm_bindings as bindings;
        pub use kvm_ioctls::{
            Cap, DeviceFd, Error, IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd,
        };

        /// What an ioeventfd for virtio-ccw's notify is attached to: there is no
        /// such thing.
        fn ccw_address(_subchannel: u32) -> Option<IoEventAddress> {
            None
        }
    }
}

cfg_if::cfg_if! {
    if #[cfg(target_arch = "s390x")] {
        mod channel;
    } else {
        #[path = "no_channel.rs"]
        mod channel;
    }
}

pub use vm::{KvmVm, open};
