//! Split virtqueues in either byte order (virtio 1.2, section 2.7).
//!
//! Little-endian ones are the `virtio-queue` crate's. Through the legacy
//! interface a queue is in the guest's own order (section 2.7.3); for a
//! big-endian guest the memory accesses are here, and keep to the same checks.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::byte_order::{ByteOrder, Number};

/// Flags and index, in front of the elements of either ring.
const RING_HEADER: u64 = 4;
/// Where the index is in either ring.
const RING_INDEX: u64 = 2;
/// Bytes of an element of the available ring.
const AVAILABLE_ELEMENT: u64 = 2;
/// Bytes of an element of the used ring.
const USED_ELEMENT: usize = 8;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;

/// Why a ring cannot be used any more.
#[derive(Debug, Error)]
pub enum RingError {
    /// What `virtio-queue` says of a little-endian one.
    #[error(transparent)]
    Queue(#[from] virtio_queue::Error),
    /// It is outside guest memory.
    #[error("a ring outside guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The available index is further ahead than the ring is long.
    #[error("an available index that jumps")]
    Jump,
}

/// A queue's rings, and where the device is in them.
#[derive(Debug)]
pub struct Ring {
    /// Addresses and positions; for a big-endian ring, no more than that.
    queue: Queue,
    order: ByteOrder,
}

impl Ring {
    /// The rings of `queue`, which is valid, in `order`.
    pub fn new(queue: Queue, order: ByteOrder) -> Self {
        Self { queue, order }
    }

    /// The number of descriptors in the table.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The available index up to which chains have been taken.
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Sets [`next_avail`](Self::next_avail).
    pub fn set_next_avail(&mut self, index: u16) {
        self.queue.set_next_avail(index);
    }

    /// The used index up to which chains have been returned.
    pub fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    /// Addresses and positions.
    #[cfg(test)]
    pub(crate) fn queue(&self) -> &Queue {
        &self.queue
    }

    #[cfg(test)]
    pub(crate) fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Takes the next chain that the driver made available. Its head may be
    /// outside the table; there is nothing in it then.
    ///
    /// # Errors
    /// The ring cannot be read, or its index jumps.
    pub fn pop<'m>(&mut self, mem: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, RingError> {
        if self.order == ByteOrder::Little {
            let mut chains = QueueOwnedT::iter(&mut self.queue, mem)?;
            return Ok(chains.next().map(Chain::Little));
        }
        let next = self.next_avail();
        let waiting = self.available_index(mem, Ordering::Acquire)?;
        match waiting.wrapping_sub(next) {
            0 => return Ok(None),
            count if count > self.size() => return Err(RingError::Jump),
            _ => {}
        }
        let slot = u64::from(next.checked_rem(self.size()).unwrap_or(0));
        let offset = RING_HEADER + slot * AVAILABLE_ELEMENT;
        let head = self.load(mem, self.queue.avail_ring(), offset, Ordering::Relaxed)?;
        self.set_next_avail(next.wrapping_add(1));
        Ok(Some(Chain::Big(BigChain::new(mem, &self.queue, head))))
    }

    /// Returns chains, each given by its head and the bytes written to it, so
    /// that the driver sees either none of them or all.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn add_used(
        &mut self,
        mem: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), RingError> {
        let Some(((last, written), others)) = chains.split_last() else {
            return Ok(());
        };
        for (head, written) in others {
            self.write_used(mem, *head, *written)?;
        }
        if self.order == ByteOrder::Little {
            return Ok(self.queue.add_used(mem, *last, *written)?);
        }
        self.write_used(mem, *last, *written)?;
        let index = self.next_used();
        let used = self.queue.used_ring();
        // Whoever sees the index sees the elements.
        self.store(mem, used, RING_INDEX, index, Ordering::Release)
    }

    /// Writes the next element, without the index that shows it.
    fn write_used(
        &mut self,
        mem: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        let index = self.next_used();
        let slot = u64::from(index.checked_rem(self.size()).unwrap_or(0));
        let mut element = [0; USED_ELEMENT];
        let (id, len) = element.split_at_mut(4);
        id.copy_from_slice(&u32::from(head).to_bytes(self.order));
        len.copy_from_slice(&written.to_bytes(self.order));
        let offset = RING_HEADER + slot * USED_ELEMENT as u64;
        mem.write_slice(&element, address(self.queue.used_ring(), offset))?;
        self.queue.set_next_used(index.wrapping_add(1));
        Ok(())
    }

    /// Whether the driver asked for an interrupt at what was used since the used
    /// index was `old` (section 2.7.7). This is done here in either order because
    /// virtio-queue counts one by one and leaves out the flag.
    pub fn wants_interrupt(&self, mem: &GuestMemoryMmap, old: u16) -> bool {
        let new = self.next_used();
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            let offset = RING_HEADER + AVAILABLE_ELEMENT * u64::from(self.size());
            let event = self.load(mem, available, offset, Ordering::Relaxed);
            let span = new.wrapping_sub(old);
            event.map_or(true, |event| new.wrapping_sub(event).wrapping_sub(1) < span)
        } else {
            let flags = self.load(mem, available, 0, Ordering::Relaxed);
            flags.map_or(true, |flags| {
                u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
            })
        }
    }

    /// Asks the driver to notify again, and returns whether it has already made
    /// more available, so that no notification may come for that.
    ///
    /// # Errors
    /// The rings cannot be reached.
    pub fn enable_notification(&mut self, mem: &GuestMemoryMmap) -> Result<bool, RingError> {
        if self.order == ByteOrder::Little {
            return Ok(self.queue.enable_notification(mem)?);
        }
        let used = self.queue.used_ring();
        let next = self.next_avail();
        let (offset, value) = match self.queue.event_idx_enabled() {
            true => (
                RING_HEADER + USED_ELEMENT as u64 * u64::from(self.size()),
                next,
            ),
            false => (0, 0),
        };
        self.store(mem, used, offset, value, Ordering::Relaxed)?;
        // The wish must be visible before the index is looked at: what comes
        // after that look is notified.
        fence(Ordering::SeqCst);
        Ok(self.available_index(mem, Ordering::Relaxed)? != next)
    }

    /// Asks the driver not to notify. With event indices there is nothing to do:
    /// an old one is behind the driver.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn disable_notification(&mut self, mem: &GuestMemoryMmap) -> Result<(), RingError> {
        if self.order == ByteOrder::Little {
            return Ok(self.queue.disable_notification(mem)?);
        }
        if self.queue.event_idx_enabled() {
            return Ok(());
        }
        let flags = VRING_USED_F_NO_NOTIFY as u16;
        self.store(mem, self.queue.used_ring(), 0, flags, Ordering::Relaxed)
    }

    fn available_index(&self, mem: &GuestMemoryMmap, order: Ordering) -> Result<u16, RingError> {
        self.load(mem, self.queue.avail_ring(), RING_INDEX, order)
    }

    /// A halfword of a ring, which is aligned.
    fn load(
        &self,
        mem: &GuestMemoryMmap,
        ring: u64,
        offset: u64,
        order: Ordering,
    ) -> Result<u16, RingError> {
        let raw: u16 = mem.load(address(ring, offset), order)?;
        Ok(u16::of_bytes(raw.to_ne_bytes(), self.order))
    }

    fn store(
        &self,
        mem: &GuestMemoryMmap,
        ring: u64,
        offset: u64,
        value: u16,
        order: Ordering,
    ) -> Result<(), RingError> {
        let raw = u16::from_ne_bytes(value.to_bytes(self.order));
        Ok(mem.store(raw, address(ring, offset), order)?)
    }
}

/// A place in a ring; no memory reaches up to where it would wrap around.
fn address(ring: u64, offset: u64) -> GuestAddress {
    GuestAddress(ring.saturating_add(offset))
}

/// A chain of descriptors, which comes to an end wherever it is malformed.
#[derive(Debug)]
pub enum Chain<'m> {
    /// Of a little-endian queue.
    Little(DescriptorChain<&'m GuestMemoryMmap>),
    /// Of a big-endian queue.
    Big(BigChain<'m>),
}

impl Chain<'_> {
    /// The index of its first descriptor.
    pub fn head_index(&self) -> u16 {
        match self {
            Chain::Little(chain) => chain.head_index(),
            Chain::Big(chain) => chain.head,
        }
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        match self {
            Chain::Little(chain) => chain.next(),
            Chain::Big(chain) => chain.next(),
        }
    }
}

/// A chain of big-endian descriptors.
#[derive(Debug)]
pub struct BigChain<'m> {
    mem: &'m GuestMemoryMmap,
    head: u16,
    table: u64,
    /// Descriptors in the table.
    size: u16,
    /// The table is an indirect one.
    indirect: bool,
    next: u16,
    /// How many more there can be: a chain that has more than its table loops.
    left: u16,
    /// Bytes so far, of 2^32 at most (section 2.7.5.2).
    bytes: u32,
}

impl<'m> BigChain<'m> {
    fn new(mem: &'m GuestMemoryMmap, queue: &Queue, head: u16) -> Self {
        Self {
            mem,
            head,
            table: queue.desc_table(),
            size: queue.size(),
            indirect: false,
            next: head,
            left: queue.size(),
            bytes: 0,
        }
    }

    fn read(&self) -> Option<Descriptor> {
        let offset = u64::from(self.next) * DESCRIPTOR as u64;
        let at = self.table.checked_add(offset)?;
        let raw: [u8; DESCRIPTOR] = self.mem.read_obj(GuestAddress(at)).ok()?;
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = raw;
        Some(Descriptor::new(
            u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            u32::from_be_bytes([i, j, k, l]),
            u16::from_be_bytes([m, n]),
            u16::from_be_bytes([o, p]),
        ))
    }

    /// Goes on in the table that `descriptor` refers to (section 2.7.5.3);
    /// there is none in an indirect table.
    fn enter(&mut self, descriptor: Descriptor) -> Option<()> {
        let len = descriptor.len();
        if self.indirect || !len.is_multiple_of(DESCRIPTOR as u32) {
            return None;
        }
        self.size = u16::try_from(len / DESCRIPTOR as u32).ok()?;
        self.table = descriptor.addr().0;
        self.indirect = true;
        self.next = 0;
        self.left = self.size;
        Some(())
    }
}

impl Iterator for BigChain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        loop {
            if self.left == 0 || self.next >= self.size {
                return None;
            }
            let descriptor = self.read()?;
            if descriptor.refers_to_indirect_table() {
                self.enter(descriptor)?;
                continue;
            }
            self.bytes = self.bytes.checked_add(descriptor.len())?;
            self.left = match descriptor.has_next() {
                true => self.left - 1,
                false => 0,
            };
            self.next = descriptor.next();
            return Some(descriptor);
        }
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
