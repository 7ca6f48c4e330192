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
pub struct Executable {
    /// What it was built for.
    pub machine: Machine,
    /// The dynamic loader (`PT_INTERP`); none when it is static.
    pub interpreter: Option<String>,
    /// The name that it is linked by, of a library.
    pub soname: Option<String>,
    /// The libraries that it is linked with (`DT_NEEDED`), by name.
    pub needed: Vec<String>,
    /// Where in the file it asks for page tables with storage keys, as KVM on
    /// s390x needs them: the type of such a program header, four bytes.
    pub pgste: Option<u64>,
}

/// The type of a program header that asks for page tables with storage keys
/// (Linux `arch/s390/include/asm/elf.h`).
const PT_S390_PGSTE: u32 = 0x7000_0000;

/// Why a file is no executable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be read.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// It is something else.
    #[error("not an ELF executable")]
    NotElf,
    /// It does not hold together.
    #[error("damaged ELF executable: {0}")]
    Damaged(#[from] object::Error),
}

impl Executable {
    /// Reads the headers of the file `path`.
    ///
    /// # Errors
    ///
    /// When it can't be read, or is no sound ELF executable.
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
    let wants_pgste = |segment: &H::ProgramHeader| segment.p_type(endian).0 == PT_S390_PGSTE;
    let pgste = match machine {
        Machine::S390x => segments.iter().position(wants_pgste),
        _ => None,
    };
    let pgste = pgste.and_then(|index| {
        let start: u64 = header.e_phoff(endian).into();
        let offset = (index as u64).checked_mul(header.e_phentsize(endian).into())?;
        start.checked_add(offset)
    });
    let mut interpreter = None;
    let mut soname = None;
    let mut needed = Vec::new();
    for segment in segments {
        if let Some(path) = segment.interpreter(endian, data)? {
            interpreter = Some(String::from_utf8_lossy(path).into_owned());
        }
        let Some(dynamic) = segment.dynamic(endian, data)? else {
            continue;
        };
        let values = |tag: elf::DynamicTag| {
            let entries = dynamic.iter().filter(move |d| d.d_tag(endian) == tag);
            entries.map(|d| -> u64 { d.d_val(endian).into() })
        };
        let (Some(table), Some(size)) =
            (values(elf::DT_STRTAB).next(), values(elf::DT_STRSZ).next())
        else {
            continue;
        };
        // The string table's address is virtual: find it in a segment.
        let offset = segments.iter().find_map(|s| {
            let from: u64 = s.p_vaddr(endian).into();
            let offset: u64 = s.p_offset(endian).into();
            let len: u64 = s.p_filesz(endian).into();
            (s.p_type(endian) == elf::PT_LOAD)
                .then(|| table.checked_sub(from).filter(|&o| o < len))
                .flatten()
                .and_then(|o| offset.checked_add(o))
        });
        let Some((offset, end)) = offset.and_then(|o| Some((o, o.checked_add(size)?))) else {
            continue;
        };
        let strings = StringTable::new(data, offset, end);
        let name = |at: u64| {
            let name = strings.get(u32::try_from(at).ok()?).ok()?;
            Some(String::from_utf8_lossy(name).into_owned())
        };
        soname = values(elf::DT_SONAME).find_map(name);
        needed = values(elf::DT_NEEDED).filter_map(name).collect();
    }
    Ok(Executable {
        machine,
        interpreter,
        soname,
        needed,
        pgste,
    })
}
