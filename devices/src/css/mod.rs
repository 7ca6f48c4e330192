//! The channel subsystem: subchannels, the I/O instructions that act on them,
//! and the channel programs that they run (z/Architecture Principles of
//! Operation, chapters 13 to 17).
//!
//! It knows no CPU and no hypervisor. The one who decodes an instruction calls
//! the method of that name with operands that are fetched already and sets the
//! condition code that is returned. A channel program runs to its end, or to
//! its suspension, within START SUBCHANNEL or RESUME SUBCHANNEL: to the program
//! that is a device that is quick.
//!
//! All structures are big-endian, as the architecture has them.

pub mod ccw;
mod program;
pub mod schib;
mod subchannel;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

pub use program::Transfer;
pub use schib::{Irb, Orb, Schib};
pub use subchannel::Subchannel;

use crate::GuestMem;

/// A condition code, 0 to 3, as an I/O instruction sets it.
pub type ConditionCode = u8;

/// The program interruptions that an I/O instruction's operand may cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Operand exception: a field that must be zero is not.
    Operand,
}

/// What an I/O instruction returns: a condition code, or a program interruption.
pub type Outcome = Result<ConditionCode, Refusal>;

/// The first word of a subchannel's identification with a set-ID of 0: the bit
/// that is always one (Principles of Operation, chapter 14, "Subsystem
/// identification word").
const SUBSYSTEM_ID_ONE: u32 = 0x0001_0000;

/// The subsystem identification word of subchannel `number` in the default
/// channel-subsystem image and subchannel set 0.
pub const fn subsystem_id(number: u16) -> u32 {
    SUBSYSTEM_ID_ONE | number as u32
}

/// How many channel-report words wait at most.
const MAX_REPORTS: usize = 16;
/// In a channel-report word: the ones after it are lost (bit 2, overflow).
const REPORTS_LOST: u32 = 0x2000_0000;
/// Solicited, of a channel path, with the error-recovery code for "initialized"
/// (Principles of Operation, chapter 17, "Channel-Report Word"; 4 would be
/// "installed parameters initialized").
const PATH_INITIALIZED: u32 = 0x4402_0000;

/// Interrupts of a channel subsystem.
pub trait ChannelInterrupts: Send + Sync {
    /// An I/O interruption of a subchannel: its subsystem identification word,
    /// the interruption parameter, and the interruption subclass (0 to 7).
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    fn subchannel(&self, id: u32, parameter: u32, subclass: u8) -> io::Result<()>;

    /// Withdraws interruptions of the subchannel that are still pending.
    fn withdraw(&self, id: u32);

    /// An adapter interruption of a subclass (0 to 7).
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    fn adapter(&self, subclass: u8) -> io::Result<()>;

    /// A machine check that says that a channel report is pending.
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    fn channel_report(&self) -> io::Result<()>;
}

/// What SENSE ID tells about a control unit and its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SenseId {
    /// Control unit type and model.
    pub control_unit: (u16, u8),
    /// Device type and model; zeroes when there is none of its own.
    pub device: (u16, u8),
}

impl SenseId {
    /// The bytes that SENSE ID transfers.
    pub fn bytes(&self) -> [u8; 7] {
        let [cu_high, cu_low] = self.control_unit.0.to_be_bytes();
        let [device_high, device_low] = self.device.0.to_be_bytes();
        let (cu_model, model) = (self.control_unit.1, self.device.1);
        [
            0xff,
            cu_high,
            cu_low,
            cu_model,
            device_high,
            device_low,
            model,
        ]
    }
}

/// Sense byte 0: the command is not one of the device's.
pub const SENSE_COMMAND_REJECT: u8 = 0x80;

/// How a device answered a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Channel end and device end.
    Done,
    /// Channel end, device end and unit check, with this sense byte 0.
    UnitCheck(u8),
}

/// A control unit with one device, behind a subchannel.
pub trait ControlUnit: Send + Sync {
    /// What SENSE ID answers.
    fn sense_id(&self) -> SenseId;

    /// Executes a command other than NO-OPERATION, SENSE and SENSE ID, which
    /// every device here has.
    ///
    /// # Errors
    /// The transfer failed: the channel presents what went wrong with it.
    fn command(&self, command: u8, transfer: &mut Transfer<'_>) -> Result<Answer, ccw::Check>;

    /// The channel subsystem is reset: the device is as at power-on when this
    /// returns.
    fn reset(&self);

    /// The guest has disabled the subchannel. The device is not reset: Linux
    /// disables all subchannels when it shuts down, and prints to a console after
    /// that.
    fn disabled(&self) {}

    /// The guest rang for queue `index`, and nothing took it in the kernel
    /// (virtio-ccw only).
    fn notify(&self, index: u32) {
        let _ = index;
    }
}

/// The type of the virtual channel path that all devices are on: not one of a
/// real channel's.
pub const CHANNEL_PATH_TYPE: u8 = 0x32;
/// Its number.
pub const CHANNEL_PATH: u8 = 0;

/// The channel subsystem of one machine.
pub struct ChannelSubsystem {
    interrupts: Arc<dyn ChannelInterrupts>,
    memory: GuestMem,
    /// By subchannel number, without gaps: the guest stops looking at the
    /// first that is not there.
    subchannels: RwLock<BTreeMap<u16, Arc<Subchannel>>>,
    reports: Mutex<VecDeque<u32>>,
}

impl ChannelSubsystem {
    /// A channel subsystem without subchannels.
    pub fn new(interrupts: Arc<dyn ChannelInterrupts>, memory: GuestMem) -> Arc<Self> {
        Arc::new(Self {
            interrupts,
            memory,
            subchannels: RwLock::default(),
            reports: Mutex::default(),
        })
    }

    /// Where the subsystem's interrupts go.
    pub fn interrupts(&self) -> Arc<dyn ChannelInterrupts> {
        self.interrupts.clone()
    }

    /// The next subchannel, for a device with number `devno`; its control unit
    /// comes by [`Subchannel::connect`].
    ///
    /// # Errors
    /// All 65536 subchannels are taken, or a device has the number already.
    pub fn add(&self, devno: u16) -> io::Result<Arc<Subchannel>> {
        let mut all = self
            .subchannels
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if all.values().any(|other| other.devno() == devno) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("device number {devno:04x} is taken"),
            ));
        }
        let number =
            u16::try_from(all.len()).map_err(|_| io::Error::other("all subchannels are taken"))?;
        let subchannel = Arc::new(Subchannel::new(
            number,
            devno,
            self.memory.clone(),
            self.interrupts.clone(),
        ));
        all.insert(number, subchannel.clone());
        Ok(subchannel)
    }

    /// The subchannel that general register 1 names: none when there is no such
    /// one (condition code 3).
    ///
    /// # Errors
    /// Operand exception: the word is no subsystem identification.
    pub fn find(&self, id: u64) -> Result<Option<Arc<Subchannel>>, Refusal> {
        // Only bits 32 to 63 of the register count. There is one subchannel
        // set, and one image of the subsystem.
        let id = (id & 0xffff_ffff) as u32;
        if id & 0xffff_0000 != SUBSYSTEM_ID_ONE {
            return Err(Refusal::Operand);
        }
        let all = self
            .subchannels
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(all.get(&((id & 0xffff) as u16)).cloned())
    }

    fn act(&self, id: u64, act: impl FnOnce(&Subchannel) -> Outcome) -> Outcome {
        match self.find(id)? {
            Some(subchannel) => act(&subchannel),
            None => Ok(3),
        }
    }

    /// START SUBCHANNEL with the 32-byte operation-request block `orb`.
    ///
    /// # Errors
    /// Operand exception.
    pub fn start(&self, id: u64, orb: &[u8; Orb::SIZE]) -> Outcome {
        let orb = Orb::parse(orb)?;
        self.act(id, |subchannel| Ok(subchannel.start(orb)))
    }

    /// MODIFY SUBCHANNEL with the 52-byte subchannel-information block `schib`.
    ///
    /// # Errors
    /// Operand exception.
    pub fn modify(&self, id: u64, schib: &[u8; Schib::SIZE]) -> Outcome {
        let schib = Schib::parse_modification(schib)?;
        self.act(id, |subchannel| Ok(subchannel.modify(&schib)))
    }

    /// STORE SUBCHANNEL: the block is to be stored when there is one
    /// (condition code 0; otherwise 3).
    ///
    /// # Errors
    /// Operand exception.
    pub fn store(&self, id: u64) -> Result<Option<[u8; Schib::SIZE]>, Refusal> {
        Ok(self.find(id)?.map(|subchannel| subchannel.store()))
    }

    /// TEST SUBCHANNEL: the condition code and, unless that is 3, the
    /// interruption-response block to be stored. Status is taken away by
    /// [`Subchannel::accept_status`] once it has been stored.
    ///
    /// # Errors
    /// Operand exception.
    pub fn test(&self, id: u64) -> Result<(ConditionCode, Option<Irb>), Refusal> {
        Ok(match self.find(id)? {
            None => (3, None),
            Some(subchannel) => subchannel.test(),
        })
    }

    /// TEST SUBCHANNEL, once `irb`, the block of [`test`](Self::test), is
    /// stored.
    pub fn accept_status(&self, id: u64, irb: &Irb) {
        if let Ok(Some(subchannel)) = self.find(id) {
            subchannel.accept_status(irb);
        }
    }

    /// HALT SUBCHANNEL.
    ///
    /// # Errors
    /// Operand exception.
    pub fn halt(&self, id: u64) -> Outcome {
        self.act(id, |subchannel| Ok(subchannel.halt()))
    }

    /// CLEAR SUBCHANNEL.
    ///
    /// # Errors
    /// Operand exception.
    pub fn clear(&self, id: u64) -> Outcome {
        self.act(id, |subchannel| Ok(subchannel.clear()))
    }

    /// RESUME SUBCHANNEL.
    ///
    /// # Errors
    /// Operand exception.
    pub fn resume(&self, id: u64) -> Outcome {
        self.act(id, |subchannel| Ok(subchannel.resume()))
    }

    /// CANCEL SUBCHANNEL. No start is ever pending here, so there is nothing to
    /// cancel.
    ///
    /// # Errors
    /// Operand exception.
    pub fn cancel(&self, id: u64) -> Outcome {
        self.act(id, |subchannel| Ok(subchannel.cancel()))
    }

    /// RESET CHANNEL PATH: general register 1 has the path's number in its last
    /// byte.
    ///
    /// # Errors
    /// Operand exception: reserved bits are not zero, or it is another image's.
    pub fn reset_path(&self, id: u64) -> Outcome {
        let id = (id & 0xffff_ffff) as u32;
        if id & 0xffff_ff00 != 0 {
            return Err(Refusal::Operand);
        }
        // Nothing is on its way over the path when the reset comes; the report
        // says that it is done.
        match (id & 0xff) as u8 {
            CHANNEL_PATH => {
                self.report(PATH_INITIALIZED | u32::from(CHANNEL_PATH));
                Ok(0)
            }
            _ => Ok(3),
        }
    }

    /// Puts a channel-report word into the queue and announces it. When the
    /// queue is full, the last word in it says that more were lost (Principles of
    /// Operation, chapter 17, "Channel-Report Word", bit R).
    pub fn report(&self, word: u32) {
        let mut reports = self.reports();
        if reports.len() >= MAX_REPORTS {
            if let Some(last) = reports.back_mut() {
                *last |= REPORTS_LOST;
            }
            return;
        }
        reports.push_back(word);
        drop(reports);
        if let Err(error) = self.interrupts.channel_report() {
            log::warn!("cannot announce a channel report: {error}");
        }
    }

    /// STORE CHANNEL REPORT WORD: the condition code and the word to store.
    pub fn take_report(&self) -> (ConditionCode, u32) {
        match self.reports().pop_front() {
            None => (1, 0),
            Some(word) => (0, word),
        }
    }

    /// Puts back a word whose storing failed.
    pub fn return_report(&self, word: u32) {
        self.reports().push_front(word);
    }

    fn reports(&self) -> MutexGuard<'_, VecDeque<u32>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resets the subsystem, as at a load or by a subsystem reset.
    pub fn reset(&self) {
        self.reports().clear();
        let all: Vec<_> = self
            .subchannels
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        all.iter().for_each(|subchannel| subchannel.reset());
    }

    /// Passes a notification on to the device behind a subchannel. Returns
    /// whether there is one.
    pub fn notify(&self, id: u64, queue: u32) -> bool {
        let unit = match self.find(id) {
            Ok(Some(subchannel)) => subchannel.unit(),
            _ => None,
        };
        unit.is_some_and(|unit| {
            unit.notify(queue);
            true
        })
    }
}

#[cfg(test)]
mod tests;
