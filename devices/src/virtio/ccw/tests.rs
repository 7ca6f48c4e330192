use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddressSpace};

use super::command::*;
use super::*;
use crate::css::schib::{half, status};
use crate::css::{ChannelInterrupts, ChannelSubsystem};
use crate::virtio::doubles::{Bells, DeviceState, MOCK_TYPE, MockDevice, guest_mem};
use vm_memory::GuestAddress;

#[derive(Default)]
struct Interrupts {
    subchannel: Mutex<u32>,
    adapter: Mutex<Vec<u8>>,
}

impl ChannelInterrupts for Interrupts {
    fn subchannel(&self, _: u32, _: u32, _: u8) -> io::Result<()> {
        *self.subchannel.lock().unwrap() += 1;
        Ok(())
    }

    fn withdraw(&self, _: u32) {}

    fn adapter(&self, subclass: u8) -> io::Result<()> {
        self.adapter.lock().unwrap().push(subclass);
        Ok(())
    }

    fn channel_report(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Adapter vectors that remember.
#[derive(Default)]
struct Vectors {
    routes: Mutex<Vec<Option<AdapterIndicator>>>,
    raised: Mutex<Vec<u16>>,
    refuse: AtomicBool,
}

impl AdapterVectors for Vectors {
    fn route(&self, vector: u16, indicator: Option<AdapterIndicator>) -> io::Result<()> {
        if self.refuse.load(Ordering::Relaxed) && indicator.is_some() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut routes = self.routes.lock().unwrap();
        let route = routes.get_mut(usize::from(vector));
        *route.ok_or(io::ErrorKind::InvalidInput)? = indicator;
        Ok(())
    }

    fn raise(&self, vector: u16) -> io::Result<()> {
        self.raised.lock().unwrap().push(vector);
        Ok(())
    }
}

struct Setup {
    css: Arc<ChannelSubsystem>,
    state: Arc<DeviceState>,
    bells: Arc<Bells>,
    interrupts: Arc<Interrupts>,
    mem: GuestMem,
}

const ID: u64 = 0x0001_0000;
const PROGRAM: u64 = 0x1000;
const DATA: u64 = 0x2000;

fn setup(vectors: Option<Arc<dyn AdapterVectors>>) -> Setup {
    setup_of(vectors, true, NEWEST)
}

/// A device that has a legacy interface or not, and its newest revision.
fn setup_of(vectors: Option<Arc<dyn AdapterVectors>>, legacy: bool, newest: u16) -> Setup {
    let mem = guest_mem();
    let interrupts = Arc::new(Interrupts::default());
    let css = ChannelSubsystem::new(interrupts.clone(), mem.clone());
    let (device, state) = MockDevice::new();
    state.modern_only.store(!legacy, Ordering::SeqCst);
    let bells = Arc::new(Bells::default());
    let subchannel = css.add(0).unwrap();
    let doorbells = bells.clone();
    VirtioCcw::connect(device, mem.clone(), &subchannel, vectors, doorbells, newest).unwrap();
    let setup = Setup {
        css,
        state,
        bells,
        interrupts,
        mem,
    };
    setup.enable(true);
    setup
}

impl Setup {
    fn enable(&self, enabled: bool) {
        let mut schib = self.css.store(ID).unwrap().unwrap();
        schib[5] = if enabled { 0x81 } else { 0x01 };
        assert_eq!(self.css.modify(ID, &schib), Ok(0));
    }

    /// Runs one command with `data` as its payload, and returns device status,
    /// subchannel status and what the payload's place holds then.
    fn run(&self, command: u8, data: &[u8]) -> (u8, u8, Vec<u8>) {
        let mem = self.mem.memory();
        mem.write_slice(data, GuestAddress(DATA)).unwrap();
        let mut ccw = vec![command, 0];
        ccw.extend((data.len() as u16).to_be_bytes());
        ccw.extend((DATA as u32).to_be_bytes());
        mem.write_slice(&ccw, GuestAddress(PROGRAM)).unwrap();
        let mut orb = [0; 32];
        orb[5] = 0x80;
        orb[6] = 0xff;
        orb[8..12].copy_from_slice(&(PROGRAM as u32).to_be_bytes());
        assert_eq!(self.css.start(ID, &orb), Ok(0));
        let (code, irb) = self.css.test(ID).unwrap();
        assert_eq!(code, 0);
        let irb = irb.unwrap();
        self.css.accept_status(ID, &irb);
        let irb = irb.bytes();
        let mut after = vec![0; data.len()];
        mem.read_slice(&mut after, GuestAddress(DATA)).unwrap();
        (irb[8], irb[9], after)
    }

    fn done(&self, command: u8, data: &[u8]) -> Vec<u8> {
        let (device, subchannel, data) = self.run(command, data);
        assert_eq!((device, subchannel), (0x0c, 0), "command {command:#x}");
        data
    }

    fn rejected(&self, command: u8, data: &[u8]) {
        let (device, _, _) = self.run(command, data);
        assert_eq!(device, 0x0c | status::UNIT_CHECK, "command {command:#x}");
    }

    fn revision(&self, number: u8) {
        self.done(SET_VIRTIO_REV, &[0, number, 0, 0]);
    }

    /// Negotiates VERSION_1 alone and sets queue 0 up.
    fn negotiate(&self) {
        self.revision(2);
        self.done(WRITE_STATUS, &[1]);
        self.done(WRITE_STATUS, &[3]);
        self.done(WRITE_FEAT, &[1, 0, 0, 0, 1]);
        self.done(WRITE_STATUS, &[11]);
        self.done(SET_VQ, &queue(0, 16, 0x4000));
    }

    fn byte(&self, address: u64) -> u8 {
        self.mem.memory().read_obj(GuestAddress(address)).unwrap()
    }
}

fn queue(index: u16, size: u16, address: u64) -> Vec<u8> {
    let mut block = address.to_be_bytes().to_vec();
    block.extend([0; 4]);
    block.extend(index.to_be_bytes());
    block.extend(size.to_be_bytes());
    block.extend((address + 0x1000).to_be_bytes());
    block.extend((address + 0x2000).to_be_bytes());
    block
}

#[test]
fn without_a_legacy_interface_nothing_works_before_a_revision_is_chosen() {
    // No user's wish makes it have one.
    let s = setup_of(None, false, LEGACY);
    s.rejected(READ_FEAT, &[0; 5]);
    s.rejected(SET_VQ, &queue(0, 16, 0x4000));
    // The legacy interface, one that does not exist yet, and one with data.
    s.rejected(SET_VIRTIO_REV, &[0, 0, 0, 0]);
    s.rejected(SET_VIRTIO_REV, &[0, 3, 0, 0]);
    s.rejected(SET_VIRTIO_REV, &[0, 1, 0, 4]);
    assert_eq!(s.run(SET_VIRTIO_REV, &[0, 1]).1, status::PROGRAM_CHECK);
    s.revision(1);
    s.rejected(SET_VIRTIO_REV, &[0, 2, 0, 0]);
    s.rejected(READ_STATUS, &[0]);
    s.done(READ_FEAT, &[0; 5]);
    // Disabling the subchannel forgets it.
    s.enable(false);
    s.enable(true);
    s.rejected(READ_FEAT, &[0; 5]);
    s.revision(2);
    assert_eq!(s.done(READ_STATUS, &[9]), [0]);
    s.rejected(0x99, &[]);
}

#[test]
fn the_type_is_the_model_of_the_control_unit() {
    let s = setup(None);
    let id = s.done(0xe4, &[0xff; 7]);
    assert_eq!(id, [0xff, 0x38, 0x32, MOCK_TYPE as u8, 0, 0, 0]);
}

#[test]
fn features_are_little_endian_words() {
    let s = setup(None);
    s.revision(1);
    let [a, b, c, d, ..] = s.done(READ_FEAT, &[0; 5])[..] else {
        panic!();
    };
    assert_eq!(u32::from_le_bytes([a, b, c, d]) & 0x21, 0x21);
    // VERSION_1 is bit 32.
    assert_eq!(s.done(READ_FEAT, &[0, 0, 0, 0, 1])[0] & 1, 1);
    assert_eq!(s.done(READ_FEAT, &[9, 9, 9, 9, 2])[..4], [0; 4]);
}

#[test]
fn features_without_version_1_are_refused_by_command_reject() {
    let s = setup(None);
    s.revision(2);
    s.done(WRITE_STATUS, &[3]);
    s.done(WRITE_FEAT, &[0x20, 0, 0, 0, 0]);
    s.rejected(WRITE_STATUS, &[11]);
    assert_eq!(s.done(READ_STATUS, &[0]), [3]);
}

#[test]
fn a_queue_is_set_up_and_the_device_starts() {
    let s = setup(None);
    s.revision(2);
    let largest = s.done(READ_VQ_CONF, &[0, 0, 0, 0]);
    assert_ne!(half(&largest, 2), 0);
    s.rejected(READ_VQ_CONF, &[0, 99, 0, 0]);
    s.rejected(SET_VQ, &queue(99, 16, 0x4000));
    assert_eq!(s.run(SET_VQ, &[0; 31]).1, status::PROGRAM_CHECK);
    s.done(VDEV_RESET, &[]);
    s.done(WRITE_STATUS, &[3]);
    s.done(WRITE_FEAT, &[1, 0, 0, 0, 1]);
    s.done(WRITE_STATUS, &[11]);
    s.done(SET_VQ, &queue(0, 16, 0x4000));
    s.done(WRITE_STATUS, &[15]);
    assert!(s.state.is_active());
    assert_eq!(*s.state.rings.lock().unwrap(), [[0x4000, 0x5000, 0x6000]]);
    s.done(VDEV_RESET, &[]);
    assert!(!s.state.is_active());
    // The revision outlives that.
    assert_eq!(s.done(READ_STATUS, &[9]), [0]);
}

/// Linux disables the subchannels when it powers off, and prints to a console
/// after that; it then waits for the device, with interruptions disabled.
#[test]
fn a_device_works_on_when_its_subchannel_is_disabled() {
    let s = setup(None);
    s.negotiate();
    s.done(WRITE_STATUS, &[15]);
    s.enable(false);
    assert!(s.state.is_active());
    s.css.reset();
    assert!(!s.state.is_active());
}

#[test]
fn the_configuration_space_is_copied() {
    let s = setup(None);
    s.revision(1);
    s.state.config.lock().unwrap()[..3].copy_from_slice(&[1, 2, 3]);
    assert_eq!(s.done(READ_CONF, &[0; 4]), [1, 2, 3, 0]);
    assert_eq!(s.done(READ_CONF, &[9; 40])[3..], [0; 37]);
    s.done(WRITE_CONF, &[7, 8]);
    assert_eq!(s.state.config.lock().unwrap()[..3], [7, 8, 3]);
}

#[test]
fn classic_indicators_count_from_the_right() {
    let s = setup(None);
    s.negotiate();
    s.done(SET_IND, &0x8000_u64.to_be_bytes());
    s.done(SET_CONF_IND, &0x8008_u64.to_be_bytes());
    s.done(WRITE_STATUS, &[15]);
    let link = s.state.link();
    let before = *s.interrupts.subchannel.lock().unwrap();
    link.used(1).unwrap();
    link.used(9).unwrap();
    assert_eq!((s.byte(0x8007), s.byte(0x8006)), (2, 2));
    // One status is pending, and so one interrupt.
    assert_eq!(*s.interrupts.subchannel.lock().unwrap(), before + 1);
    let (_, irb) = s.css.test(ID).unwrap();
    let irb = irb.unwrap();
    let control = half(&irb.bytes(), 2);
    assert_eq!(control, status::ALERT | status::PENDING);
    s.css.accept_status(ID, &irb);
    link.config_changed().unwrap();
    assert_eq!(s.byte(0x800f), 1);
    assert_eq!(*s.interrupts.subchannel.lock().unwrap(), before + 2);
}

fn adapter(summary: u64, address: u64, bit: u64, subclass: u8) -> Vec<u8> {
    let words = [summary, address, bit].map(u64::to_be_bytes);
    [&words.concat()[..], &[subclass]].concat()
}

#[test]
fn adapter_indicators_count_from_the_left() {
    let s = setup(None);
    s.negotiate();
    s.rejected(SET_IND_ADAPTER, &adapter(0x8000, 0x8100, 9, 8));
    s.done(SET_IND_ADAPTER, &adapter(0x8000, 0x8100, 9, 3));
    s.done(WRITE_STATUS, &[15]);
    let link = s.state.link();
    link.used(0).unwrap();
    link.used(7).unwrap();
    assert_eq!((s.byte(0x8101), s.byte(0x8102)), (0x40, 0x80));
    assert_eq!(s.byte(0x8000), 1);
    // The summary was set when the second came.
    assert_eq!(*s.interrupts.adapter.lock().unwrap(), [3]);
    // Bits beyond memory are an error of the delivery, nothing more.
    s.done(SET_IND_ADAPTER, &adapter(0x8000, 1 << 40, 9, 3));
    assert!(link.used(0).is_err());
    // Given up.
    s.done(SET_IND_ADAPTER, &adapter(0, 0, 0, 0));
    link.used(0).unwrap();
}

#[test]
fn adapter_vectors_take_over_where_there_are_some() {
    let vectors = Arc::new(Vectors::default());
    vectors.routes.lock().unwrap().resize(16, None);
    let s = setup(Some(vectors.clone()));
    s.negotiate();
    s.done(SET_IND_ADAPTER, &adapter(0x8000, 0x8100, 9, 3));
    let first = vectors.routes.lock().unwrap()[1].unwrap();
    assert_eq!((first.bit, first.address, first.subclass), (10, 0x8100, 3));
    s.done(WRITE_STATUS, &[15]);
    s.state.link().used(1).unwrap();
    assert_eq!(*vectors.raised.lock().unwrap(), [1]);
    assert_eq!(s.byte(0x8000), 0, "the vector sets the bits");
    s.done(VDEV_RESET, &[]);
    assert!(vectors.routes.lock().unwrap().iter().all(Option::is_none));
    // Where routes cannot be had, the thread sets the bits.
    vectors.refuse.store(true, Ordering::Relaxed);
    s.done(SET_IND_ADAPTER, &adapter(0x8000, 0x8100, 9, 3));
    s.state.link().used(0).unwrap();
    assert_eq!(s.byte(0x8000), 1);
}

#[test]
fn doorbells_are_by_subchannel_and_queue() {
    let s = setup(None);
    let attached = s.bells.attached();
    let bell = Doorbell::Ccw(0x0001_0000);
    assert!(attached.contains(&(bell, Some(0))) && attached.len() > 1);
    assert!(s.css.notify(ID, 0));
    let bells = s.bells.clone();
    drop(s);
    assert!(bells.attached().is_empty());
}

fn legacy_queue(address: u64, alignment: u32, index: u16, size: u16) -> Vec<u8> {
    let mut block = address.to_be_bytes().to_vec();
    block.extend(alignment.to_be_bytes());
    block.extend(index.to_be_bytes());
    block.extend(size.to_be_bytes());
    block
}

impl Setup {
    fn activations(&self) -> u32 {
        self.state.activations()
    }

    /// Whether all doorbells are attached, of which there are three.
    fn has_bells(&self) -> bool {
        match self.bells.attached().len() {
            0 => false,
            count => {
                assert_eq!(count, 3);
                true
            }
        }
    }
}

#[test]
fn a_driver_that_chooses_no_revision_is_a_legacy_one() {
    for first in command::BEFORE_REVISIONS {
        let s = setup(None);
        s.rejected(0x99, &[]);
        let _ = s.run(first, &[0; 32]);
        s.rejected(SET_VIRTIO_REV, &[0, 2, 0, 0]);
        s.rejected(SET_VIRTIO_REV, &[0, 0, 0, 0]);
        s.rejected(READ_STATUS, &[0]);
        assert_eq!(s.done(READ_FEAT, &[9, 9, 9, 9, 1])[..4], [0; 4]);
        // Not for longer than the subchannel is enabled.
        s.enable(false);
        s.enable(true);
        s.revision(2);
        assert_eq!(s.done(READ_FEAT, &[0, 0, 0, 0, 1])[0] & 1, 1);
    }
}

#[test]
fn the_newest_revision_can_be_the_legacy_interface() {
    let s = setup_of(None, true, LEGACY);
    s.rejected(SET_VIRTIO_REV, &[0, 2, 0, 0]);
    s.rejected(SET_VIRTIO_REV, &[0, 1, 0, 0]);
    s.revision(0);
    s.rejected(SET_VIRTIO_REV, &[0, 0, 0, 0]);
    s.done(READ_FEAT, &[0; 5]);
    let s = setup_of(None, true, 1);
    s.rejected(SET_VIRTIO_REV, &[0, 2, 0, 0]);
    s.revision(1);
}

#[test]
fn legacy_features_are_one_word() {
    let s = setup(None);
    s.revision(0);
    let [a, b, c, d, ..] = s.done(READ_FEAT, &[0; 5])[..] else {
        panic!();
    };
    // The device's, layouts of any kind, indirect descriptors, event index.
    let offered = 0x21 | 1 << 27 | 1 << 28 | 1 << 29;
    assert_eq!(u32::from_le_bytes([a, b, c, d]), offered);
    for index in [1, 2, 255] {
        assert_eq!(s.done(READ_FEAT, &[9, 9, 9, 9, index])[..4], [0; 4]);
    }
    s.done(WRITE_STATUS, &[3]);
    // What is not offered is dropped: there is no way to refuse it.
    s.done(WRITE_FEAT, &[0xff, 0xff, 0, 0x20, 0]);
    s.done(WRITE_FEAT, &[1, 0, 0, 0, 1]);
    s.done(WRITE_FEAT, &[1, 0, 0, 0, 2]);
    s.done(SET_VQ, &legacy_queue(0x4000, 4096, 0, 16));
    // FEATURES_OK is not a bit of the legacy interface.
    s.done(WRITE_STATUS, &[3 | 8]);
    assert!(!s.state.is_active());
    s.done(WRITE_STATUS, &[7]);
    assert!(s.state.is_active());
    assert_eq!(*s.state.features.lock().unwrap(), 0x2000_0021);
    assert!(s.state.event_idx.load(Ordering::SeqCst));
    let interface = *s.state.interface.lock().unwrap();
    assert_eq!(interface, Interface::Legacy(ByteOrder::Big));
    // They are settled now.
    s.done(WRITE_FEAT, &[0; 5]);
    s.done(VDEV_RESET, &[]);
    s.done(SET_VQ, &legacy_queue(0x4000, 4096, 0, 16));
    s.done(WRITE_STATUS, &[7]);
    assert_eq!(*s.state.features.lock().unwrap(), 0);
}

#[test]
fn legacy_rings_lie_behind_each_other() {
    let s = setup(None);
    s.revision(0);
    for (bad, why) in [
        (legacy_queue(0x4000, 4096, 3, 16), "no such queue"),
        (legacy_queue(0x4000, 4096, 0, 8), "smaller"),
        (legacy_queue(0x4000, 4096, 0, 32), "larger"),
        (legacy_queue(0x4000, 0, 0, 16), "no alignment"),
        (legacy_queue(0x4000, 4095, 0, 16), "no power of two"),
        (
            legacy_queue(u64::MAX - 255, 4096, 0, 16),
            "beyond addresses",
        ),
        (
            legacy_queue(u64::MAX - 8191, 1 << 31, 0, 16),
            "beyond, aligned",
        ),
    ] {
        let (device, _, _) = s.run(SET_VQ, &bad);
        assert_eq!(device, 0x0c | status::UNIT_CHECK, "{why}");
    }
    assert_eq!(s.run(SET_VQ, &[0; 15]).1, status::PROGRAM_CHECK);
    s.done(WRITE_STATUS, &[3]);
    // 16 descriptors are 256 bytes, and their available ring is 38; 256 are a
    // page, and theirs is 518.
    s.done(SET_VQ, &legacy_queue(0x4000, 64, 0, 16));
    s.done(SET_VQ, &legacy_queue(0x6000, 4096, 1, 16));
    s.done(SET_VQ, &legacy_queue(0x8000, 4096, 2, 256));
    // Given up again.
    s.done(SET_VQ, &legacy_queue(0, 0, 1, 0));
    s.done(WRITE_STATUS, &[7]);
    assert_eq!(
        *s.state.rings.lock().unwrap(),
        [[0x4000, 0x4100, 0x4140], [0x8000, 0x9000, 0xa000]]
    );
}

/// Section 3.1.2: legacy drivers use queues before they set DRIVER_OK. So did
/// Linux before 3.18.
#[test]
fn a_legacy_driver_uses_queues_before_driver_ok() {
    let s = setup(None);
    assert!(s.has_bells());
    s.done(VDEV_RESET, &[]);
    // Notifications come here from now on.
    assert!(!s.has_bells());
    s.done(SET_VQ, &legacy_queue(0x4000, 4096, 0, 16));
    assert!(s.css.notify(ID, 0));
    assert!(!s.state.is_active(), "nobody knows the device");
    s.done(WRITE_STATUS, &[1]);
    s.done(WRITE_STATUS, &[3]);
    s.done(WRITE_FEAT, &[1, 0, 0, 0, 0]);
    assert!(!s.state.is_active() && !s.has_bells());
    assert!(s.css.notify(ID, 0));
    assert!(s.state.is_active() && s.has_bells());
    assert_eq!(*s.state.features.lock().unwrap(), 1);
    assert!(s.css.notify(ID, 0));
    assert_eq!(s.activations(), 1);
    // A queue that comes later joins those that are at work.
    s.done(SET_VQ, &legacy_queue(0x8000, 4096, 2, 256));
    assert_eq!(s.activations(), 2);
    let queues = s.state.queues.lock().unwrap().clone();
    assert_eq!(queues, [(0, 16, 1), (2, 256, 0)]);
    s.done(WRITE_STATUS, &[7]);
    assert_eq!(s.activations(), 2);
    s.done(SET_VQ, &legacy_queue(0, 0, 2, 0));
    assert_eq!(s.state.queues.lock().unwrap().len(), 1);
    s.done(VDEV_RESET, &[]);
    assert!(!s.state.is_active() && !s.has_bells());
    s.css.reset();
    assert!(s.has_bells());
}

#[test]
fn a_device_that_lacks_a_queue_waits_for_it() {
    let s = setup(None);
    s.state.needs_all.store(true, Ordering::SeqCst);
    s.revision(0);
    s.done(WRITE_STATUS, &[3]);
    for (index, size) in [(0, 16), (1, 16), (2, 256)] {
        assert!(s.css.notify(ID, 0));
        assert!(!s.state.is_active());
        let address = 0x4000 * u64::from(index + 1);
        s.done(SET_VQ, &legacy_queue(address, 4096, index, size));
    }
    assert!(s.css.notify(ID, 1));
    assert!(s.state.is_active());
    // One that is given up again stops the device, whose other queues would
    // start anew, until it is reset.
    s.done(SET_VQ, &legacy_queue(0, 0, 1, 0));
    s.done(SET_VQ, &legacy_queue(0x8000, 4096, 1, 16));
    assert!(s.css.notify(ID, 0));
    assert!(!s.state.is_active());
    // One that is broken does not start, until it is reset.
    s.done(VDEV_RESET, &[]);
    s.done(WRITE_STATUS, &[3]);
    s.done(SET_VQ, &legacy_queue(1 << 40, 4096, 0, 16));
    assert!(s.css.notify(ID, 0));
    s.done(SET_VQ, &legacy_queue(0x4000, 4096, 0, 16));
    s.done(SET_VQ, &legacy_queue(0x8000, 4096, 1, 16));
    s.done(SET_VQ, &legacy_queue(0xc000, 4096, 2, 256));
    assert!(s.css.notify(ID, 0));
    s.done(WRITE_STATUS, &[7]);
    assert!(!s.state.is_active());
    s.done(WRITE_STATUS, &[0x83]);
}

/// A kernel that starts another one leaves it the device as it is.
#[test]
fn another_interface_starts_from_a_reset() {
    let s = setup(None);
    s.revision(0);
    s.done(SET_VQ, &legacy_queue(0x4000, 4096, 0, 16));
    s.done(SET_CONF_IND, &0x8008_u64.to_be_bytes());
    s.done(WRITE_STATUS, &[7]);
    assert!(s.state.is_active() && s.has_bells());
    s.state.link().config_changed().unwrap();
    assert_eq!(s.byte(0x800f), 1);
    let (_, irb) = s.css.test(ID).unwrap();
    s.css.accept_status(ID, &irb.unwrap());
    s.enable(false);
    s.enable(true);
    assert!(s.state.is_active());
    s.revision(2);
    // The indicators were the other driver's.
    s.mem
        .memory()
        .write_obj(0_u8, GuestAddress(0x800f))
        .unwrap();
    s.state.link().config_changed().unwrap();
    assert_eq!(s.byte(0x800f), 0);
    assert!(!s.state.is_active() && s.has_bells());
    assert_eq!(s.done(READ_STATUS, &[9]), [0]);
    s.enable(false);
    s.enable(true);
    s.negotiate();
    s.done(WRITE_STATUS, &[15]);
    assert!(s.state.is_active());
    let interface = *s.state.interface.lock().unwrap();
    assert_eq!(interface, Interface::Modern);
}
