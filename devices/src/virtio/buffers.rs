//! The buffers of descriptor chains, as sequences of bytes in guest memory
//! that the kernel reads and writes in place.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::ring::Chain;

/// What is wrong with a chain that a driver made available.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// The chain is empty, loops, is longer than its table, or its table
    /// cannot be read (virtio 1.2, section 2.7.5).
    #[error("a descriptor chain that is empty, loops or leaves its table")]
    Broken,
    /// A buffer lies outside guest RAM.
    #[error("a buffer outside guest memory")]
    Address,
    /// A device-readable buffer comes after a device-writable one (section 2.7.4.2).
    #[error("a device-readable buffer after a device-writable one")]
    Order,
}

/// The largest number of buffers that one system call takes (IOV_MAX).
const MAX_IOVECS: usize = 1024;
/// As many as are put together without clearing a large array first.
const FEW_IOVECS: usize = 64;

const NO_IOVEC: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// A piece of guest memory that is contiguous in the host's address space.
#[derive(Clone, Copy)]
struct Segment {
    start: *mut u8,
    len: usize,
}

/// Room for segments, kept from one batch of chains to the next so that no
/// request allocates.
#[derive(Default)]
pub struct Storage(Vec<Segment>);

// SAFETY: the pointers are never followed through `Storage`; a `BufferSet`
// clears them before it adds its own, which it follows only while it borrows
// the memory that they point into.
unsafe impl Send for Storage {}

/// The buffers of one chain, as positions in its [`BufferSet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainBuffers {
    /// What the driver gives the device.
    pub readable: Range<usize>,
    /// What the device gives the driver.
    pub writable: Range<usize>,
}

/// The buffers of some chains of one driver.
pub struct BufferSet<'m> {
    mem: &'m GuestMemoryMmap,
    segments: &'m mut Vec<Segment>,
}

impl<'m> BufferSet<'m> {
    /// An empty set of buffers in `mem`.
    pub fn new(mem: &'m GuestMemoryMmap, storage: &'m mut Storage) -> Self {
        storage.0.clear();
        Self {
            mem,
            segments: &mut storage.0,
        }
    }

    /// Forgets all chains.
    pub fn clear(&mut self) {
        self.segments.clear();
    }

    /// Adds the buffers of `chain`.
    ///
    /// # Errors
    /// The chain is malformed; nothing was added.
    pub fn add(&mut self, chain: Chain<'_>) -> Result<ChainBuffers, ChainError> {
        let start = self.segments.len();
        let added = self.add_descriptors(chain);
        if added.is_err() {
            self.segments.truncate(start);
        }
        added
    }

    fn add_descriptors(&mut self, chain: Chain<'_>) -> Result<ChainBuffers, ChainError> {
        let start = self.segments.len();
        let mut middle = None;
        // The iterator ends without a word where a chain is malformed: then
        // there is no last descriptor, or it promises another one.
        let mut complete = false;
        for descriptor in chain {
            complete = !descriptor.has_next();
            if descriptor.is_write_only() {
                middle.get_or_insert(self.segments.len());
            } else if middle.is_some() {
                return Err(ChainError::Order);
            }
            self.add_descriptor(descriptor)?;
        }
        if !complete {
            return Err(ChainError::Broken);
        }
        let end = self.segments.len();
        let middle = middle.unwrap_or(end);
        Ok(ChainBuffers {
            readable: start..middle,
            writable: middle..end,
        })
    }

    fn add_descriptor(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let access = if descriptor.is_write_only() {
            Permissions::Write
        } else {
            Permissions::Read
        };
        let len = usize::try_from(descriptor.len()).map_err(|_| ChainError::Address)?;
        let slices = self
            .mem
            .get_slices(descriptor.addr(), len, access)
            .map_err(|_| ChainError::Address)?;
        for slice in slices {
            let slice = slice.map_err(|_| ChainError::Address)?;
            if !slice.is_empty() {
                self.segments.push(Segment {
                    start: slice.ptr_guard_mut().as_ptr(),
                    len: slice.len(),
                });
            }
        }
        Ok(())
    }

    /// Forgets `chain`, which was the last one added.
    pub fn remove_last(&mut self, chain: &ChainBuffers) {
        self.segments.truncate(chain.readable.start);
    }

    /// The bytes that the device may read, of one chain or of several that
    /// follow each other. A range that is not of this set is empty.
    pub fn readable(&self, range: Range<usize>) -> Readable<'_> {
        Readable(Cursor::new(self.segments.get(range).unwrap_or_default()))
    }

    /// The bytes that the device may write.
    pub fn writable(&self, range: Range<usize>) -> Writable<'_> {
        Writable(Cursor::new(self.segments.get(range).unwrap_or_default()))
    }
}

/// A position in a sequence of segments and an end.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind.
    skip: usize,
    /// Bytes from here to the end.
    len: usize,
}

impl<'a> Cursor<'a> {
    fn new(segments: &'a [Segment]) -> Self {
        Self {
            segments,
            skip: 0,
            len: segments.iter().map(|s| s.len).sum(),
        }
    }

    fn advance(&mut self, bytes: usize) {
        let mut bytes = bytes.min(self.len);
        self.len -= bytes;
        while let Some((first, rest)) = self.segments.split_first() {
            let left = first.len - self.skip;
            if bytes < left {
                self.skip += bytes;
                return;
            }
            bytes -= left;
            self.skip = 0;
            self.segments = rest;
        }
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len);
        let mut tail = self;
        tail.advance(at);
        (Self { len: at, ..self }, tail)
    }

    /// The pieces between here and the end.
    fn pieces(self) -> impl Iterator<Item = Segment> {
        let mut left = self.len;
        let mut skip = self.skip;
        self.segments.iter().map_while(move |segment| {
            // `skip` is less than the first segment's length, by `advance`.
            let len = (segment.len - skip).min(left);
            let piece = Segment {
                // SAFETY: `skip` bytes into the segment is still inside it.
                start: unsafe { segment.start.add(skip) },
                len,
            };
            left -= len;
            skip = 0;
            (len > 0).then_some(piece)
        })
    }

    /// The pieces as vm-memory has them.
    fn slices(self) -> impl Iterator<Item = VolatileSlice<'a>> {
        self.pieces().map(|piece| {
            // SAFETY: the piece is part of a slice of guest memory that the set
            // behind `'a` borrows.
            unsafe { VolatileSlice::new(piece.start, piece.len) }
        })
    }

    /// Calls `call` with the pieces, as many as one system call takes.
    fn with_iovecs<R>(self, call: impl FnOnce(&[libc::iovec]) -> R) -> R {
        if self.segments.len() <= FEW_IOVECS {
            self.fill_iovecs(&mut [NO_IOVEC; FEW_IOVECS], call)
        } else {
            self.fill_iovecs(&mut [NO_IOVEC; MAX_IOVECS], call)
        }
    }

    fn fill_iovecs<R>(
        self,
        iovecs: &mut [libc::iovec],
        call: impl FnOnce(&[libc::iovec]) -> R,
    ) -> R {
        let mut count = 0;
        for (iovec, piece) in iovecs.iter_mut().zip(self.pieces()) {
            iovec.iov_base = piece.start.cast();
            iovec.iov_len = piece.len;
            count += 1;
        }
        call(iovecs.get(..count).unwrap_or_default())
    }

    /// Repeats `call`, which is given the pieces and how many bytes are done,
    /// until all bytes are or it does none, and returns how many that is.
    fn repeat(
        mut self,
        mut call: impl FnMut(&[libc::iovec], u64) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let mut done = 0;
        while self.len > 0 {
            match check(self.with_iovecs(|iovecs| call(iovecs, done as u64))) {
                Ok(0) => break,
                Ok(count) => {
                    self.advance(count);
                    done += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

/// The result of a system call that returns a number of bytes.
fn check(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The number of entries as the system calls take it; it is at most `MAX_IOVECS`.
fn count(iovecs: &[libc::iovec]) -> libc::c_int {
    iovecs.len() as libc::c_int
}

/// Checks that every offset in the range is one that the system calls take.
fn check_offsets(offset: u64, len: usize) -> io::Result<()> {
    match offset.checked_add(len as u64).map(i64::try_from) {
        Some(Ok(_)) => Ok(()),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Bytes that a driver gave to its device.
#[derive(Clone, Copy)]
pub struct Readable<'a>(Cursor<'a>);

impl Readable<'_> {
    /// Bytes left.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Splits after `at` bytes, or at the end if that comes first.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let (head, tail) = self.0.split_at(at);
        (Self(head), Self(tail))
    }

    /// Copies out as much as there is and fits in `data`, goes past it, and
    /// returns how many bytes that was.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.0.slices() {
            let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            done += slice.copy_to(rest);
        }
        self.0.advance(done);
        done
    }

    /// Writes all of it to `file` from byte `offset` on.
    ///
    /// # Errors
    /// The host's, or the offset is beyond what a file can have.
    pub fn pwrite_to(self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        check_offsets(offset, self.len())?;
        let done = self.0.repeat(|iovecs, done| {
            // SAFETY: the entries point into guest memory that this cursor
            // borrows; the kernel only reads them. The offset was checked.
            unsafe {
                libc::pwritev(
                    file.as_raw_fd(),
                    iovecs.as_ptr(),
                    count(iovecs),
                    (offset + done) as libc::off_t,
                )
            }
        })?;
        if done < self.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// Writes it to `file` with one call, and returns how many bytes that took.
    ///
    /// # Errors
    /// The host's, or more pieces than one call takes.
    pub fn write_to(self, file: BorrowedFd<'_>) -> io::Result<usize> {
        if self.0.segments.len() > MAX_IOVECS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        check(self.0.with_iovecs(|iovecs| {
            // SAFETY: as in `pwrite_to`.
            unsafe { libc::writev(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs)) }
        }))
    }
}

/// Bytes that a driver lets its device write.
#[derive(Clone, Copy)]
pub struct Writable<'a>(Cursor<'a>);

impl Writable<'_> {
    /// Bytes left.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Splits after `at` bytes, or at the end if that comes first.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let (head, tail) = self.0.split_at(at);
        (Self(head), Self(tail))
    }

    /// Copies in as much of `data` as fits, goes past it, and returns how many
    /// bytes that was.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.0.slices() {
            let rest = data.get(done..).unwrap_or_default();
            let part = rest.get(..slice.len()).unwrap_or(rest);
            if part.is_empty() || slice.write_slice(part, 0).is_err() {
                break;
            }
            done += part.len();
        }
        self.0.advance(done);
        done
    }

    /// Fills all of it from `file`, from byte `offset` to the file's end, and
    /// returns how many bytes that was.
    ///
    /// # Errors
    /// The host's, or the offset is beyond what a file can have.
    pub fn pread_from(self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        check_offsets(offset, self.len())?;
        self.0.repeat(|iovecs, done| {
            // SAFETY: the entries point into guest memory that this cursor
            // borrows and that the guest lets the device write; nothing in this
            // process holds a reference to it. The offset was checked.
            unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    iovecs.as_ptr(),
                    count(iovecs),
                    (offset + done) as libc::off_t,
                )
            }
        })
    }

    /// Fills it from `file` with one call, and returns how many bytes came; no
    /// more than the first 1024 pieces are filled.
    ///
    /// # Errors
    /// The host's.
    pub fn read_from(self, file: BorrowedFd<'_>) -> io::Result<usize> {
        check(self.0.with_iovecs(|iovecs| {
            // SAFETY: as in `pread_from`.
            unsafe { libc::readv(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs)) }
        }))
    }
}
