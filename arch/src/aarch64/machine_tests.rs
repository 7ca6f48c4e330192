//! Machines run through boot-time exits by the scripted double, without
//! /dev/kvm.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossvisor_vmm::arch::{Machine, RegisterState};
use crossvisor_vmm::config::{Console, Transport, VmConfig};
use crossvisor_vmm::double::{ScriptedVm, Step};
use crossvisor_vmm::exit::End;
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::memory;
use crossvisor_vmm::power::{Event, Power, Requests};
use crossvisor_vmm::resources::{ConsoleOutput, Resources};
use crossvisor_vmm::vm::Vm;

use super::gic::{self, Gic};
use super::layout::{GPIO, RTC, UART, V2M, WIRES};
use super::tests::rich_host;
use super::{Aarch64Machine, load};

fn config(gic: Gic) -> VmConfig {
    VmConfig {
        irqchip: Some(gic.name().into()),
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
    let machine = Arc::new(Aarch64Machine::new(&config, &rich_host()).unwrap());
    let memory = memory::allocate(machine.plan(), false).unwrap();
    let registers = RegisterState(vec![("pc", 1 << 30), ("pstate", load::PSTATE)]);
    let resources = Resources::open(&config, ConsoleOutput::Stderr, Vec::new()).unwrap();
    let built = Vm::assemble(
        Arc::new(vm.clone()),
        machine,
        memory,
        registers,
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
    Step::SystemEvent(1, vec![0])
}

#[test]
fn peripherals_are_where_the_tree_has_them() {
    let script = vec![
        // LSR: the transmitter is empty.
        Step::Load(UART.base + 5, 1),
        // Peripheral IDs of the PrimeCells.
        Step::Load(RTC.base + 0xfe0, 4),
        Step::Load(GPIO.base + 0xfe0, 4),
        Step::Load(V2M.base + 8, 4),
        power_off(),
    ];
    let (end, vm) = run(&config(Gic::V2m), vec![script.clone()]);
    assert_eq!(end, End::PowerOff);
    let reads = &vm.record().reads;
    assert_eq!(reads[0], [0x60]);
    assert_eq!(reads[1], [0x31, 0, 0, 0]);
    assert_eq!(reads[2], [0x61, 0, 0, 0]);
    assert_eq!(reads[3], [0x80, 0x01, 0x80, 0]);
    let (_, vm) = run(&config(Gic::V3Its), vec![script]);
    assert_eq!(vm.record().reads[3], [0xff; 4], "there is no v2m frame");
}

#[test]
fn wires_are_shared_interrupts() {
    let (_, vm) = run(&config(Gic::V3Its), vec![vec![power_off()]]);
    let record = vm.record();
    assert_eq!(record.routes.len(), WIRES as usize);
    let identity = |(gsi, route): &(u32, Route)| *route == Route::Irqchip { chip: 0, pin: *gsi };
    assert!(record.routes.iter().all(identity));
}

#[test]
fn the_uart_and_mmio_devices_interrupt_by_irqfd() {
    let config = VmConfig {
        transport: Some(Transport::Mmio),
        ..config(Gic::V3)
    };
    let (requests, _events) = Requests::new();
    let (_built, vm) = assemble(&config, vec![vec![]], &Power::new(&requests));
    let mut irqfds = vm.record().irqfds.clone();
    irqfds.sort_unstable();
    assert_eq!(irqfds, [4, 16]);
}

#[test]
fn secondaries_wait_for_psci() {
    let (_, vm) = run(&config(Gic::V3), vec![vec![power_off()], vec![], vec![]]);
    let starts = vm.record().starts.clone();
    let boot = starts.iter().find(|(vcpu, _)| *vcpu == 0).unwrap();
    assert_eq!(boot.1.as_ref().unwrap().get("pstate"), Some(0x3c5));
    let others = starts.iter().filter(|(vcpu, _)| *vcpu != 0);
    assert!(others.clone().all(|(_, registers)| registers.is_none()));
}

#[test]
fn resets_and_panics_are_told_apart() {
    let end = |flags| run(&config(Gic::V2), vec![vec![Step::SystemEvent(2, flags)]]).0;
    assert_eq!(end(vec![0]), End::Reset);
    assert_eq!(end(vec![]), End::Reset);
    assert_eq!(end(vec![1]), End::Panic);
}

#[test]
fn an_exit_of_no_arm_machine_ends_it() {
    let (end, _) = run(&config(Gic::V2), vec![vec![Step::Arch(28, vec![])]]);
    assert!(matches!(end, End::Crash(_)), "{end:?}");
}

#[test]
fn the_power_button_reaches_the_guest() {
    // GPIOIBE and GPIOIE of line 3.
    let script = vec![
        Step::Store(GPIO.base + 0x408, vec![8, 0, 0, 0]),
        Step::Store(GPIO.base + 0x410, vec![8, 0, 0, 0]),
    ];
    let (requests, events) = Requests::new();
    let (built, vm) = assemble(&config(Gic::V3Its), vec![script], &Power::new(&requests));
    requests.send(Event::AskPowerOff);
    let runner = thread::spawn(move || built.run(&events).unwrap());
    let pressed = (gic::irq_line(5), true);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !vm.record().lines.contains(&pressed) {
        assert!(Instant::now() < deadline, "no interrupt");
        thread::sleep(Duration::from_millis(1));
    }
    requests.end(End::PowerOff);
    assert_eq!(runner.join().unwrap(), End::PowerOff);
}
