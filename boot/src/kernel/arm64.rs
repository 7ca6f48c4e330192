//! arm64 `Image` (Documentation/arch/arm64/booting.rst, "Call the kernel image").

use super::fields::le64;
use super::{Reason, pe};

const FORMAT: &str = "arm64 Image";

const TEXT_OFFSET: usize = 8;
const IMAGE_SIZE: usize = 16;
const FLAGS: usize = 24;
const MAGIC: usize = 56;

/// Kernels before 3.17 have no `image_size`, and this `text_offset`.
const OLD_TEXT_OFFSET: u64 = 0x8_0000;

/// The header of an arm64 `Image`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arm64Image {
    /// Offset from a 2 MiB aligned base to where the image goes, in bytes.
    pub text_offset: u64,
    /// Effective size with bss in bytes; 0 when the kernel is too old to tell.
    pub image_size: u64,
    /// Whether the kernel is big-endian.
    pub big_endian: bool,
    /// The kernel's page size.
    pub page_size: PageSize,
    /// Whether the 2 MiB aligned base may be anywhere in memory; otherwise it
    /// should be as near as possible to the beginning of memory.
    pub anywhere: bool,
}

/// The page size that an arm64 kernel says it was built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// Not told.
    Unknown,
    /// 4 KiB.
    K4,
    /// 16 KiB.
    K16,
    /// 64 KiB.
    K64,
}

impl Arm64Image {
    /// What its base address must be a multiple of, in bytes.
    pub const ALIGNMENT: u64 = 2 << 20;

    pub(super) fn footprint(&self, file: u64) -> u64 {
        self.image_size.max(file)
    }
}

pub(super) fn is_arm64(start: &[u8]) -> bool {
    start.get(MAGIC..MAGIC + 4) == Some(b"ARM\x64")
}

pub(super) fn parse(start: &[u8], len: u64) -> Result<Arm64Image, Reason> {
    let cut = || Reason::Truncated {
        format: FORMAT,
        what: format!("{len} bytes do not hold its header"),
    };
    // The header is 64 bytes.
    if start.len() < 64 {
        return Err(cut());
    }
    let text_offset = le64(start, TEXT_OFFSET).ok_or_else(cut)?;
    let image_size = le64(start, IMAGE_SIZE).ok_or_else(cut)?;
    let flags = le64(start, FLAGS).ok_or_else(cut)?;
    let old = image_size == 0;
    let damaged = |what: String| Reason::Damaged {
        format: FORMAT,
        what,
    };
    // 48 bits are the least physical address space that arm64 Linux knows of.
    if image_size > 1 << 40 {
        return Err(damaged(format!(
            "image_size {image_size:#x} is beyond reason"
        )));
    }
    if !old && text_offset >= Arm64Image::ALIGNMENT {
        return Err(damaged(format!(
            "text_offset {text_offset:#x} is not below 2 MiB"
        )));
    }
    pe::check_whole(FORMAT, start, len)?;
    Ok(Arm64Image {
        text_offset: if old { OLD_TEXT_OFFSET } else { text_offset },
        image_size,
        big_endian: flags & 1 != 0,
        page_size: match flags >> 1 & 3 {
            1 => PageSize::K4,
            2 => PageSize::K16,
            3 => PageSize::K64,
            _ => PageSize::Unknown,
        },
        anywhere: flags & 8 != 0,
    })
}
