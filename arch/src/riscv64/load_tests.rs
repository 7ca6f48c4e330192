//! Loading good, large and wrong kernels.

use std::io::Write;
use std::path::PathBuf;

use crossvisor_vmm::arch::Machine as _;
use crossvisor_vmm::config::{self, VmConfig};
use vm_memory::{Bytes, GuestAddress};

use super::super::{Riscv64Machine, host};
use super::*;

const MIB: u64 = 1 << 20;

/// An Image with `len` bytes of which it says that they take `image_size`.
fn image(len: usize, text_offset: u64, image_size: u64) -> Vec<u8> {
    let mut bytes = vec![0x5a; len.max(64)];
    bytes[0..64].fill(0);
    bytes[8..16].copy_from_slice(&text_offset.to_le_bytes());
    bytes[16..24].copy_from_slice(&image_size.to_le_bytes());
    bytes[32..36].copy_from_slice(&2u32.to_le_bytes());
    bytes[48..56].copy_from_slice(b"RISCV\0\0\0");
    bytes[56..60].copy_from_slice(b"RSC\x05");
    bytes
}

struct Scene {
    folder: tempfile::TempDir,
    machine: Riscv64Machine,
    memory: GuestMemoryMmap,
}

impl Scene {
    fn new(mib: u64) -> Self {
        let config = VmConfig {
            memory: mib * MIB,
            ..VmConfig::default()
        };
        let ranges = [(GuestAddress(2 << 30), (mib * MIB) as usize)];
        Self {
            folder: tempfile::tempdir().unwrap(),
            machine: Riscv64Machine::new(&config, &host::typical()).unwrap(),
            memory: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
        }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn load(&self, kernel: &[u8], initrd: Option<config::Initrd>) -> Result<RegisterState> {
        let images = BootImages {
            kernel: self.file("kernel", kernel),
            initrd,
        };
        self.machine.load(&images, &self.memory)
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let address = GuestAddress(address);
        self.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }
}

#[test]
fn loads_by_the_boot_protocol() {
    let scene = Scene::new(64);
    let kernel = image(3 << 20, 2 * MIB, 5 * MIB);
    let initrd = scene.file("initrd", b"initrd of a file");
    let registers = scene
        .load(&kernel, Some(config::Initrd::File(initrd)))
        .unwrap();
    let entry = (2 << 30) + 2 * MIB;
    assert_eq!(registers.get("pc"), Some(entry));
    assert_eq!(registers.get("a0"), Some(0));
    assert_eq!(registers.get("mode"), Some(1));
    assert_eq!(scene.read(entry, kernel.len()), kernel);
    let tree = registers.get("a1").unwrap();
    assert_eq!(tree, (2 << 30) + 8 * MIB);
    assert_eq!(scene.read(tree, 4), [0xd0, 0x0d, 0xfe, 0xed]);
}

#[test]
fn unpacks_gzip() {
    let scene = Scene::new(64);
    let kernel = image(1 << 20, 0, 2 * MIB);
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(&kernel).unwrap();
    let registers = scene.load(&packer.finish().unwrap(), None).unwrap();
    let entry = registers.get("pc").unwrap();
    assert_eq!(scene.read(entry, kernel.len()), kernel);
}

#[test]
fn what_does_not_fit_says_how_much_it_takes() {
    let scene = Scene::new(64);
    let error = scene.load(&image(1 << 20, 2 * MIB, 61 * MIB), None);
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("--memory: 64 MiB do not hold"), "{error}");
    assert!(error.contains("66 MiB"), "{error}");
}

#[test]
fn wrong_kernels_are_named() {
    let scene = Scene::new(64);
    let mut arm64 = [0; 128];
    arm64[56..60].copy_from_slice(b"ARM\x64");
    let mut elf = vec![0; 128];
    elf[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    elf[18] = 243;
    let mut big_endian = image(1 << 10, 0, MIB);
    big_endian[24] = 1;
    for bytes in [&arm64[..], &elf, &big_endian, b"text", b"MZ"] {
        let error = scene.load(bytes, None).unwrap_err().to_string();
        assert!(error.contains("kernel: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
