//! Machines run through boot-time exits by the scripted double, without
//! /dev/kvm.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossvisor_vmm::arch::{Machine, RegisterState};
use crossvisor_vmm::config::{Console, VmConfig};
use crossvisor_vmm::double::{ScriptedVm, Step};
use crossvisor_vmm::exit::End;
use crossvisor_vmm::memory;
use crossvisor_vmm::power::{Power, Requests};
use crossvisor_vmm::resources::{ConsoleOutput, Resources};
use crossvisor_vmm::vm::Vm;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::fdt::{BUID, bar_address};
use super::{Ppc64Machine, host, load, rtas, sources};

fn config() -> VmConfig {
    VmConfig {
        console: Console::None,
        memory: 64 << 20,
        ..VmConfig::default()
    }
}

/// RTAS calls that a script makes, in order: arguments are laid out in memory
/// beforehand, one page each.
#[derive(Default)]
struct Calls(Vec<(u32, Vec<u32>, u32)>);

impl Calls {
    fn call(&mut self, name: &str, args: &[u32], results: u32) -> Step {
        let token = rtas::TOKENS.iter().find(|(known, _)| *known == name);
        let address = Self::address(self.0.len());
        self.0.push((token.unwrap().1, args.to_vec(), results));
        hypercall(0xf000, &[address])
    }

    fn address(index: usize) -> u64 {
        0x10_0000 + index as u64 * 0x1000
    }

    fn lay_out(&self, memory: &GuestMemoryMmap) {
        for (index, (token, args, results)) in self.0.iter().enumerate() {
            let mut words = vec![*token, args.len() as u32, *results];
            words.extend(args);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            let address = GuestAddress(Self::address(index));
            memory.write_slice(&bytes, address).unwrap();
        }
    }

    /// The results of call `index`.
    fn results(&self, memory: &GuestMemoryMmap, index: usize) -> Vec<u32> {
        let (_, args, results) = &self.0[index];
        let mut bytes = vec![0; *results as usize * 4];
        let first = Self::address(index) + 12 + args.len() as u64 * 4;
        memory.read_slice(&mut bytes, GuestAddress(first)).unwrap();
        bytes
            .chunks(4)
            .map(|word| u32::from_be_bytes(word.try_into().unwrap()))
            .collect()
    }
}

fn hypercall(number: u64, args: &[u64]) -> Step {
    let words = [number, 0].into_iter().chain(args.iter().copied());
    Step::Arch(19, words.flat_map(u64::to_ne_bytes).collect())
}

/// Builds the machine of `config` with vCPUs that take these exits.
fn assemble(
    config: &VmConfig,
    scripts: Vec<Vec<Step>>,
    calls: &Calls,
    power: &Power,
) -> (Vm, ScriptedVm, GuestMemoryMmap) {
    let config = VmConfig {
        cpus: scripts.len() as u32,
        ..config.clone()
    };
    let vm = ScriptedVm::new(scripts);
    let machine = Arc::new(Ppc64Machine::new(&config, &host::typical()).unwrap());
    let memory = memory::allocate(machine.plan(), false).unwrap();
    calls.lay_out(&memory);
    let resources = Resources::open(&config, ConsoleOutput::Stderr, Vec::new()).unwrap();
    let built = Vm::assemble(
        Arc::new(vm.clone()),
        machine,
        memory.clone(),
        load::entry_state(0, 0x1000),
        &resources,
        power,
    );
    (built.unwrap(), vm, memory)
}

fn run(
    config: &VmConfig,
    scripts: Vec<Vec<Step>>,
    calls: &Calls,
) -> (End, ScriptedVm, GuestMemoryMmap) {
    let (requests, events) = Requests::new();
    let (built, vm, memory) = assemble(config, scripts, calls, &Power::new(&requests));
    (built.run(&events).unwrap(), vm, memory)
}

const HIGH: u32 = (BUID >> 32) as u32;
const LOW: u32 = BUID as u32;

#[test]
fn ends_are_told_apart() {
    let end = |name, args: &[u32]| {
        let mut calls = Calls::default();
        let script = vec![calls.call(name, args, 1)];
        run(&config(), vec![script], &calls).0
    };
    assert_eq!(end("power-off", &[0, 0]), End::PowerOff);
    assert_eq!(end("system-reboot", &[]), End::Reset);
    assert_eq!(end("ibm,os-term", &[0x2000]), End::Panic);
}

#[test]
fn secondaries_start_by_rtas_and_stop() {
    let mut calls = Calls::default();
    let set_mode = hypercall(0x31c, &[1, 4, 0, 0]);
    let start = calls.call("start-cpu", &[1, 0x60, 1], 1);
    let stop = calls.call("stop-self", &[], 1);
    let (requests, events) = Requests::new();
    let scripts = vec![vec![set_mode, start], vec![stop]];
    let (built, vm, _) = assemble(&config(), scripts, &calls, &Power::new(&requests));
    let runner = thread::spawn(move || built.run(&events).unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    while vm.record().unions.len() < 3 {
        assert!(Instant::now() < deadline, "vCPU 1 did not run");
        thread::sleep(Duration::from_millis(1));
    }
    requests.end(End::PowerOff);
    assert_eq!(runner.join().unwrap(), End::PowerOff);
    let record = vm.record();
    assert_eq!(record.starts.len(), 2);
    let registers = record.starts[1].1.as_ref().unwrap();
    assert_eq!(record.starts[1].0, 1);
    assert_eq!(registers.get("pc"), Some(0x60));
    assert_eq!(registers.get("lpcr"), Some(1 << 25));
    let lpcr = RegisterState(vec![("lpcr", 1 << 25)]);
    assert_eq!(record.registers, [(0, lpcr)]);
}

#[test]
fn devices_are_found_and_get_messages_by_rtas() {
    let mut calls = Calls::default();
    let slot = 1 << 11;
    let pci = |register: u32, size: u32| vec![slot | register, HIGH, LOW, size];
    let msi = |function, count| vec![slot, HIGH, LOW, function, count, 1];
    let script = vec![
        calls.call("ibm,read-pci-config", &pci(0, 4), 2),
        calls.call("ibm,read-pci-config", &pci(2, 2), 2),
        // BAR 0, and its size by all ones.
        calls.call("ibm,read-pci-config", &pci(0x14, 4), 2),
        // Nobody is in slot 2.
        calls.call("ibm,read-pci-config", &[2 << 11, HIGH, LOW, 4], 2),
        calls.call("ibm,change-msi", &msi(4, 32), 4),
        calls.call(
            "ibm,query-interrupt-source-number",
            &[slot, HIGH, LOW, 1],
            3,
        ),
        calls.call(
            "ibm,query-interrupt-source-number",
            &[slot, HIGH, LOW, 2],
            3,
        ),
        calls.call("ibm,change-msi", &msi(3, 1), 3),
        calls.call("ibm,change-msi", &msi(3, 0), 3),
        calls.call(
            "ibm,query-interrupt-source-number",
            &[slot, HIGH, LOW, 0],
            3,
        ),
        // Another host bridge, a wrong size, no alignment.
        calls.call("ibm,read-pci-config", &[slot, HIGH, 1, 4], 2),
        calls.call("ibm,read-pci-config", &pci(0, 3), 2),
        calls.call("ibm,read-pci-config", &pci(2, 4), 2),
        calls.call("read-pci-config", &[slot, 4], 2),
        calls.call("power-off", &[0, 0], 1),
    ];
    let (end, _, memory) = run(&config(), vec![script], &calls);
    assert_eq!(end, End::PowerOff);
    let results = |index| calls.results(&memory, index);
    let parameter = -3_i32 as u32;
    assert_eq!(results(0), [0, 0x1044_1af4]);
    assert_eq!(results(1), [0, 0x1044]);
    // Where the tree says that the BAR is.
    let machine = Ppc64Machine::new(&config(), &host::typical()).unwrap();
    let bar = bar_address(machine.plan().pci.as_ref().unwrap(), 1);
    assert_eq!(results(2), [0, (bar >> 32) as u32]);
    assert_eq!(results(3), [0, u32::MAX]);
    // One queue, and configuration changes.
    assert_eq!(results(4), [0, 2, 1, 2]);
    assert_eq!(results(5), [0, sources::msi(1, 1).unwrap(), 1]);
    assert_eq!(results(6)[0], parameter);
    assert_eq!(results(7)[0], parameter);
    assert_eq!(results(8), [0, 0, 1]);
    assert_eq!(results(9)[0], parameter);
    for index in 10..13 {
        assert_eq!(results(index)[0], parameter);
    }
    assert_eq!(results(13), [0, 0x1044_1af4]);
}

#[test]
fn a_message_is_an_irqfd_of_its_source() {
    let slot = 1 << 11;
    let bar = 33 << 40;
    // Where in the configuration space MSI-X is.
    let mut calls = Calls::default();
    let list = (0x40..0x100).step_by(4);
    let read = |register: u32| vec![slot | register, HIGH, LOW, 4];
    let mut script: Vec<Step> = list
        .clone()
        .map(|register| calls.call("ibm,read-pci-config", &read(register), 2))
        .collect();
    script.push(calls.call("power-off", &[0, 0], 1));
    let (_, _, memory) = run(&config(), vec![script], &calls);
    let is_msix = |index: &usize| calls.results(&memory, *index)[1] & 0xff == 0x11;
    let index = (0..list.len()).find(is_msix).unwrap();
    let register = 0x40 + index as u32 * 4;
    let control = calls.results(&memory, index)[1] >> 16;

    let mut calls = Calls::default();
    let write = |register: u32, value: u32| vec![slot | register, HIGH, LOW, 2, value];
    let enable = write(register + 2, control | 0x8000);
    let script = vec![
        calls.call("ibm,change-msi", &[slot, HIGH, LOW, 4, 2, 1], 3),
        // Memory space and bus master; the table is at 0x20000 in the BAR.
        calls.call("ibm,write-pci-config", &write(4, 6), 1),
        Step::Load(bar + 0x2_0000, 4),
        Step::Load(bar + 0x2_0004, 4),
        Step::Load(bar + 0x2_0018, 4),
        calls.call("ibm,write-pci-config", &enable, 1),
        // The guest unmasks the second vector, and gives the first a source
        // that is not its own.
        Step::Store(bar + 0x2_001c, vec![0; 4]),
        Step::Store(bar + 0x2_0008, sources::EPOW.to_le_bytes().to_vec()),
        Step::Store(bar + 0x2_000c, vec![0; 4]),
        calls.call("power-off", &[0, 0], 1),
    ];
    let (requests, events) = Requests::new();
    let (built, vm, _) = assemble(&config(), vec![script], &calls, &Power::new(&requests));
    assert_eq!(built.run(&events).unwrap(), End::PowerOff);
    let first = sources::msi(1, 0).unwrap();
    let record = vm.record();
    assert_eq!(record.reads[0], 0u32.to_le_bytes());
    assert_eq!(record.reads[1], 0x400u32.to_le_bytes());
    assert_eq!(record.reads[2], (first + 1).to_le_bytes());
    assert!(record.attached.contains(&(first + 1)));
    assert!(!record.attached.contains(&first));
    let epow = record.attached.iter().filter(|gsi| **gsi == sources::EPOW);
    assert_eq!(epow.count(), 1);
    assert!(record.routes.is_empty());
}

#[test]
fn an_exit_of_no_pseries_machine_ends_it() {
    let script = vec![Step::Arch(28, vec![])];
    let (end, ..) = run(&config(), vec![script], &Calls::default());
    assert!(matches!(end, End::Crash(_)), "{end:?}");
}
