use std::sync::Arc;

use crossvisor_vmm::config::{Initrd, VmConfig};

use super::super::{host, layout};
use super::*;

/// An image with an entry point and a command line of `size` bytes.
fn image(len: usize, size: u64) -> Vec<u8> {
    let mut bytes = vec![0x5a; len];
    bytes[0x10008..0x1000e].copy_from_slice(b"S390EP");
    bytes[0x10430..0x10438].copy_from_slice(&size.to_be_bytes());
    bytes
}

fn run(
    mib: u64,
    kernel: &[u8],
    initrd: Option<usize>,
    cmdline: &str,
) -> Result<(RegisterState, GuestMemoryMmap)> {
    let config = VmConfig {
        memory: mib << 20,
        cmdline: cmdline.into(),
        ..VmConfig::default()
    };
    let plan = layout::plan(&config, &host::typical()).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (mib << 20) as usize)]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vmlinuz");
    std::fs::write(&path, kernel).unwrap();
    let images = BootImages {
        kernel: path,
        initrd: initrd.map(|len| Initrd::Built(Arc::new(vec![7; len]))),
    };
    Ok((load(&plan, &images, &memory)?, memory))
}

fn doubleword(memory: &GuestMemoryMmap, address: u64) -> u64 {
    let bytes: [u8; 8] = memory.read_obj(GuestAddress(address)).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn the_parameter_area_is_filled_in() {
    let (registers, memory) = run(64, &image(0x20000, 4096), Some(5000), "quiet").unwrap();
    assert_eq!(registers.get("psw_mask"), Some(0x1_8000_0000));
    assert_eq!(registers.get("psw_addr"), Some(0x10000));
    assert_eq!(doubleword(&memory, 0x10408), 32 << 20);
    assert_eq!(doubleword(&memory, 0x10410), 5000);
    let byte: u8 = memory.read_obj(GuestAddress((32 << 20) + 4999)).unwrap();
    assert_eq!(byte, 7);
    let line: [u8; 23] = memory.read_obj(GuestAddress(0x10480)).unwrap();
    assert_eq!(&line, b"console=ttysclp0 quiet\0");
}

#[test]
fn in_little_memory_the_initrd_follows_the_kernel() {
    let (_, memory) = run(16, &image(0x20_0001, 4096), Some(5000), "").unwrap();
    assert_eq!(doubleword(&memory, 0x10408), 3 << 20);
    let error = run(4, &image(0x20_0001, 4096), Some(2 << 20), "").unwrap_err();
    assert!(error.to_string().contains("5 MiB are needed"), "{error}");
    let error = run(1, &image(0x20_0001, 4096), None, "").unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("--memory: 1 MiB do not hold this kernel: 3 MiB"),
        "{error}"
    );
}

#[test]
fn the_image_says_how_long_a_command_line_may_be() {
    let long = "x".repeat(900);
    let error = run(16, &image(0x20000, 0), None, &long).unwrap_err();
    assert!(error.to_string().contains("at most 895"), "{error}");
    run(16, &image(0x20000, 4096), None, &long).unwrap();
    // A size that no kernel has is not believed.
    assert!(run(16, &image(0x20000, u64::MAX), None, &long).is_err());
}

/// An ELF for s390 with one segment, `image` at 0.
fn elf(image: &[u8]) -> Vec<u8> {
    const SEGMENT: usize = 0x1000;
    let mut file = vec![0; SEGMENT];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    // 64 bits, big-endian; an executable for s390.
    put(0, b"\x7fELF\x02\x02\x01");
    put(16, &[0, 2, 0, 22, 0, 0, 0, 1]);
    put(24, &0x10000_u64.to_be_bytes());
    put(32, &64_u64.to_be_bytes());
    put(52, &[0, 64, 0, 56, 0, 1]);
    // PT_LOAD, readable and executable.
    put(64, &[0, 0, 0, 1, 0, 0, 0, 5]);
    put(72, &(SEGMENT as u64).to_be_bytes());
    let size = (image.len() as u64).to_be_bytes();
    put(96, &size);
    put(104, &size);
    put(112, &(SEGMENT as u64).to_be_bytes());
    file.extend(image);
    file
}

#[test]
fn an_elf_begins_as_a_bzimage_does() {
    let whole = image(0x20000, 4096);
    let (registers, memory) = run(64, &elf(&whole), None, "quiet").unwrap();
    assert_eq!(registers.get("psw_addr"), Some(0x10000));
    let line: [u8; 7] = memory.read_obj(GuestAddress(0x10480 + 17)).unwrap();
    assert_eq!(&line, b"quiet\0Z");
    // What the decompressor unpacks begins otherwise, and where others do.
    let mut inner = whole;
    inner[0x10008..0x1000e].fill(0);
    for inner in [&inner[..], &inner[..0x8000]] {
        let error = run(64, &elf(inner), None, "").unwrap_err().to_string();
        assert!(error.contains("arch/s390/boot/bzImage"), "{error}");
    }
}

#[test]
fn other_kernels_are_refused() {
    let mut arm = vec![0; 4096];
    arm[56..60].copy_from_slice(b"ARM\x64");
    let error = run(16, &arm, None, "").unwrap_err().to_string();
    assert!(error.contains("s390x"), "{error}");
}

#[test]
fn touched_memory_stays_as_it_is() {
    let config = VmConfig {
        memory: 4 << 20,
        ..VmConfig::default()
    };
    let plan = layout::plan(&config, &host::typical()).unwrap();
    let memory =
        |mib: usize| GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap();
    let whole = memory(4);
    touch(&plan, &whole).unwrap();
    assert_eq!(doubleword(&whole, 3 << 20), 0);
    assert!(touch(&plan, &memory(3)).is_err());
}
