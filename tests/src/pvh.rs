//! A guest of a few instructions, for what no stock kernel can show: an ELF
//! with a PVH entry point (xen/include/public/arch-x86/hvm/start_info.h) that
//! sends the memory map it is given to the first serial port and powers off.

use std::collections::BTreeMap;

use crate::check::{At, Result, contains, equal, fail};
use crate::lab::{Lab, text};

/// Where it is loaded and entered.
const ADDRESS: u32 = 0x10_0000;
/// The first serial port's data and line status registers.
const COM1: u16 = 0x3f8;
const COM1_LINE_STATUS: u16 = 0x3fd;
/// How often it reads the line status, by one string instruction.
const STATUS_READS: u8 = 4;
/// The line status of a port with nothing to do.
const IDLE: u8 = 0x60;
/// SLP_TYP of S5 with SLP_EN, for ACPI's sleep control register.
const SOFT_OFF: u8 = 5 << 2 | 1 << 5;
/// Size of `hvm_memmap_table_entry`.
const ENTRY: usize = 24;
/// XEN_HVM_MEMMAP_TYPE_RAM.
const RAM: u32 = 1;

/// Boots it with `memory`; the pieces of RAM that it was told of, as address
/// and size in bytes.
pub fn ram(lab: &Lab, memory: &str) -> Result<Vec<(u64, u64)>> {
    let plan = lab
        .crossvisor(&["plan", "--json"])
        .output()?
        .succeeds()?
        .parse::<serde_json::Value>()
        .at("the plan")?;
    let port = plan
        .get("regions")
        .and_then(|regions| regions.as_array())
        .and_then(|regions| regions.iter().find(|r| r["name"] == "ACPI power"))
        .and_then(|region| region["range"]["base"].as_u64())
        .and_then(|base| u16::try_from(base).ok());
    let Some(port) = port else {
        return fail("the plan has no port for ACPI's sleep control");
    };
    let kernel = lab.file("pvh.elf", &elf(&code(port)))?;
    let out = lab
        .crossvisor(&["run", &text(&kernel), "--memory", memory])
        .output()?;
    out.succeeds()?;
    contains("stderr", &out.errors(), "no modules for")?;
    let Some((status, map)) = out.stdout.split_at_checked(usize::from(STATUS_READS)) else {
        return fail("it said nothing");
    };
    equal("the line status, read by a string", status, &[IDLE; 4][..])?;
    let mut pieces = BTreeMap::new();
    for entry in map.chunks(ENTRY) {
        let Some((number, kind)) = fields(entry) else {
            return fail("the memory map is not whole");
        };
        if kind == RAM {
            pieces.insert(number.0, number.1);
        }
    }
    Ok(pieces.into_iter().collect())
}

/// Address and size, and the type, of an entry of the memory map.
fn fields(entry: &[u8]) -> Option<((u64, u64), u32)> {
    let u64_at = |at: usize| {
        let bytes = entry.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let kind = u32::from_le_bytes(entry.get(16..20)?.try_into().ok()?);
    Some(((u64_at(0)?, u64_at(8)?), kind))
}

/// Its instructions, in 32-bit protected mode with flat segments. EBX points
/// to `hvm_start_info`.
fn code(sleep_control: u16) -> Vec<u8> {
    let mut code = Vec::new();
    let mut put = |bytes: &[&[u8]]| bytes.iter().for_each(|part| code.extend_from_slice(part));
    put(&[
        &[0xfc], // cld
        &[0xbf], // mov edi, ADDRESS + 4 KiB
        &(ADDRESS + 4096).to_le_bytes(),
        &[0x89, 0xfe],                  // mov esi, edi
        &[0xb9, STATUS_READS, 0, 0, 0], // mov ecx, STATUS_READS
        &[0x66, 0xba],                  // mov dx, COM1_LINE_STATUS
        &COM1_LINE_STATUS.to_le_bytes(),
        &[0xf3, 0x6c], // rep insb
        &[0x66, 0xba], // mov dx, COM1
        &COM1.to_le_bytes(),
        &[0xb9, STATUS_READS, 0, 0, 0], // mov ecx, STATUS_READS
        &[0xf3, 0x6e],                  // rep outsb
        &[0x8b, 0x73, 40],              // mov esi, [ebx + 40]: memmap_paddr
        &[0x6b, 0x4b, 48, ENTRY as u8], // imul ecx, [ebx + 48], ENTRY
        &[0xf3, 0x6e],                  // rep outsb
        &[0x66, 0xba],                  // mov dx, sleep_control
        &sleep_control.to_le_bytes(),
        &[0xb0, SOFT_OFF],   // mov al, SOFT_OFF
        &[0xee],             // out dx, al
        &[0xf4, 0xeb, 0xfd], // hlt; jmp to it
    ]);
    code
}

/// An ELF of one segment with `code`, and with the note that names its entry
/// point (XEN_ELFNOTE_PHYS32_ENTRY).
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    const NOTE: u64 = 20;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let code_at = note_at + NOTE;
    let mut file = Vec::new();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    // 64-bit, little-endian, an executable for x86-64.
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    put(&u64::from(ADDRESS).to_le_bytes());
    put(&HEADER.to_le_bytes());
    put(&[0; 12]);
    put(&[
        HEADER as u8,
        0,
        PROGRAM_HEADER as u8,
        0,
        2,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]);
    let mut segment = |kind: u32, at: u64, address: u64, size: u64, in_memory: u64| {
        put(&kind.to_le_bytes());
        put(&7u32.to_le_bytes());
        for field in [at, address, address, size, in_memory, 4] {
            put(&field.to_le_bytes());
        }
    };
    // PT_LOAD, with room for what it reads, and PT_NOTE.
    segment(1, code_at, ADDRESS.into(), code.len() as u64, 8192);
    segment(4, note_at, 0, NOTE, NOTE);
    for word in [4u32, 4, 18] {
        put(&word.to_le_bytes());
    }
    put(b"Xen\0");
    put(&ADDRESS.to_le_bytes());
    put(code);
    file
}
