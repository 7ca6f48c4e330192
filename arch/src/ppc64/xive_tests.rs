//! Where a XIVE is, and what of it is the guest's.

use crossvisor_vmm::config::VmConfig;

use super::*;
use crate::ppc64::{Ppc64Machine, host};
use crossvisor_vmm::arch::Machine;

fn xive(page_size: u64, cpus: u32) -> Xive {
    let host = Host {
        page_size,
        ..host::typical()
    };
    let config = VmConfig {
        cpus,
        hugepages: true,
        ..VmConfig::default()
    };
    let machine = Ppc64Machine::new(&config, &host).unwrap();
    assert_eq!(machine.controller_pages().len(), 2);
    Xive::new(machine.plan(), &host)
}

#[test]
fn vcpus_and_devices_have_sources() {
    let xive = xive(65536, 4);
    assert_eq!(xive.trigger(3), Some((3, Trigger::Edge)));
    assert_eq!(xive.trigger(4), None);
    let epow = u64::from(sources::EPOW);
    assert_eq!(xive.trigger(epow), Some((sources::EPOW, Trigger::Edge)));
    let wire = u64::from(sources::INTX[1]);
    assert_eq!(xive.trigger(wire).unwrap().1, Trigger::Level);
    // 2^32 more is not the same.
    assert_eq!(xive.trigger(epow | 1 << 32), None);
}

#[test]
fn the_guest_reaches_pages_of_its_own_sources_only() {
    for page in [4096, 65536] {
        let xive = xive(page, 4);
        assert_eq!(1 << xive.page_shift(), page);
        let [threads, events] = <[ControllerPages; 2]>::try_from(xive.pages()).unwrap();
        let [user, system] = xive.thread_pages();
        assert_eq!((threads.offset, threads.visible), (0, vec![system]));
        assert_eq!(threads.range.base + 2 * page, system.base);
        assert_eq!(threads.range.end(), user.end());
        assert_eq!(events.offset, 4 * page);
        for number in 0..sources::END {
            let [first, second] = xive.event_pages(number);
            assert_eq!(second, first + page);
            let inside = |range: &Range| range.base <= first && second + page <= range.end();
            assert!(inside(&events.range), "{number:#x}");
            let edge = xive.trigger(number.into()).map(|(_, trigger)| trigger);
            let seen = events.visible.iter().filter(|range| inside(range)).count();
            let expected = usize::from(edge == Some(Trigger::Edge));
            assert_eq!(seen, expected, "{number:#x}");
        }
        // Those of vCPUs, of the platform, of devices.
        assert_eq!(events.visible.len(), 3);
        for pair in events.visible.windows(2) {
            assert!(pair[0].end() < pair[1].base);
        }
    }
}
