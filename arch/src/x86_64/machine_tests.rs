//! Machines run through boot-time exits by the scripted double, without
//! /dev/kvm.

use std::sync::Arc;

use crossvisor_devices::acpi_power;
use crossvisor_vmm::arch::{Architecture, Machine, RegisterState};
use crossvisor_vmm::config::{Console, Transport, VmConfig};
use crossvisor_vmm::double::{ScriptedVm, Step};
use crossvisor_vmm::exit::End;
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::memory;
use crossvisor_vmm::power::{Event, Power, Requests};
use crossvisor_vmm::resources::{ConsoleOutput, Resources};
use crossvisor_vmm::vm::Vm;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{X86_64, X86Machine, layout};

fn config() -> VmConfig {
    VmConfig {
        console: Console::None,
        memory: 64 << 20,
        ..VmConfig::default()
    }
}

/// Builds the machine of `config` with vCPUs that take these exits.
fn assemble(
    config: &VmConfig,
    scripts: Vec<Vec<Step>>,
    power: &Power,
) -> (Vm, ScriptedVm, GuestMemoryMmap) {
    let config = VmConfig {
        cpus: scripts.len() as u32,
        ..config.clone()
    };
    let vm = ScriptedVm::new(scripts);
    let machine = Arc::new(X86Machine::new(&config, &X86_64.typical_host()).unwrap());
    let memory = memory::allocate(machine.plan(), false).unwrap();
    let resources = Resources::open(&config, ConsoleOutput::Stderr, Vec::new()).unwrap();
    let built = Vm::assemble(
        Arc::new(vm.clone()),
        machine,
        memory.clone(),
        RegisterState(vec![("rip", 0x100_0200)]),
        &resources,
        power,
    );
    (built.unwrap(), vm, memory)
}

fn run(config: &VmConfig, scripts: Vec<Vec<Step>>) -> (End, ScriptedVm) {
    let (requests, events) = Requests::new();
    let (built, vm, _) = assemble(config, scripts, &Power::new(&requests));
    (built.run(&events).unwrap(), vm)
}

fn port(register: u64) -> u16 {
    (layout::ACPI_POWER.base + register) as u16
}

/// What Linux writes to power off: SLP_TYP of S5 and SLP_EN.
fn power_off() -> Step {
    let value = acpi_power::SLEEP_TYPE_S5 << 2 | 1 << 5;
    Step::Out(port(acpi_power::SLEEP_CONTROL), vec![value])
}

fn reset() -> Step {
    Step::Out(port(acpi_power::RESET), vec![acpi_power::RESET_VALUE])
}

#[test]
fn a_pcs_ports_answer() {
    let script = vec![
        // COM1's line status: the transmitter is empty.
        Step::In(0x3fd, 1),
        // The 8042's status, which says that its buffer never empties.
        Step::In(0x64, 1),
        // The clock's status register D: its battery is good.
        Step::Out(0x70, vec![0x0d]),
        Step::In(0x71, 1),
        // No second UART, and the delay port takes anything.
        Step::In(0x2fd, 1),
        Step::Out(0x80, vec![0]),
        // Host bridge: vendor and device, by mechanism #1 and by ECAM.
        Step::Out(0xcf8, 0x8000_0000u32.to_le_bytes().to_vec()),
        Step::In(0xcfc, 4),
        Step::Load(layout::PCI_ECAM.base, 4),
        Step::Load(layout::PCI_MMIO32.base, 4),
        power_off(),
    ];
    let (end, vm) = run(&config(), vec![script]);
    assert_eq!(end, End::PowerOff);
    let reads = vm.record().reads.clone();
    assert_eq!(reads[0], [0x60]);
    assert_eq!(reads[1], [0x01]);
    assert_eq!(reads[2], [0x80]);
    assert_eq!(reads[3], [0xff]);
    assert_ne!(reads[4], [0xff; 4]);
    assert_eq!(reads[4], reads[5]);
    assert_eq!(reads[6], [0xff; 4], "no BAR is decoded yet");
}

#[test]
fn the_ways_to_reset() {
    let ways = [
        reset(),
        Step::Out(0x64, vec![0xfe]),
        Step::Out(0xcf9, vec![0x0e]),
    ];
    for way in ways {
        let (end, _) = run(&config(), vec![vec![way.clone()]]);
        assert_eq!(end, End::Reset, "{way:?}");
    }
}

#[test]
fn a_warm_reset_is_a_panic_and_a_cold_one_is_not() {
    for (flag, expected) in [(0x1234u16, End::Panic), (0, End::Reset)] {
        let (requests, events) = Requests::new();
        let (built, _, memory) = assemble(&config(), vec![vec![reset()]], &Power::new(&requests));
        let address = GuestAddress(layout::RESET_FLAG);
        memory.write_slice(&flag.to_le_bytes(), address).unwrap();
        assert_eq!(built.run(&events).unwrap(), expected);
    }
}

#[test]
fn a_triple_fault_is_a_crash() {
    let (end, _) = run(&config(), vec![vec![Step::Shutdown]]);
    assert!(matches!(end, End::Crash(_)), "{end:?}");
    let (end, _) = run(&config(), vec![vec![Step::Arch(7, vec![])]]);
    assert!(matches!(end, End::Crash(_)), "{end:?}");
}

#[test]
fn secondaries_wait_for_sipi() {
    let (_, vm) = run(&config(), vec![vec![power_off()], vec![], vec![]]);
    let starts = vm.record().starts.clone();
    let boot = starts.iter().find(|(vcpu, _)| *vcpu == 0).unwrap();
    assert_eq!(boot.1.as_ref().unwrap().get("rip"), Some(0x100_0200));
    let others = starts.iter().filter(|(vcpu, _)| *vcpu != 0);
    assert!(others.clone().all(|(_, registers)| registers.is_none()));
}

#[test]
fn wires_lead_to_the_io_apic_only() {
    let (_, vm) = run(&config(), vec![vec![power_off()]]);
    let record = vm.record();
    assert_eq!(record.routes.len(), layout::IOAPIC_PINS as usize);
    let pin = |(gsi, route): &(u32, Route)| *route == Route::Irqchip { chip: 2, pin: *gsi };
    assert!(record.routes.iter().all(pin));
}

#[test]
fn the_uart_power_events_and_mmio_devices_interrupt_by_irqfd() {
    let config = VmConfig {
        transport: Some(Transport::Mmio),
        ..config()
    };
    let (requests, _events) = Requests::new();
    let (_built, vm, _) = assemble(&config, vec![vec![]], &Power::new(&requests));
    let mut irqfds = vm.record().irqfds.clone();
    irqfds.sort_unstable();
    assert_eq!(irqfds, [layout::COM1_GSI, 5, layout::ACPI_GSI]);
}

#[test]
fn there_is_a_power_button() {
    let (requests, events) = Requests::new();
    let (built, ..) = assemble(&config(), vec![vec![]], &Power::new(&requests));
    // Without a button to press, the first of these would end the VM.
    requests.send(Event::AskPowerOff);
    requests.end(End::PowerOff);
    assert_eq!(built.run(&events).unwrap(), End::PowerOff);
}

#[test]
fn what_is_typed_reaches_the_serial_port_only_as_the_console() {
    for (console, line_status) in [(Console::Native, 0x61), (Console::Virtio, 0x60)] {
        let config = VmConfig {
            console,
            ..config()
        };
        let script = vec![Step::In(0x3fd, 1), power_off()];
        let (requests, events) = Requests::new();
        let (built, vm, _) = assemble(&config, vec![script], &Power::new(&requests));
        assert_eq!(built.console_input().unwrap().push(b"x"), 1);
        built.run(&events).unwrap();
        assert_eq!(vm.record().reads, [[line_status]], "{console:?}");
    }
}
