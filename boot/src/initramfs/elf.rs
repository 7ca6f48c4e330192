//! What an executable needs to be run: ELF program headers and dynamic section.

use std::path::Path;

use object::Endianness;
use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::read::{ReadCache, ReadRef, StringTable};

use crate::machine::Machine;
use crate::source::{OpenError, Source};

/// An ELF executable or shared library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    /// What it was built for.
    pub machine: Machine,
    /// The dynamic loader (`PT_INTERP`); none when it is static.
    pub interpreter: Option<String>,
    /// The name that it is linked by, of a library.
    pub soname: Option<String>,
}

/// Why a file is no executable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Open(#[from] OpenError),
    #[error("not an ELF executable")]
    NotElf,
    #[error("damaged ELF executable: {0}")]
    Damaged(#[from] object::Error),
}

impl Executable {
    pub fn open(path: &Path) -> Result<Executable, Error> {
        let source = Source::open(path)?;
        let start = source.prefix(5).map_err(OpenError::from)?;
        if !start.starts_with(b"\x7fELF") {
            return Err(Error::NotElf);
        }
        let cache = ReadCache::new(source.reader(0));
        match start.get(4) {
            Some(1) => parse::<FileHeader32<Endianness>, _>(&cache),
            Some(2) => parse::<FileHeader64<Endianness>, _>(&cache),
            _ => Err(Error::NotElf),
        }
    }
}

fn parse<'a, H, R>(data: R) -> Result<Executable, Error>
where
    H: FileHeader<Endian = Endianness>,
    R: ReadRef<'a>,
    H: 'a,
{
    let header = H::parse(data)?;
    let endian = header.endian()?;
    let little = endian == Endianness::Little;
    let machine = Machine::from_elf(header.is_type_64(), little, header.e_machine(endian));
    let segments = header.program_headers(endian, data)?;
    let mut interpreter = None;
    let mut soname = None;
    for segment in segments {
        if let Some(path) = segment.interpreter(endian, data)? {
            interpreter = Some(String::from_utf8_lossy(path).into_owned());
        }
        let Some(dynamic) = segment.dynamic(endian, data)? else {
            continue;
        };
        let value = |tag: elf::DynamicTag| {
            let entry = dynamic.iter().find(|d| d.d_tag(endian) == tag);
            entry.map(|d| d.d_val(endian).into())
        };
        let (Some(at), Some(table), Some(size)) = (
            value(elf::DT_SONAME),
            value(elf::DT_STRTAB),
            value(elf::DT_STRSZ),
        ) else {
            continue;
        };
        // The string table's address is virtual: find it in a segment.
        let table: u64 = table;
        let size: u64 = size;
        let offset = segments.iter().find_map(|s| {
            let from: u64 = s.p_vaddr(endian).into();
            let offset: u64 = s.p_offset(endian).into();
            let len: u64 = s.p_filesz(endian).into();
            (s.p_type(endian) == elf::PT_LOAD)
                .then(|| table.checked_sub(from).filter(|&o| o < len))
                .flatten()
                .and_then(|o| offset.checked_add(o))
        });
        if let Some(offset) = offset
            && let Some(end) = offset.checked_add(size)
            && let Ok(at) = u32::try_from(at)
            && let Ok(name) = StringTable::new(data, offset, end).get(at)
        {
            soname = Some(String::from_utf8_lossy(name).into_owned());
        }
    }
    Ok(Executable {
        machine,
        interpreter,
        soname,
    })
}
