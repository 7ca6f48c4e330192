//! Loading good, large and wrong kernels.

use std::path::PathBuf;
use std::sync::Arc;

use crossvisor_vmm::arch::Machine as _;
use crossvisor_vmm::config::{Initrd, VmConfig};
use dtoolkit::Node;
use dtoolkit::fdt::Fdt;

use super::super::{Ppc64Machine, host, names};
use super::*;

const MIB: u64 = 1 << 20;
const VIRTUAL: u64 = 0xc000_0000_0000_0000;

/// An ELF kernel of 8 bytes that takes `memsz`, at `paddr`.
fn elf(big_endian: bool, machine: u16, paddr: u64, memsz: u64) -> Vec<u8> {
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1 + u8::from(big_endian), 1];
    bytes.resize(16, 0);
    let mut put = |value: u64, size: usize| {
        let word = match big_endian {
            true => value.to_be_bytes()[8 - size..].to_vec(),
            false => value.to_le_bytes()[..size].to_vec(),
        };
        bytes.extend(word);
    };
    // ELF header from e_type on.
    for (value, size) in [
        (2, 2),
        (machine.into(), 2),
        (1, 4),
        (VIRTUAL + 0x20, 8),
        (64, 8),
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (1, 2),
        (0, 2),
        (0, 2),
        (0, 2),
        // The program header.
        (1, 4),
        (7, 4),
        (120, 8),
        (VIRTUAL, 8),
        (paddr, 8),
        (8, 8),
        (memsz, 8),
        (0x1000, 8),
    ] {
        put(value, size);
    }
    bytes.extend(*b"a kernel");
    bytes
}

const PPC64: u16 = 21;

struct Scene {
    folder: tempfile::TempDir,
    machine: Ppc64Machine,
    memory: GuestMemoryMmap,
}

impl Scene {
    fn new(mib: u64) -> Self {
        let config = VmConfig {
            memory: mib * MIB,
            ..VmConfig::default()
        };
        let machine = Ppc64Machine::new(&config, &host::typical()).unwrap();
        let ranges = [(GuestAddress(0), (mib * MIB) as usize)];
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

    fn load(&self, kernel: &[u8], initrd: Option<Initrd>) -> Result<RegisterState> {
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
}

#[test]
fn kernels_of_either_byte_order_are_entered_big_endian() {
    for big_endian in [false, true] {
        let scene = Scene::new(128);
        let kernel = elf(big_endian, PPC64, 0, 20 * MIB);
        let initrd = Arc::new(vec![0x33; 5000]);
        let registers = scene.load(&kernel, Some(Initrd::Built(initrd))).unwrap();
        assert_eq!(registers.get("pc"), Some(0x20));
        assert_eq!(registers.get("msr"), Some(0x8000_0000_0000_1000));
        assert_eq!(registers.get("r5"), Some(0));
        assert_eq!(scene.read(0, 8), b"a kernel");

        let at = registers.get("r3").unwrap();
        assert_eq!(scene.read(at - PAGE, 20), rtas::stub());
        assert!(at - PAGE >= 20 * MIB);
        let head = scene.read(at, 8);
        let size = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let blob = names::cut(scene.read(at, size as usize));
        let fdt = Fdt::new(&blob).unwrap();
        let root = fdt.root();
        assert!(root.children().any(|node| node.name() == "rtas"));
        assert_eq!(scene.read(at + FDT_MAX, 5000), [0x33; 5000]);
    }
}

#[test]
fn wrong_kernels_are_named_with_what_is_wrong() {
    let scene = Scene::new(128);
    let error = |kernel: &[u8]| scene.load(kernel, None).unwrap_err().to_string();
    let text = error(&elf(false, 62, 0, MIB));
    assert!(
        text.contains("x86_64 ELF") && text.contains("ppc64le"),
        "{text}"
    );
    // Of the other byte order, and not of this architecture.
    for (big_endian, machine, name) in [(true, 22, "s390x ELF"), (true, 20, "32-bit PowerPC ELF")] {
        let text = error(&elf(big_endian, machine, 0, MIB));
        assert!(text.contains(name) && text.contains("ppc64le"), "{text}");
    }
    let text = error(&elf(false, PPC64, MIB, MIB));
    assert!(
        text.contains("0x100000") && text.contains("address 0"),
        "{text}"
    );
    let mut image = vec![0; 4096];
    image[56..60].copy_from_slice(b"ARM\x64");
    let text = error(&image);
    assert!(
        text.contains("aarch64") && text.contains("ppc64le"),
        "{text}"
    );
    let text = error(b"not a kernel");
    assert!(text.contains("not a kernel"), "{text}");
    assert!(text.contains("/kernel: "), "{text}");
}

#[test]
fn what_does_not_fit_says_how_much_it_takes() {
    let scene = Scene::new(64);
    let text = scene.load(&elf(false, PPC64, 0, 100 * MIB), None);
    let text = text.unwrap_err().to_string();
    assert!(text.starts_with("--memory: 64 MiB do not hold"), "{text}");
    assert!(text.contains("take 105 MiB"), "{text}");
    let initrd = Arc::new(vec![0; 50 << 20]);
    let kernel = elf(false, PPC64, 0, 20 * MIB);
    let text = scene.load(&kernel, Some(Initrd::Built(initrd)));
    let text = text.unwrap_err().to_string();
    assert!(text.contains("kernel and its initrd"), "{text}");
    let text = scene.load(&kernel, Some(Initrd::File("/nowhere/initrd".into())));
    assert!(text.unwrap_err().to_string().contains("/nowhere/initrd"));
}
