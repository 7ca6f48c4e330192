//! The Differentiated System Description Table: the machine's devices.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
    OpRegion, OpRegionSpace, Package, PackageBuilder, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use crossvisor_devices::acpi_power;
use crossvisor_devices::pci::intx_gsi_index;
use crossvisor_vmm::plan::{Pci, Plan, Range, Slot};

use super::super::layout;
use super::{last_bus, sdt};

/// Device numbers on a PCI bus.
const PCI_SLOTS: u8 = 32;
/// Interrupt pins of a PCI function.
const PCI_PINS: u8 = 4;

/// What a power button's notification says (section 4.8.3.1.1.2).
const BUTTON_PRESSED: u8 = 0x80;

/// The table of `plan`.
pub(super) fn table(plan: &Plan) -> Vec<u8> {
    let mut body = Vec::new();
    let mut devices: Vec<u8> = Vec::new();
    let ecam = plan.pci.as_ref().and_then(|pci| pci.ecam);
    motherboard(ecam, &mut devices);
    com1(&mut devices);
    rtc(&mut devices);
    events(&mut devices);
    if let Some(pci) = &plan.pci {
        pci_root(pci, &mut devices);
    }
    for (number, device) in plan.devices.iter().enumerate() {
        if let Slot::Mmio { range, gsi } = device.slot {
            virtio_mmio(number as u8, range, gsi, &mut devices);
        }
    }
    Scope::new(path("\\_SB_"), vec![&Raw(devices)]).to_aml_bytes(&mut body);
    // SLP_TYP for S5 (section 7.4.2); the other three elements are not used on
    // a hardware-reduced machine.
    let s5 = Package::new(vec![&acpi_power::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    Name::new(path("\\_S5_"), &s5).to_aml_bytes(&mut body);

    sdt(b"DSDT", 6, &body)
}

/// AML that is there already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn path(name: &str) -> Path {
    Path::new(name)
}

/// Writes a device with `_HID`, `_UID` and `_CRS`, and what else it has.
fn device(
    name: &str,
    hid: &dyn Aml,
    uid: u8,
    resources: Vec<&dyn Aml>,
    rest: &[&dyn Aml],
    out: &mut Vec<u8>,
) {
    let hid = Name::new(path("_HID"), hid);
    let uid = Name::new(path("_UID"), &uid);
    let resources = ResourceTemplate::new(resources);
    let resources = Name::new(path("_CRS"), &resources);
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &resources];
    children.extend(rest);
    Device::new(path(name), children).to_aml_bytes(out);
}

/// Ports, decoded in 16 bits. The machine's own are all within one page of
/// them, and fewer than 256.
fn ports(range: Range) -> IO {
    let base = range.base as u16;
    IO::new(base, base, 1, range.size as u8)
}

/// An edge-triggered, active-high interrupt that nobody shares.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// What no driver claims but is taken: Linux uses ECAM only when it is listed
/// here (PCI Firmware Specification 3.3, section 4.1.2).
fn motherboard(ecam: Option<Range>, out: &mut Vec<u8>) {
    let power = ports(layout::ACPI_POWER);
    let ecam = ecam.map(|ecam| Memory32Fixed::new(true, ecam.base as u32, ecam.size as u32));
    let mut resources: Vec<&dyn Aml> = vec![&power];
    if let Some(ecam) = &ecam {
        resources.push(ecam);
    }
    device("MBRD", &EISAName::new("PNP0C02"), 0, resources, &[], out);
}

fn com1(out: &mut Vec<u8>) {
    let (ports, interrupt) = (ports(layout::COM1), edge(layout::COM1_GSI));
    let resources: Vec<&dyn Aml> = vec![&ports, &interrupt];
    device("COM1", &EISAName::new("PNP0501"), 0, resources, &[], out);
}

/// The clock has no alarm, and so no interrupt.
fn rtc(out: &mut Vec<u8>) {
    let ports = ports(layout::RTC);
    device("RTC_", &EISAName::new("PNP0B00"), 0, vec![&ports], &[], out);
}

/// The power button, and the generic event device (section 5.6.9) through which
/// it tells that it was pressed.
fn events(out: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &EISAName::new("PNP0C0C"));
    Device::new(path("PWRB"), vec![&hid]).to_aml_bytes(out);

    let register = (layout::ACPI_POWER.base + acpi_power::GED_EVENT) as u16;
    let region = OpRegion::new(path("EVTR"), OpRegionSpace::SystemIO, &register, &1u8);
    let field = Field::new(
        path("EVTR"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVNT", 8)],
    );
    let local = Local(0);
    let event = path("EVNT");
    // The read clears the register.
    let read = Store::new(&local, &event);
    let pressed = And::new(&ZERO, &local, &acpi_power::EVENT_POWER_BUTTON);
    let button = path("\\_SB_.PWRB");
    let notify = Notify::new(&button, &BUTTON_PRESSED);
    let notify = If::new(&pressed, vec![&notify]);
    let method = Method::new(path("_EVT"), 1, true, vec![&read, &notify]);
    let interrupt = edge(layout::ACPI_GSI);
    device(
        "GED_",
        &"ACPI0013",
        0,
        vec![&interrupt],
        &[&region, &field, &method],
        out,
    );
}

/// The PCI Express root, with its windows and where its interrupt wires lead.
fn pci_root(pci: &Pci, out: &mut Vec<u8>) {
    let cid = Name::new(path("_CID"), &EISAName::new("PNP0A03"));
    let segment = Name::new(path("_SEG"), &ZERO);
    let bus = Name::new(path("_BBN"), &ZERO);

    let mut routes = PackageBuilder::new();
    for slot in 0..PCI_SLOTS {
        for pin in 1..=PCI_PINS {
            let wire = usize::from(intx_gsi_index(slot, pin));
            let Some(gsi) = pci.intx.get(wire) else {
                continue;
            };
            // Address of all functions of the slot; the pin from 0; no link
            // device, but a GSI (section 6.2.13).
            let address = u32::from(slot) << 16 | 0xffff;
            let pin = pin - 1;
            let route = Package::new(vec![&address, &pin, &ZERO, gsi]);
            routes.add_element(&route);
        }
    }
    let routes = Name::new(path("_PRT"), &routes);

    let last = pci.ecam.map_or(0, |ecam| last_bus(ecam.size));
    let buses = AddressSpace::new_bus_number(0u16, last.into());
    let config = ports(layout::PCI_CONFIG);
    let window32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        pci.mmio32.range.base as u32,
        (pci.mmio32.range.end() - 1) as u32,
        None,
    );
    let window64 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        pci.mmio64.range.base,
        pci.mmio64.range.end() - 1,
        None,
    );
    device(
        "PCI0",
        &EISAName::new("PNP0A08"),
        0,
        vec![&buses, &config, &window32, &window64],
        &[&cid, &segment, &bus, &routes],
        out,
    );
}

/// A virtio-mmio register block, as Linux's driver finds it.
fn virtio_mmio(number: u8, range: Range, gsi: u32, out: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(true, range.base as u32, range.size as u32);
    let interrupt = edge(gsi);
    let resources: Vec<&dyn Aml> = vec![&registers, &interrupt];
    let name = format!("VR{number:02X}");
    device(&name, &"LNRO0005", number, resources, &[], out);
}
