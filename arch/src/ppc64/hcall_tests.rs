//! Hypercalls as KVM hands them over.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use crossvisor_devices::GuestMem;
use crossvisor_devices::chardev::ConsoleInput;
use crossvisor_devices::irq::IrqLine;
use crossvisor_devices::output::Output;
use crossvisor_vmm::arch::Machine;
use crossvisor_vmm::config::VmConfig;
use crossvisor_vmm::double::ScriptedVm;
use crossvisor_vmm::exit::{NoLogicalMemory, RUN_UNION_SIZE, SYNC_REGS_SIZE};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::super::rtas::events::Events;
use super::super::xive::Xive;
use super::super::xive::calls::Lines;
use super::super::{Ppc64Machine, host, sources};
use super::*;

struct NoWire;

impl IrqLine for NoWire {
    fn set(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Counts how often it is asserted.
#[derive(Default)]
struct Count(AtomicU32);

impl IrqLine for Count {
    fn set(&self, asserted: bool) -> io::Result<()> {
        self.0.fetch_add(asserted.into(), Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Scene {
    vm: ScriptedVm,
    sink: Sink,
    terminal: Arc<Hvterm>,
    events: Arc<Events>,
    interrupts: Arc<Count>,
    calls: Hypercalls,
}

fn xive(vm: &ScriptedVm) -> XiveCalls {
    let host = host::typical();
    let machine = Ppc64Machine::new(&VmConfig::default(), &host).unwrap();
    let vm: Arc<dyn hv::Vm> = Arc::new(vm.clone());
    let lines = Arc::new(Lines::new(vm.clone()));
    let plan = machine.plan();
    XiveCalls::new(vm, Xive::new(plan, &host), plan.memory.clone(), lines)
}

fn scene() -> Scene {
    scene_of(None, Mmu::Radix)
}

fn scene_of(characteristics: Option<[u64; 2]>, mmu: Mmu) -> Scene {
    let vm = ScriptedVm::default();
    let sink = Sink::default();
    let terminal = Arc::new(
        Hvterm::new(
            Arc::new(NoWire),
            Arc::new(Output::new("terminal", Box::new(sink.clone())).unwrap()),
        )
        .unwrap(),
    );
    let ranges = [(GuestAddress(0), 1 << 20)];
    let memory = GuestMem::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let interrupts = Arc::new(Count::default());
    let events = Arc::new(Events::new(interrupts.clone()));
    let rtas = Rtas::new(memory, 2, events.clone(), None, Some(terminal.clone()));
    let calls = Hypercalls::new(
        Arc::new(vm.clone()),
        rtas,
        Some(terminal.clone()),
        Some(xive(&vm)),
        characteristics,
        mmu,
    );
    Scene {
        vm,
        sink,
        terminal,
        events,
        interrupts,
        calls,
    }
}

impl Scene {
    /// Makes a hypercall; r3, r4 and on after it, and what the vCPU does.
    fn call(&self, number: u64, args: &[u64]) -> (i64, Vec<u64>, Action) {
        let mut data = [0; RUN_UNION_SIZE];
        let words = [number, 0].into_iter().chain(args.iter().copied());
        let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        data[..bytes.len()].copy_from_slice(&bytes);
        let action = self.calls.handle(
            0,
            ArchExit {
                reason: 19,
                data: &mut data,
                sync_regs: &mut [0; SYNC_REGS_SIZE],
                psw: &mut [0; 2],
                logical: &NoLogicalMemory,
            },
        );
        let words: Vec<u64> = data
            .chunks(8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        (words[1] as i64, words[2..11].to_vec(), action)
    }

    fn status(&self, number: u64, args: &[u64]) -> i64 {
        self.call(number, args).0
    }
}

#[test]
fn characters_go_by_registers_from_the_top() {
    let scene = scene();
    let hello = u64::from_be_bytes(*b"hello, w");
    let orld = u64::from_be_bytes(*b"orld!!!!");
    let unit = fdt::VTY.into();
    assert_eq!(scene.status(0x58, &[unit, 12, hello, orld]), 0);
    assert_eq!(scene.status(0x58, &[0, 1, b'\n' as u64 * (1 << 56), 0]), 0);
    assert!(scene.status(0x58, &[unit, 17, 0, 0]) == H_PARAMETER);
    assert!(scene.status(0x58, &[unit, u64::MAX, 0, 0]) == H_PARAMETER);
    assert!(scene.status(0x58, &[1, 1, 0, 0]) == H_PARAMETER);

    scene.terminal.push(b"0123456789abcdefXY");
    let (status, words, _) = scene.call(0x54, &[unit]);
    assert_eq!((status, words[0]), (0, 16));
    assert_eq!(words[1].to_be_bytes(), *b"01234567");
    assert_eq!(words[2].to_be_bytes(), *b"89abcdef");
    let (_, words, _) = scene.call(0x54, &[unit]);
    assert_eq!(words[0], 2);
    assert_eq!(words[1].to_be_bytes(), *b"XY\0\0\0\0\0\0");
    assert_eq!(scene.call(0x54, &[unit]).1[0], 0);
    assert_eq!(scene.status(0x54, &[7]), H_PARAMETER);
    assert_eq!(scene.status(0x104, &[unit, 1]), 0);

    let sink = scene.sink.clone();
    drop(scene);
    assert_eq!(*sink.0.lock().unwrap(), b"hello, world\n");
}

#[test]
fn the_mode_is_the_callers_at_once() {
    let scene = scene();
    let set = |flags, resource| scene.call(0x31c, &[flags, resource, 0, 0]);
    let lpcr = |value| Action::Set(RegisterState(vec![("lpcr", value)]));
    let (status, _, action) = set(1, 4);
    assert_eq!((status, action), (0, lpcr(LPCR_ILE)));
    let (_, _, action) = set(3, 3);
    assert_eq!(action, lpcr(LPCR_ILE | LPCR_AIL));
    let (_, _, action) = set(0, 3);
    assert_eq!(action, lpcr(LPCR_ILE));
    let (_, _, action) = set(0, 4);
    assert_eq!(action, lpcr(0));
    assert_eq!(set(2, 3).0, H_UNSUPPORTED_FLAG);
    assert_eq!(set(9, 4).0, H_UNSUPPORTED_FLAG);
    assert_eq!(set(0, 99).0, H_P2);
    assert_eq!(scene.status(0x31c, &[1, 4, 5, 0]), H_P3);
    assert_eq!(scene.status(0x31c, &[1, 4, 0, 5]), H_P4);
}

#[test]
fn process_tables_are_handed_to_the_vm() {
    let scene = scene();
    let radix_gtse_new = 0x18 | 4 | 1;
    assert_eq!(
        scene.status(0x37c, &[radix_gtse_new, 0x4000_0000, 0, 12]),
        0
    );
    let set = |entry, flags| RegisterState(vec![("process_table", entry), ("mmu_flags", flags)]);
    let entry = 1 << 63 | 0x4000_000c;
    assert_eq!(scene.vm.record().vm_registers, [set(entry, 3)]);
    // Without GTSE, for what is registered.
    assert_eq!(scene.status(0x37c, &[4, 0, 0, 0]), 0);
    assert_eq!(scene.vm.record().vm_registers[1], set(entry, 1));
    for (args, code) in [
        ([radix_gtse_new, 0x123, 0, 12], H_P2),
        ([radix_gtse_new, 1 << 61, 0, 12], H_P2),
        ([radix_gtse_new, 0, 1, 12], H_P3),
        ([radix_gtse_new, 0, 0, 25], H_P4),
        ([1 << 20, 0, 0, 0], H_PARAMETER),
        // No hashed one is registered.
        ([0, 0, 0, 0], H_PARAMETER),
        ([0x1a, 1 << 38, 0, 0], H_P2),
        ([0x1a, 0, 8, 0], H_P3),
        ([0x1a, 0, 0, 25], H_P4),
    ] {
        assert_eq!(scene.status(0x37c, &args), code, "{args:x?}");
    }
    assert_eq!(scene.status(0x37c, &[0x1a, 1, 2, 3]), 0);
    let record = scene.vm.record();
    assert_eq!(record.vm_registers.last(), Some(&set(1 << 25 | 0x43, 0)));
}

#[test]
fn flags_may_change_before_there_is_a_process_table() {
    let gtse = 1;
    for (mmu, own, other, registers) in [(Mmu::Radix, 4, 0, [1 << 63, 3]), (Mmu::Hpt, 0, 4, [0, 2])]
    {
        let scene = scene_of(None, mmu);
        assert_eq!(scene.status(0x37c, &[other | gtse, 0, 0, 0]), H_PARAMETER);
        assert_eq!(scene.status(0x37c, &[own | gtse, 0, 0, 0]), 0);
        let [entry, flags] = registers;
        let set = RegisterState(vec![("process_table", entry), ("mmu_flags", flags)]);
        assert_eq!(scene.vm.record().vm_registers, [set]);
    }
}

#[test]
fn what_the_processor_does_about_speculation_is_told() {
    let scene = scene_of(Some([1 << 61, 7 << 61]), Mmu::Radix);
    let (status, words, action) = scene.call(0x1c8, &[5; 9]);
    assert_eq!((status, action), (0, Action::Continue));
    assert_eq!(words[..3], [1 << 61, 7 << 61, 5]);
}

#[test]
fn an_event_comes_again_until_it_is_taken() {
    let scene = scene();
    let configure = || scene.status(0x3ac, &[0, sources::VTY.into(), 0, 6, 0]);
    let interrupts = || scene.interrupts.0.load(Ordering::Relaxed);
    assert_eq!((configure(), interrupts()), (0, 0));
    scene.events.press_power_button().unwrap();
    assert_eq!((configure(), interrupts()), (0, 2));
    scene.events.take(u32::MAX).unwrap();
    assert_eq!((configure(), interrupts()), (0, 2));
}

#[test]
fn what_nobody_handles_is_said_to_be_no_function() {
    let scene = scene();
    for number in [0, 4, 0x1c8, 0xf080, u64::MAX] {
        let (status, _, action) = scene.call(number, &[u64::MAX; 9]);
        assert_eq!((status, action), (H_FUNCTION, Action::Continue));
    }
    // RTAS arguments that are nowhere.
    assert_eq!(scene.status(0xf000, &[u64::MAX]), H_PARAMETER);
}

#[test]
fn other_exits_end_the_machine() {
    let scene = scene();
    let action = scene.calls.handle(
        1,
        ArchExit {
            reason: 21,
            data: &mut [0; RUN_UNION_SIZE],
            sync_regs: &mut [0; SYNC_REGS_SIZE],
            psw: &mut [0; 2],
            logical: &NoLogicalMemory,
        },
    );
    assert!(matches!(action, Action::End(End::Crash(_))), "{action:?}");
}
