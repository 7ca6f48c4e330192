//! ELF kernels such as vmlinux (System V ABI, "ELF Header", "Program Header").

use object::Endianness;
use object::elf::{FileHeader64, NoteType, PT_INTERP, PT_LOAD, PT_NOTE};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};

use super::Reason;
use crate::machine::Machine;
use crate::source::Source;

const FORMAT: &str = "ELF";

/// Most program headers that are looked at.
const PHNUM_MAX: usize = 256;
/// Largest note segment that is looked at, in bytes.
const NOTES_MAX: u64 = 64 << 10;
/// Largest memory size of all segments together, in bytes.
const MEMORY_MAX: u64 = 1 << 40;

/// `XEN_ELFNOTE_PHYS32_ENTRY` (xen/include/public/elfnote.h): the 32-bit entry
/// point of the x86/HVM direct boot ABI (PVH), by physical address.
const XEN_ELFNOTE_PHYS32_ENTRY: NoteType = NoteType(18);

/// The headers of an ELF kernel.
#[derive(Clone, Debug)]
pub struct Elf {
    /// What it was built for.
    pub machine: Machine,
    /// Whether its data is big-endian.
    pub big_endian: bool,
    /// `e_entry`, a virtual or physical address by the architecture's custom.
    pub entry: u64,
    /// The PVH entry point's physical address, where there is one.
    pub pvh_entry: Option<u32>,
    /// The loadable segments that take memory, by ascending physical address,
    /// never overlapping.
    pub segments: Vec<Segment>,
    /// The lowest physical address of a segment.
    pub low: u64,
    /// The first physical address after all segments.
    pub high: u64,
}

/// A `PT_LOAD` segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// How much of it is in the file, in bytes.
    pub filesz: u64,
    /// Its physical address.
    pub paddr: u64,
    /// Its virtual address.
    pub vaddr: u64,
    /// Its size in memory, in bytes; what is not in the file is zero.
    pub memsz: u64,
}

impl Elf {
    /// The physical address of the entry point, when `entry` is a virtual or
    /// physical address within a segment.
    pub fn entry_paddr(&self) -> Option<u64> {
        let within = |base: u64, s: &Segment| {
            self.entry
                .checked_sub(base)
                .filter(|&o| o < s.memsz)
                .map(|o| s.paddr + o)
        };
        self.segments
            .iter()
            .find_map(|s| within(s.vaddr, s))
            .or_else(|| self.segments.iter().find_map(|s| within(s.paddr, s)))
    }
}

pub(super) fn parse(source: &Source) -> Result<Elf, Reason> {
    let damaged = |what: String| Reason::Damaged {
        format: FORMAT,
        what,
    };
    let truncated = |what: String| Reason::Truncated {
        format: FORMAT,
        what,
    };

    let ident = source.prefix(20)?;
    let [_, _, _, _, class, data, ..] = ident[..] else {
        return Err(truncated(format!(
            "{} bytes do not hold its header",
            source.len()
        )));
    };
    let (is_64, big_endian) = match (class, data) {
        (1 | 2, 1 | 2) => (class == 2, data == 2),
        _ => return Err(damaged(format!("class {class}, data encoding {data}"))),
    };
    let Some(e_machine) = ident.get(18..20).and_then(|b| b.first_chunk::<2>()) else {
        return Err(truncated(format!(
            "{} bytes do not hold its header",
            source.len()
        )));
    };
    let e_machine = if big_endian {
        u16::from_be_bytes(*e_machine)
    } else {
        u16::from_le_bytes(*e_machine)
    };
    let machine = Machine::from_elf(is_64, !big_endian, object::elf::Machine(e_machine));
    if !is_64 {
        return Err(Reason::Unsupported(format!(
            "{machine} ELF: only 64-bit kernels are run"
        )));
    }

    let cache = ReadCache::new(source.reader(0));
    let header = FileHeader64::<Endianness>::parse(&cache)
        .map_err(|_| truncated(format!("{} bytes do not hold its header", source.len())))?;
    let endian = header.endian().map_err(|e| damaged(e.to_string()))?;
    let kind = header.e_type(endian);
    if !matches!(kind, object::elf::ET_EXEC | object::elf::ET_DYN) {
        return Err(Reason::Unsupported(format!(
            "{machine} ELF of type {}: an executable such as vmlinux is needed",
            kind.0
        )));
    }
    let phnum = header.e_phnum(endian);
    if usize::from(phnum) > PHNUM_MAX {
        return Err(damaged(format!(
            "{phnum} program headers, at most {PHNUM_MAX} make sense"
        )));
    }
    let program_headers = header
        .program_headers(endian, &cache)
        .map_err(|_| truncated("the program headers are beyond its end".to_owned()))?;

    let mut segments = Vec::new();
    let mut pvh_entry = None;
    let mut total = 0u64;
    for (index, ph) in program_headers.iter().enumerate() {
        let segment = Segment {
            offset: ph.p_offset(endian),
            filesz: ph.p_filesz(endian),
            paddr: ph.p_paddr(endian),
            vaddr: ph.p_vaddr(endian),
            memsz: ph.p_memsz(endian),
        };
        let in_file = || {
            segment
                .offset
                .checked_add(segment.filesz)
                .is_some_and(|e| e <= source.len())
        };
        match ph.p_type(endian) {
            PT_LOAD if segment.memsz == 0 && segment.filesz == 0 => {}
            PT_LOAD => {
                if segment.filesz > segment.memsz {
                    return Err(damaged(format!("segment {index} is larger in the file")));
                }
                if !in_file() {
                    return Err(truncated(format!(
                        "segment {index} has {:#x} bytes at {:#x}, but the file has {:#x}",
                        segment.filesz,
                        segment.offset,
                        source.len()
                    )));
                }
                total = total.saturating_add(segment.memsz);
                if segment.paddr.checked_add(segment.memsz).is_none() || total > MEMORY_MAX {
                    return Err(damaged(format!(
                        "segment {index} has {:#x} bytes at {:#x}",
                        segment.memsz, segment.paddr
                    )));
                }
                segments.push(segment);
            }
            PT_INTERP => {
                return Err(Reason::Unsupported(format!(
                    "{machine} program, not a kernel"
                )));
            }
            PT_NOTE if pvh_entry.is_none() && segment.filesz <= NOTES_MAX && in_file() => {
                let Ok(Some(mut notes)) = ph.notes(endian, &cache) else {
                    continue;
                };
                while let Ok(Some(note)) = notes.next() {
                    if note.n_type(endian) == XEN_ELFNOTE_PHYS32_ENTRY && note.name() == b"Xen" {
                        pvh_entry = phys32_entry(note.desc());
                    }
                }
            }
            _ => {}
        }
    }

    segments.sort_by_key(|s| s.paddr);
    let overlap = segments.windows(2).any(|pair| match pair {
        [a, b] => a.paddr + a.memsz > b.paddr,
        _ => false,
    });
    if overlap {
        return Err(damaged("segments overlap in memory".to_owned()));
    }
    let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
        return Err(damaged("nothing to load".to_owned()));
    };
    Ok(Elf {
        machine,
        big_endian,
        entry: header.e_entry(endian),
        pvh_entry,
        low: first.paddr,
        high: last.paddr + last.memsz,
        segments,
    })
}

/// The note's value: Linux writes a 32- or 64-bit address (x86 only, so
/// little-endian).
fn phys32_entry(desc: &[u8]) -> Option<u32> {
    match desc.len() {
        4 => desc.first_chunk::<4>().map(|b| u32::from_le_bytes(*b)),
        8 => desc
            .first_chunk::<8>()
            .and_then(|b| u32::try_from(u64::from_le_bytes(*b)).ok()),
        _ => None,
    }
}
