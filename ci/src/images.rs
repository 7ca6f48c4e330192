//! Other forms of a packaged kernel: for the tests of each boot format, and for
//! those whom decompressing it takes too long.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;

use crate::cache::{Cache, progress};
use crate::error::{AtPath, Error, Result};
use crate::kernels::Kernel;
use crate::stored;

/// The most that a kernel may decompress to, in bytes.
const LIMIT: u64 = 512 << 20;
/// Size of the header that [`zboot`] writes, in bytes.
const ZBOOT_HEADER: u32 = 64;
/// What stands in an arm64 PE image at 0x38 (Linux `include/linux/pe.h`,
/// `LINUX_PE_MAGIC`).
const LINUX_PE_MAGIC: u32 = 0x8182_23cd;

/// Makes an image of one format of a packaged one.
type Convert = fn(&[u8]) -> Result<Vec<u8>>;

/// How a packaged kernel becomes one of `format`; `None` for those that Debian
/// has in packages.
pub fn conversion(format: &str) -> Option<Convert> {
    match format {
        "elf" => Some(vmlinux),
        "gzip" | "vmlinux-gzip" => Some(gzip),
        "zboot" => Some(zboot),
        stored::FORMAT => Some(stored::stored),
        _ => None,
    }
}

/// The file of a kernel in `format`; the packaged image where that is of this
/// format.
///
/// # Errors
///
/// When it can't be converted, read or written.
pub fn file(cache: &Cache, kernel: &Kernel, format: &str) -> Result<PathBuf> {
    let Some(convert) = conversion(format) else {
        return Ok(kernel.image.clone());
    };
    let folder = cache.folder("images")?;
    let _lock = cache.lock("images")?;
    let file = folder.join(format!("{}.{format}", kernel.release));
    if !file.exists() {
        progress(&format!("making {format} of kernel {}", kernel.release));
        let image = fs::read(&kernel.image).at(&kernel.image)?;
        let partial = file.with_extension("partial");
        fs::write(&partial, convert(&image)?).at(&partial)?;
        fs::rename(&partial, &file).at(&file)?;
    }
    Ok(file)
}

/// The ELF `vmlinux` in an x86 bzImage: its payload, decompressed (Linux
/// `Documentation/arch/x86/boot.rst`, `payload_offset` and `payload_length`).
///
/// # Errors
///
/// When it is no bzImage of protocol 2.08 or later, or is compressed in
/// a way that the lab can't read.
pub fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>> {
    let broken = || Error::said("not a bzImage with a payload (boot protocol 2.08 or later)");
    if bzimage.get(0x202..0x206) != Some(b"HdrS") {
        return Err(broken());
    }
    let setup_sectors = match bzimage.get(0x1f1) {
        Some(0) => 4,
        Some(&n) => usize::from(n),
        None => return Err(broken()),
    };
    let offset = le32(bzimage, 0x248).ok_or_else(broken)?;
    let length = le32(bzimage, 0x24c).ok_or_else(broken)?;
    let start = (setup_sectors + 1) * 512 + offset;
    let payload = start
        .checked_add(length)
        .and_then(|end| bzimage.get(start..end))
        .ok_or_else(broken)?;
    let elf = decompress(payload)?;
    if elf.starts_with(b"\x7fELF") {
        Ok(elf)
    } else {
        Err(Error::said("the bzImage's payload is not an ELF file"))
    }
}

/// `image`, compressed as `Image.gz` is.
///
/// # Errors
///
/// When it can't be compressed.
pub fn gzip(image: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder
        .write_all(image)
        .and_then(|()| encoder.finish())
        .map_err(|error| Error::said(format!("gzip: {error}")))
}

/// `image` in an EFI zboot wrapper as boot loaders read it: the header of Linux
/// `drivers/firmware/efi/libstub/zboot-header.S`, and the payload in gzip. It
/// holds no EFI program.
///
/// # Errors
///
/// When it can't be compressed.
pub fn zboot(image: &[u8]) -> Result<Vec<u8>> {
    let payload = gzip(image)?;
    let length = u32::try_from(payload.len())
        .map_err(|_| Error::said("the kernel is too large for an EFI zboot image"))?;
    let mut wrapped = Vec::with_capacity(payload.len() + ZBOOT_HEADER as usize);
    wrapped.extend_from_slice(b"MZ\0\0zimg");
    wrapped.extend_from_slice(&ZBOOT_HEADER.to_le_bytes());
    wrapped.extend_from_slice(&length.to_le_bytes());
    wrapped.extend_from_slice(&[0; 8]);
    wrapped.extend_from_slice(b"gzip");
    wrapped.resize(0x38, 0);
    wrapped.extend_from_slice(&LINUX_PE_MAGIC.to_le_bytes());
    wrapped.extend_from_slice(&ZBOOT_HEADER.to_le_bytes());
    wrapped.extend_from_slice(&payload);
    Ok(wrapped)
}

fn le32(bytes: &[u8], at: usize) -> Option<usize> {
    let field: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(field)).ok()
}

/// Decompresses a kernel's payload, whose first bytes tell how it is packed.
pub fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let mut reader: Box<dyn Read + '_> = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(
            ruzstd::decoding::StreamingDecoder::new(payload)
                .map_err(|error| Error::said(format!("zstd: {error}")))?,
        ),
        [0x1f, 0x8b, ..] => Box::new(GzDecoder::new(payload)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            Box::new(lzma_rust2::XzReader::new(payload, false))
        }
        _ => {
            return Err(Error::said(
                "the kernel's payload is in none of zstd, gzip and xz",
            ));
        }
    };
    let mut image = Vec::new();
    reader
        .by_ref()
        .take(LIMIT)
        .read_to_end(&mut image)
        .map_err(|error| Error::said(format!("the kernel's payload: {error}")))?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * 512];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(&[0xcc; 16]);
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn the_elf_file_of_a_bzimage() {
        // As the kernel's build does, the size follows the gzip stream.
        let mut payload = gzip(b"\x7fELF and so on").unwrap();
        payload.extend_from_slice(&15u32.to_le_bytes());
        assert_eq!(vmlinux(&bzimage(&payload)).unwrap(), b"\x7fELF and so on");
    }

    #[test]
    fn broken_bzimages_are_refused() {
        let good = bzimage(&gzip(b"\x7fELF and so on").unwrap());
        assert!(vmlinux(b"").is_err());
        assert!(vmlinux(&good[..good.len() - 1]).is_err());
        assert!(vmlinux(&bzimage(b"unpacked")).is_err());
        assert!(vmlinux(&bzimage(&gzip(b"no elf").unwrap())).is_err());
    }

    #[test]
    fn a_zboot_image_holds_the_image() {
        let wrapped = zboot(b"an image").unwrap();
        assert_eq!(wrapped.get(4..8), Some(&b"zimg"[..]));
        let (offset, length) = (le32(&wrapped, 8).unwrap(), le32(&wrapped, 12).unwrap());
        assert_eq!(wrapped.len(), offset + length);
        assert_eq!(decompress(&wrapped[offset..]).unwrap(), b"an image");
    }
}
