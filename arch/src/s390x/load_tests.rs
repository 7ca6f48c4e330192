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
