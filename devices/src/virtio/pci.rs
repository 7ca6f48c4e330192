//! virtio over PCI (virtio 1.2, section 4.1): a modern device, without the
//! legacy interface.

mod common;
mod interrupt;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::common::{COMMON_SIZE, Common};
use self::interrupt::PciInterrupt;
use super::transport::Transport;
use super::{VirtioDevice, VirtioInterrupt};
use crate::GuestMem;
use crate::irq::{IrqLine, MsiVectors};
use crate::notify::{Doorbell, Doorbells};
use crate::pci::config::{
    self, Bar, COMMAND_INTX_DISABLE, ConfigError, ConfigSpace, DecodedBar, Identity,
    STATUS_INTERRUPT, Written,
};
use crate::pci::msix::{self, Msix};
use crate::pci::{Bdf, ConfigEffect, PciFunction};

/// Vendor ID of every virtio device (section 4.1.2).
pub const VENDOR: u16 = 0x1af4;
/// The device ID is the virtio device type beyond this.
pub const DEVICE_BASE: u16 = 0x1040;
/// Section 4.1.2.1: 0x40 or more marks a device without a legacy interface.
const SUBSYSTEM_BASE: u16 = 0x40;

/// The one BAR: 64 bits wide, in registers 0 and 1, and prefetchable as other
/// machines' virtio devices have it, so that it fits in a window of either kind.
const BAR: u8 = 0;
// Structures that an unprivileged program may be given (the doorbells, when a
// driver in user space runs the device) share no page with those that it must
// not touch (the MSI-X table), on guests with pages of up to 64 KiB.
/// Size of the BAR in bytes.
pub const BAR_SIZE: u64 = 0x4_0000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const ISR_SIZE: u64 = 1;
const DEVICE: u64 = 0x2000;
const DEVICE_SIZE: u64 = 0x1000;
const NOTIFY: u64 = 0x1_0000;
const NOTIFY_SIZE: u64 = 0x1_0000;
const TABLE: u64 = 0x2_0000;
const PENDING: u64 = 0x3_0000;
const PENDING_SIZE: u64 = 0x1_0000;

/// Bytes between the doorbells of two queues: an address for each, so that an
/// ioeventfd need not look at the value.
const NOTIFY_MULTIPLIER: u32 = 4;

const CAPABILITY_VENDOR: u8 = 0x09;
// Types of virtio structures (section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

// Fields of a capability of type CFG_PCI, from its start.
const ACCESS_BAR: usize = 4;
const ACCESS_OFFSET: usize = 8;
const ACCESS_LENGTH: usize = 12;
const ACCESS_DATA: usize = 16;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    transport: Transport,
    interrupt: Arc<PciInterrupt>,
    common: Common,
    config: Mutex<ConfigSpace>,
    /// Offsets of the capabilities that have side effects.
    msix_capability: Option<usize>,
    access_capability: usize,
    doorbells: Arc<dyn Doorbells>,
    /// The doorbells that are attached: queue and address.
    attached: Mutex<Vec<(usize, Doorbell)>>,
}

impl VirtioPci {
    /// Makes `device` a PCI function, to be added to a
    /// [`PciRoot`](crate::pci::PciRoot).
    ///
    /// With `vectors` it offers MSI-X with as many vectors as there are; one
    /// more than queues lets each queue have its own. Without them, or before
    /// the guest enables MSI-X, it asserts `intx` (pin INTA#).
    ///
    /// # Errors
    /// An event file descriptor could not be made, or the device names a queue
    /// size or a number of queues that no driver can use.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMem,
        vectors: Option<Arc<dyn MsiVectors>>,
        intx: Arc<dyn IrqLine>,
        doorbells: Arc<dyn Doorbells>,
    ) -> io::Result<Self> {
        let queues = device.queue_sizes().len();
        if queues as u64 * u64::from(NOTIFY_MULTIPLIER) > NOTIFY_SIZE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{}: {queues} queues are too many", device.name()),
            ));
        }
        let interrupt = Arc::new(PciInterrupt::new(queues, vectors, intx));
        let transport = Transport::new(
            device,
            mem,
            Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>,
        )?;
        let built = build_config(transport.device_type(), interrupt.msix());
        let (config, msix_capability, access_capability) = built.map_err(io::Error::other)?;
        Ok(Self {
            transport,
            interrupt,
            common: Common::default(),
            config: Mutex::new(config),
            msix_capability,
            access_capability,
            doorbells,
            attached: Mutex::default(),
        })
    }

    /// The device's state machine, for pausing and resuming it.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset_device(&self) {
        self.transport.reset();
        self.interrupt.reset();
        self.common.reset();
    }

    /// Follows the command and message control registers.
    fn update_interrupts(&self) {
        // Under the configuration's lock, so that of two writers the later one
        // has the last word here too.
        let config = self.config();
        let mut wired = config.command() & COMMAND_INTX_DISABLE == 0;
        if let (Some(msix), Some(capability)) = (self.interrupt.msix(), self.msix_capability) {
            msix.set_control(config.word(capability + msix::CONTROL));
            wired &= !msix.enabled();
        }
        self.interrupt.intx().enable(wired);
    }

    /// The offset and length in the BAR that an access at `register` of
    /// configuration space stands for, when it is the data field of the access
    /// capability and that is set up legally.
    fn access_window(&self, register: usize, len: usize) -> Option<(u64, usize)> {
        if register != self.access_capability + ACCESS_DATA {
            return None;
        }
        let config = self.config();
        let offset = config.dword(self.access_capability + ACCESS_OFFSET);
        let length = config.dword(self.access_capability + ACCESS_LENGTH);
        let [bar, _] = config
            .word(self.access_capability + ACCESS_BAR)
            .to_le_bytes();
        // Section 4.1.4.9.1: a length of 1, 2 or 4, and an offset that is a
        // multiple of it.
        let legal = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        let length = usize::try_from(length).ok()?;
        (legal && bar == BAR && length <= len).then_some((offset.into(), length))
    }

    fn detach_all(&self, attached: &mut Vec<(usize, Doorbell)>) {
        for (queue, bell) in attached.drain(..) {
            let Some(event) = self.transport.queue_events().get(queue) else {
                continue;
            };
            if let Err(error) = self.doorbells.detach(bell, None, event) {
                log::warn!(
                    "{}: cannot detach a doorbell: {error}",
                    self.transport.name()
                );
            }
        }
    }
}

impl PciFunction for VirtioPci {
    fn attach(&self, bdf: Bdf) {
        if let Some(msix) = self.interrupt.msix() {
            msix.set_requester(bdf.requester_id());
        }
    }

    fn bars(&self) -> Vec<(u8, Bar)> {
        self.config().bars().collect()
    }

    fn place_bar(&self, bar: u8, address: u64) {
        self.config().place_bar(bar, address);
    }

    fn config_read(&self, register: u16, data: &mut [u8]) {
        let register = usize::from(register);
        if let Some((offset, length)) = self.access_window(register, data.len()) {
            data.fill(0);
            if let Some(part) = data.get_mut(..length) {
                self.bar_read(BAR, offset, part);
            }
            return;
        }
        self.config().read(register, data);
        let pending = self.interrupt.intx().status() != 0
            && !self.interrupt.msix().is_some_and(Msix::enabled);
        if pending
            && let Some(at) = config::STATUS.checked_sub(register)
            && let Some(status) = data.get_mut(at)
        {
            *status |= STATUS_INTERRUPT;
        }
    }

    fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect {
        let register = usize::from(register);
        let Written { decode, .. } = self.config().write(register, data);
        self.update_interrupts();
        if let Some((offset, length)) = self.access_window(register, data.len())
            && let Some(part) = data.get(..length)
        {
            self.bar_write(BAR, offset, part);
        }
        ConfigEffect { decode }
    }

    fn decoded_bars(&self) -> Vec<DecodedBar> {
        self.config().decoded_bars()
    }

    fn bars_mapped(&self, mapped: &[(u8, u64)]) {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        self.detach_all(&mut attached);
        let Some((_, base)) = mapped.iter().find(|(bar, _)| *bar == BAR) else {
            return;
        };
        for (queue, event) in self.transport.queue_events().iter().enumerate() {
            let offset = NOTIFY + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
            let bell = Doorbell::Mmio(base.wrapping_add(offset));
            match self.doorbells.attach(bell, None, event) {
                Ok(()) => attached.push((queue, bell)),
                Err(error) => log::debug!("{}: no doorbell: {error}", self.transport.name()),
            }
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR {
            return;
        }
        let within = |start: u64, size: u64| (start..start + size).contains(&offset);
        if within(COMMON, COMMON_SIZE) {
            self.common
                .read(&self.transport, &self.interrupt, offset - COMMON, data);
        } else if offset == ISR {
            if let Some(byte) = data.first_mut() {
                *byte = self.interrupt.intx().acknowledge(u8::MAX);
            }
        } else if within(DEVICE, DEVICE_SIZE) {
            self.transport.read_config(offset - DEVICE, data);
        } else if let Some(msix) = self.interrupt.msix() {
            if within(TABLE, PENDING - TABLE) {
                msix.table_read(offset - TABLE, data);
            } else if within(PENDING, PENDING_SIZE) {
                msix.pending_read(offset - PENDING, data);
            }
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar != BAR {
            return;
        }
        let within = |start: u64, size: u64| (start..start + size).contains(&offset);
        if within(NOTIFY, NOTIFY_SIZE) {
            // The address names the queue; so does the value, but it is a copy.
            let queue = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
            self.transport.notify(queue as u32);
        } else if within(COMMON, COMMON_SIZE) {
            self.common.write(
                &self.transport,
                &self.interrupt,
                offset - COMMON,
                data,
                || self.reset_device(),
            );
        } else if within(DEVICE, DEVICE_SIZE) {
            self.transport.write_config(offset - DEVICE, data);
        } else if within(TABLE, PENDING - TABLE)
            && let Some(msix) = self.interrupt.msix()
        {
            msix.table_write(offset - TABLE, data);
        }
    }

    fn reset(&self) {
        self.reset_device();
        if let Some(msix) = self.interrupt.msix() {
            msix.reset();
        }
        self.config().reset();
        self.update_interrupts();
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut attached =
            std::mem::take(&mut *self.attached.lock().unwrap_or_else(PoisonError::into_inner));
        self.detach_all(&mut attached);
    }
}

/// Base class and sub-class that a device of this type shows, as operating
/// systems sort devices by it (PCI Code and ID Assignment Specification).
pub fn class(device_type: u32) -> u32 {
    match device_type {
        1 => 0x02_00_00,           // network: Ethernet
        2 | 8 => 0x01_00_00,       // block, SCSI host: mass storage, SCSI
        3 | 11 | 19 => 0x07_80_00, // console, vsock: communication, other
        16 => 0x03_80_00,          // GPU: display, other
        18 => 0x09_80_00,          // input: input device, other
        25 => 0x04_01_00,          // sound: multimedia, audio
        26 => 0x01_80_00,          // file system: mass storage, other
        _ => 0xff_00_00,           // fits no class
    }
}

/// The configuration space, and the offsets of its MSI-X capability and of the
/// capability for access to the BAR.
fn build_config(
    device_type: u32,
    msix: Option<&Msix>,
) -> Result<(ConfigSpace, Option<usize>, usize), ConfigError> {
    let type_id = (device_type & 0x3f) as u16;
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + type_id,
        revision: 1,
        class: class(device_type),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM_BASE + type_id,
    });
    config.set_interrupt_pin(1);
    config.add_bar(
        BAR,
        Bar {
            size: BAR_SIZE,
            wide: true,
            prefetchable: true,
        },
    )?;
    let msix_capability = msix
        .map(|msix| {
            config.add_capability(
                msix::CAPABILITY_ID,
                &msix.capability(BAR, TABLE as u32, PENDING as u32),
                &Msix::capability_writable(),
            )
        })
        .transpose()?;
    let structures: [(u8, u64, u64, &[u8]); 4] = [
        (CFG_COMMON, COMMON, COMMON_SIZE, &[]),
        (
            CFG_NOTIFY,
            NOTIFY,
            NOTIFY_SIZE,
            &NOTIFY_MULTIPLIER.to_le_bytes(),
        ),
        (CFG_ISR, ISR, ISR_SIZE, &[]),
        (CFG_DEVICE, DEVICE, DEVICE_SIZE, &[]),
    ];
    for (kind, offset, length, extra) in structures {
        config.add_capability(
            CAPABILITY_VENDOR,
            &structure(kind, offset, length, extra),
            &[],
        )?;
    }
    let mut writable = structure(0, 0, 0, &[0xff; 4]);
    // From the body's start: length and type are fixed, the BAR is not, then
    // come two bytes of padding; offset, length and data are free.
    for (at, mask) in writable.iter_mut().enumerate() {
        *mask = if at == ACCESS_BAR - 2 || at >= ACCESS_OFFSET - 2 {
            0xff
        } else {
            0
        };
    }
    let access_capability = config.add_capability(
        CAPABILITY_VENDOR,
        &structure(CFG_PCI, 0, 0, &[0; 4]),
        &writable,
    )?;
    Ok((config, msix_capability, access_capability))
}

/// The body of a virtio structure capability (section 4.1.4).
fn structure(kind: u8, offset: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    let size = 16 + extra.len() as u8;
    let mut body = vec![size, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(extra);
    body
}
