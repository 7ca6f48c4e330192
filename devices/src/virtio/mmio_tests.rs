use std::sync::atomic::Ordering;

use super::super::doubles::{Bells, DeviceState, Line, MockDevice, Random, guest_mem};
use super::*;

const BASE: u64 = 0x1000_0000;
const BELL: Doorbell = Doorbell::Mmio(BASE + 0x50);

struct Rig {
    mmio: VirtioMmio,
    device: Arc<DeviceState>,
    line: Arc<Line>,
    bells: Arc<Bells>,
}

fn rig_with(mock: (Box<MockDevice>, Arc<DeviceState>), bells: Bells) -> Rig {
    let (device, state) = mock;
    let line = Arc::new(Line::default());
    let bells = Arc::new(bells);
    let mmio = VirtioMmio::new(
        device,
        guest_mem(),
        Arc::clone(&line) as Arc<dyn IrqLine>,
        Arc::clone(&bells) as Arc<dyn Doorbells>,
        BASE,
    )
    .unwrap();
    Rig {
        mmio,
        device: state,
        line,
        bells,
    }
}

fn rig() -> Rig {
    rig_with(MockDevice::new(), Bells::default())
}

impl Rig {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    /// What a good driver does until its device runs.
    fn start(&self) {
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        self.write(DRIVER_FEATURES_SEL, 1);
        self.write(DRIVER_FEATURES, 1);
        self.write(STATUS, 11);
        assert_eq!(self.read(STATUS), 11);
        for queue in 0..3 {
            self.write(QUEUE_SEL, queue);
            assert_eq!(self.read(QUEUE_READY), 0);
            let size = self.read(QUEUE_NUM_MAX).min(64);
            self.write(QUEUE_NUM, size);
            let base = 0x4000 * (queue + 1);
            for (register, address) in [
                (QUEUE_DESC_LOW, base),
                (QUEUE_DRIVER_LOW, base + 0x1000),
                (QUEUE_DEVICE_LOW, base + 0x2000),
            ] {
                self.write(register, address);
                self.write(register + 4, 0);
            }
            self.write(QUEUE_READY, 1);
            assert_eq!(self.read(QUEUE_READY), 1);
        }
        self.write(STATUS, 15);
    }
}

#[test]
fn tells_what_it_is() {
    let rig = rig();
    assert_eq!(rig.read(MAGIC_VALUE), 0x7472_6976);
    assert_eq!(rig.read(VERSION_NUMBER), 2);
    assert_eq!(rig.read(DEVICE_ID), 2);
    assert_eq!(rig.read(DEVICE_FEATURES), 0x3000_0021);
    rig.write(DEVICE_FEATURES_SEL, 1);
    assert_eq!(rig.read(DEVICE_FEATURES), 1);
    for shared_memory in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(rig.read(shared_memory), u32::MAX);
    }
    for (queue, size) in [(0, 16), (2, 256), (3, 0), (u32::MAX, 0)] {
        rig.write(QUEUE_SEL, queue);
        assert_eq!(rig.read(QUEUE_NUM_MAX), size);
    }
    assert_eq!(rig.read(0x0f0), 0);
}

#[test]
fn registers_take_only_aligned_words() {
    let rig = rig();
    for len in [1, 2, 8] {
        let mut data = [0xee; 8];
        rig.mmio.read(0, &mut data[..len]);
        assert_eq!(data[..len], [0; 8][..len]);
        rig.mmio.write(STATUS, &[1; 8][..len]);
    }
    let mut data = [0xee; 4];
    rig.mmio.read(2, &mut data);
    assert_eq!(data, [0; 4]);
    rig.mmio.write(STATUS - 1, &[1; 4]);
    assert_eq!(rig.read(STATUS), 0);
}

#[test]
fn a_driver_starts_it_and_a_reset_stops_it() {
    let rig = rig();
    for round in 1..=3 {
        rig.start();
        assert!(rig.device.is_active());
        assert_eq!(rig.device.activations(), round);
        assert_eq!(
            *rig.device.queues.lock().unwrap(),
            [(0, 16, 0), (1, 16, 0), (2, 64, 0)]
        );
        let bases = [0x4000, 0x8000, 0xc000];
        assert_eq!(
            *rig.device.rings.lock().unwrap(),
            bases.map(|base| [base, base + 0x1000, base + 0x2000])
        );
        rig.write(STATUS, 0);
        assert!(!rig.device.is_active());
        assert_eq!(rig.read(STATUS), 0);
        assert_eq!(rig.read(QUEUE_READY), 0);
    }
}

#[test]
fn interrupts_hold_the_line_until_they_are_acknowledged() {
    let rig = rig();
    rig.start();
    let link = rig.device.link();
    link.used(2).unwrap();
    assert_eq!(rig.read(INTERRUPT_STATUS), 1);
    link.config_changed().unwrap();
    assert_eq!(rig.read(INTERRUPT_STATUS), 3);
    assert_eq!(
        rig.line.take(),
        [true, true],
        "each is an edge on an edge-triggered line"
    );
    rig.write(INTERRUPT_ACK, 1);
    assert_eq!(rig.read(INTERRUPT_STATUS), 2);
    assert!(rig.line.take().is_empty());
    rig.write(INTERRUPT_ACK, 0xffff_ffff);
    assert_eq!(rig.read(INTERRUPT_STATUS), 0);
    assert_eq!(rig.line.take(), [false]);
    rig.write(INTERRUPT_ACK, 3);
    assert!(rig.line.take().is_empty());
    link.used(0).unwrap();
    rig.write(STATUS, 0);
    assert_eq!(rig.line.take(), [true, false], "a reset acknowledges");
}

#[test]
fn garbage_needs_reset_and_says_so() {
    let rig = rig();
    rig.write(DRIVER_FEATURES_SEL, 1);
    rig.write(DRIVER_FEATURES, 1);
    rig.write(STATUS, 11);
    rig.write(QUEUE_NUM, 0x1_0010);
    rig.write(QUEUE_READY, 1);
    rig.write(STATUS, 15);
    assert_eq!(rig.read(STATUS), 0x4f);
    assert_eq!(rig.read(INTERRUPT_STATUS), 2);
    assert_eq!(rig.line.take(), [true]);
    rig.write(STATUS, 0);
    rig.start();
    assert!(rig.device.is_active());
}

#[test]
fn doorbells_are_attached_for_life() {
    let rig = rig();
    let all = [(BELL, Some(0)), (BELL, Some(1)), (BELL, Some(2))];
    assert_eq!(rig.bells.attached(), all);
    rig.start();
    rig.write(STATUS, 0);
    rig.start();
    assert_eq!(rig.bells.attached(), all);
    let bells = Arc::clone(&rig.bells);
    drop(rig.mmio);
    assert!(bells.attached().is_empty());
}

#[test]
fn without_doorbells_the_vcpu_rings() {
    let bells = Bells::default();
    bells.none.store(true, Ordering::SeqCst);
    let rig = rig_with(MockDevice::new(), bells);
    rig.start();
    rig.write(QUEUE_NOTIFY, 1);
    rig.write(QUEUE_NOTIFY, 3);
    rig.write(QUEUE_NOTIFY, u32::MAX);
    let events = rig.mmio.transport().queue_events();
    assert_eq!(events[1].read().unwrap(), 1);
    assert!(events[0].read().is_err());
    assert!(events[2].read().is_err());
}

#[test]
fn configuration_takes_any_width() {
    let rig = rig();
    let before = rig.read(CONFIG_GENERATION);
    rig.mmio.write(0x101, &[0xab]);
    rig.mmio.write(0x104, &[1, 2, 3, 4, 5, 6, 7, 8]);
    rig.mmio.write(0x1ff, &[9]);
    let mut data = [0; 8];
    rig.mmio.read(0x100, &mut data);
    assert_eq!(data, [0, 0xab, 0, 0, 1, 2, 3, 4]);
    let mut half = [0; 2];
    rig.mmio.read(0x10a, &mut half);
    assert_eq!(half, [7, 8]);
    rig.mmio.read(0x1fc, &mut data);
    assert_eq!(data, [0; 8]);
    assert_ne!(rig.read(CONFIG_GENERATION), before);
}

#[test]
fn resets_while_it_works() {
    let rig = rig_with(MockDevice::busy(), Bells::default());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2000 {
                rig.write(INTERRUPT_ACK, rig.read(INTERRUPT_STATUS));
                rig.write(QUEUE_NOTIFY, 1);
            }
        });
        for _ in 0..50 {
            rig.start();
            std::thread::yield_now();
            rig.write(STATUS, 0);
            assert!(!rig.device.is_active());
            assert_eq!(rig.read(INTERRUPT_STATUS), 0);
        }
    });
    assert_eq!(rig.device.activations(), 50);
    assert_ne!(rig.line.take().last(), Some(&true));
}

#[test]
fn random_register_writes_do_no_harm() {
    let rig = rig();
    let mut random = Random(0xfeed_f00d);
    for _ in 0..50_000 {
        let offset = random.below(0x210);
        let value = match random.below(3) {
            0 => random.next(),
            1 => random.below(16),
            _ => random.below(0x100) << 12,
        };
        let len = [1, 2, 4, 4, 4, 8][random.below(6) as usize];
        let offset = if random.below(4) > 0 {
            offset & !3
        } else {
            offset
        };
        if random.below(3) == 0 {
            rig.mmio.read(offset, &mut [0; 8][..len]);
        } else {
            rig.mmio.write(offset, &value.to_le_bytes()[..len]);
        }
        if random.below(500) == 0 {
            rig.write(STATUS, 0);
            rig.start();
            assert!(rig.device.is_active());
        }
    }
    assert!(rig.device.activations() > 50);
}
