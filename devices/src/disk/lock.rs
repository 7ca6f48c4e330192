//! Locks against a second virtual machine, by the protocol of QEMU's raw file
//! driver.
//!
//! A machine holds two sets of permissions: what it does to the disk, and what
//! it lets nobody else do. Each is a bit, and each bit of each set a byte of
//! the file, 100 + bit for what it does and 200 + bit for what it does not
//! share; the byte is read-locked while the bit is held. It may start when no
//! other open file has locked the opposite byte of any of its bits. The bytes
//! need not exist in the file, and the locks end with the open file.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const DOES_BASE: i64 = 100;
const DENIES_BASE: i64 = 200;

const CONSISTENT_READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;

/// Why a disk is not ours.
pub(super) enum LockError {
    /// Somebody else holds a lock that conflicts.
    Held {
        held: &'static str,
        hint: &'static str,
    },
    Host(io::Error),
}

/// Locks `file` for a machine that reads it and, unless `read_only`, writes it,
/// while nobody else writes or resizes it.
pub(super) fn acquire(file: &File, read_only: bool) -> Result<(), LockError> {
    let does: &[u8] = if read_only {
        &[CONSISTENT_READ]
    } else {
        &[CONSISTENT_READ, WRITE]
    };
    let denies = [WRITE, RESIZE];
    // First locked, then looked: of two that start at once, one sees the other.
    let ours = does
        .iter()
        .map(|bit| DOES_BASE + i64::from(*bit))
        .chain(denies.iter().map(|bit| DENIES_BASE + i64::from(*bit)));
    for byte in ours {
        if let Err(error) = set(file, byte) {
            return match error.raw_os_error() {
                // File systems without locks, such as some network ones.
                Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                    log::warn!("disk: the file system has no locks; nothing keeps others out");
                    Ok(())
                }
                Some(libc::EAGAIN | libc::EACCES) => Err(LockError::Held {
                    held: "it is locked as a whole",
                    hint: "end the program that has locked it",
                }),
                _ => Err(LockError::Host(error)),
            };
        }
    }
    for bit in denies {
        if held_by_other(file, DOES_BASE + i64::from(bit)).map_err(LockError::Host)? {
            return Err(LockError::Held {
                held: "write lock held",
                hint: "stop that machine, or use a copy or an overlay of the image",
            });
        }
    }
    for bit in does {
        if held_by_other(file, DENIES_BASE + i64::from(*bit)).map_err(LockError::Host)? {
            return Err(LockError::Held {
                held: "it reads the disk and lets nobody write",
                hint: "stop that machine, or open the disk read-only",
            });
        }
    }
    Ok(())
}

fn one_byte(kind: libc::c_int, byte: i64) -> libc::flock {
    // SAFETY: `flock` is made of integers, for which zeroes are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

/// Read-locks `byte` for the open file.
fn set(file: &File, byte: i64) -> io::Result<()> {
    let lock = one_byte(libc::F_RDLCK, byte);
    // SAFETY: F_OFD_SETLK reads the `flock` that the pointer leads to.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether another open file has locked `byte`.
fn held_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = one_byte(libc::F_WRLCK, byte);
    // SAFETY: F_OFD_GETLK reads and writes the `flock` that the pointer leads to.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
