//! Requests of a block driver (virtio 1.2, section 5.2.6).

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SERIAL_LEN;
use crate::byte_order::{ByteOrder, Number};
use crate::disk::{RawDisk, SECTOR};
use crate::virtio::buffers::{Readable, Writable};
use crate::virtio::worker::WorkerQueue;

/// Sectors that one segment of a discard covers at most: 4 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 23;
/// Sectors that one segment of write-zeroes covers at most, 64 MiB: where the
/// host has to write them, the worker does nothing else meanwhile.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 17;
/// Segments of one discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: u32 = 16;

const HEADER_LEN: usize = 16;
const SEGMENT_LEN: usize = 16;

/// What a request ends with.
enum Failure {
    /// The driver asked for what the device does not know.
    Unsupported,
    /// The request is not valid.
    Invalid,
    /// The host failed.
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// Where requests of one queue go.
pub(super) struct Requests {
    pub(super) disk: Arc<RawDisk>,
    pub(super) serial: [u8; SERIAL_LEN],
    /// Negotiated features.
    pub(super) features: u64,
    /// The byte order of headers.
    pub(super) order: ByteOrder,
    /// Whether writes may wait for a flush; `None`: they may not.
    pub(super) writeback: Option<Arc<AtomicBool>>,
}

/// A segment of a discard or write-zeroes request, in bytes of the disk.
struct Segment {
    offset: u64,
    len: u64,
    unmap: bool,
}

impl Requests {
    /// Does the request that a chain holds, and returns how many bytes were
    /// written into the chain.
    pub(super) fn serve(
        &self,
        mut input: Readable<'_>,
        output: Writable<'_>,
        queue: &mut WorkerQueue,
    ) -> u32 {
        let Some(data_len) = output.len().checked_sub(1) else {
            queue.complain(&"a block request without room for its status");
            return 0;
        };
        let (data, mut status) = output.split_at(data_len);
        let (code, written) = match self.request(&mut input, data) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Invalid) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Host(error)) => {
                self.report(queue, &error);
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        status.write(&[code as u8]);
        // What is counted is written without a gap (virtio 1.2, section
        // 2.7.8.2): the status only where the data reach up to it.
        let len = written + usize::from(written == data_len);
        // A chain is at most 4 GiB long.
        u32::try_from(len).unwrap_or(u32::MAX)
    }

    fn report(&self, queue: &mut WorkerQueue, error: &dyn Display) {
        queue.complain(&format_args!("{}: {error}", self.disk.path().display()));
    }

    /// Returns how many bytes of `output` were written.
    fn request(
        &self,
        input: &mut Readable<'_>,
        mut output: Writable<'_>,
    ) -> Result<usize, Failure> {
        let mut header = [0; HEADER_LEN];
        if input.read(&mut header) < HEADER_LEN {
            return Err(Failure::Invalid);
        }
        let [kind, _priority] = words(&header, self.order);
        let sector = double_word(&header, 8, self.order);
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.range(sector, output.len())?;
                self.disk.read(output, offset)?;
                Ok(output.len())
            }
            VIRTIO_BLK_T_OUT => {
                let offset = self.range(sector, input.len())?;
                self.check_writable()?;
                self.disk.write(*input, offset)?;
                self.after_write()
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => Ok(output.write(&self.serial)),
            VIRTIO_BLK_T_DISCARD if self.has(VIRTIO_BLK_F_DISCARD) => {
                self.segments(*input, MAX_DISCARD_SECTORS, |segment| {
                    if segment.unmap {
                        return Err(Failure::Unsupported);
                    }
                    Ok(self.disk.discard(segment.offset, segment.len)?)
                })?;
                self.after_write()
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.segments(*input, MAX_ZERO_SECTORS, |segment| {
                    let Segment { offset, len, unmap } = segment;
                    Ok(self.disk.write_zeroes(offset, len, unmap)?)
                })?;
                self.after_write()
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.read_only() {
            return Err(Failure::Invalid);
        }
        Ok(())
    }

    /// The offset in bytes of a range of whole sectors that the disk has.
    fn range(&self, sector: u64, len: usize) -> Result<u64, Failure> {
        let len = len as u64;
        if !len.is_multiple_of(SECTOR) {
            return Err(Failure::Invalid);
        }
        match sector.checked_add(len / SECTOR) {
            // The disk's size in bytes fits in a u64, so that this does.
            Some(end) if end <= self.disk.sectors() => Ok(sector * SECTOR),
            _ => Err(Failure::Invalid),
        }
    }

    /// Makes a write safe if the driver relies on that.
    fn after_write(&self) -> Result<usize, Failure> {
        let cached = self.writeback.as_ref();
        if !cached.is_some_and(|cached| cached.load(Ordering::Relaxed)) {
            self.disk.flush()?;
        }
        Ok(0)
    }

    /// Calls `act` for each segment of a request, after all have been checked.
    fn segments(
        &self,
        input: Readable<'_>,
        max_sectors: u32,
        act: impl Fn(Segment) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.check_writable()?;
        let count = input.len() / SEGMENT_LEN;
        if count == 0 || count > MAX_SEGMENTS as usize || !input.len().is_multiple_of(SEGMENT_LEN) {
            return Err(Failure::Invalid);
        }
        let mut raw = [0; SEGMENT_LEN * MAX_SEGMENTS as usize];
        let mut rest = input;
        let got = rest.read(&mut raw);
        // A driver that changes the segments meanwhile changes our copy no more.
        let (segments, _) = raw
            .get(..got)
            .unwrap_or_default()
            .as_chunks::<SEGMENT_LEN>();
        for segment in segments {
            self.segment(segment, max_sectors)?;
        }
        segments
            .iter()
            .try_for_each(|segment| act(self.segment(segment, max_sectors)?))
    }

    fn segment(&self, raw: &[u8; SEGMENT_LEN], max_sectors: u32) -> Result<Segment, Failure> {
        // Little-endian by either interface: these are data, not the header, for
        // the specification (section 5.2.6) and for Linux.
        let order = ByteOrder::Little;
        let sector = double_word(raw, 0, order);
        let [_, _, sectors, flags] = words(raw, order);
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > max_sectors {
            return Err(Failure::Invalid);
        }
        let len = u64::from(sectors) * SECTOR;
        Ok(Segment {
            offset: self.range(sector, len as usize)?,
            len,
            unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        })
    }
}

/// The first `N` words of `raw`.
fn words<const N: usize>(raw: &[u8; 16], order: ByteOrder) -> [u32; N] {
    let (words, _) = raw.as_chunks();
    let word = |word: &[u8; 4]| u32::of_bytes(*word, order);
    std::array::from_fn(|i| words.get(i).map_or(0, word))
}

/// The double word at `at`, which is 0 or 8.
fn double_word(raw: &[u8; 16], at: usize, order: ByteOrder) -> u64 {
    let (doubles, _) = raw.as_chunks();
    let double = |double: &[u8; 8]| u64::of_bytes(*double, order);
    doubles.get(at / 8).map_or(0, double)
}
