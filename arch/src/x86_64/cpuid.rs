//! What the guest's CPUID says: what KVM supports of the host's, with the
//! guest's own topology and a hypervisor.
//!
//! Leaves and bits are from the Intel SDM, volume 2, "CPUID", the AMD64
//! Architecture Programmer's Manual, volume 3, appendix E, and for 0x4000_00xx
//! the kernel's Documentation/virt/kvm/x86/cpuid.rst.

/// One CPUID result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// EAX on input: the leaf.
    pub function: u32,
    /// ECX on input: the subleaf.
    pub index: u32,
    /// KVM_CPUID_FLAG_*.
    pub flags: u32,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// What the guest's CPUs are to be.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Number of vCPUs: cores of one package, one thread each.
    pub cpus: u32,
    /// This vCPU, which is its APIC ID too.
    pub cpu: u32,
}

impl Topology {
    /// Width of the core number in an APIC ID, in bits.
    fn core_bits(&self) -> u32 {
        self.cpus.max(1).next_power_of_two().trailing_zeros()
    }

    /// Number of APIC IDs that the package takes.
    fn apic_ids(&self) -> u32 {
        1 << self.core_bits()
    }
}

/// What KVM tells of itself elsewhere than in CPUID.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// Whether the local APIC's timer has its TSC deadline mode
    /// (KVM_CAP_TSC_DEADLINE_TIMER).
    pub tsc_deadline: bool,
    /// The guest's TSC frequency in kHz (KVM_GET_TSC_KHZ).
    pub tsc_khz: Option<u32>,
}

/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the subleaf tells results apart.
const FLAG_INDEX: u32 = 1 << 0;

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const KVM_BASE: u32 = 0x4000_0000;
const KVM_TIMING: u32 = 0x4000_0010;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

// Leaf 1.
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_OSXSAVE: u32 = 1 << 27;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;

// Leaf 0x8000_0001.
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;

/// Kinds of level in leaf 0xb.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The bus frequency of KVM's local APIC timer in kHz (its bus cycle is 1 ns).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The guest's CPUID, from KVM_GET_SUPPORTED_CPUID's.
pub fn guest(supported: &[Entry], topology: &Topology, timing: &Timing) -> Vec<Entry> {
    let amd = supported.iter().any(|entry| {
        // "AuthenticAMD" or "HygonGenuine".
        entry.function == 0 && matches!(entry.ebx, 0x6874_7541 | 0x6f67_7948)
    });
    let mut entries: Vec<Entry> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2 | KVM_TIMING))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, amd, topology, timing);
    }
    entries.extend(levels(TOPOLOGY, topology));
    if supported.iter().any(|entry| entry.function == TOPOLOGY_V2) {
        entries.extend(levels(TOPOLOGY_V2, topology));
    }
    if let Some(tsc_khz) = timing.tsc_khz
        && raise(&mut entries, KVM_BASE, KVM_TIMING)
    {
        entries.push(Entry {
            function: KVM_TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Entry::default()
        });
    }
    raise(&mut entries, 0, TOPOLOGY);
    entries
}

/// Makes `to` the highest leaf that leaf `base` names, unless it names a higher
/// one; false when there is no leaf `base`.
fn raise(entries: &mut [Entry], base: u32, to: u32) -> bool {
    let found = entries.iter_mut().find(|entry| entry.function == base);
    found.map(|entry| entry.eax = entry.eax.max(to)).is_some()
}

fn adjust(entry: &mut Entry, amd: bool, topology: &Topology, timing: &Timing) {
    let cores = topology.cpus.saturating_sub(1);
    match entry.function {
        FEATURES => {
            let apic_id = topology.cpu.min(0xff);
            let count = topology.apic_ids().min(0xff);
            entry.ebx = entry.ebx & 0xffff | count << 16 | apic_id << 24;
            set(&mut entry.ecx, ECX_HYPERVISOR | ECX_X2APIC, true);
            set(&mut entry.ecx, ECX_TSC_DEADLINE, timing.tsc_deadline);
            // KVM keeps this one in step with CR4.
            set(&mut entry.ecx, ECX_OSXSAVE, false);
            set(&mut entry.edx, EDX_HTT, topology.cpus > 1);
        }
        // Bits 14 to 25: who shares the cache; 26 to 31: cores in the package.
        CACHES if entry.eax & 0x1f != 0 => {
            let ids = topology.apic_ids() - 1;
            entry.eax = entry.eax & 0x3fff | sharing(entry.eax, ids) << 14 | ids.min(0x3f) << 26;
        }
        AMD_FEATURES if amd => set(&mut entry.ecx, AMD_ECX_CMP_LEGACY, topology.cpus > 1),
        // Bits 0 to 7: threads in the package less one; 12 to 15: APIC ID width.
        AMD_SIZES if amd => {
            entry.ecx = entry.ecx & !0xf0ff | cores.min(0xff) | topology.core_bits() << 12;
        }
        AMD_CACHES if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x3fff | sharing(entry.eax, cores) << 14;
        }
        AMD_TOPOLOGY if amd => {
            entry.eax = topology.cpu;
            // One thread in each core; one node.
            entry.ebx = topology.cpu & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// How many share a cache, less one: the third level is the package's, the
/// others a core's own.
fn sharing(eax: u32, package: u32) -> u32 {
    match eax >> 5 & 0x7 {
        3.. => package.min(0xfff),
        _ => 0,
    }
}

fn set(register: &mut u32, bits: u32, on: bool) {
    match on {
        true => *register |= bits,
        false => *register &= !bits,
    }
}

/// The levels of extended topology enumeration.
fn levels(function: u32, topology: &Topology) -> [Entry; 3] {
    let level = |index, eax, ebx, kind: u32| Entry {
        function,
        index,
        flags: FLAG_INDEX,
        eax,
        ebx,
        ecx: kind << 8 | index,
        edx: topology.cpu,
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, topology.core_bits(), topology.cpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

/// The guest-physical address width in bits that leaf 0x8000_0008 gives; 36
/// where there is none, as the Intel SDM has it.
pub fn physical_bits(supported: &[Entry]) -> u32 {
    let sizes = supported.iter().find(|entry| entry.function == AMD_SIZES);
    let bits = sizes.map(|entry| entry.eax & 0xff);
    bits.filter(|bits| (32..64).contains(bits)).unwrap_or(36)
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
