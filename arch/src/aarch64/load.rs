//! Loads a kernel, its initrd and the device tree into guest memory
//! (Documentation/arch/arm64/booting.rst).
//!
//! From the start of RAM: the kernel at its `text_offset`, the device tree in a
//! block of 2 MiB of its own, the initrd. All of it is in the first piece of
//! RAM, from 1 GiB up, so what the boot protocol says of the distance between
//! kernel and initrd holds up to 31 GiB of both.

use crossvisor_boot::kernel::{Arm64Image, Format, PageSize};
use crossvisor_boot::{KernelImage, Machine as Target};
use crossvisor_vmm::arch::{Host, RegisterState};
use crossvisor_vmm::config::BootImages;
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::fdt::{self, Contents, Loading};
use crate::initrd::InitrdBytes;
use crate::random;

/// The largest device tree that the kernel maps, in bytes; its place is aligned
/// to as much, so that one block maps it.
const FDT_MAX: u64 = 2 << 20;

/// The initrd starts on a page of any kernel's page size.
const INITRD_ALIGNMENT: u64 = 64 << 10;

/// Seed of the random number generator, in bytes: what it takes up whole.
const RNG_SEED: usize = 64;

/// PSTATE at the kernel's entry: EL1 with its own stack pointer (EL1h), and D,
/// A, I and F masked.
pub const PSTATE: u64 = 0x3c5;

/// Where things go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Places {
    kernel: u64,
    fdt: u64,
    initrd: Option<Range>,
    /// The first byte after everything.
    end: u64,
}

/// Loads `images` and returns the boot vCPU's registers.
///
/// # Errors
/// An image cannot be read, is of a wrong kind, or does not fit; names it.
pub fn load(
    contents: &Contents<'_>,
    host: &Host,
    images: &BootImages,
    memory: &GuestMemoryMmap,
) -> Result<RegisterState> {
    let boot = |error: &dyn std::fmt::Display| Error::Boot(error.to_string());
    let kernel = KernelImage::open(&images.kernel).map_err(|error| boot(&error))?;
    kernel
        .require(Target::Aarch64)
        .map_err(|error| boot(&error))?;
    let Format::Arm64(header) = kernel.format() else {
        let why = kernel.unsupported(format!(
            "{}: an aarch64 machine boots an Image (arch/arm64/boot/Image), as it is, compressed, \
             or as an EFI zboot image",
            kernel.describe()
        ));
        return Err(boot(&why));
    };
    check_page_size(header, host).map_err(|why| boot(&kernel.unsupported(why)))?;
    let initrd = images.initrd.as_ref().map(InitrdBytes::open).transpose()?;
    let ram = contents.plan.memory.first().copied();
    let ram = ram.ok_or_else(|| Error::config("--memory", "a guest needs some memory"))?;
    let places = place(
        ram,
        header,
        kernel.footprint(),
        initrd.as_ref().map(InitrdBytes::len),
    )?;
    kernel
        .load_flat(memory, GuestAddress(places.kernel))
        .map_err(|error| boot(&error))?;
    if let (Some(initrd), Some(range)) = (&initrd, places.initrd) {
        initrd.load(memory, GuestAddress(range.base))?;
    }
    let tree = fdt::build(contents, &seeded(places.initrd)?)?;
    if tree.len() as u64 > FDT_MAX {
        return Err(Error::Boot(format!(
            "the device tree of {} bytes is larger than the {FDT_MAX} that a kernel maps",
            tree.len()
        )));
    }
    memory
        .write_slice(&tree, GuestAddress(places.fdt))
        .map_err(|error| Error::Boot(format!("the device tree does not fit: {error}")))?;
    Ok(RegisterState(vec![
        ("x0", places.fdt),
        ("x1", 0),
        ("x2", 0),
        ("x3", 0),
        ("pc", places.kernel),
        ("pstate", PSTATE),
    ]))
}

/// A kernel whose page size the CPU does not have stops without a word.
fn check_page_size(header: &Arm64Image, host: &Host) -> std::result::Result<(), String> {
    let (capability, size) = match header.page_size {
        PageSize::Unknown => return Ok(()),
        PageSize::K4 => ("TGran4", "4K"),
        PageSize::K16 => ("TGran16", "16K"),
        PageSize::K64 => ("TGran64", "64K"),
    };
    match host.has(capability) {
        true => Ok(()),
        false => Err(format!(
            "it is built for {size} pages, which this host's CPU does not have: give a kernel \
             with another page size"
        )),
    }
}

fn place(ram: Range, header: &Arm64Image, footprint: u64, initrd: Option<u64>) -> Result<Places> {
    let too_large = || {
        Error::config(
            "--memory",
            "the kernel and its initrd are larger than any memory",
        )
    };
    let align = |address: u64, to: u64| address.checked_next_multiple_of(to).ok_or_else(too_large);
    let add = |a: u64, b: u64| a.checked_add(b).ok_or_else(too_large);

    let base = align(ram.base, Arm64Image::ALIGNMENT)?;
    let kernel = add(base, header.text_offset)?;
    let fdt = align(add(kernel, footprint)?, FDT_MAX)?;
    let after_fdt = add(fdt, FDT_MAX)?;
    let initrd = initrd
        .map(|len| Ok::<_, Error>(Range::new(align(after_fdt, INITRD_ALIGNMENT)?, len)))
        .transpose()?;
    let end = match initrd {
        Some(range) => add(range.base, range.size)?,
        None => after_fdt,
    };
    if end > ram.end() {
        let need = (end - ram.base).div_ceil(1 << 20);
        let with = if initrd.is_some() {
            " and its initrd"
        } else {
            ""
        };
        return Err(Error::config(
            "--memory",
            format!(
                "{} MiB do not hold this kernel{with}: they take {need} MiB before the kernel \
                 starts",
                ram.size >> 20
            ),
        ));
    }
    Ok(Places {
        kernel,
        fdt,
        initrd,
        end,
    })
}

/// What loading adds to the device tree.
fn seeded(initrd: Option<Range>) -> Result<Loading> {
    let mut seeds = [0; 8 + RNG_SEED];
    random::fill(&mut seeds)?;
    let (kaslr, rng) = seeds.split_at(8);
    Ok(Loading {
        initrd,
        kaslr_seed: <[u8; 8]>::try_from(kaslr).ok().map(u64::from_le_bytes),
        rng_seed: rng.to_vec(),
    })
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
