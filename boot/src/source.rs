//! Bytes that a guest is given: from a file, or from memory.
//!
//! A file is neither mapped nor read in whole: headers are read at their
//! offsets, and the bulk goes from the file straight into guest memory, one
//! copy in all. A mapping would save nothing over that, and would turn a file
//! that is truncated under us into a SIGBUS instead of an error.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

/// The most that is read from something that is not a regular file (a pipe, a
/// character device), in bytes.
const STREAM_LIMIT: u64 = 1 << 30;

/// An immutable run of bytes in a file or in memory.
#[derive(Debug)]
pub struct Source(Repr);

#[derive(Debug)]
enum Repr {
    /// An open file. The mutex guards its cursor, which reads into guest
    /// memory move; the length is that of when it was opened.
    File {
        file: Mutex<File>,
        len: u64,
    },
    Bytes(Vec<u8>),
}

/// Why a [`Source`] could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file can't be opened or read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is a directory.
    #[error("is a directory")]
    Directory,
    /// It holds nothing.
    #[error("is empty")]
    Empty,
    /// A pipe or device gave more than is reasonable.
    #[error("gives more than {} MiB", STREAM_LIMIT >> 20)]
    TooLong,
}

/// Why bytes could not be copied into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The destination is not guest memory from end to end.
    #[error("{len:#x} bytes at guest address {addr:#x} are not all guest memory")]
    Destination {
        /// Guest-physical address of the first byte.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range to be copied is not within the source.
    #[error("{len:#x} bytes at offset {offset:#x} are not all within its {size:#x} bytes")]
    Range {
        /// Offset in the source in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The source's length in bytes.
        size: u64,
    },
    /// Reading the file failed: it was truncated meanwhile, or the disk failed.
    #[error("reading it failed: {0}")]
    Read(GuestMemoryError),
}

impl Source {
    /// Opens a file. Regular files stay open and are read as needed; anything
    /// else (a pipe) is read to its end.
    pub fn open(path: &Path) -> Result<Source, OpenError> {
        let mut file = File::open(path)?;
        let meta = file.metadata()?;
        if meta.is_dir() {
            return Err(OpenError::Directory);
        }
        let source = if meta.is_file() {
            Source(Repr::File {
                len: meta.len(),
                file: Mutex::new(file),
            })
        } else {
            let mut bytes = Vec::new();
            (&mut file).take(STREAM_LIMIT + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > STREAM_LIMIT {
                return Err(OpenError::TooLong);
            }
            Source::from_bytes(bytes)
        };
        if source.is_empty() {
            return Err(OpenError::Empty);
        }
        Ok(source)
    }

    /// Bytes that are in memory already.
    pub fn from_bytes(bytes: Vec<u8>) -> Source {
        Source(Repr::Bytes(bytes))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match &self.0 {
            Repr::File { len, .. } => *len,
            Repr::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Whether there are no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads up to `buf.len()` bytes at `offset`; fewer only at the end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.len().saturating_sub(offset);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let Some(buf) = buf.get_mut(..len) else {
            return Ok(0);
        };
        match &self.0 {
            Repr::File { file, .. } => {
                let file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.read_exact_at(buf, offset)?;
                Ok(len)
            }
            Repr::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let from = bytes.get(start..).unwrap_or_default();
                let from = from.get(..len).unwrap_or_default();
                buf.copy_from_slice(from);
                Ok(len)
            }
        }
    }

    /// The first bytes, at most `max` of them.
    pub fn prefix(&self, max: usize) -> io::Result<Vec<u8>> {
        let mut buf = vec![0; max.min(usize::try_from(self.len()).unwrap_or(usize::MAX))];
        let n = self.read_at(&mut buf, 0)?;
        buf.truncate(n);
        Ok(buf)
    }

    /// A reader from `offset` to the end, with a cursor of its own.
    pub fn reader(&self, offset: u64) -> SourceReader<'_> {
        SourceReader {
            source: self,
            at: offset,
        }
    }

    /// Copies `len` bytes from `offset` into guest memory at `addr`. Nothing is
    /// written unless the whole destination is guest memory.
    pub fn copy_to_guest<M>(
        &self,
        mem: &M,
        addr: GuestAddress,
        offset: u64,
        len: u64,
    ) -> Result<(), CopyError>
    where
        M: GuestMemoryBackend,
    {
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(CopyError::Range {
                offset,
                len,
                size: self.len(),
            });
        }
        let count = check_guest_range(mem, addr, len)?;
        if count == 0 {
            return Ok(());
        }
        match &self.0 {
            Repr::File { file, .. } => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(offset))
                    .map_err(|e| CopyError::Read(GuestMemoryError::IOError(e)))?;
                mem.read_exact_volatile_from(addr, &mut *file, count)
            }
            Repr::Bytes(bytes) => {
                // In range: checked against len() above.
                let from = usize::try_from(offset).ok().and_then(|o| bytes.get(o..));
                let from = from.and_then(|b| b.get(..count)).unwrap_or_default();
                mem.write_slice(from, addr)
            }
        }
        .map_err(CopyError::Read)
    }
}

/// Checks that `len` bytes at `addr` are all guest memory, and returns the
/// length as this host's word.
pub(crate) fn check_guest_range<M>(
    mem: &M,
    addr: GuestAddress,
    len: u64,
) -> Result<usize, CopyError>
where
    M: GuestMemoryBackend,
{
    let bad = CopyError::Destination { addr: addr.0, len };
    match usize::try_from(len) {
        Ok(count) if addr.0.checked_add(len).is_some() => {
            if GuestMemoryBackend::check_range(mem, addr, count) {
                Ok(count)
            } else {
                Err(bad)
            }
        }
        _ => Err(bad),
    }
}

/// Reads a [`Source`] with a cursor of its own.
#[derive(Debug)]
pub struct SourceReader<'a> {
    source: &'a Source,
    at: u64,
}

impl Read for SourceReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for SourceReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.source.len().checked_add_signed(by),
        };
        self.at = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn both(bytes: &[u8]) -> (tempfile::TempDir, [Source; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, bytes).unwrap();
        let file = Source::open(&path).unwrap();
        (dir, [file, Source::from_bytes(bytes.to_vec())])
    }

    #[test]
    fn reads_end_where_the_source_ends() {
        let (_dir, sources) = both(b"0123456789");
        for source in sources {
            let mut buf = [0; 4];
            assert_eq!(source.read_at(&mut buf, 8).unwrap(), 2);
            assert_eq!(&buf[..2], b"89");
            assert_eq!(source.read_at(&mut buf, 10).unwrap(), 0);
            assert_eq!(source.read_at(&mut buf, u64::MAX).unwrap(), 0);
            assert_eq!(source.prefix(100).unwrap(), b"0123456789");
            let mut text = String::new();
            let mut reader = source.reader(3);
            assert_eq!(reader.seek(SeekFrom::Current(2)).unwrap(), 5);
            reader.read_to_string(&mut text).unwrap();
            assert_eq!(text, "56789");
            assert_eq!(reader.seek(SeekFrom::End(-1)).unwrap(), 9);
            assert!(reader.seek(SeekFrom::Current(-10)).is_err());
            assert!(reader.seek(SeekFrom::End(i64::MIN)).is_err());
        }
    }

    #[test]
    fn copies_are_checked_at_both_ends() {
        let (_dir, sources) = both(b"0123456789");
        let ranges = [
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x3000), 0x1000),
        ];
        let mem = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        for source in sources {
            let copy =
                |addr, offset, len| source.copy_to_guest(&mem, GuestAddress(addr), offset, len);
            copy(0x1ff6, 0, 10).unwrap();
            copy(0x3000, 9, 1).unwrap();
            copy(0x3000, 10, 0).unwrap();
            assert_eq!(mem.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), b'9');
            for (addr, offset, len) in [(0, 11, 0), (0, 1, 10), (0, u64::MAX, 1), (0, 1, u64::MAX)]
            {
                let error = copy(addr, offset, len).unwrap_err();
                assert!(matches!(error, CopyError::Range { .. }), "{error}");
            }
            // Before, after, into the hole, around the end of the address space.
            for addr in [0xff7, 0x1ff7, 0x2ff8, 0x3ff7, u64::MAX - 9, u64::MAX - 10] {
                let error = copy(addr, 0, 10).unwrap_err();
                assert!(
                    matches!(error, CopyError::Destination { .. }),
                    "{addr:#x}: {error}"
                );
            }
        }
    }

    #[test]
    fn pipes_are_read_to_their_end() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap();
        assert!(made.success());
        let writer = std::thread::spawn({
            let path = path.clone();
            move || {
                File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .write_all(b"piped")
                    .unwrap()
            }
        });
        let source = Source::open(&path).unwrap();
        writer.join().unwrap();
        assert_eq!(source.prefix(10).unwrap(), b"piped");
    }
}
