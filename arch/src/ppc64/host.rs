//! What the machine uses of a host's KVM, and what follows from each answer.

use crossvisor_vmm::arch::{Capability, Host};
use crossvisor_vmm::config::VmConfig;
use crossvisor_vmm::error::{Error, Result};

use super::speculation::{BEHAVIOUR, CHARACTER};
use crate::shared::{
    self,
    host::{Effect, choose},
};

/// Processor version register of a POWER9, DD2.3, as QEMU emulates one.
const PVR_POWER9: i64 = 0x4e_1203;
/// Ticks of the time base in a second, on every POWER processor since POWER8.
const TIMEBASE: i64 = 512_000_000;

/// Radix page sizes: the capability's name, the size's text, and the encoding
/// that every ISA 3.0 processor has for it, in the form of
/// `ibm,processor-radix-AP-encodings`: the AP value in the top three bits, the
/// logarithm of the size below.
pub const RADIX_PAGES: [(&str, &str, u32); 4] = [
    ("radix 4K", "4K", 0x0000_000c),
    ("radix 64K", "64K", 0xa000_0010),
    ("radix 2M", "2M", 0x2000_0015),
    ("radix 1G", "1G", 0x4000_001e),
];

/// What the machine uses, or would use: the KVM API's names for capabilities
/// (section 4.4), `PVR` for the processor version register, `nested` for a KVM
/// that is itself a guest's, `timebase` for the time base's frequency, `radix *`
/// for the page sizes of KVM_PPC_GET_RMMU_INFO, `CPU *` for KVM_PPC_GET_CPU_CHAR.
const USES: &[(&str, Effect)] = &[
    ("PVR", |value| match value >> 16 {
        0x4e => "guests see a POWER9".into(),
        0x80 => "guests see a POWER10".into(),
        0x82 => "guests see a POWER11".into(),
        0 => "not known".into(),
        _ => "guests see this host's processor".into(),
    }),
    ("nested", |value| match value {
        0 => "this is KVM-HV on the bare machine".into(),
        _ => "this is KVM-HV in a guest of another hypervisor, with radix translation only".into(),
    }),
    ("KVM_CAP_PPC_PAPR", |value| {
        needed(value, "guests are pseries partitions")
    }),
    ("KVM_CAP_PPC_MMU_RADIX", |value| {
        choose(
            value,
            "guests may translate by radix trees (--mmu radix)",
            "guests translate by a hashed page table",
        )
    }),
    ("KVM_CAP_PPC_MMU_HASH_V3", |value| {
        choose(
            value,
            "guests may translate by a hashed page table (--mmu hpt)",
            "guests translate by radix trees",
        )
    }),
    ("KVM_CAP_IRQ_XICS", |value| {
        needed(value, "guests have an XICS in the kernel")
    }),
    ("KVM_CAP_PPC_IRQ_XIVE", |value| {
        choose(
            value,
            "guests may have a XIVE (--irqchip xive), and an XICS runs on this host's",
            "KVM has no XIVE for guests: their XICS is software",
        )
    }),
    ("KVM_CAP_PPC_RTAS", |value| {
        needed(value, "KVM handles the RTAS calls of the XICS")
    }),
    ("KVM_CAP_PPC_ENABLE_HCALL", |value| {
        needed(value, "KVM handles hypercalls that it is asked to")
    }),
    ("KVM_CAP_IRQFD", |value| {
        needed(value, "devices interrupt by a write")
    }),
    ("KVM_CAP_IOEVENTFD", |value| {
        choose(
            value,
            "notifies wake device threads",
            "notifies stop the vCPU",
        )
    }),
    ("KVM_CAP_IMMEDIATE_EXIT", |value| {
        needed(value, "vCPUs can be stopped at any time")
    }),
    ("radix 4K", |value| page(value, "4K")),
    ("radix 64K", |value| page(value, "64K")),
    ("radix 2M", |value| page(value, "2M")),
    ("radix 1G", |value| page(value, "1G")),
    ("timebase", |value| {
        format!("time passes in {value} ticks a second")
    }),
    (CHARACTER, |value| {
        choose(
            value,
            "guests are told what the processor has against speculation",
            "not known: guests do all against speculation that software can",
        )
    }),
    (BEHAVIOUR, |value| {
        choose(
            value,
            "guests are told what they have to do against speculation",
            "not known: guests do all against speculation that software can",
        )
    }),
];

fn needed(value: i64, there: &str) -> String {
    choose(value, there, "no machine can be built")
}

fn page(value: i64, size: &str) -> String {
    choose(
        value,
        &format!("radix trees have pages of {size}"),
        &format!("radix trees have no pages of {size}"),
    )
}

/// The list of capabilities, with the values that `value` gives.
pub fn capabilities(value: impl Fn(&'static str) -> i64) -> Vec<Capability> {
    shared::host::capabilities(USES, value)
}

/// Checks for what no machine can do without.
///
/// # Errors
/// Names what is missing, and what would work.
pub fn require(host: &Host) -> Result<()> {
    let needed = [
        ("KVM_CAP_PPC_PAPR", "load the module kvm-hv"),
        ("KVM_CAP_IRQ_XICS", "use a kernel with CONFIG_KVM_XICS"),
        ("KVM_CAP_PPC_RTAS", "use a newer kernel (Linux 3.10 has it)"),
        (
            "KVM_CAP_PPC_ENABLE_HCALL",
            "use a newer kernel (Linux 3.17 has it)",
        ),
        ("KVM_CAP_IRQFD", "use a kernel with CONFIG_KVM_XICS"),
        (
            "KVM_CAP_IMMEDIATE_EXIT",
            "use a newer kernel (Linux 4.13 has it)",
        ),
    ];
    match needed.into_iter().find(|(name, _)| !host.has(name)) {
        None => Ok(()),
        Some((name, advice)) => Err(Error::Capability {
            capability: name.into(),
            advice: advice.into(),
        }),
    }
}

/// The least size in bytes of a page behind the memory of a machine of `config`:
/// huge pages are of 2 MiB or 16 MiB, by how the host translates.
pub fn backing_page(config: &VmConfig, host: &Host) -> u64 {
    match config.hugepages {
        true => host.page_size.max(2 << 20),
        false => host.page_size,
    }
}

/// The processor version register that guests see.
pub fn pvr(host: &Host) -> u32 {
    host.capability("PVR") as u32
}

/// The time base's frequency in Hz.
pub fn timebase(host: &Host) -> u32 {
    u32::try_from(host.capability("timebase")).unwrap_or(TIMEBASE as u32)
}

/// The host's encodings of radix page sizes.
pub fn radix_encodings(host: &Host) -> Vec<u32> {
    RADIX_PAGES
        .iter()
        .map(|(name, ..)| host.capability(name) as u32)
        .filter(|encoding| *encoding != 0)
        .collect()
}

/// A POWER9 server with KVM-HV on the bare machine.
pub fn typical() -> Host {
    let encoding = |name| {
        let page = RADIX_PAGES.iter().find(|(page, ..)| *page == name);
        page.map(|(_, _, encoding)| i64::from(*encoding))
    };
    Host {
        page_size: 65536,
        max_vcpus: 2048,
        physical_bits: 51,
        capabilities: capabilities(|name| match name {
            "PVR" => PVR_POWER9,
            "timebase" => TIMEBASE,
            "nested" | CHARACTER | BEHAVIOUR => 0,
            name => encoding(name).unwrap_or(1),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_has_an_effect() {
        for value in [0, 1, 0x4e_1203, 0x80_0200, 0x82_0100] {
            let list = capabilities(|_| value);
            assert_eq!(list.len(), USES.len());
            assert!(list.iter().all(|capability| !capability.effect.is_empty()));
        }
        for (name, effect) in USES {
            assert_ne!(effect(0), effect(0x4e_1203), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_done_without_is_named() {
        require(&typical()).unwrap();
        let mut pr = typical();
        pr.capabilities
            .retain(|capability| capability.name != "KVM_CAP_PPC_PAPR");
        let error = require(&pr).unwrap_err().to_string();
        assert!(error.contains("KVM_CAP_PPC_PAPR"), "{error}");
        assert!(error.contains("kvm-hv"), "{error}");
    }

    #[test]
    fn the_typical_host_is_a_power9() {
        let host = typical();
        assert_eq!(pvr(&host) >> 16, 0x4e);
        assert_eq!(timebase(&host), 512_000_000);
        let pages = [0x0000_000c, 0xa000_0010, 0x2000_0015, 0x4000_001e];
        assert_eq!(radix_encodings(&host), pages);
    }
}
