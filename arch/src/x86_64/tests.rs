use crossvisor_vmm::config::{Disk, Net};

use super::*;

fn config() -> VmConfig {
    VmConfig::default()
}

fn disk() -> Disk {
    Disk {
        path: "disk".into(),
        read_only: false,
        serial: None,
        queues: None,
    }
}

fn net() -> Net {
    Net {
        tap: "tap0".into(),
        mac: None,
        queues: 1,
    }
}

fn plan(config: &VmConfig) -> Result<Plan> {
    Ok(X86Machine::new(config, &X86_64.typical_host())?.plan)
}

fn message(config: &VmConfig) -> String {
    plan(config).unwrap_err().to_string()
}

#[test]
fn every_size_makes_a_machine_without_overlap() {
    for memory in [64, 128, 1024, 3071, 3072, 3073, 4096, 8192, 65536] {
        for cpus in [1, 2, 64, 255] {
            for transport in [Transport::Pci, Transport::Mmio] {
                let config = VmConfig {
                    memory: memory << 20,
                    cpus,
                    transport: Some(transport),
                    ..config()
                };
                let plan = plan(&config).unwrap();
                plan.check(4096).unwrap();
                assert_eq!(plan.cpus, cpus);
                let size: u64 = plan.memory.iter().map(|range| range.size).sum();
                assert_eq!(size, memory << 20);
                assert_eq!(plan.pci.is_some(), transport == Transport::Pci);
            }
        }
    }
}

#[test]
fn devices_up_to_the_limit_and_no_more() {
    for disks in 0..=31 {
        for nets in [0, 1, 31 - disks] {
            let config = VmConfig {
                disks: vec![disk(); disks],
                nets: vec![net(); nets],
                entropy: false,
                ..config()
            };
            match plan(&config) {
                Ok(plan) => assert_eq!(plan.devices.len(), disks + nets),
                Err(error) => {
                    assert!(disks + nets > 31, "{error}");
                    assert!(error.to_string().contains("31"), "{error}");
                }
            }
        }
    }
}

#[test]
fn ports_do_not_overlap() {
    let plan = plan(&config()).unwrap();
    let ports: Vec<_> = plan.regions.iter().filter(|region| region.ports).collect();
    for (index, a) in ports.iter().enumerate() {
        for b in ports.iter().skip(index + 1) {
            assert!(!a.range.overlaps(&b.range), "{} and {}", a.name, b.name);
        }
    }
}

#[test]
fn what_cannot_be_met_names_the_option() {
    let cpus = |cpus| message(&VmConfig { cpus, ..config() });
    assert!(cpus(0).starts_with("--cpus: 0 is not between 1 and 255"));
    assert!(cpus(256).contains("between 1 and 255"));
    let memory = |memory| message(&VmConfig { memory, ..config() });
    assert!(memory(1 << 20).starts_with("--memory: "));
    assert!(memory((64 << 20) + 1).starts_with("--memory: "));
    for size in [1 << 40, u64::MAX / 4096 * 4096] {
        assert!(memory(size).contains("39 address bits"));
    }
    let irqchip = message(&VmConfig {
        irqchip: Some("gicv3".into()),
        ..config()
    });
    assert!(irqchip.starts_with("--irqchip: ") && irqchip.contains("apic"));
    let transport = message(&VmConfig {
        transport: Some(Transport::Ccw),
        ..config()
    });
    assert!(transport.contains("pci and mmio"), "{transport}");
    let mut host = X86_64.typical_host();
    host.max_vcpus = 8;
    let many = VmConfig {
        cpus: 9,
        ..config()
    };
    let error = X86Machine::new(&many, &host).unwrap_err().to_string();
    assert!(error.contains("between 1 and 8"), "{error}");
}

#[test]
fn a_host_without_what_is_needed_is_told_so() {
    for missing in caps::KNOWN.iter().filter(|known| known.required) {
        let mut host = X86_64.typical_host();
        for capability in &mut host.capabilities {
            if capability.name == missing.name {
                capability.value = 0;
            }
        }
        let error = X86Machine::new(&config(), &host).unwrap_err().to_string();
        assert!(error.contains(missing.name), "{error}");
    }
    let mut host = X86_64.typical_host();
    host.capabilities = caps::probe(|number| match number {
        72 | 8 | 37 | 136 => 0,
        _ => 1,
    });
    assert!(X86Machine::new(&config(), &host).is_ok());
}

#[test]
fn the_command_line_is_the_defaults_and_then_the_users() {
    let line = |console, user: &str, default_cmdline| {
        let config = VmConfig {
            console,
            cmdline: user.into(),
            default_cmdline,
            ..config()
        };
        plan(&config).unwrap().cmdline
    };
    assert_eq!(
        line(Console::Native, "root=/dev/vda", true),
        "console=ttyS0 panic=-1 reboot=panic_warm root=/dev/vda"
    );
    assert_eq!(
        line(Console::Virtio, "", true),
        "console=hvc0 panic=-1 reboot=panic_warm"
    );
    assert_eq!(line(Console::None, "", true), "panic=-1 reboot=panic_warm");
    assert_eq!(line(Console::Native, "quiet", false), "quiet");
    let error = message(&VmConfig {
        cmdline: "a\nb".into(),
        ..config()
    });
    assert!(error.starts_with("--cmdline: "), "{error}");
}

#[test]
fn wires_are_io_apic_pins() {
    let machine = X86Machine::new(&config(), &X86_64.typical_host()).unwrap();
    let routes = machine.routes();
    assert_eq!(routes.len(), 24);
    for (gsi, route) in routes {
        assert_eq!(route, Route::Irqchip { chip: 2, pin: gsi });
        assert_eq!(machine.irq_line(gsi), gsi);
    }
    assert_eq!(machine.plan.first_free_gsi, 24);
}

#[test]
fn messages_lead_to_local_apics_only() {
    let machine = X86Machine::new(&config(), &X86_64.typical_host()).unwrap();
    let route = |address| {
        machine.route_msi(MsiMessage {
            address,
            data: 0x4031,
            device_id: 8,
        })
    };
    let good = Route::Msi {
        address: 0xfee0_1000,
        data: 0x4031,
        device_id: None,
    };
    assert_eq!(route(0xfee0_1000), Some(good));
    for address in [0, 0xfed0_0000, 0xfef0_0000, 0x1_fee0_0000, u64::MAX] {
        assert_eq!(route(address), None, "{address:#x}");
    }
}

#[test]
fn a_warm_reset_is_a_panic() {
    let machine = X86Machine::new(&config(), &X86_64.typical_host()).unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    assert!(!machine.reset_is_panic(&memory, &[]));
    memory
        .write_slice(&[0x34, 0x12], GuestAddress(0x472))
        .unwrap();
    assert!(machine.reset_is_panic(&memory, &[]));
    memory.write_slice(&[0, 0], GuestAddress(0x472)).unwrap();
    assert!(!machine.reset_is_panic(&memory, &[]));
    let empty = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x1000), 0x1000)]).unwrap();
    assert!(!machine.reset_is_panic(&empty, &[]));
}

#[test]
fn descriptions_are_files_with_names() {
    let machine = X86Machine::new(&config(), &X86_64.typical_host()).unwrap();
    let files = machine.describe().unwrap();
    let names: Vec<_> = files.iter().map(|file| file.name).collect();
    assert_eq!(
        names,
        [
            "rsdp.dat", "dsdt.aml", "facp.dat", "apic.dat", "mcfg.dat", "xsdt.dat"
        ]
    );
    assert!(files.iter().all(|file| !file.bytes.is_empty()));
}
