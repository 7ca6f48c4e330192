//! Good, truncated and hostile images of every format.

use std::io::Write;

use vm_memory::{Bytes, GuestMemoryMmap};

use super::*;

/// Writes `bytes` at `at`.
fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

const VERSION_TEXT: &[u8] = b"6.12.57+deb13-amd64 (x@y) #1 SMP PREEMPT_DYNAMIC\0";

/// A bzImage with four setup sectors and 4096 bytes of kernel.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 5 * 512 + 4096];
    put(&mut image, 0x1f1, &[4]);
    put(&mut image, 0x1f4, &(4096u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    put(&mut image, 0x20e, &0x300u16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21]);
    put(&mut image, 0x236, &0x3fu16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x248, &0x100u32.to_le_bytes());
    put(&mut image, 0x24c, &0x200u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x8000u32.to_le_bytes());
    put(&mut image, 0x500, VERSION_TEXT);
    for (i, byte) in image[5 * 512..].iter_mut().enumerate() {
        *byte = (i * 7) as u8;
    }
    image
}

/// A header of an arm64 Image, and 0x3000 bytes in all.
fn arm64() -> Vec<u8> {
    let mut image = vec![0x5a; 0x3000];
    put(&mut image, 8, &0u64.to_le_bytes());
    put(&mut image, 16, &0x5000u64.to_le_bytes());
    put(&mut image, 24, &0b1010u64.to_le_bytes());
    put(&mut image, 56, b"ARM\x64");
    put(
        &mut image,
        0x1f00,
        b"Linux version %s\0Linux version 6.12.57-arm64 (gcc) #1\0",
    );
    image
}

fn riscv() -> Vec<u8> {
    let mut image = vec![0; 0x2000];
    put(&mut image, 8, &0x20_0000u64.to_le_bytes());
    put(&mut image, 16, &0x4000u64.to_le_bytes());
    put(&mut image, 32, &2u32.to_le_bytes());
    put(&mut image, 48, b"RISCV\0\0\0RSC\x05");
    image
}

fn s390() -> Vec<u8> {
    let mut image = vec![0; 0x12000];
    put(&mut image, 0x10008, b"S390EP");
    image
}

#[derive(Clone, Copy)]
struct Ph {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

/// A 64-bit ELF of type ET_EXEC with these program headers; file contents
/// count up from 0x1000 on.
fn elf(big: bool, machine: u16, headers: &[Ph]) -> Vec<u8> {
    let n16 = |v: u16| {
        if big {
            v.to_be_bytes()
        } else {
            v.to_le_bytes()
        }
    };
    let n32 = |v: u32| {
        if big {
            v.to_be_bytes()
        } else {
            v.to_le_bytes()
        }
    };
    let n64 = |v: u64| {
        if big {
            v.to_be_bytes()
        } else {
            v.to_le_bytes()
        }
    };
    let mut image = vec![0; 0x3000];
    put(
        &mut image,
        0,
        &[0x7f, b'E', b'L', b'F', 2, if big { 2 } else { 1 }, 1],
    );
    put(&mut image, 16, &n16(2));
    put(&mut image, 18, &n16(machine));
    put(&mut image, 20, &n32(1));
    put(&mut image, 24, &n64(0x100_0040));
    put(&mut image, 32, &n64(64));
    put(&mut image, 52, &n16(64));
    put(&mut image, 54, &n16(56));
    put(&mut image, 56, &n16(headers.len() as u16));
    for (i, ph) in headers.iter().enumerate() {
        let at = 64 + 56 * i;
        put(&mut image, at, &n32(ph.kind));
        put(&mut image, at + 4, &n32(5));
        put(&mut image, at + 8, &n64(ph.offset));
        put(&mut image, at + 16, &n64(ph.vaddr));
        put(&mut image, at + 24, &n64(ph.paddr));
        put(&mut image, at + 32, &n64(ph.filesz));
        put(&mut image, at + 40, &n64(ph.memsz));
        put(&mut image, at + 48, &n64(4));
    }
    for (i, byte) in image[0x1000..].iter_mut().enumerate() {
        *byte = (i % 251) as u8 + 1;
    }
    image
}

fn load(offset: u64, paddr: u64, filesz: u64, memsz: u64) -> Ph {
    Ph {
        kind: PT_LOAD,
        offset,
        vaddr: paddr | 0xffff_ffff_8000_0000,
        paddr,
        filesz,
        memsz,
    }
}

/// A vmlinux with two segments and a PVH note.
fn vmlinux() -> Vec<u8> {
    let note = Ph {
        kind: PT_NOTE,
        offset: 0x2800,
        vaddr: 0,
        paddr: 0,
        filesz: 40,
        memsz: 40,
    };
    let headers = [
        load(0x1000, 0x100_0000, 0x800, 0x1000),
        load(0x1800, 0x100_2000, 0x100, 0x300),
    ];
    let mut image = elf(false, 62, &[headers[1], headers[0], note]);
    put(&mut image, 0x2800, &note_bytes(b"GNU\0", 3, &[]));
    put(
        &mut image,
        0x2810,
        &note_bytes(b"Xen\0", 18, &0x0100_0370u64.to_le_bytes()),
    );
    image
}

fn note_bytes(name: &[u8; 4], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend(4u32.to_le_bytes());
    note.extend((desc.len() as u32).to_le_bytes());
    note.extend(kind.to_le_bytes());
    note.extend(name);
    note.extend(desc);
    note
}

fn zboot(name: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 512];
    put(&mut image, 0, b"MZ\0\0zimg");
    put(&mut image, 8, &512u32.to_le_bytes());
    put(&mut image, 12, &(payload.len() as u32).to_le_bytes());
    put(&mut image, 24, name);
    image.extend(payload);
    image.extend(b"signature");
    image
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn parse_ok(bytes: Vec<u8>) -> KernelImage {
    KernelImage::from_bytes("vmlinuz", bytes).unwrap()
}

fn message(bytes: Vec<u8>) -> String {
    let text = KernelImage::from_bytes("vmlinuz", bytes)
        .unwrap_err()
        .to_string();
    assert!(
        text.starts_with("vmlinuz: ") && !text.contains('\n'),
        "{text}"
    );
    text
}

fn memory(ranges: &[(u64, usize)]) -> GuestMemoryMmap<()> {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|&(at, len)| (GuestAddress(at), len))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn bytes_at(mem: &GuestMemoryMmap<()>, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn bzimage_header_is_read() {
    let image = parse_ok(bzimage());
    assert_eq!(
        image.describe(),
        "x86_64 bzImage, Linux 6.12.57+deb13-amd64"
    );
    assert_eq!(image.machine(), Machine::X86_64);
    let Format::BzImage(bz) = image.format() else {
        panic!("{image}")
    };
    assert_eq!((bz.version, bz.loadflags, bz.xloadflags), (0x020f, 1, 0x3f));
    assert_eq!((bz.kernel_offset, bz.kernel_len), (2560, 4096));
    assert!(bz.relocatable && bz.is_64bit() && bz.can_be_loaded_above_4g());
    assert_eq!((bz.kernel_alignment, bz.min_alignment), (0x20_0000, 21));
    assert_eq!((bz.pref_address, bz.init_size), (0x100_0000, 0x8000));
    assert_eq!((bz.cmdline_size, bz.initrd_addr_max), (2047, 0x7fff_ffff));
    assert_eq!((bz.payload_offset, bz.payload_length), (0x100, 0x200));
    // 0x202 + 0x6a is the header's end.
    assert_eq!(bz.setup_header.len(), 0x202 + 0x6a - 0x1f1);
    assert_eq!(bz.setup_header[0x202 - 0x1f1..][..4], *b"HdrS");
    assert_eq!(image.footprint(), 0x8000);
}

#[test]
fn bzimage_is_loaded_with_room_for_its_decompression() {
    let image = parse_ok(bzimage());
    let mem = memory(&[(0, 0x10_8000)]);
    let loaded = image.load_flat(&mem, GuestAddress(0x10_0000)).unwrap();
    assert_eq!(loaded.start.0..loaded.end.0, 0x10_0000..0x10_8000);
    assert_eq!(bytes_at(&mem, 0x10_0000, 4096), bzimage()[2560..]);
    // One page less than init_size is too little, and nothing is written.
    let mem = memory(&[(0, 0x10_7000)]);
    let error = image.load_flat(&mem, GuestAddress(0x10_0000)).unwrap_err();
    assert!(
        matches!(error.reason(), Reason::Fit { len: 0x8000, .. }),
        "{error}"
    );
    assert_eq!(bytes_at(&mem, 0x10_0000, 64), [0; 64]);
    assert!(image.load_flat(&mem, GuestAddress(u64::MAX - 5)).is_err());
    assert!(image.load_elf(&mem, 0).is_err());
}

#[test]
fn every_truncation_of_a_bzimage_is_an_error() {
    let whole = bzimage();
    // Up to 15 bytes may be missing from the last paragraph.
    for len in 0..=whole.len() - 16 {
        let cut = whole[..len].to_vec();
        assert!(KernelImage::from_bytes("x", cut).is_err(), "{len} bytes");
    }
    assert!(message(whole[..2560].to_vec()).contains("truncated bzImage"));
    assert!(message(whole[..3000].to_vec()).contains("promises 4096"));
    assert_eq!(message(Vec::new()), "vmlinuz: is empty");
    parse_ok(whole[..whole.len() - 15].to_vec());
}

#[test]
fn unsuitable_bzimages_are_told() {
    let with = |at: usize, bytes: &[u8]| {
        let mut image = bzimage();
        put(&mut image, at, bytes);
        image
    };
    assert!(message(with(0x206, &0x0205u16.to_le_bytes())).contains("2.06"));
    assert!(message(with(0x211, &[0])).contains("zImage"));
    assert!(message(with(0x230, &0x30_0000u32.to_le_bytes())).contains("kernel_alignment"));
    assert!(message(with(0x24c, &u32::MAX.to_le_bytes())).contains("payload"));
    assert!(message(with(0x1f4, &u32::MAX.to_le_bytes())).contains("truncated"));
    assert!(message(with(0x1f4, &[0; 4])).contains("size is 0"));
    assert!(message(with(0x1f1, &[255])).contains("setup sectors"));
    // A header too short for the fields that its version has.
    assert!(message(with(0x201, &[0x20])).contains("truncated"));
    // 32-bit only.
    let image = parse_ok(with(0x236, &[0, 0]));
    let error = image.require(Machine::X86_64).unwrap_err().to_string();
    assert!(error.contains("32-bit x86"), "{error}");
    // A version text that is none.
    for text in [
        &b"\xff\xfe\0"[..],
        b"no digit\0",
        b"6.1\x1b[2J x\0",
        &[b'6'; 600],
    ] {
        assert_eq!(parse_ok(with(0x500, text)).release(), None);
    }
    assert_eq!(
        parse_ok(with(0x20e, &0xffffu16.to_le_bytes())).release(),
        None
    );
}

#[test]
fn protocol_2_06_has_no_later_fields() {
    let mut image = bzimage();
    put(&mut image, 0x206, &0x0206u16.to_le_bytes());
    let image = parse_ok(image);
    let Format::BzImage(bz) = image.format() else {
        panic!("{image}")
    };
    assert_eq!((bz.pref_address, bz.init_size), (0x10_0000, 4096));
    assert_eq!((bz.xloadflags, bz.payload_length), (0, 0));
}

#[test]
fn elf_segments_and_pvh_note_are_read() {
    let image = parse_ok(vmlinux());
    assert_eq!(image.machine(), Machine::X86_64);
    let Format::Elf(elf) = image.format() else {
        panic!("{image}")
    };
    assert_eq!(elf.pvh_entry, Some(0x0100_0370));
    assert_eq!((elf.low, elf.high), (0x100_0000, 0x100_2300));
    assert_eq!(elf.segments.len(), 2);
    assert!(elf.segments[0].paddr < elf.segments[1].paddr);
    assert_eq!(
        (elf.entry, elf.entry_paddr()),
        (0x100_0040, Some(0x100_0040))
    );
    assert_eq!(image.footprint(), 0x2300);
}

#[test]
fn elf_entry_may_be_virtual() {
    // As ppc64 has it: entry at 0xc000000000000000, loaded at 0.
    let ph = Ph {
        kind: PT_LOAD,
        offset: 0x1000,
        vaddr: 0x100_0000,
        paddr: 0,
        filesz: 0x800,
        memsz: 0x900,
    };
    let image = parse_ok(elf(false, 21, &[ph]));
    assert_eq!(image.machine(), Machine::Ppc64le);
    let Format::Elf(elf) = image.format() else {
        panic!("{image}")
    };
    assert_eq!(elf.entry_paddr(), Some(0x40));
}

#[test]
fn elf_of_either_byte_order_is_told_apart() {
    let ph = [load(0x1000, 0x100_0000, 0x100, 0x100)];
    for (big, number, machine) in [
        (true, 22, Machine::S390x),
        (true, 21, Machine::Ppc64),
        (false, 183, Machine::Aarch64),
        (false, 243, Machine::Riscv64),
        (false, 258, Machine::Other("LoongArch")),
        (false, 9999, Machine::Other("unknown machine")),
    ] {
        let image = parse_ok(elf(big, number, &ph));
        assert_eq!(image.machine(), machine);
        let Format::Elf(elf) = image.format() else {
            panic!("{image}")
        };
        assert_eq!((elf.big_endian, elf.low), (big, 0x100_0000));
        assert_eq!(elf.pvh_entry, None);
    }
}

#[test]
fn elf_is_loaded_by_segments() {
    let image = parse_ok(vmlinux());
    let mem = memory(&[(0x10_0000, 0x1_0000)]);
    // Dirty memory: what a segment does not bring must read as zero.
    mem.write_slice(&[0xff; 0x1_0000], GuestAddress(0x10_0000))
        .unwrap();
    let bias = 0x10_0000u64.wrapping_sub(0x100_0000);
    let loaded = image.load_elf(&mem, bias).unwrap();
    assert_eq!(loaded.start.0..loaded.end.0, 0x10_0000..0x10_2300);
    let file = vmlinux();
    assert_eq!(bytes_at(&mem, 0x10_0000, 0x800), file[0x1000..0x1800]);
    assert_eq!(bytes_at(&mem, 0x10_0800, 0x800), [0; 0x800]);
    assert_eq!(bytes_at(&mem, 0x10_1000, 0x10), [0xff; 0x10]);
    assert_eq!(bytes_at(&mem, 0x10_2000, 0x100), file[0x1800..0x1900]);
    assert_eq!(bytes_at(&mem, 0x10_2100, 0x200), [0; 0x200]);
    assert_eq!(bytes_at(&mem, 0x10_2300, 0x10), [0xff; 0x10]);

    // Memory ends within the last segment's bss: nothing is written.
    let small = memory(&[(0x10_0000, 0x2200)]);
    let error = image.load_elf(&small, bias).unwrap_err();
    assert!(
        matches!(
            error.reason(),
            Reason::Fit {
                addr: 0x10_2000,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(bytes_at(&small, 0x10_0000, 8), [0; 8]);
    assert!(image.load_elf(&mem, u64::MAX - 0x100_0000).is_err());
    assert!(image.load_flat(&mem, GuestAddress(0x10_0000)).is_err());
}

#[test]
fn every_truncation_of_an_elf_is_an_error() {
    let whole = vmlinux();
    // The last byte of a segment in the file is at 0x18ff.
    for len in 0..0x1900 {
        let cut = whole[..len].to_vec();
        assert!(KernelImage::from_bytes("x", cut).is_err(), "{len} bytes");
    }
    // Without its notes it is still a kernel.
    let image = parse_ok(whole[..0x1900].to_vec());
    assert!(matches!(
        image.format(),
        Format::Elf(Elf {
            pvh_entry: None,
            ..
        })
    ));
}

#[test]
fn hostile_elf_headers_are_errors() {
    let one = |ph: Ph| elf(false, 62, &[ph]);
    let max = u64::MAX;
    for (what, image, text) in [
        (
            "wraps",
            one(load(0x1000, max - 0x10, 0x100, 0x100)),
            "damaged",
        ),
        ("huge", one(load(0x1000, 0x1000, 0x100, 1 << 50)), "damaged"),
        (
            "file",
            one(load(max - 5, 0x1000, 0x100, 0x100)),
            "truncated",
        ),
        ("file", one(load(0x2fff, 0x1000, 2, 2)), "truncated"),
        ("file", one(load(0x1000, 0x1000, max, max)), "truncated"),
        ("larger", one(load(0x1000, 0x1000, 0x100, 0xff)), "larger"),
        ("none", elf(false, 62, &[]), "nothing to load"),
        ("empty", one(load(0x1000, 0x1000, 0, 0)), "nothing to load"),
        (
            "overlap",
            elf(
                false,
                62,
                &[load(0x1000, 0x1000, 1, 0x101), load(0x1000, 0x1100, 1, 1)],
            ),
            "overlap",
        ),
        (
            "sum",
            elf(
                false,
                62,
                &[
                    load(0x1000, 0, 1, 1 << 39),
                    load(0x1000, 1 << 50, 1, 1 << 40),
                ],
            ),
            "damaged",
        ),
        (
            "program",
            one(Ph {
                kind: PT_INTERP,
                ..load(0x1000, 0, 8, 8)
            }),
            "not a kernel",
        ),
    ] {
        let text_found = message(image);
        assert!(text_found.contains(text), "{what}: {text_found}");
    }
    // Adjacent segments are fine.
    parse_ok(elf(
        false,
        62,
        &[load(0x1000, 0x1000, 1, 0x100), load(0x1000, 0x1100, 1, 1)],
    ));

    let with = |at: usize, bytes: &[u8]| {
        let mut image = vmlinux();
        put(&mut image, at, bytes);
        message(image)
    };
    assert!(with(4, &[1]).contains("64-bit"));
    assert!(with(4, &[7]).contains("damaged"));
    assert!(with(5, &[0]).contains("damaged"));
    assert!(with(16, &[1]).contains("type 1"));
    assert!(with(56, &0xfff0u16.to_le_bytes()).contains("program headers"));
    assert!(with(32, &u64::MAX.to_le_bytes()).contains("program headers"));
    assert!(with(54, &[1]).contains("program headers"));
}

#[test]
fn hostile_notes_are_ignored() {
    let pvh = |image: Vec<u8>| match parse_ok(image).format() {
        Format::Elf(elf) => elf.pvh_entry,
        other => panic!("{}", other.name()),
    };
    let with = |at: usize, bytes: &[u8]| {
        let mut image = vmlinux();
        put(&mut image, at, bytes);
        pvh(image)
    };
    // The name's and the value's sizes.
    assert_eq!(with(0x2810, &u32::MAX.to_le_bytes()), None);
    assert_eq!(with(0x2814, &u32::MAX.to_le_bytes()), None);
    assert_eq!(with(0x2814, &3u32.to_le_bytes()), None);
    assert_eq!(with(0x2814, &4u32.to_le_bytes()), Some(0x0100_0370));
    // An address above 4 GiB can't be a 32-bit entry.
    assert_eq!(with(0x2824, &[1]), None);
    assert_eq!(with(0x2818, &17u32.to_le_bytes()), None);
    assert_eq!(with(0x281c, b"Xem\0"), None);
    // The segment's size: beyond the file, or more than notes ever take.
    let sizes = 64 + 2 * 56 + 32;
    assert_eq!(with(sizes, &u64::MAX.to_le_bytes()), None);
    assert_eq!(with(sizes, &0x800u64.to_le_bytes()), Some(0x0100_0370));
}

#[test]
fn arm64_header_is_read() {
    let image = parse_ok(arm64());
    assert_eq!(image.describe(), "aarch64 Image, Linux 6.12.57-arm64");
    let expected = Arm64Image {
        text_offset: 0,
        image_size: 0x5000,
        big_endian: false,
        page_size: PageSize::K4,
        anywhere: true,
    };
    assert!(matches!(image.format(), Format::Arm64(header) if *header == expected));

    let mut old = arm64();
    put(&mut old, 16, &0u64.to_le_bytes());
    put(&mut old, 24, &0b0111u64.to_le_bytes());
    let old = parse_ok(old);
    let Format::Arm64(header) = old.format() else {
        panic!("{old}")
    };
    assert_eq!((header.text_offset, old.footprint()), (0x8_0000, 0x3000));
    assert_eq!((header.big_endian, header.page_size), (true, PageSize::K64));
    assert!(!header.anywhere);
}

#[test]
fn arm64_is_loaded_with_room_for_its_bss() {
    let image = parse_ok(arm64());
    let mem = memory(&[(0x4000_0000, 0x5000)]);
    let loaded = image.load_flat(&mem, GuestAddress(0x4000_0000)).unwrap();
    assert_eq!(loaded.end.0, 0x4000_5000);
    assert_eq!(bytes_at(&mem, 0x4000_0000, 0x3000), arm64());
    assert!(image.load_flat(&mem, GuestAddress(0x4000_0001)).is_err());
}

#[test]
fn hostile_arm64_and_riscv_headers_are_errors() {
    let with = |mut image: Vec<u8>, at: usize, value: u64| {
        put(&mut image, at, &value.to_le_bytes());
        message(image)
    };
    assert!(with(arm64(), 16, u64::MAX).contains("image_size"));
    assert!(with(arm64(), 8, 2 << 20).contains("text_offset"));
    assert!(with(riscv(), 16, u64::MAX).contains("image_size"));
    assert!(with(riscv(), 8, u64::MAX).contains("text_offset"));
    assert!(with(riscv(), 24, 1).contains("big-endian"));
    for len in 0..64 {
        assert!(
            KernelImage::from_bytes("x", arm64()[..len].to_vec()).is_err(),
            "{len}"
        );
        assert!(
            KernelImage::from_bytes("x", riscv()[..len].to_vec()).is_err(),
            "{len}"
        );
    }
    assert!(message(arm64()[..60].to_vec()).contains("truncated arm64 Image"));
    assert!(message(riscv()[..60].to_vec()).contains("truncated riscv Image"));
}

/// Gives `image` a PE header at 64 with two sections, the last of which ends at
/// `end`.
fn with_sections(mut image: Vec<u8>, end: u32) -> Vec<u8> {
    put(&mut image, 0, b"MZ");
    put(&mut image, 0x3c, &64u32.to_le_bytes());
    put(&mut image, 64, b"PE\0\0");
    put(&mut image, 64 + 6, &2u16.to_le_bytes());
    put(&mut image, 64 + 20, &160u16.to_le_bytes());
    let table = 64 + 24 + 160;
    for (section, size, offset) in [(0, 0x800u32, 0x800u32), (1, end - 0x1000, 0x1000)] {
        put(&mut image, table + section * 40 + 16, &size.to_le_bytes());
        put(&mut image, table + section * 40 + 20, &offset.to_le_bytes());
    }
    image
}

#[test]
fn images_are_whole_when_they_hold_their_sections() {
    for (image, name) in [(arm64(), "arm64"), (riscv(), "riscv")] {
        let len = image.len();
        let whole = with_sections(image.clone(), len as u32);
        parse_ok(whole.clone());
        // A signature may follow.
        parse_ok([whole.clone(), vec![0; 1472]].concat());
        for cut in [len - 1, len / 2, 0x200] {
            let text = message(whole[..cut].to_vec());
            assert!(text.contains(&format!("truncated {name} Image")), "{text}");
        }
        // Headers that lead nowhere tell nothing.
        for (at, value) in [(0x3c, u32::MAX), (64, 0), (64 + 20, u32::MAX)] {
            let mut odd = whole.clone();
            put(&mut odd, at, &value.to_le_bytes());
            parse_ok(odd);
        }
        let most = with_sections(image, u32::MAX);
        assert!(message(most).contains("truncated"));
    }
}

#[test]
fn riscv_and_s390_are_recognised() {
    let image = parse_ok(riscv());
    assert_eq!(image.describe(), "riscv64 Image");
    assert_eq!(image.footprint(), 0x4000);
    assert!(matches!(
        image.format(),
        Format::Riscv(RiscvImage {
            text_offset: 0x20_0000,
            version: 2,
            ..
        })
    ));

    let image = parse_ok(s390());
    assert_eq!(image.describe(), "s390x bzImage");
    let mem = memory(&[(0, 0x12000)]);
    assert_eq!(
        image.load_flat(&mem, GuestAddress(0)).unwrap().end.0,
        0x12000
    );
    assert_eq!(bytes_at(&mem, 0x10008, 6), b"S390EP");
    // Cut before the mark it is nothing that is known.
    assert!(message(s390()[..0x1000d].to_vec()).contains("known format"));
}

#[test]
fn an_s390_image_of_a_release_with_a_trailer_ends_with_it() {
    let built = |release: &str, end: &[u8]| {
        let mut image = s390();
        // Something before the text that looks like a part of it.
        put(&mut image, 0x11000, b"@4 ) #\xfea@");
        put(&mut image, 0x1100a, release.as_bytes());
        let builder = b" (debian-kernel@lists.debian.org) #1 SMP\0";
        put(&mut image, 0x1100a + release.len(), builder);
        let at = image.len() - end.len();
        put(&mut image, at, end);
        image
    };
    let trailer = b"\0\0\0\x20zIPL";
    let image = parse_ok(built("6.12.113+deb13-s390x", trailer));
    assert_eq!(image.release().as_deref(), Some("6.12.113+deb13-s390x"));
    assert!(message(built("6.1.0", b"")).contains("truncated s390 bzImage"));
    parse_ok(built("6.1.0", b"~Module signature appended~\n"));
    // Older ones have none.
    for old in ["6.0.9", "5.10.0-3", "4.18"] {
        let image = parse_ok(built(old, b""));
        assert_eq!(image.release().as_deref(), Some(old));
    }
    // No release at all, and none that is one.
    assert_eq!(parse_ok(s390()).release(), None);
    assert_eq!(parse_ok(built("six", b"")).release(), None);
}

#[test]
fn a_kernel_for_another_machine_is_told() {
    let image = parse_ok(arm64());
    image.require(Machine::Aarch64).unwrap();
    assert_eq!(
        image.require(Machine::X86_64).unwrap_err().to_string(),
        "vmlinuz: aarch64 Image, Linux 6.12.57-arm64, but this VM is x86_64: give a kernel for \
         x86_64"
    );
}

#[test]
fn compressed_kernels_are_unwrapped_once() {
    let zstd = ruzstd::encoding::compress_to_vec(
        &arm64()[..],
        ruzstd::encoding::CompressionLevel::Fastest,
    );
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default()).unwrap();
    xz.write_all(&arm64()).unwrap();
    let xz = xz.finish().unwrap();
    for (how, mut bytes) in [("gzip", gzip(&arm64())), ("zstd", zstd), ("xz", xz)] {
        // Cut anywhere, it is an error.
        for len in (0..bytes.len() - 8).step_by(7) {
            assert!(
                KernelImage::from_bytes("x", bytes[..len].to_vec()).is_err(),
                "{how} {len}"
            );
        }
        let mut in_zboot = zboot(how.as_bytes(), &bytes);
        let boxed = parse_ok(in_zboot.clone());
        assert_eq!(
            boxed.describe(),
            format!("aarch64 Image (EFI zboot, {how}), Linux 6.12.57-arm64")
        );
        in_zboot.truncate(512 + bytes.len() - 1);
        assert!(message(in_zboot).contains("truncated EFI zboot"));

        // kbuild appends the length, boot loaders a device tree.
        bytes.extend([0x00, 0x30, 0, 0]);
        let image = parse_ok(bytes);
        assert_eq!(
            image.describe(),
            format!("aarch64 Image ({how}), Linux 6.12.57-arm64")
        );
        assert_eq!(image.size(), 0x3000);
        let mem = memory(&[(0, 0x5000)]);
        image.load_flat(&mem, GuestAddress(0)).unwrap();
        assert_eq!(bytes_at(&mem, 0, 0x3000), arm64());
    }
    assert!(message(gzip(&gzip(&arm64()))).contains("more than once"));
    assert!(message(gzip(&zboot(b"gzip", &gzip(&arm64())))).contains("more than once"));
    assert!(message(gzip(b"nothing")).contains("known format"));
    assert!(message(gzip(b"")).contains("empty"));
}

#[test]
fn hostile_zboot_headers_are_errors() {
    let good = zboot(b"gzip", &gzip(&arm64()));
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        put(&mut image, at, bytes);
        message(image)
    };
    assert!(with(8, &u32::MAX.to_le_bytes()).contains("truncated"));
    assert!(with(12, &u32::MAX.to_le_bytes()).contains("truncated"));
    assert!(with(12, &[0; 4]).contains("damaged"));
    assert!(with(8, &[0; 4]).contains("damaged"));
    assert!(with(24, b"rot13").contains("rot13"));
    assert!(with(24, b"lz4\0").contains("lz4"));
    assert!(with(24, b"zstd").contains("damaged zstd"));
    for len in 8..56 {
        assert!(message(good[..len].to_vec()).contains("truncated"), "{len}");
    }
}

#[test]
fn what_is_no_kernel_is_told() {
    assert!(message(b"#!/bin/sh\n".to_vec()).contains("known format"));
    assert!(message(b"MZ\x90\0 This program cannot be run".to_vec()).contains("EFI"));
    assert!(message(b"BZh91AY&SY".to_vec()).contains("bzip2 compression is not supported"));
    assert!(message(vec![0x1f, 0x8b, 8]).contains("truncated gzip"));
}

#[test]
fn files_are_opened_and_read_as_needed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinuz");
    std::fs::write(&path, bzimage()).unwrap();
    let image = KernelImage::open(&path).unwrap();
    let mem = memory(&[(0, 0x9000)]);
    image.load_flat(&mem, GuestAddress(0x1000)).unwrap();
    assert_eq!(bytes_at(&mem, 0x1000, 4096), bzimage()[2560..]);
    // A file that is truncated afterwards is an error, no crash.
    std::fs::write(&path, &bzimage()[..3000]).unwrap();
    let error = image
        .load_flat(&mem, GuestAddress(0x1000))
        .unwrap_err()
        .to_string();
    assert!(error.contains("reading it failed"), "{error}");

    for (path, text) in [("absent", "No such file"), ("", "is a directory")] {
        let path = dir.path().join(path);
        let error = KernelImage::open(&path).unwrap_err().to_string();
        assert!(error.starts_with(&path.display().to_string()), "{error}");
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn banners_are_found_across_reads() {
    // The search reads 256 KiB at a time.
    for at in (0x3ffb0..0x40010).chain([0, 0x7ffff]) {
        let mut image = vec![b'L'; 0x81000];
        put(&mut image, at, b"Linux version 6.1.0-x (\0");
        let found = fields::find_banner(&Source::from_bytes(image));
        assert_eq!(found.as_deref(), Some("6.1.0-x"), "{at:#x}");
    }
    let end = Source::from_bytes(b"....Linux version 6.1".to_vec());
    assert_eq!(fields::find_banner(&end).as_deref(), Some("6.1"));
    let none = Source::from_bytes(b"Linux version %s\0Linux version ".to_vec());
    assert_eq!(fields::find_banner(&none), None);
}

/// Bytes changed at random in good images: parsing and loading must end in a
/// value or an error, whatever the header says.
#[test]
fn damaged_headers_never_panic() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mem = memory(&[(0, 0x1_0000), (0x10_0000, 0x1_0000)]);
    let mut accepted = 0;
    for (image, header) in [
        (bzimage(), 0x1f1..0x270),
        (vmlinux(), 0..240),
        (arm64(), 0..64),
        (riscv(), 0..64),
        (zboot(b"gzip", &gzip(&arm64())), 0..560),
    ] {
        for _ in 0..2000 {
            let mut damaged = image.clone();
            for _ in 0..=random() % 4 {
                let at = header.start + (random() as usize) % header.len();
                damaged[at] = match random() % 4 {
                    0 => 0,
                    1 => 0xff,
                    _ => random() as u8,
                };
            }
            if let Ok(image) = KernelImage::from_bytes("x", damaged) {
                accepted += 1;
                let _ = image.describe();
                let _ = image.load_flat(&mem, GuestAddress(random() % 0x20_0000));
                let _ = image.load_elf(&mem, random());
                if let Format::Elf(elf) = image.format() {
                    let _ = elf.entry_paddr();
                }
            }
        }
    }
    assert!(
        accepted > 100,
        "the damage must leave some images whole: {accepted}"
    );
}
