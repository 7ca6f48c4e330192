//! Non-volatile memory (Linux on Power Architecture Reference, section 7.3.1 and
//! chapter 8, "Non-Volatile Memory"): where a kernel keeps its log of an oops that
//! it survives.
//!
//! It lasts until the guest powers off, resets or panics; a panic ends the VM
//! (ibm,os-term) before Linux would write of it. Its partitions for Linux are there
//! from the start; without them Linux reports errors.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossvisor_devices::GuestMem;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// Its size in bytes.
pub const SIZE: u32 = 8 << 10;

/// Partitions are counted in blocks (section 8.2).
const BLOCK: usize = 16;
/// Signatures: of an operating system's partition, and of free space.
const OPERATING_SYSTEM: u8 = 0xa0;
const FREE: u8 = 0x7f;
/// The name of free space.
const FREE_NAME: &[u8; 12] = b"wwwwwwwwwwww";
/// What Linux looks for, and the bytes that it wants
/// (arch/powerpc/kernel/nvram_64.c).
const PARTITIONS: [(&[u8; 12], usize); 2] = [(b"ibm,rtas-log", 2079), (b"lnx,oops-log", 4000)];

/// The memory of one machine.
#[derive(Debug)]
pub struct Nvram(Mutex<Vec<u8>>);

impl Default for Nvram {
    fn default() -> Self {
        let mut bytes = Vec::new();
        for (name, size) in PARTITIONS {
            let blocks = 1 + size.div_ceil(BLOCK);
            let end = bytes.len() + blocks * BLOCK;
            bytes.extend(header(OPERATING_SYSTEM, blocks, name));
            bytes.resize(end, 0);
        }
        let left = (SIZE as usize).saturating_sub(bytes.len()) / BLOCK;
        bytes.extend(header(FREE, left, FREE_NAME));
        bytes.resize(SIZE as usize, 0);
        Self(Mutex::new(bytes))
    }
}

impl Nvram {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// nvram-fetch: copies `len` bytes from `index` to guest memory at `buffer`.
    /// `None` when not all of them are there, or the buffer is not.
    pub fn fetch(&self, memory: &GuestMem, index: u32, buffer: u32, len: u32) -> Option<()> {
        let bytes = self.bytes();
        let from = bytes.get(range(index, len)?)?;
        let memory = memory.memory();
        memory.write_slice(from, GuestAddress(buffer.into())).ok()
    }

    /// nvram-store: the other way round.
    pub fn store(&self, memory: &GuestMem, index: u32, buffer: u32, len: u32) -> Option<()> {
        let mut bytes = self.bytes();
        let to = bytes.get_mut(range(index, len)?)?;
        // What can be read in part only is not written at all.
        let mut whole = vec![0; to.len()];
        let memory = memory.memory();
        memory
            .read_slice(&mut whole, GuestAddress(buffer.into()))
            .ok()?;
        to.copy_from_slice(&whole);
        Some(())
    }
}

fn range(index: u32, len: u32) -> Option<Range<usize>> {
    let end = index.checked_add(len)?;
    Some(index as usize..end as usize)
}

/// The head of a partition of so many blocks, of which it is the first (section
/// 8.2): signature, checksum, length and name.
fn header(signature: u8, blocks: usize, name: &[u8; 12]) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    header[0] = signature;
    header[2..4].copy_from_slice(&(blocks as u16).to_be_bytes());
    header[4..].copy_from_slice(name);
    header[1] = checksum(&header);
    header
}

/// The sum of all bytes but the checksum's own, in which a carry is added at the
/// other end (section 8.2).
fn checksum(header: &[u8; BLOCK]) -> u8 {
    let others = header.iter().enumerate().filter(|(at, _)| *at != 1);
    others.fold(0, |sum: u8, (_, byte)| {
        let (sum, carry) = sum.overflowing_add(*byte);
        sum.wrapping_add(carry.into())
    })
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn memory() -> GuestMem {
        let range = (GuestAddress(0), 0x10000);
        GuestMem::new(GuestMemoryMmap::from_ranges(&[range]).unwrap())
    }

    /// Walks the partitions as Linux does (nvram_scan_partitions), with its own
    /// way to sum up.
    #[test]
    fn partitions_are_found_by_their_reader() {
        let nvram = Nvram::default();
        let bytes = nvram.bytes();
        let mut found = Vec::new();
        let mut at = 0;
        while at < SIZE as usize {
            let header = &bytes[at..at + 16];
            let length = u16::from_be_bytes([header[2], header[3]]);
            let words = header[4..].chunks(2);
            let words = words.map(|word| u32::from(u16::from_le_bytes([word[0], word[1]])));
            let sum: u32 = u32::from(header[0]) + u32::from(length) + words.sum::<u32>();
            let sum = ((sum & 0xffff) + (sum >> 16)) & 0xffff;
            let sum = (sum + (sum >> 8) + (sum << 8)) >> 8 & 0xff;
            assert_eq!(u32::from(header[1]), sum, "checksum at {at:#x}");
            assert_ne!(length, 0);
            let name = str::from_utf8(&header[4..]).unwrap();
            found.push((header[0], name.to_owned(), usize::from(length - 1) * 16));
            at += usize::from(length) * 16;
        }
        assert_eq!(at, SIZE as usize);
        let found: Vec<_> = found.iter().map(|(s, n, l)| (*s, n.as_str(), *l)).collect();
        assert_eq!(
            found,
            [
                (0xa0, "ibm,rtas-log", 2080),
                (0xa0, "lnx,oops-log", 4000),
                (0x7f, "wwwwwwwwwwww", 2064),
            ]
        );
    }

    #[test]
    fn what_is_stored_is_fetched() {
        let (nvram, memory) = (Nvram::default(), memory());
        let write = |bytes: &[u8], at| {
            let memory = memory.memory();
            memory.write_slice(bytes, GuestAddress(at)).unwrap();
        };
        write(b"words", 0x1000);
        nvram.store(&memory, SIZE - 5, 0x1000, 5).unwrap();
        nvram.fetch(&memory, SIZE - 5, 0x2000, 5).unwrap();
        let mut found = [0; 5];
        let guest = memory.memory();
        guest.read_slice(&mut found, GuestAddress(0x2000)).unwrap();
        assert_eq!(found, *b"words");
    }

    #[test]
    fn what_is_not_there_changes_nothing() {
        let (nvram, memory) = (Nvram::default(), memory());
        let before = nvram.bytes().clone();
        for (index, buffer, len) in [
            (SIZE - 4, 0, 5),
            (SIZE + 1, 0, 0),
            (u32::MAX, 0, 2),
            (0, 0xfffc, 5),
            (0, 0x10000, 1),
            (0, u32::MAX, u32::MAX),
        ] {
            assert_eq!(nvram.store(&memory, index, buffer, len), None);
            assert_eq!(nvram.fetch(&memory, index, buffer, len), None);
        }
        assert_eq!(*nvram.bytes(), before);
    }
}
