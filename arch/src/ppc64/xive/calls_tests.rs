//! Hypercalls about a XIVE, by a hypervisor that is a record.

use crossvisor_vmm::arch::Machine;
use crossvisor_vmm::config::VmConfig;
use crossvisor_vmm::double::ScriptedVm;

use super::*;
use crate::ppc64::{Ppc64Machine, host};

const CPUS: u64 = 2;
const MEMORY: u64 = 512 << 20;
/// The message source of the first device.
const MSI: u64 = 0x1420;

struct Guest {
    vm: ScriptedVm,
    calls: XiveCalls,
    lines: Arc<Lines>,
    xive: Xive,
}

fn guest() -> Guest {
    let config = VmConfig {
        cpus: CPUS as u32,
        memory: MEMORY,
        ..VmConfig::default()
    };
    let host = host::typical();
    let machine = Ppc64Machine::new(&config, &host).unwrap();
    let vm = ScriptedVm::default();
    let lines = Arc::new(Lines::new(Arc::new(vm.clone())));
    let xive = Xive::new(machine.plan(), &host);
    let memory = machine.plan().memory.clone();
    let calls = XiveCalls::new(Arc::new(vm.clone()), xive.clone(), memory, lines.clone());
    Guest {
        vm,
        calls,
        lines,
        xive,
    }
}

impl Guest {
    fn call(&self, number: u64, args: &[u64]) -> Answer {
        let mut words = [0; 9];
        words[..args.len()].copy_from_slice(args);
        self.calls.call(number, &words).unwrap()
    }

    /// The attributes that were set since the last look.
    fn set(&self) -> Vec<(u32, u64, Vec<u8>)> {
        std::mem::take(&mut self.vm.record().attributes)
    }
}

const REFUSED: Vec<u64> = Vec::new();

#[test]
fn sources_have_pages_or_are_reached_by_hypercall() {
    let guest = guest();
    let [first, second] = guest.xive.event_pages(MSI as u32);
    let expected = (H_SUCCESS, vec![0, second, first, 16]);
    assert_eq!(guest.call(H_INT_GET_SOURCE_INFO, &[0, MSI]), expected);
    let wire = u64::from(sources::INTX[0]);
    let expected = (H_SUCCESS, vec![0b1100, u64::MAX, u64::MAX, 16]);
    assert_eq!(guest.call(H_INT_GET_SOURCE_INFO, &[0, wire]), expected);
    for unknown in [CPUS, 0x1002, 0x13ff, MSI | 1 << 32, u64::MAX] {
        let answer = guest.call(H_INT_GET_SOURCE_INFO, &[0, unknown]);
        assert_eq!(answer, (H_P2, REFUSED), "{unknown:#x}");
    }
    let answer = guest.call(H_INT_GET_SOURCE_INFO, &[1, MSI]);
    assert_eq!(answer, (H_PARAMETER, REFUSED));
}

#[test]
fn sources_lead_to_a_vcpu_and_a_priority() {
    let guest = guest();
    let config = || guest.call(H_INT_GET_SOURCE_CONFIG, &[0, MSI]).1;
    assert_eq!(config(), [0, 0xff, MSI]);
    let set = |args: &[u64]| guest.call(H_INT_SET_SOURCE_CONFIG, args).0;
    assert_eq!(set(&[2, MSI, 1, 6, 0x21]), H_SUCCESS);
    let value = 6_u64 | 1 << 3 | 0x21 << 33;
    assert_eq!(guest.set(), [(3, MSI, value.to_ne_bytes().to_vec())]);
    assert_eq!(config(), [1, 6, 0x21]);
    // The number stays when it is not to be set, and while it is masked. KVM is
    // told another, or it would not look at the mask.
    let masked = (1_u64 << 32 | 0x20 << 33).to_ne_bytes().to_vec();
    assert_eq!(set(&[1, MSI, 1, 6, 0x99]), H_SUCCESS);
    assert_eq!(guest.set(), [(3, MSI, masked.clone())]);
    assert_eq!(config(), [1, 0xff, 0x21]);
    assert_eq!(set(&[1, MSI, 0, 5, 0x99]), H_SUCCESS);
    assert_eq!(guest.set(), [(3, MSI, masked.clone())]);
    assert_eq!(config(), [0, 0xff, 0x21]);
    assert_eq!(set(&[2, MSI, 0, 0xff, 0]), H_SUCCESS);
    assert_eq!(guest.set(), [(3, MSI, masked)]);
    assert_eq!(config(), [0, 0xff, MSI]);

    assert_eq!(set(&[4, MSI, 0, 5, 1]), H_PARAMETER);
    assert_eq!(set(&[2, 0x13ff, 0, 5, 1]), H_P2);
    for cpu in [CPUS, u64::MAX] {
        assert_eq!(set(&[2, MSI, cpu, 5, 1]), H_P3);
    }
    for priority in [7, 8, 0xfe, u64::MAX] {
        assert_eq!(set(&[2, MSI, 0, priority, 1]), H_P4);
    }
    assert_eq!(set(&[2, MSI, 0, 5, 1 << 31]), H_P5);
    assert!(guest.set().is_empty());
}

#[test]
fn queues_are_aligned_and_in_memory() {
    let guest = guest();
    let set = |args: &[u64]| guest.call(H_INT_SET_QUEUE_CONFIG, args).0;
    let config = || guest.call(H_INT_GET_QUEUE_CONFIG, &[0, 1, 6]).1;
    assert_eq!(config(), [0; 4]);
    let last = MEMORY - 0x1_0000;
    assert_eq!(set(&[1, 1, 6, last, 16]), H_SUCCESS);
    let words = [1_u32, 16, last as u32, 0, 1, 0];
    let words: Vec<u32> = match cfg!(target_endian = "big") {
        true => vec![1, 16, 0, last as u32, 1, 0],
        false => words.to_vec(),
    };
    let mut value: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    value.resize(64, 0);
    assert_eq!(guest.set(), [(4, 6 | 1 << 3, value)]);
    assert_eq!(config(), [1, last, 16, 0]);
    assert_eq!(guest.call(H_INT_GET_QUEUE_INFO, &[0, 1, 6]).0, H_SUCCESS);
    assert_eq!(set(&[0, 1, 6, 0, 0]), H_SUCCESS);
    assert_eq!(guest.set(), [(4, 6 | 1 << 3, vec![0; 64])]);
    assert_eq!(config(), [0; 4]);

    assert_eq!(set(&[2, 1, 6, last, 16]), H_PARAMETER);
    // KVM has no queue that does not notify.
    assert_eq!(set(&[0, 1, 6, last, 16]), H_PARAMETER);
    assert_eq!(set(&[1, CPUS, 6, last, 16]), H_P2);
    assert_eq!(set(&[1, 1, 7, last, 16]), H_P3);
    for address in [0x1000, MEMORY, !0xffff, 40 << 40] {
        assert_eq!(set(&[1, 1, 6, address, 16]), H_P4, "{address:#x}");
    }
    for shift in [12, 17, 21, 64, u64::MAX] {
        assert_eq!(set(&[1, 1, 6, 0, shift]), H_P5, "{shift}");
    }
    assert!(guest.set().is_empty());
    assert_eq!(guest.call(H_INT_GET_QUEUE_INFO, &[0, CPUS, 6]).0, H_P2);
    assert_eq!(guest.call(H_INT_GET_QUEUE_CONFIG, &[0, 1, 7]).0, H_P3);
}

#[test]
fn a_wire_that_is_still_asserted_triggers_again() {
    let guest = guest();
    let wire = sources::INTX[2];
    let [_, page] = guest.xive.event_pages(wire);
    let load = |offset| guest.call(H_INT_ESB, &[0, wire.into(), offset, 0]);
    let line = guest.lines.level_line(wire);
    line.set(true).unwrap();
    assert_eq!(load(0), (H_SUCCESS, vec![ScriptedVm::LOADED]));
    // Looking at the state, and masking, trigger nothing.
    load(0x800);
    load(0xd00);
    load(0xc00);
    line.set(false).unwrap();
    load(0);
    let on = (wire, true);
    assert_eq!(guest.vm.record().lines, [on, on, on, (wire, false)]);
    let loads = [0, 0x800, 0xd00, 0xc00, 0].map(|offset| (page + offset, None));
    assert_eq!(guest.vm.record().controller, loads);

    let stored = guest.call(H_INT_ESB, &[1, wire.into(), 0x400, 5]);
    assert_eq!(stored.0, H_SUCCESS);
    let last = guest.vm.record().controller.last().copied();
    assert_eq!(last, Some((page + 0x400, Some(5))));
    for offset in [4, 0x1000, !7] {
        assert_eq!(load(offset).0, H_P3, "{offset:#x}");
    }
    assert_eq!(
        guest.call(H_INT_ESB, &[2, wire.into(), 0, 0]).0,
        H_PARAMETER
    );
    assert_eq!(guest.call(H_INT_ESB, &[0, 0x1014, 0, 0]).0, H_P2);
    assert_eq!(guest.vm.record().controller.len(), 6);
}

#[test]
fn a_reset_forgets_and_others_have_their_calls() {
    let guest = guest();
    guest.call(H_INT_SET_SOURCE_CONFIG, &[2, MSI, 1, 6, 0x21]);
    guest.call(H_INT_SET_QUEUE_CONFIG, &[1, 1, 6, 0, 16]);
    guest.set();
    assert_eq!(guest.call(H_INT_SYNC, &[0, MSI]).0, H_SUCCESS);
    assert_eq!(guest.call(H_INT_RESET, &[0]).0, H_SUCCESS);
    assert_eq!(guest.set(), [(5, MSI, vec![]), (1, 1, vec![])]);
    let config = guest.call(H_INT_GET_SOURCE_CONFIG, &[0, MSI]);
    assert_eq!(config.1, [0, 0xff, MSI]);
    let config = guest.call(H_INT_GET_QUEUE_CONFIG, &[0, 1, 6]);
    assert_eq!(config.1, [0; 4]);
    assert_eq!(guest.call(H_INT_RESET, &[1]).0, H_PARAMETER);
    assert_eq!(guest.call(H_INT_SYNC, &[0, CPUS]).0, H_P2);
    for other in [0, 0x3a4, 0x3c0, 0x3c4, 0x3d4, u64::MAX] {
        assert_eq!(guest.calls.call(other, &[0; 9]), None);
    }
}
