//! Disks on the host: raw image files and block devices.

mod lock;
mod sys;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;

use crate::virtio::buffers::{Readable, Writable};

/// The unit of a disk's size and addresses, in bytes.
pub const SECTOR: u64 = 512;

/// Largest piece of zeroes that is written where the host has no better way.
const ZEROES: usize = 64 * 1024;

/// Why a disk could not be opened.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The host did not open it.
    #[error("disk {path}: {error}{hint}")]
    Open {
        /// The path as given.
        path: PathBuf,
        /// The host's error.
        error: io::Error,
        /// What would work, or nothing.
        hint: &'static str,
    },
    /// It is neither a regular file nor a block device.
    #[error("disk {0}: neither a regular file nor a block device")]
    Kind(PathBuf),
    /// It has no sector.
    #[error("disk {0}: empty; make an image with a size, such as `truncate -s 10G {0}`")]
    Empty(PathBuf),
    /// Another process has locked it.
    #[error("disk {path}: in use by another virtual machine ({held}); {hint}")]
    Locked {
        /// The path as given.
        path: PathBuf,
        /// Which lock is held.
        held: &'static str,
        /// What would work.
        hint: &'static str,
    },
}

/// How a disk is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Refuse writes. Several machines may read one disk at the same time.
    pub read_only: bool,
}

/// A raw disk that is open and locked against other virtual machines, as long
/// as it lives. It is shared by the queues of its device.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    path: PathBuf,
    /// Size in bytes, as the host has it.
    size: u64,
    read_only: bool,
    block_device: bool,
    /// Whether storage can be given back.
    can_discard: AtomicBool,
    /// Whether the host makes zeroes that keep their storage.
    can_zero: AtomicBool,
    geometry: Geometry,
}

/// What the host knows about good sizes and alignments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the smallest addressable unit.
    pub logical_block: u32,
    /// Bytes that the storage writes at once.
    pub physical_block: u32,
    /// Bytes of a request that performs well, or 0 when unknown.
    pub optimal_io: u32,
}

impl RawDisk {
    /// Opens `path` and takes the locks that QEMU's raw driver also takes, so
    /// that no two machines, of whichever of the two, write the same disk.
    ///
    /// # Errors
    /// See [`DiskError`]; nothing was changed then.
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self, DiskError> {
        let failed = |error: io::Error| {
            let hint = match error.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                    if !options.read_only =>
                {
                    "; open it read-only, or get the right to write it"
                }
                _ => "",
            };
            DiskError::Open {
                path: path.to_owned(),
                error,
                hint,
            }
        };
        // Looked at before it is opened, since opening a FIFO would wait.
        let kind = path.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind(path.to_owned()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let block_device = metadata.file_type().is_block_device();
        let (size, geometry) = if block_device {
            let size = sys::device_size(file.as_fd()).map_err(failed)?;
            (size, sys::device_geometry(file.as_fd()))
        } else {
            (metadata.len(), Geometry::of_file())
        };
        if size == 0 {
            return Err(DiskError::Empty(path.to_owned()));
        }
        lock::acquire(&file, options.read_only).map_err(|error| match error {
            lock::LockError::Held { held, hint } => DiskError::Locked {
                path: path.to_owned(),
                held,
                hint,
            },
            lock::LockError::Host(error) => failed(error),
        })?;
        if !size.is_multiple_of(SECTOR) {
            log::warn!(
                "disk {}: {size} bytes is not a whole number of 512-byte sectors; the rest of \
                 the last one reads as zeroes",
                path.display()
            );
        }
        Ok(Self {
            can_discard: AtomicBool::new(
                !options.read_only && (!block_device || sys::device_discards(&metadata)),
            ),
            can_zero: AtomicBool::new(!options.read_only),
            file,
            path: path.to_owned(),
            size,
            read_only: options.read_only,
            block_device,
            geometry,
        })
    }

    /// Where it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in sectors of 512 bytes; the last one may be part of a sector on
    /// the host.
    pub fn sectors(&self) -> u64 {
        self.size.div_ceil(SECTOR)
    }

    /// Whether it refuses writes.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Sizes and alignments.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether the host is expected to honour [`discard`](Self::discard).
    pub fn discards(&self) -> bool {
        self.can_discard.load(Ordering::Relaxed)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Fills `buffers` from `offset` on.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof` when the file has become shorter.
    pub(crate) fn read(&self, buffers: Writable<'_>, offset: u64) -> io::Result<()> {
        let count = buffers.pread_from(self.fd(), offset)?;
        let (_, mut rest) = buffers.split_at(count);
        if rest.is_empty() {
            return Ok(());
        }
        // Only the part of the last sector that the host lacks is ours to fill.
        if rest.len() as u64 >= SECTOR || offset.saturating_add(count as u64) < self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        rest.write(&[0; SECTOR as usize]);
        Ok(())
    }

    /// Writes `buffers` at `offset`.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn write(&self, buffers: Readable<'_>, offset: u64) -> io::Result<()> {
        buffers.pwrite_to(self.fd(), offset)
    }

    /// Waits until everything written is on stable storage.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data()
    }

    /// Lets the host forget `len` bytes from `offset` on. What they read as
    /// afterwards is open. A host that cannot is left alone: discarding is
    /// advice.
    ///
    /// # Errors
    /// The host's, other than that it cannot.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 || !self.can_discard.load(Ordering::Relaxed) {
            return Ok(());
        }
        let done = if self.block_device {
            sys::device_discard(self.fd(), offset, len)
        } else {
            sys::punch_hole(self.fd(), offset, len)
        };
        match done {
            Err(error) if unsupported(&error) => {
                self.can_discard.store(false, Ordering::Relaxed);
                Ok(())
            }
            // A range that is off the device's alignment stays as it is.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            done => done,
        }
    }

    /// Makes `len` bytes from `offset` on read as zeroes, giving up their
    /// storage when `unmap` is set and the host can.
    ///
    /// # Errors
    /// The host's.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        // A file system may know the one and not the other: tmpfs punches holes
        // and does not zero ranges.
        let by_hole = !self.block_device && unmap;
        let can = match by_hole {
            true => &self.can_discard,
            false => &self.can_zero,
        };
        if can.load(Ordering::Relaxed) {
            let done = if by_hole {
                sys::punch_hole(self.fd(), offset, len)
            } else if self.block_device {
                sys::device_zero(self.fd(), offset, len)
            } else {
                sys::zero_range(self.fd(), offset, len)
            };
            match done {
                Err(error) if unsupported(&error) => can.store(false, Ordering::Relaxed),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                done => return done,
            }
        }
        self.write_zero_bytes(offset, len)
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let zeroes = [0; ZEROES];
        while len > 0 {
            let piece = len.min(ZEROES as u64);
            self.file
                .write_all_at(zeroes.get(..piece as usize).unwrap_or_default(), offset)?;
            offset += piece;
            len -= piece;
        }
        Ok(())
    }
}

impl Drop for RawDisk {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            log::error!("disk {}: cannot be flushed: {error}", self.path.display());
        }
    }
}

/// The host, or the file system, has no such operation.
fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

impl Geometry {
    /// Files can be addressed by sector, but storage works in 4 KiB blocks.
    fn of_file() -> Self {
        Self {
            logical_block: SECTOR as u32,
            physical_block: 4096,
            optimal_io: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::process::{Command, Stdio};
    use std::sync::Mutex;

    /// A process that is being started holds copies of all open files for a
    /// moment, and their locks; tests that release locks keep out of its way.
    static STARTS_A_PROCESS: Mutex<()> = Mutex::new(());

    fn image(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn open(path: &Path, read_only: bool) -> Result<RawDisk, DiskError> {
        RawDisk::open(path, DiskOptions { read_only })
    }

    #[test]
    fn one_writer_or_many_readers() {
        let _alone = STARTS_A_PROCESS.lock();
        let file = image(&[0; 4096]);
        let writer = open(file.path(), false).unwrap();
        let second = open(file.path(), false).unwrap_err().to_string();
        assert!(second.contains("in use by another virtual machine (write lock held)"));
        assert!(second.contains(file.path().to_str().unwrap()));
        assert!(matches!(
            open(file.path(), true),
            Err(DiskError::Locked { .. })
        ));
        drop(writer);
        let readers = [
            open(file.path(), true).unwrap(),
            open(file.path(), true).unwrap(),
        ];
        let error = open(file.path(), false).unwrap_err().to_string();
        assert!(
            error.contains("in use by another virtual machine"),
            "{error}"
        );
        drop(readers);
        open(file.path(), false).unwrap();
    }

    #[test]
    fn qemu_respects_our_lock_and_we_respect_its() {
        let _alone = STARTS_A_PROCESS.lock();
        let file = image(&[0; 1 << 20]);
        let writer = open(file.path(), false).unwrap();
        let qemu = || {
            let mut command = Command::new("qemu-io");
            command.args(["-f", "raw"]).arg(file.path());
            command
        };
        let Ok(output) = qemu().args(["-c", "write 0 512"]).output() else {
            eprintln!("not checked: there is no qemu-io here");
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("Failed to get \"write\" lock"), "{said}");
        drop(writer);

        let mut qemu = qemu()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It has opened the image when it answers.
        qemu.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"1 MiB") {
            let mut byte = [0];
            qemu.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        assert!(matches!(
            open(file.path(), false),
            Err(DiskError::Locked { .. })
        ));
        drop(qemu.stdin.take());
        qemu.wait().unwrap();
        open(file.path(), false).unwrap();
    }

    #[test]
    fn bad_disks_are_named() {
        let missing = open(Path::new("/nonexistent/disk.img"), false).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/disk.img"));
        assert!(matches!(
            open(Path::new("/"), true),
            Err(DiskError::Kind(_))
        ));
        assert!(matches!(
            open(Path::new("/dev/null"), true),
            Err(DiskError::Kind(_))
        ));
        let empty = image(&[]);
        assert!(matches!(
            open(empty.path(), false),
            Err(DiskError::Empty(_))
        ));
    }

    #[test]
    fn a_size_off_the_sector_is_rounded_up() {
        let file = image(&[1; 1000]);
        let disk = open(file.path(), false).unwrap();
        assert_eq!(disk.sectors(), 2);
        disk.write_zeroes(512, 512, true).unwrap();
        assert_eq!(file.path().metadata().unwrap().len(), 1000);
    }

    #[test]
    fn zeroes_are_zeroes_by_every_way_and_size_stays() {
        let file = image(&[0xaa; 256 * 1024]);
        let disk = open(file.path(), false).unwrap();
        disk.write_zeroes(4096, 8192, true).unwrap();
        disk.write_zeroes(65536, 512, false).unwrap();
        disk.write_zero_bytes(100_000, 70_000).unwrap();
        disk.flush().unwrap();
        let mut content = vec![0; 256 * 1024];
        disk.file.read_exact_at(&mut content, 0).unwrap();
        for (i, byte) in content.iter().enumerate() {
            let zeroed = (4096..12288).contains(&i)
                || (65536..66048).contains(&i)
                || (100_000..170_000).contains(&i);
            assert_eq!(*byte, if zeroed { 0 } else { 0xaa }, "byte {i}");
        }
        assert_eq!(disk.file.metadata().unwrap().len(), 256 * 1024);
    }

    #[test]
    fn holes_are_punched_where_ranges_cannot_be_zeroed() {
        // tmpfs on every Linux.
        let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.write_all(&[0xaa; 1 << 20]).unwrap();
        let disk = open(file.path(), false).unwrap();
        disk.write_zeroes(0, 65536, false).unwrap();
        let before = disk.file.metadata().unwrap().blocks();
        disk.write_zeroes(1 << 19, 1 << 19, true).unwrap();
        assert!(disk.file.metadata().unwrap().blocks() < before);
        let mut content = vec![0; 1 << 20];
        disk.file.read_exact_at(&mut content, 0).unwrap();
        let ends = [0, 65535, 65536, (1 << 19) - 1, 1 << 19, (1 << 20) - 1];
        assert_eq!(ends.map(|at| content[at]), [0, 0, 0xaa, 0xaa, 0, 0]);
    }

    #[test]
    fn discard_gives_storage_back_where_the_host_can() {
        let file = image(&[0xaa; 1 << 20]);
        let disk = open(file.path(), false).unwrap();
        disk.flush().unwrap();
        let before = disk.file.metadata().unwrap().blocks();
        disk.discard(0, 1 << 20).unwrap();
        disk.flush().unwrap();
        if disk.discards() {
            assert!(disk.file.metadata().unwrap().blocks() < before);
        } else {
            eprintln!("not checked: this file system cannot punch holes");
        }
        assert_eq!(disk.file.metadata().unwrap().len(), 1 << 20);
    }
}
