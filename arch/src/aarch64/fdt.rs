//! The flattened device tree (Devicetree Specification 0.4; bindings of Linux's
//! Documentation/devicetree/bindings).

use crossvisor_devices::pl061::POWER_KEY_LINE;
use crossvisor_vmm::config::Console;
use crossvisor_vmm::error::Error;
use crossvisor_vmm::plan::{Pci, Plan, Range, Slot};
use vm_fdt::{FdtWriter, FdtWriterResult};

use super::gic::Gic;
use super::layout::name;

// Phandles.
const GIC: u32 = 1;
const MSI: u32 = 2;
const CLOCK: u32 = 3;
const GPIO: u32 = 4;

// Interrupt specifiers (interrupt-controller/arm,gic-v3.yaml and arm,gic.yaml).
const SPI: u32 = 0;
const PPI: u32 = 1;
const EDGE: u32 = 1;
const LEVEL: u32 = 4;

// Private peripheral interrupts, counted from 16: the generic timer's (secure,
// non-secure, virtual, hypervisor) and the PMU's, as Base System Architecture
// has them and KVM by default.
const TIMER_PPIS: [u32; 4] = [13, 14, 11, 10];
/// The PMU's private interrupt.
pub const PMU_PPI: u32 = 7;

/// KEY_POWER of Linux's input event codes.
const KEY_POWER: u32 = 116;

/// Clock of an 8250 in a PC, in Hz.
const UART_CLOCK: u32 = 1_843_200;
/// Clock of the PrimeCell peripherals, in Hz.
const PERIPHERAL_CLOCK: u32 = 24_000_000;

/// What only loading decides.
#[derive(Clone, Debug, Default)]
pub struct Loading {
    /// Where the initrd is.
    pub initrd: Option<Range>,
    /// Seed of the kernel's address space layout.
    pub kaslr_seed: Option<u64>,
    /// Seed of the kernel's random number generator.
    pub rng_seed: Vec<u8>,
}

/// What the tree says of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Its interrupt controller.
    pub gic: Gic,
    /// Whether vCPUs have a PMU.
    pub pmu: bool,
    /// Which device the console is.
    pub console: Console,
}

/// Builds the tree.
///
/// # Errors
/// A value cannot be told in a device tree, such as a command line with a NUL.
pub fn build(contents: &Contents<'_>, loading: &Loading) -> Result<Vec<u8>, Error> {
    write(contents, loading)
        .map_err(|error| Error::Boot(format!("the device tree cannot be built: {error}")))
}

fn write(contents: &Contents<'_>, loading: &Loading) -> FdtWriterResult<Vec<u8>> {
    let plan = contents.plan;
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "crossvisor")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC)?;
    if plan.pci.is_some() || !plan.devices.is_empty() {
        fdt.property_null("dma-coherent")?;
    }
    chosen(&mut fdt, contents, loading)?;
    for range in &plan.memory {
        let node = fdt.begin_node(&format!("memory@{:x}", range.base))?;
        fdt.property_string("device_type", "memory")?;
        reg(&mut fdt, &[*range])?;
        fdt.end_node(node)?;
    }
    cpus(&mut fdt, plan.cpus)?;
    psci(&mut fdt)?;
    timer(&mut fdt, contents)?;
    if contents.pmu {
        let node = fdt.begin_node("pmu")?;
        fdt.property_string("compatible", "arm,armv8-pmuv3")?;
        fdt.property_array_u32("interrupts", &ppi(contents, PMU_PPI))?;
        fdt.end_node(node)?;
    }
    gic(&mut fdt, contents)?;
    clock(&mut fdt)?;
    peripherals(&mut fdt, plan)?;
    for device in &plan.devices {
        if let Slot::Mmio { range, gsi } = device.slot {
            let node = fdt.begin_node(&format!("virtio_mmio@{:x}", range.base))?;
            fdt.property_string("compatible", "virtio,mmio")?;
            reg(&mut fdt, &[range])?;
            fdt.property_array_u32("interrupts", &[SPI, gsi, EDGE])?;
            fdt.property_null("dma-coherent")?;
            fdt.end_node(node)?;
        }
    }
    if let Some(root) = &plan.pci {
        pci(&mut fdt, root, contents.gic)?;
    }
    fdt.end_node(root)?;
    fdt.finish()
}

fn chosen(fdt: &mut FdtWriter, contents: &Contents<'_>, loading: &Loading) -> FdtWriterResult<()> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", &contents.plan.cmdline)?;
    if let (Console::Native, Some(uart)) = (contents.console, contents.plan.region(name::UART)) {
        fdt.property_string("stdout-path", &format!("/serial@{:x}", uart.range.base))?;
    }
    if let Some(initrd) = loading.initrd {
        fdt.property_u64("linux,initrd-start", initrd.base)?;
        fdt.property_u64("linux,initrd-end", initrd.end())?;
    }
    if let Some(seed) = loading.kaslr_seed {
        fdt.property_u64("kaslr-seed", seed)?;
    }
    if !loading.rng_seed.is_empty() {
        fdt.property("rng-seed", &loading.rng_seed)?;
    }
    fdt.end_node(node)
}

/// The affinity fields of MPIDR_EL1 that KVM gives vCPU `index` (reset_mpidr in
/// arch/arm64/kvm/sys_regs.c): 16 vCPUs in a cluster, for a GICv3 signals no
/// more than 16 at once.
pub fn mpidr(index: u32) -> u32 {
    (index & 0xf) | (index >> 4 & 0xff) << 8 | (index >> 12 & 0xff) << 16
}

fn cpus(fdt: &mut FdtWriter, count: u32) -> FdtWriterResult<()> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..count {
        let id = mpidr(index);
        let node = fdt.begin_node(&format!("cpu@{id:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u32("reg", id)?;
        fdt.end_node(node)?;
    }
    fdt.end_node(cpus)
}

fn psci(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = fdt.begin_node("psci")?;
    let versions = vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()];
    fdt.property_string_list("compatible", versions)?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(node)
}

/// A level-triggered private interrupt. A GICv2 wants to know on which CPUs.
fn ppi(contents: &Contents<'_>, number: u32) -> [u32; 3] {
    let cpus = match contents.gic.is_v3() {
        true => 0,
        false => (1 << contents.plan.cpus.min(8)) - 1,
    };
    [PPI, number, cpus << 8 | LEVEL]
}

fn timer(fdt: &mut FdtWriter, contents: &Contents<'_>) -> FdtWriterResult<()> {
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    let interrupts = TIMER_PPIS.map(|number| ppi(contents, number));
    fdt.property_array_u32("interrupts", interrupts.as_flattened())?;
    fdt.property_null("always-on")?;
    fdt.end_node(node)
}

fn gic(fdt: &mut FdtWriter, contents: &Contents<'_>) -> FdtWriterResult<()> {
    let range = |name| contents.plan.region(name).map(|region| region.range);
    let Some(distributor) = range(name::GIC_DISTRIBUTOR) else {
        return Ok(());
    };
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", distributor.base))?;
    let (compatible, second) = match contents.gic.is_v3() {
        true => ("arm,gic-v3", range(name::GIC_REDISTRIBUTORS)),
        false => ("arm,cortex-a15-gic", range(name::GIC_CPU_INTERFACE)),
    };
    fdt.property_string("compatible", compatible)?;
    fdt.property_phandle(GIC)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    let ranges: Vec<Range> = [distributor].into_iter().chain(second).collect();
    reg(fdt, &ranges)?;
    if let Some(its) = range(name::GIC_ITS) {
        let child = fdt.begin_node(&format!("msi-controller@{:x}", its.base))?;
        fdt.property_string("compatible", "arm,gic-v3-its")?;
        fdt.property_phandle(MSI)?;
        fdt.property_null("msi-controller")?;
        fdt.property_u32("#msi-cells", 1)?;
        reg(fdt, &[its])?;
        fdt.end_node(child)?;
    }
    if let Some(frame) = range(name::GIC_V2M) {
        let child = fdt.begin_node(&format!("v2m@{:x}", frame.base))?;
        fdt.property_string("compatible", "arm,gic-v2m-frame")?;
        fdt.property_phandle(MSI)?;
        fdt.property_null("msi-controller")?;
        reg(fdt, &[frame])?;
        fdt.end_node(child)?;
    }
    fdt.end_node(node)
}

fn clock(fdt: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", PERIPHERAL_CLOCK)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK)?;
    fdt.end_node(node)
}

fn peripherals(fdt: &mut FdtWriter, plan: &Plan) -> FdtWriterResult<()> {
    if let Some(uart) = plan.region(name::UART) {
        let node = fdt.begin_node(&format!("serial@{:x}", uart.range.base))?;
        fdt.property_string("compatible", "ns16550a")?;
        reg(fdt, &[uart.range])?;
        if let Some(gsi) = uart.gsi {
            fdt.property_array_u32("interrupts", &[SPI, gsi, EDGE])?;
        }
        fdt.property_u32("clock-frequency", UART_CLOCK)?;
        fdt.end_node(node)?;
    }
    if let Some(rtc) = plan.region(name::RTC) {
        let node = fdt.begin_node(&format!("rtc@{:x}", rtc.range.base))?;
        prime_cell(fdt, "arm,pl031")?;
        reg(fdt, &[rtc.range])?;
        fdt.end_node(node)?;
    }
    if let Some(gpio) = plan.region(name::GPIO) {
        let node = fdt.begin_node(&format!("gpio@{:x}", gpio.range.base))?;
        prime_cell(fdt, "arm,pl061")?;
        fdt.property_phandle(GPIO)?;
        reg(fdt, &[gpio.range])?;
        if let Some(gsi) = gpio.gsi {
            fdt.property_array_u32("interrupts", &[SPI, gsi, LEVEL])?;
        }
        fdt.property_null("gpio-controller")?;
        fdt.property_u32("#gpio-cells", 2)?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_u32("#interrupt-cells", 2)?;
        fdt.property_u32("#address-cells", 0)?;
        fdt.end_node(node)?;
        let keys = fdt.begin_node("gpio-keys")?;
        fdt.property_string("compatible", "gpio-keys")?;
        let key = fdt.begin_node("poweroff")?;
        fdt.property_string("label", "power key")?;
        fdt.property_u32("linux,code", KEY_POWER)?;
        // The line, active high (GPIO_ACTIVE_HIGH).
        fdt.property_array_u32("gpios", &[GPIO, POWER_KEY_LINE.into(), 0])?;
        fdt.end_node(key)?;
        fdt.end_node(keys)?;
    }
    Ok(())
}

/// What all PrimeCell peripherals have.
fn prime_cell(fdt: &mut FdtWriter, compatible: &str) -> FdtWriterResult<()> {
    fdt.property_string_list(
        "compatible",
        vec![compatible.into(), "arm,primecell".into()],
    )?;
    fdt.property_u32("clocks", CLOCK)?;
    fdt.property_string("clock-names", "apb_pclk")
}

// The first cell of a PCI address in `ranges` (IEEE 1275 PCI bus binding,
// section 2.2.1.1): space code, and whether the window is for prefetchable
// memory, as Linux wants one to be that is larger than 4 GiB.
const PCI_MEMORY_32: u32 = 0x0200_0000;
const PCI_MEMORY_64: u32 = 0x4300_0000;

fn pci(fdt: &mut FdtWriter, pci: &Pci, gic: Gic) -> FdtWriterResult<()> {
    let Some(ecam) = pci.ecam else {
        return Ok(());
    };
    let node = fdt.begin_node(&format!("pcie@{:x}", ecam.base))?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    reg(fdt, &[ecam])?;
    let last_bus = u32::try_from((ecam.size >> 20).saturating_sub(1)).unwrap_or(0xff);
    fdt.property_array_u32("bus-range", &[0, last_bus])?;
    fdt.property_u32("linux,pci-domain", 0)?;
    fdt.property_null("dma-coherent")?;
    let windows = [(PCI_MEMORY_32, pci.mmio32), (PCI_MEMORY_64, pci.mmio64)];
    let ranges: Vec<u32> = windows
        .iter()
        .flat_map(|(space, window)| {
            let [bus, cpu, size] =
                [window.bus_address, window.range.base, window.range.size].map(cells);
            [*space, bus[0], bus[1], cpu[0], cpu[1], size[0], size[1]]
        })
        .collect();
    fdt.property_array_u32("ranges", &ranges)?;
    // Wires: device and pin swizzle, so four devices show all there is.
    let mut map = Vec::new();
    for device in 0..4 {
        for pin in 1..=4 {
            let gsi = pci.intx[(device as usize + pin as usize - 1) % 4];
            map.extend([device << 11, 0, 0, pin, GIC, 0, 0, SPI, gsi, LEVEL]);
        }
    }
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_array_u32("interrupt-map-mask", &[3 << 11, 0, 0, 7])?;
    fdt.property_array_u32("interrupt-map", &map)?;
    match gic {
        // Every requester ID is its own device ID.
        Gic::V3Its => fdt.property_array_u32("msi-map", &[0, MSI, 0, 0x1_0000])?,
        Gic::V2m => fdt.property_u32("msi-parent", MSI)?,
        Gic::V2 | Gic::V3 => {}
    }
    fdt.end_node(node)
}

fn cells(value: u64) -> [u32; 2] {
    [(value >> 32) as u32, value as u32]
}

fn reg(fdt: &mut FdtWriter, ranges: &[Range]) -> FdtWriterResult<()> {
    let values: Vec<u64> = ranges
        .iter()
        .flat_map(|range| [range.base, range.size])
        .collect();
    fdt.property_array_u64("reg", &values)
}
