use std::sync::atomic::{AtomicU32, Ordering};

use super::super::doubles::{DeviceState, MEM_SIZE, MOCK_FEATURES, MockDevice, Random, guest_mem};
use super::*;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

#[derive(Default)]
struct Count {
    queue: AtomicU32,
    config: AtomicU32,
}

impl VirtioInterrupt for Count {
    fn queue(&self, _index: u16) -> io::Result<()> {
        self.queue.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn config(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct Rig {
    transport: Transport,
    device: Arc<DeviceState>,
    interrupt: Arc<Count>,
}

fn rig() -> Rig {
    let (device, state) = MockDevice::new();
    let interrupt = Arc::new(Count::default());
    let transport = Transport::new(
        device,
        guest_mem(),
        Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>,
    )
    .unwrap();
    Rig {
        transport,
        device: state,
        interrupt,
    }
}

impl Rig {
    fn negotiate(&self, features: u64) {
        let t = &self.transport;
        t.set_status(STATUS_ACKNOWLEDGE);
        t.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        t.set_driver_features(0, low(features));
        t.set_driver_features(1, high(features));
        t.set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    }

    fn queue(&self, index: u32, size: u16, base: u64) {
        let t = &self.transport;
        t.set_queue_size(index, size);
        let areas = [
            (QueueArea::Descriptor, base),
            (QueueArea::Driver, base + 0x1000),
            (QueueArea::Device, base + 0x2000),
        ];
        for (area, address) in areas {
            t.set_queue_address(index, area, Some(low(address)), Some(high(address)));
        }
        t.enable_queue(index);
    }

    fn go(&self) {
        self.transport
            .set_status(self.transport.status() | STATUS_DRIVER_OK);
    }

    fn start(&self) {
        self.negotiate(VERSION_1);
        self.queue(0, 16, 0x4000);
        self.queue(1, 8, 0x8000);
        self.go();
        assert!(self.device.is_active());
    }

    fn refused(&self) {
        assert!(!self.device.is_active());
        self.refused_to_go_on();
    }

    fn refused_to_go_on(&self) {
        assert_ne!(self.transport.status() & STATUS_NEEDS_RESET, 0);
        assert_eq!(self.interrupt.config.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn offers_the_devices_features_and_its_own() {
    let rig = rig();
    let t = &rig.transport;
    assert_eq!(
        t.device_features(0),
        MOCK_FEATURES as u32 | 1 << 28 | 1 << 29
    );
    assert_eq!(t.device_features(1), 1);
    assert_eq!(t.device_features(2), 0);
    assert_eq!(t.device_features(u32::MAX), 0);
    assert_eq!(
        (t.device_type(), t.name(), t.queue_count()),
        (2, "mock0", 3)
    );
}

#[test]
fn refuses_features_without_version_1_or_not_offered() {
    for (features, accepted) in [
        (VERSION_1, true),
        (VERSION_1 | 1 | EVENT_IDX, true),
        (0, false),
        (1, false),
        (VERSION_1 | 2, false),
        (VERSION_1 | 1 << 63, false),
        (u64::MAX, false),
    ] {
        let rig = rig();
        rig.negotiate(features);
        let ok = rig.transport.status() & STATUS_FEATURES_OK != 0;
        assert_eq!(ok, accepted, "{features:#x}");
    }
    let rig = rig();
    rig.transport.set_driver_features(2, 1);
    rig.negotiate(VERSION_1);
    assert_eq!(rig.transport.status() & STATUS_FEATURES_OK, 0, "bit 64");
    rig.transport.reset();
    rig.transport.set_driver_features(2, 0);
    rig.negotiate(VERSION_1);
    assert_ne!(rig.transport.status() & STATUS_FEATURES_OK, 0);
}

#[test]
fn a_driver_that_was_refused_may_try_again() {
    let rig = rig();
    rig.negotiate(VERSION_1 | 2);
    rig.negotiate(VERSION_1 | 1);
    assert_ne!(rig.transport.status() & STATUS_FEATURES_OK, 0);
    // From here on they are fixed.
    rig.transport.set_driver_features(0, 0);
    assert_eq!(rig.transport.driver_features(0), 1);
}

#[test]
fn activates_with_the_queues_that_are_enabled() {
    let rig = rig();
    rig.negotiate(VERSION_1 | EVENT_IDX | 1);
    rig.queue(0, 16, 0x4000);
    rig.queue(2, 128, 0x8000);
    assert!(!rig.device.is_active());
    rig.go();
    assert!(rig.device.is_active());
    assert_eq!(
        *rig.device.features.lock().unwrap(),
        VERSION_1 | EVENT_IDX | 1
    );
    assert_eq!(
        *rig.device.queues.lock().unwrap(),
        [(0, 16, 0), (2, 128, 0)]
    );
    assert_eq!(rig.transport.status(), 0xf);
    assert!(rig.device.event_idx.load(Ordering::SeqCst));
    // Setting it again does not start anything again.
    rig.go();
    assert_eq!(rig.device.activations(), 1);
    rig.transport.enable_queue(1);
    assert!(!rig.transport.queue(1).unwrap().enabled, "too late");
    rig.transport.reset();
    rig.start();
    assert!(!rig.device.event_idx.load(Ordering::SeqCst));
}

#[test]
fn driver_ok_needs_negotiation() {
    let rig = rig();
    rig.transport
        .set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK);
    assert_eq!(rig.transport.status(), 3);
    assert!(!rig.device.is_active());
    rig.negotiate(0);
    rig.go();
    assert!(!rig.device.is_active());
    // A driver that has given up does not start it either.
    rig.negotiate(VERSION_1);
    rig.transport.set_status(STATUS_FAILED);
    rig.go();
    assert!(!rig.device.is_active());
    // Nor can it clear bits, or set the device's own.
    rig.transport.set_status(STATUS_NEEDS_RESET | 0x30);
    assert_eq!(
        rig.transport.status(),
        3 | STATUS_FEATURES_OK | STATUS_FAILED
    );
}

#[test]
fn garbage_queues_end_in_needs_reset() {
    let end = MEM_SIZE as u64;
    let cases: [(u16, [u64; 3]); 11] = [
        (0, [0x4000, 0x5000, 0x6000]),
        (3, [0x4000, 0x5000, 0x6000]),
        (32, [0x4000, 0x5000, 0x6000]),
        (u16::MAX, [0x4000, 0x5000, 0x6000]),
        (16, [0x4008, 0x5000, 0x6000]),
        (16, [0x4000, 0x5001, 0x6000]),
        (16, [0x4000, 0x5000, 0x6002]),
        (16, [end - 16 * 16 + 16, 0x5000, 0x6000]),
        (16, [0x4000, end - 4, 0x6000]),
        (16, [0x4000, 0x5000, end]),
        (16, [!15, !1, !3]),
    ];
    for (size, [descriptor, driver, device]) in cases {
        let rig = rig();
        rig.negotiate(VERSION_1);
        rig.queue(1, 16, 0x8000);
        let t = &rig.transport;
        t.set_queue_size(0, size);
        for (area, address) in [
            (QueueArea::Descriptor, descriptor),
            (QueueArea::Driver, driver),
            (QueueArea::Device, device),
        ] {
            t.set_queue_address(0, area, Some(low(address)), Some(high(address)));
        }
        t.enable_queue(0);
        rig.go();
        rig.refused();
        // DRIVER_OK again changes nothing; a reset does.
        rig.go();
        assert_eq!(rig.device.activations(), 0);
        t.reset();
        assert_eq!(t.status(), 0);
        rig.start();
    }
}

#[test]
fn a_running_device_can_say_that_it_needs_a_reset() {
    let rig = rig();
    rig.start();
    let link = rig.device.link();
    for _ in 0..2 {
        link.set_needs_reset().unwrap();
        rig.refused_to_go_on();
    }
    rig.transport.reset();
    assert_eq!(rig.transport.status(), 0);
    rig.start();
    assert_eq!(rig.transport.status() & STATUS_NEEDS_RESET, 0);
}

#[test]
fn a_device_that_cannot_start_needs_reset() {
    let rig = rig();
    rig.device.needs_all.store(true, Ordering::SeqCst);
    rig.negotiate(VERSION_1);
    rig.queue(0, 16, 0x4000);
    rig.go();
    rig.refused();
}

#[test]
fn enabled_queues_are_fixed_and_unknown_ones_ignored() {
    let rig = rig();
    let t = &rig.transport;
    rig.queue(0, 8, 0x1_0000_4000);
    let before = t.queue(0).unwrap();
    assert_eq!(before.size, 8);
    assert_eq!(before.address(QueueArea::Device), 0x1_0000_6000);
    rig.queue(0, 4, 0x8000);
    assert_eq!(t.queue(0), Some(before));
    t.set_queue_address(1, QueueArea::Driver, Some(0x10), None);
    t.set_queue_address(1, QueueArea::Driver, None, Some(2));
    assert_eq!(t.queue(1).unwrap().driver, 0x2_0000_0010);
    for index in [3, 0xffff, u32::MAX] {
        rig.queue(index, 8, 0x4000);
        t.disable_queue(index);
        t.notify(index);
        assert_eq!(t.queue(index), None);
    }
}

#[test]
fn notifications_reach_the_devices_event() {
    let rig = rig();
    rig.start();
    rig.transport.notify(1);
    assert_eq!(rig.transport.queue_events()[1].read().unwrap(), 1);
    assert!(rig.transport.queue_events()[0].read().is_err());
    // Even a full counter neither blocks nor fails.
    rig.transport.queue_events()[0].write(u64::MAX - 1).unwrap();
    rig.transport.notify(0);
    // A reset forgets them.
    rig.transport.reset();
    assert!(rig.transport.queue_events()[0].read().is_err());
}

#[test]
fn reset_forgets_everything_and_may_be_repeated() {
    let rig = rig();
    let fresh: Vec<_> = (0..3).map(|i| rig.transport.queue(i)).collect();
    for round in 1..=20 {
        rig.start();
        assert_eq!(rig.device.activations(), round);
        assert_eq!(
            *rig.device.queues.lock().unwrap(),
            [(0, 16, 0), (1, 8, 0)],
            "positions start anew"
        );
        rig.transport.set_status(0);
        assert!(!rig.device.is_active());
        assert_eq!(rig.transport.status(), 0);
        assert_eq!(rig.transport.driver_features(1), 0);
        let queues: Vec<_> = (0..3).map(|i| rig.transport.queue(i)).collect();
        assert_eq!(queues, fresh);
    }
    assert_eq!(rig.interrupt.config.load(Ordering::SeqCst), 0);
}

#[test]
fn pause_keeps_the_queues_positions() {
    let rig = rig();
    rig.transport.pause();
    rig.transport.resume();
    assert_eq!(rig.device.activations(), 0, "it was not active");
    rig.start();
    rig.transport.pause();
    assert!(!rig.device.is_active());
    rig.transport.pause();
    rig.transport.resume();
    assert!(rig.device.is_active());
    assert_eq!(*rig.device.queues.lock().unwrap(), [(0, 16, 1), (1, 8, 0)]);
    rig.transport.resume();
    assert_eq!(rig.device.activations(), 2);
    rig.transport.pause();
    rig.transport.reset();
    rig.transport.resume();
    assert!(!rig.device.is_active(), "reset while paused");
}

#[test]
fn a_queue_disabled_at_run_time_is_taken_away() {
    let rig = rig();
    rig.start();
    rig.transport.disable_queue(1);
    assert!(rig.device.is_active());
    assert_eq!(*rig.device.queues.lock().unwrap(), [(0, 16, 1)]);
    rig.transport.disable_queue(1);
    assert_eq!(rig.device.activations(), 2, "it was disabled already");
    rig.device.needs_all.store(true, Ordering::SeqCst);
    rig.transport.disable_queue(0);
    rig.refused();
}

#[test]
fn generation_changes_with_the_configuration() {
    let rig = rig();
    let t = &rig.transport;
    let first = t.config_generation();
    assert_eq!(t.config_generation(), first);
    rig.device.config.lock().unwrap()[15] = 1;
    let second = t.config_generation();
    assert_ne!(second, first);
    t.write_config(0, &[1, 2]);
    assert_ne!(t.config_generation(), second);
    let mut data = [0xff; 4];
    t.read_config(0, &mut data);
    assert_eq!(data, [1, 2, 0, 0]);
    t.read_config(14, &mut data);
    assert_eq!(data, [0, 1, 0, 0]);
}

#[test]
fn dropping_it_stops_the_device() {
    let rig = rig();
    rig.start();
    drop(rig.transport);
    assert!(!rig.device.is_active());
}

#[test]
fn a_queue_size_that_no_driver_can_use_is_an_error() {
    struct Odd;
    impl VirtioDevice for Odd {
        fn device_type(&self) -> u32 {
            1
        }
        fn name(&self) -> &str {
            "odd0"
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16, 100]
        }
        fn read_config(&self, _: Interface, _offset: u64, _data: &mut [u8]) {}
        fn write_config(&mut self, _: Interface, _offset: u64, _data: &[u8]) {}
        fn activate(&mut self, _activation: Activation) -> Result<(), super::super::ActivateError> {
            Ok(())
        }
        fn deactivate(&mut self) -> Vec<ActiveQueue> {
            Vec::new()
        }
    }
    let error = Transport::new(Box::new(Odd), guest_mem(), Arc::new(Count::default()))
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "odd0: a queue size of 100 is not a power of 2 up to 32768"
    );
}

#[test]
fn random_drivers_do_no_harm() {
    let mut random = Random(0x5eed);
    let rig = rig();
    let t = &rig.transport;
    let mut activations = 0;
    for _ in 0..30_000 {
        let index = random.below(4) as u32;
        match random.below(14) {
            0 => t.set_status(random.next() as u8),
            1 => t.set_status(0),
            2 => t.set_status(t.status() | random.next() as u8 & 0xf),
            3 => t.set_driver_features(random.below(3) as u32, random.next() as u32),
            4 | 5 => rig.negotiate(VERSION_1 | random.next() & MOCK_FEATURES),
            6 => t.set_queue_size(index, random.next() as u16),
            7 => t.set_queue_size(index, 1 << random.below(6)),
            8 | 9 => t.set_queue_address(
                index,
                [QueueArea::Descriptor, QueueArea::Driver, QueueArea::Device]
                    [random.below(3) as usize],
                Some(random.next() as u32 & 0x1f_fff0),
                (random.below(4) == 0).then(|| random.next() as u32 & 1),
            ),
            10 => t.enable_queue(index),
            11 => t.disable_queue(index),
            12 => t.notify(random.next() as u32 & 7),
            _ => t.write_config(random.next(), &[0; 8][..random.below(9) as usize]),
        }
        let status = t.status();
        let runs = status & STATUS_DRIVER_OK != 0 && status & STATUS_NEEDS_RESET == 0;
        assert_eq!(rig.device.is_active(), runs, "status {status:#x}");
        activations = rig.device.activations();
    }
    assert!(activations > 50, "only {activations} activations");
}
