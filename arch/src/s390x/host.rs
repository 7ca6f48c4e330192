//! What the machine uses of a host's KVM, and what follows from each answer.

use crossvisor_vmm::arch::{Capability, Host};
use crossvisor_vmm::error::{Error, Result};

use crate::shared::{
    self,
    host::{Effect, choose},
};

/// The facilities of guests: a bit each, the first the leftmost.
pub const FACILITIES: &str = "facilities";

/// Page tables with storage keys, without which KVM makes no VM.
pub const PGSTE: &str = "pgste";

/// Configuration topology, which Linux believes STFLE about and then needs.
pub const TOPOLOGY: usize = 11;

/// What KVM grants and this machine has nothing behind: cryptographic adapters
/// (AP query configuration, AP facilities test, AP-queue interruptions).
const NOT_GIVEN: [usize; 3] = [12, 15, 65];

/// Huge pages of 1 MiB for guests.
const HUGE_PAGES: &str = "KVM_CAP_S390_HPAGE_1M";

/// What the machine uses, or would use: the KVM API's names for capabilities
/// (section 4.4), `pgste` for a VM's being made, `flic` for the device,
/// `topology` for facility 11.
const USES: &[(&str, Effect)] = &[
    (PGSTE, |value| {
        choose(
            value,
            "this program's page tables hold storage keys",
            "no machine can be built, and no VM asked for the rest",
        )
    }),
    ("KVM_CAP_S390_COW", |value| {
        choose(
            value,
            "ESOP: guest memory is mapped when it is touched",
            "no ESOP: storage keys are on from the start, so that fresh memory can be written",
        )
    }),
    ("KVM_CAP_S390_CSS_SUPPORT", |value| {
        choose(
            value,
            "guests have a channel subsystem",
            "no machine can be built",
        )
    }),
    ("flic", |value| {
        choose(
            value,
            "interrupts are the FLIC's",
            "no machine can be built",
        )
    }),
    ("KVM_CAP_IRQFD", |value| {
        choose(
            value,
            "adapter interruptions come by a write",
            "devices interrupt by calls",
        )
    }),
    ("KVM_CAP_S390_IRQCHIP", |value| {
        choose(
            value,
            "adapter interruptions are routed in the kernel",
            "device threads set indicators",
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
            "vCPUs are stopped by signals",
        )
    }),
    ("KVM_CAP_S390_USER_SIGP", |value| {
        choose(
            value,
            "vCPUs start and stop each other",
            "no machine can be built",
        )
    }),
    ("KVM_CAP_S390_USER_STSI", |value| {
        choose(
            value,
            "guests read their VM's name and topology",
            "guests do not read their VM's name",
        )
    }),
    ("KVM_CAP_S390_MEM_OP", |value| {
        choose(
            value,
            "operands of I/O instructions are read",
            "no machine can be built",
        )
    }),
    ("KVM_CAP_S390_INJECT_IRQ", |value| {
        choose(
            value,
            "program interruptions can be caused",
            "no machine can be built",
        )
    }),
    (HUGE_PAGES, |value| {
        choose(
            value,
            "guests can have --hugepages",
            "no --hugepages, unless kvm is loaded with hpage=1",
        )
    }),
    ("topology", |value| {
        choose(
            value,
            "facility 11: guests have a topology",
            "no facility 11: guests have no topology",
        )
    }),
    ("KVM_CAP_S390_VECTOR_REGISTERS", |value| {
        choose(
            value,
            "guests have vector registers",
            "guests have no vector registers",
        )
    }),
    ("KVM_CAP_S390_DIAG318", |value| {
        choose(
            value,
            "DIAGNOSE 0x318: the host's hardware is told what guests are",
            "no DIAGNOSE 0x318: the host's hardware is not told what guests are",
        )
    }),
];

/// The list of capabilities, with the values that `value` gives, and the
/// facilities.
pub fn capabilities(value: impl Fn(&'static str) -> i64, facilities: &[usize]) -> Vec<Capability> {
    let mut list = shared::host::capabilities(USES, value);
    list.push(Capability {
        name: FACILITIES,
        value: facilities.len() as i64,
        effect: ranges(facilities),
    });
    list
}

/// Numbers as text, those that follow each other as ranges.
fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => parts.push((*number, *number)),
        }
    }
    let part = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let parts: Vec<_> = parts.iter().map(part).collect();
    parts.join(", ")
}

/// The facilities of a list as STFLE stores it.
pub fn facilities(list: &[u64]) -> Vec<usize> {
    let bits = 0..list.len() * 64;
    let set = |bit: &usize| {
        let word = list.get(bit / 64).copied().unwrap_or(0);
        word >> (63 - bit % 64) & 1 != 0
    };
    bits.filter(set).collect()
}

/// Gives a guest, whose facilities are `guest`, those of the host's that KVM
/// grants: more than it begins with (Linux `kvm_s390_fac_ext`), all of which
/// KVM itself does the work for. The topology facility is given wherever the
/// host has it: the guest sees it by STFLE even where the hardware ignores the
/// model.
pub fn grant(guest: &mut [u64], host: &[u64], granted: &[u64]) {
    let mask = |word: usize, facility: usize| match facility / 64 == word {
        true => 1 << (63 - facility % 64),
        false => 0,
    };
    let lists = guest.iter_mut().zip(host.iter().zip(granted)).enumerate();
    for (word, (guest, (host, granted))) in lists {
        let held_back: u64 = NOT_GIVEN.iter().map(|facility| mask(word, *facility)).sum();
        *guest |= host & (granted & !held_back | mask(word, TOPOLOGY));
    }
}

/// Checks for what no machine can do without.
///
/// # Errors
/// Names what is missing.
pub fn require(host: &Host) -> Result<()> {
    if !host.has(PGSTE) {
        // Guests need page tables of twice the size in the whole process.
        return Err(Error::Capability {
            capability: "page tables with storage keys (KVM_CREATE_VM: EINVAL)".into(),
            advice: "use a crossvisor that is linked with --s390-pgste, or set `sysctl \
                     vm.allocate_pgste=1` and start again"
                .into(),
        });
    }
    let needed = [
        "KVM_CAP_S390_CSS_SUPPORT",
        "flic",
        "KVM_CAP_S390_USER_SIGP",
        "KVM_CAP_S390_MEM_OP",
        "KVM_CAP_S390_INJECT_IRQ",
    ];
    match needed.into_iter().find(|name| !host.has(name)) {
        None => Ok(()),
        Some(name) => Err(Error::Capability {
            capability: name.into(),
            advice: "use a newer kernel (Linux 4.2 has it)".into(),
        }),
    }
}

/// Checks that guests can have huge pages.
///
/// # Errors
/// Says how they could.
pub fn require_huge_pages(host: &Host) -> Result<()> {
    match host.has(HUGE_PAGES) {
        true => Ok(()),
        false => Err(Error::config(
            "--hugepages",
            "this host's KVM gives guests none: load it anew with `modprobe kvm hpage=1`, or \
             boot with kvm.hpage=1",
        )),
    }
}

/// A logical partition of a z14 with a recent kernel.
pub fn typical() -> Host {
    let facilities: Vec<usize> = (0..4).chain(6..12).chain(16..29).collect();
    Host {
        page_size: 4096,
        max_vcpus: 248,
        physical_bits: 44,
        capabilities: capabilities(|_| 1, &facilities),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_matter_differ() {
        for (name, effect) in USES {
            assert_ne!(effect(0), effect(1), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_done_without_is_named() {
        require(&typical()).unwrap();
        let mut old = typical();
        old.capabilities
            .retain(|capability| capability.name != "KVM_CAP_S390_MEM_OP");
        let error = require(&old).unwrap_err().to_string();
        assert!(error.contains("KVM_CAP_S390_MEM_OP"), "{error}");
        // It is the cause of others that are not there.
        old.capabilities
            .retain(|capability| capability.name != PGSTE);
        let error = require(&old).unwrap_err().to_string();
        assert!(error.contains("vm.allocate_pgste=1"), "{error}");
    }

    #[test]
    fn guests_have_what_kvm_grants_of_the_host_s_facilities() {
        let list = |facilities: &[usize]| {
            let mut list = [0; 4];
            for facility in facilities {
                list[facility / 64] |= 1_u64 << (63 - facility % 64);
            }
            list
        };
        // What KVM begins with stays, the host's or not (STHYI is 74).
        let mut guest = list(&[0, 74]);
        let host = list(&[0, 11, 12, 15, 44, 65, 133, 156, 193]);
        let granted = list(&[0, 12, 15, 65, 156, 165, 193]);
        grant(&mut guest, &host, &granted);
        assert_eq!(facilities(&guest), [0, 11, 74, 156, 193]);
    }

    #[test]
    fn huge_pages_are_had_or_it_is_said_how() {
        require_huge_pages(&typical()).unwrap();
        let mut without = typical();
        without
            .capabilities
            .retain(|capability| capability.name != HUGE_PAGES);
        let error = require_huge_pages(&without).unwrap_err().to_string();
        assert!(error.contains("--hugepages") && error.contains("hpage=1"));
    }

    #[test]
    fn facilities_are_counted_from_the_left() {
        let list = facilities(&[0xe000_0000_0000_0001, 1 << 63]);
        assert_eq!(list, [0, 1, 2, 63, 64]);
        assert_eq!(ranges(&list), "0-2, 63-64");
        assert_eq!(ranges(&[7]), "7");
    }
}
