//! The block device (virtio 1.2, section 5.2).

mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestAddressSpace;

use self::request::{MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_ZERO_SECTORS, Requests};
use super::buffers::{BufferSet, Storage};
use super::worker::{Context, Handler, Worker};
use super::{ActivateError, Activation, ActiveQueue, Interface, VirtioDevice, config};
use crate::byte_order::ByteOrder;
use crate::disk::{RawDisk, SECTOR};

/// Length of the serial number that a driver can ask for.
const SERIAL_LEN: usize = 20;
/// Where `writeback` is in the configuration space.
const WRITEBACK: u64 = 32;
/// Descriptors of a request that are not data: header and status.
const OVERHEAD: u16 = 2;

/// How a block device is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockOptions {
    /// Serial number, of which the driver sees 20 bytes.
    pub serial: String,
    /// Number of queues, each with a thread of its own; at least 1.
    pub queues: u16,
    /// Descriptors in each queue: a power of two from 4 to 32768.
    pub queue_size: u16,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            serial: String::new(),
            queues: 1,
            queue_size: 256,
        }
    }
}

/// A virtio block device on a raw disk.
pub struct Block {
    name: String,
    disk: Arc<RawDisk>,
    serial: [u8; SERIAL_LEN],
    queue_sizes: Vec<u16>,
    features: u64,
    /// Whether written data may wait in the host's cache for a flush.
    writeback: Arc<AtomicBool>,
    workers: Vec<Worker<QueueHandler>>,
}

impl Block {
    /// A device named `name` (such as `disk0`) on `disk`.
    pub fn new(name: &str, disk: Arc<RawDisk>, options: BlockOptions) -> Self {
        let mut serial = [0; SERIAL_LEN];
        for (byte, value) in serial.iter_mut().zip(options.serial.bytes()) {
            *byte = value;
        }
        let queues = options.queues.max(1);
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        if queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if disk.read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            if disk.discards() {
                features |= 1 << VIRTIO_BLK_F_DISCARD;
            }
        }
        Self {
            name: name.to_owned(),
            disk,
            serial,
            queue_sizes: vec![options.queue_size; queues.into()],
            features,
            writeback: Arc::new(AtomicBool::new(true)),
            workers: Vec::new(),
        }
    }

    /// The configuration space (section 5.2.4).
    fn config(&self, order: ByteOrder) -> Vec<u8> {
        let geometry = self.disk.geometry();
        let blocks = geometry.physical_block / geometry.logical_block;
        let per_logical = |bytes: u32| bytes / geometry.logical_block;
        let queue_size = self.queue_sizes.first().copied().unwrap_or(OVERHEAD);
        let segments = u32::from(queue_size.saturating_sub(OVERHEAD).max(1));
        let alignment = per_sector(geometry.physical_block);
        config::Layout::new(order)
            .number(self.disk.sectors())
            .gap(4) // size_max
            .number(segments)
            .gap(4) // geometry
            .number(geometry.logical_block)
            .bytes([blocks.checked_ilog2().unwrap_or(0) as u8, 0])
            .number(blocks.clamp(1, u16::MAX.into()) as u16)
            .number(per_logical(geometry.optimal_io))
            .bytes([u8::from(self.writeback.load(Ordering::Relaxed)), 0])
            .number(self.queue_sizes.len() as u16)
            .number(MAX_DISCARD_SECTORS)
            .number(MAX_SEGMENTS)
            .number(alignment)
            .number(MAX_ZERO_SECTORS)
            .number(MAX_SEGMENTS)
            .bytes([1, 0, 0, 0]) // write_zeroes_may_unmap
            .done()
    }
}

fn per_sector(bytes: u32) -> u32 {
    bytes / SECTOR as u32
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn has_legacy_interface(&self) -> bool {
        true
    }

    fn read_config(&self, interface: Interface, offset: u64, data: &mut [u8]) {
        config::read(&self.config(interface.order()), offset, data);
    }

    fn write_config(&mut self, _: Interface, offset: u64, data: &[u8]) {
        for (_, value) in config::written(offset, data, WRITEBACK, 1) {
            self.writeback.store(value != 0, Ordering::Relaxed);
        }
    }

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.queues.first().is_none_or(|q| q.index != 0) {
            return Err(ActivateError::MissingQueue(0));
        }
        // Without a way to flush, a driver takes what was written to be safe
        // (section 5.2.6.2).
        let can_flush = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        let cached = activation.features & can_flush != 0;
        if activation.features & 1 << VIRTIO_BLK_F_CONFIG_WCE == 0 {
            self.writeback.store(true, Ordering::Relaxed);
        }
        let mut workers = Vec::with_capacity(activation.queues.len());
        for queue in activation.queues {
            let handler = QueueHandler {
                requests: Requests {
                    disk: Arc::clone(&self.disk),
                    serial: self.serial,
                    features: activation.features & self.features,
                    order: activation.interface.order(),
                    writeback: cached.then(|| Arc::clone(&self.writeback)),
                },
                storage: Storage::default(),
            };
            workers.push(Worker::spawn(
                &format!("{}-q{}", self.name, queue.index),
                activation.mem.clone(),
                &activation.link,
                vec![queue],
                handler,
            )?);
        }
        self.workers = workers;
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let stopped = self.workers.drain(..).filter_map(Worker::stop);
        stopped.flat_map(|(_, queues)| queues).collect()
    }
}

struct QueueHandler {
    requests: Requests,
    storage: Storage,
}

impl Handler for QueueHandler {
    fn start(&mut self, _: &mut Context) {}

    fn queue(&mut self, context: &mut Context, position: usize) {
        let mem = context.mem.memory();
        let Some(queue) = context.queues.get_mut(position) else {
            return;
        };
        queue.serve(&mem, |queue, chain| {
            let mut buffers = BufferSet::new(&mem, &mut self.storage);
            match buffers.add(chain) {
                Ok(chain) => self.requests.serve(
                    buffers.readable(chain.readable),
                    buffers.writable(chain.writable),
                    queue,
                ),
                Err(error) => {
                    queue.complain(&error);
                    0
                }
            }
        });
    }

    fn event(&mut self, _: &mut Context, _: u32) {}

    fn stop(&mut self, _: &mut Context) {}
}
