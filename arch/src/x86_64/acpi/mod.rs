//! ACPI tables (ACPI specification 6.5): a hardware-reduced machine.
//!
//! Hardware-reduced, because Linux then takes the machine for what it is: it
//! looks for no 8259 and no 8254, waits for no timer to tick through them, and
//! has no SCI and no PM timer to set up (`acpi_generic_reduced_hw_init`). What
//! such a kernel then needs it has here: the TSC's frequency from kvmclock, and
//! a local APIC timer in TSC deadline mode, or else calibrated by the TSC.
//! Power-off, reset and the power button are the register block of
//! [`acpi_power`](crossvisor_devices::acpi_power).

mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use crossvisor_devices::acpi_power;
use crossvisor_devices::pci::ECAM_BUS_SIZE;
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::Plan;

use super::layout;

const OEM_ID: [u8; 6] = *b"XVISOR";
const OEM_TABLE_ID: [u8; 8] = *b"XVISOR64";
const OEM_REVISION: u32 = 1;

/// FADT, IAPC_BOOT_ARCH (section 5.2.9.3): there is no VGA to probe. The 8042's
/// bit stays off, and the clock's "not present" bit too.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// The CMOS register of the century.
const CMOS_CENTURY: u8 = 0x32;

/// Bytes of the header that all tables but the RSDP have.
const SDT_HEADER: usize = 36;

/// What tables are aligned to, in bytes.
const ALIGNMENT: usize = 16;

/// A table and where it goes.
#[derive(Clone, Debug)]
pub struct Table {
    /// File name.
    pub name: &'static str,
    /// Guest-physical address.
    pub address: u64,
    /// Contents.
    pub bytes: Vec<u8>,
}

/// All tables of a machine; the first is the RSDP.
///
/// # Errors
/// They do not fit in their place.
pub fn tables(plan: &Plan) -> Result<Vec<Table>> {
    let mut placer = Placer(layout::ACPI.base);
    let rsdp_address = placer.place(Rsdp::len())?;

    let mut tables = Vec::new();
    let mut add = |name, bytes: Vec<u8>| {
        let address = placer.place(bytes.len())?;
        tables.push(Table {
            name,
            address,
            bytes,
        });
        Ok::<u64, Error>(address)
    };
    let dsdt = add("dsdt.aml", dsdt::table(plan))?;
    let mut entries = vec![
        add("facp.dat", fadt(dsdt))?,
        add("apic.dat", madt(plan.cpus))?,
    ];
    if let Some(ecam) = plan.pci.as_ref().and_then(|pci| pci.ecam) {
        entries.push(add("mcfg.dat", mcfg(ecam.base, ecam.size))?);
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = add("xsdt.dat", bytes(&xsdt))?;
    let rsdp = Table {
        name: "rsdp.dat",
        address: rsdp_address,
        bytes: bytes(&Rsdp::new(OEM_ID, xsdt)),
    };
    tables.insert(0, rsdp);
    Ok(tables)
}

/// Hands out the tables' place from below.
struct Placer(u64);

impl Placer {
    fn place(&mut self, len: usize) -> Result<u64> {
        let address = self.0;
        self.0 += len.next_multiple_of(ALIGNMENT) as u64;
        match self.0 <= layout::ACPI.end() {
            true => Ok(address),
            false => Err(Error::Boot(
                "internal error: the ACPI tables do not fit".into(),
            )),
        }
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A table of `body` behind the header that all have (section 5.2.6).
fn sdt(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    // Its length is given at once: what acpi_tables appends to a table it adds to
    // the length in the byte order of this machine.
    let length = (SDT_HEADER + body.len()) as u32;
    let mut sdt = Sdt::new(
        *signature,
        length,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    sdt.write_bytes(SDT_HEADER, body);
    sdt.as_slice().to_vec()
}

/// Fixed ACPI Description Table (section 5.2.9).
fn fadt(dsdt: u64) -> Vec<u8> {
    let register = |offset: u64| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            layout::ACPI_POWER.base + offset,
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // No buttons in fixed registers: the power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.century = CMOS_CENTURY;
    fadt.reset_reg = register(acpi_power::RESET);
    fadt.reset_value = acpi_power::RESET_VALUE;
    fadt.sleep_control_reg = register(acpi_power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(acpi_power::SLEEP_STATUS);
    bytes(&fadt.finalize())
}

/// Multiple APIC Description Table (section 5.2.12): a local APIC for each
/// vCPU, whose ID is the vCPU's number, and one I/O APIC whose pins are the
/// GSIs. No 8259s (PCAT_COMPAT is off), so nothing is overridden.
fn madt(cpus: u32) -> Vec<u8> {
    let mut body: Vec<u8> = Vec::new();
    body.dword(layout::LOCAL_APIC.base as u32);
    body.dword(0);
    for cpu in 0..cpus {
        // Processor Local APIC (5.2.12.2): UID, APIC ID, enabled. The plan
        // keeps IDs below 255.
        body.vec(&[0, 8, cpu as u8, cpu as u8]);
        body.dword(1);
    }
    // I/O APIC (5.2.12.3): ID, reserved, address, first GSI.
    body.vec(&[1, 12, 0, 0]);
    body.dword(layout::IOAPIC.base as u32);
    body.dword(0);
    // Local APIC NMI (5.2.12.7): all processors, bus's polarity, LINT1.
    body.vec(&[4, 6, 0xff, 0, 0, 1]);
    sdt(b"APIC", 5, &body)
}

/// PCI Express memory mapped configuration table (PCI Firmware Specification
/// 3.3, section 4.1.2).
fn mcfg(base: u64, size: u64) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(base, 0, 0, last_bus(size));
    bytes(&mcfg)
}

/// The last bus that `size` bytes of configuration space have room for.
fn last_bus(size: u64) -> u8 {
    let buses = size / ECAM_BUS_SIZE;
    u8::try_from(buses.saturating_sub(1)).unwrap_or(u8::MAX)
}

#[cfg(test)]
#[path = "../acpi_tests.rs"]
mod tests;
