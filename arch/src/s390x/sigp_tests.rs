use super::super::testing::{Bench, Regs};
use super::*;
use crate::s390x::registers::offset;

/// SIGP of CPU 0: parameter in register 3, status in 2, target in 4.
fn sigp(bench: &Bench, target: u64, order: u8, parameter: u64) -> (Action, u64, u32) {
    let mut regs = Regs::with(&[(2, 0), (3, parameter), (4, target)]);
    let action = bench.instruction(0xae24, u32::from(order) << 16, &mut regs);
    (action, regs.condition(), regs.get(2) as u32)
}

/// An order that is accepted; a CPU that it starts is there at once.
fn accepted(bench: &Bench, target: u64, order: u8, parameter: u64) -> Action {
    let (action, condition, _) = sigp(bench, target, order, parameter);
    assert_eq!(condition, 0, "order {order:#x}");
    if let Action::Start { vcpu, .. } = &action {
        bench.handler.cpus.started(*vcpu);
    }
    action
}

/// CPU `vcpu` leaves because it was told to stop.
fn stops(bench: &Bench, vcpu: u32) -> Action {
    let mut regs = Regs::with(&[(5, 0x55)]);
    registers_prefix(&mut regs, 0x10_0000);
    bench.intercept(vcpu, 0x28, 0, 0, &mut regs)
}

fn registers_prefix(regs: &mut Regs, prefix: u64) {
    register::set(&mut regs.sync, (offset::PREFIX, 8), prefix);
}

#[test]
fn a_secondary_starts_as_linux_does_it() {
    let bench = Bench::new(2);
    accepted(&bench, 1, 0x0b, 0);
    accepted(&bench, 1, 0x0d, 0x10_0000);
    let psw = [0x1_8000_0000_u64, 0x1234].map(u64::to_be_bytes).concat();
    bench.write(0x10_01a0, &psw);
    let Action::Start { vcpu, registers } = accepted(&bench, 1, 0x06, 0) else {
        panic!();
    };
    assert_eq!(vcpu, 1);
    assert_eq!(registers.get("prefix"), Some(0x10_0000));
    assert_eq!(registers.get("psw_mask"), Some(0x1_8000_0000));
    assert_eq!(registers.get("psw_addr"), Some(0x1234));
    // Started once; a restart is an interruption now.
    assert_eq!(accepted(&bench, 1, 0x04, 0), Action::Continue);
    assert_eq!(accepted(&bench, 1, 0x06, 0), Action::Continue);
    let injected = bench.vm.record().injected.clone();
    assert_eq!(injected.len(), 1);
    assert_eq!((injected[0].0, injected[0].1.kind), (Some(1), 0xfffe_0003));
}

#[test]
fn a_cpu_that_is_not_there_is_not_operational() {
    let bench = Bench::new(2);
    assert_eq!(sigp(&bench, 2, 0x05, 0).1, 3);
    assert_eq!(sigp(&bench, 0xffff, 0x0b, 0).1, 3);
}

#[test]
fn orders_that_need_a_stopped_cpu() {
    let bench = Bench::new(2);
    let incorrect = |order| {
        let (_, condition, status) = sigp(&bench, 0, order, 0x3000);
        assert_eq!((condition, status), (1, 0x200));
    };
    incorrect(0x0d);
    incorrect(0x0e);
    // Parameters that are no memory.
    assert_eq!(sigp(&bench, 1, 0x0d, 0x7fff_e000).2, 0x100);
    assert_eq!(sigp(&bench, 1, 0x0e, 0x7fff_fe00).2, 0x100);
    assert_eq!(sigp(&bench, 1, 0x12, 1).2, 0x100);
    assert_eq!(sigp(&bench, 1, 0x77, 0).2, 0x002);
}

#[test]
fn registers_outlive_a_stop() {
    let bench = Bench::new(2);
    let start = accepted(&bench, 1, 0x04, 0);
    assert!(matches!(start, Action::Start { vcpu: 1, .. }));
    accepted(&bench, 1, 0x05, 0);
    accepted(&bench, 1, 0x05, 0);
    assert_eq!(bench.vm.record().injected.len(), 1, "told once");
    assert_eq!(stops(&bench, 1), Action::Park);
    let Action::Start { registers, .. } = accepted(&bench, 1, 0x04, 0) else {
        panic!();
    };
    assert_eq!(registers.get("r5"), Some(0x55));
    assert_eq!(registers.get("prefix"), Some(0x10_0000));
    assert_eq!(registers.get("psw_addr"), Some(0x1_0000));
}

#[test]
fn the_last_cpu_that_stops_powers_off() {
    let bench = Bench::new(2);
    accepted(&bench, 1, 0x04, 0);
    accepted(&bench, 1, 0x05, 0);
    assert_eq!(stops(&bench, 1), Action::Park);
    accepted(&bench, 0, 0x05, 0);
    assert_eq!(stops(&bench, 0), Action::End(End::PowerOff));
}

/// Linux stops a CPU, restarts it at once, and tries again while it is busy
/// (`pcpu_delegate`).
#[test]
fn a_restart_that_comes_before_the_stop_finds_the_cpu_busy() {
    let bench = Bench::new(2);
    accepted(&bench, 1, 0x04, 0);
    accepted(&bench, 1, 0x05, 0);
    bench.write(0x10_01a8, &0x9999_u64.to_be_bytes());
    let (action, condition, _) = sigp(&bench, 1, 0x06, 0);
    assert_eq!((action, condition), (Action::Continue, 2));
    assert_eq!(stops(&bench, 1), Action::Park);
    let Action::Start { vcpu, registers } = accepted(&bench, 1, 0x06, 0) else {
        panic!();
    };
    assert_eq!((vcpu, registers.get("psw_addr")), (1, Some(0x9999)));
    // The old PSW is where the new one was taken from its pair.
    assert_eq!(bench.read::<8>(0x10_0128), 0x1_0000_u64.to_be_bytes());
}

#[test]
fn a_running_cpu_is_stopped_to_be_reset() {
    let bench = Bench::new(2);
    accepted(&bench, 1, 0x04, 0);
    accepted(&bench, 1, 0x0b, 0);
    assert_eq!(stops(&bench, 1), Action::Park);
    let Action::Start { registers, .. } = accepted(&bench, 1, 0x04, 0) else {
        panic!();
    };
    assert!(registers.0.is_empty());
}

/// The registers stay; what is pending for the CPU does not.
#[test]
fn a_cpu_reset_clears_what_is_pending() {
    let bench = Bench::new(2);
    accepted(&bench, 1, 0x04, 0);
    let start = |bench: &Bench| match accepted(bench, 1, 0x04, 0) {
        Action::Start { registers, .. } => registers,
        other => panic!("{other:?}"),
    };
    // Once it operates, and once it has stopped.
    accepted(&bench, 1, 0x0c, 0);
    stops(&bench, 1);
    let registers = start(&bench);
    assert_eq!(registers.get("r5"), Some(0x55));
    assert_eq!(registers.get("reset"), Some(1));
    accepted(&bench, 1, 0x05, 0);
    stops(&bench, 1);
    accepted(&bench, 1, 0x0c, 0);
    assert_eq!(start(&bench).get("reset"), Some(1));
    accepted(&bench, 1, 0x05, 0);
    stops(&bench, 1);
    assert_eq!(start(&bench).get("reset"), None);
}

#[test]
fn status_is_stored() {
    let bench = Bench::new(2);
    accepted(&bench, 1, 0x04, 0);
    accepted(&bench, 1, 0x09, 0);
    stops(&bench, 1);
    // Register 5, the PSW's address, the prefix, and z/Architecture, at absolute
    // addresses, whatever the prefix.
    assert_eq!(bench.read::<8>(0x12a8), 0x55_u64.to_be_bytes());
    assert_eq!(bench.read::<8>(0x1308), 0x1_0000_u64.to_be_bytes());
    assert_eq!(bench.read::<4>(0x1318), 0x10_0000_u32.to_be_bytes());
    assert_eq!(bench.read::<1>(163), [1]);
    // And at an address.
    accepted(&bench, 1, 0x0e, 0x4000);
    assert_eq!(bench.read::<8>(0x40a8), 0x55_u64.to_be_bytes());
}

#[test]
fn additional_status_is_the_vector_registers() {
    let vector = Features {
        vector: true,
        ..Features::default()
    };
    let bench = Bench::with(2, vector);
    accepted(&bench, 1, 0x04, 0);
    let refused = |parameter| sigp(&bench, 1, 0x17, parameter).2;
    assert_eq!(refused(0x4000), 0x200, "it runs");
    accepted(&bench, 1, 0x05, 0);
    let mut regs = Regs::default();
    for (register, value) in [(0, 0x11), (15, 0x22), (31, 0x33)] {
        for (half, value) in [(0, value), (8, value << 8)] {
            let at = offset::VECTORS + register * 16 + half;
            register::set(&mut regs.sync, (at, 8), value);
        }
    }
    assert_eq!(bench.intercept(1, 0x28, 0, 0, &mut regs), Action::Park);
    assert_eq!(refused(0x4200), 0x100, "not aligned");
    assert_eq!(refused(0x400a), 0x100, "a size with guarded storage");
    assert_eq!(refused(1 << 40), 0x100, "no memory");
    accepted(&bench, 1, 0x17, 0x4000);
    let pair = |value: u64| [value, value << 8].map(u64::to_be_bytes).concat();
    assert_eq!(bench.read::<16>(0x4000)[..], pair(0x11));
    assert_eq!(bench.read::<16>(0x40f0)[..], pair(0x22));
    assert_eq!(bench.read::<16>(0x41f0)[..], pair(0x33));
    // There is no such order without vector registers.
    assert_eq!(sigp(&Bench::new(2), 1, 0x17, 0x4000).2, 0x002);
}

/// KVM has it as stopped, and would drop what it is sent.
#[test]
fn a_cpu_that_is_about_to_run_is_busy() {
    let bench = Bench::new(2);
    let (action, condition, _) = sigp(&bench, 1, 0x04, 0);
    assert!(matches!(action, Action::Start { vcpu: 1, .. }) && condition == 0);
    for order in [0x05, 0x06, 0x09, 0x0b, 0x0c, 0x0d, 0x0e] {
        assert_eq!(sigp(&bench, 1, order, 0).1, 2, "order {order:#x}");
    }
    assert_eq!(sigp(&bench, 1, 0x04, 0).1, 0, "it is started already");
    assert!(bench.vm.record().injected.is_empty());
    bench.handler.cpus.started(1);
    accepted(&bench, 1, 0x05, 0);
    assert_eq!(bench.vm.record().injected.len(), 1);
    for order in [0x04, 0x0d, 0x0e] {
        assert_eq!(sigp(&bench, 1, order, 0).1, 2, "it is about to stop");
    }
}

/// CPU `vcpu` waits with interruptions disabled, at `address`.
fn waits(bench: &Bench, vcpu: u32, address: u64) -> Action {
    let mut regs = Regs::with(&[(5, 0x55)]);
    regs.psw[1] = address;
    bench.intercept(vcpu, 0x1c, 0, 0, &mut regs)
}

#[test]
fn a_disabled_wait_ends_the_machine_when_no_other_cpu_operates() {
    let bench = Bench::new(3);
    accepted(&bench, 1, 0x04, 0);
    assert_eq!(waits(&bench, 1, 0x12_3456), Action::Park);
    // It operates, and it can be stopped, and started again.
    assert_eq!(sigp(&bench, 1, 0x0e, 0x4000).2, 0x200);
    accepted(&bench, 1, 0x05, 0);
    assert!(bench.vm.record().injected.is_empty());
    accepted(&bench, 1, 0x0e, 0x4000);
    assert_eq!(bench.read::<8>(0x40a8), 0x55_u64.to_be_bytes());
    accepted(&bench, 1, 0x04, 0);
    // A restart ends the wait.
    assert_eq!(waits(&bench, 1, 0x12_3456), Action::Park);
    bench.write(0x1a8, &0x9999_u64.to_be_bytes());
    let Action::Start { registers, .. } = accepted(&bench, 1, 0x06, 0) else {
        panic!();
    };
    assert_eq!(registers.get("psw_addr"), Some(0x9999));
    assert_eq!(waits(&bench, 1, 0x12_3456), Action::Park);
    // The last one is told to stop before it could wait, too.
    accepted(&bench, 0, 0x05, 0);
    assert_eq!(waits(&bench, 0, 0xfff), Action::End(End::Panic));
}
