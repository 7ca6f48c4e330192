//! The input device (virtio 1.2, section 5.8), with one key: the power key.
//!
//! It is how a machine without a power button of its own asks its guest to
//! power off: Linux reports the key to whoever listens, such as systemd-logind.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_INPUT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::buffers::{BufferSet, Storage};
use super::worker::{Context, Handler, Worker};
use super::{ActivateError, Activation, ActiveQueue, Interface, VirtioDevice, config};
use crate::fd;

const QUEUE_SIZE: u16 = 64;
/// The queue that carries events to the driver; the other one carries the
/// state of LEDs, of which there are none.
const EVENT_QUEUE: u16 = 0;

// struct virtio_input_config.
const SELECT: usize = 0;
const SUBSEL: usize = 1;
const SIZE: usize = 2;
const UNION: usize = 8;
const CONFIG_SIZE: usize = UNION + 128;

// What `select` asks for.
const ID_NAME: u8 = 0x01;
const ID_SERIAL: u8 = 0x02;
const ID_DEVIDS: u8 = 0x03;
const EV_BITS: u8 = 0x11;

// Linux's input event codes, which the specification takes.
const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const SYN_REPORT: u16 = 0;
const KEY_POWER: u16 = 116;
/// BUS_VIRTUAL.
const BUS_VIRTUAL: u16 = 6;

const NAME: &[u8] = b"crossvisor power key";

/// Presses that wait for the driver, at most.
const MAX_PRESSES: u32 = 4;

const PRESSED: u32 = 0;

/// `struct virtio_input_event`.
fn event(kind: u16, code: u16, value: u32) -> [u8; 8] {
    let [k0, k1] = kind.to_le_bytes();
    let [c0, c1] = code.to_le_bytes();
    let [v0, v1, v2, v3] = value.to_le_bytes();
    [k0, k1, c0, c1, v0, v1, v2, v3]
}

/// The key goes down, and up again.
fn press() -> [[u8; 8]; 4] {
    [
        event(EV_KEY, KEY_POWER, 1),
        event(EV_SYN, SYN_REPORT, 0),
        event(EV_KEY, KEY_POWER, 0),
        event(EV_SYN, SYN_REPORT, 0),
    ]
}

/// Presses the key of a [`PowerKey`], from any thread.
pub struct Presser {
    presses: Arc<AtomicU32>,
    pressed: EventFd,
}

impl Presser {
    /// Presses the key. A press that comes before the driver does waits for it.
    ///
    /// # Errors
    /// The device's thread cannot be woken.
    pub fn press(&self) -> io::Result<()> {
        let more = |presses: u32| (presses < MAX_PRESSES).then_some(presses + 1);
        let order = Ordering::AcqRel;
        // At the most, one more would tell the guest nothing.
        let _ = self.presses.fetch_update(order, Ordering::Acquire, more);
        match self.pressed.write(1) {
            // Full: the thread has been told and not yet listened.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            told => told,
        }
    }
}

/// A virtio input device that has a power key.
pub struct PowerKey {
    name: String,
    select: u8,
    subsel: u8,
    presses: Arc<AtomicU32>,
    pressed: EventFd,
    worker: Option<Worker<KeyHandler>>,
}

impl PowerKey {
    /// A device named `name`.
    ///
    /// # Errors
    /// Its event could not be made.
    pub fn new(name: &str) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            select: 0,
            subsel: 0,
            presses: Arc::default(),
            pressed: EventFd::new(EFD_NONBLOCK)?,
            worker: None,
        })
    }

    /// What presses the key.
    ///
    /// # Errors
    /// Its event could not be made.
    pub fn presser(&self) -> io::Result<Presser> {
        Ok(Presser {
            presses: Arc::clone(&self.presses),
            pressed: self.pressed.try_clone()?,
        })
    }

    /// What the driver has selected.
    fn selected(&self) -> Vec<u8> {
        match (self.select, self.subsel) {
            (ID_NAME, 0) => NAME.to_vec(),
            (ID_SERIAL, 0) => Vec::new(),
            // Bus type, vendor, product, version.
            (ID_DEVIDS, 0) => [BUS_VIRTUAL, 0, 0, 1]
                .into_iter()
                .flat_map(u16::to_le_bytes)
                .collect(),
            (EV_BITS, kind) if u16::from(kind) == EV_KEY => {
                let mut bits = vec![0; usize::from(KEY_POWER / 8)];
                bits.push(1 << (KEY_POWER % 8));
                bits
            }
            _ => Vec::new(),
        }
    }
}

impl VirtioDevice for PowerKey {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_INPUT
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, _: Interface, offset: u64, data: &mut [u8]) {
        let selected = self.selected();
        let mut space = [0; CONFIG_SIZE];
        space[SELECT] = self.select;
        space[SUBSEL] = self.subsel;
        // At most 128.
        space[SIZE] = selected.len() as u8;
        for (byte, value) in space.iter_mut().skip(UNION).zip(selected) {
            *byte = value;
        }
        config::read(&space, offset, data);
    }

    fn write_config(&mut self, _: Interface, offset: u64, data: &[u8]) {
        for (position, value) in config::written(offset, data, 0, CONFIG_SIZE) {
            match position {
                SELECT => self.select = value,
                SUBSEL => self.subsel = value,
                _ => {}
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let has_events = |queue: &ActiveQueue| queue.index == EVENT_QUEUE;
        if !activation.queues.iter().any(has_events) {
            return Err(ActivateError::MissingQueue(EVENT_QUEUE));
        }
        let handler = KeyHandler {
            presses: Arc::clone(&self.presses),
            pressed: self.pressed.try_clone()?,
            events: VecDeque::new(),
            storage: Storage::default(),
        };
        self.worker = Some(Worker::spawn(
            &self.name,
            activation.mem,
            &activation.link,
            activation.queues,
            handler,
        )?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let stopped = self.worker.take().and_then(Worker::stop);
        stopped.map(|(_, queues)| queues).unwrap_or_default()
    }
}

struct KeyHandler {
    presses: Arc<AtomicU32>,
    pressed: EventFd,
    /// What the driver has yet to hear.
    events: VecDeque<[u8; 8]>,
    storage: Storage,
}

impl KeyHandler {
    /// Tells the driver of presses, as far as it has given buffers.
    fn deliver(&mut self, context: &mut Context) {
        if self.events.is_empty() {
            for _ in 0..self.presses.swap(0, Ordering::AcqRel) {
                self.events.extend(press());
            }
        }
        let mem = context.mem.memory();
        let mut queues = context.queues.iter_mut();
        let Some(queue) = queues.find(|queue| queue.index() == EVENT_QUEUE) else {
            return;
        };
        while let Some(event) = self.events.front() {
            let Some(chain) = queue.pop(&mem) else {
                if queue.listen(&mem) {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let mut buffers = BufferSet::new(&mem, &mut self.storage);
            let written = match buffers.add(chain) {
                Ok(chain) => buffers.writable(chain.writable).write(event),
                Err(error) => {
                    queue.complain(&error);
                    0
                }
            };
            if written == event.len() {
                self.events.pop_front();
            }
            queue.complete(&mem, head, written as u32);
        }
        queue.signal(&mem);
    }
}

impl Handler for KeyHandler {
    fn start(&mut self, context: &mut Context) {
        if let Err(error) = context.watch(fd::borrow(&self.pressed), PRESSED) {
            log::warn!("power key: cannot be watched: {error}");
        }
    }

    fn queue(&mut self, context: &mut Context, position: usize) {
        let mem = context.mem.memory();
        match context.queues.get_mut(position) {
            Some(queue) if queue.index() == EVENT_QUEUE => {
                // There is something to listen for even while there is nothing
                // to tell.
                queue.listen(&mem);
                self.deliver(context);
            }
            Some(queue) => queue.serve(&mem, |_, _| 0),
            None => {}
        }
    }

    fn event(&mut self, context: &mut Context, _: u32) {
        // Fails only when there is nothing to take.
        let _ = self.pressed.read();
        self.deliver(context);
    }

    fn stop(&mut self, context: &mut Context) {
        context.unwatch(fd::borrow(&self.pressed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{BUFFERS, Driver, into, out};

    fn setup() -> (PowerKey, Presser, Driver) {
        let mut key = PowerKey::new("power-key").unwrap();
        let presser = key.presser().unwrap();
        let driver = Driver::new(key.queue_sizes());
        key.activate(driver.activation(0)).unwrap();
        (key, presser, driver)
    }

    /// What the driver learns by selecting.
    fn select(key: &mut PowerKey, select: u8, subsel: u8) -> Vec<u8> {
        key.write_config(Interface::Modern, 0, &[select]);
        key.write_config(Interface::Modern, 1, &[subsel]);
        let mut size = [0];
        key.read_config(Interface::Modern, SIZE as u64, &mut size);
        let mut value = vec![0; size[0].into()];
        key.read_config(Interface::Modern, UNION as u64, &mut value);
        value
    }

    #[test]
    fn describes_one_key() {
        let mut key = PowerKey::new("power-key").unwrap();
        assert_eq!(select(&mut key, ID_NAME, 0), NAME);
        assert_eq!(select(&mut key, ID_DEVIDS, 0), [6, 0, 0, 0, 0, 0, 1, 0]);
        let bits = select(&mut key, EV_BITS, EV_KEY as u8);
        let keys = (0..bits.len() * 8).filter(|bit| bits[bit / 8] >> (bit % 8) & 1 != 0);
        assert_eq!(keys.collect::<Vec<_>>(), [116]);
        for subsel in (0..=255).filter(|kind| u16::from(*kind) != EV_KEY) {
            assert!(select(&mut key, EV_BITS, subsel).is_empty());
        }
        for other in [0, ID_SERIAL, 0x10, 0x12, 0xff] {
            assert!(select(&mut key, other, 0).is_empty());
        }
        let mut beyond = [0xff; 8];
        key.read_config(Interface::Modern, u64::MAX, &mut beyond);
        assert_eq!(beyond, [0; 8]);
        key.write_config(Interface::Modern, u64::MAX - 1, &[1; 8]);
    }

    #[test]
    fn a_press_is_four_events() {
        let (_key, presser, mut driver) = setup();
        for at in 0..8 {
            driver.queues[0].add(&[into(BUFFERS + at * 8, 8)]);
        }
        driver.queues[0].kick();
        presser.press().unwrap();
        for _ in 0..4 {
            assert_eq!(driver.queues[0].wait().1, 8);
        }
        let seen = driver.read(BUFFERS, 32);
        assert_eq!(seen, press().concat());
        driver.queues[0].expect_silence();
    }

    #[test]
    fn a_press_waits_for_buffers_and_for_the_driver() {
        let mut key = PowerKey::new("power-key").unwrap();
        let presser = key.presser().unwrap();
        presser.press().unwrap();
        let mut driver = Driver::new(key.queue_sizes());
        key.activate(driver.activation(0)).unwrap();
        for at in 0..4 {
            driver.queues[0].add(&[into(BUFFERS + at * 8, 8)]);
            assert_eq!(driver.queues[0].run().1, 8);
        }
        assert_eq!(driver.read(BUFFERS, 32), press().concat());
    }

    #[test]
    fn buffers_that_hold_no_event_do_no_harm() {
        let (mut key, presser, mut driver) = setup();
        presser.press().unwrap();
        for bad in [out(BUFFERS, 8), into(BUFFERS, 4), into(u64::MAX, 8)] {
            driver.queues[0].add(&[bad]);
            assert!(driver.queues[0].run().1 < 8);
        }
        driver.queues[0].add(&[into(BUFFERS, 8)]);
        driver.queues[0].run();
        assert_eq!(driver.read(BUFFERS, 8), event(EV_KEY, KEY_POWER, 1));
        driver.queues[1].add(&[out(BUFFERS, 8)]);
        assert_eq!(driver.queues[1].run().1, 0);
        assert_eq!(key.deactivate().len(), 2);
    }

    #[test]
    fn presses_beyond_the_most_are_one() {
        let key = PowerKey::new("power-key").unwrap();
        let presser = key.presser().unwrap();
        for _ in 0..1000 {
            presser.press().unwrap();
        }
        assert_eq!(key.presses.load(Ordering::Relaxed), MAX_PRESSES);
    }
}
