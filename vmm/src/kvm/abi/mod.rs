//! The KVM API's structures and constants for the architectures that
//! kvm-bindings has none for. They are there on every host, so that pure code's
//! reading of an exit can be tested against them anywhere.
//!
//! `powerpc.rs` and `s390.rs` are generated from the uapi headers of Linux
//! 6.12 (Debian 13's package linux-libc-dev 6.12.118-1, unpacked in `$HEADERS`)
//! by bindgen 0.73.2 with Debian's libclang1-14:
//!
//! ```text
//! generate() {
//!     bindgen vmm/src/kvm/abi/kvm.h --output vmm/src/kvm/abi/$1.rs \
//!         --allowlist-item '_?_?kvm.*|KVM.*|NUMBER_KVM.*' --with-derive-default \
//!         --no-doc-comments --wrap-unsafe-ops --use-core \
//!         --rust-edition 2024 --rust-target 1.85 \
//!         -- --target=$2 -nostdinc -I $HEADERS/usr/include -I $HEADERS/usr/include/$2
//! }
//! generate powerpc powerpc64le-linux-gnu
//! generate s390 s390x-linux-gnu
//! cargo fmt
//! ```
//!
//! They hold clang's sizes and offsets of every structure as assertions, which
//! each build of each host checks. Bit fields (only in `kvm_s390_vm_cpu_uv_feat`)
//! are for a host of the architecture itself.

// Generated code: unions have a zeroed default, flexible arrays are read by
// pointer. The flexible arrays below are what the header's count says.
#![allow(unsafe_code, missing_docs)]
#![allow(clippy::undocumented_unsafe_blocks)]

#[allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]
#[allow(dead_code, clippy::all)]
pub mod powerpc;
#[allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]
#[allow(dead_code, clippy::all)]
pub mod s390;

/// The most routes that a kernel takes (`KVM_MAX_IRQ_ROUTES` in Linux's
/// `include/linux/kvm_host.h`).
const MAX_IRQ_ROUTES: usize = 4096;

/// Makes an owned table of routes out of a module's `kvm_irq_routing`, as
/// kvm-bindings does.
macro_rules! routing_table {
    ($abi:ident, $name:ident) => {
        /// A table of routes for KVM_SET_GSI_ROUTING.
        pub type $name = vmm_sys_util::fam::FamStructWrapper<$abi::kvm_irq_routing>;

        // SAFETY: `nr` entries of the header's array follow the header, which is
        // what the wrapper allocates by.
        unsafe impl vmm_sys_util::fam::FamStruct for $abi::kvm_irq_routing {
            type Entry = $abi::kvm_irq_routing_entry;

            fn len(&self) -> usize {
                self.nr as usize
            }

            unsafe fn set_len(&mut self, len: usize) {
                self.nr = len as u32;
            }

            fn max_len() -> usize {
                MAX_IRQ_ROUTES
            }

            fn as_slice(&self) -> &[Self::Entry] {
                // SAFETY: as above.
                unsafe { self.__bindgen_anon_1.entries.as_slice(self.len()) }
            }

            fn as_mut_slice(&mut self) -> &mut [Self::Entry] {
                let len = self.len();
                // SAFETY: as above.
                unsafe { self.__bindgen_anon_1.entries.as_mut_slice(len) }
            }
        }
    };
}

routing_table!(powerpc, PowerpcIrqRouting);
routing_table!(s390, S390IrqRouting);

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::{powerpc, s390};
    use crate::exit::{RUN_UNION_SIZE, SYNC_REGS_SIZE};

    /// Offsets in `struct kvm_run` that every architecture has alike (KVM API,
    /// section 5).
    #[test]
    fn the_run_page_is_laid_out_as_the_core_reads_it() {
        macro_rules! check {
            ($abi:ident) => {
                assert_eq!(offset_of!($abi::kvm_run, request_interrupt_window), 0);
                assert_eq!(offset_of!($abi::kvm_run, immediate_exit), 1);
                assert_eq!(offset_of!($abi::kvm_run, exit_reason), 8);
                assert_eq!(size_of::<$abi::kvm_run__bindgen_ty_1>(), RUN_UNION_SIZE);
                assert_eq!(size_of::<$abi::kvm_run__bindgen_ty_2>(), SYNC_REGS_SIZE);
            };
        }
        check!(powerpc);
        check!(s390);
        // s390 has the PSW between the flags and the union.
        assert_eq!(offset_of!(powerpc::kvm_run, __bindgen_anon_1), 32);
        assert_eq!(offset_of!(s390::kvm_run, psw_mask), 32);
        assert_eq!(offset_of!(s390::kvm_run, psw_addr), 40);
        assert_eq!(offset_of!(s390::kvm_run, __bindgen_anon_1), 48);
    }

    #[test]
    fn registers_have_the_kernel_s_sizes() {
        // pc, cr, ctr, lr, xer, msr, srr0, srr1, pid, sprg0-7, 32 registers.
        assert_eq!(size_of::<powerpc::kvm_regs>(), 9 * 8 + 8 * 8 + 32 * 8);
        assert_eq!(offset_of!(powerpc::kvm_regs, gpr), 136);
        assert_eq!(size_of::<s390::kvm_regs>(), 16 * 8);
        // 16 access registers of 4 bytes, 16 control registers of 8.
        assert_eq!(size_of::<s390::kvm_sregs>(), 16 * 4 + 16 * 8);
        assert_eq!(offset_of!(s390::kvm_sregs, crs), 64);
        assert_eq!(size_of::<s390::kvm_fpu>(), 8 + 16 * 8);
    }

    #[test]
    fn exits_of_s390_lie_where_the_kernel_puts_them() {
        type Sieic = s390::kvm_run__bindgen_ty_1__bindgen_ty_10;
        assert_eq!(offset_of!(Sieic, icptcode), 0);
        assert_eq!(offset_of!(Sieic, ipa), 2);
        assert_eq!(offset_of!(Sieic, ipb), 4);
        assert_eq!(size_of::<s390::kvm_s390_irq>(), 72);
        assert_eq!(size_of::<s390::kvm_s390_mem_op>(), 64);
        assert_eq!(size_of::<s390::kvm_s390_skeys>(), 64);
        assert_eq!(size_of::<s390::kvm_s390_io_adapter>(), 8);
    }

    #[test]
    fn tables_of_routes_grow() {
        let mut table = super::S390IrqRouting::new(2).unwrap();
        assert_eq!(table.as_fam_struct_ref().nr, 2);
        table.push(s390::kvm_irq_routing_entry::default()).unwrap();
        assert_eq!(table.as_slice().len(), 3);
        assert!(super::PowerpcIrqRouting::new(super::MAX_IRQ_ROUTES + 1).is_err());
    }
}
