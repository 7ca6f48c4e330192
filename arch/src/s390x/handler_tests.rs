use crossvisor_vmm::exit::{Action, End};

use super::super::testing::{Bench, MEMORY, Regs};
use super::instruction;

const SUBCHANNEL: u64 = 0x0001_0000;
/// Base register 2, displacement 0.
const AT_2: u32 = 0x2000_0000;

fn bench() -> Bench {
    let bench = Bench::new(2);
    bench.handler.css.add(0x10).unwrap();
    bench
}

#[test]
fn waits_are_told_apart() {
    let wait = |address| {
        let mut regs = Regs {
            psw: [0x0002_0001_8000_0000, address],
            ..Regs::default()
        };
        match bench().intercept(0, 0x1c, 0, 0, &mut regs) {
            Action::End(end) => end,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(wait(0xfff), End::PowerOff);
    assert_eq!(wait(0x3ff_e000_1234), End::Panic);
    assert!(matches!(wait(0), End::Crash(text) if text.contains("halted")));
    assert!(matches!(wait(0xdead), End::Crash(text) if text.contains("0xdead")));
}

#[test]
fn loops_and_exits_that_are_not_there_are_crashes() {
    for code in [0x08, 0x14, 0x18, 0x2c, 0x7c] {
        let action = bench().intercept(0, code, 0, 0, &mut Regs::default());
        assert!(matches!(action, Action::End(End::Crash(_))), "{code:#x}");
    }
    let action = bench().exit(0, 99, &mut Regs::default());
    assert!(matches!(action, Action::End(End::Crash(_))));
    let action = bench().exit(0, 14, &mut Regs::default());
    assert_eq!(action, Action::End(End::Reset));
}

#[test]
fn the_problem_state_is_refused() {
    let bench = bench();
    let all = [
        instruction::SERVICE_CALL,
        instruction::START,
        instruction::STORE,
        instruction::CHANNEL_SUBSYSTEM_CALL,
        instruction::PERFORM_TOPOLOGY,
        0x8312,
        0xae12,
    ];
    for ipa in all {
        let mut regs = Regs::with(&[(1, SUBCHANNEL), (2, 0x2000)]);
        regs.psw[0] |= 0x0001_0000_0000_0000;
        assert_eq!(bench.instruction(ipa, AT_2, &mut regs), Action::Continue);
        assert_eq!(bench.program(), Some(2), "{ipa:#x}");
    }
}

#[test]
fn unknown_instructions_are_operation_exceptions() {
    let bench = bench();
    for ipa in [0xb2ff, 0xb9a0, 0x0000, 0xeb8a] {
        bench.instruction(ipa, 0, &mut Regs::default());
        assert_eq!(bench.program(), Some(1), "{ipa:#x}");
    }
}

#[test]
fn store_and_modify_subchannel() {
    let bench = bench();
    let mut regs = Regs::with(&[(1, SUBCHANNEL), (2, 0x3000)]);
    bench.instruction(instruction::STORE, AT_2, &mut regs);
    assert_eq!((bench.program(), regs.condition()), (None, 0));
    assert_eq!(bench.read::<4>(0x3004), [0, 1, 0, 0x10]);
    bench.write(0x3005, &[0x81]);
    bench.instruction(instruction::MODIFY, AT_2, &mut regs);
    assert_eq!(regs.condition(), 0);
    // With a displacement.
    bench.instruction(instruction::STORE, 0x2100_0000, &mut regs);
    assert_eq!(bench.read::<2>(0x3104), [0, 0x81]);
    // No such subchannel; no such identification; an odd address; no memory.
    regs.set(1, SUBCHANNEL + 1);
    bench.instruction(instruction::STORE, AT_2, &mut regs);
    assert_eq!((bench.program(), regs.condition()), (None, 3));
    regs.set(1, 0);
    bench.instruction(instruction::STORE, AT_2, &mut regs);
    assert_eq!(bench.program(), Some(0x15));
    regs = Regs::with(&[(1, SUBCHANNEL), (2, 0x3002)]);
    bench.instruction(instruction::STORE, AT_2, &mut regs);
    assert_eq!(bench.program(), Some(6));
    regs.set(2, MEMORY as u64 - 4);
    bench.instruction(instruction::MODIFY, AT_2, &mut regs);
    assert_eq!(bench.program(), Some(5));
    // What KVM protects with DAT off.
    regs.set(2, 0x100);
    bench.instruction(instruction::STORE, AT_2, &mut regs);
    assert_eq!(bench.program(), Some(4));
    // The 24-bit mode drops what is beyond.
    regs.psw[0] = 0;
    regs.set(2, 0x1_0000_4000);
    bench.instruction(instruction::STORE, AT_2, &mut regs);
    assert_eq!(bench.program(), None);
    assert_eq!(bench.read::<2>(0x4006), [0, 0x10]);
}

#[test]
fn real_addresses_are_prefixed() {
    let bench = bench();
    let mut regs = Regs::with(&[(1, SUBCHANNEL), (2, 0x1000)]);
    regs.sync[..8].copy_from_slice(&0x10_0000_u64.to_ne_bytes());
    bench.instruction(instruction::STORE, AT_2, &mut regs);
    assert_eq!(bench.read::<2>(0x10_1006), [0, 0x10]);
    regs.set(2, 0x10_0000);
    bench.instruction(instruction::STORE, AT_2, &mut regs);
    assert_eq!(bench.read::<2>(6), [0, 0x10]);
}

fn test_subchannel(bench: &Bench, address: u64, dequeued: u8) -> Regs {
    let mut regs = Regs::with(&[(1, SUBCHANNEL), (2, address)]);
    regs.union[0..4].copy_from_slice(&(SUBCHANNEL as u32).to_ne_bytes());
    regs.union[4..8].copy_from_slice(&0xcafe_u32.to_ne_bytes());
    regs.union[8..12].copy_from_slice(&(3u32 << 27).to_ne_bytes());
    regs.union[12..16].copy_from_slice(&AT_2.to_ne_bytes());
    regs.union[16] = dequeued;
    bench.exit(0, 22, &mut regs);
    regs
}

#[test]
fn test_subchannel_takes_the_status_or_gives_the_interruption_back() {
    let bench = bench();
    assert_eq!(test_subchannel(&bench, 0x3000, 0).condition(), 3);
    let mut regs = Regs::with(&[(1, SUBCHANNEL), (2, 0x3000)]);
    bench.write(0x3005, &[0x81]);
    bench.instruction(instruction::MODIFY, AT_2, &mut regs);
    let subchannel = bench.handler.css.find(SUBCHANNEL).unwrap().unwrap();
    subchannel.alert();
    // It cannot be stored: the status stays, and its interruption comes again.
    bench.vm.record().injected.clear();
    test_subchannel(&bench, MEMORY as u64, 1);
    let kinds: Vec<_> = bench.vm.record().injected.iter().map(|i| i.1).collect();
    assert_eq!(kinds.len(), 2);
    assert_eq!(kinds[0].kind, 0xfffe_0001);
    assert_eq!(kinds[1].data[4..12], [0, 0, 0xca, 0xfe, 0x18, 0, 0, 0]);
    assert_eq!(test_subchannel(&bench, 0x3000, 1).condition(), 0);
    assert_eq!(bench.read::<2>(0x3002), [0, 0x11]);
    assert_eq!(test_subchannel(&bench, 0x3000, 0).condition(), 1);
}

#[test]
fn channel_reports_are_stored() {
    let bench = bench();
    let mut regs = Regs::with(&[(2, 0x3000)]);
    bench.instruction(instruction::STORE_REPORT, AT_2, &mut regs);
    assert_eq!(regs.condition(), 1);
    bench.handler.css.report(0x1234_5678);
    regs.set(2, MEMORY as u64);
    bench.instruction(instruction::STORE_REPORT, AT_2, &mut regs);
    assert_eq!(bench.program(), Some(5));
    regs.set(2, 0x3000);
    bench.instruction(instruction::STORE_REPORT, AT_2, &mut regs);
    assert_eq!(regs.condition(), 0);
    assert_eq!(bench.read::<4>(0x3000), [0x12, 0x34, 0x56, 0x78]);
}

#[test]
fn the_channel_subsystem_is_called_with_a_page() {
    let bench = bench();
    let mut regs = Regs::with(&[(3, 0x5000)]);
    bench.write(0x5000, &[0, 16, 0, 0x10]);
    let in_3 = 3 << 20;
    bench.instruction(instruction::CHANNEL_SUBSYSTEM_CALL, in_3, &mut regs);
    assert_eq!((bench.program(), regs.condition()), (None, 0));
    assert_eq!(bench.read::<4>(0x5010), [0x0f, 0xf0, 0, 1]);
    for (length, code) in [(8u16, 0x15), (4088, 0x15), (20, 0x15), (65535, 0x15)] {
        bench.write(0x5000, &length.to_be_bytes());
        bench.instruction(instruction::CHANNEL_SUBSYSTEM_CALL, in_3, &mut regs);
        assert_eq!(bench.program(), Some(code));
    }
    regs.set(3, 0x5008);
    bench.instruction(instruction::CHANNEL_SUBSYSTEM_CALL, in_3, &mut regs);
    assert_eq!(bench.program(), Some(6));
}

#[test]
fn what_must_be_zero_in_a_register_is_an_operand_exception() {
    let bench = bench();
    let program = |ipa, first, second| {
        let mut regs = Regs::with(&[(1, first), (2, second)]);
        bench.instruction(ipa, 0, &mut regs);
        bench.program()
    };
    let limit = |value| program(instruction::SET_ADDRESS_LIMIT, value, 0);
    assert_eq!(limit(0xffff_ffff_7fff_0000), None);
    assert_eq!([limit(0x8000_0000), limit(1)], [Some(0x15); 2]);
    let monitor = |modes, area| program(instruction::SET_MONITOR, modes, area);
    assert_eq!(monitor(0xf000_0003, 0x1000), None);
    assert_eq!(monitor(0xf000_0001, 1), None, "the area does not count");
    assert_eq!([monitor(2, 0x1010), monitor(4, 0)], [Some(0x15); 2]);
    let path = |value| program(instruction::RESET_PATH, value, 0);
    assert_eq!(path(0), None);
    // Reserved bits, and a channel-subsystem image that is not there.
    assert_eq!([path(0x0100_0000), path(0x1_0000)], [Some(0x15); 2]);
}

#[test]
fn the_topology_never_changes() {
    let bench = bench();
    let ptf = |request| {
        let mut regs = Regs::with(&[(4, request)]);
        bench.instruction(instruction::PERFORM_TOPOLOGY, 4 << 20, &mut regs);
        (bench.program(), regs.condition(), regs.get(4))
    };
    assert_eq!(ptf(0), (None, 2, 0x100));
    assert_eq!(ptf(1), (None, 2, 1));
    assert_eq!(ptf(2), (None, 0, 2));
    assert_eq!(ptf(3).0, Some(6));
    assert_eq!(ptf(0x200).0, Some(6));
}

#[test]
fn system_information_is_completed() {
    let bench = bench();
    let stsi = |function: u8, selector1: u8, selector2: u16| {
        let mut regs = Regs::default();
        regs.psw[0] |= 1 << 44;
        regs.union[0..8].copy_from_slice(&0x6000_u64.to_ne_bytes());
        regs.union[10] = function;
        regs.union[11] = selector1;
        regs.union[12..14].copy_from_slice(&selector2.to_ne_bytes());
        bench.exit(0, 25, &mut regs);
        regs.condition()
    };
    stsi(3, 2, 2);
    assert!(bench.read::<6>(0x6000 + 2048).starts_with(b"bench\0"));
    assert_eq!(stsi(15, 1, 2), 0);
    assert_eq!(bench.read::<2>(0x6002), [0, 40]);
    assert_eq!(stsi(15, 1, 3), 3);
    assert_eq!(stsi(15, 2, 2), 3);
}
