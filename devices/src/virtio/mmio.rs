//! virtio over MMIO (virtio 1.2, section 4.2), register layout version 2.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::interrupt::{ISR_CONFIG, ISR_QUEUE, StatusLine};
use super::queue_config::{QueueArea, QueueConfig};
use super::transport::Transport;
use super::{VirtioDevice, VirtioInterrupt};
use crate::GuestMem;
use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::notify::{Doorbell, Doorbells};

/// Size of the register block, in bytes: 0x100 of registers, then the device's
/// configuration space.
pub const MMIO_SIZE: u64 = 0x200;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CXVM");

// Register offsets (section 4.2.2).
const MAGIC_VALUE: u64 = 0x000;
const VERSION_NUMBER: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const SHM_LEN_LOW: u64 = 0x0b0;
const SHM_BASE_HIGH: u64 = 0x0bc;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

/// A virtio device behind a block of memory-mapped registers.
///
/// It is little-endian on every architecture. The core places it on the bus at
/// the base address that [`new`](Self::new) was told, [`MMIO_SIZE`] bytes long.
pub struct VirtioMmio {
    transport: Transport,
    interrupt: Arc<StatusLine>,
    device_features_sel: AtomicU32,
    driver_features_sel: AtomicU32,
    queue_sel: AtomicU32,
    doorbells: Arc<dyn Doorbells>,
    base: u64,
    /// For each queue, whether its doorbell is attached.
    attached: Vec<bool>,
}

impl VirtioInterrupt for StatusLine {
    fn queue(&self, _index: u16) -> io::Result<()> {
        self.raise(ISR_QUEUE)
    }

    fn config(&self) -> io::Result<()> {
        self.raise(ISR_CONFIG)
    }
}

impl VirtioMmio {
    /// Puts `device` behind registers at guest-physical address `base`, with
    /// interrupts on `line`, and attaches its doorbells.
    ///
    /// The doorbells are attached once, here, and not at each activation:
    /// neither the register nor the events ever change, and while no vCPU runs
    /// an ioeventfd costs least. A doorbell that cannot be attached is served
    /// by the vCPU thread.
    ///
    /// # Errors
    /// An event file descriptor could not be made, or the device names a queue
    /// size that no driver can use.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMem,
        line: Arc<dyn IrqLine>,
        doorbells: Arc<dyn Doorbells>,
        base: u64,
    ) -> io::Result<Self> {
        let interrupt = Arc::new(StatusLine::new(line));
        let transport = Transport::new(
            device,
            mem,
            Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>,
        )?;
        let bell = Doorbell::Mmio(base.wrapping_add(QUEUE_NOTIFY));
        let attached = (0_u32..)
            .zip(transport.queue_events())
            .map(
                |(index, event)| match doorbells.attach(bell, Some(index), event) {
                    Ok(()) => true,
                    Err(error) => {
                        log::debug!("{}: no doorbell: {error}", transport.name());
                        false
                    }
                },
            )
            .collect();
        Ok(Self {
            transport,
            interrupt,
            device_features_sel: AtomicU32::new(0),
            driver_features_sel: AtomicU32::new(0),
            queue_sel: AtomicU32::new(0),
            doorbells,
            base,
            attached,
        })
    }

    /// The device's state machine, for pausing and resuming it.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Resets the device, as at the reset of the machine.
    pub fn reset(&self) {
        self.transport.reset();
        self.interrupt.acknowledge(u8::MAX);
        self.device_features_sel.store(0, Ordering::Relaxed);
        self.driver_features_sel.store(0, Ordering::Relaxed);
        self.queue_sel.store(0, Ordering::Relaxed);
    }

    fn queue(&self) -> Option<QueueConfig> {
        self.transport.queue(self.queue_sel.load(Ordering::Relaxed))
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION_NUMBER => VERSION,
            DEVICE_ID => self.transport.device_type(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => self
                .transport
                .device_features(self.device_features_sel.load(Ordering::Relaxed)),
            QUEUE_NUM_MAX => self.queue().map_or(0, |q| q.max_size.into()),
            QUEUE_READY => self.queue().map_or(0, |q| q.enabled.into()),
            INTERRUPT_STATUS => self.interrupt.status().into(),
            STATUS => self.transport.status().into(),
            // No device here has shared memory: its length, and so its base,
            // read as -1 whatever the region (section 4.2.2.1).
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.transport.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let transport = &self.transport;
        let queue = self.queue_sel.load(Ordering::Relaxed);
        let set_low = |area| transport.set_queue_address(queue, area, Some(value), None);
        let set_high = |area| transport.set_queue_address(queue, area, None, Some(value));
        match offset {
            DEVICE_FEATURES_SEL => self.device_features_sel.store(value, Ordering::Relaxed),
            DRIVER_FEATURES_SEL => self.driver_features_sel.store(value, Ordering::Relaxed),
            DRIVER_FEATURES => transport
                .set_driver_features(self.driver_features_sel.load(Ordering::Relaxed), value),
            QUEUE_SEL => self.queue_sel.store(value, Ordering::Relaxed),
            // A size beyond 16 bits becomes 0, which no activation accepts.
            QUEUE_NUM => transport.set_queue_size(queue, u16::try_from(value).unwrap_or(0)),
            QUEUE_READY if value & 1 != 0 => transport.enable_queue(queue),
            QUEUE_READY => transport.disable_queue(queue),
            QUEUE_NOTIFY => transport.notify(value),
            INTERRUPT_ACK => {
                self.interrupt.acknowledge((value & 0xff) as u8);
            }
            STATUS => match (value & 0xff) as u8 {
                0 => self.reset(),
                status => transport.set_status(status),
            },
            QUEUE_DESC_LOW => set_low(QueueArea::Descriptor),
            QUEUE_DESC_HIGH => set_high(QueueArea::Descriptor),
            QUEUE_DRIVER_LOW => set_low(QueueArea::Driver),
            QUEUE_DRIVER_HIGH => set_high(QueueArea::Driver),
            QUEUE_DEVICE_LOW => set_low(QueueArea::Device),
            QUEUE_DEVICE_HIGH => set_high(QueueArea::Device),
            _ => {}
        }
    }
}

impl BusDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(config) = offset.checked_sub(CONFIG) {
            return self.transport.read_config(config, data);
        }
        // Section 4.2.2.2: registers are accessed by aligned 32-bit words only.
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => {
                *word = self.read_register(offset).to_le_bytes()
            }
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(config) = offset.checked_sub(CONFIG) {
            return self.transport.write_config(config, data);
        }
        if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

impl Drop for VirtioMmio {
    fn drop(&mut self) {
        let bell = Doorbell::Mmio(self.base.wrapping_add(QUEUE_NOTIFY));
        let queues = (0_u32..).zip(self.transport.queue_events());
        for ((index, event), _) in queues
            .zip(&self.attached)
            .filter(|(_, attached)| **attached)
        {
            if let Err(error) = self.doorbells.detach(bell, Some(index), event) {
                log::warn!(
                    "{}: cannot detach a doorbell: {error}",
                    self.transport.name()
                );
            }
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
