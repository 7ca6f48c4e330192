//! The entropy device (virtio 1.2, section 5.4).

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestAddressSpace;

use super::buffers::{BufferSet, Storage, Writable};
use super::worker::{Context, Handler, Worker};
use super::{ActivateError, Activation, ActiveQueue, Interface, VirtioDevice, config};

const QUEUE_SIZE: u16 = 64;
/// Bytes that one request gets at most.
const MAX_BYTES: usize = 64 * 1024;
/// Bytes that come from the host at a time.
const CHUNK: usize = 256;

/// A virtio entropy device that gives what the host's getrandom(2) gives.
pub struct Rng {
    name: String,
    worker: Option<Worker<RngHandler>>,
}

impl Rng {
    /// A device named `name` (such as `rng0`).
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            worker: None,
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn has_legacy_interface(&self) -> bool {
        true
    }

    fn read_config(&self, _: Interface, offset: u64, data: &mut [u8]) {
        config::read(&[], offset, data);
    }

    fn write_config(&mut self, _: Interface, _: u64, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.queues.is_empty() {
            return Err(ActivateError::MissingQueue(0));
        }
        self.worker = Some(Worker::spawn(
            &self.name,
            activation.mem,
            &activation.link,
            activation.queues,
            RngHandler::default(),
        )?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let stopped = self.worker.take().and_then(Worker::stop);
        stopped.map(|(_, queues)| queues).unwrap_or_default()
    }
}

#[derive(Default)]
struct RngHandler {
    storage: Storage,
}

impl Handler for RngHandler {
    fn start(&mut self, _: &mut Context) {}

    fn queue(&mut self, context: &mut Context, position: usize) {
        let mem = context.mem.memory();
        let Some(queue) = context.queues.get_mut(position) else {
            return;
        };
        queue.serve(&mem, |queue, chain| {
            let mut buffers = BufferSet::new(&mem, &mut self.storage);
            match buffers.add(chain) {
                Ok(chain) => fill(buffers.writable(chain.writable)),
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

/// Fills `buffer`, or its beginning, and returns how many bytes that was.
fn fill(buffer: Writable<'_>) -> u32 {
    let (mut buffer, _) = buffer.split_at(MAX_BYTES);
    let mut written = 0;
    let mut chunk = [0; CHUNK];
    while !buffer.is_empty() {
        let wanted = buffer.len().min(CHUNK);
        let chunk = chunk.get_mut(..wanted).unwrap_or_default();
        let Ok(got) = getrandom(&mut *chunk, GetRandomFlags::empty()) else {
            break;
        };
        written += buffer.write(chunk.get(..got).unwrap_or_default());
    }
    // At most MAX_BYTES.
    written as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{BUFFERS, Driver, END_OF_RAM, by_either_interface, into, out};
    use std::collections::HashSet;

    fn setup(interface: Interface) -> (Rng, Driver) {
        let mut rng = Rng::new("rng0");
        let driver = Driver::with(rng.queue_sizes(), interface);
        rng.activate(driver.activation(0)).unwrap();
        (rng, driver)
    }

    by_either_interface!(
        fills_buffers_with_bytes_that_differ,
        a_huge_request_is_bounded_and_a_bad_one_harmless,
    );

    fn fills_buffers_with_bytes_that_differ(interface: Interface) {
        let (mut rng, mut driver) = setup(interface);
        let mut seen = HashSet::new();
        for _ in 0..100 {
            driver.queues[0].add(&[into(BUFFERS, 8), into(BUFFERS + 0x1000, 1016)]);
            assert_eq!(driver.queues[0].run().1, 1024);
            assert!(seen.insert(driver.read(BUFFERS, 8)));
            let rest = driver.read(BUFFERS + 0x1000, 1016);
            for chunk in rest.chunks_exact(8) {
                assert!(seen.insert(chunk.to_vec()));
            }
        }
        assert_eq!(rng.deactivate().len(), 1);
        assert!(rng.deactivate().is_empty());
    }

    fn a_huge_request_is_bounded_and_a_bad_one_harmless(interface: Interface) {
        let (_rng, mut driver) = setup(interface);
        let queue = &mut driver.queues[0];
        queue.add(&[into(BUFFERS, 0x20_0000)]);
        assert_eq!(queue.run().1 as usize, MAX_BYTES);
        for bad in [
            out(BUFFERS, 100),
            into(BUFFERS, 0),
            into(END_OF_RAM - 1, 2),
            into(u64::MAX, u32::MAX),
        ] {
            queue.add(&[bad]);
            assert_eq!(queue.run().1, 0);
        }
        queue.add(&[out(BUFFERS, 4), into(BUFFERS, 16)]);
        assert_eq!(queue.run().1, 16);
        queue.jump(60_000);
        queue.expect_silence();
    }
}
