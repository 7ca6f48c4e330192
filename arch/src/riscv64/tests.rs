//! Properties of planned machines and their device trees.

use crossvisor_vmm::arch::{Architecture, Host, Machine};
use crossvisor_vmm::config::{Console, Transport, VmConfig};
use crossvisor_vmm::plan::{DeviceKind, Range, Slot};
use dtoolkit::Node;
use dtoolkit::fdt::{Fdt, FdtNode};

use super::irqchip::Irqchip;
use super::{Riscv64, Riscv64Machine, fdt, host, layout};
use crate::shared::fdt::Loading;
use crate::shared::testing::{bytes, cells, child, disks, dtc_complaints, has, nets, ranges, text};

fn config(irqchip: Irqchip, cpus: u32) -> VmConfig {
    VmConfig {
        irqchip: Some(irqchip.name().into()),
        cpus,
        ..VmConfig::default()
    }
}

fn machine(config: &VmConfig) -> Riscv64Machine {
    Riscv64Machine::new(config, &host::typical()).unwrap()
}

fn tree(machine: &Riscv64Machine) -> Vec<u8> {
    let mut files = machine.describe().unwrap();
    assert_eq!(files.len(), 1);
    let file = files.remove(0);
    assert_eq!(file.name, "machine.dtb");
    file.bytes
}

#[test]
fn maps_of_all_sizes_are_sound() {
    for physical_bits in [41, 50, 59] {
        let host = Host {
            physical_bits,
            ..host::typical()
        };
        for irqchip in Irqchip::ALL {
            for mib in [64, 127, 512, 2048, 4096, 65536, 1 << 20] {
                for cpus in [1, 2, 3, 17, 1024] {
                    let config = VmConfig {
                        memory: mib << 20,
                        ..config(irqchip, cpus)
                    };
                    let machine = Riscv64Machine::new(&config, &host).unwrap();
                    let plan = machine.plan();
                    plan.check(4096).unwrap();
                    assert_eq!(plan.memory, [Range::new(2 << 30, mib << 20)]);
                    let window = plan.pci.as_ref().unwrap().mmio64.range;
                    assert!(window.base >= plan.memory[0].end());
                    for region in &plan.regions {
                        assert!(region.range.end() <= 2 << 30, "{}", region.name);
                    }
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for cpus in [0, 1025, u32::MAX] {
        let error = Riscv64Machine::new(&config(Irqchip::Aia, cpus), &host::typical());
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("--cpus") && error.contains("1 to 1024"),
            "{error}"
        );
    }
    for memory in [0, 1, 4095, 1 << 60, !0xfff] {
        let config = VmConfig {
            memory,
            ..VmConfig::default()
        };
        let error = Riscv64Machine::new(&config, &host::typical()).unwrap_err();
        assert!(error.to_string().starts_with("--memory: "), "{error}");
    }
    let config = VmConfig {
        mmu: Some("sv39".into()),
        ..VmConfig::default()
    };
    let error = Riscv64Machine::new(&config, &host::typical()).unwrap_err();
    assert!(error.to_string().starts_with("--mmu: `sv39`"), "{error}");
    let config = VmConfig {
        cmdline: "x".repeat(1024),
        ..VmConfig::default()
    };
    let error = Riscv64Machine::new(&config, &host::typical()).unwrap_err();
    assert!(error.to_string().starts_with("--cmdline: "), "{error}");
}

#[test]
fn devices_fill_their_slots_and_no_more() {
    for transport in [Transport::Pci, Transport::Mmio] {
        for count in 0..30 {
            for (disks, nets) in [(disks(count), nets(0)), (disks(0), nets(count))] {
                let config = VmConfig {
                    transport: Some(transport),
                    disks,
                    nets,
                    ..VmConfig::default()
                };
                let machine = machine(&config);
                let plan = machine.plan();
                plan.check(4096).unwrap();
                // And entropy, and the power key, which is the last.
                assert_eq!(plan.devices.len(), count + 2);
                assert_eq!(plan.devices[count + 1].kind, DeviceKind::PowerKey);
                assert_eq!(plan.pci.is_some(), transport == Transport::Pci);
                let devices = plan.devices.iter().filter_map(|device| match device.slot {
                    Slot::Mmio { gsi, .. } => Some(gsi),
                    _ => None,
                });
                let regions = plan.regions.iter().filter_map(|region| region.gsi);
                let mut gsis: Vec<u32> = devices.chain(regions).chain([1, 2, 3, 4]).collect();
                let all = gsis.len();
                gsis.sort_unstable();
                gsis.dedup();
                assert_eq!(gsis.len(), all, "an interrupt is used twice");
                assert!(
                    gsis.iter()
                        .all(|gsi| (1..plan.first_free_gsi).contains(gsi))
                );
            }
        }
    }
    let too_many = |transport, count| VmConfig {
        transport: Some(transport),
        disks: disks(count),
        ..VmConfig::default()
    };
    let host = host::typical();
    assert!(Riscv64Machine::new(&too_many(Transport::Pci, 30), &host).is_err());
    assert!(Riscv64Machine::new(&too_many(Transport::Mmio, 63), &host).is_err());
    assert!(Riscv64Machine::new(&too_many(Transport::Ccw, 0), &host).is_err());
}

#[test]
fn the_tree_tells_the_plan() {
    for irqchip in Irqchip::ALL {
        for cpus in [1, 2, 17] {
            let machine = machine(&config(irqchip, cpus));
            let blob = tree(&machine);
            let root = Fdt::new(&blob).unwrap().root();
            assert_eq!(cells(&root, "#address-cells"), [2]);
            let memory = child(&root, "memory@80000000");
            assert_eq!(ranges(&memory, "reg"), machine.plan().memory);
            let pins = check_cpus(&root, cpus, irqchip);
            let soc = child(&root, "soc");
            assert!(has(&soc, "ranges"));
            check_irqchip(&soc, irqchip, &pins);
            check_pci(&soc, irqchip);
            let kind: &[u32] = if irqchip == Irqchip::Aia { &[1] } else { &[] };
            let uart = child(&soc, "serial@");
            assert_eq!(ranges(&uart, "reg"), [layout::UART]);
            assert_eq!(cells(&uart, "interrupts"), [&[5], kind].concat());
            let rtc = child(&soc, "rtc@");
            assert_eq!(text(&rtc, "compatible"), "google,goldfish-rtc");
            assert_eq!(cells(&rtc, "interrupts"), [&[6], kind].concat());
            let chosen = child(&root, "chosen");
            assert_eq!(
                text(&chosen, "stdout-path"),
                format!("/soc/{}", uart.name())
            );
            assert_eq!(text(&chosen, "bootargs"), machine.plan().cmdline);
            assert!(!has(&chosen, "kaslr-seed") && !has(&chosen, "linux,initrd-start"));
        }
    }
}

/// Checks the vCPUs, and returns the phandles of their interrupt controllers.
fn check_cpus(root: &FdtNode<'_>, cpus: u32, irqchip: Irqchip) -> Vec<u32> {
    // Or else it would be these controllers' as well, see the tree's builder.
    assert!(!has(root, "interrupt-parent"));
    let node = child(root, "cpus");
    assert_eq!(cells(&node, "timebase-frequency"), [10_000_000]);
    let pins: Vec<u32> = (0..)
        .zip(node.children())
        .map(|(index, cpu)| {
            assert_eq!(cells(&cpu, "reg"), [index]);
            assert_eq!(text(&cpu, "mmu-type"), "riscv,sv48");
            let isa = text(&cpu, "riscv,isa");
            assert!(isa.starts_with("rv64imafdcv_z"), "{isa}");
            assert_eq!(isa.contains("_ssaia_"), irqchip == Irqchip::Aia, "{isa}");
            let names = text(&cpu, "riscv,isa-extensions");
            let names: Vec<&str> = names.split('\0').collect();
            assert!(names.contains(&"sstc") && names.contains(&"i"));
            assert_eq!(text(&cpu, "riscv,isa-base"), "rv64i");
            assert_eq!(cells(&cpu, "riscv,cbom-block-size"), [64]);
            let pin = child(&cpu, "interrupt-controller");
            assert_eq!(text(&pin, "compatible"), "riscv,cpu-intc");
            cells(&pin, "phandle")[0]
        })
        .collect();
    assert_eq!(pins.len(), cpus as usize);
    pins
}

fn check_irqchip(soc: &FdtNode<'_>, irqchip: Irqchip, pins: &[u32]) {
    let wires = child(soc, "interrupt-controller@c000000");
    assert_eq!(cells(soc, "interrupt-parent"), cells(&wires, "phandle"));
    let pins: Vec<u32> = pins.iter().flat_map(|pin| [*pin, 9]).collect();
    match irqchip {
        Irqchip::Plic => {
            assert!(text(&wires, "compatible").starts_with("sifive,plic-1.0.0"));
            assert_eq!(cells(&wires, "riscv,ndev"), [96]);
            assert_eq!(cells(&wires, "interrupts-extended"), pins);
            let size = 0x20_0000 + pins.len() as u64 / 2 * 0x1000;
            assert_eq!(ranges(&wires, "reg")[0].size, size);
            let mut children = soc.children();
            assert!(!children.any(|node| has(&node, "msi-controller")));
        }
        Irqchip::Aia => {
            assert_eq!(text(&wires, "compatible"), "riscv,aplic");
            assert_eq!(cells(&wires, "riscv,num-sources"), [96]);
            let imsics = child(soc, "interrupt-controller@28000000");
            assert_eq!(cells(&wires, "msi-parent"), cells(&imsics, "phandle"));
            assert_eq!(cells(&imsics, "riscv,num-ids"), [255]);
            assert_eq!(cells(&imsics, "interrupts-extended"), pins);
            let size = pins.len() as u64 / 2 * 0x1000;
            assert_eq!(ranges(&imsics, "reg")[0].size, size);
        }
    }
}

fn check_pci(soc: &FdtNode<'_>, irqchip: Irqchip) {
    let pci = child(soc, "pcie@30000000");
    assert_eq!(has(&pci, "msi-parent"), irqchip == Irqchip::Aia);
    // Device 2, INTB: two wires on from INTB, which is the first again.
    let map = cells(&pci, "interrupt-map");
    let length = match irqchip {
        Irqchip::Aia => 7,
        Irqchip::Plic => 6,
    };
    assert_eq!(map.len(), 16 * length);
    let entry = map
        .chunks(length)
        .find(|entry| entry[0] == 2 << 11 && entry[3] == 2)
        .unwrap();
    let level: &[u32] = if irqchip == Irqchip::Aia { &[4] } else { &[] };
    assert_eq!(entry[4..], [&[1, 4], level].concat());
}

#[test]
fn mmio_devices_have_nodes() {
    for irqchip in Irqchip::ALL {
        let config = VmConfig {
            transport: Some(Transport::Mmio),
            disks: disks(2),
            ..config(irqchip, 1)
        };
        let machine = machine(&config);
        let blob = tree(&machine);
        let root = Fdt::new(&blob).unwrap().root();
        let soc = child(&root, "soc");
        let mut nodes = soc
            .children()
            .filter(|child| child.name().starts_with("virtio_mmio@"));
        for device in &machine.plan().devices {
            let Slot::Mmio { range, gsi } = device.slot else {
                panic!("{} is elsewhere", device.name);
            };
            let node = nodes.next().unwrap();
            assert_eq!(ranges(&node, "reg"), [range]);
            assert_eq!(cells(&node, "interrupts")[0], gsi);
        }
        assert!(nodes.next().is_none());
        let mut children = soc.children();
        assert!(!children.any(|child| child.name().starts_with("pcie")));
    }
}

#[test]
fn what_is_not_there_is_not_told() {
    let mut host = host::typical();
    let missing = ["zicbom", host::SATP_MODE, "v"];
    host.capabilities
        .retain(|capability| !missing.contains(&capability.name));
    let config = VmConfig {
        console: Console::None,
        ..VmConfig::default()
    };
    let machine = Riscv64Machine::new(&config, &host).unwrap();
    let blob = tree(&machine);
    let root = Fdt::new(&blob).unwrap().root();
    assert!(!has(&child(&root, "chosen"), "stdout-path"));
    let cpu = child(&child(&root, "cpus"), "cpu@0");
    assert!(!has(&cpu, "riscv,cbom-block-size"));
    assert!(!has(&cpu, "mmu-type"));
    assert!(text(&cpu, "riscv,isa").starts_with("rv64imafdc_z"));
}

#[test]
fn loading_adds_the_initrd_and_seeds() {
    let machine = machine(&VmConfig::default());
    let loading = Loading {
        initrd: Some(Range::new(0x8800_0000, 0x1234)),
        kaslr_seed: Some(0x0102_0304_0506_0708),
        rng_seed: vec![7; 64],
    };
    let blob = fdt::build(&machine.contents(), &loading).unwrap();
    let root = Fdt::new(&blob).unwrap().root();
    let chosen = child(&root, "chosen");
    assert_eq!(cells(&chosen, "linux,initrd-start"), [0, 0x8800_0000]);
    assert_eq!(cells(&chosen, "linux,initrd-end"), [0, 0x8800_1234]);
    assert_eq!(bytes(&chosen, "rng-seed"), [7; 64]);
}

#[test]
fn dtc_reads_the_tree_without_a_warning() {
    for irqchip in Irqchip::ALL {
        for transport in [Transport::Pci, Transport::Mmio] {
            let config = VmConfig {
                transport: Some(transport),
                disks: disks(3),
                ..config(irqchip, 4)
            };
            let blob = tree(&machine(&config));
            assert!(Fdt::new(&blob).is_ok());
            let complaints = dtc_complaints(&blob);
            let name = irqchip.name();
            assert!(!complaints.contains("Warning"), "{name}: {complaints}");
        }
    }
}

#[test]
fn only_a_warm_reset_is_a_panic() {
    let machine = machine(&VmConfig::default());
    let memory = vm_memory::GuestMemoryMmap::from_ranges(&[]).unwrap_or_default();
    // Reason, and the type that is in a0.
    assert!(machine.reset_is_panic(&memory, &[0, 2]));
    assert!(machine.reset_is_panic(&memory, &[1, 1]));
    assert!(!machine.reset_is_panic(&memory, &[0, 1]));
    assert!(!machine.reset_is_panic(&memory, &[0]));
    assert!(!machine.reset_is_panic(&memory, &[]));
}

#[test]
fn the_virtio_console_is_the_first_of_its_kind() {
    let debug_console = |console| {
        let config = VmConfig {
            console,
            ..VmConfig::default()
        };
        machine(&config).has_debug_console()
    };
    assert!(debug_console(Console::Native));
    assert!(!debug_console(Console::Virtio));
    assert!(!debug_console(Console::None));
}

#[test]
fn plans_on_any_host() {
    let machine = Riscv64.machine(&VmConfig::default(), &Riscv64.typical_host());
    let machine = machine.unwrap();
    assert_eq!(machine.plan().irqchip, "aia");
    assert!(!machine.starts_secondaries());
    assert_eq!(Riscv64.kvm().is_some(), cfg!(target_arch = "riscv64"));
}
