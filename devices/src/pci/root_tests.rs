use std::sync::atomic::{AtomicBool, Ordering};

use super::super::config::{COMMAND, COMMAND_MEMORY};
use super::*;

const LOW: PciWindow = PciWindow {
    guest_base: 0xc000_0000,
    pci_base: 0x8000_0000,
    size: 0x100_0000,
};
const HIGH: PciWindow = PciWindow {
    guest_base: 0x80_0000_0000,
    pci_base: 0x80_0000_0000,
    size: 0x1_0000_0000,
};

/// A function with a 32-bit BAR 0 and a 64-bit BAR 2 that each read as the BAR
/// and the offset of the access.
struct Probe {
    config: Mutex<ConfigSpace>,
    bdf: Mutex<Option<Bdf>>,
    mapped: Mutex<Vec<(u8, u64)>>,
    writes: Mutex<Vec<(u8, u64, Vec<u8>)>>,
    reset: AtomicBool,
}

impl Probe {
    fn new() -> Arc<Self> {
        Self::with_size(0x1000)
    }

    fn with_size(size: u64) -> Arc<Self> {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x1234,
            device: 0x5678,
            ..HOST_BRIDGE
        });
        let bar = Bar {
            size,
            wide: false,
            prefetchable: false,
        };
        config.add_bar(0, bar).unwrap();
        config.add_bar(2, Bar { wide: true, ..bar }).unwrap();
        Arc::new(Self {
            config: Mutex::new(config),
            bdf: Mutex::default(),
            mapped: Mutex::default(),
            writes: Mutex::default(),
            reset: AtomicBool::new(false),
        })
    }

    fn mapped(&self) -> Vec<(u8, u64)> {
        self.mapped.lock().unwrap().clone()
    }
}

impl PciFunction for Probe {
    fn attach(&self, bdf: Bdf) {
        *self.bdf.lock().unwrap() = Some(bdf);
    }

    fn bars(&self) -> Vec<(u8, Bar)> {
        self.config.lock().unwrap().bars().collect()
    }

    fn place_bar(&self, bar: u8, address: u64) {
        self.config.lock().unwrap().place_bar(bar, address);
    }

    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(register.into(), data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect {
        let written = self.config.lock().unwrap().write(register.into(), data);
        ConfigEffect {
            decode: written.decode,
        }
    }

    fn decoded_bars(&self) -> Vec<DecodedBar> {
        self.config.lock().unwrap().decoded_bars()
    }

    fn bars_mapped(&self, mapped: &[(u8, u64)]) {
        *self.mapped.lock().unwrap() = mapped.to_vec();
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = bar;
        if let Some(byte) = data.get_mut(1) {
            *byte = (offset & 0xff) as u8;
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.writes
            .lock()
            .unwrap()
            .push((bar, offset, data.to_vec()));
    }

    fn reset(&self) {
        self.config.lock().unwrap().reset();
        self.reset.store(true, Ordering::Relaxed);
    }
}

fn bdf(device: u8) -> Bdf {
    Bdf {
        bus: 0,
        device,
        function: 0,
    }
}

fn enable(root: &PciRoot, bdf: Bdf) {
    root.config_write(bdf, COMMAND as u16, &COMMAND_MEMORY.to_le_bytes());
}

fn read(root: &Arc<PciRoot>, guest: u64) -> [u8; 4] {
    let mut data = [0xee; 4];
    let windows = root.windows();
    let (window, bus) = windows
        .iter()
        .find(|(w, _)| (w.guest_base..w.guest_base + w.size).contains(&guest))
        .unwrap();
    bus.read(guest - window.guest_base, &mut data);
    data
}

const NOBODY: [u8; 4] = [0xff; 4];

#[test]
fn slots_are_given_out_and_kept() {
    let root = PciRoot::new(&[LOW, HIGH]);
    assert_eq!(root.add(Probe::new(), Some(2)), Ok(bdf(2)));
    assert_eq!(root.add(Probe::new(), None), Ok(bdf(1)));
    assert_eq!(root.add(Probe::new(), None), Ok(bdf(3)));
    assert_eq!(root.add(Probe::new(), Some(2)), Err(PciError::Slot(2)));
    assert_eq!(root.add(Probe::new(), Some(0)), Err(PciError::Slot(0)));
    assert_eq!(root.add(Probe::new(), Some(32)), Err(PciError::Slot(32)));
    for _ in 4..32 {
        root.add(Probe::new(), None).unwrap();
    }
    assert_eq!(root.add(Probe::new(), None), Err(PciError::Full));
    assert_eq!(root.functions().len(), 32);
}

#[test]
fn the_function_learns_where_it_sits() {
    let root = PciRoot::new(&[LOW, HIGH]);
    let probe = Probe::new();
    root.add(Arc::clone(&probe) as Arc<dyn PciFunction>, Some(5))
        .unwrap();
    assert_eq!(*probe.bdf.lock().unwrap(), Some(bdf(5)));
    let config = probe.config.lock().unwrap();
    assert_eq!(config.bar_address(0), Some(0x8000_0000));
    assert_eq!(config.bar_address(2), Some(0x80_0000_0000));
}

#[test]
fn a_function_without_room_changes_nothing() {
    let root = PciRoot::new(&[LOW]);
    let big = Probe::with_size(0x80_0000);
    root.add(Arc::clone(&big) as Arc<dyn PciFunction>, None)
        .unwrap();
    let next = Probe::with_size(0x80_0000);
    assert_eq!(root.add(next, None), Err(PciError::Space(0x80_0000)));
    assert_eq!(root.functions(), [bdf(0), bdf(1)]);

    let half = PciRoot::new(&[PciWindow {
        size: 0x1000,
        ..LOW
    }]);
    assert_eq!(
        half.add(Probe::new(), None),
        Err(PciError::Space(0x1000)),
        "room for one BAR of two"
    );
    let one = Probe::with_size(0x800);
    assert_eq!(half.add(one, None), Ok(bdf(1)), "the first BAR's was freed");
}

#[test]
fn absent_functions_read_as_ones_and_the_bridge_is_there() {
    let root = PciRoot::new(&[LOW]);
    let mut data = [0; 4];
    root.config_read(bdf(0), 0, &mut data);
    assert_eq!(data, [0x36, 0x1b, 0x08, 0x00]);
    root.config_read(bdf(0), 8, &mut data);
    assert_eq!(data, [0, 0, 0, 6], "class: host bridge");
    root.config_write(bdf(0), COMMAND as u16, &[0xff; 4]);
    for absent in [
        bdf(1),
        Bdf {
            function: 1,
            ..bdf(0)
        },
        Bdf { bus: 1, ..bdf(0) },
    ] {
        root.config_read(absent, 0, &mut data);
        assert_eq!(data, NOBODY);
        root.config_write(absent, 4, &[0xff; 4]);
    }
}

#[test]
fn bars_answer_where_they_are_enabled_and_moved() {
    let root = PciRoot::new(&[LOW, HIGH]);
    let probe = Probe::new();
    let at = root
        .add(Arc::clone(&probe) as Arc<dyn PciFunction>, None)
        .unwrap();
    assert_eq!(read(&root, 0xc000_0010), NOBODY, "not enabled yet");

    enable(&root, at);
    assert_eq!(probe.mapped(), [(0, 0xc000_0000), (2, 0x80_0000_0000)]);
    assert_eq!(read(&root, 0xc000_0010), [0, 0x10, 0, 0], "translated");
    assert_eq!(read(&root, 0x80_0000_0020), [2, 0x20, 0, 0]);
    assert_eq!(read(&root, 0xc000_0ffc), [0, 0xfc, 0, 0]);
    assert_eq!(read(&root, 0xc000_0ffd), NOBODY, "runs out of the BAR");
    assert_eq!(read(&root, 0xc000_1000), NOBODY);

    root.config_write(at, 0x10, &0x8030_0000_u32.to_le_bytes());
    assert_eq!(read(&root, 0xc000_0010), NOBODY);
    assert_eq!(read(&root, 0xc030_0010), [0, 0x10, 0, 0]);
    let (_, bus) = root.windows().remove(0);
    bus.write(0x30_0008, &[1, 2]);
    bus.write(0x31_0008, &[3, 4]);
    assert_eq!(*probe.writes.lock().unwrap(), [(0, 8, vec![1, 2])]);

    // Out of every window: nowhere. A 64-bit BAR may go into the low one.
    root.config_write(at, 0x10, &0x1000_0000_u32.to_le_bytes());
    root.config_write(at, 0x18, &0x8040_0000_u32.to_le_bytes());
    root.config_write(at, 0x1c, &0_u32.to_le_bytes());
    assert_eq!(probe.mapped(), [(2, 0xc040_0000)]);
    assert_eq!(read(&root, 0xc040_0000), [2, 0, 0, 0]);

    root.config_write(at, COMMAND as u16, &[0, 0]);
    assert!(probe.mapped().is_empty());
    assert_eq!(read(&root, 0xc040_0000), NOBODY);
}

#[test]
fn overlapping_bars_are_served_in_a_fixed_way() {
    let root = PciRoot::new(&[LOW, HIGH]);
    let (a, b) = (Probe::with_size(0x4000), Probe::new());
    let first = root.add(a, None).unwrap();
    let second = root.add(b, None).unwrap();
    enable(&root, first);
    enable(&root, second);
    root.config_write(second, 0x10, &0x8000_1000_u32.to_le_bytes());
    assert_eq!(read(&root, 0xc000_0000), [0, 0, 0, 0]);
    assert_eq!(read(&root, 0xc000_1004), [0, 4, 0, 0]);
    root.config_write(second, 0x10, &0x8080_0000_u32.to_le_bytes());
    assert_eq!(read(&root, 0xc000_2004), [0, 4, 0, 0], "whole again");
    // The first one passes the second.
    root.config_write(first, 0x10, &0x8090_0000_u32.to_le_bytes());
    assert_eq!(read(&root, 0xc080_0004), [0, 4, 0, 0]);
    assert_eq!(read(&root, 0xc090_2008), [0, 8, 0, 0]);
    assert_eq!(read(&root, 0xc000_2004), NOBODY);
    // And the second goes below again.
    root.config_write(second, 0x10, &0x8000_8000_u32.to_le_bytes());
    assert_eq!(read(&root, 0xc000_8004), [0, 4, 0, 0]);
    assert_eq!(read(&root, 0xc090_2008), [0, 8, 0, 0]);
}

#[test]
fn reset_puts_everything_back() {
    let root = PciRoot::new(&[LOW, HIGH]);
    let probe = Probe::new();
    let at = root
        .add(Arc::clone(&probe) as Arc<dyn PciFunction>, None)
        .unwrap();
    enable(&root, at);
    root.config_write(at, 0x10, &0x8030_0000_u32.to_le_bytes());
    root.reset();
    assert!(probe.reset.load(Ordering::Relaxed));
    assert!(probe.mapped().is_empty());
    assert_eq!(read(&root, 0xc030_0000), NOBODY);
    enable(&root, at);
    assert_eq!(read(&root, 0xc000_0000), [0, 0, 0, 0]);
}

#[test]
fn readers_and_movers_do_not_disturb_each_other() {
    let root = PciRoot::new(&[LOW, HIGH]);
    let probe = Probe::new();
    let at = root.add(probe, None).unwrap();
    enable(&root, at);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for guest in [0xc000_0000, 0xc010_0000] {
                        let data = read(&root, guest);
                        assert!(data == NOBODY || data == [0, 0, 0, 0]);
                    }
                }
            });
        }
        for round in 0..500_u32 {
            let address = 0x8000_0000 + (round & 1) * 0x10_0000;
            root.config_write(at, 0x10, &address.to_le_bytes());
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(read(&root, 0xc010_0000), [0, 0, 0, 0]);
}
