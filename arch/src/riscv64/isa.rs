//! Extensions of the instruction set: KVM's numbers for them, and how a device
//! tree names them (Documentation/devicetree/bindings/riscv/extensions.yaml).

use crossvisor_vmm::arch::Host;

/// The extensions that KVM knows (KVM API, section 4.68; `enum
/// KVM_RISCV_ISA_EXT_ID`): the position is KVM's number, the name that of the
/// specification in lower case.
pub const EXTENSIONS: [&str; 71] = [
    "a",
    "c",
    "d",
    "f",
    "h",
    "i",
    "m",
    "svpbmt",
    "sstc",
    "svinval",
    "zihintpause",
    "zicbom",
    "zicboz",
    "zbb",
    "ssaia",
    "v",
    "svnapot",
    "zba",
    "zbs",
    "zicntr",
    "zicsr",
    "zifencei",
    "zihpm",
    "smstateen",
    "zicond",
    "zbc",
    "zbkb",
    "zbkc",
    "zbkx",
    "zknd",
    "zkne",
    "zknh",
    "zkr",
    "zksed",
    "zksh",
    "zkt",
    "zvbb",
    "zvbc",
    "zvkb",
    "zvkg",
    "zvkned",
    "zvknha",
    "zvknhb",
    "zvksed",
    "zvksh",
    "zvkt",
    "zfh",
    "zfhmin",
    "zihintntl",
    "zvfh",
    "zvfhmin",
    "zfa",
    "ztso",
    "zacas",
    "sscofpmf",
    "zimop",
    "zca",
    "zcb",
    "zcd",
    "zcf",
    "zcmop",
    "zawrs",
    "smnpm",
    "ssnpm",
    "svade",
    "svadu",
    "svvptc",
    "zabha",
    "ziccrse",
    "zaamo",
    "zalrsc",
];

/// The order of single letters in an ISA string (RISC-V unprivileged
/// specification, "ISA Extension Naming Conventions").
const LETTERS: &str = "imafdqlcbkjptvnh";

/// Where an extension goes in an ISA string: single letters first, then those
/// with Z, then those of the supervisor.
fn rank(name: &str) -> (usize, &str) {
    match name.len() {
        1 => (LETTERS.find(name).unwrap_or(LETTERS.len()), ""),
        _ if name.starts_with('z') => (LETTERS.len() + 1, name),
        _ => (LETTERS.len() + 2, name),
    }
}

/// What guests of `host` are told that they have, in the order of an ISA
/// string. Messages to a vCPU by registers (Ssaia) are there only with the
/// controller that sends them.
pub fn extensions(host: &Host, aia: bool) -> Vec<&'static str> {
    let there = |name: &&'static str| host.has(name) && (aia || *name != "ssaia");
    let mut names: Vec<_> = EXTENSIONS.into_iter().filter(there).collect();
    names.sort_by_key(|name| rank(name));
    names
}

/// The ISA string of a 64-bit hart with `extensions`, as `riscv,isa` has it.
pub fn string(extensions: &[&str]) -> String {
    let mut text = String::from("rv64");
    for name in extensions {
        if name.len() > 1 {
            text.push('_');
        }
        text.push_str(name);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::host;
    use super::*;

    #[test]
    fn strings_are_in_canonical_order() {
        let mut names = vec!["sstc", "zbb", "c", "d", "svade", "zba", "a", "i", "f", "m"];
        names.sort_by_key(|name| rank(name));
        assert_eq!(string(&names), "rv64imafdc_zba_zbb_sstc_svade");
    }

    #[test]
    fn names_are_unique_and_lower_case() {
        let mut names = EXTENSIONS.to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), EXTENSIONS.len());
        let lower = |name: &str| {
            name.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        assert!(EXTENSIONS.iter().all(|name| lower(name)));
    }

    #[test]
    fn guests_have_ssaia_with_the_aia_only() {
        let host = host::typical();
        assert!(extensions(&host, true).contains(&"ssaia"));
        assert!(!extensions(&host, false).contains(&"ssaia"));
    }
}
