use super::*;

const SIZES: [u64; 12] = [
    16 * MIB,
    64 * MIB,
    65 * MIB,
    512 * MIB,
    2 * GIB,
    3 * GIB - MIB,
    3 * GIB,
    3 * GIB + MIB,
    4 * GIB,
    5 * GIB,
    16 * GIB,
    64 * GIB,
];

fn host(physical_bits: u32) -> Host {
    Host {
        page_size: 4096,
        max_vcpus: 255,
        physical_bits,
        capabilities: Vec::new(),
    }
}

#[test]
fn all_memory_is_there_and_leaves_the_hole_alone() {
    for size in SIZES {
        let memory = memory(size);
        let sum: u64 = memory.iter().map(|range| range.size).sum();
        assert_eq!(sum, size);
        let hole = Range::new(LOW_RAM_END, RAM_ABOVE_HOLE - LOW_RAM_END);
        assert!(
            memory.iter().all(|range| !range.overlaps(&hole)),
            "{size:#x}"
        );
    }
}

#[test]
fn the_memory_map_is_sorted_and_without_overlap() {
    for size in SIZES {
        let memory = memory(size);
        let map = memory_map(&memory);
        for pair in map.windows(2) {
            assert!(pair[0].0.end() <= pair[1].0.base, "{size:#x}: {pair:x?}");
        }
        let ram: u64 = map
            .iter()
            .filter(|(_, kind)| *kind == MemoryKind::Ram)
            .map(|(range, _)| range.size)
            .sum();
        assert_eq!(ram, size - (HIGH_RAM - EBDA));
        let mapped = |at: u64| {
            let found = map
                .iter()
                .find(|(range, _)| (range.base..range.end()).contains(&at));
            found.map(|(_, kind)| *kind)
        };
        assert_eq!(mapped(ACPI.base), Some(MemoryKind::Acpi));
        assert_eq!(mapped(PCI_ECAM.base), Some(MemoryKind::Reserved));
        assert_eq!(mapped(KVM_TSS.end() - 1), Some(MemoryKind::Reserved));
        assert_eq!(mapped(VGA), None);
        assert_eq!(mapped(PCI_MMIO32.base), None);
        assert_eq!(mapped(IOAPIC.base), None);
    }
}

#[test]
fn boot_structures_do_not_overlap() {
    let mut ranges = [
        Range::new(GDT, 0x100),
        Range::new(PVH_START_INFO, 0x1000),
        Range::new(ZERO_PAGE, 0x1000),
        Range::new(PAGE_TABLES, 6 * 0x1000),
        Range::new(CMDLINE, CMDLINE_ROOM),
        Range::new(EBDA, VGA - EBDA),
        ACPI,
        Range::new(RESET_FLAG, 2),
    ];
    ranges.sort();
    for pair in ranges.windows(2) {
        assert!(!pair[0].overlaps(&pair[1]), "{pair:?}");
    }
}

#[test]
fn pci_memory_lies_between_ram_and_the_address_width() {
    for size in SIZES {
        for bits in [36, 39, 40, 46, 48, 52, 57, 64] {
            let memory = memory(size);
            let ram_end = memory.last().unwrap().end();
            let limit = 1u64.checked_shl(bits).unwrap_or(u64::MAX);
            match pci(&memory, &host(bits)) {
                Ok(pci) => {
                    let window = pci.mmio64.range;
                    assert!(window.base >= ram_end.max(RAM_ABOVE_HOLE));
                    assert!(window.base % GIB == 0 && window.size >= GIB);
                    assert!(window.end() <= limit, "{size:#x} {bits}");
                    assert_eq!(pci.mmio64.bus_address, window.base);
                }
                Err(error) => {
                    assert_eq!(bits, 36, "{size:#x}");
                    assert!(error.to_string().contains("--memory"), "{error}");
                }
            }
        }
    }
    assert!(pci(&memory(62 * GIB), &host(36)).is_ok());
    let error = pci(&memory(63 * GIB), &host(36)).unwrap_err().to_string();
    assert!(error.contains(&format!("at most {}M", 62 << 10)), "{error}");
}

#[test]
fn interrupts_are_pins_that_nobody_shares() {
    let mut used = vec![COM1_GSI, ACPI_GSI, 0, 1, 2, 3, 8];
    used.extend(VIRTIO_GSIS);
    used.sort_unstable();
    let all: Vec<u32> = (0..IOAPIC_PINS).collect();
    assert_eq!(used, all);
    for gsi in PCI_INTX {
        assert!(gsi < IOAPIC_PINS);
    }
}

#[test]
fn mmio_devices_have_a_page_each_and_an_end() {
    let disk = plan_disk();
    for count in 0..=31 {
        let config = VmConfig {
            disks: vec![disk.clone(); count],
            ..VmConfig::default()
        };
        let total = count + 1;
        match devices(&config, Transport::Mmio) {
            Ok(devices) => {
                assert!(total <= VIRTIO_GSIS.len());
                assert_eq!(devices.len(), total);
                let mut pages = Vec::new();
                for device in devices {
                    let Slot::Mmio { range, gsi } = device.slot else {
                        panic!("{device:?}")
                    };
                    assert!(range.base % 4096 == 0 && range.end() <= VIRTIO_MMIO.end());
                    pages.push((range.base, gsi));
                }
                pages.dedup();
                assert_eq!(pages.len(), total);
            }
            Err(error) => {
                assert!(total > VIRTIO_GSIS.len());
                assert!(error.to_string().contains("at most 17"), "{error}");
            }
        }
    }
}

fn plan_disk() -> crossvisor_vmm::config::Disk {
    crossvisor_vmm::config::Disk {
        path: "disk".into(),
        read_only: false,
        serial: None,
        queues: None,
    }
}
