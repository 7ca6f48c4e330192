//! What the machine uses of a host's KVM, and what follows from each answer.

use crossvisor_vmm::arch::{Capability, Host};
use crossvisor_vmm::error::{Error, Result};

use crate::shared::{
    self,
    host::{Effect, choose},
};

/// What the machine uses, or would use: the KVM API's names for capabilities
/// (section 4.4), `gic*` for devices that KVM_CREATE_DEVICE makes, `TGran*` for
/// fields of ID_AA64MMFR0_EL1, and the PSCI version of KVM_REG_ARM_PSCI_VERSION.
const USES: &[(&str, Effect)] = &[
    ("gicv3", |value| {
        choose(
            value,
            "guests may have a GICv3",
            "guests have a GICv2, with at most 8 vCPUs",
        )
    }),
    ("gicv3-its", |value| {
        choose(
            value,
            "a GICv3 takes messages: devices on PCI have MSI-X",
            "a GICv3, where there is one, takes no messages: devices on PCI share four wires",
        )
    }),
    ("gicv2", |value| {
        choose(
            value,
            "guests may have a GICv2, with or without v2m",
            "guests have a GICv3",
        )
    }),
    ("KVM_CAP_IRQFD", |value| {
        choose(
            value,
            "devices interrupt by a write",
            "no machine can be built",
        )
    }),
    ("KVM_CAP_IOEVENTFD", |value| {
        choose(
            value,
            "notifies wake device threads",
            "notifies stop the vCPU",
        )
    }),
    ("KVM_CAP_IRQ_ROUTING", |value| {
        choose(
            value,
            "messages are routed in the kernel",
            "devices have wires only",
        )
    }),
    ("KVM_CAP_IMMEDIATE_EXIT", |value| {
        choose(
            value,
            "vCPUs can be stopped at any time",
            "no machine can be built",
        )
    }),
    ("KVM_CAP_ARM_VM_IPA_SIZE", |value| match value {
        0 => "guest-physical addresses have 40 bits".into(),
        bits => format!("guest-physical addresses have up to {bits} bits"),
    }),
    ("KVM_CAP_ARM_PSCI_0_2", |value| {
        choose(
            value,
            "guests start vCPUs and power off by PSCI",
            "no machine can be built",
        )
    }),
    ("PSCI", |version| match version {
        0x1_0001.. => "a guest's panic is told apart from a reboot (SYSTEM_RESET2)".into(),
        0 => "not known".into(),
        _ => "a guest's panic looks like a reboot: there is no SYSTEM_RESET2".into(),
    }),
    ("KVM_CAP_ARM_PMU_V3", |value| {
        choose(
            value,
            "guests have performance counters",
            "guests have no performance counters",
        )
    }),
    ("KVM_CAP_ARM_SVE", |value| {
        choose(value, "guests have SVE", "guests have no SVE")
    }),
    ("KVM_CAP_ARM_PTRAUTH_ADDRESS", |value| {
        choose(
            value,
            "guests have pointer authentication, when the generic kind is there too",
            "guests have no pointer authentication",
        )
    }),
    ("KVM_CAP_ARM_PTRAUTH_GENERIC", |value| {
        choose(
            value,
            "guests have pointer authentication, when the address kind is there too",
            "guests have no pointer authentication",
        )
    }),
    ("TGran4", |value| granule(value, "4K")),
    ("TGran16", |value| granule(value, "16K")),
    ("TGran64", |value| granule(value, "64K")),
];

fn granule(value: i64, size: &str) -> String {
    choose(
        value,
        &format!("kernels with {size} pages run"),
        &format!("kernels with {size} pages do not run"),
    )
}

/// The list of capabilities, with the values that `value` gives.
pub fn capabilities(value: impl Fn(&'static str) -> i64) -> Vec<Capability> {
    shared::host::capabilities(USES, value)
}

/// Checks for what no machine can do without.
///
/// # Errors
/// Names what is missing.
pub fn require(host: &Host) -> Result<()> {
    let needed = [
        "KVM_CAP_IRQFD",
        "KVM_CAP_IMMEDIATE_EXIT",
        "KVM_CAP_ARM_PSCI_0_2",
    ];
    match needed.into_iter().find(|name| !host.has(name)) {
        None => Ok(()),
        Some(name) => Err(Error::Capability {
            capability: name.into(),
            advice: "use a newer kernel (Linux 4.13 has it)".into(),
        }),
    }
}

/// A server with a GICv3 and a recent kernel.
pub fn typical() -> Host {
    Host {
        page_size: 4096,
        max_vcpus: 512,
        physical_bits: 48,
        capabilities: capabilities(|name| match name {
            "gicv2" => 0,
            "KVM_CAP_ARM_VM_IPA_SIZE" => 48,
            "PSCI" => 0x1_0001,
            _ => 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_has_an_effect() {
        for value in [0, 1, 0x1_0000, 0x1_0001] {
            let list = capabilities(|_| value);
            assert_eq!(list.len(), USES.len());
            assert!(list.iter().all(|capability| !capability.effect.is_empty()));
        }
    }

    #[test]
    fn answers_that_matter_differ() {
        for (name, effect) in USES {
            assert_ne!(effect(0), effect(0x1_0001), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_done_without_is_named() {
        require(&typical()).unwrap();
        let mut old = typical();
        old.capabilities
            .retain(|capability| capability.name != "KVM_CAP_IMMEDIATE_EXIT");
        let error = require(&old).unwrap_err().to_string();
        assert!(error.contains("KVM_CAP_IMMEDIATE_EXIT"), "{error}");
    }

    #[test]
    fn the_typical_host_is_consistent() {
        let host = typical();
        assert!(host.has("gicv3") && host.has("gicv3-its") && !host.has("gicv2"));
        let bits = host.capability("KVM_CAP_ARM_VM_IPA_SIZE");
        assert_eq!(bits, i64::from(host.physical_bits));
    }
}
