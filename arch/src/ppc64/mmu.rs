//! How the guest's MMU translates (Power ISA 3.0, Book III, chapter 5.7): by
//! radix trees, or by a hashed page table that the hypervisor keeps.

use crossvisor_vmm::arch::Host;
use crossvisor_vmm::error::{Error, Result};

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
        let offered: Vec<Mmu> = Mmu::ALL
            .into_iter()
            .filter(|mmu| mmu.is_offered(host))
            .collect();
        let Some(best) = offered.first() else {
            return Err(Error::Capability {
                capability: "KVM_CAP_PPC_MMU_RADIX or KVM_CAP_PPC_MMU_HASH_V3".into(),
                advice: "a POWER9 or later processor and the module kvm-hv have one".into(),
            });
        };
        let Some(name) = name.filter(|name| *name != "auto") else {
            return Ok(*best);
        };
        let names = offered.iter().map(|mmu| mmu.name());
        let names = names.collect::<Vec<_>>().join(", ");
        match Mmu::ALL.into_iter().find(|mmu| mmu.name() == name) {
            Some(mmu) if offered.contains(&mmu) => Ok(mmu),
            Some(_) => Err(Error::config(
                "--mmu",
                format!("this host does not offer {name}; it offers {names} and auto"),
            )),
            None => Err(Error::config(
                "--mmu",
                format!("there is no {name}; this host offers {names} and auto"),
            )),
        }
    }
}

/// The logarithm of the hashed page table's size in bytes for a guest with
/// `memory` bytes: a 128th of it, as Linux's own table on a bare machine, within
/// the bounds that KVM_PPC_ALLOCATE_HTAB takes.
pub fn hpt_order(memory: u64) -> u32 {
    (memory / 128).next_power_of_two().ilog2().clamp(18, 46)
}

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
        assert_eq!(hpt_order(64 << 20), 19);
        assert_eq!(hpt_order(1 << 30), 23);
        assert_eq!(hpt_order((1 << 30) + 128), 24);
        assert_eq!(hpt_order(1), 18);
        assert_eq!(hpt_order(u64::MAX), 46);
    }
}
