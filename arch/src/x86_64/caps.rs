//! What the machine uses of KVM, and what it does when that is not there.

use crossvisor_vmm::arch::{Capability, Host};
use crossvisor_vmm::error::{Error, Result};

/// The most vCPUs of a machine. In-kernel I/O APICs and messages without
/// interrupt remapping name their destination in 8 bits, of which 255 means
/// all.
pub const MAX_VCPUS: u32 = 255;

/// A capability that the machine uses, or would use.
pub struct Known {
    /// Its name in the KVM API.
    pub name: &'static str,
    /// Its number in the KVM API.
    pub number: u32,
    /// Whether no machine can be made without it.
    pub required: bool,
    /// What crossvisor does when it is there.
    with: &'static str,
    /// What crossvisor does when it is not.
    without: &'static str,
}

impl Known {
    /// As found on a host.
    pub fn found(&self, value: i64) -> Capability {
        let effect = match value {
            0 => self.without,
            _ => self.with,
        };
        Capability {
            name: self.name,
            value,
            effect: effect.into(),
        }
    }
}

const fn required(name: &'static str, number: u32, with: &'static str) -> Known {
    Known {
        name,
        number,
        required: true,
        with,
        without: "no machine can be made",
    }
}

const fn optional(
    name: &'static str,
    number: u32,
    with: &'static str,
    without: &'static str,
) -> Known {
    Known {
        name,
        number,
        required: false,
        with,
        without,
    }
}

/// All of them, in the order that `crossvisor doctor` shows.
pub const KNOWN: &[Known] = &[
    required("KVM_CAP_USER_MEMORY", 3, "guest memory is this process's"),
    required(
        "KVM_CAP_EXT_CPUID",
        7,
        "the guest gets the host's CPU features",
    ),
    required("KVM_CAP_IRQCHIP", 0, "APICs are in the kernel"),
    required(
        "KVM_CAP_IRQ_ROUTING",
        25,
        "message interrupts are routed in the kernel",
    ),
    required(
        "KVM_CAP_IRQFD",
        32,
        "devices interrupt by a write, without a vCPU's help",
    ),
    required(
        "KVM_CAP_IOEVENTFD",
        36,
        "a driver's notification does not leave the kernel",
    ),
    required(
        "KVM_CAP_MP_STATE",
        14,
        "secondary CPUs wait for INIT and SIPI",
    ),
    required(
        "KVM_CAP_SET_TSS_ADDR",
        4,
        "KVM's pages are out of the way of guest memory",
    ),
    optional(
        "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        37,
        "KVM's pages are out of the way of guest memory",
        "KVM's identity map is at its default place",
    ),
    optional(
        "KVM_CAP_IMMEDIATE_EXIT",
        136,
        "vCPUs stop without a race",
        "vCPUs stop by repeated signals",
    ),
    optional(
        "KVM_CAP_TSC_DEADLINE_TIMER",
        72,
        "the guest's timer is the TSC deadline",
        "the guest calibrates its APIC timer",
    ),
    optional(
        "KVM_CAP_CLOCKSOURCE",
        8,
        "the guest reads kvmclock",
        "the guest has no paravirtual clock and calibrates its TSC",
    ),
    optional(
        "KVM_CAP_GET_TSC_KHZ",
        61,
        "CPUID tells the guest its timer frequencies",
        "CPUID does not tell the guest its timer frequencies",
    ),
    optional(
        "KVM_CAP_SIGNAL_MSI",
        77,
        "not used: messages go through irqfd",
        "not needed: messages go through irqfd",
    ),
    optional(
        "KVM_CAP_PIT2",
        33,
        "not used: the machine is ACPI hardware-reduced, without a PIT",
        "not needed: the machine is ACPI hardware-reduced, without a PIT",
    ),
    optional(
        "KVM_CAP_X2APIC_API",
        129,
        "not used: at most 255 vCPUs",
        "not needed: at most 255 vCPUs",
    ),
    optional(
        "KVM_CAP_READONLY_MEM",
        81,
        "not used: no firmware is mapped",
        "not needed: no firmware is mapped",
    ),
    optional(
        "KVM_CAP_NESTED_STATE",
        157,
        "guests may run KVM themselves, where the host's module allows it",
        "guests may not run KVM themselves",
    ),
];

/// Every capability, as `value` finds it by number.
pub fn probe(mut value: impl FnMut(u32) -> i64) -> Vec<Capability> {
    let all = KNOWN.iter();
    all.map(|known| known.found(value(known.number))).collect()
}

/// Checks that `host` has what no machine can be made without.
///
/// # Errors
/// Names the first that is not there.
pub fn require(host: &Host) -> Result<()> {
    let mut required = KNOWN.iter().filter(|known| known.required);
    match required.find(|known| !host.has(known.name)) {
        None => Ok(()),
        Some(missing) => Err(Error::Capability {
            capability: missing.name.into(),
            advice: "use a host whose kernel has all of KVM built in".into(),
        }),
    }
}
