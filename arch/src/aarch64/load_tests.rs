//! Loading good, large and wrong kernels.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use crossvisor_vmm::arch::Machine as _;
use crossvisor_vmm::config::{self, VmConfig};
use crossvisor_vmm::plan::Range;
use dtoolkit::fdt::Fdt;
use dtoolkit::{Node, Property};
use vm_memory::{Bytes, GuestAddress};

use super::super::{Aarch64Machine, host};
use super::*;
use crate::shared::image::{FDT_MAX, RNG_SEED};

const MIB: u64 = 1 << 20;

/// An Image with `len` bytes of which it says that they take `image_size`.
fn image(len: usize, text_offset: u64, image_size: u64, flags: u64) -> Vec<u8> {
    let mut bytes = vec![0x5a; len.max(64)];
    bytes[0..8].fill(0);
    bytes[8..16].copy_from_slice(&text_offset.to_le_bytes());
    bytes[16..24].copy_from_slice(&image_size.to_le_bytes());
    bytes[24..32].copy_from_slice(&flags.to_le_bytes());
    bytes[32..64].fill(0);
    bytes[56..60].copy_from_slice(b"ARM\x64");
    bytes
}

const K4: u64 = 1 << 1;
const K16: u64 = 2 << 1;

struct Scene {
    folder: tempfile::TempDir,
    machine: Aarch64Machine,
    memory: GuestMemoryMmap,
}

impl Scene {
    fn new(mib: u64) -> Self {
        let config = VmConfig {
            memory: mib * MIB,
            ..VmConfig::default()
        };
        let machine = Aarch64Machine::new(&config, &host::typical()).unwrap();
        let ranges = [(GuestAddress(1 << 30), (mib * MIB) as usize)];
        Self {
            folder: tempfile::tempdir().unwrap(),
            machine,
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
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// A property of /chosen.
    fn chosen(&self, registers: &RegisterState, name: &str) -> Vec<u8> {
        let at = registers.get("x0").unwrap();
        let head = self.read(at, 8);
        let size = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let blob = self.read(at, size as usize);
        let root = Fdt::new(&blob).unwrap().root();
        let chosen = root
            .children()
            .find(|node| node.name() == "chosen")
            .unwrap();
        let found = chosen.properties().find(|property| property.name() == name);
        found.unwrap().value().to_vec()
    }

    fn initrd(&self, registers: &RegisterState) -> Range {
        let number = |name| {
            let bytes = self.chosen(registers, name);
            u64::from_be_bytes(bytes.try_into().unwrap())
        };
        let start = number("linux,initrd-start");
        Range::new(start, number("linux,initrd-end") - start)
    }
}

#[test]
fn loads_by_the_boot_protocol() {
    let scene = Scene::new(64);
    let kernel = image(3 << 20, 0, 5 * MIB, K4 | 8);
    let initrd = scene.file("initrd", b"initrd of a file");
    let registers = scene
        .load(&kernel, Some(config::Initrd::File(initrd)))
        .unwrap();
    assert_eq!(registers.get("pc"), Some(1 << 30));
    assert_eq!(registers.get("pstate"), Some(0x3c5));
    for zero in ["x1", "x2", "x3"] {
        assert_eq!(registers.get(zero), Some(0));
    }
    assert_eq!(scene.read(1 << 30, kernel.len()), kernel);
    let fdt = registers.get("x0").unwrap();
    assert_eq!(fdt, (1 << 30) + 6 * MIB);
    let place = scene.initrd(&registers);
    assert!(place.base >= fdt + FDT_MAX);
    assert_eq!(
        scene.read(place.base, place.size as usize),
        b"initrd of a file"
    );
    assert_eq!(scene.chosen(&registers, "kaslr-seed").len(), 8);
    assert_eq!(scene.chosen(&registers, "rng-seed").len(), RNG_SEED);
    let again = scene.load(&kernel, None).unwrap();
    let seeds = [&registers, &again].map(|state| scene.chosen(state, "rng-seed"));
    assert!(seeds[0].iter().any(|byte| *byte != 0));
}

#[test]
fn respects_the_text_offset() {
    let scene = Scene::new(64);
    let kernel = image(1 << 20, 0x8_0000, 2 * MIB, 0);
    let registers = scene.load(&kernel, None).unwrap();
    assert_eq!(registers.get("pc"), Some((1 << 30) + 0x8_0000));
    assert_eq!(registers.get("x0"), Some((1 << 30) + 4 * MIB));
}

#[test]
fn unpacks_gzip() {
    let scene = Scene::new(64);
    let kernel = image(1 << 20, 0, 2 * MIB, K4);
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(&kernel).unwrap();
    let registers = scene.load(&packer.finish().unwrap(), None).unwrap();
    let entry = registers.get("pc").unwrap();
    assert_eq!(scene.read(entry, kernel.len()), kernel);
}

#[test]
fn an_initrd_may_be_built() {
    let scene = Scene::new(64);
    let kernel = image(1 << 20, 0, 40 * MIB, K4);
    let bytes = Arc::new(vec![0xa5; 12 << 20]);
    let registers = scene
        .load(&kernel, Some(config::Initrd::Built(bytes.clone())))
        .unwrap();
    let place = scene.initrd(&registers);
    assert_eq!(place.size, bytes.len() as u64);
    assert_eq!(place.base % 65536, 0);
    assert_eq!(scene.read(place.base, bytes.len()), *bytes);
}

#[test]
fn what_does_not_fit_says_how_much_it_takes() {
    let scene = Scene::new(64);
    let kernel = image(1 << 20, 0, 40 * MIB, K4);
    let initrd = Arc::new(vec![0; 23 << 20]);
    let error = scene
        .load(&kernel, Some(config::Initrd::Built(initrd)))
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("--memory: 64 MiB do not hold"), "{error}");
    assert!(error.contains("its initrd: they take 65 MiB"), "{error}");
    for image_size in [63 * MIB, 1 << 40] {
        let error = scene
            .load(&image(1 << 20, 0, image_size, K4), None)
            .unwrap_err();
        assert!(error.to_string().starts_with("--memory: "), "{error}");
    }
}

#[test]
fn wrong_kernels_are_named() {
    let scene = Scene::new(64);
    let mut riscv = [0; 128];
    riscv[48..56].copy_from_slice(b"RISCV\0\0\0");
    riscv[56..60].copy_from_slice(b"RSC\x05");
    let mut elf = vec![0; 128];
    elf[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    elf[18] = 62;
    let truncated = &image(64, 0, 0, 0)[..60];
    for bytes in [&riscv[..], &elf, truncated, b"text", b"MZ"] {
        let error = scene.load(bytes, None).unwrap_err().to_string();
        assert!(error.contains("kernel: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let images = BootImages {
        kernel: "/nowhere/Image".into(),
        initrd: None,
    };
    let error = scene.machine.load(&images, &scene.memory).unwrap_err();
    assert!(error.to_string().contains("/nowhere/Image"), "{error}");
}

#[test]
fn a_missing_initrd_is_named() {
    let scene = Scene::new(64);
    let initrd = config::Initrd::File("/nowhere/initrd".into());
    let kernel = image(1 << 20, 0, 2 * MIB, K4);
    let error = scene.load(&kernel, Some(initrd)).unwrap_err();
    assert!(error.to_string().contains("/nowhere/initrd"), "{error}");
}

#[test]
fn a_page_size_that_the_cpu_lacks_is_refused() {
    let mut scene = Scene::new(64);
    let kernel = image(1 << 20, 0, 2 * MIB, K16);
    scene.load(&kernel, None).unwrap();
    for capability in &mut scene.machine.host.capabilities {
        if capability.name == "TGran16" {
            capability.value = 0;
        }
    }
    let error = scene.load(&kernel, None).unwrap_err().to_string();
    assert!(error.contains("16K pages"), "{error}");
    scene.load(&image(1 << 20, 0, 2 * MIB, K4), None).unwrap();
}
