use super::*;

fn entry(function: u32, index: u32, registers: [u32; 4]) -> Entry {
    let [eax, ebx, ecx, edx] = registers;
    Entry {
        function,
        index,
        flags: u32::from(matches!(function, 4 | 0xb | 0x1f | 0x8000_001d)),
        eax,
        ebx,
        ecx,
        edx,
    }
}

fn text(bytes: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*bytes)
}

/// What KVM says on an EPYC host of which the VMM ran on CPU 1 of 2.
fn epyc() -> Vec<Entry> {
    vec![
        entry(0, 0, [0xd, text(b"Auth"), text(b"cAMD"), text(b"enti")]),
        entry(1, 0, [0x00a1_0f11, 0x0102_0800, 0xfeda_3203, 0x178b_fbff]),
        entry(7, 0, [0, 0xf1bf_23ab, 0x0041_5f5e, 0x10]),
        entry(0xb, 0, [0, 1, 0x100, 1]),
        entry(0xb, 1, [1, 2, 0x201, 1]),
        entry(
            KVM_BASE,
            0,
            [0x4000_0001, text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")],
        ),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(
            0x8000_0000,
            0,
            [0x8000_001e, text(b"Auth"), text(b"cAMD"), text(b"enti")],
        ),
        entry(0x8000_0001, 0, [0x00a1_0f11, 0, 0x0040_03f1, 0x2fd3_fbff]),
        entry(0x8000_0008, 0, [0x3030, 0x0100_d205, 0x1001, 0]),
        entry(0x8000_001d, 0, [0x121, 0x01c0_003f, 0x3f, 0]),
        entry(0x8000_001d, 3, [0x0004_0163, 0x03c0_003f, 0x7fff, 1]),
        entry(0x8000_001e, 0, [1, 0x100, 0x300, 0]),
    ]
}

/// The same of an Intel host with many threads.
fn xeon() -> Vec<Entry> {
    vec![
        entry(0, 0, [0x1f, text(b"Genu"), text(b"ntel"), text(b"ineI")]),
        entry(1, 0, [0x0008_06f8, 0x0740_0800, 0xf6fa_3203, 0x1f8b_fbff]),
        entry(4, 0, [0x7c00_4121, 0x02c0_003f, 0x3f, 0]),
        entry(4, 2, [0x7c00_4143, 0x03c0_003f, 0x7ff, 0]),
        entry(4, 3, [0x7c0f_c163, 0x0380_003f, 0x1bfff, 4]),
        entry(4, 4, [0, 0, 0, 0]),
        entry(0xb, 0, [0, 0, 0, 0]),
        entry(0x1f, 0, [0, 0, 0, 0]),
        entry(
            KVM_BASE,
            0,
            [0x4000_0001, text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")],
        ),
        entry(0x8000_0008, 0, [0x392e, 0, 0, 0]),
    ]
}

fn find(entries: &[Entry], function: u32, index: u32) -> Entry {
    let mut found = entries
        .iter()
        .filter(|entry| entry.function == function && entry.index == index);
    let first = *found
        .next()
        .unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
    assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
    first
}

const TIMING: Timing = Timing {
    tsc_deadline: true,
    tsc_khz: Some(2_600_000),
};

#[test]
fn each_cpu_has_its_own_apic_id_everywhere() {
    for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (255, 8)] {
        for cpu in [0, cpus / 2, cpus - 1] {
            let entries = guest(&epyc(), &Topology { cpus, cpu }, &TIMING);
            let features = find(&entries, 1, 0);
            assert_eq!(features.ebx >> 24, cpu);
            assert_eq!(features.ebx & 0xffff, 0x0800);
            assert_eq!(features.ebx >> 16 & 0xff, (1 << bits).min(255));
            assert_eq!(features.edx & EDX_HTT != 0, cpus > 1);
            for (index, shift, count, kind) in [(0, 0, 1, 1), (1, bits, cpus, 2), (2, 0, 0, 0)] {
                let level = find(&entries, 0xb, index);
                assert_eq!((level.eax, level.ebx), (shift, count));
                assert_eq!(level.ecx, kind << 8 | index);
                assert_eq!(level.edx, cpu);
                assert_eq!(level.flags, FLAG_INDEX);
            }
            assert_eq!(find(&entries, 0x8000_001e, 0).eax, cpu);
            assert_eq!(find(&entries, 0x8000_001e, 0).ebx, cpu & 0xff);
        }
    }
}

#[test]
fn features_are_the_hosts_with_a_hypervisor() {
    let topology = Topology { cpus: 2, cpu: 0 };
    let features = find(&guest(&epyc(), &topology, &TIMING), 1, 0);
    let host = find(&epyc(), 1, 0);
    assert_eq!(
        features.ecx & (ECX_HYPERVISOR | ECX_X2APIC),
        ECX_HYPERVISOR | ECX_X2APIC
    );
    assert_ne!(features.ecx & ECX_TSC_DEADLINE, 0);
    assert_eq!(features.ecx & ECX_OSXSAVE, 0);
    let own = ECX_HYPERVISOR | ECX_X2APIC | ECX_TSC_DEADLINE | ECX_OSXSAVE;
    assert_eq!(features.ecx & !own, host.ecx & !own);
    let none = Timing::default();
    let features = find(&guest(&epyc(), &topology, &none), 1, 0);
    assert_eq!(features.ecx & ECX_TSC_DEADLINE, 0);
    assert_eq!(
        find(&guest(&epyc(), &topology, &none), 7, 0),
        find(&epyc(), 7, 0)
    );
}

#[test]
fn amd_sizes_and_caches() {
    let entries = guest(&epyc(), &Topology { cpus: 6, cpu: 5 }, &TIMING);
    let sizes = find(&entries, 0x8000_0008, 0);
    assert_eq!(sizes.ecx, 5 | 3 << 12);
    assert_eq!((sizes.eax, sizes.ebx), (0x3030, 0x0100_d205));
    assert_ne!(find(&entries, 0x8000_0001, 0).ecx & AMD_ECX_CMP_LEGACY, 0);
    assert_eq!(find(&entries, 0x8000_001d, 0).eax >> 14, 0);
    assert_eq!(find(&entries, 0x8000_001d, 3).eax, 0x163 | 5 << 14);
    let one = guest(&epyc(), &Topology { cpus: 1, cpu: 0 }, &TIMING);
    assert_eq!(find(&one, 0x8000_0001, 0).ecx & AMD_ECX_CMP_LEGACY, 0);
    assert_eq!(find(&one, 0x8000_001d, 3).eax, 0x163);
}

#[test]
fn intel_caches_and_second_topology_leaf() {
    let entries = guest(&xeon(), &Topology { cpus: 6, cpu: 1 }, &TIMING);
    assert_eq!(find(&entries, 4, 0).eax, 0x0121 | 7 << 26);
    assert_eq!(find(&entries, 4, 3).eax, 0x0163 | 7 << 14 | 7 << 26);
    assert_eq!(find(&entries, 4, 4), find(&xeon(), 4, 4));
    assert_eq!(find(&entries, 0x1f, 1).ebx, 6);
    assert_eq!(find(&entries, 0, 0).eax, 0x1f);
    // AMD's meaning of this leaf is not Intel's.
    assert_eq!(
        find(&entries, 0x8000_0008, 0),
        find(&xeon(), 0x8000_0008, 0)
    );
}

#[test]
fn topology_and_timing_leaves_are_within_the_limits() {
    let mut old = epyc();
    old[0].eax = 5;
    let entries = guest(&old, &Topology { cpus: 1, cpu: 0 }, &TIMING);
    assert_eq!(find(&entries, 0, 0).eax, 0xb);
    assert_eq!(find(&entries, KVM_BASE, 0).eax, KVM_TIMING);
    let timing = find(&entries, KVM_TIMING, 0);
    assert_eq!((timing.eax, timing.ebx), (2_600_000, 1_000_000));
    let unknown = guest(&epyc(), &Topology { cpus: 1, cpu: 0 }, &Timing::default());
    assert_eq!(find(&unknown, KVM_BASE, 0).eax, 0x4000_0001);
    assert!(unknown.iter().all(|entry| entry.function != KVM_TIMING));
}

#[test]
fn nothing_in_makes_no_trouble() {
    let entries = guest(&[], &Topology { cpus: 0, cpu: 0 }, &TIMING);
    assert!(entries.iter().all(|entry| entry.function == TOPOLOGY));
}

#[test]
fn address_width() {
    assert_eq!(physical_bits(&epyc()), 48);
    assert_eq!(physical_bits(&xeon()), 46);
    assert_eq!(physical_bits(&[]), 36);
    assert_eq!(physical_bits(&[entry(0x8000_0008, 0, [0xff, 0, 0, 0])]), 36);
}
