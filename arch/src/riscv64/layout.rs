//! The address map and the interrupt map.
//!
//! | from | what |
//! |---|---|
//! | 0 | left for firmware flash |
//! | 192 MiB | PLIC, up to 64 MiB, or APLIC |
//! | 256 MiB | UART, clock, virtio-mmio |
//! | 640 MiB | IMSICs, 4 KiB for each of up to 1024 vCPUs |
//! | 768 MiB | PCI configuration space, 1 MiB for each of up to 256 buses |
//! | 1 GiB | PCI memory below 4 GiB |
//! | 2 GiB | RAM, in one piece |
//! | ¾ of all | PCI memory above 4 GiB |

use crossvisor_devices::virtio::mmio::MMIO_SIZE;
use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::{Transport, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::{self, Device, DeviceKind, Pci, PciSlots, Plan, Range, Region};

use super::irqchip::Irqchip;
use super::plic;
use crate::shared::layout::{self as shared, AddressSpace, MmioSlots};

const PLIC: u64 = 0x0c00_0000;
/// KVM's APLIC (KVM_DEV_RISCV_APLIC_SIZE).
pub const APLIC: Range = Range::new(0x0c00_0000, 16 << 10);
/// 8250 UART.
pub const UART: Range = Range::new(0x1000_0000, 8);
/// Goldfish real-time clock.
pub const RTC: Range = Range::new(0x1001_0000, 4 << 10);
/// The first IMSIC.
pub const IMSICS: u64 = 0x2800_0000;
/// Size of a vCPU's IMSIC in bytes: one page, for there are no guests of guests
/// (KVM_DEV_RISCV_IMSIC_SIZE).
pub const IMSIC_SIZE: u64 = 4 << 10;
/// Configuration space of bus 0; the map has room for 256 buses.
const PCI_ECAM: Range = Range::new(0x3000_0000, 1 << 20);
const PCI_MMIO32: Range = Range::new(0x4000_0000, 1 << 30);

/// Where RAM begins.
pub const RAM_BASE: u64 = 2 << 30;

// Sources of the controller are counted from 1; wire n is GSI n.
const INTX: [u32; 4] = [1, 2, 3, 4];
const UART_GSI: u32 = 5;
const RTC_GSI: u32 = 6;
/// How many sources the controller has.
pub const WIRES: u32 = 96;

const MMIO: MmioSlots = MmioSlots {
    base: 0x1010_0000,
    first_gsi: 16,
    count: 64,
};

/// KVM's limit (KVM_MAX_VCPUS of arch/riscv), and the room for IMSICs.
pub const MAX_VCPUS: u32 = 1024;

/// The smallest guest-physical address width of KVM, that of Sv39x4 (RISC-V
/// privileged specification, "Hypervisor Guest Address Translation"); and the
/// largest that page table entries hold.
const SPACE: AddressSpace = AddressSpace {
    ram_base: RAM_BASE,
    usual_bits: 41,
    least_bits: 33,
    most_bits: 56,
};

/// The longest command line without its NUL: riscv's COMMAND_LINE_SIZE is 1024
/// (arch/riscv/include/uapi/asm/setup.h).
const CMDLINE_MAX: usize = 1023;

/// Where the machine's own devices are in the plan.
pub mod name {
    /// PLIC.
    pub const PLIC: &str = "plic";
    /// APLIC.
    pub const APLIC: &str = "aplic";
    /// IMSICs.
    pub const IMSICS: &str = "imsics";
    /// 8250 UART.
    pub const UART: &str = "uart";
    /// Goldfish clock.
    pub const RTC: &str = "rtc-goldfish";
}

/// The IMSICs of `cpus` vCPUs.
pub fn imsics(cpus: u32) -> Range {
    Range::new(IMSICS, u64::from(cpus) * IMSIC_SIZE)
}

/// Plans a machine.
///
/// # Errors
/// Names the option that cannot be met.
pub fn plan(config: &VmConfig, host: &Host, irqchip: Irqchip) -> Result<Plan> {
    let most = MAX_VCPUS.min(host.max_vcpus);
    if !(1..=most).contains(&config.cpus) {
        return Err(Error::config(
            "--cpus",
            format!("{} vCPUs: this host serves 1 to {most}", config.cpus),
        ));
    }
    plan::one_mmu(config)?;
    let bits = SPACE.bits(config.memory, host)?;
    let transport = plan::transport(config, Transport::Pci, &[Transport::Pci, Transport::Mmio])?;
    let mut pci_slots = PciSlots::default();
    let mut mmio_slots = 0..;
    let mut place = || match transport {
        Transport::Mmio => MMIO.slot(mmio_slots.next().unwrap_or(u32::MAX)),
        _ => pci_slots.take(),
    };
    let mut devices = plan::devices(config, |_, _| place())?;
    // The power key. Stock kernels have no driver for one on a wire or a GPIO.
    devices.push(Device {
        name: "power-key".into(),
        kind: DeviceKind::PowerKey,
        index: 0,
        slot: place()?,
    });
    let plan = Plan {
        arch: super::NAME,
        cpus: config.cpus,
        memory: vec![Range::new(RAM_BASE, config.memory)],
        irqchip: irqchip.name(),
        mmu: None,
        regions: regions(config.cpus, irqchip),
        first_free_gsi: WIRES + 1,
        pci: (transport == Transport::Pci).then(|| Pci {
            ecam: Some(PCI_ECAM),
            mmio32: shared::identity(PCI_MMIO32),
            mmio64: shared::identity(AddressSpace::above_ram(bits)),
            intx: INTX,
            msi: irqchip.has_msi(),
        }),
        devices,
        cmdline: shared::command_line(config, "ttyS0", CMDLINE_MAX)?,
        guest_modules: vec!["evdev"],
        power_off_is_ctrl_alt_del: false,
    };
    plan.check(host.page_size)?;
    Ok(plan)
}

fn regions(cpus: u32, irqchip: Irqchip) -> Vec<Region> {
    let region = |name: &str, range, gsi| Region {
        name: name.into(),
        ports: false,
        range,
        gsi,
    };
    let mut regions = vec![
        region(name::UART, UART, Some(UART_GSI)),
        region(name::RTC, RTC, Some(RTC_GSI)),
    ];
    match irqchip {
        Irqchip::Aia => {
            regions.push(region(name::APLIC, APLIC, None));
            regions.push(region(name::IMSICS, imsics(cpus), None));
        }
        Irqchip::Plic => {
            let range = Range::new(PLIC, plic::size(cpus.into()));
            regions.push(region(name::PLIC, range, None));
        }
    }
    regions.sort_by_key(|region| region.range.base);
    regions
}

const _: () = {
    assert!(MMIO.first_gsi + MMIO.count <= WIRES);
    assert!(MMIO_SIZE <= MmioSlots::STEP);
    assert!(MAX_VCPUS as u64 <= plic::MAX_CONTEXTS);
    assert!(PLIC + plic::size(plic::MAX_CONTEXTS) <= UART.base);
    assert!(MMIO.base + MMIO.count as u64 * MmioSlots::STEP <= IMSICS);
    assert!(IMSICS + MAX_VCPUS as u64 * IMSIC_SIZE <= PCI_ECAM.base);
    assert!(PCI_MMIO32.end() <= RAM_BASE);
};
