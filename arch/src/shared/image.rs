//! Loading of kernels that are an `Image`: a flat file which goes to the start
//! of RAM, told by a register where its device tree is.
//!
//! From the start of RAM: the kernel at its `text_offset`, the device tree in a
//! block of 2 MiB of its own, the initrd.

use crossvisor_boot::KernelImage;
use crossvisor_vmm::config::BootImages;
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::fdt::Loading;
use super::initrd::InitrdBytes;
use super::random;

/// The largest device tree that such kernels map, in bytes; its place is
/// aligned to as much, so that one block maps it.
pub const FDT_MAX: u64 = 2 << 20;

/// The initrd starts on a page of any kernel's page size.
const INITRD_ALIGNMENT: u64 = 64 << 10;

/// Seed of the random number generator, in bytes: what it takes up whole.
pub const RNG_SEED: usize = 64;

/// Where things go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// The kernel's first byte.
    pub kernel: u64,
    /// The device tree.
    pub fdt: u64,
    /// The initrd.
    pub initrd: Option<Range>,
    /// The first byte after everything.
    pub end: u64,
}

/// What a kernel's header says of its place.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// What `text_offset` is counted from is a multiple of this, in bytes.
    pub alignment: u64,
    /// Offset of the kernel, in bytes.
    pub text_offset: u64,
}

/// Loads `kernel`, with the initrd of `images` and the tree that `describe`
/// builds, into `ram`.
///
/// # Errors
/// An image cannot be read or does not fit; names it.
pub fn load(
    kernel: &KernelImage,
    header: Header,
    images: &BootImages,
    ram: Range,
    memory: &GuestMemoryMmap,
    describe: impl FnOnce(&Loading) -> Result<Vec<u8>>,
) -> Result<Places> {
    let initrd = images.initrd.as_ref().map(InitrdBytes::open).transpose()?;
    let len = initrd.as_ref().map(InitrdBytes::len);
    let places = place(ram, header, kernel.footprint(), len)?;
    kernel
        .load_flat(memory, GuestAddress(places.kernel))
        .map_err(|error| Error::Boot(error.to_string()))?;
    if let (Some(initrd), Some(range)) = (&initrd, places.initrd) {
        initrd.load(memory, GuestAddress(range.base))?;
    }
    let tree = describe(&seeded(places.initrd)?)?;
    if tree.len() as u64 > FDT_MAX {
        return Err(Error::Boot(format!(
            "the device tree of {} bytes is larger than the {FDT_MAX} that a kernel maps",
            tree.len()
        )));
    }
    memory
        .write_slice(&tree, GuestAddress(places.fdt))
        .map_err(|error| Error::Boot(format!("the device tree does not fit: {error}")))?;
    Ok(places)
}

fn place(ram: Range, header: Header, footprint: u64, initrd: Option<u64>) -> Result<Places> {
    let too_large = || {
        Error::config(
            "--memory",
            "the kernel and its initrd are larger than any memory",
        )
    };
    let align = |address: u64, to: u64| address.checked_next_multiple_of(to).ok_or_else(too_large);
    let add = |a: u64, b: u64| a.checked_add(b).ok_or_else(too_large);

    let base = align(ram.base, header.alignment)?;
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
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn seeds_differ() {
        let seed = || seeded(None).unwrap();
        let (first, second) = (seed(), seed());
        assert_eq!(first.rng_seed.len(), RNG_SEED);
        assert_ne!(first.rng_seed, second.rng_seed);
        assert_ne!(first.kaslr_seed, second.kaslr_seed);
    }

    #[test]
    fn places_stay_in_order_for_any_header() {
        let ram = Range::new(1 << 30, 1 << 40);
        for text_offset in [0, 0x8_0000, 0x1f_ffff, 2 * MIB] {
            let header = Header {
                alignment: 2 * MIB,
                text_offset,
            };
            for footprint in [1, MIB, 2 * MIB, 40 * MIB + 1, 1 << 36] {
                for initrd in [None, Some(0), Some(1), Some(1 << 33)] {
                    let places = place(ram, header, footprint, initrd).unwrap();
                    assert_eq!((places.kernel - text_offset) % (2 * MIB), 0);
                    assert!(places.kernel + footprint <= places.fdt);
                    assert_eq!(places.fdt % (2 * MIB), 0);
                    if let Some(range) = places.initrd {
                        assert!(places.fdt + FDT_MAX <= range.base);
                    }
                    assert!(places.end <= ram.end());
                    assert!(place(ram, header, u64::MAX - 5, initrd).is_err());
                    assert!(place(ram, header, footprint, Some(u64::MAX)).is_err());
                }
            }
        }
    }
}
