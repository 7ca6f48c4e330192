//! The flattened device tree (Devicetree Specification 0.4; bindings of Linux's
//! Documentation/devicetree/bindings, `riscv/` and `interrupt-controller/`).

use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::Console;
use crossvisor_vmm::error::Error;
use crossvisor_vmm::plan::Plan;
use vm_fdt::{FdtWriter, FdtWriterResult};

use super::irqchip::Irqchip;
use super::layout::{self, name};
use super::{host, isa};
use crate::shared::fdt::{self as shared, Loading, PciInterrupts, PciMessages, reg};

/// The bus that the devices are on.
const SOC: &str = "soc";

// Phandles.
/// The controller of the wires: PLIC or APLIC.
const WIRES: u32 = 1;
/// The IMSICs.
const MESSAGES: u32 = 2;
/// The first vCPU's interrupt controller; the others' follow.
const CPU: u32 = 0x1000;

/// The supervisor's external interrupt, at a hart (RISC-V privileged
/// specification, "Supervisor Cause Register").
const SUPERVISOR_EXTERNAL: u32 = 9;

// Interrupt types of an APLIC (riscv,aplic.yaml).
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// What the tree says of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Its interrupt controller.
    pub irqchip: Irqchip,
    /// The host, whose instruction set the vCPUs have.
    pub host: &'a Host,
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
    // A PLIC does not say what kind of wire a source is.
    let wire = |gsi, kind| match contents.irqchip {
        Irqchip::Aia => vec![gsi, kind],
        Irqchip::Plic => vec![gsi],
    };
    let edge = |gsi| wire(gsi, EDGE_RISING);
    let level = |gsi| wire(gsi, LEVEL_HIGH);

    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "crossvisor")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    let uart = plan.region(name::UART);
    let stdout = uart.filter(|_| contents.console == Console::Native);
    let stdout = stdout.map(|uart| format!("/{SOC}/{}", shared::uart_name(uart)));
    shared::chosen(&mut fdt, &plan.cmdline, stdout.as_deref(), loading)?;
    shared::memory(&mut fdt, &plan.memory)?;
    cpus(&mut fdt, contents)?;
    // A bus of their own: Linux takes an interrupt parent of the root's for that
    // of the vCPUs' own controllers, too, and finds none to begin with.
    let soc = fdt.begin_node(SOC)?;
    fdt.property_string("compatible", "simple-bus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    fdt.property_u32("interrupt-parent", WIRES)?;
    plic(&mut fdt, plan)?;
    imsics(&mut fdt, contents)?;
    aplic(&mut fdt, plan)?;
    if let Some(uart) = uart {
        shared::uart(&mut fdt, uart, &edge)?;
    }
    if let Some(rtc) = plan.region(name::RTC) {
        let node = fdt.begin_node(&format!("rtc@{:x}", rtc.range.base))?;
        fdt.property_string("compatible", "google,goldfish-rtc")?;
        reg(&mut fdt, &[rtc.range])?;
        if let Some(gsi) = rtc.gsi {
            fdt.property_array_u32("interrupts", &edge(gsi))?;
        }
        fdt.end_node(node)?;
    }
    shared::virtio_mmio(&mut fdt, plan, &edge)?;
    if let Some(root) = &plan.pci {
        let interrupts = PciInterrupts {
            controller: WIRES,
            address_cells: 0,
            level: &level,
            messages: match contents.irqchip {
                Irqchip::Aia => PciMessages::Parent(MESSAGES),
                Irqchip::Plic => PciMessages::None,
            },
        };
        shared::pci(&mut fdt, root, &interrupts)?;
    }
    fdt.end_node(soc)?;
    fdt.end_node(root)?;
    fdt.finish()
}

fn cpus(fdt: &mut FdtWriter, contents: &Contents<'_>) -> FdtWriterResult<()> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    let value = |name| u32::try_from(contents.host.capability(name)).ok();
    fdt.property_u32("timebase-frequency", value(host::TIMEBASE).unwrap_or(0))?;
    let extensions = isa::extensions(contents.host, contents.irqchip == Irqchip::Aia);
    let names: Vec<String> = extensions.iter().map(|name| (*name).to_owned()).collect();
    let mmu_type = host::mmu_type(contents.host.capability(host::SATP_MODE));
    for index in 0..contents.plan.cpus {
        let node = fdt.begin_node(&format!("cpu@{index:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "riscv")?;
        fdt.property_u32("reg", index)?;
        fdt.property_string("status", "okay")?;
        // The older property and the two newer ones: kernels look for either.
        fdt.property_string("riscv,isa", &isa::string(&extensions))?;
        fdt.property_string("riscv,isa-base", "rv64i")?;
        fdt.property_string_list("riscv,isa-extensions", names.clone())?;
        if let Some(kind) = mmu_type {
            fdt.property_string("mmu-type", kind)?;
        }
        for (extension, property, capability) in [
            ("zicbom", "riscv,cbom-block-size", host::CBOM_SIZE),
            ("zicboz", "riscv,cboz-block-size", host::CBOZ_SIZE),
        ] {
            if let (true, Some(size)) = (extensions.contains(&extension), value(capability)) {
                fdt.property_u32(property, size)?;
            }
        }
        let controller = fdt.begin_node("interrupt-controller")?;
        fdt.property_string("compatible", "riscv,cpu-intc")?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_u32("#interrupt-cells", 1)?;
        fdt.property_phandle(CPU + index)?;
        fdt.end_node(controller)?;
        fdt.end_node(node)?;
    }
    fdt.end_node(cpus)
}

/// The external interrupts of all vCPUs, as `interrupts-extended` has them.
fn cpu_pins(cpus: u32) -> Vec<u32> {
    (0..cpus)
        .flat_map(|index| [CPU + index, SUPERVISOR_EXTERNAL])
        .collect()
}

fn plic(fdt: &mut FdtWriter, plan: &Plan) -> FdtWriterResult<()> {
    let Some(region) = plan.region(name::PLIC) else {
        return Ok(());
    };
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", region.range.base))?;
    let compatible = ["sifive,plic-1.0.0", "riscv,plic0"].map(String::from);
    fdt.property_string_list("compatible", compatible.to_vec())?;
    fdt.property_phandle(WIRES)?;
    reg(fdt, &[region.range])?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_u32("riscv,ndev", layout::WIRES)?;
    fdt.property_array_u32("interrupts-extended", &cpu_pins(plan.cpus))?;
    fdt.end_node(node)
}

fn imsics(fdt: &mut FdtWriter, contents: &Contents<'_>) -> FdtWriterResult<()> {
    let Some(region) = contents.plan.region(name::IMSICS) else {
        return Ok(());
    };
    let ids = u32::try_from(contents.host.capability(host::AIA_IDS)).unwrap_or(0);
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", region.range.base))?;
    fdt.property_string("compatible", "riscv,imsics")?;
    fdt.property_phandle(MESSAGES)?;
    reg(fdt, &[region.range])?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 0)?;
    fdt.property_null("msi-controller")?;
    fdt.property_u32("#msi-cells", 0)?;
    fdt.property_u32("riscv,num-ids", ids)?;
    fdt.property_array_u32("interrupts-extended", &cpu_pins(contents.plan.cpus))?;
    fdt.end_node(node)
}

fn aplic(fdt: &mut FdtWriter, plan: &Plan) -> FdtWriterResult<()> {
    let Some(region) = plan.region(name::APLIC) else {
        return Ok(());
    };
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", region.range.base))?;
    fdt.property_string("compatible", "riscv,aplic")?;
    fdt.property_phandle(WIRES)?;
    reg(fdt, &[region.range])?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 2)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_u32("riscv,num-sources", layout::WIRES)?;
    fdt.property_u32("msi-parent", MESSAGES)?;
    fdt.end_node(node)
}
