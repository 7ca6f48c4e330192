//! Doubles for the transports' tests: a device, and what a transport drives.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, DriverLink, Interface, VirtioDevice};
use crate::GuestMem;
use crate::irq::{IrqLine, MsiMessage, MsiVectors};
use crate::notify::{Doorbell, Doorbells};

/// Size of the doubles' guest memory, from address 0.
pub(crate) const MEM_SIZE: usize = 0x10_0000;

pub(crate) fn guest_mem() -> GuestMem {
    GuestMem::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEM_SIZE)]).unwrap())
}

/// A pseudo-random sequence (xorshift64), the same for the same seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// What a [`MockDevice`] shows to its test.
#[derive(Default)]
pub(crate) struct DeviceState {
    pub(crate) config: Mutex<[u8; 16]>,
    pub(crate) active: AtomicBool,
    pub(crate) activations: AtomicU32,
    pub(crate) features: Mutex<u64>,
    pub(crate) interface: Mutex<Interface>,
    /// Index, size and position of each queue at the last activation.
    pub(crate) queues: Mutex<Vec<(u16, u16, u16)>>,
    /// The addresses of its descriptor table, available and used ring.
    pub(crate) rings: Mutex<Vec<[u64; 3]>>,
    /// Whether all of them have the event index in use.
    pub(crate) event_idx: AtomicBool,
    pub(crate) link: Mutex<Option<Arc<DriverLink>>>,
    /// Demand that all queues be enabled.
    pub(crate) needs_all: AtomicBool,
    /// Have no legacy interface.
    pub(crate) modern_only: AtomicBool,
}

impl DeviceState {
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
    }

    pub(crate) fn activations(&self) -> u32 {
        self.activations.load(Ordering::SeqCst)
    }

    pub(crate) fn link(&self) -> Arc<DriverLink> {
        self.link.lock().unwrap().clone().unwrap()
    }
}

/// A device with three queues of 16, 16 and 256 descriptors and feature bits 0
/// and 5, which does nothing with its queues. With `busy` set, a thread of its
/// own raises interrupts for as long as the device is active.
pub(crate) struct MockDevice {
    state: Arc<DeviceState>,
    busy: bool,
    queues: Vec<ActiveQueue>,
    worker: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

pub(crate) const MOCK_FEATURES: u64 = 0x21;
pub(crate) const MOCK_TYPE: u32 = 2;

impl MockDevice {
    pub(crate) fn new() -> (Box<Self>, Arc<DeviceState>) {
        Self::with(false)
    }

    pub(crate) fn busy() -> (Box<Self>, Arc<DeviceState>) {
        Self::with(true)
    }

    fn with(busy: bool) -> (Box<Self>, Arc<DeviceState>) {
        let state = Arc::new(DeviceState::default());
        let device = Self {
            state: Arc::clone(&state),
            busy,
            queues: Vec::new(),
            worker: None,
        };
        (Box::new(device), state)
    }
}

impl VirtioDevice for MockDevice {
    fn device_type(&self) -> u32 {
        MOCK_TYPE
    }

    fn name(&self) -> &str {
        "mock0"
    }

    fn features(&self) -> u64 {
        MOCK_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 16, 256]
    }

    fn has_legacy_interface(&self) -> bool {
        !self.state.modern_only.load(Ordering::SeqCst)
    }

    fn read_config(&self, _: Interface, offset: u64, data: &mut [u8]) {
        let config = self.state.config.lock().unwrap();
        for (at, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap().saturating_add(at);
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _: Interface, offset: u64, data: &[u8]) {
        let mut config = self.state.config.lock().unwrap();
        for (at, byte) in data.iter().enumerate() {
            let at = usize::try_from(offset).unwrap().saturating_add(at);
            if let Some(place) = config.get_mut(at) {
                *place = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.state.active.load(Ordering::SeqCst), "active already");
        assert!(self.queues.is_empty());
        if self.state.needs_all.load(Ordering::SeqCst) {
            for index in 0..3 {
                if !activation.queues.iter().any(|q| q.index == index) {
                    return Err(ActivateError::MissingQueue(index));
                }
            }
        }
        assert!(activation.queues.iter().all(|q| q.queue.queue().ready()));
        let event_idx = activation
            .queues
            .iter()
            .all(|q| q.queue.queue().event_idx_enabled());
        self.state.event_idx.store(event_idx, Ordering::SeqCst);
        *self.state.features.lock().unwrap() = activation.features;
        *self.state.interface.lock().unwrap() = activation.interface;
        *self.state.queues.lock().unwrap() = activation
            .queues
            .iter()
            .map(|q| (q.index, q.queue.size(), q.queue.next_avail()))
            .collect();
        *self.state.rings.lock().unwrap() = activation
            .queues
            .iter()
            .map(|q| q.queue.queue())
            .map(|q| [q.desc_table(), q.avail_ring(), q.used_ring()])
            .collect();
        *self.state.link.lock().unwrap() = Some(Arc::clone(&activation.link));
        self.queues = activation.queues;
        if self.busy {
            let stop = Arc::new(AtomicBool::new(false));
            let stopped = Arc::clone(&stop);
            let worker = thread::spawn(move || {
                while !stopped.load(Ordering::SeqCst) {
                    for queue in 0..3 {
                        activation.link.used(queue).unwrap();
                    }
                    activation.link.config_changed().unwrap();
                    thread::yield_now();
                }
            });
            self.worker = Some((stop, worker));
        }
        self.state.active.store(true, Ordering::SeqCst);
        self.state.activations.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        if let Some((stop, worker)) = self.worker.take() {
            stop.store(true, Ordering::SeqCst);
            worker.join().unwrap();
        }
        self.state.active.store(false, Ordering::SeqCst);
        // As if the device had worked on the first queue.
        if let Some(first) = self.queues.first_mut() {
            let next = first.queue.next_avail();
            first.queue.set_next_avail(next.wrapping_add(1));
        }
        std::mem::take(&mut self.queues)
    }
}

/// A wire that keeps all that it was told.
#[derive(Default)]
pub(crate) struct Line(Mutex<Vec<bool>>);

impl Line {
    pub(crate) fn take(&self) -> Vec<bool> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl IrqLine for Line {
    fn set(&self, asserted: bool) -> io::Result<()> {
        self.0.lock().unwrap().push(asserted);
        Ok(())
    }
}

/// Vectors that keep what was raised, and accept it only while there is a route.
pub(crate) struct Vectors {
    count: u16,
    routes: Mutex<Vec<Option<MsiMessage>>>,
    raised: Mutex<Vec<u16>>,
}

impl Vectors {
    pub(crate) fn new(count: u16) -> Arc<Self> {
        Arc::new(Self {
            count,
            routes: Mutex::new(vec![None; count.into()]),
            raised: Mutex::default(),
        })
    }

    pub(crate) fn route_of(&self, vector: usize) -> Option<MsiMessage> {
        self.routes.lock().unwrap()[vector]
    }

    pub(crate) fn take_raised(&self) -> Vec<u16> {
        std::mem::take(&mut self.raised.lock().unwrap())
    }
}

impl MsiVectors for Vectors {
    fn count(&self) -> u16 {
        self.count
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        self.routes.lock().unwrap()[usize::from(vector)] = message;
        Ok(())
    }

    fn raise(&self, vector: u16) -> io::Result<()> {
        assert!(self.route_of(vector.into()).is_some());
        self.raised.lock().unwrap().push(vector);
        Ok(())
    }
}

/// The same in either byte order: QEMU's user-mode emulation swaps what a program
/// writes to an event, and not what it reads from a duplicate.
const MARK: u64 = 0x0700_0000_0000_0007;

/// Doorbells that know what is attached, and refuse what KVM would refuse.
#[derive(Default)]
pub(crate) struct Bells {
    attached: Mutex<Vec<(Doorbell, Option<u32>, EventFd)>>,
    /// Refuse everything.
    pub(crate) none: AtomicBool,
}

impl Bells {
    pub(crate) fn attached(&self) -> Vec<(Doorbell, Option<u32>)> {
        let attached = self.attached.lock().unwrap();
        attached
            .iter()
            .map(|(bell, datamatch, _)| (*bell, *datamatch))
            .collect()
    }
}

impl Doorbells for Bells {
    fn attach(&self, bell: Doorbell, datamatch: Option<u32>, event: &EventFd) -> io::Result<()> {
        if self.none.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        assert!(
            !self.attached().contains(&(bell, datamatch)),
            "{bell:x?} {datamatch:?} attached twice"
        );
        let event = event.try_clone()?;
        self.attached.lock().unwrap().push((bell, datamatch, event));
        Ok(())
    }

    fn detach(&self, bell: Doorbell, datamatch: Option<u32>, event: &EventFd) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap();
        let at = attached
            .iter()
            .position(|(b, d, _)| (*b, *d) == (bell, datamatch))
            .expect("detaching what is not attached");
        let (_, _, attached) = attached.remove(at);
        // The same event, not only another one at the same address.
        while attached.read().is_ok() {}
        event.write(MARK)?;
        assert_eq!(attached.read()?, MARK);
        Ok(())
    }
}
