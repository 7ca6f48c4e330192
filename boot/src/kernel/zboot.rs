//! EFI zboot: a compressed kernel in an EFI executable that decompresses it
//! (drivers/firmware/efi/libstub/zboot-header.S, include/linux/pe.h).

use super::Reason;
use super::fields::le32;
use crate::compress::Compression;

const FORMAT: &str = "EFI zboot image";

const MAGIC: usize = 4;
const PAYLOAD_OFFSET: usize = 8;
const PAYLOAD_SIZE: usize = 12;
const COMPRESSION: usize = 24;
const COMPRESSION_MAX: usize = 32;

/// Where the payload of an EFI zboot image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Zboot {
    pub offset: u64,
    pub len: u64,
    pub compression: Compression,
}

pub(super) fn is_zboot(start: &[u8]) -> bool {
    start.starts_with(b"MZ") && start.get(MAGIC..MAGIC + 4) == Some(b"zimg")
}

pub(super) fn parse(start: &[u8], len: u64) -> Result<Option<Zboot>, Reason> {
    if !is_zboot(start) {
        return Ok(None);
    }
    let truncated = |what: String| Reason::Truncated {
        format: FORMAT,
        what,
    };
    let cut = || truncated(format!("{len} bytes do not hold its header"));
    let offset = u64::from(le32(start, PAYLOAD_OFFSET).ok_or_else(cut)?);
    let size = u64::from(le32(start, PAYLOAD_SIZE).ok_or_else(cut)?);
    let name = start
        .get(COMPRESSION..COMPRESSION + COMPRESSION_MAX)
        .ok_or_else(cut)?;
    let name = name.split(|&b| b == 0).next().unwrap_or_default();
    if offset < (COMPRESSION + COMPRESSION_MAX) as u64 || size == 0 {
        return Err(Reason::Damaged {
            format: FORMAT,
            what: format!("payload of {size:#x} bytes at {offset:#x}"),
        });
    }
    if offset + size > len {
        return Err(truncated(format!(
            "payload of {size:#x} bytes at {offset:#x}, but the file has {len:#x}"
        )));
    }
    let compression = match name {
        b"gzip" => Compression::Gzip,
        b"zstd" | b"zstd22" => Compression::Zstd,
        b"xz" | b"xzkern" => Compression::Xz,
        b"lzma" => Compression::Lzma,
        b"lz4" => Compression::Lz4,
        b"lzo" => Compression::Lzo,
        _ => {
            return Err(Reason::Unsupported(format!(
                "EFI zboot image with {:?} compression: gzip, zstd and xz are known",
                String::from_utf8_lossy(name)
            )));
        }
    };
    Ok(Some(Zboot {
        offset,
        len: size,
        compression,
    }))
}
