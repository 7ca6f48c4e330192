//! Machines run through boot-time exits by the scripted double, without
//! /dev/kvm.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossvisor_vmm::arch::Machine;
use crossvisor_vmm::config::{Console, Transport, VmConfig};
use crossvisor_vmm::double::{ScriptedVm, Step};
use crossvisor_vmm::exit::End;
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::memory;
use crossvisor_vmm::power::{Event, Power, Requests};
use crossvisor_vmm::resources::{ConsoleOutput, Resources};
use crossvisor_vmm::vm::Vm;

use super::irqchip::Irqchip;
use super::layout::{RTC, UART, WIRES};
use super::{Riscv64Machine, host, load};

/// The PLIC's first register.
const PLIC: u64 = 0x0c00_0000;

fn config(irqchip: Irqchip) -> VmConfig {
    VmConfig {
        irqchip: Some(irqchip.name().into()),
        console: Console::None,
        memory: 64 << 20,
        ..VmConfig::default()
    }
}

/// Builds the machine of `config` with vCPUs that take these exits.
fn assemble(config: &VmConfig, scripts: Vec<Vec<Step>>, power: &Power) -> (Vm, ScriptedVm) {
    let config = VmConfig {
        cpus: scripts.len() as u32,
        ..config.clone()
    };
    let vm = ScriptedVm::new(scripts);
    let machine = Arc::new(Riscv64Machine::new(&config, &host::typical()).unwrap());
    let memory = memory::allocate(machine.plan(), false).unwrap();
    let resources = Resources::open(&config, ConsoleOutput::Stderr, Vec::new()).unwrap();
    let built = Vm::assemble(
        Arc::new(vm.clone()),
        machine,
        memory,
        load::entry(2 << 30, 0),
        &resources,
        power,
    );
    (built.unwrap(), vm)
}

fn run(config: &VmConfig, scripts: Vec<Vec<Step>>) -> (End, ScriptedVm) {
    let (requests, events) = Requests::new();
    let (built, vm) = assemble(config, scripts, &Power::new(&requests));
    (built.run(&events).unwrap(), vm)
}

fn power_off() -> Step {
    Step::SystemEvent(1, vec![0, 0])
}

fn store(address: u64, value: u32) -> Step {
    Step::Store(address, value.to_le_bytes().to_vec())
}

#[test]
fn peripherals_are_where_the_tree_has_them() {
    let script = vec![
        // LSR: the transmitter is empty.
        Step::Load(UART.base + 5, 1),
        // The upper half of the time, with the lower half before it.
        Step::Load(RTC.base, 4),
        Step::Load(RTC.base + 4, 4),
        store(PLIC + 4 * 5, 3),
        Step::Load(PLIC + 4 * 5, 4),
        power_off(),
    ];
    let (end, vm) = run(&config(Irqchip::Plic), vec![script.clone()]);
    assert_eq!(end, End::PowerOff);
    let reads = vm.record().reads.clone();
    assert_eq!(reads[0], [0x60]);
    assert_ne!(reads[2], [0; 4]);
    assert_eq!(reads[3], [3, 0, 0, 0]);
    let (_, vm) = run(&config(Irqchip::Aia), vec![script]);
    assert_eq!(vm.record().reads[3], [0xff; 4], "there is no PLIC");
}

#[test]
fn an_aias_wires_are_its_sources() {
    let (_, vm) = run(&config(Irqchip::Aia), vec![vec![power_off()]]);
    let record = vm.record();
    assert_eq!(record.routes.len(), WIRES as usize);
    let identity = |(gsi, route): &(u32, Route)| *route == Route::Irqchip { chip: 0, pin: *gsi };
    assert!(record.routes.iter().all(identity));
    // An irqfd cannot lower a wire, see aplic.rs.
    assert!(record.attached.is_empty());
}

#[test]
fn a_plic_needs_no_irqfd_and_no_routes() {
    let config = VmConfig {
        transport: Some(Transport::Mmio),
        ..config(Irqchip::Plic)
    };
    let (_, vm) = run(&config, vec![vec![power_off()]]);
    let record = vm.record();
    assert!(record.attached.is_empty() && record.routes.is_empty());
}

#[test]
fn the_uart_interrupts_through_the_plic() {
    let enable = PLIC + 0x2000;
    let claim = PLIC + 0x20_0004;
    let script = vec![
        store(PLIC + 4 * 5, 1),
        store(enable, 1 << 5),
        // IER: transmitter empty.
        Step::Store(UART.base + 1, vec![2]),
        Step::Load(claim, 4),
        // IIR: clears it.
        Step::Load(UART.base + 2, 1),
        store(claim, 5),
        Step::Load(claim, 4),
        power_off(),
    ];
    let (_, vm) = run(&config(Irqchip::Plic), vec![script]);
    let record = vm.record();
    assert_eq!(record.pins, [(0, true), (0, false)]);
    assert_eq!(record.reads[0], [5, 0, 0, 0]);
    assert_eq!(record.reads[2], [0; 4]);
}

#[test]
fn secondaries_wait_for_the_sbi() {
    let (_, vm) = run(
        &config(Irqchip::Aia),
        vec![vec![power_off()], vec![], vec![]],
    );
    let starts = vm.record().starts.clone();
    let boot = starts.iter().find(|(vcpu, _)| *vcpu == 0).unwrap();
    assert_eq!(boot.1.as_ref().unwrap().get("mode"), Some(1));
    let mut others = starts.iter().filter(|(vcpu, _)| *vcpu != 0);
    assert!(others.all(|(_, registers)| registers.is_none()));
}

#[test]
fn resets_and_panics_are_told_apart() {
    let end = |data| {
        run(
            &config(Irqchip::Aia),
            vec![vec![Step::SystemEvent(2, data)]],
        )
        .0
    };
    assert_eq!(end(vec![0, 1]), End::Reset);
    assert_eq!(end(vec![0, 2]), End::Panic);
    assert_eq!(end(vec![1, 1]), End::Panic);
}

#[test]
fn an_exit_of_no_riscv_machine_ends_it() {
    let (end, _) = run(&config(Irqchip::Aia), vec![vec![Step::Arch(28, vec![])]]);
    assert!(matches!(end, End::Crash(_)), "{end:?}");
}

#[test]
fn the_host_may_ask_for_a_power_off() {
    let (requests, events) = Requests::new();
    let power = Power::new(&requests);
    let (built, _) = assemble(&config(Irqchip::Aia), vec![vec![]], &power);
    requests.send(Event::AskPowerOff);
    let runner = thread::spawn(move || built.run(&events).unwrap());
    // Without a power button the first request would have ended it.
    let deadline = Instant::now() + Duration::from_millis(100);
    while Instant::now() < deadline && !runner.is_finished() {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(!runner.is_finished());
    requests.send(Event::AskPowerOff);
    assert_eq!(runner.join().unwrap(), End::Killed);
}
