//! STORE SYSTEM INFORMATION, what KVM leaves to user space: the VM's name and
//! UUID, the topology of its CPUs (Principles of Operation, chapter 10).

use super::cpu::{Cpu, Result};
use super::ebcdic;

/// Size of a system-information block in bytes.
const SIZE: usize = 4096;
/// In the block of function 3.2.2: the first VM's name, its extended name's
/// encoding (2 is UTF-8), its UUID; and where the extended names are.
const NAME: usize = 44;
const ENCODING: usize = 75;
const UUID: usize = 80;
const EXTENDED_NAME: usize = 2048;
const EXTENDED_NAME_SIZE: usize = 256;
/// How many VMs there are, in the last four bits, this one first and then those
/// that it is in; each with a description of so many bytes.
const COUNT: usize = 31;
const MOST_VMS: usize = 8;
const DESCRIPTION_SIZE: usize = 64;

/// What tells this VM from others.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The VM's name.
    pub name: String,
    /// Its UUID.
    pub uuid: [u8; 16],
}

impl Identity {
    /// A UUID that follows from the name, so that it is the same each time.
    pub fn new(name: &str) -> Self {
        // FNV-1a of 128 bits.
        let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        for byte in name.bytes() {
            hash ^= u128::from(byte);
            hash = hash.wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        let mut uuid = hash.to_be_bytes();
        // RFC 9562: version 8, the variant of the RFC.
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Self {
            name: name.into(),
            uuid,
        }
    }

    fn fill_in(&self, block: &mut [u8]) {
        make_room(block);
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = block.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(NAME, &ebcdic::field::<8>(&self.name));
        put(ENCODING, &[2]);
        put(UUID, &self.uuid);
        // Ended by a zero byte, and cut at a character's end.
        let mut end = self.name.len().min(EXTENDED_NAME_SIZE - 1);
        while !self.name.is_char_boundary(end) {
            end -= 1;
        }
        let mut name = [0; EXTENDED_NAME_SIZE];
        for (place, byte) in name.iter_mut().zip(self.name.bytes().take(end)) {
            *place = byte;
        }
        put(EXTENDED_NAME, &name);
    }
}

/// Moves the extended names of the VMs that this one is in by one place, as KVM
/// has done with the rest. They end where one has none: names further out are
/// not known.
fn make_room(block: &mut [u8]) {
    let count = block.get(COUNT).map_or(0, |count| usize::from(count & 15));
    let count = count.min(MOST_VMS);
    let name = |vm: usize| EXTENDED_NAME + vm * EXTENDED_NAME_SIZE;
    let end = name(MOST_VMS);
    if count == 0 || block.len() < end {
        return;
    }
    block.copy_within(name(0)..name(count - 1), name(1));
    let named = |vm: &usize| block[ENCODING + vm * DESCRIPTION_SIZE] != 0 && block[name(*vm)] != 0;
    let known = (1..count).take_while(named).count() + 1;
    block[name(known)..end].fill(0);
}

/// Completes KVM_EXIT_S390_STSI: function code `function` with `selectors`, a
/// block at logical address `address` of `space`.
///
/// # Errors
/// A program interruption.
pub fn complete(
    cpu: &mut Cpu<'_>,
    identity: &Identity,
    cpus: u32,
    function: u8,
    selectors: (u8, u16),
    (address, space): (u64, u8),
) -> Result<()> {
    match (function, selectors) {
        (3, (2, 2)) => {
            let mut block = [0; SIZE];
            cpu.read(address, space, &mut block)?;
            identity.fill_in(&mut block);
            cpu.write(address, space, &block)?;
        }
        (15, (1, level @ 2..=6)) => match topology(cpus, level) {
            Some(block) => {
                cpu.write(address, space, &block)?;
                cpu.set_condition(0);
            }
            None => cpu.set_condition(3),
        },
        (15, _) => cpu.set_condition(3),
        _ => {}
    }
    Ok(())
}

/// The block of function 15.1.2: one socket with all CPUs.
fn topology(cpus: u32, level: u16) -> Option<Vec<u8>> {
    // Nothing nests deeper than sockets.
    if level > 2 {
        return None;
    }
    let mut entries = Vec::new();
    // A container of nesting level 1, number 1.
    entries.extend([1, 0, 0, 0, 0, 0, 0, 1]);
    for origin in (0..cpus).step_by(64) {
        let count = (cpus - origin).min(64);
        let mask = u64::MAX << (64 - count);
        // Level 0; dedicated or not, polarisation, type: not, horizontal, 3
        // as KVM's CPUs are; the first one's number.
        entries.extend([0, 0, 0, 0, 0, 3]);
        entries.extend((origin as u16).to_be_bytes());
        entries.extend(mask.to_be_bytes());
    }
    let mut block = vec![0, 0];
    block.extend(((16 + entries.len()) as u16).to_be_bytes());
    // CPUs at the innermost level, sockets at the next.
    block.extend([0, 0, 0, 0, 1, cpus.min(255) as u8, 0, 2, 0, 0, 0, 0]);
    block.extend(entries);
    Some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uuid_follows_from_the_name() {
        let uuid = Identity::new("a").uuid;
        assert_eq!(uuid, Identity::new("a").uuid);
        assert_ne!(uuid, Identity::new("b").uuid);
        assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (8, 2));
    }

    #[test]
    fn name_and_uuid_are_where_linux_reads_them() {
        let mut block = [0xff; SIZE];
        block[31] = 1;
        let identity = Identity::new("größer-als-acht");
        identity.fill_in(&mut block);
        assert_eq!(ebcdic::to_text(&block[44..52]), "größer-a");
        assert_eq!(block[75], 2);
        assert_eq!(block[80..96], identity.uuid);
        assert!(block[2048..].starts_with("größer-als-acht\0".as_bytes()));
        assert_eq!(block[2304], 0);
        Identity::new(&"ß".repeat(200)).fill_in(&mut block);
        assert_eq!(block[2048 + 254..2304], [0, 0]);
    }

    /// As KVM leaves the block: descriptions have moved, names have not.
    #[test]
    fn names_of_outer_vms_follow() {
        let mut block = [0; SIZE];
        block[31] = 0xf0 | 4;
        for (vm, encoding) in [(1, 2), (2, 2), (3, 0)] {
            block[75 + vm * 64] = encoding;
        }
        for (vm, letter) in [(0, b'a'), (1, b'b'), (2, b'c')] {
            block[2048 + vm * 256..][..256].fill(letter);
        }
        Identity::new("inner").fill_in(&mut block);
        assert!(block[2048..].starts_with(b"inner\0"));
        let names = |block: &[u8]| [1, 2, 3, 4].map(|vm| block[2048 + vm * 256 + 255]);
        assert_eq!(names(&block), [b'a', b'b', 0, 0]);
        // Nothing is beyond the block, whatever its count.
        for count in [0, 1, 8, 15] {
            block[31] = count;
            Identity::new("inner").fill_in(&mut block);
        }
    }

    #[test]
    fn the_topology_has_all_cpus() {
        let block = topology(66, 2).unwrap();
        assert_eq!(block[2..4], [0, 16 + 8 + 32]);
        assert_eq!(block.len(), 16 + 8 + 32);
        assert_eq!(block[32..40], [0xff; 8]);
        assert_eq!(block[46..48], [0, 64]);
        assert_eq!(block[48..], [0xc0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(topology(2, 3), None);
    }
}
