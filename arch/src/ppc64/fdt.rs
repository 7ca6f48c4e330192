//! The flattened device tree (Linux on Power Architecture Reference, appendix
//! B, "LoPAR Binding"; Devicetree Specification 0.4).
//!
//! It is what firmware would hand over after the client has negotiated
//! (ibm,client-architecture-support): there is no Open Firmware in this machine
//! to ask, so `/chosen` holds the outcome, and RTAS is in place.

use crossvisor_devices::virtio::pci::{BAR_SIZE, DEVICE_BASE, VENDOR, class};
use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::Console;
use crossvisor_vmm::error::Error;
use crossvisor_vmm::plan::{Device, DeviceKind, Pci, Plan, Range, Slot};
use vm_fdt::{FdtReserveEntry, FdtWriter, FdtWriterResult};

use super::irqchip::QUEUE_SHIFT;
use super::mmu::{HashTable, Mmu};
use super::sources::{self, Trigger};
use super::xive::{PRIORITIES, Xive};
use super::{host, names, rtas};
use crate::shared;

/// Phandle of the interrupt controller.
const CONTROLLER: u32 = 1;

/// Unit address of the virtual terminal, by which hypercalls name it.
pub const VTY: u32 = 0x7100_0000;
/// The name of the PCI host bridge: its bus unit identifier.
pub const BUID: u64 = 0x8000_0002_0000_0000;

/// Longest error log that check-exception writes, in bytes; Linux reads no more
/// than 2048.
const ERROR_LOG_MAX: u32 = 1024;

/// Hypercalls, by their names in `ibm,hypertas-functions`.
const HYPERTAS: [&str; 6] = [
    "hcall-pft",
    "hcall-term",
    "hcall-dabr",
    "hcall-interrupt",
    "hcall-splpar",
    "hcall-set-mode",
];

/// What ISA 3.0 processors have, as `ibm,pa-features` tells it (section
/// B.6.2.1): byte, and its bits from the most significant. Linux takes from the
/// kernel's own table of the processor what is not here: transactional memory,
/// which KVM would have to emulate.
const FEATURES: [(usize, u8); 24] = [
    // MMU, floating point, SLB, run latch, data breakpoints, no-execute.
    (0, 0b1111_0110),
    // Rounding, breakpoint extensions, SPRG3, SLB and page protection.
    (1, 0b0001_1111),
    // Virtual page classes, data stream variants, program priority.
    (2, 0b1100_0111),
    // Load with update, unaligned accesses.
    (3, 0b1100_0000),
    // Little-endian, come-from address, extended branches, quadword accesses.
    (5, 0b1111_0000),
    (6, 0b1000_0000),
    // Vector; vector-scalar; vector XOR.
    (16, 0b1000_0000),
    (18, 0b1000_0000),
    (20, 0b1000_0000),
    // Extended decrementer form, 64-bit registers, performance monitor.
    (24, 0b1000_0000),
    (26, 0b1000_0000),
    (28, 0b1000_0000),
    // Little-endian atomics, event-based branches.
    (32, 0b1000_0000),
    (34, 0b1100_0000),
    // Radix translation.
    (40, 0b1000_0000),
    // Performance monitor of 3.0, copy and paste, system call vectored.
    (42, 0b1000_0000),
    (44, 0b1000_0000),
    (46, 0b1000_0000),
    // SIMD, quad-precision, string, decimal integers and SHA.
    (48, 0b1000_0000),
    (50, 0b1000_0000),
    (52, 0b1000_0000),
    (54, 0b1000_0000),
    // Atomics near memory, random numbers.
    (60, 0b1000_0000),
    (62, 0b1000_0000),
];
/// Bytes that `ibm,pa-features` describes; the property has two more before.
const FEATURE_BYTES: usize = 66;
const RADIX_FEATURE: usize = 40;

// `ibm,architecture-vec-5` (section B.6.2.3), by byte.
const VEC5_LEN: usize = 27;
/// The two top bits: 0 is an XICS, 1 a XIVE that the guest handles itself.
const VEC5_XIVE: usize = 23;
const VEC5_XIVE_NATIVE: u8 = 0x40;
/// The two top bits: 0 is a hashed page table, 1 radix trees.
const VEC5_MMU: usize = 24;
const VEC5_MMU_RADIX: u8 = 0x40;
/// Guests may invalidate translations themselves.
const VEC5_RADIX: usize = 26;
const VEC5_RADIX_GTSE: u8 = 0x40;

/// Cache block of every POWER processor, in bytes.
const CACHE_BLOCK: u32 = 128;
/// First-level caches, in bytes: the data caches of POWER9 to 11, by which Linux
/// sizes what it flushes them with in software (init_fallback_flush). Nothing
/// depends on the instruction caches'.
const CACHE_SIZE: u32 = 32 << 10;
/// The processor's clock in Hz, which nothing depends on either.
const CLOCK: u32 = 2_000_000_000;

/// What only loading decides.
#[derive(Clone, Debug, Default)]
pub struct Loading {
    /// Where the initrd is.
    pub initrd: Option<Range>,
    /// Where RTAS is.
    pub rtas: Option<Range>,
    /// Seed of the kernel's random number generator.
    pub rng_seed: Vec<u8>,
}

/// What the tree says of the machine.
#[derive(Clone, Debug)]
pub struct Contents<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// How guests translate.
    pub mmu: Mmu,
    /// The size in bytes that pages behind the guest's memory have at least.
    pub backing_page: u64,
    /// The XIVE; without one there is an XICS.
    pub xive: Option<Xive>,
    /// Which device the console is.
    pub console: Console,
    /// The host, for its processor.
    pub host: &'a Host,
}

/// Builds the tree.
///
/// # Errors
/// A value cannot be told in a device tree, such as a command line with a NUL.
pub fn build(contents: &Contents<'_>, loading: &Loading) -> Result<Vec<u8>, Error> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Boot(format!("the device tree cannot be built: {error}"))
    };
    let tree = write(contents, loading).map_err(|error| failed(&error))?;
    names::restore(tree).ok_or_else(|| failed(&"internal error: its strings are not last"))
}

fn write(contents: &Contents<'_>, loading: &Loading) -> FdtWriterResult<Vec<u8>> {
    let plan = contents.plan;
    let reserved: Vec<FdtReserveEntry> = loading
        .rtas
        .iter()
        .filter_map(|range| FdtReserveEntry::new(range.base, range.size).ok())
        .collect();
    let mut fdt = FdtWriter::new_with_mem_reserv(&reserved)?;
    let root = fdt.begin_node("")?;
    fdt.property_string("device_type", "chrp")?;
    fdt.property_string("model", "crossvisor pseries")?;
    fdt.property_string("compatible", "crossvisor,pseries")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", CONTROLLER)?;
    if contents.xive.is_some() {
        // What is the hypervisor's: the priorities after the guest's.
        let first = PRIORITIES as u32;
        fdt.property_array_u32("ibm,plat-res-int-priorities", &[first, 0xff - first])?;
    }
    chosen(&mut fdt, contents, loading)?;
    for range in &memory(contents) {
        let node = fdt.begin_node(&format!("memory@{:x}", range.base))?;
        fdt.property_string("device_type", "memory")?;
        fdt.property_array_u64("reg", &[range.base, range.size])?;
        fdt.end_node(node)?;
    }
    cpus(&mut fdt, contents)?;
    rtas_node(&mut fdt, contents.xive.is_some(), loading)?;
    nvram(&mut fdt)?;
    match &contents.xive {
        Some(xive) => xive_node(&mut fdt, xive)?,
        None => xics_node(&mut fdt, plan.cpus)?,
    }
    event_sources(&mut fdt)?;
    vdevice(&mut fdt, contents.console)?;
    if let Some(root) = &plan.pci {
        pci(&mut fdt, root, &plan.devices)?;
    }
    fdt.end_node(root)?;
    fdt.finish()
}

/// RAM as the guest is told of it: the first range is what it reaches without
/// translation (LoPAR section B.6.3, "Memory Node").
fn memory(contents: &Contents<'_>) -> Vec<Range> {
    let ram = &contents.plan.memory;
    let table = hash_table(contents);
    match ram.as_slice() {
        [first, rest @ ..] if contents.mmu == Mmu::Hpt && table.real_mode < first.size => {
            let reached = table.real_mode;
            let beyond = Range::new(first.base + reached, first.size - reached);
            [&[Range::new(first.base, reached), beyond], rest].concat()
        }
        _ => ram.clone(),
    }
}

/// The hashed page table of a guest that has one.
fn hash_table(contents: &Contents<'_>) -> HashTable {
    let memory = contents.plan.memory_size();
    HashTable::new(memory, contents.backing_page)
}

fn chosen(fdt: &mut FdtWriter, contents: &Contents<'_>, loading: &Loading) -> FdtWriterResult<()> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", &contents.plan.cmdline)?;
    if contents.console == Console::Native {
        let path = format!("/vdevice/vty@{VTY:x}");
        fdt.property_string("linux,stdout-path", &path)?;
        fdt.property_string("stdout-path", &path)?;
    }
    if let Some(initrd) = loading.initrd {
        fdt.property_u64("linux,initrd-start", initrd.base)?;
        fdt.property_u64("linux,initrd-end", initrd.end())?;
    }
    if !loading.rng_seed.is_empty() {
        fdt.property("rng-seed", &loading.rng_seed)?;
    }
    // Devices reach guest memory by its own addresses: there is no IOMMU, and
    // nothing is mapped in the host bridge's ibm,dma-window.
    fdt.property_null("linux,iommu-off")?;
    fdt.property("ibm,architecture-vec-5", &vec5(contents))?;
    fdt.end_node(node)
}

/// The outcome of the negotiation.
fn vec5(contents: &Contents<'_>) -> [u8; VEC5_LEN] {
    let mut vec5 = [0; VEC5_LEN];
    // The number of bytes after the first two.
    vec5[0] = (VEC5_LEN - 2) as u8;
    if contents.xive.is_some() {
        vec5[VEC5_XIVE] = VEC5_XIVE_NATIVE;
    }
    if contents.mmu == Mmu::Radix {
        vec5[VEC5_MMU] = VEC5_MMU_RADIX;
        vec5[VEC5_RADIX] = VEC5_RADIX_GTSE;
    }
    vec5
}

/// `ibm,pa-features`.
fn pa_features(mmu: Mmu) -> [u8; 2 + FEATURE_BYTES] {
    let mut property = [0; 2 + FEATURE_BYTES];
    let (head, bytes) = property.split_at_mut(2);
    // The number of bytes, and the kind of description.
    head.copy_from_slice(&[FEATURE_BYTES as u8, 0]);
    for (byte, bits) in FEATURES {
        if byte != RADIX_FEATURE || mmu == Mmu::Radix {
            bytes[byte] = bits;
        }
    }
    property
}

fn cpus(fdt: &mut FdtWriter, contents: &Contents<'_>) -> FdtWriterResult<()> {
    let pvr = host::pvr(contents.host);
    let name = match pvr >> 16 {
        0x4e => "PowerPC,POWER9",
        0x80 => "PowerPC,POWER10",
        0x82 => "PowerPC,POWER11",
        _ => "PowerPC,POWER",
    };
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..contents.plan.cpus {
        let node = fdt.begin_node(&format!("{name}@{index:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_u32("reg", index)?;
        fdt.property_string("status", "okay")?;
        fdt.property_u32("cpu-version", pvr)?;
        fdt.property_null("64-bit")?;
        fdt.property_u32("timebase-frequency", host::timebase(contents.host))?;
        fdt.property_u32("clock-frequency", CLOCK)?;
        for cache in ["d-cache", "i-cache"] {
            fdt.property_u32(&format!("{cache}-block-size"), CACHE_BLOCK)?;
            fdt.property_u32(&format!("{cache}-line-size"), CACHE_BLOCK)?;
            fdt.property_u32(&format!("{cache}-size"), CACHE_SIZE)?;
        }
        // VMX with VSX, and decimal floating point.
        fdt.property_u32("ibm,vmx", 2)?;
        fdt.property_u32("ibm,dfp", 1)?;
        // One thread for each core: with several, a guest would signal threads
        // of its own core by msgsndp, which KVM emulates not at all or slowly.
        fdt.property_array_u32("ibm,ppc-interrupt-server#s", &[index])?;
        fdt.property_array_u32("ibm,ppc-interrupt-gserver#s", &[index, 0])?;
        fdt.property("ibm,pa-features", &pa_features(contents.mmu))?;
        match contents.mmu {
            Mmu::Radix => fdt.property_array_u32(
                names::written("ibm,processor-radix-AP-encodings"),
                &host::radix_encodings(contents.host),
            )?,
            Mmu::Hpt => hash(fdt, contents)?,
        }
        fdt.end_node(node)?;
    }
    fdt.end_node(cpus)
}

/// Base page sizes of a hashed page table, the same on every POWER processor
/// from 7 on (KVM_PPC_GET_SMMU_INFO): the size's logarithm, its encoding in an
/// SLB entry, and the actual page sizes with their encodings in a page table
/// entry.
const HASH_PAGES: [(u32, u32, &[[u32; 2]]); 3] = [
    (12, 0x000, &[[12, 0], [16, 7], [24, 0x38]]),
    (16, 0x110, &[[16, 1], [24, 8]]),
    (24, 0x100, &[[24, 0]]),
];

/// `ibm,segment-page-sizes`: the pages that are no larger than those behind the
/// guest's memory, for KVM refuses entries for others (`kvmppc_do_h_enter`).
fn segment_page_sizes(backing: u64) -> Vec<u32> {
    let mut property = Vec::new();
    for (base, encoding, actual) in HASH_PAGES {
        let fitting = actual.iter().filter(|[shift, _]| 1 << shift <= backing);
        let fitting: Vec<u32> = fitting.flatten().copied().collect();
        if !fitting.is_empty() {
            property.extend([base, encoding, fitting.len() as u32 / 2]);
            property.extend(fitting);
        }
    }
    property
}

/// What a hashed page table is like.
fn hash(fdt: &mut FdtWriter, contents: &Contents<'_>) -> FdtWriterResult<()> {
    fdt.property_array_u32("ibm,pft-size", &[0, hash_table(contents).order])?;
    fdt.property_u32("ibm,slb-size", 32)?;
    // Segments of 256 MiB and 1 TiB.
    let none = u32::MAX;
    fdt.property_array_u32("ibm,processor-segment-sizes", &[28, 40, none, none])?;
    fdt.property_array_u32(
        "ibm,segment-page-sizes",
        &segment_page_sizes(contents.backing_page),
    )
}

fn rtas_node(fdt: &mut FdtWriter, xive: bool, loading: &Loading) -> FdtWriterResult<()> {
    let node = fdt.begin_node("rtas")?;
    let names = HYPERTAS.map(String::from).to_vec();
    fdt.property_string_list("ibm,hypertas-functions", names)?;
    if let Some(range) = loading.rtas {
        // RAM below 4 GiB, as loading sees to.
        fdt.property_u32("linux,rtas-base", range.base as u32)?;
        fdt.property_u32("linux,rtas-entry", range.base as u32)?;
        fdt.property_u32("rtas-size", range.size as u32)?;
    }
    fdt.property_u32("rtas-error-log-max", ERROR_LOG_MAX)?;
    // By this Linux calls ibm,os-term when it panics, and is promised that the call
    // returns (rtas_os_term). Here it ends the VM, as QEMU's does unless it is told
    // otherwise: what a panic leads to is the user's to say, not the guest's.
    fdt.property_null("ibm,extended-os-term")?;
    let xics_only = |token| xive && rtas::XICS_TOKENS.iter().any(|(_, of)| *of == token);
    for (name, token) in rtas::TOKENS {
        if xics_only(token) {
            continue;
        }
        fdt.property_u32(names::written(name), token)?;
    }
    fdt.end_node(node)
}

fn nvram(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = fdt.begin_node("nvram")?;
    fdt.property_string("device_type", "nvram")?;
    fdt.property_u32("#bytes", rtas::nvram::SIZE)?;
    fdt.end_node(node)
}

/// The XIVE (LoPAR section B.6.9.2, "External Interrupt Virtualization").
fn xive_node(fdt: &mut FdtWriter, xive: &Xive) -> FdtWriterResult<()> {
    let [user, system] = xive.thread_pages();
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", user.base))?;
    fdt.property_string("device_type", "power-ivpe")?;
    fdt.property_string("compatible", "ibm,power-ivpe")?;
    fdt.property_array_u64("reg", &[user.base, user.size, system.base, system.size])?;
    fdt.property_array_u32("ibm,xive-eq-sizes", &[QUEUE_SHIFT])?;
    // Sources that vCPUs interrupt each other by: first, and how many.
    fdt.property_array_u32("ibm,xive-lisn-ranges", &[0, xive.cpus()])?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 2)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_phandle(CONTROLLER)?;
    fdt.end_node(node)
}

fn xics_node(fdt: &mut FdtWriter, cpus: u32) -> FdtWriterResult<()> {
    let node = fdt.begin_node("interrupt-controller@0")?;
    fdt.property_string("device_type", "PowerPC-External-Interrupt-Presentation")?;
    fdt.property_string("compatible", "IBM,ppc-xicp")?;
    fdt.property_array_u64("reg", &[0, 0])?;
    fdt.property_array_u32("ibm,interrupt-server-ranges", &[0, cpus])?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 2)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_phandle(CONTROLLER)?;
    fdt.end_node(node)
}

fn event_sources(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let sources = fdt.begin_node("event-sources")?;
    let node = fdt.begin_node("epow-events")?;
    fdt.property_array_u32("interrupts", &[sources::EPOW, Trigger::Edge.cell()])?;
    fdt.end_node(node)?;
    fdt.end_node(sources)
}

fn vdevice(fdt: &mut FdtWriter, console: Console) -> FdtWriterResult<()> {
    let node = fdt.begin_node("vdevice")?;
    fdt.property_string("device_type", "vdevice")?;
    fdt.property_string("compatible", "IBM,vdevice")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    if console == Console::Native {
        let vty = fdt.begin_node(&format!("vty@{VTY:x}"))?;
        fdt.property_string("device_type", "serial")?;
        fdt.property_string("compatible", "hvterm1")?;
        fdt.property_u32("reg", VTY)?;
        fdt.property_array_u32("interrupts", &[sources::VTY, Trigger::Edge.cell()])?;
        fdt.end_node(vty)?;
    }
    fdt.end_node(node)
}

fn pci(fdt: &mut FdtWriter, pci: &Pci, devices: &[Device]) -> FdtWriterResult<()> {
    let slots: Vec<(u8, DeviceKind)> = devices
        .iter()
        .filter_map(|device| match device.slot {
            Slot::Pci { device: slot } => Some((slot, device.kind)),
            _ => None,
        })
        .collect();
    let node = fdt.begin_node(&format!("pci@{BUID:x}"))?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_string("compatible", "IBM,Logical_PHB")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_array_u64("reg", &[BUID, 0])?;
    fdt.property_array_u32("bus-range", &[0, 0])?;
    shared::fdt::pci_windows(fdt, pci)?;
    // Wires: device and pin swizzle, so four devices show all there is.
    let mut map = Vec::new();
    for device in 0..4 {
        for pin in 1..=4 {
            let source = pci.intx_gsi(device, pin);
            let device = u32::from(device) << 11;
            map.extend([
                device,
                0,
                0,
                pin.into(),
                CONTROLLER,
                source,
                Trigger::Level.cell(),
            ]);
        }
    }
    fdt.property_array_u32("interrupt-map-mask", &[3 << 11, 0, 0, 7])?;
    fdt.property_array_u32("interrupt-map", &map)?;
    let messages = u32::from(sources::MSIS_PER_SLOT);
    fdt.property_u32("ibm,pe-total-#msi", slots.len() as u32 * messages)?;
    // A window that nothing is mapped in, for Linux warns where there is none; it
    // makes no use of it (linux,iommu-off).
    fdt.property_u32("ibm,#dma-address-cells", 2)?;
    fdt.property_u32("ibm,#dma-size-cells", 2)?;
    fdt.property_array_u32("ibm,dma-window", &[DMA_WINDOW, 0, 0, 0, DMA_WINDOW_SIZE])?;
    for (slot, kind) in slots {
        function(fdt, slot, kind, bar_address(pci, slot))?;
    }
    fdt.end_node(node)
}

/// Number of the DMA window, and its size in bytes.
const DMA_WINDOW: u32 = 0x8000_0000;
const DMA_WINDOW_SIZE: u32 = 0x4000_0000;

/// Where the BAR of the device in `slot` is: they are placed one after the other
/// from the start of the upper window, in the order of their slots.
pub fn bar_address(pci: &Pci, slot: u8) -> u64 {
    pci.mmio64.bus_address + u64::from(slot.saturating_sub(1)) * BAR_SIZE
}

/// A virtio device. Linux makes PCI devices of these nodes, and reads from the
/// configuration space only what is not here.
fn function(fdt: &mut FdtWriter, slot: u8, kind: DeviceKind, bar: u64) -> FdtWriterResult<()> {
    let node = fdt.begin_node(&format!("{}@{slot:x}", kind_name(kind)))?;
    fdt.property_array_u32("reg", &[u32::from(slot) << 11, 0, 0, 0, 0])?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    let device = DEVICE_BASE + kind.device_type();
    fdt.property_u32("vendor-id", VENDOR.into())?;
    fdt.property_u32("device-id", device.into())?;
    fdt.property_u32("revision-id", 1)?;
    fdt.property_u32("class-code", class(kind.device_type().into()))?;
    // Not relocatable, prefetchable, 64 bits wide; BAR 0.
    let [high, low] = shared::fdt::cells(bar);
    let place = 0xc300_0000 | u32::from(slot) << 11 | 0x10;
    fdt.property_array_u32(
        "assigned-addresses",
        &[place, high, low, 0, BAR_SIZE as u32],
    )?;
    // Pin INTA#.
    fdt.property_u32("interrupts", 1)?;
    fdt.property_u32("ibm,req#msi-x", sources::MSIS_PER_SLOT.into())?;
    fdt.end_node(node)
}

/// What PAPR firmware calls a device of its class.
fn kind_name(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Console => "communication-controller",
        DeviceKind::Block => "scsi",
        DeviceKind::Net => "ethernet",
        DeviceKind::Entropy => "entropy-source",
        _ => "unknown",
    }
}
