//! How the guest's MMU translates (Power ISA 3.0, Book III, chapter 5.7): by
//! radix trees, or by a hashed page table that the hypervisor keeps.

use crossvisor_vmm::arch::Host;
use crossvisor_vmm::error::{Error, Result};

use crate::shared::choice::{Kind, choose};

/// A kind of translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mmu {
    /// Radix trees.
    Radix,
    /// Hashed page table.
    Hpt,
}

impl Mmu {
    /// All kinds, the best first.
    pub const ALL: [Mmu; 2] = [Mmu::Radix, Mmu::Hpt];

    /// Its name for `--mmu`.
    pub const fn name(self) -> &'static str {
        match self {
            Mmu::Radix => "radix",
            Mmu::Hpt => "hpt",
        }
    }

    /// Whether `host` offers it.
    pub fn is_offered(self, host: &Host) -> bool {
        match self {
            Mmu::Radix => host.has("KVM_CAP_PPC_MMU_RADIX"),
            Mmu::Hpt => host.has("KVM_CAP_PPC_MMU_HASH_V3"),
        }
    }

    /// The kind for `--mmu` `name`; `None` or `auto` takes the best that `host`
    /// offers.
    ///
    /// # Errors
    /// The name is unknown or the host does not offer it; says what it offers.
    pub fn choose(name: Option<&str>, host: &Host) -> Result<Self> {
        let known = Mmu::ALL.map(|mmu| Kind::new(mmu.name(), mmu, mmu.is_offered(host)));
        choose("--mmu", name, &known)?.ok_or_else(|| Error::Capability {
            capability: "KVM_CAP_PPC_MMU_RADIX or KVM_CAP_PPC_MMU_HASH_V3".into(),
            advice: "a POWER9 or later processor and the module kvm-hv have one".into(),
        })
    }
}

/// The hashed page table that KVM keeps for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashTable {
    /// The logarithm of its size in bytes.
    pub order: u32,
    /// How much memory from address 0, in bytes, the guest reaches without
    /// translation: KVM has an entry for each page of it, at most one for each
    /// 128 bytes of the table (`kvmppc_map_vrma`).
    pub real_mode: u64,
}

impl HashTable {
    /// The table for a guest with `memory` bytes, behind which are pages of
    /// `backing_page` bytes at least: a 128th of the memory, as Linux's own table
    /// on a bare machine, and more where less than 128 MiB would be reached
    /// without translation; within the bounds that KVM_PPC_ALLOCATE_HTAB takes.
    pub fn new(memory: u64, backing_page: u64) -> Self {
        let order = |size: u64| size.max(1).next_power_of_two().ilog2();
        let reached = memory.min(REAL_MODE_LEAST) / backing_page.max(1);
        let order = order(memory / 128).max(order(reached) + 7).clamp(18, 46);
        let real_mode = backing_page.saturating_mul(1 << (order - 7));
        Self {
            order,
            real_mode: real_mode.min(memory),
        }
    }
}

/// What a kernel needs to begin with.
const REAL_MODE_LEAST: u64 = 128 << 20;

#[cfg(test)]
mod tests {
    use super::super::host;
    use super::*;

    fn without(name: &str) -> Host {
        let mut host = host::typical();
        host.capabilities
            .retain(|capability| capability.name != name);
        host
    }

    #[test]
    fn takes_the_best_that_is_offered() {
        let both = host::typical();
        assert_eq!(Mmu::choose(None, &both).unwrap(), Mmu::Radix);
        assert_eq!(Mmu::choose(Some("auto"), &both).unwrap(), Mmu::Radix);
        assert_eq!(Mmu::choose(Some("hpt"), &both).unwrap(), Mmu::Hpt);
        let hash = without("KVM_CAP_PPC_MMU_RADIX");
        assert_eq!(Mmu::choose(None, &hash).unwrap(), Mmu::Hpt);
    }

    #[test]
    fn names_what_is_offered() {
        let nested = without("KVM_CAP_PPC_MMU_HASH_V3");
        let error = Mmu::choose(Some("hpt"), &nested).unwrap_err().to_string();
        assert!(error.starts_with("--mmu: "), "{error}");
        assert!(error.contains("offers radix and auto"), "{error}");
        let error = Mmu::choose(Some("sv39"), &nested).unwrap_err().to_string();
        assert!(error.contains("there is no sv39"), "{error}");
        let neither = Host {
            capabilities: Vec::new(),
            ..nested
        };
        let error = Mmu::choose(None, &neither).unwrap_err();
        assert!(matches!(error, Error::Capability { .. }), "{error}");
    }

    #[test]
    fn tables_grow_with_memory() {
        let order = |memory| HashTable::new(memory, 65536).order;
        assert_eq!(order(64 << 20), 19);
        assert_eq!(order(1 << 30), 23);
        assert_eq!(order((1 << 30) + 128), 24);
        assert_eq!(order(1), 18);
        assert_eq!(order(u64::MAX), 46);
    }

    #[test]
    fn a_kernel_begins_in_what_needs_no_translation() {
        let real_mode = |memory, page| HashTable::new(memory, page).real_mode;
        for page in [4096, 65536, 2 << 20] {
            for memory in [64 << 20, 128 << 20, 512 << 20, 8 << 30, 1 << 40] {
                let reached = real_mode(memory, page);
                assert!(reached >= memory.min(128 << 20) && reached <= memory);
            }
        }
        // An entry of 4 KiB for each 128 bytes.
        assert_eq!(HashTable::new(96 << 20, 4096).order, 22);
        assert_eq!(real_mode(512 << 20, 4096), 128 << 20);
        assert_eq!(real_mode(1 << 30, 4096), 256 << 20);
        assert_eq!(real_mode(1 << 30, 65536), 1 << 30);
    }
}
