//! riscv `Image` (Documentation/arch/riscv/boot-image-header.rst).

use super::fields::{le32, le64};
use super::{Reason, pe};

const FORMAT: &str = "riscv Image";

const TEXT_OFFSET: usize = 8;
const IMAGE_SIZE: usize = 16;
const FLAGS: usize = 24;
const VERSION: usize = 32;
const MAGIC2: usize = 56;

/// The header of a riscv `Image`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RiscvImage {
    /// Offset from the beginning of memory to where the image goes, in bytes
    /// (2 MiB for rv64).
    pub text_offset: u64,
    /// Effective size with bss in bytes.
    pub image_size: u64,
    /// Header version: major in the upper, minor in the lower 16 bits.
    pub version: u32,
}

impl RiscvImage {
    /// What its address must be a multiple of, in bytes (one PMD of rv64).
    pub const ALIGNMENT: u64 = 2 << 20;

    pub(super) fn footprint(&self, file: u64) -> u64 {
        self.image_size.max(file)
    }
}

pub(super) fn is_riscv(start: &[u8]) -> bool {
    start.get(MAGIC2..MAGIC2 + 4) == Some(b"RSC\x05")
}

pub(super) fn parse(start: &[u8], len: u64) -> Result<RiscvImage, Reason> {
    let cut = || Reason::Truncated {
        format: FORMAT,
        what: format!("{len} bytes do not hold its header"),
    };
    if start.len() < 64 {
        return Err(cut());
    }
    let text_offset = le64(start, TEXT_OFFSET).ok_or_else(cut)?;
    let image_size = le64(start, IMAGE_SIZE).ok_or_else(cut)?;
    let flags = le64(start, FLAGS).ok_or_else(cut)?;
    let damaged = |what: String| Reason::Damaged {
        format: FORMAT,
        what,
    };
    if image_size > 1 << 40 {
        return Err(damaged(format!(
            "image_size {image_size:#x} is beyond reason"
        )));
    }
    if text_offset > 1 << 30 {
        return Err(damaged(format!(
            "text_offset {text_offset:#x} is beyond reason"
        )));
    }
    if flags & 1 != 0 {
        return Err(Reason::Unsupported("big-endian riscv Image".to_owned()));
    }
    pe::check_whole(FORMAT, start, len)?;
    Ok(RiscvImage {
        text_offset,
        image_size,
        version: le32(start, VERSION).ok_or_else(cut)?,
    })
}
