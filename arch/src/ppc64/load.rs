//! Loads a kernel, its initrd, RTAS and the device tree into guest memory, as
//! firmware leaves them for a client that is entered by a flattened device tree
//! (Documentation/arch/powerpc/booting.rst).
//!
//! From address 0: the kernel, which must be there for its exception vectors;
//! then RTAS, the device tree and the initrd, each on a page of any kernel's
//! page size.

use crossvisor_boot::kernel::Format;
use crossvisor_boot::{KernelImage, Machine as Target};
use crossvisor_vmm::arch::RegisterState;
use crossvisor_vmm::config::BootImages;
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::fdt::{self, Contents, Loading};
use super::rtas;
use crate::shared::initrd::InitrdBytes;
use crate::shared::random;

/// The largest page of a guest, in bytes.
const PAGE: u64 = 64 << 10;
/// Room for the device tree, in bytes: 1 KiB for each of 2048 vCPUs is the most
/// of it.
const FDT_MAX: u64 = 4 << 20;
/// RTAS runs in 32-bit mode.
const RTAS_LIMIT: u64 = 1 << 32;
/// Seed of the random number generator, in bytes: what it takes up whole.
const RNG_SEED: usize = 64;

/// MSR.SF: 64-bit mode.
const MSR_SF: u64 = 1 << 63;
/// MSR.ME: machine checks are taken.
const MSR_ME: u64 = 1 << 12;
/// MSR at the entry of a kernel or a vCPU: 64-bit, big-endian, without
/// translation. A little-endian kernel switches by itself.
pub const MSR: u64 = MSR_SF | MSR_ME;

/// Where things go after the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Places {
    rtas: Range,
    fdt: u64,
    initrd: Option<Range>,
}

/// Loads `images` and returns the boot vCPU's registers.
///
/// # Errors
/// An image cannot be read, is of a wrong kind, or does not fit; names it.
pub fn load(
    contents: &Contents<'_>,
    images: &BootImages,
    memory: &GuestMemoryMmap,
) -> Result<RegisterState> {
    let boot = |error: &dyn std::fmt::Display| Error::Boot(error.to_string());
    let kernel = KernelImage::open(&images.kernel).map_err(|error| boot(&error))?;
    // A pseries machine enters kernels of either byte order.
    if kernel.machine() != Target::Ppc64 {
        kernel
            .require(Target::Ppc64le)
            .map_err(|error| boot(&error))?;
    }
    let Format::Elf(elf) = kernel.format() else {
        let why = kernel.unsupported(format!(
            "{}: a ppc64le machine boots an ELF vmlinux, as it is or compressed",
            kernel.describe()
        ));
        return Err(boot(&why));
    };
    let entry = match elf.entry_paddr() {
        Some(entry) if elf.low == 0 => entry,
        _ => {
            let why = kernel.unsupported(format!(
                "it is linked to run from {:#x}: a ppc64le machine enters a kernel at address 0, \
                 where its exception vectors are",
                elf.low
            ));
            return Err(boot(&why));
        }
    };
    let initrd = images.initrd.as_ref().map(InitrdBytes::open).transpose()?;
    let ram = contents.plan.memory.first().copied();
    let ram = ram.ok_or_else(|| Error::config("--memory", "a guest needs some memory"))?;
    let places = place(ram, elf.high, initrd.as_ref().map(InitrdBytes::len))?;
    kernel.load_elf(memory, 0).map_err(|error| boot(&error))?;
    let write = |bytes: &[u8], address| {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| Error::Boot(format!("{address:#x} is not in RAM: {error}")))
    };
    write(&rtas::stub(), places.rtas.base)?;
    if let (Some(initrd), Some(range)) = (&initrd, places.initrd) {
        initrd.load(memory, GuestAddress(range.base))?;
    }
    let mut rng_seed = vec![0; RNG_SEED];
    random::fill(&mut rng_seed)?;
    let loading = Loading {
        initrd: places.initrd,
        rtas: Some(places.rtas),
        rng_seed,
    };
    let tree = fdt::build(contents, &loading)?;
    if tree.len() as u64 > FDT_MAX {
        return Err(Error::Boot(format!(
            "the device tree of {} bytes is larger than the {FDT_MAX} that there is room for",
            tree.len()
        )));
    }
    write(&tree, places.fdt)?;
    Ok(entry_state(entry, places.fdt))
}

/// Registers of a vCPU that begins at `pc` with `argument`: the device tree for
/// the boot vCPU, what start-cpu was given for the others.
pub fn entry_state(pc: u64, argument: u64) -> RegisterState {
    // r5 is where Open Firmware would be.
    RegisterState(vec![("pc", pc), ("msr", MSR), ("r3", argument), ("r5", 0)])
}

fn place(ram: Range, kernel_end: u64, initrd: Option<u64>) -> Result<Places> {
    let too_large = || {
        Error::config(
            "--memory",
            "the kernel and its initrd are larger than any memory",
        )
    };
    let align = |address: u64| address.checked_next_multiple_of(PAGE).ok_or_else(too_large);
    let add = |a: u64, b: u64| a.checked_add(b).ok_or_else(too_large);

    let rtas = Range::new(align(kernel_end)?, PAGE);
    let fdt = add(rtas.base, rtas.size)?;
    let after_fdt = add(fdt, FDT_MAX)?;
    let initrd = initrd.map(|len| Range::new(after_fdt, len));
    let end = match initrd {
        Some(range) => add(range.base, range.size)?,
        None => after_fdt,
    };
    if end > ram.end() || rtas.end() > RTAS_LIMIT {
        let need = end.div_ceil(1 << 20);
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
    Ok(Places { rtas, fdt, initrd })
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
