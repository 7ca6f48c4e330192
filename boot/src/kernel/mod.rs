//! Kernel images: recognised by content, checked, described and copied into
//! guest memory.

mod arm64;
mod bzimage;
mod elf;
mod fields;
mod pe;
mod riscv;
mod s390;
mod zboot;

use std::fmt;
use std::path::Path;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend};

pub use arm64::{Arm64Image, PageSize};
pub use bzimage::BzImage;
pub use elf::{Elf, Segment};
pub use riscv::RiscvImage;
pub use s390::S390Image;

use crate::compress::{self, Compression};
use crate::machine::Machine;
use crate::source::{CopyError, OpenError, Source, check_guest_range};

/// The most that a compressed kernel may decompress to, in bytes.
const DECOMPRESSED_LIMIT: u64 = 512 << 20;

/// How many leading bytes are read to recognise the format: the s390 magic at
/// 0x10008 is the furthest.
const PREFIX: usize = 0x11000;

/// A kernel that has been recognised and whose headers have been checked.
///
/// The file stays open and is read again by each `load`; a compressed one is
/// held decompressed, so drop the value once the guest is loaded.
#[derive(Debug)]
pub struct KernelImage {
    name: String,
    source: Source,
    wrapper: Option<Wrapper>,
    format: Format,
}

/// What a kernel image was wrapped in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrapper {
    Compressed(Compression),
    Zboot(Compression),
}

/// The format of a kernel image, with the header fields that its loader needs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Format {
    /// x86 bzImage.
    BzImage(BzImage),
    /// ELF, such as vmlinux.
    Elf(Elf),
    /// arm64 `Image`.
    Arm64(Arm64Image),
    /// riscv `Image`.
    Riscv(RiscvImage),
    /// s390 `bzImage`.
    S390(S390Image),
}

impl Format {
    /// What the field calls the format.
    pub fn name(&self) -> &'static str {
        match self {
            Format::BzImage(_) => "bzImage",
            Format::Elf(_) => "ELF",
            Format::Arm64(_) => "Image",
            Format::Riscv(_) => "Image",
            Format::S390(_) => "bzImage",
        }
    }
}

/// Where a kernel was put in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Its first byte.
    pub start: GuestAddress,
    /// The first byte after everything that the kernel uses before it knows
    /// its memory map: bss, decompression buffer. Nothing else may be placed
    /// below.
    pub end: GuestAddress,
}

/// Why a kernel can't be used. Every message is one line and begins with the
/// image's name.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {reason}")]
pub struct Error {
    name: String,
    reason: Reason,
}

/// The part of an [`Error`] after the image's name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The file can't be opened or holds nothing.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// The file can't be read.
    #[error("reading it failed: {0}")]
    Read(#[from] std::io::Error),
    /// No known kernel format.
    #[error(
        "not a kernel in a known format (x86 bzImage, ELF vmlinux, arm64 or riscv Image, \
         s390 bzImage; gzip, zstd, xz or EFI zboot around one)"
    )]
    Unknown,
    /// The header promises more than the file holds.
    #[error("truncated {format}: {what}")]
    Truncated {
        /// The format that was recognised.
        format: &'static str,
        /// What is missing.
        what: String,
    },
    /// The header contradicts itself.
    #[error("damaged {format}: {what}")]
    Damaged {
        /// The format that was recognised.
        format: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A real kernel of a kind that can't be booted here.
    #[error("{0}")]
    Unsupported(String),
    /// The payload can't be decompressed.
    #[error("{0}")]
    Compression(#[from] compress::Error),
    /// A compressed image inside a compressed image.
    #[error("compressed more than once")]
    Nested,
    /// A kernel for another architecture.
    #[error("{found}, but this VM is {wanted}: give a kernel for {wanted}")]
    WrongMachine {
        /// What the image is.
        found: String,
        /// What the VM runs.
        wanted: Machine,
    },
    /// The image does not fit where it has to go.
    #[error("does not fit: it needs {len:#x} bytes at guest address {addr:#x}: {why}")]
    Fit {
        /// Where it was to be put.
        addr: u64,
        /// How much it needs there, in bytes.
        len: u64,
        /// What is in the way.
        why: CopyError,
    },
}

impl Error {
    /// What is wrong, without the image's name.
    pub fn reason(&self) -> &Reason {
        &self.reason
    }
}

impl KernelImage {
    /// Opens and recognises a kernel.
    pub fn open(path: impl AsRef<Path>) -> Result<KernelImage, Error> {
        let path = path.as_ref();
        let name = path.display().to_string();
        match Source::open(path) {
            Ok(source) => KernelImage::from_source(name, source),
            Err(e) => Err(Error {
                name,
                reason: e.into(),
            }),
        }
    }

    /// Recognises a kernel that is in memory; `name` is for messages.
    pub fn from_bytes(name: impl Into<String>, bytes: Vec<u8>) -> Result<KernelImage, Error> {
        KernelImage::from_source(name.into(), Source::from_bytes(bytes))
    }

    fn from_source(name: String, source: Source) -> Result<KernelImage, Error> {
        match unwrap_and_parse(source) {
            Ok((source, wrapper, format)) => Ok(KernelImage {
                name,
                source,
                wrapper,
                format,
            }),
            Err(reason) => Err(Error { name, reason }),
        }
    }

    /// The name that messages use: the path that it was opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The format, with its header fields.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// The guest architecture that it is for.
    pub fn machine(&self) -> Machine {
        match &self.format {
            Format::BzImage(image) => image.machine(),
            Format::Elf(elf) => elf.machine,
            Format::Arm64(_) => Machine::Aarch64,
            Format::Riscv(_) => Machine::Riscv64,
            Format::S390(_) => Machine::S390x,
        }
    }

    /// Checks that it is for `wanted`; the error says what it is instead.
    pub fn require(&self, wanted: Machine) -> Result<(), Error> {
        if self.machine() == wanted {
            return Ok(());
        }
        Err(self.error(Reason::WrongMachine {
            found: self.describe(),
            wanted,
        }))
    }

    /// An error about this kernel, for loaders that find something in its
    /// header that they can't serve.
    pub fn unsupported(&self, why: impl Into<String>) -> Error {
        self.error(Reason::Unsupported(why.into()))
    }

    /// Size of the (decompressed) image in bytes.
    pub fn size(&self) -> u64 {
        self.source.len()
    }

    /// The release that `uname -r` would print, when the image tells. Only an x86
    /// bzImage has it in its header; the others are searched for their banner.
    pub fn release(&self) -> Option<String> {
        match &self.format {
            Format::BzImage(image) => image.release().map(str::to_owned),
            Format::S390(image) => image.release.clone(),
            Format::Elf(_) | Format::Arm64(_) | Format::Riscv(_) => {
                fields::find_banner(&self.source)
            }
        }
    }

    /// One line for people, such as `x86_64 bzImage, Linux 6.12.57+deb13-amd64`.
    pub fn describe(&self) -> String {
        let mut text = format!("{} {}", self.machine(), self.format.name());
        match self.wrapper {
            Some(Wrapper::Compressed(how)) => text.push_str(&format!(" ({how})")),
            Some(Wrapper::Zboot(how)) => text.push_str(&format!(" (EFI zboot, {how})")),
            None => {}
        }
        if let Some(release) = self.release() {
            text.push_str(&format!(", Linux {release}"));
        }
        text
    }

    /// The bytes that [`load_flat`](Self::load_flat) needs from its address on:
    /// the image with what it uses behind itself. For ELF, from the lowest
    /// segment to the end of the highest.
    pub fn footprint(&self) -> u64 {
        match &self.format {
            Format::BzImage(image) => image.footprint(),
            Format::Elf(elf) => elf.high.saturating_sub(elf.low),
            Format::Arm64(image) => image.footprint(self.size()),
            Format::Riscv(image) => image.footprint(self.size()),
            Format::S390(_) => self.size(),
        }
    }

    /// Copies a flat image to `addr`: an arm64, riscv or s390 image from its
    /// first byte, a bzImage from its protected-mode part. The caller adds what
    /// the boot protocol asks for (`text_offset`, alignment). All of
    /// [`footprint`](Self::footprint) must be guest memory.
    pub fn load_flat<M>(&self, mem: &M, addr: GuestAddress) -> Result<Loaded, Error>
    where
        M: GuestMemoryBackend,
    {
        let (offset, len) = match &self.format {
            Format::BzImage(image) => (image.kernel_offset, image.kernel_len),
            Format::Elf(_) => return Err(self.unsupported("ELF is loaded by its segments")),
            Format::Arm64(_) | Format::Riscv(_) | Format::S390(_) => (0, self.size()),
        };
        let footprint = self.footprint().max(len);
        self.check_fit(mem, addr, footprint)?;
        self.source
            .copy_to_guest(mem, addr, offset, len)
            .map_err(|why| self.misfit(addr, footprint, why))?;
        Ok(Loaded {
            start: addr,
            end: GuestAddress(addr.0.saturating_add(footprint)),
        })
    }

    /// Copies an ELF image's segments to their physical addresses plus `bias`
    /// (wrapping, so that a kernel may be moved down), and zeroes what follows
    /// each segment's file part. Nothing is written unless all of it fits.
    pub fn load_elf<M>(&self, mem: &M, bias: u64) -> Result<Loaded, Error>
    where
        M: GuestMemoryBackend,
    {
        let Format::Elf(elf) = &self.format else {
            return Err(self.unsupported(format!("{} is not ELF", self.describe())));
        };
        let place = |segment: &Segment| GuestAddress(segment.paddr.wrapping_add(bias));
        for segment in &elf.segments {
            self.check_fit(mem, place(segment), segment.memsz)?;
        }
        for segment in &elf.segments {
            let addr = place(segment);
            self.source
                .copy_to_guest(mem, addr, segment.offset, segment.filesz)
                .and_then(|()| zero(mem, addr, segment.filesz, segment.memsz))
                .map_err(|why| self.misfit(addr, segment.memsz, why))?;
        }
        Ok(Loaded {
            start: GuestAddress(elf.low.wrapping_add(bias)),
            end: GuestAddress(elf.high.wrapping_add(bias)),
        })
    }

    fn check_fit<M>(&self, mem: &M, addr: GuestAddress, len: u64) -> Result<(), Error>
    where
        M: GuestMemoryBackend,
    {
        check_guest_range(mem, addr, len)
            .map(|_| ())
            .map_err(|why| self.misfit(addr, len, why))
    }

    fn misfit(&self, addr: GuestAddress, len: u64, why: CopyError) -> Error {
        self.error(Reason::Fit {
            addr: addr.0,
            len,
            why,
        })
    }

    fn error(&self, reason: Reason) -> Error {
        Error {
            name: self.name.clone(),
            reason,
        }
    }
}

impl fmt::Display for KernelImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.describe())
    }
}

/// Zeroes `addr + from .. addr + to`.
fn zero<M>(mem: &M, addr: GuestAddress, from: u64, to: u64) -> Result<(), CopyError>
where
    M: GuestMemoryBackend,
{
    let (Some(start), Some(len)) = (addr.checked_add(from), to.checked_sub(from)) else {
        return Err(CopyError::Destination {
            addr: addr.0,
            len: to,
        });
    };
    let len = check_guest_range(mem, start, len)?;
    for slice in GuestMemoryBackend::get_slices(mem, start, len) {
        use vm_memory::VolatileMemory;
        let slice = slice.map_err(CopyError::Read)?;
        let zeros = [0u8; 4096];
        let mut at = 0;
        while at < slice.len() {
            let n = zeros.len().min(slice.len() - at);
            let part = slice
                .get_slice(at, n)
                .map_err(|e| CopyError::Read(vm_memory::GuestMemoryError::from(e)))?;
            part.copy_from(&zeros[..n]);
            at += n;
        }
    }
    Ok(())
}

fn unwrap_and_parse(source: Source) -> Result<(Source, Option<Wrapper>, Format), Reason> {
    let start = source.prefix(PREFIX)?;
    if start.is_empty() {
        return Err(OpenError::Empty.into());
    }
    let (inner, wrapper) = if let Some(zboot) = zboot::parse(&start, source.len())? {
        let reader = std::io::Read::take(source.reader(zboot.offset), zboot.len);
        let bytes = zboot.compression.decompress(reader, DECOMPRESSED_LIMIT)?;
        (Source::from_bytes(bytes), Wrapper::Zboot(zboot.compression))
    } else if let Some(how) = Compression::detect(&start) {
        let bytes = how.decompress(source.reader(0), DECOMPRESSED_LIMIT)?;
        (Source::from_bytes(bytes), Wrapper::Compressed(how))
    } else {
        let format = parse(&start, &source)?;
        return Ok((source, None, format));
    };
    drop(source);
    let start = inner.prefix(PREFIX)?;
    if start.is_empty() {
        return Err(OpenError::Empty.into());
    }
    if Compression::detect(&start).is_some() || zboot::is_zboot(&start) {
        return Err(Reason::Nested);
    }
    let format = parse(&start, &inner)?;
    Ok((inner, Some(wrapper), format))
}

/// Recognises an image that is not compressed by its first bytes.
fn parse(start: &[u8], source: &Source) -> Result<Format, Reason> {
    if start.starts_with(b"\x7fELF") {
        elf::parse(source).map(Format::Elf)
    } else if arm64::is_arm64(start) {
        arm64::parse(start, source.len()).map(Format::Arm64)
    } else if riscv::is_riscv(start) {
        riscv::parse(start, source.len()).map(Format::Riscv)
    } else if bzimage::is_bzimage(start) {
        bzimage::parse(source).map(Format::BzImage)
    } else if s390::is_s390(start) {
        s390::parse(source).map(Format::S390)
    } else if start.starts_with(b"MZ") {
        Err(Reason::Unsupported(
            "an EFI application without a kernel header that is known: give the kernel itself"
                .to_owned(),
        ))
    } else {
        Err(Reason::Unknown)
    }
}

#[cfg(test)]
mod tests;
