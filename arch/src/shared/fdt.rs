//! Parts of flattened device trees that do not differ between architectures
//! (Devicetree Specification 0.4; bindings of Linux's
//! Documentation/devicetree/bindings).
//!
//! What an interrupt looks like is the controller's matter: whoever builds a
//! tree says it as cells.

use crossvisor_vmm::error::Error;
use crossvisor_vmm::plan::{Pci, Plan, Range, Region, Slot};
use vm_fdt::{FdtWriter, FdtWriterResult};

/// Clock of an 8250 in a PC, in Hz.
const UART_CLOCK: u32 = 1_843_200;

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

/// An interrupt specifier: the cells that an `interrupts` property has for one.
pub type Specifier<'a> = &'a dyn Fn(u32) -> Vec<u32>;

/// A tree that could not be built, for the user.
pub fn failed(error: vm_fdt::Error) -> Error {
    Error::Boot(format!("the device tree cannot be built: {error}"))
}

/// The chosen node; `stdout` is the path of the console.
pub fn chosen(
    fdt: &mut FdtWriter,
    cmdline: &str,
    stdout: Option<&str>,
    loading: &Loading,
) -> FdtWriterResult<()> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", cmdline)?;
    if let Some(path) = stdout {
        fdt.property_string("stdout-path", path)?;
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

/// The memory nodes.
pub fn memory(fdt: &mut FdtWriter, ranges: &[Range]) -> FdtWriterResult<()> {
    for range in ranges {
        let node = fdt.begin_node(&format!("memory@{:x}", range.base))?;
        fdt.property_string("device_type", "memory")?;
        reg(fdt, &[*range])?;
        fdt.end_node(node)?;
    }
    Ok(())
}

/// An 8250 UART with its registers a byte apart.
pub fn uart(fdt: &mut FdtWriter, uart: &Region, edge: Specifier<'_>) -> FdtWriterResult<()> {
    let node = fdt.begin_node(&uart_name(uart))?;
    fdt.property_string("compatible", "ns16550a")?;
    reg(fdt, &[uart.range])?;
    if let Some(gsi) = uart.gsi {
        fdt.property_array_u32("interrupts", &edge(gsi))?;
    }
    fdt.property_u32("clock-frequency", UART_CLOCK)?;
    fdt.end_node(node)
}

/// The name of an 8250's node in the root.
pub fn uart_name(uart: &Region) -> String {
    format!("serial@{:x}", uart.range.base)
}

/// The plan's virtio-mmio devices.
pub fn virtio_mmio(fdt: &mut FdtWriter, plan: &Plan, edge: Specifier<'_>) -> FdtWriterResult<()> {
    for device in &plan.devices {
        if let Slot::Mmio { range, gsi } = device.slot {
            let node = fdt.begin_node(&format!("virtio_mmio@{:x}", range.base))?;
            fdt.property_string("compatible", "virtio,mmio")?;
            reg(fdt, &[range])?;
            fdt.property_array_u32("interrupts", &edge(gsi))?;
            fdt.property_null("dma-coherent")?;
            fdt.end_node(node)?;
        }
    }
    Ok(())
}

/// Where the interrupts of a PCI root lead.
pub struct PciInterrupts<'a> {
    /// Phandle of the controller of its wires.
    pub controller: u32,
    /// That controller's #address-cells.
    pub address_cells: usize,
    /// A level-triggered wire of it.
    pub level: Specifier<'a>,
    /// Who takes its messages.
    pub messages: PciMessages,
}

/// Who takes a PCI root's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PciMessages {
    /// Nobody.
    None,
    /// The controller with this phandle, which does not look at who sends.
    Parent(u32),
    /// The controller with this phandle, to which every requester ID is a
    /// device ID of its own.
    Map(u32),
}

// The first cell of a PCI address in `ranges` (IEEE 1275 PCI bus binding,
// section 2.2.1.1): space code, and whether the window is for prefetchable
// memory, as Linux wants one to be that is larger than 4 GiB.
const PCI_MEMORY_32: u32 = 0x0200_0000;
const PCI_MEMORY_64: u32 = 0x4300_0000;

/// A PCI root whose configuration space is reached by ECAM; none without that.
pub fn pci(fdt: &mut FdtWriter, pci: &Pci, interrupts: &PciInterrupts<'_>) -> FdtWriterResult<()> {
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
    pci_windows(fdt, pci)?;
    // Wires: device and pin swizzle, so four devices show all there is.
    let mut map = Vec::new();
    for device in 0..4 {
        for pin in 1..=4 {
            let gsi = pci.intx_gsi(device, pin);
            map.extend([u32::from(device) << 11, 0, 0, pin.into()]);
            map.push(interrupts.controller);
            map.extend(std::iter::repeat_n(0, interrupts.address_cells));
            map.extend((interrupts.level)(gsi));
        }
    }
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_array_u32("interrupt-map-mask", &[3 << 11, 0, 0, 7])?;
    fdt.property_array_u32("interrupt-map", &map)?;
    match interrupts.messages {
        PciMessages::Map(phandle) => {
            fdt.property_array_u32("msi-map", &[0, phandle, 0, 0x1_0000])?;
        }
        PciMessages::Parent(phandle) => fdt.property_u32("msi-parent", phandle)?,
        PciMessages::None => {}
    }
    fdt.end_node(node)
}

/// The `ranges` property of a PCI root: its windows.
pub fn pci_windows(fdt: &mut FdtWriter, pci: &Pci) -> FdtWriterResult<()> {
    let windows = [(PCI_MEMORY_32, pci.mmio32), (PCI_MEMORY_64, pci.mmio64)];
    let ranges: Vec<u32> = windows
        .iter()
        .flat_map(|(space, window)| {
            let [bus, cpu, size] =
                [window.bus_address, window.range.base, window.range.size].map(cells);
            [*space, bus[0], bus[1], cpu[0], cpu[1], size[0], size[1]]
        })
        .collect();
    fdt.property_array_u32("ranges", &ranges)
}

/// A number as two cells.
pub fn cells(value: u64) -> [u32; 2] {
    [(value >> 32) as u32, value as u32]
}

/// A `reg` property with two cells for each address and size.
pub fn reg(fdt: &mut FdtWriter, ranges: &[Range]) -> FdtWriterResult<()> {
    let values: Vec<u64> = ranges
        .iter()
        .flat_map(|range| [range.base, range.size])
        .collect();
    fdt.property_array_u64("reg", &values)
}
