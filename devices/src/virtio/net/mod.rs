//! The network device (virtio 1.2, section 5.1) on a tap.

mod control;
mod mac;
mod pair;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::control::ControlHandler;
pub use self::mac::mac_for;
use self::pair::PairHandler;
use super::worker::Worker;
use super::{ActivateError, Activation, ActiveQueue, Interface, VirtioDevice, config};
use crate::byte_order::ByteOrder;
use crate::tap::{Header, Offloads, Tap};

/// Queues of a pair: one to receive, one to transmit.
const PAIR: usize = 2;
/// Descriptors of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The largest packet with its Ethernet header (section 5.1.6.3.1), behind the
/// virtio-net header.
const MAX_GSO_FRAME: usize = Header::MAX + 65_550;
/// Ethernet header and a VLAN tag.
const FRAME_OVERHEAD: usize = 14 + 4;

/// How a network device is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// The guest's address; see [`mac_for`].
    pub mac: [u8; 6],
    /// MTU that the driver is told to use, or `None`: its own default.
    pub mtu: Option<u16>,
    /// Descriptors in each receive and transmit queue: a power of two from 2 to
    /// 32768.
    pub queue_size: u16,
}

/// A virtio network device with as many pairs of queues as its tap has queues.
pub struct Net {
    name: String,
    backend: Arc<Backend>,
    options: NetOptions,
    /// The address as the driver sees it.
    mac: [u8; 6],
    queue_sizes: Vec<u16>,
    features: u64,
    /// No driver has used it since it was made or reset.
    fresh: bool,
    pairs: Vec<Worker<PairHandler>>,
    control: Option<Worker<ControlHandler>>,
}

/// The tap, and which of its queues are in use.
struct Backend {
    tap: Arc<Tap>,
    gates: Vec<Gate>,
}

/// Whether packets may flow through a pair. A worker holds the lock while it
/// receives, so that a pair that has been closed receives nothing more.
struct Gate {
    open: Mutex<bool>,
    /// Signalled to the pair's worker when `open` has changed.
    changed: EventFd,
}

impl Backend {
    /// Opens the first `count` pairs and closes the others.
    fn set_pairs(&self, count: usize) -> std::io::Result<()> {
        for (index, gate) in self.gates.iter().enumerate() {
            let mut open = gate.open.lock().unwrap_or_else(PoisonError::into_inner);
            self.tap.enable_queue(index, index < count)?;
            *open = index < count;
            // Fails only when the event is signalled already.
            let _ = gate.changed.write(1);
        }
        Ok(())
    }
}

impl Net {
    /// A device named `name` (such as `net0`) on `tap`.
    ///
    /// # Errors
    /// An event could not be made.
    pub fn new(name: &str, tap: Arc<Tap>, options: NetOptions) -> std::io::Result<Self> {
        let pairs = tap.queues();
        let mut features = 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_ECN;
        if options.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let mut queue_sizes = vec![options.queue_size; PAIR * pairs];
        if pairs > 1 {
            features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let gates = (0..pairs)
            .map(|_| {
                Ok(Gate {
                    open: Mutex::new(false),
                    changed: EventFd::new(EFD_NONBLOCK)?,
                })
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self {
            name: name.to_owned(),
            backend: Arc::new(Backend { tap, gates }),
            mac: options.mac,
            options,
            queue_sizes,
            features,
            fresh: true,
            pairs: Vec::new(),
            control: None,
        })
    }

    /// The configuration space (section 5.1.4).
    fn config(&self, order: ByteOrder) -> Vec<u8> {
        config::Layout::new(order)
            .bytes(self.mac)
            .number(VIRTIO_NET_S_LINK_UP as u16)
            .number(self.backend.gates.len() as u16)
            .number(self.options.mtu.unwrap_or(0))
            .done()
    }

    fn start_control(
        &self,
        queue: ActiveQueue,
        activation: &Activation,
    ) -> std::io::Result<Worker<ControlHandler>> {
        Worker::spawn(
            &format!("{}-ctrl", self.name),
            activation.mem.clone(),
            &activation.link,
            vec![queue],
            ControlHandler::new(
                Arc::clone(&self.backend),
                has(activation.features, VIRTIO_NET_F_MQ),
                activation.interface.order(),
            ),
        )
    }
}

/// Whether `features` has feature bit `bit`.
fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
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

    /// A legacy driver sets its address here (section 5.1.4.3). No packet is
    /// filtered by it, so that it changes nothing but what can be read.
    fn write_config(&mut self, interface: Interface, offset: u64, data: &[u8]) {
        if interface.is_legacy() {
            for (position, value) in config::written(offset, data, 0, self.mac.len()) {
                if let Some(byte) = self.mac.get_mut(position) {
                    *byte = value;
                }
            }
        }
    }

    fn reset(&mut self) {
        self.fresh = true;
        self.mac = self.options.mac;
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues = std::mem::take(&mut activation.queues);
        for needed in 0..PAIR as u16 {
            if !queues.iter().any(|queue| queue.index == needed) {
                return Err(ActivateError::MissingQueue(needed));
            }
        }
        let features = activation.features & self.features;
        let mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
        let header = Header {
            // Section 5.1.6.1: legacy drivers that have no use for the number of
            // buffers leave it out.
            counts_buffers: mergeable || !activation.interface.is_legacy(),
            order: activation.interface.order(),
        };
        let tap = &self.backend.tap;
        tap.set_header(header)?;
        tap.set_offloads(Offloads {
            checksum: has(features, VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(features, VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(features, VIRTIO_NET_F_GUEST_TSO6),
            ecn: has(features, VIRTIO_NET_F_GUEST_ECN),
        })?;
        // More pairs wait for the driver's command (section 5.1.6.5.5), which a
        // pause does not take back.
        if std::mem::take(&mut self.fresh) {
            self.backend.set_pairs(1)?;
            // What was sent to another driver may be larger than this one takes.
            tap.discard_waiting();
        }

        let large =
            has(features, VIRTIO_NET_F_GUEST_TSO4) || has(features, VIRTIO_NET_F_GUEST_TSO6);
        // One byte more than a packet has, to tell those that have been cut: an
        // interface's MTU can be raised while it is in use.
        let max_frame = 1 + if large {
            MAX_GSO_FRAME
        } else {
            header.bytes() + FRAME_OVERHEAD + tap.mtu() as usize
        };
        // The control queue comes after the pairs that the driver knows of.
        let pairs = if has(features, VIRTIO_NET_F_MQ) {
            self.backend.gates.len()
        } else {
            1
        };
        let (mut workers, mut control) = (Vec::with_capacity(pairs), None);
        let mut queues = queues.into_iter().peekable();
        while let Some(queue) = queues.next() {
            let pair = usize::from(queue.index) / PAIR;
            if pair >= pairs {
                control = Some(self.start_control(queue, &activation)?);
                break;
            }
            let mut of_pair = vec![queue];
            of_pair.extend(queues.next_if(|next| usize::from(next.index) / PAIR == pair));
            workers.push(Worker::spawn(
                &format!("{}-q{pair}", self.name),
                activation.mem.clone(),
                &activation.link,
                of_pair,
                PairHandler::new(
                    Arc::clone(&self.backend),
                    pair,
                    mergeable,
                    header,
                    max_frame,
                ),
            )?);
        }
        self.pairs = workers;
        self.control = control;
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let control = self.control.take().and_then(Worker::stop);
        let pairs = self.pairs.drain(..).filter_map(Worker::stop);
        let mut queues: Vec<ActiveQueue> = pairs.flat_map(|(_, queues)| queues).collect();
        queues.extend(control.into_iter().flat_map(|(_, queues)| queues));
        queues
    }
}
