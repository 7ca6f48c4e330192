use crossvisor_vmm::arch::{Architecture, Machine as _};
use crossvisor_vmm::config::VmConfig;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::x86_64::{X86_64, X86Machine};

const MIB: u64 = 1 << 20;

fn machine(memory: u64, cmdline: &str) -> X86Machine {
    let config = VmConfig {
        memory,
        cmdline: cmdline.into(),
        default_cmdline: false,
        ..VmConfig::default()
    };
    X86Machine::new(&config, &X86_64.typical_host()).unwrap()
}

/// The RAM of a machine. It is mapped and not touched, so size costs nothing.
fn ram(machine: &X86Machine) -> GuestMemoryMmap {
    let ranges: Vec<_> = machine
        .plan()
        .memory
        .iter()
        .map(|range| (GuestAddress(range.base), range.size as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn read(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn read_u32(memory: &GuestMemoryMmap, address: u64) -> u32 {
    u32::from_le_bytes(read(memory, address, 4).try_into().unwrap())
}

fn read_u64(memory: &GuestMemoryMmap, address: u64) -> u64 {
    u64::from_le_bytes(read(memory, address, 8).try_into().unwrap())
}

/// A bzImage with one setup sector and two pages of kernel.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0u8; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(8192u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &0x003fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &(32u32 << 20).to_le_bytes());
    image.extend(std::iter::repeat_n(0xc5, 8192));
    image
}

/// An ELF vmlinux with one segment at 16 MiB, and what `notes` and `text` say.
fn elf(pvh_entry: Option<u32>, text: &[u8]) -> Vec<u8> {
    let header = |words: &[(u64, usize)]| -> Vec<u8> {
        let bytes = words
            .iter()
            .map(|(value, size)| value.to_le_bytes()[..*size].to_vec());
        bytes.flatten().collect()
    };
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, EM_X86_64, version, entry, headers' place, flags, sizes, counts.
    image.extend(header(&[
        (2, 2),
        (62, 2),
        (1, 4),
        (0xffff_ffff_8100_0040, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (2, 2),
        (0, 2),
        (0, 2),
        (0, 2),
    ]));
    let note: Vec<u8> = match pvh_entry {
        None => Vec::new(),
        Some(entry) => {
            let mut note = header(&[(4, 4), (4, 4), (18, 4)]);
            note.extend(b"Xen\0");
            note.extend(entry.to_le_bytes());
            note
        }
    };
    let segment_size = 4096;
    // PT_LOAD at file offset 4096, then PT_NOTE at 512.
    image.extend(header(&[
        (1, 4),
        (5, 4),
        (4096, 8),
        (0xffff_ffff_8100_0000, 8),
        (0x100_0000, 8),
        (segment_size, 8),
        (segment_size + 8192, 8),
        (4096, 8),
    ]));
    image.extend(header(&[
        (4, 4),
        (4, 4),
        (512, 8),
        (0, 8),
        (0, 8),
        (note.len() as u64, 8),
        (note.len() as u64, 8),
        (4, 8),
    ]));
    image.resize(512, 0);
    image.extend(note);
    image.resize(4096, 0);
    image.extend(text);
    image.resize(8192, 0x90);
    image
}

const BANNER: &[u8] = b"Linux version 6.12.0-test (a@b) (gcc) #1 SMP\n\0";

struct Booted {
    memory: GuestMemoryMmap,
    registers: RegisterState,
}

fn start(
    memory: u64,
    cmdline: &str,
    kernel: Vec<u8>,
    initrd: Vec<u8>,
) -> crossvisor_vmm::Result<Booted> {
    let machine = machine(memory, cmdline);
    let memory = ram(&machine);
    let kernel = KernelImage::from_bytes("vmlinuz", kernel).map_err(boot)?;
    let initrd = InitrdBytes::Built(&initrd);
    let tables = crate::x86_64::acpi::tables(machine.plan())?;
    let registers = load_images(machine.plan(), &tables, &kernel, &initrd, &memory)?;
    Ok(Booted { memory, registers })
}

fn error(memory: u64, cmdline: &str, kernel: Vec<u8>, initrd: Vec<u8>) -> String {
    match start(memory, cmdline, kernel, initrd) {
        Ok(_) => panic!("it loaded"),
        Err(error) => error.to_string(),
    }
}

/// The e820 table of the zero page.
fn e820(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    let count = read(memory, layout::ZERO_PAGE + 0x1e8, 1)[0];
    (0..u64::from(count))
        .map(|index| {
            let at = layout::ZERO_PAGE + 0x2d0 + index * 20;
            (
                read_u64(memory, at),
                read_u64(memory, at + 8),
                read_u32(memory, at + 16),
            )
        })
        .collect()
}

#[test]
fn a_bzimage_boots_by_the_64_bit_protocol() {
    let initrd: Vec<u8> = (0..10_000).map(|i| i as u8).collect();
    let Booted { memory, registers } =
        start(512 * MIB, "console=ttyS0 quiet", bzimage(), initrd.clone()).unwrap();
    let get = |name| registers.get(name).unwrap();
    assert_eq!(get("rip"), 0x100_0200);
    assert_eq!(get("rsi"), layout::ZERO_PAGE);
    assert_eq!(get("cr0") & 0x8000_0001, 0x8000_0001);
    assert_eq!((get("cr4"), get("efer")), (0x20, 0x500));
    assert_eq!(get("cs"), 0x10);
    assert!(
        ["ds", "es", "fs", "gs", "ss"]
            .iter()
            .all(|name| get(name) == 0x18)
    );
    assert_eq!(get("rflags") & 1 << 9, 0, "interrupts are off");
    assert_eq!(read(&memory, 0x100_0000, 8192), [0xc5; 8192]);
    assert_eq!(read(&memory, layout::GDT, 48), gdt::bytes());

    let page = |at: u64| layout::ZERO_PAGE + at;
    assert_eq!(read(&memory, page(0x1f1), 0x1f), bzimage()[0x1f1..0x210]);
    assert_eq!(read(&memory, page(0x210), 1), [0xff]);
    assert_eq!(read(&memory, page(0x211), 1), [1]);
    let line = u64::from(read_u32(&memory, page(0x228)));
    assert_eq!(read(&memory, line, 20), b"console=ttyS0 quiet\0");
    let ramdisk = u64::from(read_u32(&memory, page(0x218)));
    assert_eq!(read_u32(&memory, page(0x21c)), 10_000);
    assert_eq!(
        ramdisk,
        512 * MIB - 12_288,
        "the highest page that holds it"
    );
    assert_eq!(read(&memory, ramdisk, initrd.len()), initrd);
    let rsdp = read_u64(&memory, page(0x070));
    assert_eq!(read(&memory, rsdp, 8), b"RSD PTR ");
    let xsdt = read_u64(&memory, rsdp + 24);
    assert_eq!(read(&memory, xsdt, 4), b"XSDT");
}

#[test]
fn the_page_tables_map_4_gib_to_themselves() {
    let Booted { memory, registers } = start(64 * MIB, "", bzimage(), Vec::new()).unwrap();
    let pml4 = registers.get("cr3").unwrap();
    for address in [
        0u64,
        0x1000,
        0x20_0000,
        0x3fff_ffff,
        0x8765_4321,
        0xffff_ffff,
    ] {
        let entry = |table: u64, shift: u32| {
            let entry = read_u64(&memory, table + (address >> shift & 0x1ff) * 8);
            assert_eq!(entry & 3, 3, "{address:#x} at {shift}");
            entry
        };
        let pdpt = entry(pml4, 39) & !0xfff;
        let pd = entry(pdpt, 30) & !0xfff;
        let page = entry(pd, 21);
        assert_ne!(page & 0x80, 0);
        assert_eq!((page & !0x1f_ffff) + (address & 0x1f_ffff), address);
    }
}

#[test]
fn e820_has_the_plans_memory() {
    for size in [64 * MIB, 3072 * MIB, 5120 * MIB] {
        let Booted { memory, .. } = start(size, "", bzimage(), Vec::new()).unwrap();
        let map = e820(&memory);
        let expected: Vec<_> = layout::memory_map(&layout::memory(size))
            .into_iter()
            .map(|(range, kind)| (range.base, range.size, kind as u32))
            .collect();
        assert_eq!(map, expected);
        let high = map.iter().filter(|(base, ..)| *base >= 1 << 32).count();
        assert_eq!(high, usize::from(size > 3072 * MIB));
    }
}

#[test]
fn an_initrd_stays_below_what_the_kernel_says() {
    let Booted { memory, .. } = start(4096 * MIB, "", bzimage(), vec![7; 4096]).unwrap();
    let ramdisk = read_u32(&memory, layout::ZERO_PAGE + 0x218);
    assert_eq!(ramdisk, 0x7fff_f000);
    let without = start(512 * MIB, "", bzimage(), Vec::new()).unwrap();
    assert_eq!(read_u64(&without.memory, layout::ZERO_PAGE + 0x218), 0);
}

#[test]
fn what_does_not_fit_says_so() {
    let text = error(40 * MIB, "", bzimage(), Vec::new());
    assert!(
        text.starts_with("vmlinuz: does not fit") && text.contains("--memory"),
        "{text}"
    );
    assert!(text.contains("from 16 to 48 MiB"), "{text}");
    // Kernel from 16 to 48 MiB, so 16 MiB are left.
    assert!(start(64 * MIB, "", bzimage(), vec![0; 16 << 20]).is_ok());
    let text = error(64 * MIB, "", bzimage(), vec![0; (16 << 20) + 1]);
    assert!(text.starts_with("initrd of 17 MiB does not fit"), "{text}");
    let text = error(64 * MIB, &"x".repeat(2048), bzimage(), Vec::new());
    assert!(
        text.starts_with("--cmdline: ") && text.contains("at most 2047"),
        "{text}"
    );
    assert!(start(64 * MIB, &"x".repeat(2047), bzimage(), Vec::new()).is_ok());
}

#[test]
fn an_elf_with_a_note_boots_by_pvh() {
    let kernel = elf(Some(0x100_0123), BANNER);
    let Booted { memory, registers } = start(5120 * MIB, "a b", kernel, vec![9; 5000]).unwrap();
    let get = |name| registers.get(name).unwrap();
    assert_eq!(get("rip"), 0x100_0123);
    assert_eq!(get("cr0") & 0x8000_0001, 1, "protected mode without paging");
    assert_eq!((get("cr4"), get("efer")), (0, 0));
    let code = gdt::segment(get("cs") as u16);
    assert!(code.default_32 && !code.long && code.base == 0 && code.limit == u32::MAX);
    assert_eq!(read(&memory, 0x100_0000, BANNER.len()), BANNER);

    let info = get("rbx");
    let word = |at: u64| read_u32(&memory, info + at);
    assert_eq!(
        (word(0), word(4), word(8), word(12)),
        (0x336e_c578, 1, 0, 1)
    );
    let module = read_u64(&memory, info + 16);
    let ramdisk = read_u64(&memory, module);
    assert_eq!(read_u64(&memory, module + 8), 5000);
    assert_eq!(read(&memory, ramdisk, 5000), [9; 5000]);
    assert_eq!(read(&memory, read_u64(&memory, info + 24), 4), b"a b\0");
    assert_eq!(read(&memory, read_u64(&memory, info + 32), 8), b"RSD PTR ");
    let map = read_u64(&memory, info + 40);
    let entries: Vec<_> = (0..u64::from(word(48)))
        .map(|index| {
            let at = map + index * 24;
            let words = (read_u64(&memory, at), read_u64(&memory, at + 8));
            (words.0, words.1, read_u32(&memory, at + 16))
        })
        .collect();
    let expected: Vec<_> = layout::memory_map(&layout::memory(5120 * MIB))
        .into_iter()
        .map(|(range, kind)| (range.base, range.size, kind as u32))
        .collect();
    assert_eq!(entries, expected);
    assert!(map + entries.len() as u64 * 24 <= layout::ZERO_PAGE);
}

#[test]
fn pvh_without_an_initrd_has_no_module() {
    let kernel = elf(Some(0x100_0000), BANNER);
    let Booted { memory, registers } = start(64 * MIB, "", kernel, Vec::new()).unwrap();
    let info = registers.get("rbx").unwrap();
    assert_eq!(read_u32(&memory, info + 12), 0);
    assert_eq!(read_u64(&memory, info + 16), 0);
}

#[test]
fn an_elf_linux_without_a_note_boots_at_its_entry() {
    let Booted { memory, registers } = start(64 * MIB, "x", elf(None, BANNER), Vec::new()).unwrap();
    assert_eq!(registers.get("rip"), Some(0x100_0040));
    assert_eq!(registers.get("rsi"), Some(layout::ZERO_PAGE));
    assert_eq!(read(&memory, layout::ZERO_PAGE + 0x202, 4), b"HdrS");
    assert_eq!(read(&memory, layout::ZERO_PAGE + 0x1fe, 2), [0x55, 0xaa]);
    let text = error(
        64 * MIB,
        "",
        elf(None, b"no system that we know"),
        Vec::new(),
    );
    assert!(text.contains("PVH"), "{text}");
}

#[test]
fn other_kernels_are_named() {
    let machine = machine(64 * MIB, "");
    let memory = ram(&machine);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernel");
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let images = BootImages {
            kernel: path.clone(),
            initrd: None,
        };
        machine
            .load(&images, &memory)
            .map_err(|error| error.to_string())
    };
    let mut arm = vec![0u8; 4096];
    arm[56..60].copy_from_slice(b"ARM\x64");
    arm[16..24].copy_from_slice(&4096u64.to_le_bytes());
    let text = load(&arm).unwrap_err();
    assert!(
        text.contains("aarch64") && text.contains("x86_64"),
        "{text}"
    );
    let mut old = bzimage();
    old[0x236] = 0;
    assert!(load(&old).unwrap_err().contains("32-bit x86"));
    assert!(load(b"hello").unwrap_err().contains("not a kernel"));
    load(&bzimage()).unwrap();
    let missing = BootImages {
        kernel: folder.path().join("nothing"),
        initrd: None,
    };
    assert!(
        machine
            .load(&missing, &memory)
            .unwrap_err()
            .to_string()
            .contains("nothing")
    );
}

#[test]
fn hostile_headers_are_refused_or_fit() {
    let machine = machine(64 * MIB, "");
    let memory = ram(&machine);
    let tables = crate::x86_64::acpi::tables(machine.plan()).unwrap();
    let try_load = |bytes: Vec<u8>| {
        let Ok(kernel) = KernelImage::from_bytes("k", bytes) else {
            return;
        };
        let initrd = InitrdBytes::Built(&[1; 100]);
        if let Ok(registers) = load_images(machine.plan(), &tables, &kernel, &initrd, &memory) {
            let rip = registers.get("rip").unwrap();
            assert!(rip < 1 << 32, "{rip:#x}");
        }
    };
    let images = [bzimage(), elf(Some(0x100_0000), BANNER), elf(None, BANNER)];
    for image in &images {
        for length in (0..image.len()).step_by(37) {
            try_load(image[..length].to_vec());
        }
        for at in 0..0x270.min(image.len()) {
            for value in [0x00, 0x7f, 0xff] {
                let mut image = image.clone();
                image[at] = value;
                try_load(image);
            }
        }
    }
}

#[test]
fn loading_clears_the_panic_flag() {
    let machine = machine(64 * MIB, "");
    let memory = ram(&machine);
    memory
        .write_slice(&[0x34, 0x12], GuestAddress(layout::RESET_FLAG))
        .unwrap();
    assert!(machine.reset_is_panic(&memory, &[]));
    let kernel = KernelImage::from_bytes("k", bzimage()).unwrap();
    let tables = crate::x86_64::acpi::tables(machine.plan()).unwrap();
    load_images(
        machine.plan(),
        &tables,
        &kernel,
        &InitrdBytes::Built(&[]),
        &memory,
    )
    .unwrap();
    assert!(!machine.reset_is_panic(&memory, &[]));
}
