//! virtio over channel I/O (virtio 1.2, section 4.3).
//!
//! Revisions 1 and 2: like those on PCI, these devices are not transitional.
//! Revision 0, the legacy interface, has rings and configuration space in the
//! guest's byte order, and each kind of device has headers of its own in it. A
//! driver that asks for it, or that asks for no revision before it does anything
//! else, which is how a legacy driver is told (section 4.3.2.1.3), is answered
//! by command reject. The payloads of commands are big-endian, features and
//! configuration space little-endian.

mod interrupt;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::interrupt::{CcwInterrupt, Indicators};
use super::transport::{QueueArea, STATUS_FEATURES_OK, Transport, high, low};
use super::{VirtioDevice, VirtioInterrupt};
use crate::GuestMem;
use crate::css::ccw::Check;
use crate::css::{Answer, ControlUnit, SENSE_COMMAND_REJECT, SenseId, Subchannel, Transfer};
use crate::irq::{AdapterIndicator, AdapterVectors};
use crate::notify::{Doorbell, Doorbells};

/// The control unit's type (section 4.3.1).
pub const CONTROL_UNIT: u16 = 0x3832;

/// The newest revision that is offered.
const REVISION: u16 = 2;

/// Channel commands (section 4.3.1.2).
pub mod command {
    /// Set up a virtqueue.
    pub const SET_VQ: u8 = 0x13;
    /// Reset the device.
    pub const VDEV_RESET: u8 = 0x33;
    /// Set the address of the queues' indicators.
    pub const SET_IND: u8 = 0x43;
    /// Set the address of the indicators of configuration changes.
    pub const SET_CONF_IND: u8 = 0x53;
    /// Set up adapter interruptions.
    pub const SET_IND_ADAPTER: u8 = 0x73;
    /// Read 32 feature bits.
    pub const READ_FEAT: u8 = 0x12;
    /// Accept 32 feature bits.
    pub const WRITE_FEAT: u8 = 0x11;
    /// Read the configuration space.
    pub const READ_CONF: u8 = 0x22;
    /// Write the configuration space.
    pub const WRITE_CONF: u8 = 0x21;
    /// Write the device status.
    pub const WRITE_STATUS: u8 = 0x31;
    /// Read a virtqueue's largest size.
    pub const READ_VQ_CONF: u8 = 0x32;
    /// Read the device status.
    pub const READ_STATUS: u8 = 0x72;
    /// Negotiate the revision.
    pub const SET_VIRTIO_REV: u8 = 0x83;
}

/// The largest configuration space that is transferred, in bytes; those of
/// virtio 1.2 are far smaller.
const CONFIG_MAX: usize = 4096;

/// Most queues for which classic indicators have bits.
const CLASSIC_QUEUES: u16 = 64;

/// A virtio device behind a subchannel.
pub struct VirtioCcw {
    transport: Transport,
    interrupt: Arc<CcwInterrupt>,
    subchannel: u32,
    doorbells: Arc<dyn Doorbells>,
    /// For each queue, whether its doorbell is attached.
    attached: Vec<bool>,
    /// The revision in use; none before the driver has chosen one.
    revision: Mutex<Option<u16>>,
}

impl VirtioCcw {
    /// Puts `device` behind `subchannel` and attaches its doorbells. With
    /// `vectors` its adapter interruptions are delivered by them, one vector
    /// for each queue; without, the device's own threads do it.
    ///
    /// # Errors
    /// An event file descriptor could not be made, or the device names a queue
    /// size that no driver can use.
    pub fn connect(
        device: Box<dyn VirtioDevice>,
        mem: GuestMem,
        subchannel: &Arc<Subchannel>,
        vectors: Option<Arc<dyn AdapterVectors>>,
        doorbells: Arc<dyn Doorbells>,
    ) -> io::Result<Arc<Self>> {
        let interrupt = Arc::new(CcwInterrupt::new(mem.clone(), subchannel, vectors));
        let transport = Transport::new(
            device,
            mem,
            Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>,
        )?;
        let id = subchannel.id();
        let attach = |(index, event)| match doorbells.attach(Doorbell::Ccw(id), Some(index), event)
        {
            Ok(()) => true,
            Err(error) => {
                log::debug!("{}: no doorbell: {error}", transport.name());
                false
            }
        };
        let attached = (0_u32..)
            .zip(transport.queue_events())
            .map(attach)
            .collect();
        let unit = Arc::new(Self {
            transport,
            interrupt,
            subchannel: id,
            doorbells,
            attached,
            revision: Mutex::new(None),
        });
        subchannel.connect(unit.clone());
        Ok(unit)
    }

    /// The device's state machine, for pausing and resuming it.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    fn revision(&self) -> MutexGuard<'_, Option<u16>> {
        self.revision.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset_device(&self) {
        self.transport.reset();
        self.interrupt.reset();
    }

    /// Revision and length; no data follows in the revisions that are offered.
    fn set_revision(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let mut revision = self.revision();
        let bytes: [u8; 4] = payload(transfer)?;
        let [number, length] = halves(bytes);
        // Section 4.3.2.1.1: not again until the device is reset or disabled.
        let known = (1..=REVISION).contains(&number) && length == 0;
        if !known || revision.is_some() {
            return Ok(REJECTED);
        }
        *revision = Some(number);
        Ok(Answer::Done)
    }

    /// Descriptor table, reserved word, index, size, available ring, used ring.
    fn set_queue(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let bytes: [u8; 32] = payload(transfer)?;
        let [descriptor, middle, driver, device] = doublewords(bytes);
        let (index, size) = ((middle >> 16 & 0xffff) as u32, (middle & 0xffff) as u16);
        let transport = &self.transport;
        if transport.queue(index).is_none() {
            return Ok(REJECTED);
        }
        // A queue that is set up anew is stopped first; a size of 0 or no
        // address leaves it so, which is how Linux gives a queue up.
        transport.disable_queue(index);
        if size == 0 || descriptor == 0 {
            return Ok(Answer::Done);
        }
        transport.set_queue_size(index, size);
        let areas = [
            (QueueArea::Descriptor, descriptor),
            (QueueArea::Driver, driver),
            (QueueArea::Device, device),
        ];
        for (area, address) in areas {
            let (low, high) = (low(address), high(address));
            transport.set_queue_address(index, area, Some(low), Some(high));
        }
        transport.enable_queue(index);
        Ok(Answer::Done)
    }

    /// Index in, largest size out.
    fn read_queue(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let index = u16::from_be_bytes(payload(transfer)?);
        let Some(queue) = self.transport.queue(index.into()) else {
            return Ok(REJECTED);
        };
        transfer.write(2, &queue.max_size.to_be_bytes())?;
        Ok(Answer::Done)
    }

    /// Index in, features out.
    fn read_features(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let mut index = [0];
        if transfer.read(4, &mut index)? == 0 {
            return Ok(REJECTED);
        }
        let features = self.transport.device_features(index[0].into());
        transfer.write(0, &features.to_le_bytes())?;
        Ok(Answer::Done)
    }

    fn write_features(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let [a, b, c, d, index]: [u8; 5] = payload(transfer)?;
        let features = u32::from_le_bytes([a, b, c, d]);
        self.transport.set_driver_features(index.into(), features);
        Ok(Answer::Done)
    }

    fn read_config(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let length = transfer.count().min(CONFIG_MAX as u64) as usize;
        let mut config = vec![0; length];
        // The driver has no generation to look at: read until two agree.
        for _ in 0..4 {
            let before = self.transport.config_generation();
            self.transport.read_config(0, &mut config);
            if self.transport.config_generation() == before {
                break;
            }
        }
        transfer.write(0, &config)?;
        Ok(Answer::Done)
    }

    fn write_config(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let length = transfer.count().min(CONFIG_MAX as u64) as usize;
        let mut config = vec![0; length];
        transfer.read(0, &mut config)?;
        self.transport.write_config(0, &config);
        Ok(Answer::Done)
    }

    fn write_status(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let [status]: [u8; 1] = payload(transfer)?;
        // Section 4.3.2.4 knows a reset by VDEV_RESET only; a status of 0 is
        // what an older Linux writes after one.
        if status == 0 {
            self.reset_device();
            return Ok(Answer::Done);
        }
        self.transport.set_status(status);
        let refused = status & !self.transport.status() & STATUS_FEATURES_OK != 0;
        Ok(if refused { REJECTED } else { Answer::Done })
    }

    fn set_indicators(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let address = u64::from_be_bytes(payload(transfer)?);
        if self.transport.queue_count() > CLASSIC_QUEUES {
            return Ok(REJECTED);
        }
        self.interrupt.set(match address {
            0 => Indicators::None,
            address => Indicators::Classic(address),
        });
        Ok(Answer::Done)
    }

    fn set_config_indicator(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let address = u64::from_be_bytes(payload(transfer)?);
        self.interrupt.set_config(address);
        Ok(Answer::Done)
    }

    /// Summary, indicators, first bit, interruption subclass.
    fn set_adapter(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let bytes: [u8; 25] = payload(transfer)?;
        let (words, subclass) = match bytes {
            [words @ .., subclass] => (words, subclass),
        };
        let [summary, address, bit] = doublewords(words);
        if subclass > 7 {
            return Ok(REJECTED);
        }
        let queues = self.transport.queue_count();
        self.interrupt.set(match summary {
            0 => Indicators::None,
            _ => Indicators::Adapter(AdapterIndicator {
                address,
                bit,
                summary,
                subclass,
            }),
        });
        self.interrupt.bind(queues);
        Ok(Answer::Done)
    }
}

const REJECTED: Answer = Answer::UnitCheck(SENSE_COMMAND_REJECT);

/// The command's payload; a shorter one is a program check.
fn payload<const N: usize>(transfer: &mut Transfer<'_>) -> Result<[u8; N], Check> {
    let mut bytes = [0; N];
    match transfer.read(0, &mut bytes)? {
        done if done == N => Ok(bytes),
        _ => Err(Check::Program),
    }
}

fn halves(bytes: [u8; 4]) -> [u16; 2] {
    let [a, b, c, d] = bytes;
    [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
}

fn doublewords<const BYTES: usize, const N: usize>(bytes: [u8; BYTES]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes
            .first_chunk()
            .map_or(0, |bytes| u64::from_be_bytes(*bytes));
    }
    words
}

impl ControlUnit for VirtioCcw {
    fn sense_id(&self) -> SenseId {
        // The model of the control unit is the device's type (section 4.3.1).
        let model = (self.transport.device_type() & 0xff) as u8;
        SenseId {
            control_unit: (CONTROL_UNIT, model),
            device: (0, 0),
        }
    }

    fn command(&self, code: u8, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        if code == command::SET_VIRTIO_REV {
            return self.set_revision(transfer);
        }
        let Some(revision) = *self.revision() else {
            return Ok(REJECTED);
        };
        match code {
            command::SET_VQ => self.set_queue(transfer),
            command::VDEV_RESET => {
                self.reset_device();
                Ok(Answer::Done)
            }
            command::SET_IND => self.set_indicators(transfer),
            command::SET_CONF_IND => self.set_config_indicator(transfer),
            command::SET_IND_ADAPTER => self.set_adapter(transfer),
            command::READ_FEAT => self.read_features(transfer),
            command::WRITE_FEAT => self.write_features(transfer),
            command::READ_CONF => self.read_config(transfer),
            command::WRITE_CONF => self.write_config(transfer),
            command::WRITE_STATUS => self.write_status(transfer),
            command::READ_VQ_CONF => self.read_queue(transfer),
            command::READ_STATUS if revision >= 2 => {
                transfer.write(0, &[self.transport.status()])?;
                Ok(Answer::Done)
            }
            _ => Ok(REJECTED),
        }
    }

    fn reset(&self) {
        self.reset_device();
        *self.revision() = None;
    }

    /// The revision is to be negotiated anew (section 4.3.2.1.1), and no more.
    fn disabled(&self) {
        *self.revision() = None;
    }

    fn notify(&self, index: u32) {
        self.transport.notify(index);
    }
}

impl Drop for VirtioCcw {
    fn drop(&mut self) {
        let bell = Doorbell::Ccw(self.subchannel);
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
mod tests;
