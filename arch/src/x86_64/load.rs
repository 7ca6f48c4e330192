//! Puts kernel, initrd, command line and boot parameters into guest memory.
//!
//! - bzImage: the 64-bit boot protocol (Documentation/arch/x86/boot.rst and
//!   zero-page.rst).
//! - ELF with a PVH note: the x86/HVM direct boot ABI
//!   (xen/include/public/arch-x86/hvm/start_info.h), as Xen and QEMU boot
//!   vmlinux, and other systems than Linux.
//! - ELF of a Linux without one: the 64-bit boot protocol at the ELF entry
//!   point. Linux's `startup_64` takes the same state there as from its own
//!   decompressor, which jumps to it in just this way.

use crossvisor_boot::KernelImage;
use crossvisor_boot::kernel::{BzImage, Elf, Format};
use crossvisor_vmm::arch::RegisterState;
use crossvisor_vmm::config::BootImages;
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::{Plan, Range};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::gdt;
use super::layout;
use crate::shared::initrd::InitrdBytes;

const PAGE: u64 = 4096;

/// The longest command line that Linux takes, without the NUL
/// (`COMMAND_LINE_SIZE`), when the kernel does not tell.
const CMDLINE_MAX: u64 = 2047;

/// The highest address of an initrd when the kernel does not tell: ELF has no
/// setup header. 32-bit fields hold it, and Linux's default is below 2 GiB.
const INITRD_MAX: u64 = 0x7fff_ffff;

// boot_params (zero-page.rst), by offset.
const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_SIZE: usize = 20;
const E820_MAX: usize = 128;

// setup_header (boot.rst), by its offset in boot_params.
const HEADER_END_MAX: usize = 0x290;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const CMDLINE_SIZE: usize = 0x238;
const SETUP_DATA: usize = 0x250;

/// `type_of_loader` of a loader without a number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the protected-mode code is at 0x100000 or above.
const LOADED_HIGH: u8 = 1 << 0;

/// PVH: "xEn3" with the top bit of the "E" set.
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
/// Size of `hvm_start_info`, version 1.
const START_INFO_SIZE: u64 = 56;
/// Size of `hvm_modlist_entry`.
const MODULE_SIZE: u64 = 32;

// Control registers (Intel SDM volume 3, section 2.5) and EFER (section 2.2.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: the bit that is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

// Page table entries (section 4.5).
const PTE_PRESENT_WRITABLE: u64 = 0x3;
const PTE_LARGE: u64 = 1 << 7;

/// Loads what `images` name into `memory`.
///
/// # Errors
/// Names the file, and what is wrong with it or what it does not fit into.
pub fn load(
    plan: &Plan,
    tables: &[super::acpi::Table],
    images: &BootImages,
    memory: &GuestMemoryMmap,
) -> Result<RegisterState> {
    let kernel = KernelImage::open(&images.kernel).map_err(boot)?;
    kernel
        .require(crossvisor_boot::Machine::X86_64)
        .map_err(boot)?;
    let initrd = match &images.initrd {
        Some(initrd) => InitrdBytes::open(initrd)?,
        None => InitrdBytes::Built(&[]),
    };
    load_images(plan, tables, &kernel, &initrd, memory)
}

/// As [`load`], with images that are open.
pub fn load_images(
    plan: &Plan,
    tables: &[super::acpi::Table],
    kernel: &KernelImage,
    initrd: &InitrdBytes<'_>,
    memory: &GuestMemoryMmap,
) -> Result<RegisterState> {
    let writer = Writer(memory);
    // A flag that a guest's kernel left must not outlive it.
    writer.put(layout::RESET_FLAG, &[0, 0])?;
    for table in tables {
        writer.put(table.address, &table.bytes)?;
    }
    let rsdp = tables.first().map_or(0, |table| table.address);
    let boot = Boot {
        plan,
        rsdp,
        kernel,
        initrd,
        writer,
    };
    match kernel.format() {
        Format::BzImage(image) => boot.bzimage(image),
        Format::Elf(elf) => match elf.pvh_entry {
            Some(entry) => boot.pvh(elf, entry),
            None => boot.vmlinux(elf),
        },
        other => Err(Error::Boot(format!(
            "{}: {} is no kernel that x86_64 boots: a bzImage or an ELF vmlinux is needed",
            kernel.name(),
            other.name()
        ))),
    }
}

fn boot(error: impl ToString) -> Error {
    Error::Boot(error.to_string())
}

/// Guest memory, with errors of the loader's kind.
#[derive(Clone, Copy)]
struct Writer<'a>(&'a GuestMemoryMmap);

impl Writer<'_> {
    fn put(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.0
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| Error::Boot(format!("boot structures at {address:#x}: {error}")))
    }
}

/// One boot.
struct Boot<'a> {
    plan: &'a Plan,
    rsdp: u64,
    kernel: &'a KernelImage,
    initrd: &'a InitrdBytes<'a>,
    writer: Writer<'a>,
}

impl Boot<'_> {
    fn bzimage(&self, image: &BzImage) -> Result<RegisterState> {
        let length = self.kernel.footprint();
        // A relocatable kernel may be elsewhere, but moves itself to where it
        // prefers to be when that is higher.
        let address = image.pref_address.max(layout::HIGH_RAM);
        let end = self.fit(address, length)?;
        self.cmdline(u64::from(image.cmdline_size))?;
        let ramdisk = self.load_initrd(end, u64::from(image.initrd_addr_max))?;
        self.kernel
            .load_flat(self.writer.0, GuestAddress(address))
            .map_err(boot)?;

        let mut page = self.zero_page(ramdisk, &image.setup_header)?;
        page.u8(TYPE_OF_LOADER, LOADER_UNDEFINED);
        self.writer.put(layout::ZERO_PAGE, &page.0)?;
        self.long_mode(address.saturating_add(BzImage::ENTRY_64))
    }

    /// A Linux vmlinux, entered as by its decompressor.
    fn vmlinux(&self, elf: &Elf) -> Result<RegisterState> {
        let entry = elf
            .entry_paddr()
            .filter(|_| self.kernel.release().is_some());
        let Some(entry) = entry else {
            return Err(boot(self.kernel.unsupported(
                "ELF without a PVH entry point that is no Linux either: build it with PVH \
                 (CONFIG_PVH), or give a bzImage",
            )));
        };
        let end = self.fit(elf.low, elf.high.saturating_sub(elf.low))?;
        self.cmdline(CMDLINE_MAX)?;
        let ramdisk = self.load_initrd(end, INITRD_MAX)?;
        self.kernel.load_elf(self.writer.0, 0).map_err(boot)?;

        let mut page = self.zero_page(ramdisk, &[])?;
        page.u16(BOOT_FLAG, 0xaa55);
        page.bytes(HEADER_MAGIC, b"HdrS");
        page.u16(VERSION, 0x020f);
        page.u8(TYPE_OF_LOADER, LOADER_UNDEFINED);
        page.u8(LOADFLAGS, LOADED_HIGH);
        page.u32(KERNEL_ALIGNMENT, 0x100_0000);
        page.u32(CMDLINE_SIZE, CMDLINE_MAX as u32);
        self.writer.put(layout::ZERO_PAGE, &page.0)?;
        self.long_mode(entry)
    }

    /// An ELF kernel with a PVH entry point.
    fn pvh(&self, elf: &Elf, entry: u32) -> Result<RegisterState> {
        let end = self.fit(elf.low, elf.high.saturating_sub(elf.low))?;
        self.cmdline(CMDLINE_MAX)?;
        let ramdisk = self.load_initrd(end, INITRD_MAX)?;
        self.kernel.load_elf(self.writer.0, 0).map_err(boot)?;
        self.start_info(ramdisk)?;
        self.writer.put(layout::GDT, &gdt::bytes())?;
        Ok(RegisterState(vec![
            ("rip", u64::from(entry)),
            ("rbx", layout::PVH_START_INFO),
            ("rflags", RFLAGS),
            ("cr0", CR0_PE | CR0_ET),
            ("cr4", 0),
            ("efer", 0),
            ("cs", gdt::CODE_32.into()),
            ("ds", gdt::DATA.into()),
            ("es", gdt::DATA.into()),
            ("fs", gdt::DATA.into()),
            ("gs", gdt::DATA.into()),
            ("ss", gdt::DATA.into()),
            ("tr", gdt::TASK.into()),
            ("gdtr_base", layout::GDT),
            ("gdtr_limit", gdt::LIMIT.into()),
        ]))
    }

    /// Checks that the kernel has RAM where it goes, and returns its end.
    fn fit(&self, address: u64, length: u64) -> Result<u64> {
        let ram = self.low_ram();
        let end = address.checked_add(length);
        match end.filter(|&end| address >= ram.base && end <= ram.end()) {
            Some(end) => Ok(end),
            None => Err(Error::Boot(format!(
                "{}: does not fit: it needs RAM from {} to {} MiB, and there is RAM from {} to {} \
                 MiB: use a greater --memory",
                self.kernel.name(),
                address >> 20,
                address.saturating_add(length).div_ceil(1 << 20),
                ram.base >> 20,
                ram.end() >> 20,
            ))),
        }
    }

    /// RAM from the end of the first megabyte to the hole.
    fn low_ram(&self) -> Range {
        let end = self.plan.memory.first().map_or(0, Range::end);
        Range::new(layout::HIGH_RAM, end.saturating_sub(layout::HIGH_RAM))
    }

    /// Puts the command line in its place. `max` is the most that the kernel
    /// takes, without the NUL.
    fn cmdline(&self, max: u64) -> Result<()> {
        let line = self.plan.cmdline.as_bytes();
        let max = max.min(layout::CMDLINE_ROOM - 1);
        if line.len() as u64 > max {
            return Err(Error::config(
                "--cmdline",
                format!(
                    "the kernel command line has {} bytes, and this kernel takes at most {max}",
                    line.len()
                ),
            ));
        }
        let mut bytes = line.to_vec();
        bytes.push(0);
        self.writer.put(layout::CMDLINE, &bytes)
    }

    /// Puts the initrd as high as it may be: from `floor` on the memory is the
    /// kernel's to unpack into. `max` is the highest address that its last byte
    /// may have.
    fn load_initrd(&self, floor: u64, max: u64) -> Result<Range> {
        let length = self.initrd.len();
        if length == 0 {
            return Ok(Range::new(0, 0));
        }
        let top = self.low_ram().end().min(max.saturating_add(1));
        let place = top
            .checked_sub(length)
            .map(|place| place / PAGE * PAGE)
            .filter(|&place| place >= floor);
        let Some(place) = place else {
            return Err(Error::Boot(format!(
                "initrd of {} MiB does not fit: from the kernel's end at {} MiB there is room up \
                 to {} MiB: use a greater --memory",
                length.div_ceil(1 << 20),
                floor.div_ceil(1 << 20),
                top >> 20,
            )));
        };
        self.initrd.load(self.writer.0, GuestAddress(place))?;
        Ok(Range::new(place, length))
    }

    /// `boot_params` with the fields that every kernel gets.
    fn zero_page(&self, ramdisk: Range, header: &[u8]) -> Result<ZeroPage> {
        let mut page = ZeroPage(vec![0; PAGE as usize]);
        let room = HEADER_END_MAX - BzImage::SETUP_HEADER_OFFSET;
        page.bytes(
            BzImage::SETUP_HEADER_OFFSET,
            header.get(..room).unwrap_or(header),
        );
        page.u64(ACPI_RSDP_ADDR, self.rsdp);
        // Both are below 4 GiB: RAM below the hole.
        page.u32(RAMDISK_IMAGE, ramdisk.base as u32);
        page.u32(RAMDISK_SIZE, ramdisk.size as u32);
        page.u32(CMD_LINE_PTR, layout::CMDLINE as u32);
        page.u64(SETUP_DATA, 0);
        let map = layout::memory_map(&self.plan.memory);
        if map.len() > E820_MAX {
            return Err(Error::Boot("internal error: e820 has no room".into()));
        }
        page.u8(E820_ENTRIES, map.len() as u8);
        for (index, (range, kind)) in map.iter().enumerate() {
            let at = E820_TABLE + index * E820_ENTRY_SIZE;
            page.u64(at, range.base);
            page.u64(at + 8, range.size);
            page.u32(at + 16, *kind as u32);
        }
        Ok(page)
    }

    /// The state of the 64-bit boot protocol, entered at `entry`.
    fn long_mode(&self, entry: u64) -> Result<RegisterState> {
        self.writer.put(layout::GDT, &gdt::bytes())?;
        self.writer
            .put(layout::PAGE_TABLES, &identity_map(layout::PAGE_TABLES))?;
        let mut registers = long_mode(entry, layout::PAGE_TABLES, layout::GDT);
        registers.0.push(("rsi", layout::ZERO_PAGE));
        Ok(registers)
    }

    /// `hvm_start_info`, its module list and its memory map.
    fn start_info(&self, ramdisk: Range) -> Result<()> {
        let modules = u32::from(ramdisk.size > 0);
        let modules_at = layout::PVH_START_INFO + START_INFO_SIZE;
        let map_at = modules_at + MODULE_SIZE;
        let map = layout::memory_map(&self.plan.memory);

        let mut page: Vec<u8> = Vec::new();
        page.extend(START_INFO_MAGIC.to_le_bytes());
        page.extend(START_INFO_VERSION.to_le_bytes());
        page.extend(0u32.to_le_bytes());
        page.extend(modules.to_le_bytes());
        page.extend(if modules > 0 { modules_at } else { 0 }.to_le_bytes());
        page.extend(layout::CMDLINE.to_le_bytes());
        page.extend(self.rsdp.to_le_bytes());
        page.extend(map_at.to_le_bytes());
        page.extend((map.len() as u32).to_le_bytes());
        page.extend(0u32.to_le_bytes());
        // The initrd's module: address, size, no command line, reserved.
        for word in [ramdisk.base, ramdisk.size, 0, 0] {
            page.extend(word.to_le_bytes());
        }
        for (range, kind) in map {
            page.extend(range.base.to_le_bytes());
            page.extend(range.size.to_le_bytes());
            page.extend((kind as u32).to_le_bytes());
            page.extend(0u32.to_le_bytes());
        }
        self.writer.put(layout::PVH_START_INFO, &page)
    }
}

/// Registers for 64-bit code at `entry`, with page tables and descriptor table
/// where given.
pub fn long_mode(entry: u64, page_tables: u64, gdt: u64) -> RegisterState {
    RegisterState(vec![
        ("rip", entry),
        ("rflags", RFLAGS),
        ("cr0", CR0_PE | CR0_ET | CR0_NE | CR0_PG),
        ("cr3", page_tables),
        ("cr4", CR4_PAE),
        ("efer", EFER_LME | EFER_LMA),
        ("cs", gdt::CODE_64.into()),
        ("ds", gdt::DATA.into()),
        ("es", gdt::DATA.into()),
        ("fs", gdt::DATA.into()),
        ("gs", gdt::DATA.into()),
        ("ss", gdt::DATA.into()),
        ("tr", gdt::TASK.into()),
        ("gdtr_base", gdt),
        ("gdtr_limit", gdt::LIMIT.into()),
    ])
}

/// Page tables at `base` that map the first 4 GiB to themselves in 2 MiB pages:
/// six pages.
pub fn identity_map(base: u64) -> Vec<u8> {
    let mut tables: Vec<u64> = vec![0; 6 * 512];
    let mut set = |index: usize, entry: u64| {
        if let Some(slot) = tables.get_mut(index) {
            *slot = entry | PTE_PRESENT_WRITABLE;
        }
    };
    set(0, base + PAGE);
    for gib in 0..4 {
        set(512 + gib, base + (2 + gib as u64) * PAGE);
    }
    for page in 0..4 * 512 {
        set(2 * 512 + page, (page as u64) << 21 | PTE_LARGE);
    }
    tables
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}

/// `boot_params`. Its fields are at offsets below 4096, all of them constants
/// of this module.
struct ZeroPage(Vec<u8>);

impl ZeroPage {
    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        if let Some(field) = self.0.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    }

    fn u8(&mut self, at: usize, value: u8) {
        self.bytes(at, &[value]);
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u64(&mut self, at: usize, value: u64) {
        self.bytes(at, &value.to_le_bytes());
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
