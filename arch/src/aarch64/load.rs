//! Loads a kernel, its initrd and the device tree into guest memory
//! (Documentation/arch/arm64/booting.rst).
//!
//! All of it is in the first piece of RAM, from 1 GiB up, so what the boot
//! protocol says of the distance between kernel and initrd holds up to 31 GiB
//! of both.

use crossvisor_boot::kernel::{Arm64Image, Format, PageSize};
use crossvisor_boot::{KernelImage, Machine as Target};
use crossvisor_vmm::arch::{Host, RegisterState};
use crossvisor_vmm::config::BootImages;
use crossvisor_vmm::error::{Error, Result};
use vm_memory::GuestMemoryMmap;

use super::fdt::{self, Contents};
use crate::shared::image::{self, Header};

/// PSTATE at the kernel's entry: EL1 with its own stack pointer (EL1h), and D,
/// A, I and F masked.
pub const PSTATE: u64 = 0x3c5;

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
    let ram = contents.plan.memory.first().copied();
    let ram = ram.ok_or_else(|| Error::config("--memory", "a guest needs some memory"))?;
    let header = Header {
        alignment: Arm64Image::ALIGNMENT,
        text_offset: header.text_offset,
    };
    let places = image::load(&kernel, header, images, ram, memory, |loading| {
        fdt::build(contents, loading)
    })?;
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

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
