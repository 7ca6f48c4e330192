use std::collections::BTreeMap;
use std::process::Command;

use crossvisor_vmm::arch::{Architecture, Host};
use crossvisor_vmm::config::{Disk, Transport, VmConfig};

use super::*;
use crate::x86_64::{X86_64, X86Machine};

fn machine(cpus: u32, disks: usize, transport: Transport) -> X86Machine {
    let disk = Disk {
        path: "disk".into(),
        read_only: false,
        serial: None,
        queues: None,
    };
    let config = VmConfig {
        cpus,
        memory: 5 << 30,
        disks: vec![disk; disks],
        transport: Some(transport),
        ..VmConfig::default()
    };
    let host: Host = X86_64.typical_host();
    X86Machine::new(&config, &host).unwrap()
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Finds the tables as a guest does: RSDP, XSDT, FADT, DSDT.
fn walk(tables: &[Table]) -> BTreeMap<String, Vec<u8>> {
    let at = |address: u64| {
        let table = tables.iter().find(|table| table.address == address);
        table
            .unwrap_or_else(|| panic!("no table at {address:#x}"))
            .bytes
            .clone()
    };
    let rsdp = at(layout::ACPI.base);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(sum(&rsdp[..20]), 0);
    assert_eq!(sum(&rsdp), 0);
    let xsdt = at(le64(&rsdp, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let mut found = BTreeMap::new();
    for entry in xsdt[36..].chunks(8) {
        let table = at(le64(entry, 0));
        let name = String::from_utf8(table[..4].to_vec()).unwrap();
        if name == "FACP" {
            found.insert("DSDT".to_string(), at(le64(&table, 140)));
        }
        found.insert(name, table);
    }
    for (name, table) in found.iter().chain([(&"XSDT".to_string(), &xsdt)]) {
        assert_eq!(sum(table), 0, "{name}");
        assert_eq!(le32(table, 4) as usize, table.len(), "{name}");
    }
    found
}

#[test]
fn tables_are_where_they_say_and_do_not_overlap() {
    for (cpus, transport) in [
        (1, Transport::Pci),
        (255, Transport::Pci),
        (4, Transport::Mmio),
    ] {
        let machine = machine(cpus, 3, transport);
        let mut end = layout::ACPI.base;
        let mut sorted = machine.tables.clone();
        sorted.sort_by_key(|table| table.address);
        for table in &sorted {
            assert!(table.address >= end && table.address % 16 == 0);
            end = table.address + table.bytes.len() as u64;
        }
        assert!(end <= layout::ACPI.end());
        let found = walk(&machine.tables);
        assert_eq!(found.contains_key("MCFG"), transport == Transport::Pci);
        assert!(found.contains_key("DSDT") && found.contains_key("APIC"));
    }
}

#[test]
fn the_fadt_is_hardware_reduced_with_sleep_and_reset() {
    let fadt = &walk(&machine(1, 0, Transport::Pci).tables)["FACP"];
    let flags = le32(fadt, 112);
    assert_ne!(flags & 1 << 20, 0, "HW_REDUCED_ACPI");
    assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
    let boot_arch = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(boot_arch, BOOT_ARCH_NO_VGA);
    let gas = |at: usize| (fadt[at], fadt[at + 1], le64(fadt, at + 4));
    let port = layout::ACPI_POWER.base;
    assert_eq!(gas(116), (1, 8, port + acpi_power::RESET));
    assert_eq!(fadt[128], acpi_power::RESET_VALUE);
    assert_eq!(gas(244), (1, 8, port + acpi_power::SLEEP_CONTROL));
    assert_eq!(gas(256), (1, 8, port + acpi_power::SLEEP_STATUS));
}

#[test]
fn the_madt_has_every_cpu() {
    for cpus in [1, 4, 255] {
        let madt = &walk(&machine(cpus, 0, Transport::Pci).tables)["APIC"];
        assert_eq!(u64::from(le32(madt, 36)), layout::LOCAL_APIC.base);
        assert_eq!(le32(madt, 40), 0, "no 8259");
        let mut at = 44;
        let mut ids = Vec::new();
        let mut others = Vec::new();
        while at < madt.len() {
            let length = usize::from(madt[at + 1]);
            let body = &madt[at..at + length];
            match body[0] {
                0 => {
                    assert_eq!((length, le32(body, 4)), (8, 1));
                    ids.push(u32::from(body[3]));
                }
                kind => others.push((kind, body.to_vec())),
            }
            at += length;
        }
        assert_eq!(at, madt.len());
        assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        assert_eq!(others[0].0, 1);
        assert_eq!(u64::from(le32(&others[0].1, 4)), layout::IOAPIC.base);
        assert_eq!(others[1], (4, vec![4, 6, 0xff, 0, 0, 1]));
    }
}

#[test]
fn the_mcfg_has_the_configuration_space() {
    let mcfg = &walk(&machine(1, 0, Transport::Pci).tables)["MCFG"];
    assert_eq!(le64(mcfg, 44), layout::PCI_ECAM.base);
    assert_eq!((mcfg[54], mcfg[55]), (0, 0));
    assert_eq!(mcfg.len(), 60);
}

/// A value as AML has it, as far as this table needs.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Integer(u64),
    Text(String),
    Buffer(Vec<u8>),
    Package(Vec<Value>),
    Method(Vec<u8>),
}

/// Reads AML: all names with their values, by path.
struct Aml<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Aml<'_> {
    fn byte(&mut self) -> u8 {
        self.at += 1;
        self.bytes[self.at - 1]
    }

    fn integer(&mut self, size: usize) -> u64 {
        (0..size).map(|i| u64::from(self.byte()) << (8 * i)).sum()
    }

    /// The end of a package whose length is next (ACPI 6.5, section 20.2.4).
    fn package_end(&mut self) -> usize {
        let start = self.at;
        let lead = self.byte();
        let length = match lead >> 6 {
            0 => u64::from(lead & 0x3f),
            more => self.integer(more.into()) << 4 | u64::from(lead & 0xf),
        };
        let end = start + length as usize;
        assert!(end <= self.bytes.len());
        end
    }

    fn name(&mut self) -> String {
        if self.bytes[self.at] == b'\\' {
            self.at += 1;
        }
        let name = self.bytes[self.at..self.at + 4].to_vec();
        self.at += 4;
        String::from_utf8(name).unwrap()
    }

    fn value(&mut self) -> Value {
        match self.byte() {
            0x00 => Value::Integer(0),
            0x01 => Value::Integer(1),
            0x0a => Value::Integer(self.integer(1)),
            0x0b => Value::Integer(self.integer(2)),
            0x0c => Value::Integer(self.integer(4)),
            0x0e => Value::Integer(self.integer(8)),
            0x0d => {
                let mut text = String::new();
                loop {
                    match self.byte() {
                        0 => return Value::Text(text),
                        byte => text.push(byte.into()),
                    }
                }
            }
            0x11 => {
                let end = self.package_end();
                let Value::Integer(size) = self.value() else {
                    panic!()
                };
                assert_eq!(end - self.at, size as usize);
                let bytes = self.bytes[self.at..end].to_vec();
                self.at = end;
                Value::Buffer(bytes)
            }
            0x12 => {
                let end = self.package_end();
                let count = self.byte();
                let values = (0..count).map(|_| self.value()).collect();
                assert_eq!(self.at, end);
                Value::Package(values)
            }
            other => panic!("value {other:#x} at {:#x}", self.at),
        }
    }

    fn terms(&mut self, end: usize, path: &str, found: &mut BTreeMap<String, Value>) {
        while self.at < end {
            match self.byte() {
                0x08 => {
                    let name = format!("{path}{}", self.name());
                    let value = self.value();
                    assert!(found.insert(name.clone(), value).is_none(), "{name} twice");
                }
                0x10 => self.scope(path, found),
                0x14 => {
                    let end = self.package_end();
                    let name = format!("{path}{}", self.name());
                    found.insert(name, Value::Method(self.bytes[self.at..end].to_vec()));
                    self.at = end;
                }
                0x5b => match self.byte() {
                    0x80 => {
                        let name = format!("{path}{}", self.name());
                        let space = Value::Integer(self.byte().into());
                        let place = vec![space, self.value(), self.value()];
                        found.insert(name, Value::Package(place));
                    }
                    0x81 => self.at = self.package_end(),
                    0x82 => self.scope(path, found),
                    other => panic!("5b {other:#x}"),
                },
                other => panic!("term {other:#x} at {:#x}", self.at),
            }
        }
        assert_eq!(self.at, end);
    }

    fn scope(&mut self, path: &str, found: &mut BTreeMap<String, Value>) {
        let end = self.package_end();
        let path = format!("{path}{}.", self.name());
        self.terms(end, &path, found);
    }
}

fn names(dsdt: &[u8]) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    let mut aml = Aml {
        bytes: dsdt,
        at: 36,
    };
    aml.terms(dsdt.len(), "", &mut found);
    found
}

/// The descriptors of a resource template, by tag (ACPI 6.5, section 6.4).
fn resources(value: &Value) -> Vec<(u8, Vec<u8>)> {
    let Value::Buffer(bytes) = value else {
        panic!("{value:?}")
    };
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        let tag = bytes[at];
        let (tag, start, length) = match tag & 0x80 {
            0 => (tag & 0x78, at + 1, usize::from(tag & 0x7)),
            _ => (
                tag,
                at + 3,
                usize::from(u16::from_le_bytes([bytes[at + 1], bytes[at + 2]])),
            ),
        };
        at = start + length;
        if tag == 0x78 {
            assert_eq!(at, bytes.len());
            return found;
        }
        found.push((tag, bytes[start..at].to_vec()));
    }
}

/// An EISA ID as its 32 bits.
fn eisa(value: &Value) -> String {
    let Value::Integer(id) = value else {
        panic!("{value:?}")
    };
    let id = (*id as u32).swap_bytes();
    let letter = |shift: u32| char::from(0x40 + (id >> shift & 0x1f) as u8);
    format!(
        "{}{}{}{:04X}",
        letter(26),
        letter(21),
        letter(16),
        id & 0xffff
    )
}

#[test]
fn the_dsdt_has_the_machines_devices() {
    let dsdt = walk(&machine(2, 1, Transport::Pci).tables)["DSDT"].clone();
    let names = names(&dsdt);
    let hid = |device: &str| eisa(&names[&format!("_SB_.{device}._HID")]);
    assert_eq!(hid("PCI0"), "PNP0A08");
    assert_eq!(hid("MBRD"), "PNP0C02");
    assert_eq!(hid("COM1"), "PNP0501");
    assert_eq!(hid("RTC_"), "PNP0B00");
    assert_eq!(hid("PWRB"), "PNP0C0C");
    assert_eq!(names["_SB_.GED_._HID"], Value::Text("ACPI0013".into()));
    let Value::Package(s5) = &names["_S5_"] else {
        panic!()
    };
    assert_eq!(s5[0], Value::Integer(acpi_power::SLEEP_TYPE_S5.into()));

    let port = layout::ACPI_POWER.base + acpi_power::GED_EVENT;
    let region = [Value::Integer(1), Value::Integer(port), Value::Integer(1)];
    assert_eq!(names["_SB_.GED_.EVTR"], Value::Package(region.to_vec()));
    assert!(matches!(names["_SB_.GED_._EVT"], Value::Method(_)));
    // Consumer, edge, active high, exclusive, one interrupt.
    let interrupt = resources(&names["_SB_.GED_._CRS"]);
    assert_eq!(
        interrupt,
        [(0x89, vec![0x3, 1, layout::ACPI_GSI as u8, 0, 0, 0])]
    );
    let com1 = resources(&names["_SB_.COM1._CRS"]);
    assert_eq!(com1[0], (0x40, vec![1, 0xf8, 0x03, 0xf8, 0x03, 1, 8]));
    assert_eq!(
        com1[1],
        (0x89, vec![0x3, 1, layout::COM1_GSI as u8, 0, 0, 0])
    );

    let ecam = resources(&names["_SB_.MBRD._CRS"]).pop().unwrap();
    assert_eq!(ecam.0, 0x86);
    assert_eq!(u64::from(le32(&ecam.1, 1)), layout::PCI_ECAM.base);
    assert_eq!(u64::from(le32(&ecam.1, 5)), layout::PCI_ECAM.size);
}

#[test]
fn the_pci_root_has_the_plans_windows_and_wires() {
    let machine = machine(1, 1, Transport::Pci);
    let names = names(&walk(&machine.tables)["DSDT"]);
    let pci = machine.plan.pci.as_ref().unwrap();
    let windows = resources(&names["_SB_.PCI0._CRS"]);
    let window32 = &windows.iter().find(|(tag, _)| *tag == 0x87).unwrap().1;
    assert_eq!(u64::from(le32(window32, 7)), pci.mmio32.range.base);
    assert_eq!(u64::from(le32(window32, 19)), pci.mmio32.range.size);
    let window64 = &windows.iter().find(|(tag, _)| *tag == 0x8a).unwrap().1;
    assert_eq!(le64(window64, 11), pci.mmio64.range.base);
    assert_eq!(le64(window64, 19), pci.mmio64.range.end() - 1);
    assert_eq!(le64(window64, 35), pci.mmio64.range.size);

    let Value::Package(routes) = &names["_SB_.PCI0._PRT"] else {
        panic!()
    };
    assert_eq!(routes.len(), 128);
    for route in routes {
        let Value::Package(route) = route else {
            panic!()
        };
        let [
            Value::Integer(address),
            Value::Integer(pin),
            source,
            Value::Integer(gsi),
        ] = &route[..]
        else {
            panic!("{route:?}")
        };
        assert_eq!(address & 0xffff, 0xffff);
        assert_eq!(*source, Value::Integer(0));
        let wire = intx((address >> 16) as u8, *pin as u8 + 1);
        assert_eq!(*gsi, u64::from(pci.intx[wire]));
    }
}

fn intx(slot: u8, pin: u8) -> usize {
    crossvisor_devices::pci::intx_gsi_index(slot, pin).into()
}

#[test]
fn virtio_mmio_devices_are_where_the_plan_has_them() {
    let machine = machine(1, 16, Transport::Mmio);
    let names = names(&walk(&machine.tables)["DSDT"]);
    assert!(!names.contains_key("_SB_.PCI0._HID"));
    assert_eq!(machine.plan.devices.len(), 17);
    for (number, device) in machine.plan.devices.iter().enumerate() {
        let crossvisor_vmm::plan::Slot::Mmio { range, gsi } = device.slot else {
            panic!()
        };
        let path = format!("_SB_.VR{number:02X}");
        assert_eq!(
            names[&format!("{path}._HID")],
            Value::Text("LNRO0005".into())
        );
        assert_eq!(
            names[&format!("{path}._UID")],
            Value::Integer(number as u64)
        );
        let resources = resources(&names[&format!("{path}._CRS")]);
        assert_eq!(u64::from(le32(&resources[0].1, 1)), range.base);
        assert_eq!(u64::from(le32(&resources[0].1, 5)), range.size);
        assert_eq!(le32(&resources[1].1, 2), gsi);
    }
}

/// ACPICA's own compiler reads the tables and finds nothing wrong, where it is
/// installed; the other tests do without.
#[test]
fn iasl_reads_the_tables() {
    if Command::new("iasl").arg("-v").output().is_err() {
        return;
    }
    for (cpus, disks, transport) in [(4, 1, Transport::Pci), (1, 16, Transport::Mmio)] {
        let folder = tempfile::tempdir().unwrap();
        let iasl = |arguments: &[&str]| {
            let output = Command::new("iasl")
                .current_dir(folder.path())
                .args(arguments)
                .output()
                .unwrap();
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "iasl {arguments:?}: {text}");
            text
        };
        for table in &machine(cpus, disks, transport).tables {
            std::fs::write(folder.path().join(table.name), &table.bytes).unwrap();
            if table.name == "rsdp.dat" {
                continue;
            }
            let text = iasl(&["-d", table.name]);
            assert!(
                !text.contains("Error") && !text.contains("invalid"),
                "{text}"
            );
            if table.name == "dsdt.aml" {
                let text = iasl(&["-p", "again", "dsdt.dsl"]);
                assert!(text.contains(" 0 Errors, 0 Warnings"), "{text}");
            }
        }
    }
}
