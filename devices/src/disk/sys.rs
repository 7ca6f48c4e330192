//! The host's calls for disks that the standard library does not have.
#![allow(unsafe_code)]

use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::FallocateFlags;

use super::{Geometry, SECTOR};

// linux/fs.h; the encoding of the direction differs by architecture, which
// libc's functions know.
const BLKGETSIZE64: libc::Ioctl = libc::_IOR::<usize>(0x12, 114);
const BLKDISCARD: libc::Ioctl = libc::_IO(0x12, 119);
const BLKZEROOUT: libc::Ioctl = libc::_IO(0x12, 127);

/// Size of a block device in bytes.
pub(super) fn device_size(device: BorrowedFd<'_>) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes a u64 to where the pointer leads.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Block sizes of a block device; what it does not tell is as for a file.
pub(super) fn device_geometry(device: BorrowedFd<'_>) -> Geometry {
    let ask = |request| {
        let mut value: libc::c_uint = 0;
        // SAFETY: the three requests below write an int to where the pointer leads.
        check(unsafe { libc::ioctl(device.as_raw_fd(), request, &raw mut value) })
            .ok()
            .map(|()| value)
    };
    let valid = |size: &u32| size.is_power_of_two() && u64::from(*size) >= SECTOR;
    let default = Geometry::of_file();
    Geometry {
        logical_block: ask(libc::BLKSSZGET)
            .filter(valid)
            .unwrap_or(default.logical_block),
        physical_block: ask(libc::BLKPBSZGET)
            .filter(valid)
            .unwrap_or(default.physical_block),
        optimal_io: ask(libc::BLKIOOPT).unwrap_or(0),
    }
}

/// Whether the block device that `metadata` describes takes discards, by what
/// sysfs says; when it says nothing, a discard is tried.
pub(super) fn device_discards(metadata: &Metadata) -> bool {
    let device = metadata.rdev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let base = format!("/sys/dev/block/{major}:{minor}");
    // A partition's queue is its disk's.
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| fs::read_to_string(format!("{base}/{queue}/discard_max_bytes")).ok())
        .is_none_or(|limit| limit.trim() != "0")
}

/// Discards a range of a block device.
pub(super) fn device_discard(device: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 from where the pointer leads.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) })
}

/// Writes zeroes to a range of a block device, by the device's own means if it
/// has any.
pub(super) fn device_zero(device: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKZEROOUT reads two u64 from where the pointer leads.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLKZEROOUT, range.as_ptr()) })
}

/// Turns a range of a file into a hole, which reads as zeroes.
pub(super) fn punch_hole(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, offset, len)?)
}

/// Zeroes a range of a file and keeps its storage.
pub(super) fn zero_range(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, offset, len)?)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
