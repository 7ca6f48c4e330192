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
    let mem = guest_mem();
    let interrupts = Arc::new(Interrupts::default());
    let css = ChannelSubsystem::new(interrupts.clone(), mem.clone());
    let (device, state) = MockDevice::new();
    let bells = Arc::new(Bells::default());
    let subchannel = css.add(0).unwrap();
    VirtioCcw::connect(device, mem.clone(), &subchannel, vectors, bells.clone()).unwrap();
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
fn nothing_works_before_a_revision_is_chosen() {
    let s = setup(None);
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
