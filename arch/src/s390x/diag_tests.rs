use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crossvisor_devices::css::ccw::Check;
use crossvisor_devices::css::{Answer, ControlUnit, SenseId, Transfer};
use crossvisor_vmm::arch::RegisterState;
use crossvisor_vmm::double::ScriptedVm;
use crossvisor_vmm::exit::{Action, End};

use super::super::sigp::Features;
use super::super::testing::{Bench, MEMORY, Regs};

/// DIAGNOSE with registers 2 and 4 and the function as displacement.
fn diagnose(bench: &Bench, code: u16, regs: &mut Regs) -> Action {
    bench.instruction(0x8324, u32::from(code) << 16, regs)
}

#[test]
fn functions_that_are_not_there_are_specification_exceptions() {
    let bench = Bench::new(1);
    for code in [0x0, 0x44, 0x210, 0x260, 0x318, 0x501, 0xfff] {
        diagnose(&bench, code, &mut Regs::default());
        assert_eq!(bench.program(), Some(6), "{code:#x}");
    }
}

#[test]
fn what_the_control_program_says_of_itself_reaches_cpus() {
    let told = Features {
        control_program: true,
        ..Features::default()
    };
    let bench = Bench::with(2, told);
    let codes = ("diag318", 0x0400_0006_0c00_7100);
    let action = diagnose(&bench, 0x318, &mut Regs::with(&[(2, codes.1)]));
    assert_eq!(action, Action::Set(RegisterState(vec![codes])));
    assert_eq!(bench.program(), None);
    // One that starts later is told, too.
    let Action::Start { registers, .. } = sigp(&bench, 0x04) else {
        panic!();
    };
    assert_eq!(registers.0, [codes]);
}

#[test]
fn ipl_parameters_are_stored_and_set() {
    let bench = Bench::new(1);
    let mut regs = Regs::with(&[(2, 0x5000), (4, 6)]);
    assert_eq!(diagnose(&bench, 0x308, &mut regs), Action::Continue);
    assert_eq!(regs.get(3), 1);
    assert_eq!(bench.read::<4>(0x5000), [0, 0, 0, 200]);
    assert_eq!(bench.read::<2>(0x5000 + 110), [0, 7]);
    // Set: a block of 64 bytes, one that is too long, one that is beyond.
    bench.write(0x5000, &[0, 0, 0, 64]);
    regs.set(4, 5);
    diagnose(&bench, 0x308, &mut regs);
    assert_eq!(regs.get(3), 1);
    assert_eq!(bench.handler.ipl.get().unwrap().len(), 64);
    for length in [0x1001_u32, u32::MAX, 0, 3] {
        bench.write(0x5000, &length.to_be_bytes());
        diagnose(&bench, 0x308, &mut regs);
        assert_eq!((regs.get(3), bench.program()), (0x402, None));
    }
    regs.set(2, MEMORY as u64);
    diagnose(&bench, 0x308, &mut regs);
    assert_eq!(bench.program(), Some(5));
    regs.set(2, 0x5008);
    diagnose(&bench, 0x308, &mut regs);
    assert_eq!(bench.program(), Some(6));
    // An odd register, and subcodes that do not exist.
    let mut regs = Regs::with(&[(4, 6)]);
    bench.instruction(0x8334, 0x308 << 16, &mut regs);
    assert_eq!(bench.program(), Some(6));
    for subcode in [2, 8, 10, 0x10006] {
        regs.set(4, subcode);
        diagnose(&bench, 0x308, &mut regs);
        assert_eq!(bench.program(), Some(6), "{subcode}");
    }
}

#[test]
fn loading_again_is_a_reset() {
    let bench = Bench::new(1);
    for subcode in [3, 4, 7] {
        let mut regs = Regs::with(&[(4, subcode)]);
        let action = diagnose(&bench, 0x308, &mut regs);
        assert_eq!(action, Action::End(End::Reset));
    }
}

/// SIGP of CPU 0 to CPU 1, without a parameter.
fn sigp(bench: &Bench, order: u32) -> Action {
    let mut regs = Regs::with(&[(4, 1)]);
    bench.instruction(0xae24, order << 16, &mut regs)
}

/// A device that interrupts once more while it is reset.
struct Late {
    vm: ScriptedVm,
    reset: AtomicBool,
}

impl ControlUnit for Late {
    fn sense_id(&self) -> SenseId {
        SenseId {
            control_unit: (0x3832, 1),
            device: (0, 0),
        }
    }

    fn command(&self, _: u8, _: &mut Transfer<'_>) -> Result<Answer, Check> {
        Ok(Answer::Done)
    }

    fn reset(&self) {
        let cleared = !self.vm.record().attributes.is_empty();
        assert!(!cleared, "what comes now stays pending");
        self.reset.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_load_normal_reset_stops_and_resets_the_rest() {
    let bench = Bench::new(2);
    let handler = &bench.handler;
    let late = Arc::new(Late {
        vm: bench.vm.clone(),
        reset: AtomicBool::new(false),
    });
    handler.css.add(1).unwrap().connect(late.clone());
    handler.css.report(7);
    assert!(handler.watchdog.set(60, true).unwrap());
    assert!(matches!(sigp(&bench, 0x04), Action::Start { vcpu: 1, .. }));
    handler.cpus.started(1);
    bench.write(0, &0x0008_0000_8012_3456_u64.to_be_bytes());
    let told = || !bench.vm.record().injected.is_empty();
    let action = thread::scope(|scope| {
        let loads = scope.spawn(|| diagnose(&bench, 0x308, &mut Regs::with(&[(4, 1)])));
        while !told() {
            thread::yield_now();
        }
        // Nothing is reset while the other CPU may use it.
        assert!(bench.vm.record().attributes.is_empty());
        let stops = bench.intercept(1, 0x28, 0, 0, &mut Regs::with(&[(5, 0x55)]));
        assert_eq!(stops, Action::Park);
        loads.join().unwrap()
    });
    let Action::Start { vcpu, registers } = action else {
        panic!();
    };
    assert_eq!(vcpu, 0);
    assert_eq!(registers.get("psw_mask"), Some(0x8000_0000));
    assert_eq!(registers.get("psw_addr"), Some(0x12_3456));
    assert_eq!(registers.0.len(), 2, "this CPU is reset");
    assert_eq!(bench.vm.record().attributes, [(3, 0, vec![])]);
    assert!(late.reset.load(Ordering::Relaxed));
    assert!(!handler.watchdog.cancel());
    assert_eq!(handler.css.take_report(), (1, 0));
    handler.cpus.started(0);
    let Action::Start { registers, .. } = sigp(&bench, 0x04) else {
        panic!();
    };
    assert_eq!(registers.get("r5"), Some(0x55), "the other CPU's are kept");
    assert_eq!(registers.get("reset"), Some(1));
}

/// Subcode 0; what is like subcode 1 is not looked at again.
#[test]
fn a_modified_clear_reset_clears_the_rest() {
    let told = Features {
        control_program: true,
        ..Features::default()
    };
    let bench = Bench::with(2, told);
    diagnose(&bench, 0x318, &mut Regs::with(&[(2, 7)]));
    sigp(&bench, 0x04);
    bench.handler.cpus.started(1);
    sigp(&bench, 0x05);
    bench.intercept(1, 0x28, 0, 0, &mut Regs::with(&[(5, 0x55)]));
    let Action::Start { vcpu: 0, registers } = diagnose(&bench, 0x308, &mut Regs::with(&[(4, 0)]))
    else {
        panic!();
    };
    assert_eq!(registers.get("diag318"), Some(0));
    bench.handler.cpus.started(0);
    let Action::Start { registers, .. } = sigp(&bench, 0x04) else {
        panic!();
    };
    assert_eq!(registers.0, [("diag318", 0)]);
}

#[test]
fn of_two_resets_at_once_one_prevails() {
    let bench = Bench::new(2);
    sigp(&bench, 0x04);
    bench.handler.cpus.started(1);
    let told = || !bench.vm.record().injected.is_empty();
    thread::scope(|scope| {
        let first = scope.spawn(|| diagnose(&bench, 0x308, &mut Regs::with(&[(4, 1)])));
        while !told() {
            thread::yield_now();
        }
        let mut regs = Regs::with(&[(4, 1)]);
        let second = bench.intercept(1, 4, 0x8324, 0x308 << 16, &mut regs);
        assert_eq!(second, Action::Continue, "it is told to stop");
        bench.intercept(1, 0x28, 0, 0, &mut regs);
        assert!(matches!(
            first.join().unwrap(),
            Action::Start { vcpu: 0, .. }
        ));
    });
}

/// With the registers of Linux's driver: function in 10, seconds in 11, action
/// in 8.
#[test]
fn the_watchdog_takes_times_that_it_can_keep() {
    let bench = Bench::new(1);
    let watchdog = |code, seconds, action| {
        let mut regs = Regs::with(&[(8, action), (10, code), (11, seconds), (12, 0x77)]);
        bench.instruction(0x83a8, 0x288 << 16, &mut regs);
        assert_eq!(regs.get(11), seconds, "nothing is returned");
        bench.program()
    };
    assert_eq!(watchdog(1, 60, 0), Some(6), "not set");
    assert_eq!(watchdog(0, 14, 0), Some(6));
    assert_eq!(watchdog(0, 60, 1), Some(6), "an action that is not there");
    assert_eq!(watchdog(0, 60, 0), None);
    assert_eq!(watchdog(1, 60, 0), None);
    assert_eq!(watchdog(3, 60, 0), Some(6));
    assert_eq!(watchdog(2, 0, 0), None);
    assert_eq!(watchdog(2, 0, 0), Some(6));
    bench.instruction(0x8334, 0x288 << 16, &mut Regs::default());
    assert_eq!(bench.program(), Some(6), "an odd register");
}

#[test]
fn notifies_of_nobody_are_refused() {
    let bench = Bench::new(1);
    let virtio = |function, subchannel, queue| {
        let mut regs = Regs::with(&[(1, function), (2, subchannel), (3, queue)]);
        diagnose(&bench, 0x500, &mut regs);
        assert_eq!(bench.program(), None);
        regs.get(2) as i64
    };
    assert_eq!(virtio(3, 0x0001_0000, 0), -22);
    assert_eq!(virtio(3, 0, u64::MAX), -22);
    assert_eq!(virtio(0, 0, 0), -22);
}
