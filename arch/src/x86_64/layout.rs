//! The address map of the machine: a PC without firmware.
//!
//! | from | what |
//! |---|---|
//! | 0 | RAM, with the boot structures in its first 640 KiB |
//! | 0x9fc00 | reserved, as a PC's extended BIOS data area |
//! | 0xe0000 | ACPI tables, the RSDP first, where systems look for it |
//! | 0x100000 | RAM, up to 3 GiB |
//! | 3 GiB | PCI memory, then ECAM, then the machine's own devices |
//! | 4 GiB | the rest of RAM, then PCI memory up to the address width |

use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::{Transport, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::{
    self, Device, DeviceKind, Pci, PciSlots, PciWindow, Range, Region, Slot,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The least memory that the machine is made with, in bytes.
pub const MEMORY_MIN: u64 = 16 * MIB;

/// The word by which software tells a PC's firmware what a reset is about
/// (BIOS data area, "soft reset flag", 16 bits).
pub const RESET_FLAG: u64 = 0x472;
/// The value of [`RESET_FLAG`] that asks for a warm boot.
pub const RESET_FLAG_WARM: u16 = 0x1234;

/// The global descriptor table that the boot vCPU starts with.
pub const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`, its module list and its memory map, in this page.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux boot protocol: `boot_params`, the "zero page".
pub const ZERO_PAGE: u64 = 0x7000;
/// Identity-mapping page tables: one PML4, one page directory pointer table
/// and four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its NUL, in bytes.
pub const CMDLINE_ROOM: u64 = 64 * KIB;

/// Where a PC has its extended BIOS data area: RAM for a guest's use ends here,
/// to go on at [`HIGH_RAM`].
pub const EBDA: u64 = 0x9_fc00;
/// Video memory and option ROMs of a PC; nothing is there.
pub const VGA: u64 = 0xa_0000;
/// ACPI tables; the RSDP is the first, in the range that systems search for it
/// (ACPI 6.5, section 5.2.5.1).
pub const ACPI: Range = Range::new(0xe_0000, 0x2_0000);
/// Where RAM goes on above the first megabyte.
pub const HIGH_RAM: u64 = MIB;

/// The end of RAM below 4 GiB at most.
pub const LOW_RAM_END: u64 = 3 * GIB;
/// PCI memory below 4 GiB.
pub const PCI_MMIO32: Range = Range::new(LOW_RAM_END, 512 * MIB);
/// PCI configuration space of bus 0; the map has room for 256 buses. No more are
/// told of than there are: Linux looks for devices on each of them, in 32 slots
/// by port I/O (`pcibios_fixup_peer_bridges`).
pub const PCI_ECAM: Range = Range::new(0xe000_0000, MIB);
/// Virtio-mmio register blocks, a page for each.
pub const VIRTIO_MMIO: Range = Range::new(0xf000_0000, 0x10_0000);
/// Distance between virtio-mmio register blocks.
const VIRTIO_MMIO_STRIDE: u64 = 4 * KIB;
/// Size of a virtio-mmio register block.
const VIRTIO_MMIO_SIZE: u64 = 0x200;
/// I/O APIC (Intel 82093AA; its customary place).
pub const IOAPIC: Range = Range::new(0xfec0_0000, 4 * KIB);
/// Local APICs (Intel SDM volume 3, section 11.4.1).
pub const LOCAL_APIC: Range = Range::new(0xfee0_0000, 4 * KIB);
/// A page for KVM's own use on Intel hosts (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: Range = Range::new(0xfffb_c000, 4 * KIB);
/// Three pages for KVM's own use on Intel hosts (KVM_SET_TSS_ADDR).
pub const KVM_TSS: Range = Range::new(0xfffb_d000, 12 * KIB);
/// Where RAM goes on above the hole.
pub const RAM_ABOVE_HOLE: u64 = 4 * GIB;
/// The most that PCI memory above 4 GiB takes.
const PCI_MMIO64_MAX: u64 = 512 * GIB;
/// The least that it takes.
const PCI_MMIO64_MIN: u64 = GIB;

/// First UART (PC/AT).
pub const COM1: Range = Range::new(0x3f8, 8);
/// CMOS clock (PC/AT).
pub const RTC: Range = Range::new(0x70, 2);
/// Keyboard controller (PC/AT).
pub const I8042: Range = Range::new(0x60, crossvisor_devices::i8042::PORTS);
/// PCI configuration mechanism #1.
pub const PCI_CONFIG: Range = Range::new(
    crossvisor_devices::pci::access::MECHANISM1_PORT as u64,
    crossvisor_devices::pci::access::MECHANISM1_SIZE as u64,
);
/// ACPI sleep, reset and event registers.
pub const ACPI_POWER: Range = Range::new(0x600, crossvisor_devices::acpi_power::SIZE);

/// Pins of the I/O APIC that KVM emulates; its pin n is GSI n.
pub const IOAPIC_PINS: u32 = 24;
/// The interrupt of [`COM1`] (PC/AT).
pub const COM1_GSI: u32 = 4;
/// The interrupt of [`ACPI_POWER`]'s events, where PCs have ACPI's.
pub const ACPI_GSI: u32 = 9;
/// The interrupts of PCI's four wires.
pub const PCI_INTX: [u32; 4] = [20, 21, 22, 23];
/// The interrupts of virtio-mmio devices: those that nothing else has, and
/// which no driver of PC hardware takes unasked (timer, keyboard, cascade,
/// second UART, clock).
const VIRTIO_GSIS: [u32; 17] = [
    5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];

/// Kinds of memory that a guest is told of (ACPI 6.5, section 15.4); the
/// numbers are those of e820 and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Free for the guest.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// ACPI tables, free once they have been read.
    Acpi = 3,
}

/// RAM for `size` bytes of memory, by rising address.
pub fn memory(size: u64) -> Vec<Range> {
    let low = size.min(LOW_RAM_END);
    let mut memory = vec![Range::new(0, low)];
    if size > low {
        memory.push(Range::new(RAM_ABOVE_HOLE, size - low));
    }
    memory
}

/// What the guest is told of its memory, by rising address.
pub fn memory_map(memory: &[Range]) -> Vec<(Range, MemoryKind)> {
    let mut map = vec![
        (Range::new(0, EBDA), MemoryKind::Ram),
        (Range::new(EBDA, VGA - EBDA), MemoryKind::Reserved),
        (ACPI, MemoryKind::Acpi),
    ];
    for range in memory {
        let base = range.base.max(HIGH_RAM);
        if base < range.end() {
            map.push((Range::new(base, range.end() - base), MemoryKind::Ram));
        }
    }
    map.push((PCI_ECAM, MemoryKind::Reserved));
    // To the end of 4 GiB, as PCs reserve their firmware's flash.
    let kvm = Range::new(
        KVM_IDENTITY_MAP.base,
        RAM_ABOVE_HOLE - KVM_IDENTITY_MAP.base,
    );
    map.push((kvm, MemoryKind::Reserved));
    map.sort_by_key(|(range, _)| range.base);
    map
}

/// The PCI root of a machine with `memory`.
///
/// # Errors
/// The host's address width leaves no room above RAM.
pub fn pci(memory: &[Range], host: &Host) -> Result<Pci> {
    let ram_end = memory.last().map_or(0, Range::end);
    let limit = 1u64.checked_shl(host.physical_bits).unwrap_or(u64::MAX);
    let base = ram_end.max(RAM_ABOVE_HOLE).checked_next_multiple_of(GIB);
    let base = base.unwrap_or(u64::MAX);
    let room = limit.saturating_sub(base) / GIB * GIB;
    if room < PCI_MMIO64_MIN {
        let most = limit.saturating_sub(PCI_MMIO64_MIN + RAM_ABOVE_HOLE - LOW_RAM_END);
        return Err(Error::config(
            "--memory",
            format!(
                "this host's {} address bits have room for at most {}M",
                host.physical_bits,
                most / MIB
            ),
        ));
    }
    let identity = |range: Range| PciWindow {
        range,
        bus_address: range.base,
    };
    Ok(Pci {
        ecam: Some(PCI_ECAM),
        mmio32: identity(PCI_MMIO32),
        mmio64: identity(Range::new(base, room.min(PCI_MMIO64_MAX))),
        intx: PCI_INTX,
        msi: true,
    })
}

/// The machine's own devices and controllers, by rising address, ports first.
pub fn regions(pci: bool) -> Vec<Region> {
    let region = |name: &str, ports: bool, range: Range, gsi: Option<u32>| Region {
        name: name.into(),
        ports,
        range,
        gsi,
    };
    let mut regions = vec![
        region("i8042", true, I8042, None),
        region("RTC", true, RTC, None),
        region("COM1", true, COM1, Some(COM1_GSI)),
        region("ACPI power", true, ACPI_POWER, Some(ACPI_GSI)),
    ];
    if pci {
        regions.push(region("PCI configuration", true, PCI_CONFIG, None));
    }
    regions.extend([
        region("I/O APIC", false, IOAPIC, None),
        region("local APIC", false, LOCAL_APIC, None),
        region("KVM identity map", false, KVM_IDENTITY_MAP, None),
        region("KVM TSS", false, KVM_TSS, None),
    ]);
    regions
}

/// The virtio devices of `config` on `transport`, each in its slot.
///
/// # Errors
/// There are more than fit.
pub fn devices(config: &VmConfig, transport: Transport) -> Result<Vec<Device>> {
    let mut pci = PciSlots::default();
    let mut mmio = 0usize;
    plan::devices(config, |_: DeviceKind, _| match transport {
        Transport::Mmio => {
            let gsi = *VIRTIO_GSIS.get(mmio).ok_or_else(|| {
                Error::config(
                    "--disk, --net",
                    format!(
                        "at most {} virtio-mmio devices fit, console and entropy included; \
                         --transport pci has room for 31",
                        VIRTIO_GSIS.len()
                    ),
                )
            })?;
            let base = VIRTIO_MMIO.base + mmio as u64 * VIRTIO_MMIO_STRIDE;
            mmio += 1;
            Ok(Slot::Mmio {
                range: Range::new(base, VIRTIO_MMIO_SIZE),
                gsi,
            })
        }
        Transport::Pci | Transport::Ccw => pci.take(),
    })
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
