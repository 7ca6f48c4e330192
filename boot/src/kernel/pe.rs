//! The PE header of kernels that are EFI programs too (Microsoft's PE Format
//! specification; Linux arch/*/kernel/efi-header.S). Their own headers tell the
//! size in memory only, so this is what tells a whole file from a part of one.

use super::Reason;
use super::fields::{le16, le32};

/// Where a file that starts with `MZ` says where its PE header is.
const PE_OFFSET: usize = 0x3c;
/// Size of the signature and the COFF header in bytes.
const HEADERS: usize = 24;
const SECTION_COUNT: usize = 6;
const OPTIONAL_HEADER_SIZE: usize = 20;

/// Size of an entry of the section table in bytes.
const SECTION: usize = 40;
const RAW_SIZE: usize = 16;
const RAW_OFFSET: usize = 20;

/// Checks that a file of `len` bytes that begins with `start` holds all the
/// sections that its PE header tells of, if it has one.
pub(super) fn check_whole(format: &'static str, start: &[u8], len: u64) -> Result<(), Reason> {
    match end_of_sections(start) {
        Some(end) if end > len => Err(Reason::Truncated {
            format,
            what: format!("{len} bytes of {end}"),
        }),
        _ => Ok(()),
    }
}

/// Where in the file the last section ends; `None` without a PE header.
fn end_of_sections(start: &[u8]) -> Option<u64> {
    if !start.starts_with(b"MZ") {
        return None;
    }
    let header = usize::try_from(le32(start, PE_OFFSET)?).ok()?;
    let header = start.get(header..)?;
    if !header.starts_with(b"PE\0\0") {
        return None;
    }
    let count = usize::from(le16(header, SECTION_COUNT)?);
    let optional = usize::from(le16(header, OPTIONAL_HEADER_SIZE)?);
    let sections = header.get(HEADERS.checked_add(optional)?..)?;
    let ends = sections
        .chunks_exact(SECTION)
        .take(count)
        .filter_map(|section| {
            let (offset, size) = (le32(section, RAW_OFFSET)?, le32(section, RAW_SIZE)?);
            Some(u64::from(offset) + u64::from(size))
        });
    ends.max()
}
