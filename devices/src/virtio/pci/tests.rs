use std::sync::atomic::Ordering;

use super::super::doubles::{
    Bells, DeviceState, Line, MEM_SIZE, MockDevice, Random, Vectors, guest_mem,
};
use super::*;
use crate::bus::BusDevice;
use crate::irq::MsiMessage;
use crate::pci::{PciRoot, PciWindow};

const LOW: PciWindow = PciWindow {
    guest_base: 0xc000_0000,
    pci_base: 0xc000_0000,
    size: 0x1000_0000,
};
const HIGH: PciWindow = PciWindow {
    guest_base: 0x210_0000_0000,
    pci_base: 0x10_0000_0000,
    size: 0x1_0000_0000,
};
/// Where the guest finds the first BAR.
const PLACE: u64 = HIGH.guest_base;

/// A function on a bus, driven as a guest would: through configuration space
/// and the windows.
struct Rig {
    root: Arc<PciRoot>,
    windows: Vec<(PciWindow, Arc<dyn BusDevice>)>,
    function: Arc<VirtioPci>,
    bdf: Bdf,
    device: Arc<DeviceState>,
    line: Arc<Line>,
    vectors: Arc<Vectors>,
    bells: Arc<Bells>,
}

fn rig_with(mock: (Box<MockDevice>, Arc<DeviceState>), vectors: u16) -> Rig {
    let (device, state) = mock;
    let root = PciRoot::new(&[LOW, HIGH]);
    let line = Arc::new(Line::default());
    let vectors = Vectors::new(vectors);
    let bells = Arc::new(Bells::default());
    let function = Arc::new(
        VirtioPci::new(
            device,
            guest_mem(),
            Some(Arc::clone(&vectors) as Arc<dyn MsiVectors>),
            Arc::clone(&line) as Arc<dyn IrqLine>,
            Arc::clone(&bells) as Arc<dyn Doorbells>,
        )
        .unwrap(),
    );
    let bdf = root
        .add(Arc::clone(&function) as Arc<dyn PciFunction>, Some(3))
        .unwrap();
    Rig {
        windows: root.windows(),
        root,
        function,
        bdf,
        device: state,
        line,
        vectors,
        bells,
    }
}

fn rig() -> Rig {
    rig_with(MockDevice::new(), 4)
}

/// A virtio structure as a driver finds it: capability, BAR, offset, length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    capability: u16,
    bar: u8,
    offset: u64,
    length: u64,
}

impl Rig {
    fn config<const N: usize>(&self, register: u16) -> [u8; N] {
        let mut data = [0; N];
        self.root.config_read(self.bdf, register, &mut data);
        data
    }

    fn config32(&self, register: u16) -> u32 {
        u32::from_le_bytes(self.config(register))
    }

    fn set_config(&self, register: u16, data: &[u8]) {
        self.root.config_write(self.bdf, register, data);
    }

    /// Walks the capabilities for those of `id`.
    fn capabilities(&self, id: u8) -> Vec<u16> {
        let mut found = Vec::new();
        let [mut at] = self.config(0x34);
        while at != 0 {
            assert!(found.len() < 48, "the list does not end");
            let [this, next] = self.config(at.into());
            if this == id {
                found.push(at.into());
            }
            at = next;
        }
        found
    }

    fn structure(&self, kind: u8) -> Found {
        let all = self.capabilities(0x09);
        let capability = all
            .into_iter()
            .find(|&at| self.config(at + 3) == [kind])
            .unwrap();
        let [bar] = self.config(capability + 4);
        Found {
            capability,
            bar,
            offset: self.config32(capability + 8).into(),
            length: self.config32(capability + 12).into(),
        }
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        self.windows[1].1.read(offset, data);
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        self.windows[1].1.write(offset, data);
    }

    fn get8(&self, offset: u64) -> u8 {
        let mut data = [0; 1];
        self.read_bar(offset, &mut data);
        data[0]
    }

    fn get16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.read_bar(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn get32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.read_bar(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn enable(&self) {
        self.set_config(4, &[0x06, 0x00]);
    }

    fn enable_msix(&self) {
        let [at] = self.capabilities(0x11)[..] else {
            panic!("no MSI-X");
        };
        self.set_config(at + 2, &0x8000_u16.to_le_bytes());
    }

    fn program_vector(&self, vector: u64, masked: bool) {
        let entry = TABLE + vector * 16;
        self.write_bar(entry, &(0xfee0_0000 + vector * 0x100).to_le_bytes());
        self.write_bar(entry + 8, &(0x40 + vector as u32).to_le_bytes());
        self.write_bar(entry + 12, &u32::from(masked).to_le_bytes());
    }

    /// What a good driver does until its device runs, with a vector for each
    /// queue after the one for the configuration when `msix` is set.
    fn start(&self, msix: bool) {
        self.write_bar(0x14, &[1]);
        self.write_bar(0x14, &[3]);
        self.write_bar(0x08, &1_u32.to_le_bytes());
        self.write_bar(0x0c, &1_u32.to_le_bytes());
        self.write_bar(0x14, &[11]);
        assert_eq!(self.get8(0x14), 11);
        if msix {
            self.write_bar(0x10, &0_u16.to_le_bytes());
            assert_eq!(self.get16(0x10), 0);
        }
        for queue in 0..self.get16(0x12) {
            self.write_bar(0x16, &queue.to_le_bytes());
            assert_eq!(self.get16(0x1c), 0);
            let size = self.get16(0x18).min(64);
            self.write_bar(0x18, &size.to_le_bytes());
            if msix {
                self.write_bar(0x1a, &(queue + 1).to_le_bytes());
                assert_eq!(self.get16(0x1a), queue + 1);
            }
            let base = 0x4000 * (u64::from(queue) + 1);
            self.write_bar(0x20, &base.to_le_bytes());
            self.write_bar(0x28, &(base as u32 + 0x1000).to_le_bytes());
            self.write_bar(0x2c, &0_u32.to_le_bytes());
            self.write_bar(0x30, &(base + 0x2000).to_le_bytes());
            self.write_bar(0x1c, &1_u16.to_le_bytes());
            assert_eq!(self.get16(0x1c), 1);
        }
        self.write_bar(0x14, &[15]);
        assert!(self.device.is_active());
    }
}

#[test]
fn header_names_a_modern_block_device() {
    let rig = rig();
    assert_eq!(rig.config32(0), 0x1042_1af4);
    assert_eq!(rig.config32(8), 0x0100_0001);
    assert_eq!(rig.config32(0x2c), 0x0042_1af4);
    assert_eq!(rig.config::<2>(0x3c), [0xff, 1], "pin INTA#");
    assert_eq!(rig.config::<1>(0x0e), [0], "header type");
    assert_eq!(class(1), 0x02_00_00);
    assert_eq!(class(4), 0xff_00_00);
}

#[test]
fn structures_are_apart_and_inside_the_bar() {
    let rig = rig();
    rig.set_config(0x10, &[0xff; 4]);
    rig.set_config(0x14, &[0xff; 4]);
    assert_eq!(rig.config32(0x10), 0xfffc_000c);
    assert_eq!(rig.config32(0x14), u32::MAX);

    let kinds = [CFG_COMMON, CFG_NOTIFY, CFG_ISR, CFG_DEVICE];
    let mut found: Vec<_> = kinds.map(|kind| rig.structure(kind)).into();
    let notify = found[1];
    assert_eq!(rig.config::<1>(notify.capability + 2), [20]);
    assert_eq!(rig.config32(notify.capability + 16), NOTIFY_MULTIPLIER);
    assert!(found[0].length >= 0x38);
    found.sort_by_key(|f| f.offset);
    for pair in found.windows(2) {
        assert!(pair[0].offset + pair[0].length <= pair[1].offset);
    }
    assert!(found.iter().all(|f| f.bar == 0));
    assert!(found.iter().all(|f| f.offset + f.length <= BAR_SIZE));

    let [msix] = rig.capabilities(0x11)[..] else {
        panic!("no MSI-X");
    };
    assert_eq!(rig.config::<2>(msix + 2), [3, 0], "four vectors");
    assert_eq!(rig.config32(msix + 4), TABLE as u32);
    assert_eq!(rig.config32(msix + 8), PENDING as u32);
    // The doorbells share no 64 KiB page with anything else.
    assert_eq!(notify.offset % 0x1_0000, 0);
    for other in [COMMON, ISR, DEVICE, TABLE, PENDING] {
        assert_ne!(other / 0x1_0000, notify.offset / 0x1_0000);
    }
    // The table has room for the most vectors that there can be.
    assert!(u64::from(msix::MAX_VECTORS) * msix::ENTRY_SIZE <= PENDING - TABLE);
}

#[test]
fn a_driver_starts_it_with_msix() {
    let rig = rig();
    rig.enable();
    rig.enable_msix();
    for vector in 0..4 {
        rig.program_vector(vector, false);
    }
    assert_eq!(
        rig.vectors.route_of(2),
        Some(MsiMessage {
            address: 0xfee0_0200,
            data: 0x42,
            device_id: 3 << 3,
        })
    );
    rig.start(true);
    assert_eq!(
        *rig.device.queues.lock().unwrap(),
        [(0, 16, 0), (1, 16, 0), (2, 64, 0)]
    );
    let bases = [0x4000, 0x8000, 0xc000];
    assert_eq!(
        *rig.device.rings.lock().unwrap(),
        bases.map(|base| [base, base + 0x1000, base + 0x2000])
    );
    let link = rig.device.link();
    link.used(0).unwrap();
    link.used(2).unwrap();
    link.config_changed().unwrap();
    assert_eq!(rig.vectors.take_raised(), [1, 3, 0]);
    assert!(rig.line.take().is_empty(), "the wire is not used");
    assert_eq!(rig.get8(ISR), ISR_CONFIG_BIT, "no queue bit with MSI-X");
    assert_eq!(rig.get8(ISR), 0);
}

const ISR_CONFIG_BIT: u8 = 2;

#[test]
fn masked_vectors_are_pending_until_unmasked() {
    let rig = rig();
    rig.enable();
    rig.enable_msix();
    rig.program_vector(1, true);
    rig.start(true);
    let link = rig.device.link();
    link.used(0).unwrap();
    assert!(rig.vectors.take_raised().is_empty());
    assert_eq!(rig.get32(PENDING), 0b10);
    rig.program_vector(1, false);
    assert_eq!(rig.vectors.take_raised(), [1]);
    assert_eq!(rig.get32(PENDING), 0);
}

#[test]
fn vectors_that_are_not_there_become_none() {
    let rig = rig();
    rig.enable();
    rig.enable_msix();
    rig.program_vector(0, false);
    assert_eq!(rig.get16(0x10), 0xffff);
    assert_eq!(rig.get16(0x1a), 0xffff);
    rig.start(true);
    for vector in [4, 0xfffe, 0xffff_u16] {
        rig.write_bar(0x10, &vector.to_le_bytes());
        rig.write_bar(0x1a, &vector.to_le_bytes());
        assert_eq!(rig.get16(0x10), 0xffff);
        assert_eq!(rig.get16(0x1a), 0xffff);
    }
    // Queue 2 was the selected one.
    let link = rig.device.link();
    link.used(2).unwrap();
    link.config_changed().unwrap();
    assert!(rig.vectors.take_raised().is_empty());
    assert!(rig.line.take().is_empty());
    assert_eq!(rig.get32(PENDING), 0);
    // A reset unbinds them all.
    rig.write_bar(0x14, &[0]);
    rig.write_bar(0x16, &0_u16.to_le_bytes());
    assert_eq!(rig.get16(0x1a), 0xffff);
}

#[test]
fn without_msix_the_wire_is_level_and_read_clears() {
    let rig = rig_with(MockDevice::new(), 0);
    assert!(rig.capabilities(0x11).is_empty());
    rig.enable();
    rig.start(false);
    rig.write_bar(0x10, &0_u16.to_le_bytes());
    assert_eq!(rig.get16(0x10), 0xffff, "there are no vectors");
    let link = rig.device.link();
    assert_eq!(rig.config::<1>(6), [0x10]);
    link.used(1).unwrap();
    assert_eq!(rig.config::<1>(6), [0x18], "interrupt status");
    assert_eq!(rig.config32(4) >> 16, 0x18, "as part of a dword too");
    link.config_changed().unwrap();
    assert_eq!(rig.line.take(), [true, true]);
    assert_eq!(rig.get8(ISR), 3);
    assert_eq!(rig.line.take(), [false]);
    assert_eq!(rig.get8(ISR), 0);
    assert_eq!(rig.config::<1>(6), [0x10]);
    assert!(rig.line.take().is_empty());
    link.used(0).unwrap();
    rig.write_bar(0x14, &[0]);
    assert_eq!(rig.line.take(), [true, false], "a reset acknowledges");
    assert_eq!(rig.get8(ISR), 0);
}

#[test]
fn the_wire_obeys_interrupt_disable_and_msix() {
    let rig = rig();
    rig.enable();
    rig.start(false);
    let link = rig.device.link();
    link.used(0).unwrap();
    rig.set_config(5, &[0x04]);
    assert_eq!(rig.line.take(), [true, false]);
    link.used(0).unwrap();
    assert!(rig.line.take().is_empty());
    assert_eq!(rig.config::<1>(6), [0x18], "pending nevertheless");
    rig.set_config(5, &[0x00]);
    assert_eq!(rig.line.take(), [true]);
    rig.enable_msix();
    assert_eq!(rig.line.take(), [false]);
    link.used(0).unwrap();
    assert!(rig.line.take().is_empty());
    assert!(rig.vectors.take_raised().is_empty(), "no vector is bound");
}

#[test]
fn doorbells_follow_the_bar() {
    let rig = rig();
    let at =
        |base: u64| [0, 4, 8].map(|offset| (Doorbell::Mmio(base + NOTIFY + offset), None::<u32>));
    assert!(rig.bells.attached().is_empty());
    rig.enable();
    assert_eq!(rig.bells.attached(), at(PLACE));
    // Up by its own size, while decoding.
    rig.set_config(0x10, &0x4_0000_u32.to_le_bytes());
    assert_eq!(rig.bells.attached(), at(PLACE + 0x4_0000));
    // Into the window below 4 GiB, in two steps, the first leading nowhere.
    rig.set_config(0x14, &0_u32.to_le_bytes());
    assert!(rig.bells.attached().is_empty());
    rig.set_config(0x10, &0xc100_0000_u32.to_le_bytes());
    assert_eq!(rig.bells.attached(), at(0xc100_0000));
    let mut status = [0xff];
    rig.windows[0].1.read(0x100_0014, &mut status);
    assert_eq!(status, [0]);

    rig.set_config(4, &[0, 0]);
    assert!(rig.bells.attached().is_empty());
    rig.enable();
    assert_eq!(rig.bells.attached(), at(0xc100_0000));
    rig.root.reset();
    assert!(rig.bells.attached().is_empty());
    rig.enable();
    assert_eq!(rig.bells.attached(), at(PLACE));
    let bells = Arc::clone(&rig.bells);
    drop(rig);
    assert!(bells.attached().is_empty());
}

#[test]
fn without_doorbells_the_vcpu_rings() {
    let rig = rig();
    rig.bells.none.store(true, Ordering::SeqCst);
    rig.enable();
    rig.start(false);
    rig.write_bar(0x16, &1_u16.to_le_bytes());
    let at = NOTIFY + u64::from(rig.get16(0x1e)) * u64::from(NOTIFY_MULTIPLIER);
    rig.write_bar(at, &1_u16.to_le_bytes());
    let events = rig.function.transport().queue_events();
    assert_eq!(events[1].read().unwrap(), 1);
    rig.write_bar(NOTIFY + 12, &3_u16.to_le_bytes());
    rig.write_bar(NOTIFY + NOTIFY_SIZE - 2, &1_u16.to_le_bytes());
    for event in events {
        assert!(event.read().is_err());
    }
}

#[test]
fn common_fields_have_their_widths() {
    let rig = rig();
    rig.enable();
    assert_eq!(rig.get32(0x04), 0x3000_0021);
    rig.write_bar(0, &1_u32.to_le_bytes());
    assert_eq!(rig.get32(0), 1);
    assert_eq!(rig.get32(0x04), 1);
    rig.write_bar(0x0c, &5_u32.to_le_bytes());
    assert_eq!(rig.get32(0x0c), 5);
    assert_eq!(rig.get16(0x12), 3);
    rig.write_bar(0x16, &2_u16.to_le_bytes());
    assert_eq!((rig.get16(0x16), rig.get16(0x18)), (2, 256));
    assert_eq!(rig.get16(0x1e), 2);
    rig.write_bar(0x20, &0x1_2345_6780_u64.to_le_bytes());
    assert_eq!((rig.get32(0x20), rig.get32(0x24)), (0x2345_6780, 1));
    let mut wide = [0; 8];
    rig.read_bar(0x20, &mut wide);
    assert_eq!(u64::from_le_bytes(wide), 0x1_2345_6780);
    // Not a field: an unaligned, a too wide and a too narrow access.
    rig.read_bar(0x24, &mut wide);
    assert_eq!(wide, [0; 8]);
    assert_eq!(rig.get32(0x12), 0);
    assert_eq!(rig.get8(0x18), 0);
    rig.write_bar(0x18, &[4]);
    rig.write_bar(0x17, &[4, 4]);
    assert_eq!(rig.get16(0x18), 256);
    rig.write_bar(0x16, &3_u16.to_le_bytes());
    assert_eq!(rig.get16(0x18), 0, "there is no queue 3");
    assert_eq!(rig.get32(0x38), 0, "no notification data, no queue reset");
    // Writing 0 does not disable a queue.
    rig.write_bar(0x16, &0_u16.to_le_bytes());
    rig.write_bar(0x1c, &1_u16.to_le_bytes());
    rig.write_bar(0x1c, &0_u16.to_le_bytes());
    assert_eq!(rig.get16(0x1c), 1);
}

#[test]
fn device_configuration_and_generation() {
    let rig = rig();
    rig.enable();
    let before = rig.get8(0x15);
    rig.write_bar(DEVICE + 3, &[7]);
    assert_eq!(rig.get32(DEVICE), 0x0700_0000);
    assert_ne!(rig.get8(0x15), before);
    assert_eq!(rig.get8(0x15), rig.get8(0x15));
    assert_eq!(rig.get32(DEVICE + DEVICE_SIZE - 4), 0);
}

#[test]
fn configuration_space_reaches_into_the_bar() {
    // No BAR is enabled: this is what the capability is for.
    let rig = rig();
    let access = rig.structure(CFG_PCI).capability;
    let aim = |bar: u8, offset: u32, length: u32| {
        rig.set_config(access + 4, &[bar]);
        rig.set_config(access + 8, &offset.to_le_bytes());
        rig.set_config(access + 12, &length.to_le_bytes());
    };
    assert_eq!(rig.config32(access + 16), 0);
    aim(0, 0x04, 4);
    assert_eq!(rig.config32(access + 16), 0x3000_0021);
    aim(0, 0x12, 2);
    assert_eq!(rig.config::<2>(access + 16), [3, 0]);
    assert_eq!(rig.config::<4>(access + 16), [3, 0, 0, 0]);
    aim(0, 0x14, 1);
    rig.set_config(access + 16, &[3]);
    assert_eq!(rig.config::<1>(access + 16), [3]);
    rig.set_config(access + 16, &[0, 0, 0, 0]);
    assert_eq!(
        rig.config::<1>(access + 16),
        [0],
        "only the first byte counts"
    );
    rig.set_config(access + 16, &[3]);
    for (bar, offset, length) in [
        (1, 0x14, 1),
        (0, 0x14, 0),
        (0, 0x14, 3),
        (0, 0x15, 4),
        (0, 0xffff_fffc, 4),
        (0, 0x14, u32::MAX),
    ] {
        aim(bar, offset, length);
        rig.set_config(access + 16, &[0, 0, 0, 0]);
        let _ = rig.config32(access + 16);
        assert_eq!(rig.function.transport().status(), 3);
    }
}

#[test]
fn garbage_needs_reset_and_says_so() {
    let rig = rig();
    rig.enable();
    rig.write_bar(0x08, &1_u32.to_le_bytes());
    rig.write_bar(0x0c, &1_u32.to_le_bytes());
    rig.write_bar(0x14, &[11]);
    rig.write_bar(0x20, &(MEM_SIZE as u64).to_le_bytes());
    rig.write_bar(0x1c, &1_u16.to_le_bytes());
    rig.write_bar(0x14, &[15]);
    assert_eq!(rig.get8(0x14), 0x4f);
    assert_eq!(rig.line.take(), [true]);
    assert_eq!(rig.get8(ISR), 2);
    rig.write_bar(0x14, &[0]);
    rig.start(false);
}

#[test]
fn the_machines_reset_undoes_everything() {
    let rig = rig();
    let pristine: Vec<u32> = (0..64).map(|i| rig.config32(i * 4)).collect();
    for _ in 0..3 {
        rig.enable();
        rig.enable_msix();
        rig.program_vector(0, false);
        rig.start(true);
        rig.set_config(0x3c, &[9]);
        rig.root.reset();
        assert!(!rig.device.is_active());
        assert_eq!(rig.vectors.route_of(0), None);
        let after: Vec<u32> = (0..64).map(|i| rig.config32(i * 4)).collect();
        assert_eq!(after, pristine);
    }
}

#[test]
fn resets_and_moves_while_it_works() {
    let rig = rig_with(MockDevice::busy(), 4);
    rig.enable();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..500_u32 {
                rig.enable_msix();
                rig.program_vector(1, round % 2 == 0);
                rig.get8(ISR);
                rig.write_bar(NOTIFY, &[0, 0]);
                let [at] = rig.capabilities(0x11)[..] else {
                    panic!("no MSI-X");
                };
                rig.set_config(at + 2, &[0, 0]);
                rig.set_config(5, &[if round % 3 == 2 { 4 } else { 0 }]);
            }
        });
        for _ in 0..50 {
            rig.start(true);
            std::thread::yield_now();
            rig.write_bar(0x14, &[0]);
            assert!(!rig.device.is_active());
        }
    });
    rig.get8(ISR);
    assert_ne!(rig.line.take().last(), Some(&true));
    assert_eq!(rig.device.activations(), 50);
}

#[test]
fn random_accesses_do_no_harm() {
    let rig = rig();
    let mut random = Random(0x0bad_cafe);
    for _ in 0..60_000 {
        let len = [1, 2, 4, 4, 4, 8][random.below(6) as usize];
        let value = match random.below(3) {
            0 => random.next(),
            1 => random.below(16),
            _ => random.below(0x100) << 12,
        };
        let bytes = &value.to_le_bytes()[..len];
        let place = [
            COMMON,
            COMMON,
            ISR,
            DEVICE,
            NOTIFY,
            TABLE,
            PENDING,
            BAR_SIZE - 8,
        ][random.below(8) as usize];
        let offset = place + random.below(0x48);
        match random.below(8) {
            0 | 1 => rig
                .root
                .config_write(rig.bdf, random.below(0x1000) as u16, bytes),
            2 => {
                let register = random.below(0x1000) as u16;
                rig.root.config_read(rig.bdf, register, &mut [0; 8][..len]);
            }
            3 => rig.read_bar(offset, &mut [0; 8][..len]),
            // Straight into the function too, whatever is decoded.
            4 => rig.function.bar_write(random.below(8) as u8, offset, bytes),
            5 => rig.function.bar_read(0, random.next(), &mut [0; 8][..len]),
            _ => rig.write_bar(offset, bytes),
        }
        if rig.device.is_active() {
            let link = rig.device.link();
            link.used(random.below(3) as u16).unwrap();
            link.config_changed().unwrap();
        }
        if random.below(1000) == 0 {
            rig.root.reset();
            rig.enable();
            rig.enable_msix();
            rig.start(true);
        }
    }
    assert!(rig.device.activations() > 30);
}
