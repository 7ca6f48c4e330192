//! Loads a kernel, its initrd and the device tree into guest memory
//! (Documentation/arch/riscv/boot.rst).

use crossvisor_boot::kernel::{Format, RiscvImage};
use crossvisor_boot::{KernelImage, Machine as Target};
use crossvisor_vmm::arch::RegisterState;
use crossvisor_vmm::config::BootImages;
use crossvisor_vmm::error::{Error, Result};
use vm_memory::GuestMemoryMmap;

use super::fdt::{self, Contents};
use crate::shared::image::{self, Header};

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
    kernel
        .require(Target::Riscv64)
        .map_err(|error| boot(&error))?;
    let Format::Riscv(header) = kernel.format() else {
        let why = kernel.unsupported(format!(
            "{}: a riscv64 machine boots an Image (arch/riscv/boot/Image), as it is, compressed, \
             or as an EFI zboot image",
            kernel.describe()
        ));
        return Err(boot(&why));
    };
    let ram = contents.plan.memory.first().copied();
    let ram = ram.ok_or_else(|| Error::config("--memory", "a guest needs some memory"))?;
    let header = Header {
        alignment: RiscvImage::ALIGNMENT,
        text_offset: header.text_offset,
    };
    let places = image::load(&kernel, header, images, ram, memory, |loading| {
        fdt::build(contents, loading)
    })?;
    Ok(entry(places.kernel, places.fdt))
}

/// The boot vCPU's registers: in supervisor mode, with the hart's number and
/// the device tree's address.
pub fn entry(kernel: u64, fdt: u64) -> RegisterState {
    RegisterState(vec![("a0", 0), ("a1", fdt), ("pc", kernel), ("mode", 1)])
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
