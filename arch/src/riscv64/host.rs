//! What the machine uses of a host's KVM, and what follows from each answer.

use crossvisor_vmm::arch::{Capability, Host};
use crossvisor_vmm::error::{Error, Result};

use super::isa;
use crate::shared::{
    self,
    host::{Effect, choose},
};

/// How many message numbers each vCPU's IMSIC has; 0 where KVM has no AIA.
pub const AIA_IDS: &str = "aia-ids";
/// KVM_CAP_IRQFD.
pub const IRQFD: &str = "KVM_CAP_IRQFD";
/// Whether KVM_REG_RISCV_SBI_EXT has the debug console.
pub const DBCN: &str = "sbi-dbcn";
/// Ticks per second of the `time` CSR.
pub const TIMEBASE: &str = "timebase-frequency";
/// The satp CSR's mode field for the largest page tables.
pub const SATP_MODE: &str = "satp-mode";
/// Bytes that a cache-block management instruction is about.
pub const CBOM_SIZE: &str = "zicbom-block-size";
/// Bytes that cbo.zero zeroes.
pub const CBOZ_SIZE: &str = "zicboz-block-size";
/// IDs that the SBI tells guests: who made the hart, which, and its version.
pub const VENDOR_ID: &str = "mvendorid";
/// See [`VENDOR_ID`].
pub const ARCH_ID: &str = "marchid";
/// See [`VENDOR_ID`].
pub const IMP_ID: &str = "mimpid";

/// What the machine uses, or would use, besides extensions of the instruction
/// set: the KVM API's names for capabilities (section 4.4), and registers of
/// KVM_GET_ONE_REG by their field's name.
const USES: &[(&str, Effect)] = &[
    (AIA_IDS, |value| match value {
        0 => "guests have a PLIC: devices on PCI share four wires".into(),
        ids => format!("guests have an AIA: devices on PCI have MSI-X, {ids} for each vCPU"),
    }),
    (IRQFD, |value| {
        choose(
            value,
            "devices interrupt by a write where there is an AIA",
            "guests have a PLIC",
        )
    }),
    ("KVM_CAP_IOEVENTFD", |value| {
        choose(
            value,
            "notifies wake device threads",
            "notifies stop the vCPU",
        )
    }),
    ("KVM_CAP_IMMEDIATE_EXIT", |value| {
        choose(
            value,
            "vCPUs can be stopped at any time",
            "no machine can be built",
        )
    }),
    ("KVM_CAP_ONE_REG", |value| {
        choose(value, "vCPUs can be set up", "no machine can be built")
    }),
    (DBCN, |value| {
        choose(
            value,
            "guests can print by the SBI before they have drivers",
            "guests print by a driver of their own only",
        )
    }),
    (TIMEBASE, |value| match value {
        0 => "not known".into(),
        hertz => format!("guests' time counts {hertz} times a second"),
    }),
    (SATP_MODE, |value| match mmu_type(value) {
        Some(name) => format!("guests' page tables are up to {name}"),
        None => "guests find out the kinds of page tables themselves".into(),
    }),
    (CBOM_SIZE, block),
    (CBOZ_SIZE, block),
    (VENDOR_ID, told),
    (ARCH_ID, told),
    (IMP_ID, told),
];

fn block(value: i64) -> String {
    match value {
        0 => "guests have none of these instructions".into(),
        bytes => format!("guests work on cache blocks of {bytes} bytes"),
    }
}

fn told(value: i64) -> String {
    choose(value, "guests are told it", "guests are told 0")
}

fn extension(value: i64) -> String {
    choose(value, "guests have it", "guests do not have it")
}

/// The binding's name of the page tables with mode `mode` in satp (RISC-V
/// privileged specification, "Supervisor Address Translation and Protection").
pub fn mmu_type(mode: i64) -> Option<&'static str> {
    match mode {
        8 => Some("riscv,sv39"),
        9 => Some("riscv,sv48"),
        10 => Some("riscv,sv57"),
        _ => None,
    }
}

/// The list of capabilities, with the values that `value` gives. Extensions
/// that are not there are left out: there are too many to tell of them.
pub fn capabilities(value: impl Fn(&'static str) -> i64) -> Vec<Capability> {
    let mut list = shared::host::capabilities(USES, &value);
    let extensions = isa::EXTENSIONS.map(|name| (name, extension as Effect));
    let extensions = shared::host::capabilities(&extensions, &value);
    list.extend(extensions.into_iter().filter(|found| found.value != 0));
    list
}

/// Checks for what no machine can do without.
///
/// # Errors
/// Names what is missing.
pub fn require(host: &Host) -> Result<()> {
    let needed = ["KVM_CAP_IMMEDIATE_EXIT", "KVM_CAP_ONE_REG"];
    match needed.into_iter().find(|name| !host.has(name)) {
        None => Ok(()),
        Some(name) => Err(Error::Capability {
            capability: name.into(),
            advice: "use a newer kernel (Linux 5.16 has it)".into(),
        }),
    }
}

/// A server by the RVA23 profile, with AIA.
pub fn typical() -> Host {
    let extensions = [
        "i",
        "m",
        "a",
        "f",
        "d",
        "c",
        "v",
        "zicbom",
        "zicboz",
        "zicntr",
        "zicond",
        "zicsr",
        "zifencei",
        "zihintntl",
        "zihintpause",
        "zihpm",
        "zimop",
        "zawrs",
        "zfa",
        "zfhmin",
        "zca",
        "zcb",
        "zcd",
        "zcmop",
        "zba",
        "zbb",
        "zbs",
        "zkt",
        "zvbb",
        "zvfhmin",
        "zvkt",
        "ssaia",
        "sscofpmf",
        "sstc",
        "svinval",
        "svnapot",
        "svpbmt",
        "svade",
    ];
    Host {
        page_size: 4096,
        max_vcpus: 1024,
        physical_bits: 50,
        capabilities: capabilities(|name| match name {
            AIA_IDS => 255,
            TIMEBASE => 10_000_000,
            SATP_MODE => 9,
            CBOM_SIZE | CBOZ_SIZE => 64,
            VENDOR_ID | ARCH_ID | IMP_ID => 0,
            name if isa::EXTENSIONS.contains(&name) => extensions.contains(&name).into(),
            _ => 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_has_an_effect() {
        for value in [0, 1, 9, i64::MAX] {
            let list = capabilities(|_| value);
            assert!(list.iter().all(|capability| !capability.effect.is_empty()));
        }
        assert_eq!(capabilities(|_| 0).len(), USES.len());
    }

    #[test]
    fn answers_that_matter_differ() {
        for (name, effect) in USES {
            assert_ne!(effect(0), effect(8), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_done_without_is_named() {
        require(&typical()).unwrap();
        let mut old = typical();
        old.capabilities
            .retain(|capability| capability.name != "KVM_CAP_ONE_REG");
        let error = require(&old).unwrap_err().to_string();
        assert!(error.contains("KVM_CAP_ONE_REG"), "{error}");
    }
}
