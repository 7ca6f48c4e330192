//! Properties of planned machines and their device trees.

use crossvisor_vmm::arch::{Architecture, Host, Machine};
use crossvisor_vmm::config::{Console, Disk, Net, Transport, VmConfig};
use crossvisor_vmm::plan::Range;
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node, Property};

use super::fdt::{self, Loading};
use super::{Ppc64, Ppc64Machine, host, names, rtas, sources};

fn machine(config: &VmConfig) -> Ppc64Machine {
    Ppc64Machine::new(config, &host::typical()).unwrap()
}

fn tree(machine: &Ppc64Machine) -> Vec<u8> {
    let mut files = machine.describe().unwrap();
    assert_eq!(files.len(), 1);
    let file = files.remove(0);
    assert_eq!(file.name, "machine.dtb");
    names::cut(file.bytes)
}

/// The bytes of a property.
fn bytes(node: &FdtNode<'_>, name: &str) -> Vec<u8> {
    let name = &name[..name.len().min(31)];
    match node.properties().find(|property| property.name() == name) {
        Some(property) => property.value().to_vec(),
        None => panic!("{} has no {name}", node.name()),
    }
}

fn has(node: &FdtNode<'_>, name: &str) -> bool {
    node.properties().any(|property| property.name() == name)
}

fn cells(node: &FdtNode<'_>, name: &str) -> Vec<u32> {
    let bytes = bytes(node, name);
    assert_eq!(bytes.len() % 4, 0, "{name}");
    bytes
        .chunks(4)
        .map(|cell| u32::from_be_bytes(cell.try_into().unwrap()))
        .collect()
}

fn text(node: &FdtNode<'_>, name: &str) -> String {
    let text = String::from_utf8(bytes(node, name)).unwrap();
    text.trim_end_matches('\0').into()
}

fn child<'a>(node: &FdtNode<'a>, prefix: &str) -> FdtNode<'a> {
    match node
        .children()
        .find(|child| child.name().starts_with(prefix))
    {
        Some(child) => child,
        None => panic!("no {prefix}"),
    }
}

fn message(config: &VmConfig) -> String {
    let machine = Ppc64Machine::new(config, &host::typical());
    machine.unwrap_err().to_string()
}

#[test]
fn maps_of_all_sizes_are_sound() {
    for page_size in [4096, 65536] {
        let host = Host {
            page_size,
            ..host::typical()
        };
        for memory in [64 << 20, 127 << 20, 1 << 30, 5 << 30, 1 << 40, 32 << 40] {
            let config = VmConfig {
                memory,
                ..VmConfig::default()
            };
            let machine = Ppc64Machine::new(&config, &host).unwrap();
            machine.plan().check(page_size).unwrap();
            assert_eq!(machine.plan().memory, [Range::new(0, memory)]);
            let pci = machine.plan().pci.clone().unwrap();
            assert!(pci.ecam.is_none());
            assert!(pci.mmio64.range.end() <= 1 << 46);
        }
    }
}

#[test]
fn what_cannot_be_met_is_said_by_its_option() {
    let config = VmConfig::default();
    let with = |change: fn(&mut VmConfig)| {
        let mut config = config.clone();
        change(&mut config);
        message(&config)
    };
    let text = with(|config| config.memory = 32 << 20);
    assert!(
        text.starts_with("--memory: 32 MiB") && text.contains("64 MiB"),
        "{text}"
    );
    let text = with(|config| config.memory = (1 << 30) + 4096);
    assert!(
        text.starts_with("--memory: ") && text.contains("65536"),
        "{text}"
    );
    let text = with(|config| config.memory = 33 << 40);
    assert!(text.starts_with("--memory: "), "{text}");
    for cpus in [0, 2049] {
        let text = message(&VmConfig {
            cpus,
            ..config.clone()
        });
        assert!(
            text.starts_with("--cpus: ") && text.contains("2048"),
            "{text}"
        );
    }
    let text = with(|config| config.irqchip = Some("gicv3".into()));
    assert!(
        text.starts_with("--irqchip: ") && text.contains("xics"),
        "{text}"
    );
    let text = with(|config| config.transport = Some(Transport::Mmio));
    assert!(
        text.starts_with("--transport: ") && text.contains("pci"),
        "{text}"
    );
    let text = with(|config| config.mmu = Some("sv48".into()));
    assert!(text.starts_with("--mmu: "), "{text}");
    let text = with(|config| config.cmdline = "x".repeat(3000));
    assert!(text.starts_with("--cmdline: "), "{text}");
}

#[test]
fn queues_without_a_message_of_their_own_are_refused() {
    let config = |disk, net| VmConfig {
        disks: vec![Disk {
            path: "disk".into(),
            read_only: false,
            serial: None,
            queues: Some(disk),
        }],
        nets: vec![Net {
            tap: "tap0".into(),
            mac: None,
            queues: net,
        }],
        ..VmConfig::default()
    };
    machine(&config(31, 15));
    let text = message(&config(32, 15));
    assert_eq!(
        text,
        "--disk: queues=32: this machine's devices have 32 messages each, enough for queues=31"
    );
    let text = message(&config(31, 16));
    assert!(
        text.starts_with("--net: queues=16: ") && text.ends_with(" queues=15"),
        "{text}"
    );
}

#[test]
fn the_tree_tells_of_a_partition() {
    let config = VmConfig {
        cpus: 3,
        memory: 1 << 30,
        ..VmConfig::default()
    };
    let machine = machine(&config);
    let blob = tree(&machine);
    let fdt = Fdt::new(&blob).unwrap();
    let root = fdt.root();
    assert_eq!(text(&root, "device_type"), "chrp");
    let memory = child(&root, "memory");
    assert_eq!(cells(&memory, "reg"), [0, 0, 0, 1 << 30]);

    let cpus = child(&root, "cpus");
    assert_eq!(cpus.children().count(), 3);
    for (index, cpu) in cpus.children().enumerate() {
        let index = index as u32;
        assert_eq!(cpu.name(), format!("PowerPC,POWER9@{index}"));
        assert_eq!(cells(&cpu, "reg"), [index]);
        assert_eq!(cells(&cpu, "ibm,ppc-interrupt-server#s"), [index]);
        assert_eq!(cells(&cpu, "timebase-frequency"), [512_000_000]);
        assert_eq!(cells(&cpu, "cpu-version")[0] >> 16, 0x4e);
        let encodings = [0x0000_000c, 0xa000_0010, 0x2000_0015, 0x4000_001e];
        assert_eq!(cells(&cpu, "ibm,processor-radix-AP-encodings"), encodings);
        let features = bytes(&cpu, "ibm,pa-features");
        assert_eq!((features.len(), features[0]), (68, 66));
        assert_eq!(features[2 + 40], 0x80, "radix");
        assert_eq!(features[2 + 22], 0, "no transactional memory");
        assert!(!has(&cpu, "ibm,segment-page-sizes"));
    }

    let chosen = child(&root, "chosen");
    let vec5 = bytes(&chosen, "ibm,architecture-vec-5");
    assert_eq!(usize::from(vec5[0]), vec5.len() - 2);
    assert_eq!((vec5[24], vec5[26]), (0x40, 0x40));
    assert_eq!(text(&chosen, "bootargs"), "console=hvc0 panic=-1");
    assert_eq!(text(&chosen, "stdout-path"), "/vdevice/vty@71000000");

    let rtas = child(&root, "rtas");
    assert!(!has(&rtas, "display-character"), "there is no panel");
    for name in [
        "ibm,query-interrupt-source-number",
        "ibm,change-msi",
        "start-cpu",
    ] {
        assert_eq!(cells(&rtas, name).len(), 1);
    }
    assert!(has(&rtas, "ibm,extended-os-term"));
    assert!(text(&rtas, "ibm,hypertas-functions").contains("hcall-set-mode"));

    let nvram = child(&root, "nvram");
    assert_eq!(text(&nvram, "device_type"), "nvram");
    assert_eq!(cells(&nvram, "#bytes"), [rtas::nvram::SIZE]);

    let epow = child(&child(&root, "event-sources"), "epow-events");
    assert_eq!(cells(&epow, "interrupts"), [sources::EPOW, 0]);
}

#[test]
fn a_hashed_page_table_is_told_instead_of_radix_trees() {
    let config = VmConfig {
        mmu: Some("hpt".into()),
        memory: 1 << 30,
        ..VmConfig::default()
    };
    let machine = machine(&config);
    assert_eq!(machine.plan().mmu, Some("hpt"));
    let blob = tree(&machine);
    let fdt = Fdt::new(&blob).unwrap();
    let root = fdt.root();
    let vec5 = bytes(&child(&root, "chosen"), "ibm,architecture-vec-5");
    assert_eq!((vec5[24], vec5[26]), (0, 0));
    let cpu = child(&child(&root, "cpus"), "PowerPC");
    assert_eq!(cells(&cpu, "ibm,pft-size"), [0, 23]);
    // Pages of 4 KiB, by themselves and in 64 KiB, and of 64 KiB.
    let sizes = [12, 0, 2, 12, 0, 16, 7, 16, 0x110, 1, 16, 1];
    assert_eq!(cells(&cpu, "ibm,segment-page-sizes"), sizes);
    assert_eq!(bytes(&cpu, "ibm,pa-features")[2 + 40], 0, "no radix");
    assert!(!has(&cpu, "ibm,processor-radix-AP-encoding"));
}

#[test]
fn hashed_pages_are_no_larger_than_those_behind() {
    let sizes = |page_size, hugepages| {
        let host = Host {
            page_size,
            ..host::typical()
        };
        let config = VmConfig {
            mmu: Some("hpt".into()),
            memory: 512 << 20,
            hugepages,
            ..VmConfig::default()
        };
        let machine = Ppc64Machine::new(&config, &host).unwrap();
        let blob = tree(&machine);
        let fdt = Fdt::new(&blob).unwrap();
        let root = fdt.root();
        let memory = root
            .children()
            .filter(|node| node.name().starts_with("memory"));
        let ranges: Vec<_> = memory.map(|node| cells(&node, "reg")).collect();
        let cpu = child(&child(&root, "cpus"), "PowerPC");
        (cells(&cpu, "ibm,segment-page-sizes"), ranges)
    };
    // 512 MiB, of which 128 are reached without translation.
    let halves = [[0, 0, 0, 128 << 20], [0, 128 << 20, 0, 384 << 20]].map(Vec::from);
    let whole = [vec![0, 0, 0, 512 << 20]];
    let expected = (vec![12, 0, 1, 12, 0], halves.into());
    assert_eq!(sizes(4096, false), expected);
    let both = (
        vec![12, 0, 2, 12, 0, 16, 7, 16, 0x110, 1, 16, 1],
        whole.into(),
    );
    assert_eq!(sizes(65536, false), both);
    assert_eq!(sizes(4096, true), both);
}

#[test]
fn a_xive_is_told_instead_of_an_xics() {
    let config = VmConfig {
        cpus: 3,
        ..VmConfig::default()
    };
    let native = machine(&config);
    assert_eq!(native.plan().irqchip, "xive");
    native.plan().check(65536).unwrap();
    let blob = tree(&native);
    let fdt = Fdt::new(&blob).unwrap();
    let root = fdt.root();
    let vec5 = bytes(&child(&root, "chosen"), "ibm,architecture-vec-5");
    assert_eq!(vec5[23], 0x40);
    assert_eq!(cells(&root, "ibm,plat-res-int-priorities"), [7, 0xf8]);
    let controller = child(&root, "interrupt-controller@280000030000");
    assert_eq!(text(&controller, "compatible"), "ibm,power-ivpe");
    // The page for programs, and then the one for the system.
    let pages = [0x2800, 0x3_0000, 0, 0x1_0000, 0x2800, 0x2_0000, 0, 0x1_0000];
    assert_eq!(cells(&controller, "reg"), pages);
    assert_eq!(cells(&controller, "ibm,xive-eq-sizes"), [16]);
    assert_eq!(cells(&controller, "ibm,xive-lisn-ranges"), [0, 3]);
    let rtas = child(&root, "rtas");
    assert!(!has(&rtas, "ibm,set-xive") && has(&rtas, "start-cpu"));

    let legacy = machine(&VmConfig {
        irqchip: Some("xics".into()),
        ..config
    });
    assert_eq!(legacy.plan().irqchip, "xics");
    assert!(legacy.plan().regions.is_empty() && legacy.controller_pages().is_empty());
    let blob = tree(&legacy);
    let fdt = Fdt::new(&blob).unwrap();
    let root = fdt.root();
    assert!(!has(&root, "ibm,plat-res-int-priorities"));
    let controller = child(&root, "interrupt-controller@0");
    assert_eq!(text(&controller, "compatible"), "IBM,ppc-xicp");
    assert_eq!(cells(&controller, "ibm,interrupt-server-ranges"), [0, 3]);
    assert!(has(&child(&root, "rtas"), "ibm,set-xive"));
}

#[test]
fn devices_are_children_of_the_host_bridge() {
    let disk = Disk {
        path: "disk".into(),
        read_only: false,
        serial: None,
        queues: None,
    };
    let config = VmConfig {
        disks: vec![disk; 2],
        ..VmConfig::default()
    };
    let machine = machine(&config);
    let blob = tree(&machine);
    let fdt = Fdt::new(&blob).unwrap();
    let root = fdt.root();
    let phb = child(&root, "pci@800000020000000");
    assert_eq!(text(&phb, "compatible"), "IBM,Logical_PHB");
    assert_eq!(cells(&phb, "ibm,pe-total-#msi"), [3 * 32]);
    let ranges = cells(&phb, "ranges");
    assert_eq!(
        ranges[..7],
        [
            0x0200_0000,
            0,
            0x8000_0000,
            0x2000,
            0x8000_0000,
            0,
            0x7fff_0000
        ]
    );
    // A window that Linux finds, and makes no use of.
    assert_eq!(cells(&phb, "ibm,dma-window").len(), 5);
    assert!(has(&child(&root, "chosen"), "linux,iommu-off"));
    let map = cells(&phb, "interrupt-map");
    assert_eq!(map.len(), 16 * 7);
    assert_eq!(map[..7], [0, 0, 0, 1, 1, sources::INTX[0], 1]);
    // Device 1, INTA#.
    assert_eq!(map[28..35], [1 << 11, 0, 0, 1, 1, sources::INTX[1], 1]);
    let names: Vec<&str> = phb.children().map(|child| child.name()).collect();
    assert_eq!(names, ["scsi@1", "scsi@2", "entropy-source@3"]);
    for (slot, child) in (1..).zip(phb.children()) {
        assert_eq!(cells(&child, "reg")[0], slot << 11);
        assert_eq!(cells(&child, "ibm,req#msi-x"), [32]);
    }
    let sources = sources::sources(machine.plan());
    assert_eq!(sources.len(), 6 + 3 * 32);
}

#[test]
fn only_a_native_console_is_a_terminal() {
    for (console, there, words) in [
        (Console::Native, true, "console=hvc0 panic=-1"),
        (Console::Virtio, false, "console=hvc0 panic=-1"),
        (Console::None, false, "panic=-1"),
    ] {
        let machine = machine(&VmConfig {
            console,
            ..VmConfig::default()
        });
        let blob = tree(&machine);
        let fdt = Fdt::new(&blob).unwrap();
        let root = fdt.root();
        let count = child(&root, "vdevice").children().count();
        assert_eq!(count == 1, there);
        assert_eq!(has(&child(&root, "chosen"), "linux,stdout-path"), there);
        assert_eq!(machine.plan().cmdline, words);
    }
}

#[test]
fn loading_says_where_things_are() {
    let machine = machine(&VmConfig::default());
    let loading = Loading {
        initrd: Some(Range::new(0x400_0000, 0x1234)),
        rtas: Some(Range::new(0x300_0000, 0x1_0000)),
        rng_seed: vec![7; 64],
    };
    let blob = names::cut(fdt::build(&machine.contents(), &loading).unwrap());
    let fdt = Fdt::new(&blob).unwrap();
    let root = fdt.root();
    let chosen = child(&root, "chosen");
    assert_eq!(cells(&chosen, "linux,initrd-start"), [0, 0x400_0000]);
    assert_eq!(cells(&chosen, "linux,initrd-end"), [0, 0x400_1234]);
    let rtas = child(&root, "rtas");
    for name in ["linux,rtas-base", "linux,rtas-entry"] {
        assert_eq!(cells(&rtas, name), [0x300_0000]);
    }
    assert_eq!(cells(&rtas, "rtas-size"), [0x1_0000]);
    let reserved = 0x300_0000_u64.to_be_bytes();
    assert!(blob.windows(8).any(|bytes| bytes == reserved));
}

#[test]
fn the_architecture_goes_by_all_its_names() {
    for name in ["ppc64le", "ppc64el", "powerpc64le", "ppc64"] {
        assert_eq!(crate::find(name).unwrap().name(), "ppc64le");
    }
    let machine = Ppc64.machine(&VmConfig::default(), &Ppc64.typical_host());
    assert_eq!(machine.unwrap().plan().mmu, Some("radix"));
}
