//! Properties of planned machines and their device trees.

use crossvisor_vmm::arch::{Architecture, Host, Machine};
use crossvisor_vmm::config::{Console, Transport, VmConfig};
use crossvisor_vmm::plan::{Range, Slot};
use dtoolkit::Node;
use dtoolkit::fdt::{Fdt, FdtNode};

use super::fdt;
use super::gic::Gic;
use super::{Aarch64, Aarch64Machine, host, layout};
use crate::shared::fdt::Loading;
use crate::shared::testing::{bytes, cells, child, disks, dtc_complaints, has, nets, ranges, text};

/// A host that offers every controller.
pub(super) fn rich_host() -> Host {
    let mut host = host::typical();
    for capability in &mut host.capabilities {
        if capability.value == 0 {
            capability.value = 1;
        }
    }
    host
}

fn config(gic: Gic, cpus: u32) -> VmConfig {
    VmConfig {
        irqchip: Some(gic.name().into()),
        cpus,
        ..VmConfig::default()
    }
}

fn machine(config: &VmConfig) -> Aarch64Machine {
    Aarch64Machine::new(config, &rich_host()).unwrap()
}

fn tree(machine: &Aarch64Machine) -> Vec<u8> {
    let mut files = machine.describe().unwrap();
    assert_eq!(files.len(), 1);
    let file = files.remove(0);
    assert_eq!(file.name, "machine.dtb");
    file.bytes
}

#[test]
fn maps_of_all_sizes_are_sound() {
    let sizes: Vec<u64> = [64, 65, 127, 512, 1024, 3071, 3072, 4096, 5120, 65536]
        .map(|mib| mib << 20)
        .to_vec();
    for page_size in [4096, 16384, 65536] {
        let host = Host {
            page_size,
            ..rich_host()
        };
        for gic in Gic::ALL {
            for &memory in &sizes {
                for cpus in [1, 2, 8, 16, 17, 255, 512] {
                    let config = VmConfig {
                        memory,
                        ..config(gic, cpus)
                    };
                    if cpus > gic.max_vcpus(&host) {
                        assert!(Aarch64Machine::new(&config, &host).is_err());
                        continue;
                    }
                    let machine = Aarch64Machine::new(&config, &host).unwrap();
                    let plan = machine.plan();
                    plan.check(page_size).unwrap();
                    assert_eq!(plan.memory, [Range::new(1 << 30, memory)]);
                    let window = plan.pci.as_ref().unwrap().mmio64.range;
                    assert!(window.base >= (1 << 30) + memory);
                    assert_eq!(window.end(), 1 << machine.ipa_bits());
                    for region in &plan.regions {
                        assert!(region.range.end() <= 1 << 30, "{}", region.name);
                        if region.name.starts_with("gic") {
                            assert_eq!(region.range.base % 65536, 0, "{}", region.name);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn address_spaces_are_as_narrow_as_the_host_and_the_ram_allow() {
    let bits = |physical_bits, memory| {
        let host = Host {
            physical_bits,
            ..rich_host()
        };
        let config = VmConfig {
            memory,
            ..VmConfig::default()
        };
        Aarch64Machine::new(&config, &host).map(|machine| machine.ipa_bits())
    };
    assert_eq!(bits(48, 1 << 30).unwrap(), 40);
    assert_eq!(bits(36, 1 << 30).unwrap(), 36);
    assert_eq!(bits(36, 47 << 30).unwrap(), 36);
    let error = bits(36, 48 << 30).unwrap_err().to_string();
    assert!(
        error.contains("--memory") && error.contains("at most 48128 MiB"),
        "{error}"
    );
    assert_eq!(bits(48, 767 << 30).unwrap(), 40);
    assert_eq!(bits(48, 768 << 30).unwrap(), 41);
    assert!(bits(48, !0xfff).is_err());
    assert_eq!(bits(52, 1 << 48).unwrap(), 49);
    assert!(bits(200, 1 << 30).is_ok());
    assert!(bits(0, 1 << 30).is_ok());
}

#[test]
fn memory_that_cannot_be_mapped_is_refused() {
    for memory in [0, 1, 64 << 20 | 4096] {
        let host = Host {
            page_size: 16384,
            ..rich_host()
        };
        let config = VmConfig {
            memory,
            ..VmConfig::default()
        };
        let error = Aarch64Machine::new(&config, &host).unwrap_err().to_string();
        assert!(error.starts_with("--memory: "), "{error}");
    }
}

#[test]
fn a_gicv2_serves_eight() {
    for gic in [Gic::V2, Gic::V2m] {
        machine(&config(gic, 8));
        let error = Aarch64Machine::new(&config(gic, 9), &rich_host()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("1 to 8"), "{error}");
        assert!(
            error.contains("--irqchip gicv3 serves up to 512"),
            "{error}"
        );
    }
    for cpus in [0, 513, u32::MAX] {
        let error = Aarch64Machine::new(&config(Gic::V3Its, cpus), &rich_host()).unwrap_err();
        assert!(error.to_string().contains("1 to 512"), "{error}");
    }
}

#[test]
fn devices_fill_their_slots_and_no_more() {
    for transport in [Transport::Pci, Transport::Mmio] {
        for count in 0..=31 {
            for (disks, nets) in [(disks(count), nets(0)), (disks(0), nets(count))] {
                let config = VmConfig {
                    transport: Some(transport),
                    disks,
                    nets,
                    entropy: count < 31,
                    ..VmConfig::default()
                };
                let machine = machine(&config);
                let plan = machine.plan();
                plan.check(4096).unwrap();
                assert_eq!(plan.devices.len(), count + usize::from(count < 31));
                assert_eq!(plan.pci.is_some(), transport == Transport::Pci);
                let mut gsis: Vec<u32> = plan
                    .devices
                    .iter()
                    .filter_map(|device| match device.slot {
                        Slot::Mmio { gsi, .. } => Some(gsi),
                        _ => None,
                    })
                    .chain(plan.regions.iter().filter_map(|region| region.gsi))
                    .chain([0, 1, 2, 3])
                    .collect();
                let all = gsis.len();
                gsis.sort_unstable();
                gsis.dedup();
                assert_eq!(gsis.len(), all, "an interrupt is used twice");
                assert!(gsis.iter().all(|gsi| *gsi < plan.first_free_gsi));
            }
        }
    }
    let too_many = |transport, count| VmConfig {
        transport: Some(transport),
        disks: disks(count),
        ..VmConfig::default()
    };
    let host = rich_host();
    assert!(Aarch64Machine::new(&too_many(Transport::Pci, 31), &host).is_err());
    assert!(Aarch64Machine::new(&too_many(Transport::Mmio, 64), &host).is_err());
    assert!(Aarch64Machine::new(&too_many(Transport::Ccw, 0), &host).is_err());
}

#[test]
fn command_lines_begin_with_the_defaults() {
    let line = |console, default_cmdline| {
        let config = VmConfig {
            console,
            default_cmdline,
            cmdline: "quiet root=/dev/vda1".into(),
            ..VmConfig::default()
        };
        machine(&config).plan().cmdline.clone()
    };
    let rest = "panic=-1 reboot=panic_warm quiet root=/dev/vda1";
    assert_eq!(line(Console::Native, true), format!("console=ttyS0 {rest}"));
    assert_eq!(line(Console::Virtio, true), format!("console=hvc0 {rest}"));
    assert_eq!(line(Console::None, true), rest);
    assert_eq!(line(Console::Native, false), "quiet root=/dev/vda1");
    for cmdline in ["x".repeat(2048), "a\0b".into()] {
        let config = VmConfig {
            cmdline,
            ..VmConfig::default()
        };
        let error = Aarch64Machine::new(&config, &rich_host()).unwrap_err();
        assert!(error.to_string().starts_with("--cmdline: "), "{error}");
    }
}

#[test]
fn the_tree_tells_the_plan() {
    for gic in Gic::ALL {
        for cpus in [1, 8, 40] {
            if cpus > 8 && !gic.is_v3() {
                continue;
            }
            let machine = machine(&config(gic, cpus));
            let blob = tree(&machine);
            let fdt = Fdt::new(&blob).unwrap();
            let root = fdt.root();
            assert_eq!(cells(&root, "#address-cells"), [2]);
            assert_eq!(cells(&root, "interrupt-parent"), [1]);
            let memory = child(&root, "memory@40000000");
            assert_eq!(ranges(&memory, "reg"), machine.plan().memory);
            check_cpus(&root, cpus);
            check_gic(&root, gic, cpus);
            check_pci(&root, gic);
            let uart = child(&root, "serial@");
            assert_eq!(ranges(&uart, "reg"), [layout::UART]);
            assert_eq!(cells(&uart, "interrupts"), [0, 4, 1]);
            let chosen = child(&root, "chosen");
            assert_eq!(text(&chosen, "stdout-path"), format!("/{}", uart.name()));
            assert_eq!(text(&chosen, "bootargs"), machine.plan().cmdline);
            assert!(!has(&chosen, "kaslr-seed") && !has(&chosen, "linux,initrd-start"));
            let key = child(&child(&root, "gpio-keys"), "poweroff");
            assert_eq!(cells(&key, "linux,code"), [116]);
            let gpio = child(&root, "gpio@");
            let phandle = cells(&gpio, "phandle");
            assert_eq!(cells(&key, "gpios"), [phandle[0], 3, 0]);
            assert_eq!(text(&child(&root, "pmu"), "compatible"), "arm,armv8-pmuv3");
            assert_eq!(text(&child(&root, "psci"), "method"), "hvc");
        }
    }
}

fn check_cpus(root: &FdtNode<'_>, cpus: u32) {
    let node = child(root, "cpus");
    let ids: Vec<u32> = node
        .children()
        .map(|cpu| {
            assert_eq!(text(&cpu, "enable-method"), "psci");
            let id = cells(&cpu, "reg")[0];
            assert_eq!(cpu.name(), format!("cpu@{id:x}"));
            id
        })
        .collect();
    assert_eq!(ids.len(), cpus as usize);
    if cpus > 32 {
        assert_eq!((ids[15], ids[16], ids[33]), (0xf, 0x100, 0x201));
    }
}

fn check_gic(root: &FdtNode<'_>, gic: Gic, cpus: u32) {
    let node = child(root, "interrupt-controller@8000000");
    let reg = ranges(&node, "reg");
    let timer = cells(&child(root, "timer"), "interrupts");
    let ppis: Vec<u32> = timer.chunks(3).map(|one| one[1]).collect();
    assert_eq!(ppis, [13, 14, 11, 10]);
    match gic.is_v3() {
        true => {
            assert_eq!(text(&node, "compatible"), "arm,gic-v3");
            assert_eq!(reg[1].size, u64::from(cpus) * 0x2_0000);
            assert_eq!(timer[2], 4);
        }
        false => {
            assert_eq!(text(&node, "compatible"), "arm,cortex-a15-gic");
            assert_eq!(reg[0].size, 0x1000);
            assert_eq!(reg[1].size, 0x2000);
            assert_eq!(timer[2], ((1 << cpus) - 1) << 8 | 4);
        }
    }
    let children: Vec<&str> = node.children().map(|child| child.name()).collect();
    match gic {
        Gic::V3Its => assert_eq!(children, ["msi-controller@8040000"]),
        Gic::V2m => assert_eq!(children, ["v2m@8020000"]),
        Gic::V2 | Gic::V3 => assert!(children.is_empty(), "{children:?}"),
    }
}

fn check_pci(root: &FdtNode<'_>, gic: Gic) {
    let pci = child(root, "pcie@30000000");
    assert_eq!(text(&pci, "compatible"), "pci-host-ecam-generic");
    assert_eq!(cells(&pci, "bus-range"), [0, 0]);
    assert_eq!(has(&pci, "msi-map"), gic == Gic::V3Its);
    assert_eq!(has(&pci, "msi-parent"), gic == Gic::V2m);
    assert!(has(&pci, "dma-coherent"));
    let windows = cells(&pci, "ranges");
    assert_eq!(windows.len(), 14);
    assert_eq!(windows[..5], [0x0200_0000, 0, 0x1000_0000, 0, 0x1000_0000]);
    assert_eq!(windows[7..10], [0x4300_0000, 0xc0, 0]);
    // Device 2, INTB: two wires on from INTB.
    let map = cells(&pci, "interrupt-map");
    assert_eq!(map.len(), 16 * 10);
    let entry = map
        .chunks(10)
        .find(|entry| entry[0] == 2 << 11 && entry[3] == 2)
        .unwrap();
    assert_eq!(entry[7..], [0, 3, 4]);
}

#[test]
fn mmio_devices_have_nodes() {
    let config = VmConfig {
        transport: Some(Transport::Mmio),
        disks: disks(2),
        ..VmConfig::default()
    };
    let machine = machine(&config);
    let blob = tree(&machine);
    let root = Fdt::new(&blob).unwrap().root();
    let mut nodes = root
        .children()
        .filter(|child| child.name().starts_with("virtio_mmio@"));
    for device in &machine.plan().devices {
        let Slot::Mmio { range, gsi } = device.slot else {
            panic!("{} is elsewhere", device.name);
        };
        let node = nodes.next().unwrap();
        assert_eq!(ranges(&node, "reg"), [range]);
        assert_eq!(cells(&node, "interrupts"), [0, gsi, 1]);
    }
    assert!(nodes.next().is_none());
    assert!(
        !root
            .children()
            .any(|child| child.name().starts_with("pcie"))
    );
}

#[test]
fn what_is_not_there_is_not_told() {
    let mut host = host::typical();
    for capability in &mut host.capabilities {
        if capability.name == "KVM_CAP_ARM_PMU_V3" {
            capability.value = 0;
        }
    }
    let config = VmConfig {
        console: Console::None,
        ..VmConfig::default()
    };
    let machine = Aarch64Machine::new(&config, &host).unwrap();
    let blob = tree(&machine);
    let root = Fdt::new(&blob).unwrap().root();
    assert!(!root.children().any(|child| child.name() == "pmu"));
    assert!(!has(&child(&root, "chosen"), "stdout-path"));
}

#[test]
fn loading_adds_the_initrd_and_seeds() {
    let machine = machine(&VmConfig::default());
    let loading = Loading {
        initrd: Some(Range::new(0x4800_0000, 0x1234)),
        kaslr_seed: Some(0x0102_0304_0506_0708),
        rng_seed: vec![7; 64],
    };
    let blob = fdt::build(&machine.contents(), &loading).unwrap();
    let root = Fdt::new(&blob).unwrap().root();
    let chosen = child(&root, "chosen");
    assert_eq!(cells(&chosen, "linux,initrd-start"), [0, 0x4800_0000]);
    assert_eq!(cells(&chosen, "linux,initrd-end"), [0, 0x4800_1234]);
    assert_eq!(bytes(&chosen, "kaslr-seed"), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(bytes(&chosen, "rng-seed"), [7; 64]);
}

#[test]
fn dtc_reads_the_tree_without_a_warning() {
    for gic in Gic::ALL {
        for transport in [Transport::Pci, Transport::Mmio] {
            let config = VmConfig {
                transport: Some(transport),
                disks: disks(3),
                ..config(gic, 4)
            };
            let blob = tree(&machine(&config));
            // What dtc would say is asserted above by a reader of our own.
            assert!(Fdt::new(&blob).is_ok());
            let complaints = dtc_complaints(&blob);
            assert!(
                !complaints.contains("Warning"),
                "{}: {complaints}",
                gic.name()
            );
        }
    }
}

#[test]
fn mpidrs_are_kvms() {
    assert_eq!(fdt::mpidr(0), 0);
    assert_eq!(fdt::mpidr(15), 15);
    assert_eq!(fdt::mpidr(16), 0x100);
    assert_eq!(fdt::mpidr(511), 0x1f0f);
    assert_eq!(fdt::mpidr(4096), 0x1_0000);
}

#[test]
fn only_a_warm_reset_is_a_panic() {
    let machine = machine(&VmConfig::default());
    let memory = vm_memory::GuestMemoryMmap::from_ranges(&[]).unwrap_or_default();
    assert!(machine.reset_is_panic(&memory, &[1]));
    assert!(machine.reset_is_panic(&memory, &[3, 0]));
    assert!(!machine.reset_is_panic(&memory, &[0]));
    assert!(!machine.reset_is_panic(&memory, &[2, 1]));
    assert!(!machine.reset_is_panic(&memory, &[]));
}

#[test]
fn plans_on_any_host() {
    let machine = Aarch64.machine(&VmConfig::default(), &Aarch64.typical_host());
    assert_eq!(machine.unwrap().plan().irqchip, "gicv3-its");
    assert_eq!(Aarch64.aliases(), ["arm64"]);
}
