//! virtio over channel I/O (virtio 1.2, section 4.3).
//!
//! Devices are transitional where virtio before 1.0 had them: their driver
//! chooses among revisions 1 and 2 and the legacy interface, which is revision 0.
//! One that chooses none before it does anything else is older than that choice,
//! and has the legacy interface, too (section 4.3.2.1.3). Others, such as input
//! devices, have revisions 1 and 2 only and reject such a driver's commands.
//!
//! The payloads of commands are big-endian, and features little-endian, in every
//! revision. Configuration space, rings and headers are little-endian, but
//! big-endian in revision 0.
//!
//! A driver that has the legacy interface may use a queue before it sets
//! DRIVER_OK, and expects to be served. So as long as such a device does not run,
//! its notifications are not given to doorbells: the first one gets here and
//! starts it (see [`transport`](super::transport)).

mod interrupt;

use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::interrupt::{CcwInterrupt, Indicators};
use super::queue_config::QueueArea;
use super::transport::{STATUS_FEATURES_OK, Transport, high, low};
use super::{Interface, VirtioDevice, VirtioInterrupt};
use crate::GuestMem;
use crate::byte_order::ByteOrder;
use crate::css::ccw::Check;
use crate::css::{Answer, ControlUnit, SENSE_COMMAND_REJECT, SenseId, Subchannel, Transfer};
use crate::irq::{AdapterIndicator, AdapterVectors};
use crate::notify::{Doorbell, Doorbells};

/// The control unit's type (section 4.3.1).
pub const CONTROL_UNIT: u16 = 0x3832;

/// The legacy interface.
pub const LEGACY: u16 = 0;
/// The newest revision that there is.
pub const NEWEST: u16 = 2;

/// The legacy interface is in the guest's byte order, and channels are those of
/// one architecture, which has this one.
const GUEST_ORDER: ByteOrder = ByteOrder::Big;

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

    /// Those that a driver older than revisions may begin with.
    pub(super) const BEFORE_REVISIONS: [u8; 11] = [
        SET_VQ,
        VDEV_RESET,
        SET_IND,
        SET_CONF_IND,
        SET_IND_ADAPTER,
        READ_FEAT,
        WRITE_FEAT,
        READ_CONF,
        WRITE_CONF,
        WRITE_STATUS,
        READ_VQ_CONF,
    ];
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
    attached: Mutex<Vec<bool>>,
    /// Those that the driver may choose.
    revisions: RangeInclusive<u16>,
    /// The revision in use; none before the driver has chosen one.
    revision: Mutex<Option<u16>>,
}

impl VirtioCcw {
    /// Puts `device` behind `subchannel` and attaches its doorbells. With
    /// `vectors` its adapter interruptions are delivered by them, one vector
    /// for each queue; without, the device's own threads do it. The driver may
    /// choose revisions up to `newest`; a device that has no legacy interface
    /// has [`NEWEST`] all the same.
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
        newest: u16,
    ) -> io::Result<Arc<Self>> {
        let revisions = match device.has_legacy_interface() {
            true => LEGACY..=newest.min(NEWEST),
            false => LEGACY + 1..=NEWEST,
        };
        let interrupt = Arc::new(CcwInterrupt::new(mem.clone(), subchannel, vectors));
        let transport = Transport::new(
            device,
            mem,
            Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>,
        )?;
        let queues = transport.queue_events().len();
        let unit = Arc::new(Self {
            transport,
            interrupt,
            subchannel: subchannel.id(),
            doorbells,
            attached: Mutex::new(vec![false; queues]),
            revisions,
            revision: Mutex::new(None),
        });
        unit.update_doorbells();
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

    /// The revision in use, of which the command `code` is one; it may be what
    /// tells that the driver has the legacy interface.
    fn revision_for(&self, code: u8) -> Option<u16> {
        let mut revision = self.revision();
        if revision.is_none()
            && self.revisions.contains(&LEGACY)
            && command::BEFORE_REVISIONS.contains(&code)
        {
            self.choose(&mut revision, LEGACY);
        }
        *revision
    }

    fn choose(&self, revision: &mut Option<u16>, number: u16) {
        *revision = Some(number);
        let another = self.transport.set_interface(match number {
            LEGACY => Interface::Legacy(GUEST_ORDER),
            _ => Interface::Modern,
        });
        if another {
            self.interrupt.reset();
        }
    }

    /// Attaches all doorbells, or detaches them where notifications are awaited
    /// here.
    fn update_doorbells(&self) {
        let attached = self.attached.lock();
        // Looked at under the lock: whoever comes last sees how it is.
        let mut attached = attached.unwrap_or_else(PoisonError::into_inner);
        let wanted = !self.transport.awaits_notification();
        self.set_doorbells(&mut attached, wanted);
    }

    fn set_doorbells(&self, attached: &mut [bool], wanted: bool) {
        let bell = Doorbell::Ccw(self.subchannel);
        let name = self.transport.name();
        let events = (0_u32..).zip(self.transport.queue_events());
        for ((index, event), attached) in events.zip(attached) {
            match (*attached, wanted) {
                (false, true) => match self.doorbells.attach(bell, Some(index), event) {
                    Ok(()) => *attached = true,
                    Err(error) => log::debug!("{name}: no doorbell: {error}"),
                },
                (true, false) => match self.doorbells.detach(bell, Some(index), event) {
                    Ok(()) => *attached = false,
                    Err(error) => log::warn!("{name}: cannot detach a doorbell: {error}"),
                },
                _ => {}
            }
        }
    }

    fn reset_device(&self) {
        self.transport.reset();
        self.interrupt.reset();
    }

    /// Revision and length; no data follows in the revisions that there are.
    fn set_revision(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let mut revision = self.revision();
        let bytes: [u8; 4] = payload(transfer)?;
        let [number, length] = halves(bytes);
        // Section 4.3.2.1.1: not again until the device is reset or disabled.
        let known = self.revisions.contains(&number) && length == 0;
        if !known || revision.is_some() {
            return Ok(REJECTED);
        }
        self.choose(&mut revision, number);
        Ok(Answer::Done)
    }

    /// Descriptor table, reserved word, index, size, available ring, used ring.
    fn set_queue(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let bytes: [u8; 32] = payload(transfer)?;
        let [descriptor, middle, driver, device] = doublewords(bytes);
        let (_, index, size) = word_and_halves(middle);
        if self.transport.queue(index).is_none() {
            return Ok(REJECTED);
        }
        self.place_queue(index, size, [descriptor, driver, device]);
        Ok(Answer::Done)
    }

    /// Queue, alignment, index, size: the rings lie behind each other (section
    /// 2.7.2). The size is the device's own, which a legacy driver has no choice
    /// in; QEMU, too, refuses a smaller one.
    fn set_legacy_queue(&self, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let bytes: [u8; 16] = payload(transfer)?;
        let [queue, middle] = doublewords(bytes);
        let (alignment, index, size) = word_and_halves(middle);
        let Some(config) = self.transport.queue(index) else {
            return Ok(REJECTED);
        };
        let areas = legacy_areas(queue, alignment, size);
        match areas {
            _ if size == 0 || queue == 0 => self.transport.disable_queue(index),
            Some(areas) if size == config.max_size => self.place_queue(index, size, areas),
            _ => return Ok(REJECTED),
        }
        Ok(Answer::Done)
    }

    /// Sets a queue up with the addresses of its descriptor table, available
    /// ring and used ring. One that is set up anew is stopped first; a size of 0
    /// or no address leaves it so, which is how Linux gives a queue up.
    fn place_queue(&self, index: u32, size: u16, [descriptor, driver, device]: [u64; 3]) {
        let transport = &self.transport;
        transport.disable_queue(index);
        if size == 0 || descriptor == 0 {
            return;
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

    fn write_status(&self, revision: u16, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        let [status]: [u8; 1] = payload(transfer)?;
        // Section 4.3.2.4 knows a reset by VDEV_RESET only; a status of 0 is
        // what an older Linux writes after one.
        if status == 0 {
            self.reset_device();
            return Ok(Answer::Done);
        }
        self.transport.set_status(status);
        // In revision 0 the bit has no meaning.
        let refused = status & !self.transport.status() & STATUS_FEATURES_OK != 0;
        Ok(match refused && revision != LEGACY {
            true => REJECTED,
            false => Answer::Done,
        })
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

/// A doubleword's left half, and the two halves of its right one.
fn word_and_halves(doubleword: u64) -> (u32, u32, u16) {
    let right = low(doubleword);
    (high(doubleword), right >> 16, (right & 0xffff) as u16)
}

/// Where the areas of a legacy queue of `size` descriptors are: the available
/// ring behind the descriptor table, the used ring at the next multiple of
/// `alignment` behind that (section 2.7.2). None for what cannot be aligned or
/// lies beyond all addresses.
fn legacy_areas(queue: u64, alignment: u32, size: u16) -> Option<[u64; 3]> {
    if !alignment.is_power_of_two() {
        return None;
    }
    let size = u64::from(size);
    let driver = queue.checked_add(16 * size)?;
    // Flags, index, an element for each descriptor, and the used event.
    let end = driver.checked_add(2 * (3 + size))?;
    let device = end.checked_next_multiple_of(alignment.into())?;
    Some([queue, driver, device])
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
        let answer = self.execute(code, transfer);
        self.update_doorbells();
        answer
    }

    fn reset(&self) {
        self.reset_device();
        *self.revision() = None;
        self.transport.set_interface(Interface::default());
        self.update_doorbells();
    }

    /// The revision is to be negotiated anew (section 4.3.2.1.1), and no more.
    fn disabled(&self) {
        *self.revision() = None;
    }

    fn notify(&self, index: u32) {
        if self.transport.activate_early() {
            self.update_doorbells();
        }
        self.transport.notify(index);
    }
}

impl VirtioCcw {
    fn execute(&self, code: u8, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        if code == command::SET_VIRTIO_REV {
            return self.set_revision(transfer);
        }
        let Some(revision) = self.revision_for(code) else {
            return Ok(REJECTED);
        };
        match code {
            command::SET_VQ if revision == LEGACY => self.set_legacy_queue(transfer),
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
            command::WRITE_STATUS => self.write_status(revision, transfer),
            command::READ_VQ_CONF => self.read_queue(transfer),
            command::READ_STATUS if revision >= 2 => {
                transfer.write(0, &[self.transport.status()])?;
                Ok(Answer::Done)
            }
            _ => Ok(REJECTED),
        }
    }
}

impl Drop for VirtioCcw {
    fn drop(&mut self) {
        let attached = self.attached.get_mut();
        let mut attached = std::mem::take(attached.unwrap_or_else(PoisonError::into_inner));
        self.set_doorbells(&mut attached, false);
    }
}

#[cfg(test)]
mod tests;
