//! The control queue (virtio 1.2, section 5.1.6.5).

use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::GuestAddressSpace;

use super::Backend;
use crate::byte_order::{ByteOrder, Number};
use crate::virtio::buffers::{BufferSet, Readable, Storage};
use crate::virtio::worker::{Context, Handler};

/// Serves the control queue, which only knows how many pairs are in use.
pub(super) struct ControlHandler {
    backend: Arc<Backend>,
    /// Whether the driver may have more than one pair (VIRTIO_NET_F_MQ).
    several: bool,
    order: ByteOrder,
    storage: Storage,
}

impl ControlHandler {
    pub(super) fn new(backend: Arc<Backend>, several: bool, order: ByteOrder) -> Self {
        Self {
            backend,
            several,
            order,
            storage: Storage::default(),
        }
    }

    /// Does a command, and returns whether it did.
    fn command(&self, mut input: Readable<'_>) -> bool {
        let backend = &self.backend;
        let mut command = [0; 4];
        if input.read(&mut command) < command.len() {
            return false;
        }
        let [class, code, pairs @ ..] = command;
        let pairs = usize::from(u16::of_bytes(pairs, self.order));
        if !self.several
            || u32::from(class) != VIRTIO_NET_CTRL_MQ
            || u32::from(code) != VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
            || !(1..=backend.gates.len()).contains(&pairs)
        {
            return false;
        }
        match backend.set_pairs(pairs) {
            Ok(()) => true,
            Err(error) => {
                log::warn!(
                    "tap {}: cannot use {pairs} queues: {error}",
                    backend.tap.name()
                );
                false
            }
        }
    }
}

impl Handler for ControlHandler {
    fn start(&mut self, _: &mut Context) {}

    fn queue(&mut self, context: &mut Context, position: usize) {
        let mem = context.mem.memory();
        let Some(queue) = context.queues.get_mut(position) else {
            return;
        };
        let mut storage = std::mem::take(&mut self.storage);
        queue.serve(&mem, |queue, chain| {
            let mut buffers = BufferSet::new(&mem, &mut storage);
            let chain = match buffers.add(chain) {
                Ok(chain) => chain,
                Err(error) => {
                    queue.complain(&error);
                    return 0;
                }
            };
            let done = self.command(buffers.readable(chain.readable));
            let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            buffers.writable(chain.writable).write(&[ack as u8]) as u32
        });
        self.storage = storage;
    }

    fn event(&mut self, _: &mut Context, _: u32) {}

    fn stop(&mut self, _: &mut Context) {}
}
