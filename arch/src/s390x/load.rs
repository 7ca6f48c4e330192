//! Loads a kernel, its initrd and the command line into guest memory
//! (arch/s390/boot/head.S, arch/s390/include/asm/setup.h).

use crossvisor_boot::kernel::{Format, S390Image};
use crossvisor_boot::{KernelImage, Machine as Target};
use crossvisor_vmm::arch::RegisterState;
use crossvisor_vmm::config::BootImages;
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::Plan;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout::SEGMENT;
use super::registers::{PSW_ADDRESS, PSW_MASK};
use crate::shared::initrd::InitrdBytes;

/// Fields of the parameter area, from its start.
const INITRD: u64 = 0x08;
const INITRD_SIZE: u64 = 0x10;
const CMDLINE_SIZE: u64 = 0x30;

/// The size of the command line where the image does not tell it, as it was
/// before the field came (ARCH_COMMAND_LINE_SIZE).
const CMDLINE_DEFAULT: u64 = 896;
/// The most that is believed of an image.
const CMDLINE_MOST: u64 = 64 << 10;

/// Where the initrd goes when there is room: the kernel decompresses itself
/// below and need not move it.
const INITRD_USUAL: u64 = 32 << 20;

/// PSW: 64-bit addressing, interruptions disabled, DAT off.
const PSW_64: u64 = 0x0000_0001_8000_0000;

/// A vCPU's registers when it starts with this PSW and nothing else set.
pub fn start(mask: u64, address: u64) -> RegisterState {
    RegisterState(vec![(PSW_MASK, mask), (PSW_ADDRESS, address)])
}

/// Writes to each segment of fresh guest memory, which stays as it is.
///
/// # Errors
/// The plan has memory that is not there.
pub fn touch(plan: &Plan, memory: &GuestMemoryMmap) -> Result<()> {
    let segments = plan.memory.iter().flat_map(|range| {
        let end = range.base.saturating_add(range.size);
        (range.base..end).step_by(SEGMENT as usize)
    });
    for segment in segments {
        memory
            .write_obj(0_u8, GuestAddress(segment))
            .map_err(|error| Error::Boot(format!("guest memory: {error}")))?;
    }
    Ok(())
}

/// Loads `images` and returns the boot vCPU's registers.
///
/// # Errors
/// An image cannot be read, is of a wrong kind, or does not fit; names it.
pub fn load(plan: &Plan, images: &BootImages, memory: &GuestMemoryMmap) -> Result<RegisterState> {
    let boot = |error: &dyn std::fmt::Display| Error::Boot(error.to_string());
    let kernel = KernelImage::open(&images.kernel).map_err(|error| boot(&error))?;
    kernel
        .require(Target::S390x)
        .map_err(|error| boot(&error))?;
    let highest = match kernel.format() {
        Format::Elf(elf) => elf.high,
        _ => kernel.footprint(),
    };
    if highest > plan.memory_size() {
        return Err(too_small(plan, "this kernel", highest));
    }
    let loaded = match kernel.format() {
        Format::S390(_) => kernel.load_flat(memory, GuestAddress(0)),
        Format::Elf(_) => kernel.load_elf(memory, 0),
        _ => {
            let why = kernel.unsupported(format!(
                "{}: an s390x machine boots a bzImage (arch/s390/boot/bzImage)",
                kernel.describe()
            ));
            return Err(boot(&why));
        }
    };
    let loaded = loaded.map_err(|error| boot(&error))?;
    let mut mark = [0; S390Image::MARK.len()];
    let marked = memory.read_slice(&mut mark, GuestAddress(S390Image::MARK_AT));
    if marked.is_err() || mark != *S390Image::MARK {
        // Such as the `vmlinux` that is in a bzImage, compressed.
        return Err(boot(&kernel.unsupported(
            "it does not begin as a kernel that is loaded does (arch/s390/boot/head.S): boot the \
             bzImage (arch/s390/boot/bzImage)",
        )));
    }
    let put = |offset: u64, bytes: &[u8]| {
        memory
            .write_slice(bytes, GuestAddress(S390Image::PARMAREA + offset))
            .map_err(|error| Error::Boot(format!("the parameter area does not fit: {error}")))
    };
    if let Some(initrd) = &images.initrd {
        let initrd = InitrdBytes::open(initrd)?;
        let at = place_initrd(plan, loaded.end.0, initrd.len())?;
        initrd.load(memory, GuestAddress(at))?;
        put(INITRD, &at.to_be_bytes())?;
        put(INITRD_SIZE, &initrd.len().to_be_bytes())?;
    }
    let mut longest = [0; 8];
    memory
        .read_slice(
            &mut longest,
            GuestAddress(S390Image::PARMAREA + CMDLINE_SIZE),
        )
        .map_err(|error| Error::Boot(format!("the parameter area does not fit: {error}")))?;
    let longest = match u64::from_be_bytes(longest) {
        size @ 1..=CMDLINE_MOST => size,
        _ => CMDLINE_DEFAULT,
    };
    let line = plan.cmdline.as_bytes();
    if line.len() as u64 >= longest {
        return Err(Error::config(
            "--cmdline",
            format!(
                "{} bytes are too long: {} takes at most {}",
                line.len(),
                kernel.name(),
                longest - 1
            ),
        ));
    }
    let offset = S390Image::COMMAND_LINE - S390Image::PARMAREA;
    put(offset, &[line, &[0]].concat())?;
    Ok(start(PSW_64, S390Image::ENTRY))
}

/// `what` takes `need` bytes, and there are less.
fn too_small(plan: &Plan, what: &str, need: u64) -> Error {
    Error::config(
        "--memory",
        format!(
            "{} MiB do not hold {what}: {} MiB are needed before the kernel starts",
            plan.memory_size() >> 20,
            need.div_ceil(1 << 20)
        ),
    )
}

/// Where the initrd goes: behind the kernel on a segment of its own, and far
/// enough behind if there is room.
fn place_initrd(plan: &Plan, kernel_end: u64, len: u64) -> Result<u64> {
    let first = kernel_end.next_multiple_of(SEGMENT);
    let fits = |at: &u64| {
        at.checked_add(len)
            .is_some_and(|end| end <= plan.memory_size())
    };
    [first.max(INITRD_USUAL), first]
        .into_iter()
        .find(fits)
        .ok_or_else(|| {
            let need = first.saturating_add(len);
            too_small(plan, "this kernel and its initrd", need)
        })
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
