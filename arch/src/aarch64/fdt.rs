//! The flattened device tree (Devicetree Specification 0.4; bindings of Linux's
//! Documentation/devicetree/bindings).

use crossvisor_devices::pl061::POWER_KEY_LINE;
use crossvisor_vmm::config::Console;
use crossvisor_vmm::error::Error;
use crossvisor_vmm::plan::{Plan, Range};
use vm_fdt::{FdtWriter, FdtWriterResult};

use super::gic::Gic;
use super::layout::name;
use crate::shared::fdt::{self as shared, Loading, PciInterrupts, PciMessages, reg};

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

/// Clock of the PrimeCell peripherals, in Hz.
const PERIPHERAL_CLOCK: u32 = 24_000_000;

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
    write(contents, loading).map_err(shared::failed)
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
    let uart = plan.region(name::UART);
    let stdout = uart.filter(|_| contents.console == Console::Native);
    let stdout = stdout.map(|uart| format!("/{}", shared::uart_name(uart)));
    shared::chosen(&mut fdt, &plan.cmdline, stdout.as_deref(), loading)?;
    shared::memory(&mut fdt, &plan.memory)?;
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
    shared::virtio_mmio(&mut fdt, plan, &edge)?;
    if let Some(root) = &plan.pci {
        let interrupts = PciInterrupts {
            controller: GIC,
            address_cells: 2,
            level: &level,
            messages: match contents.gic {
                Gic::V3Its => PciMessages::Map(MSI),
                Gic::V2m => PciMessages::Parent(MSI),
                Gic::V2 | Gic::V3 => PciMessages::None,
            },
        };
        shared::pci(&mut fdt, root, &interrupts)?;
    }
    fdt.end_node(root)?;
    fdt.finish()
}

/// An edge-triggered shared interrupt.
fn edge(gsi: u32) -> Vec<u32> {
    vec![SPI, gsi, EDGE]
}

/// A level-triggered shared interrupt.
fn level(gsi: u32) -> Vec<u32> {
    vec![SPI, gsi, LEVEL]
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
        shared::uart(fdt, uart, &edge)?;
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
            fdt.property_array_u32("interrupts", &level(gsi))?;
        }
        fdt.property_null("gpio-controller")?;
        fdt.property_u32("#gpio-cells", 2)?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_u32("#interrupt-cells", 2)?;
        fdt.property_u32("#address-cells", 0)?;
        fdt.end_node(node)?;
        // The line, active high (GPIO_ACTIVE_HIGH).
        let line = [GPIO, POWER_KEY_LINE.into(), 0];
        let keys = fdt.begin_node("gpio-keys")?;
        fdt.property_string("compatible", "gpio-keys")?;
        let key = fdt.begin_node("poweroff")?;
        fdt.property_string("label", "power key")?;
        fdt.property_u32("linux,code", KEY_POWER)?;
        fdt.property_array_u32("gpios", &line)?;
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
