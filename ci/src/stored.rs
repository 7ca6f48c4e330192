//! The packaged kernel of s390x with its payload stored instead of compressed.
//!
//! Debian's is compressed as far as zstd goes (`CONFIG_KERNEL_ZSTD`). Where
//! each instruction is interpreted, decompressing it takes longer than all the
//! rest of the boot. Zstandard has blocks that are plain bytes: with those, the
//! image stays the kernel's own, decompressor and all, and that only copies.
//!
//! The image is the memory from address 0 on: the decompressor, the payload
//! with its size behind it, padding and a trailer (Linux
//! `arch/s390/boot/vmlinux.lds.S`). The addresses of the payload's end, of the
//! image's end and of the end of the heap that follows it are in the
//! decompressor's data, as doublewords.

use crate::error::{Error, Result};
use crate::images::decompress;

/// What the lab calls such a kernel.
pub const FORMAT: &str = "image-stored";

/// Where the decompressor begins.
const DECOMPRESSOR: usize = 0x10000;
/// What the payload's end and the image's are aligned to, and the trailer's size.
const PAGE: usize = 4096;
const TRAILER: usize = 32;
/// The most that the heap may take, in bytes (`BOOT_HEAP_SIZE`).
const HEAP: u64 = 4 << 20;

/// The bytes that a frame begins with (RFC 8878, section 3.1.1).
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// A frame of one segment, whose size has four bytes.
const ONE_SEGMENT: u8 = 2 << 6 | 1 << 5;
/// The largest block, in bytes (section 3.1.1.2.4).
const BLOCK: usize = 128 << 10;

/// `image`, a bzImage of s390x, with its payload stored.
///
/// # Errors
///
/// When it is none with a payload in zstd, or is laid out in another way.
pub fn stored(image: &[u8]) -> Result<Vec<u8>> {
    let broken = || Error::said("not an s390x bzImage as the lab knows them, with zstd");
    if image.get(0x10008..0x1000e) != Some(b"S390EP") {
        return Err(broken());
    }
    let (start, end) = payload(image).ok_or_else(broken)?;
    let packed = image.get(start..end - 4).ok_or_else(broken)?;
    let plain = decompress(packed)?;
    let size = u32::try_from(plain.len()).map_err(|_| broken())?;
    let trailer = image.len().checked_sub(TRAILER).ok_or_else(broken)?;
    let (whole, trailer) = (image.len() as u64, image.get(trailer..).unwrap_or_default());

    let mut made = image.get(..start).unwrap_or_default().to_vec();
    made.extend(frame(&plain, size));
    made.extend(size.to_le_bytes());
    let new_end = made.len() as u64;
    let new_whole = (made.len() + TRAILER).next_multiple_of(PAGE);
    made.resize(new_whole - TRAILER, 0);
    made.extend(trailer);

    let mut ends = (0, 0);
    let decompressor = made.get_mut(DECOMPRESSOR..start).unwrap_or_default();
    for word in decompressor.as_chunks_mut::<8>().0 {
        let value = u64::from_be_bytes(*word);
        if value == end as u64 {
            *word = new_end.to_be_bytes();
            ends.0 += 1;
        } else if (whole..=whole + HEAP).contains(&value) {
            *word = (value - whole + new_whole as u64).to_be_bytes();
            ends.1 += 1;
        }
    }
    // The payload's end; the image's, where the heap begins, and the heap's.
    match ends {
        (1, 2) => Ok(made),
        _ => Err(broken()),
    }
}

/// Where the payload is: a frame whose address is in the decompressor's data,
/// and the last doubleword there that names a place behind it and within the
/// image.
fn payload(image: &[u8]) -> Option<(usize, usize)> {
    let mut at = DECOMPRESSOR;
    loop {
        let rest = image.get(at..)?;
        at += rest.windows(4).position(|bytes| bytes == MAGIC)?;
        let words = || {
            let decompressor = image.get(DECOMPRESSOR..at).unwrap_or_default();
            let words = decompressor.as_chunks::<8>().0;
            words.iter().map(|word| u64::from_be_bytes(*word))
        };
        if words().any(|word| word == at as u64) {
            let within = at as u64 + 8..image.len() as u64;
            let end = words().filter(|word| within.contains(word)).max()?;
            return Some((at, usize::try_from(end).ok()?));
        }
        at += 1;
    }
}

/// `bytes`, of which there are `size`, as a frame of plain blocks.
fn frame(bytes: &[u8], size: u32) -> Vec<u8> {
    let mut frame = Vec::with_capacity(bytes.len() + bytes.len() / BLOCK * 3 + 16);
    frame.extend(MAGIC);
    frame.push(ONE_SEGMENT);
    frame.extend(size.to_le_bytes());
    let mut blocks = bytes.chunks(BLOCK).peekable();
    while let Some(block) = blocks.next() {
        let last = u32::from(blocks.peek().is_none());
        let header = (block.len() as u32) << 3 | last;
        frame.extend(header.to_le_bytes().iter().take(3));
        frame.extend(block);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOT: usize = 0x11000;
    const PAYLOAD: usize = 0x12010;

    fn put(image: &mut [u8], at: usize, value: usize) {
        image[at..at + 8].copy_from_slice(&(value as u64).to_be_bytes());
    }

    fn get(image: &[u8], at: usize) -> usize {
        u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize
    }

    /// An image with `plain` in it, compressed.
    fn image(plain: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let mut image = vec![0; PAYLOAD];
        image[0x10008..0x1000e].copy_from_slice(b"S390EP");
        // What looks like a frame and is none.
        image[0x11800..0x11804].copy_from_slice(&MAGIC);
        image.extend(ruzstd::encoding::compress_to_vec(plain, level));
        image.extend((plain.len() as u32).to_le_bytes());
        let end = image.len();
        image.resize((end + TRAILER).next_multiple_of(PAGE) - 4, 0);
        image.extend(b"zIPL");
        let whole = image.len();
        put(&mut image, GOT, PAYLOAD);
        put(&mut image, GOT + 8, end);
        put(&mut image, GOT + 16, whole + 0x30000);
        put(&mut image, GOT + 24, whole);
        image
    }

    #[test]
    fn the_payload_is_stored_and_found_again() {
        let plain: Vec<u8> = (0..300_000_u32).flat_map(u32::to_be_bytes).collect();
        let made = stored(&image(&plain)).unwrap();
        let end = get(&made, GOT + 8);
        assert_eq!(get(&made, GOT), PAYLOAD);
        assert_eq!(get(&made, GOT + 16), made.len() + 0x30000);
        assert_eq!(get(&made, GOT + 24), made.len());
        assert_eq!(decompress(&made[PAYLOAD..end - 4]).unwrap(), plain);
        assert_eq!(made[end - 4..end], (plain.len() as u32).to_le_bytes());
        assert!(made.len() > plain.len() && made.len().is_multiple_of(PAGE));
        assert!(made.ends_with(b"zIPL"));
    }

    #[test]
    fn other_images_are_refused() {
        let good = image(b"a kernel");
        assert!(stored(b"").is_err());
        assert!(stored(&good[..PAYLOAD + 5]).is_err());
        let mut other = good.clone();
        other[0x10008] = 0;
        assert!(stored(&other).is_err());
        // The heap's end is not where it should be.
        let mut other = good.clone();
        put(&mut other, GOT + 16, 0);
        assert!(stored(&other).is_err());
    }
}
