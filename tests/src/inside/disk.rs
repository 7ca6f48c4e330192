//! Writes and checks patterns on a disk, and has parts of it zeroed.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use crate::check::{At, Result, fail};
use crate::pattern;

/// How much is written or read at once, in bytes.
const CHUNK: usize = 256 << 10;

/// Writes the pattern of `seed` to `len` bytes at `offset`, and has it flushed.
pub fn write(path: &str, offset: u64, len: u64, seed: u64) -> Result<String> {
    let disk = open(path)?;
    chunks(len, |at, chunk| {
        pattern::fill(seed, at, chunk);
        disk.write_all_at(chunk, offset + at)
            .at(format!("{path}: writing"))
    })?;
    disk.sync_all().at(format!("{path}: flushing"))?;
    Ok(format!("{path}: {len} bytes written\n"))
}

/// Compares `len` bytes at `offset` with the pattern of `seed`.
pub fn check(path: &str, offset: u64, len: u64, seed: u64) -> Result<String> {
    let disk = File::open(path).at(path)?;
    chunks(len, |at, chunk| {
        disk.read_exact_at(chunk, offset + at)
            .at(format!("{path}: reading"))?;
        match pattern::difference(seed, at, chunk) {
            Some(wrong) => fail(format!("{path}: byte {} is wrong", offset + wrong)),
            None => Ok(()),
        }
    })?;
    Ok(format!("{path}: {len} bytes as they should be\n"))
}

/// Has `len` bytes at `offset` zeroed by the device: a block device answers
/// fallocate(2) with write-zeroes requests, which may free the space or not
/// (Linux block/fops.c, `blkdev_fallocate`).
pub fn zero(path: &str, offset: u64, len: u64, free: bool) -> Result<String> {
    let how = match free {
        true => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        false => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
    };
    let disk = open(path)?;
    fallocate(&disk, how, offset, len).at(format!("{path}: zeroing"))?;
    disk.sync_all().at(format!("{path}: flushing"))?;
    Ok(format!("{path}: {len} bytes zeroed\n"))
}

fn open(path: &str) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.at(path)
}

/// Calls `each` for the offsets and buffers of `len` bytes in pieces.
fn chunks(len: u64, mut each: impl FnMut(u64, &mut [u8]) -> Result) -> Result {
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < len {
        let size = usize::try_from(len - at).unwrap_or(CHUNK).min(CHUNK);
        let Some(chunk) = buffer.get_mut(..size) else {
            return fail("internal error: a chunk beyond the buffer");
        };
        each(at, chunk)?;
        at += size as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_found_and_what_is_damaged_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![0xff; 1 << 20]).unwrap();
        let name = path.to_str().unwrap();
        write(name, 4096, 600_000, 5).unwrap();
        check(name, 4096, 600_000, 5).unwrap();
        assert!(check(name, 4096, 600_000, 6).is_err());
        assert!(check(name, 4096, 2 << 20, 5).is_err());
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 1 << 20);
        assert!(bytes[..4096].iter().all(|byte| *byte == 0xff));
        assert_eq!(bytes[4096..604_096], pattern::bytes(5, 600_000));
        assert!(bytes[604_096..].iter().all(|byte| *byte == 0xff));
    }
}
