//! The address map and the interrupt map.
//!
//! | from | what |
//! |---|---|
//! | 0 | left for firmware flash |
//! | 128 MiB | interrupt controller, UART, clock, power key, virtio-mmio |
//! | 192 MiB | redistributors, 128 KiB for each of up to 512 vCPUs |
//! | 256 MiB | PCI memory below 4 GiB |
//! | 768 MiB | PCI configuration space, 1 MiB for each of up to 256 buses |
//! | 1 GiB | RAM, in one piece |
//! | ¾ of all | PCI memory above 4 GiB |
//!
//! What KVM maps or emulates by pages is aligned to 64 KiB, the largest page of
//! an arm64 host.

use crossvisor_devices::virtio::mmio::MMIO_SIZE;
use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::{Transport, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::{self, Pci, PciSlots, Plan, Range, Region};

use super::gic::Gic;
use crate::shared::layout::{self as shared, AddressSpace, MmioSlots};

/// The largest page of an arm64 host, in bytes.
const MAX_PAGE: u64 = 64 << 10;

/// GIC distributor; GICv2's is only the first 4 KiB.
pub const GIC_DISTRIBUTOR: Range = Range::new(0x0800_0000, 64 << 10);
/// Size of a GICv2 distributor in bytes (KVM_VGIC_V2_DIST_SIZE).
pub const GICV2_DISTRIBUTOR_SIZE: u64 = 4 << 10;
/// GICv2 CPU interface (KVM_VGIC_V2_CPU_SIZE).
pub const GICV2_CPU_INTERFACE: Range = Range::new(0x0801_0000, 8 << 10);
/// GICv2m frame.
pub const V2M: Range = Range::new(0x0802_0000, 4 << 10);
/// GICv3 ITS: a frame of registers and one for messages (KVM_VGIC_V3_ITS_SIZE).
pub const ITS: Range = Range::new(0x0804_0000, 128 << 10);
/// The first GICv3 redistributor.
pub const REDISTRIBUTORS: u64 = 0x0c00_0000;
/// Size of one vCPU's redistributor in bytes (KVM_VGIC_V3_REDIST_SIZE).
pub const REDISTRIBUTOR_SIZE: u64 = 128 << 10;

/// 8250 UART.
pub const UART: Range = Range::new(0x0900_0000, 8);
/// PL031 real-time clock.
pub const RTC: Range = Range::new(0x0901_0000, 4 << 10);
/// PL061 GPIO controller, for the power key.
pub const GPIO: Range = Range::new(0x0902_0000, 4 << 10);

const PCI_MMIO32: Range = Range::new(0x1000_0000, 512 << 20);
/// Configuration space of bus 0; the map has room for 256 buses.
const PCI_ECAM: Range = Range::new(0x3000_0000, 1 << 20);

/// Where RAM begins.
pub const RAM_BASE: u64 = 1 << 30;

// Shared peripheral interrupts; wire n is GSI n.
const INTX: [u32; 4] = [0, 1, 2, 3];
const UART_GSI: u32 = 4;
const GPIO_GSI: u32 = 5;
const MMIO: MmioSlots = MmioSlots {
    base: 0x0a00_0000,
    first_gsi: 16,
    count: 64,
};
/// How many shared interrupts are wires.
pub const WIRES: u32 = 96;
/// The first shared interrupt of the v2m frame.
pub const V2M_FIRST_SPI: u32 = WIRES;
/// How many shared interrupts the v2m frame has.
pub const V2M_SPIS: u32 = 384;

/// The guest-physical address width that KVM gives a VM when it is not asked
/// for one (KVM API, section 4.2).
pub const DEFAULT_IPA_BITS: u32 = 40;

/// KVM's default, or what it has at most when that is less, or more when the
/// RAM needs it. 2^52 is the largest physical address space of the architecture
/// (FEAT_LPA).
const SPACE: AddressSpace = AddressSpace {
    ram_base: RAM_BASE,
    usual_bits: DEFAULT_IPA_BITS,
    least_bits: 32,
    most_bits: 52,
};

/// The longest command line without its NUL: arm64's COMMAND_LINE_SIZE is 2048
/// (arch/arm64/include/uapi/asm/setup.h).
const CMDLINE_MAX: usize = 2047;

/// Where the machine's own devices are in the plan.
pub mod name {
    /// GIC distributor.
    pub const GIC_DISTRIBUTOR: &str = "gic-distributor";
    /// GICv2 CPU interface.
    pub const GIC_CPU_INTERFACE: &str = "gic-cpu-interface";
    /// GICv3 redistributors.
    pub const GIC_REDISTRIBUTORS: &str = "gic-redistributors";
    /// GICv3 ITS.
    pub const GIC_ITS: &str = "gic-its";
    /// GICv2m frame.
    pub const GIC_V2M: &str = "gic-v2m";
    /// 8250 UART.
    pub const UART: &str = "uart";
    /// PL031 clock.
    pub const RTC: &str = "rtc-pl031";
    /// PL061 GPIO controller.
    pub const GPIO: &str = "gpio-pl061";
}

/// Plans a machine; returns with it the width of its guest-physical addresses
/// in bits.
///
/// # Errors
/// Names the option that cannot be met.
pub fn plan(config: &VmConfig, host: &Host, gic: Gic) -> Result<(Plan, u32)> {
    plan::one_mmu(config)?;
    check_cpus(config, host, gic)?;
    let ipa_bits = SPACE.bits(config.memory, host)?;
    let transport = plan::transport(config, Transport::Pci, &[Transport::Pci, Transport::Mmio])?;
    let mut pci_slots = PciSlots::default();
    let mut mmio_slots = 0..;
    let devices = plan::devices(config, |_, _| match transport {
        Transport::Mmio => MMIO.slot(mmio_slots.next().unwrap_or(u32::MAX)),
        _ => pci_slots.take(),
    })?;
    let plan = Plan {
        arch: super::NAME,
        cpus: config.cpus,
        memory: vec![Range::new(RAM_BASE, config.memory)],
        irqchip: gic.name(),
        mmu: None,
        regions: regions(config.cpus, gic),
        first_free_gsi: WIRES,
        pci: (transport == Transport::Pci).then(|| pci(gic, ipa_bits)),
        devices,
        cmdline: shared::command_line(config, "ttyS0", CMDLINE_MAX)?,
        guest_modules: vec!["gpio_keys", "evdev"],
        power_off_is_ctrl_alt_del: false,
    };
    plan.check(host.page_size)?;
    Ok((plan, ipa_bits))
}

fn check_cpus(config: &VmConfig, host: &Host, gic: Gic) -> Result<()> {
    let max = gic.max_vcpus(host);
    if (1..=max).contains(&config.cpus) {
        return Ok(());
    }
    let v3 = Gic::V3.is_offered(host) && !gic.is_v3();
    let advice = match v3 && config.cpus > max {
        true => format!("; --irqchip gicv3 serves up to {}", Gic::V3.max_vcpus(host)),
        false => String::new(),
    };
    Err(Error::config(
        "--cpus",
        format!(
            "{} vCPUs: a {} on this host serves 1 to {max}{advice}",
            config.cpus,
            gic.name()
        ),
    ))
}

fn regions(cpus: u32, gic: Gic) -> Vec<Region> {
    let region = |name: &str, range, gsi| Region {
        name: name.into(),
        ports: false,
        range,
        gsi,
    };
    let distributor_size = match gic.is_v3() {
        true => GIC_DISTRIBUTOR.size,
        false => GICV2_DISTRIBUTOR_SIZE,
    };
    let redistributors = Range::new(REDISTRIBUTORS, u64::from(cpus) * REDISTRIBUTOR_SIZE);
    let distributor = Range::new(GIC_DISTRIBUTOR.base, distributor_size);
    let mut regions = vec![
        region(name::GIC_DISTRIBUTOR, distributor, None),
        region(name::UART, UART, Some(UART_GSI)),
        region(name::RTC, RTC, None),
        region(name::GPIO, GPIO, Some(GPIO_GSI)),
    ];
    match gic {
        Gic::V2 => {}
        Gic::V2m => regions.push(region(name::GIC_V2M, V2M, None)),
        Gic::V3 => {}
        Gic::V3Its => regions.push(region(name::GIC_ITS, ITS, None)),
    }
    regions.push(match gic.is_v3() {
        true => region(name::GIC_REDISTRIBUTORS, redistributors, None),
        false => region(name::GIC_CPU_INTERFACE, GICV2_CPU_INTERFACE, None),
    });
    regions.sort_by_key(|region| region.range.base);
    regions
}

fn pci(gic: Gic, ipa_bits: u32) -> Pci {
    Pci {
        ecam: Some(PCI_ECAM),
        mmio32: shared::identity(PCI_MMIO32),
        mmio64: shared::identity(AddressSpace::above_ram(ipa_bits)),
        intx: INTX,
        msi: gic.has_msi(),
    }
}

const _: () = {
    assert!(GIC_DISTRIBUTOR.base.is_multiple_of(MAX_PAGE));
    assert!(GICV2_CPU_INTERFACE.base.is_multiple_of(MAX_PAGE));
    assert!(ITS.base.is_multiple_of(MAX_PAGE) && REDISTRIBUTORS.is_multiple_of(MAX_PAGE));
    assert!(MMIO.first_gsi + MMIO.count <= WIRES);
    assert!(MMIO_SIZE <= MmioSlots::STEP);
    // Room for the redistributors of as many vCPUs as KVM can have.
    assert!(
        REDISTRIBUTORS + super::gic::V3_MAX_VCPUS as u64 * REDISTRIBUTOR_SIZE <= PCI_MMIO32.base
    );
};
