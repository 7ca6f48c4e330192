//! Virtio 1.2 devices and the transports that carry them.
//!
//! A device model ([`VirtioDevice`]) knows its queues, features and
//! configuration space. A transport knows how a driver finds it, negotiates
//! and rings. Neither knows the other, nor an architecture.

pub mod block;
pub mod buffers;
pub mod ccw;
mod config;
pub mod console;
#[cfg(test)]
mod doubles;
pub mod input;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue_config;
pub mod ring;
pub mod rng;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use self::ring::Ring;
use crate::GuestMem;
use crate::byte_order::ByteOrder;

/// By which rules a driver and its device speak (virtio 1.2, section 1.3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interface {
    /// Those of virtio 1.x, where everything is little-endian.
    #[default]
    Modern,
    /// Those from before: rings, configuration space and headers are in the
    /// guest's byte order, and VERSION_1 is not negotiated.
    Legacy(ByteOrder),
}

impl Interface {
    /// The byte order of what driver and device share.
    pub fn order(self) -> ByteOrder {
        match self {
            Interface::Modern => ByteOrder::Little,
            Interface::Legacy(order) => order,
        }
    }

    /// Whether it is the legacy one.
    pub fn is_legacy(self) -> bool {
        matches!(self, Interface::Legacy(_))
    }
}

/// Interrupts from a device to its driver, whatever the transport makes of them.
pub trait VirtioInterrupt: Send + Sync {
    /// Buffers of queue `index` have been used.
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    fn queue(&self, index: u16) -> io::Result<()>;

    /// The configuration space has changed.
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    fn config(&self) -> io::Result<()>;
}

/// What a device says to its driver.
pub struct DriverLink {
    interrupt: Arc<dyn VirtioInterrupt>,
    needs_reset: AtomicBool,
}

impl DriverLink {
    /// To the driver behind `interrupt`.
    pub fn new(interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        Self {
            interrupt,
            needs_reset: AtomicBool::new(false),
        }
    }

    /// Buffers of queue `index` have been used.
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    pub fn used(&self, index: u16) -> io::Result<()> {
        self.interrupt.queue(index)
    }

    /// The configuration space has changed.
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    pub fn config_changed(&self) -> io::Result<()> {
        self.interrupt.config()
    }

    /// The device has met an error that only a reset clears: its status says so
    /// from here on, and the driver is interrupted for that (virtio 1.2,
    /// section 2.1.2).
    ///
    /// # Errors
    /// The interrupt could not be delivered; the status is as it should be.
    pub fn set_needs_reset(&self) -> io::Result<()> {
        match self.needs_reset.swap(true, Ordering::AcqRel) {
            true => Ok(()),
            false => self.interrupt.config(),
        }
    }

    fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    fn reset(&self) {
        self.needs_reset.store(false, Ordering::Release);
    }
}

/// A queue that the driver has set up and enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The queue's number in the device.
    pub index: u16,
    /// Its rings.
    pub queue: Ring,
    /// Signalled by the driver's notification. It does not block: a read that
    /// finds nothing is an error of kind `WouldBlock`.
    pub notify: EventFd,
}

/// What a device is given when its driver sets DRIVER_OK, or uses it before that
/// as legacy drivers may.
pub struct Activation {
    /// Guest memory, where the rings and buffers are.
    pub mem: GuestMem,
    /// The negotiated feature bits, a subset of what the device and its
    /// transport offered.
    pub features: u64,
    /// How the driver speaks.
    pub interface: Interface,
    /// The way to the driver.
    pub link: Arc<DriverLink>,
    /// The queues that the driver enabled, by rising index.
    pub queues: Vec<ActiveQueue>,
}

/// Why a device could not start.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot work without.
    #[error("the driver did not enable queue {0}")]
    MissingQueue(u16),
    /// A thread or an event source could not be made.
    #[error("cannot start the device's worker: {0}")]
    Worker(#[from] io::Error),
}

/// A virtio device model, free of transport and architecture.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// A name for messages and thread names, such as `disk0`.
    fn name(&self) -> &str;

    /// Feature bits that the device offers. The transport adds those that are
    /// its own or the ring's (VERSION_1, RING_INDIRECT_DESC, RING_EVENT_IDX, ...).
    fn features(&self) -> u64;

    /// The largest size of each queue, in descriptors; its length is the number
    /// of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Whether a driver may use the legacy interface: devices that came with
    /// virtio 1.0 or later have none.
    fn has_legacy_interface(&self) -> bool {
        false
    }

    /// Reads the configuration space as `interface` has it; beyond its end it
    /// reads as zeroes.
    fn read_config(&self, interface: Interface, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; what is read-only by `interface` or
    /// beyond its end is ignored.
    fn write_config(&mut self, interface: Interface, offset: u64, data: &[u8]);

    /// Starts the device's work, on threads of its own.
    ///
    /// # Errors
    /// See [`ActivateError`]; the transport then sets DEVICE_NEEDS_RESET, unless a
    /// legacy driver has yet to set up the queue that is missing.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// The driver has reset the device, which is not active: what a driver can
    /// set is as it was at the start.
    fn reset(&mut self) {}

    /// Stops the work and hands the queues back with their positions; when it
    /// returns, nothing of the device touches guest memory any more. Activating
    /// again with these queues goes on where it stopped, which is how a device
    /// is paused or given others, too; dropping them is a reset. On a device that
    /// is not active it does nothing.
    fn deactivate(&mut self) -> Vec<ActiveQueue>;
}
