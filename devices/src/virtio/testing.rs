//! A scripted driver: rings and buffers in a small guest memory, written by
//! hand so that a test can get them wrong on purpose.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::Ring;
use super::{Activation, ActiveQueue, DriverLink, Interface, VirtioInterrupt};
use crate::GuestMem;
use crate::byte_order::{ByteOrder, Number};

pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// The first byte after the two adjacent regions of guest memory.
pub(crate) const END_OF_RAM: u64 = 0x80_0000;
/// Where one region ends and the next one starts.
pub(crate) const SEAM: u64 = 0x40_0000;
/// Buffers may be anywhere from here on.
pub(crate) const BUFFERS: u64 = 0x10_0000;
const RINGS: u64 = 0x1_0000;
const RINGS_PER_QUEUE: u64 = 0x1_0000;

/// How long a device may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct CountedInterrupt {
    queues: [AtomicU32; 16],
    config: AtomicU32,
}

impl CountedInterrupt {
    pub(crate) fn queue_count(&self, index: u16) -> u32 {
        self.queues[usize::from(index)].load(Ordering::SeqCst)
    }

    pub(crate) fn config_count(&self) -> u32 {
        self.config.load(Ordering::SeqCst)
    }
}

impl VirtioInterrupt for CountedInterrupt {
    fn queue(&self, index: u16) -> io::Result<()> {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn config(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A driver's end of one device.
pub(crate) struct Driver {
    pub(crate) mem: GuestMem,
    pub(crate) interrupt: Arc<CountedInterrupt>,
    /// A device's way to this driver.
    pub(crate) link: Arc<DriverLink>,
    pub(crate) queues: Vec<DriverQueue>,
    interface: Interface,
}

pub(crate) struct DriverQueue {
    mem: GuestMem,
    index: u16,
    size: u16,
    base: u64,
    order: ByteOrder,
    event_idx: bool,
    notify: EventFd,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

/// A buffer for [`DriverQueue::add`].
#[derive(Clone, Copy)]
pub(crate) struct Buf {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
}

/// A device-readable buffer.
pub(crate) fn out(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        flags: 0,
    }
}

/// A device-writable buffer.
pub(crate) fn into(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        flags: WRITE,
    }
}

/// Makes tests of functions that take an [`Interface`]: two of each, by name.
macro_rules! by_either_interface {
    ($($name:ident),* $(,)?) => {
        mod modern {
            $(#[test]
            fn $name() {
                super::$name(crate::virtio::testing::INTERFACES[0]);
            })*
        }
        mod legacy {
            $(#[test]
            fn $name() {
                super::$name(crate::virtio::testing::INTERFACES[1]);
            })*
        }
    };
}
pub(crate) use by_either_interface;

/// Both interfaces, the legacy one in the order that is not virtio 1.x's.
pub(crate) const INTERFACES: [Interface; 2] =
    [Interface::Modern, Interface::Legacy(ByteOrder::Big)];

impl Driver {
    /// A driver with these queue sizes.
    pub(crate) fn new(sizes: &[u16]) -> Self {
        Self::with(sizes, Interface::Modern)
    }

    /// The same of a driver that speaks as `interface` says.
    pub(crate) fn with(sizes: &[u16], interface: Interface) -> Self {
        let regions = [
            (GuestAddress(0), SEAM as usize),
            (GuestAddress(SEAM), (END_OF_RAM - SEAM) as usize),
        ];
        let mem = GuestMem::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        let queues = (0..)
            .zip(sizes)
            .map(|(index, &size)| DriverQueue {
                mem: mem.clone(),
                index,
                size,
                base: RINGS + u64::from(index) * RINGS_PER_QUEUE,
                order: interface.order(),
                event_idx: false,
                notify: EventFd::new(EFD_NONBLOCK).unwrap(),
                next_descriptor: 0,
                available: 0,
                seen: 0,
            })
            .collect();
        let interrupt = Arc::<CountedInterrupt>::default();
        Self {
            mem,
            link: Arc::new(DriverLink::new(interrupt.clone())),
            interrupt,
            queues,
            interface,
        }
    }

    pub(crate) fn activation(&self, features: u64) -> Activation {
        Activation {
            mem: self.mem.clone(),
            features,
            interface: self.interface,
            link: self.link.clone(),
            queues: self.queues.iter().map(DriverQueue::active).collect(),
        }
    }

    pub(crate) fn write(&self, addr: u64, data: &[u8]) {
        let mem = self.mem.memory();
        mem.write_slice(data, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let mem = self.mem.memory();
        mem.read_slice(&mut data, GuestAddress(addr)).unwrap();
        data
    }
}

impl DriverQueue {
    fn table(&self) -> u64 {
        self.base
    }

    fn avail(&self) -> u64 {
        self.base + 0x8000
    }

    fn used(&self) -> u64 {
        self.base + 0xc000
    }

    /// The addresses of its descriptor table, available and used ring.
    pub(crate) fn areas(&self) -> [u64; 3] {
        [self.table(), self.avail(), self.used()]
    }

    /// Turns event indices on; before [`Driver::activation`].
    pub(crate) fn use_event_idx(&mut self) {
        self.event_idx = true;
    }

    pub(crate) fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.table() as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used() as u32), Some(0));
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        ActiveQueue {
            index: self.index,
            queue: Ring::new(queue, self.order),
            notify: self.notify.try_clone().unwrap(),
        }
    }

    fn write(&self, data: &[u8], addr: u64) {
        let mem = self.mem.memory();
        mem.write_slice(data, GuestAddress(addr)).unwrap();
    }

    fn read_u16(&self, addr: u64) -> u16 {
        let mut data = [0; 2];
        let mem = self.mem.memory();
        mem.read_slice(&mut data, GuestAddress(addr)).unwrap();
        u16::of_bytes(data, self.order)
    }

    /// Writes descriptor `next` to the table at `table`.
    pub(crate) fn write_descriptor(&self, table: u64, at: u16, buf: Buf, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&buf.addr.to_bytes(self.order));
        raw[8..12].copy_from_slice(&buf.len.to_bytes(self.order));
        raw[12..14].copy_from_slice(&buf.flags.to_bytes(self.order));
        raw[14..].copy_from_slice(&next.to_bytes(self.order));
        self.write(&raw, table + 16 * u64::from(at));
    }

    /// Writes a descriptor to the queue's own table.
    pub(crate) fn descriptor(&self, at: u16, buf: Buf, next: u16) {
        self.write_descriptor(self.table(), at, buf, next);
    }

    /// Makes a chain of `bufs` available, and returns its head. Descriptors are
    /// taken round and round: a test has few in flight.
    pub(crate) fn add(&mut self, bufs: &[Buf]) -> u16 {
        let head = self.next_descriptor;
        for (i, buf) in bufs.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            let more = i + 1 < bufs.len();
            let flags = buf.flags | if more { NEXT } else { 0 };
            self.descriptor(at, Buf { flags, ..*buf }, self.next_descriptor);
        }
        self.publish(head);
        head
    }

    /// Makes a chain of `bufs` available through an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, table: u64, bufs: &[Buf]) -> u16 {
        for (i, buf) in (0..).zip(bufs) {
            let more = usize::from(i) + 1 < bufs.len();
            let flags = buf.flags | if more { NEXT } else { 0 };
            self.write_descriptor(table, i, Buf { flags, ..*buf }, i + 1);
        }
        let len = 16 * bufs.len() as u32;
        self.add(&[Buf {
            addr: table,
            len,
            flags: INDIRECT,
        }])
    }

    /// Puts `head` into the available ring.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.write(&head.to_bytes(self.order), self.avail() + 4 + 2 * slot);
        self.jump(self.available.wrapping_add(1));
    }

    /// Sets the available index.
    pub(crate) fn jump(&mut self, index: u16) {
        self.available = index;
        self.write(&index.to_bytes(self.order), self.avail() + 2);
    }

    /// Sets the available ring's flags.
    pub(crate) fn set_flags(&self, flags: u16) {
        self.write(&flags.to_bytes(self.order), self.avail());
    }

    /// Sets the used index after which the driver wants an interrupt.
    pub(crate) fn set_used_event(&self, index: u16) {
        self.write(
            &index.to_bytes(self.order),
            self.avail() + 4 + 2 * u64::from(self.size),
        );
    }

    pub(crate) fn kick(&self) {
        self.notify.write(1).unwrap();
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.read_u16(self.used() + 2)
    }

    /// The available index at which the device wants a notification.
    pub(crate) fn avail_event(&self) -> u16 {
        self.read_u16(self.used() + 4 + 8 * u64::from(self.size))
    }

    /// The available index.
    pub(crate) fn available(&self) -> u16 {
        self.available
    }

    /// The used index up to which elements have been taken.
    pub(crate) fn seen(&self) -> u16 {
        self.seen
    }

    /// Takes the next used element, (head, length), if there is one.
    pub(crate) fn poll(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.size);
        let mut element = [0; 8];
        let mem = self.mem.memory();
        mem.read_slice(&mut element, GuestAddress(self.used() + 4 + 8 * slot))
            .unwrap();
        self.seen = self.seen.wrapping_add(1);
        let word = |at: usize| element[at..at + 4].try_into().unwrap();
        let [id, len] = [0, 4].map(|at| u32::of_bytes(word(at), self.order));
        Some((id as u16, len))
    }

    /// Waits for the next used element.
    pub(crate) fn wait(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(element) = self.poll() {
                return element;
            }
            assert!(Instant::now() < deadline, "the device used no buffer");
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Kicks and waits for the next used element.
    pub(crate) fn run(&mut self) -> (u16, u32) {
        self.kick();
        self.wait()
    }

    /// Gives the device time, and asserts that it used nothing.
    pub(crate) fn expect_silence(&mut self) {
        self.kick();
        thread::sleep(Duration::from_millis(30));
        assert_eq!(self.poll(), None);
    }
}
