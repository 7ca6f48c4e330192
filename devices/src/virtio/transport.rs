//! What every virtio transport shares: device status, feature negotiation,
//! queue set-up, activation and reset (virtio 1.2, sections 2.1, 2.2 and 3.1).
//!
//! A transport (MMIO, PCI, CCW) decodes its registers into calls on
//! [`Transport`], which holds the device and keeps every promise that the
//! specification makes about order. Nothing that a driver does here is an
//! error of the VMM: what is out of order is ignored, and a queue that cannot
//! work ends in DEVICE_NEEDS_RESET.
//!
//! A transport that is transitional says by [`Transport::set_interface`] that a
//! driver uses the legacy interface. There the driver does not end feature
//! negotiation, so that DRIVER_OK activates the device without FEATURES_OK, and
//! features that were not offered are ignored; and it may use queues before
//! DRIVER_OK (section 3.1.2): its first notification activates the device with
//! the queues that there are then, and with the features accepted by then. A
//! queue that is set up later joins them. A legacy driver has no way to see
//! DEVICE_NEEDS_RESET: what is broken stays still until it resets the device, and
//! the interrupt that comes with that bit tells it of a configuration in which
//! nothing has changed.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue_config::{QueueArea, QueueConfig};
use super::{
    ActivateError, Activation, ActiveQueue, DriverLink, Interface, VirtioDevice, VirtioInterrupt,
};
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

/// The features of the rings, which every device has.
const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
/// What a legacy driver can be offered: one word of features.
const LEGACY_FEATURES: u64 = 0xffff_ffff;

/// As much of a configuration space as is watched for changes; every device of
/// virtio 1.2 fits in.
const CONFIG_WATCHED: usize = 256;

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
    interface: Interface,
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
                interface: Interface::default(),
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

    /// By which interface the driver goes on from here; the device is reset when
    /// it was another one so far, which is returned. It is kept over resets.
    pub fn set_interface(&self, interface: Interface) -> bool {
        let mut state = self.state();
        let another = state.interface != interface;
        if another {
            self.reset_state(&mut state);
            state.interface = interface;
        }
        another
    }

    /// Handles a notification before the device runs: that of a legacy driver
    /// that has set DRIVER activates it. Whether it did.
    pub fn activate_early(&self) -> bool {
        let mut state = self.state();
        let seen = STATUS_DRIVER | STATUS_FAILED | STATUS_NEEDS_RESET;
        let waits = state.interface.is_legacy()
            && matches!(state.run, Run::Idle)
            && self.with_needs_reset(state.status) & seen == STATUS_DRIVER;
        if waits {
            self.activate(&mut state);
        }
        waits && matches!(state.run, Run::Active)
    }

    /// Whether notifications are to reach [`activate_early`](Self::activate_early),
    /// rather than the queues' events alone.
    pub fn awaits_notification(&self) -> bool {
        let state = self.state();
        state.interface.is_legacy() && matches!(state.run, Run::Idle)
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

    /// The driver accepts 32 bits of features. Ignored once FEATURES_OK is set;
    /// a legacy driver has one word of them, until the device runs.
    pub fn set_driver_features(&self, select: u32, value: u32) {
        let mut state = self.state();
        let over = match state.interface {
            Interface::Modern => state.status & STATUS_FEATURES_OK != 0,
            Interface::Legacy(_) => select > 0 || !matches!(state.run, Run::Idle),
        };
        if over {
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
        let legacy = state.interface.is_legacy();
        if legacy {
            // A bit without a meaning.
            new &= !STATUS_FEATURES_OK;
        }
        if new & STATUS_FEATURES_OK != 0 && !state.features_acceptable() {
            log::debug!(
                "{}: the driver's features {:#x} are refused",
                self.name,
                state.driver_features
            );
            new &= !STATUS_FEATURES_OK;
        }
        let negotiated = legacy || (state.status | new) & STATUS_FEATURES_OK != 0;
        let before = self.with_needs_reset(state.status);
        let failed = (before | new) & (STATUS_FAILED | STATUS_NEEDS_RESET) != 0;
        if new & STATUS_DRIVER_OK != 0 && (!negotiated || failed) {
            new &= !STATUS_DRIVER_OK;
        }
        state.status |= new;
        if new & STATUS_DRIVER_OK != 0 && matches!(state.run, Run::Idle) {
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
    /// set up before DRIVER_OK (section 3.1.1). By the legacy interface a device
    /// may run before all are there.
    pub fn enable_queue(&self, index: u32) {
        let mut state = self.state();
        let legacy = state.interface.is_legacy();
        if !legacy && state.status & STATUS_DRIVER_OK != 0 {
            log::debug!("{}: queue {index} enabled after DRIVER_OK", self.name);
            return;
        }
        match state.queue_mut(index) {
            Some(queue) => queue.enabled = true,
            None => return,
        }
        if legacy
            && !matches!(state.run, Run::Idle)
            && let Some(late) = self.active_queue(&state, index)
        {
            self.change_queues(&mut state, |queues| {
                queues.push(late);
                queues.sort_by_key(|queue| queue.index);
            });
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
        self.change_queues(&mut state, |queues| {
            queues.retain(|q| u32::from(q.index) != index);
        });
    }

    /// Changes which queues the device has, if it is working.
    fn change_queues(&self, state: &mut State, change: impl FnOnce(&mut Vec<ActiveQueue>)) {
        match std::mem::replace(&mut state.run, Run::Idle) {
            Run::Idle => {}
            Run::Active => {
                let mut queues = state.device.deactivate();
                change(&mut queues);
                self.start(state, queues);
            }
            Run::Paused(mut queues) => {
                change(&mut queues);
                state.run = Run::Paused(queues);
            }
        }
    }

    /// Reads the configuration space; zeroes beyond its end.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        state.device.read_config(state.interface, offset, data);
    }

    /// Writes the configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let interface = state.interface;
        state.device.write_config(interface, offset, data);
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
        state.device.read_config(state.interface, 0, &mut now);
        if now != state.config_seen {
            state.config_seen = now;
            state.generation = state.generation.wrapping_add(1);
        }
        state.generation
    }

    /// Resets the device (section 2.4): when this returns, it does not touch
    /// guest memory any more, and everything is as it was at the start.
    pub fn reset(&self) {
        self.reset_state(&mut self.state());
    }

    fn reset_state(&self, state: &mut State) {
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
        let mut active = Vec::new();
        for (index, config) in (0_u32..).zip(&state.queues) {
            if !config.enabled {
                continue;
            }
            match self.active_queue(state, index) {
                Some(queue) => active.push(queue),
                None => return,
            }
        }
        match self.try_start(state, active) {
            Ok(()) => {}
            // A driver that used one queue before it has set up others.
            Err(error @ ActivateError::MissingQueue(_)) if state.status & STATUS_DRIVER_OK == 0 => {
                log::debug!("{}: not yet: {error}", self.name);
            }
            Err(error) => self.give_up(&error),
        }
    }

    /// Queue `index` for the device, at its start; without it, the device needs
    /// a reset.
    fn active_queue(&self, state: &State, index: u32) -> Option<ActiveQueue> {
        let at = usize::try_from(index).ok()?;
        let (config, event) = (state.queues.get(at)?, self.events.get(at)?);
        let event_idx = state.accepted() & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mem = self.mem.memory();
        let Some(queue) = config.rings(&*mem, event_idx, state.interface.order()) else {
            log::warn!("{}: the driver's queue {index} is invalid", self.name);
            self.needs_reset();
            return None;
        };
        match event.try_clone() {
            Ok(notify) => Some(ActiveQueue {
                index: u16::try_from(index).ok()?,
                queue,
                notify,
            }),
            Err(error) => {
                log::warn!("{}: cannot duplicate a queue event: {error}", self.name);
                self.needs_reset();
                None
            }
        }
    }

    fn start(&self, state: &mut State, queues: Vec<ActiveQueue>) {
        if let Err(error) = self.try_start(state, queues) {
            self.give_up(&error);
        }
    }

    /// Has the device, which is idle, work on `queues`; they are lost if it cannot.
    fn try_start(&self, state: &mut State, queues: Vec<ActiveQueue>) -> Result<(), ActivateError> {
        let activation = Activation {
            mem: self.mem.clone(),
            features: state.accepted(),
            interface: state.interface,
            link: Arc::clone(&self.link),
            queues,
        };
        state.device.activate(activation)?;
        state.run = Run::Active;
        Ok(())
    }

    fn give_up(&self, error: &ActivateError) {
        log::warn!("{}: {error}", self.name);
        self.needs_reset();
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
        let features = self.device.features() | RING_FEATURES;
        match self.interface {
            Interface::Modern => features | 1 << VIRTIO_F_VERSION_1,
            // All devices take headers and data in descriptors of any layout.
            Interface::Legacy(_) => (features | 1 << VIRTIO_F_ANY_LAYOUT) & LEGACY_FEATURES,
        }
    }

    /// The features that are in effect. A legacy driver cannot be told that it
    /// accepted too many.
    fn accepted(&self) -> u64 {
        match self.interface {
            Interface::Modern => self.driver_features,
            Interface::Legacy(_) => self.driver_features & self.offered(),
        }
    }

    /// Section 2.2.2: a subset of what is offered; and this is not the legacy
    /// interface, so VERSION_1 must be among it.
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
