//! What every virtio transport shares: device status, feature negotiation,
//! queue set-up, activation and reset (virtio 1.2, sections 2.1, 2.2 and 3.1).
//!
//! A transport (MMIO, PCI, CCW) decodes its registers into calls on
//! [`Transport`], which holds the device and keeps every promise that the
//! specification makes about order. Nothing that a driver does here is an
//! error of the VMM: what is out of order is ignored, and a queue that cannot
//! work ends in DEVICE_NEEDS_RESET.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, DriverLink, VirtioDevice, VirtioInterrupt};
use crate::GuestMem;

/// Device status: the driver has noticed the device (section 2.1).
pub const STATUS_ACKNOWLEDGE: u8 = 1;
/// Device status: the driver knows how to drive the device.
pub const STATUS_DRIVER: u8 = 2;
/// Device status: the driver is set up and the device runs.
pub const STATUS_DRIVER_OK: u8 = 4;
/// Device status: feature negotiation is complete.
pub const STATUS_FEATURES_OK: u8 = 8;
/// Device status: the device met an error that only a reset clears.
pub const STATUS_NEEDS_RESET: u8 = 64;
/// Device status: the driver has given up.
pub const STATUS_FAILED: u8 = 128;

/// The status bits that a driver can set.
const DRIVER_STATUS: u8 =
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED;

/// The features that a transport offers for every device: those of the virtio
/// version and of the ring, which the `virtio-queue` crate implements.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// As much of a configuration space as is watched for changes; every device of
/// virtio 1.2 fits in.
const CONFIG_WATCHED: usize = 256;

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
    fn new(max_size: u16) -> Self {
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
    fn rings<M: GuestMemory>(&self, mem: &M, event_idx: bool) -> Option<Queue> {
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
        queue.is_valid(mem).then_some(queue)
    }
}

/// What the device is doing.
#[derive(Debug)]
enum Run {
    /// Not activated, or stopped by an error.
    Idle,
    /// Activated; the device has the queues.
    Active,
    /// Stopped by [`Transport::pause`]; the queues wait here.
    Paused(Vec<ActiveQueue>),
}

struct State {
    device: Box<dyn VirtioDevice>,
    run: Run,
    status: u8,
    driver_features: u64,
    /// The driver accepted a feature bit of 64 or above; none is offered.
    accepted_unknown: bool,
    queues: Vec<QueueConfig>,
    generation: u32,
    config_seen: [u8; CONFIG_WATCHED],
}

/// A virtio device behind a transport.
///
/// Every method may be called from any thread. Dropping it stops the device.
pub struct Transport {
    name: String,
    device_type: u32,
    mem: GuestMem,
    link: Arc<DriverLink>,
    /// One per queue; the device is given a duplicate of each.
    events: Vec<EventFd>,
    state: Mutex<State>,
}

impl Transport {
    /// Takes `device` in, not yet activated. `interrupt` is what the device
    /// will raise; it must not call back into this transport.
    ///
    /// # Errors
    /// An event file descriptor could not be made, or the device names a queue
    /// size that is no power of 2 up to 32768.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMem,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> io::Result<Self> {
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .map(|&max| QueueConfig::new(max))
            .collect();
        if let Some(bad) = queues.iter().find(|q| Queue::new(q.max_size).is_err()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{}: a queue size of {} is not a power of 2 up to 32768",
                    device.name(),
                    bad.max_size
                ),
            ));
        }
        let events = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            name: device.name().to_owned(),
            device_type: device.device_type(),
            mem,
            link: Arc::new(DriverLink::new(interrupt)),
            events,
            state: Mutex::new(State {
                device,
                run: Run::Idle,
                status: 0,
                driver_features: 0,
                accepted_unknown: false,
                queues,
                generation: 0,
                config_seen: [0; CONFIG_WATCHED],
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's name, as [`VirtioDevice::name`] gives it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device ID (virtio 1.2, section 5).
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// The number of queues.
    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.events.len()).unwrap_or(u16::MAX)
    }

    /// What the driver's notification of each queue signals, by queue index;
    /// the same for as long as the transport lives.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    /// Handles a notification that reached the vCPU thread, for want of an
    /// ioeventfd. An unknown queue is ignored.
    pub fn notify(&self, index: u32) {
        let event = usize::try_from(index).ok().and_then(|i| self.events.get(i));
        if let Some(event) = event {
            // It fails only when the counter is full, and then it is signalled.
            let _ = event.write(1);
        }
    }

    /// 32 bits of the offered features; `select` counts in words.
    pub fn device_features(&self, select: u32) -> u32 {
        let offered = self.state().offered();
        match select {
            0 => low(offered),
            1 => high(offered),
            _ => 0,
        }
    }

    /// 32 bits of the features that the driver has accepted so far.
    pub fn driver_features(&self, select: u32) -> u32 {
        let accepted = self.state().driver_features;
        match select {
            0 => low(accepted),
            1 => high(accepted),
            _ => 0,
        }
    }

    /// The driver accepts 32 bits of features. Ignored once FEATURES_OK is set.
    pub fn set_driver_features(&self, select: u32, value: u32) {
        let mut state = self.state();
        if state.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        match select {
            0 => set_low(&mut state.driver_features, value),
            1 => set_high(&mut state.driver_features, value),
            _ => state.accepted_unknown |= value != 0,
        }
    }

    /// The device status byte.
    pub fn status(&self) -> u8 {
        self.with_needs_reset(self.state().status)
    }

    /// The driver writes the device status byte: 0 resets, anything else adds
    /// bits. FEATURES_OK stays clear when the features are refused, and
    /// DRIVER_OK activates the device.
    ///
    /// The caller resets what is its own (selectors, vectors, interrupt
    /// status) after a reset.
    pub fn set_status(&self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let mut state = self.state();
        let mut new = value & DRIVER_STATUS & !state.status;
        if new & STATUS_FEATURES_OK != 0 && !state.features_acceptable() {
            log::debug!(
                "{}: the driver's features {:#x} are refused",
                self.name,
                state.driver_features
            );
            new &= !STATUS_FEATURES_OK;
        }
        let negotiated = (state.status | new) & STATUS_FEATURES_OK != 0;
        let before = self.with_needs_reset(state.status);
        let failed = (before | new) & (STATUS_FAILED | STATUS_NEEDS_RESET) != 0;
        if new & STATUS_DRIVER_OK != 0 && (!negotiated || failed) {
            new &= !STATUS_DRIVER_OK;
        }
        state.status |= new;
        if new & STATUS_DRIVER_OK != 0 {
            self.activate(&mut state);
        }
    }

    /// The set-up of queue `index`; none when there is no such queue.
    pub fn queue(&self, index: u32) -> Option<QueueConfig> {
        let index = usize::try_from(index).ok()?;
        self.state().queues.get(index).copied()
    }

    /// The driver chooses a queue's size. Ignored while the queue is enabled.
    pub fn set_queue_size(&self, index: u32, size: u16) {
        self.configure(index, |queue| queue.size = size);
    }

    /// The driver places an area of a queue; a half of the address that is
    /// `None` stays as it is. Ignored while the queue is enabled.
    pub fn set_queue_address(
        &self,
        index: u32,
        area: QueueArea,
        low: Option<u32>,
        high: Option<u32>,
    ) {
        self.configure(index, |queue| {
            let address = match area {
                QueueArea::Descriptor => &mut queue.descriptor,
                QueueArea::Driver => &mut queue.driver,
                QueueArea::Device => &mut queue.device,
            };
            if let Some(low) = low {
                set_low(address, low);
            }
            if let Some(high) = high {
                set_high(address, high);
            }
        });
    }

    /// The driver enables a queue. Ignored once the device runs: queues are
    /// set up before DRIVER_OK (section 3.1.1).
    pub fn enable_queue(&self, index: u32) {
        let mut state = self.state();
        if state.status & STATUS_DRIVER_OK != 0 {
            log::debug!("{}: queue {index} enabled after DRIVER_OK", self.name);
            return;
        }
        if let Some(queue) = state.queue_mut(index) {
            queue.enabled = true;
        }
    }

    /// The driver disables a queue (virtio-mmio's QueueReady written with 0).
    /// When this returns, the device does not use the queue any more.
    pub fn disable_queue(&self, index: u32) {
        let mut state = self.state();
        match state.queue_mut(index) {
            Some(queue) if queue.enabled => queue.enabled = false,
            _ => return,
        }
        match std::mem::replace(&mut state.run, Run::Idle) {
            Run::Idle => {}
            Run::Active => {
                let mut queues = state.device.deactivate();
                queues.retain(|q| u32::from(q.index) != index);
                self.start(&mut state, queues);
            }
            Run::Paused(mut queues) => {
                queues.retain(|q| u32::from(q.index) != index);
                state.run = Run::Paused(queues);
            }
        }
    }

    /// Reads the configuration space; zeroes beyond its end.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.state().device.read_config(offset, data);
    }

    /// Writes the configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.state().device.write_config(offset, data);
    }

    /// The generation of the configuration space (section 2.5.2): it differs
    /// from that of an earlier call when anything in the space has changed
    /// since, so that a driver can tell that what it read in between belongs
    /// together.
    pub fn config_generation(&self) -> u32 {
        // Compared here rather than counted when the device reports a change:
        // a report comes after the change, and a driver that reads in between
        // would see two halves under one generation.
        let mut state = self.state();
        let mut now = [0; CONFIG_WATCHED];
        state.device.read_config(0, &mut now);
        if now != state.config_seen {
            state.config_seen = now;
            state.generation = state.generation.wrapping_add(1);
        }
        state.generation
    }

    /// Resets the device (section 2.4): when this returns, it does not touch
    /// guest memory any more, and everything is as it was at the start.
    pub fn reset(&self) {
        let mut state = self.state();
        drop(state.device.deactivate());
        state.device.reset();
        // No worker is left that could set it again.
        self.link.reset();
        state.run = Run::Idle;
        state.status = 0;
        state.driver_features = 0;
        state.accepted_unknown = false;
        for queue in &mut state.queues {
            *queue = QueueConfig::new(queue.max_size);
        }
        for event in &self.events {
            // What was rung before the reset concerns nobody after it.
            let _ = event.read();
        }
    }

    /// Stops the device's work and keeps its queues, for a pause or a snapshot
    /// of the machine. The vCPUs must have stopped before.
    pub fn pause(&self) {
        let mut state = self.state();
        if matches!(state.run, Run::Active) {
            let queues = state.device.deactivate();
            state.run = Run::Paused(queues);
        }
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&self) {
        let mut state = self.state();
        match std::mem::replace(&mut state.run, Run::Idle) {
            Run::Paused(queues) => self.start(&mut state, queues),
            other => state.run = other,
        }
    }

    fn configure(&self, index: u32, change: impl FnOnce(&mut QueueConfig)) {
        if let Some(queue) = self.state().queue_mut(index).filter(|q| !q.enabled) {
            change(queue);
        }
    }

    fn activate(&self, state: &mut State) {
        let event_idx = state.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mem = self.mem.memory();
        let mut active = Vec::new();
        for (index, (config, event)) in (0_u16..).zip(state.queues.iter().zip(&self.events)) {
            if !config.enabled {
                continue;
            }
            let Some(queue) = config.rings(&*mem, event_idx) else {
                log::warn!("{}: the driver's queue {index} is invalid", self.name);
                return self.needs_reset();
            };
            match event.try_clone() {
                Ok(notify) => active.push(ActiveQueue {
                    index,
                    queue,
                    notify,
                }),
                Err(error) => {
                    log::warn!("{}: cannot duplicate a queue event: {error}", self.name);
                    return self.needs_reset();
                }
            }
        }
        self.start(state, active);
    }

    fn start(&self, state: &mut State, queues: Vec<ActiveQueue>) {
        let activation = Activation {
            mem: self.mem.clone(),
            features: state.driver_features,
            link: Arc::clone(&self.link),
            queues,
        };
        match state.device.activate(activation) {
            Ok(()) => state.run = Run::Active,
            Err(error) => {
                log::warn!("{}: {error}", self.name);
                state.run = Run::Idle;
                self.needs_reset();
            }
        }
    }

    fn needs_reset(&self) {
        if let Err(error) = self.link.set_needs_reset() {
            log::warn!("{}: cannot interrupt the driver: {error}", self.name);
        }
    }

    fn with_needs_reset(&self, status: u8) -> u8 {
        match self.link.needs_reset() {
            true => status | STATUS_NEEDS_RESET,
            false => status,
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        drop(self.state().device.deactivate());
    }
}

impl State {
    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// Section 2.2.2: a subset of what is offered; and there is no legacy
    /// interface here, so VERSION_1 must be among it.
    fn features_acceptable(&self) -> bool {
        !self.accepted_unknown
            && self.driver_features & !self.offered() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn queue_mut(&mut self, index: u32) -> Option<&mut QueueConfig> {
        self.queues.get_mut(usize::try_from(index).ok()?)
    }
}

/// The low half of a 64-bit register.
pub(super) fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// The high half of a 64-bit register.
pub(super) fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !0xffff_ffff | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0xffff_ffff | u64::from(high) << 32;
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
