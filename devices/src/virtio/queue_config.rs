//! What a driver says of a queue when it sets it up.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

use super::ring::Ring;
use crate::byte_order::ByteOrder;

/// The three areas of a split virtqueue (section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueArea {
    /// The descriptor table.
    Descriptor,
    /// The available ring, written by the driver.
    Driver,
    /// The used ring, written by the device.
    Device,
}

/// A queue as the driver has set it up so far. Nothing of it is checked before
/// the device is activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// The largest size that the device takes, in descriptors.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptor: u64,
    /// Guest-physical address of the available ring.
    pub driver: u64,
    /// Guest-physical address of the used ring.
    pub device: u64,
}

impl QueueConfig {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptor: 0,
            driver: 0,
            device: 0,
        }
    }

    /// The guest-physical address of `area`.
    pub fn address(&self, area: QueueArea) -> u64 {
        match area {
            QueueArea::Descriptor => self.descriptor,
            QueueArea::Driver => self.driver,
            QueueArea::Device => self.device,
        }
    }

    /// The rings, if they are aligned, of a legal size and inside guest memory.
    pub(super) fn rings<M: GuestMemory>(
        &self,
        mem: &M,
        event_idx: bool,
        order: ByteOrder,
    ) -> Option<Ring> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptor))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(mem).then(|| Ring::new(queue, order))
    }
}
