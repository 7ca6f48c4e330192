//! Channel-command words (Principles of Operation, chapter 15).

use super::schib::{half, status, word};

/// What ends a channel program before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Program check: the channel program is not as it must be, or names
    /// memory that is not there.
    Program,
}

impl Check {
    /// The bit of the subchannel status.
    pub fn status(self) -> u8 {
        match self {
            Check::Program => status::PROGRAM_CHECK,
        }
    }
}

/// The flags of a CCW.
pub mod flag {
    /// Chain data.
    pub const CHAIN_DATA: u8 = 0x80;
    /// Chain command.
    pub const CHAIN_COMMAND: u8 = 0x40;
    /// Suppress length indication.
    pub const SUPPRESS_LENGTH: u8 = 0x20;
    /// Skip: transfer nothing to memory.
    pub const SKIP: u8 = 0x10;
    /// Program-controlled interruption.
    pub const INTERRUPT: u8 = 0x08;
    /// Indirect data addressing.
    pub const INDIRECT: u8 = 0x04;
    /// Suspend.
    pub const SUSPEND: u8 = 0x02;
    /// Modified indirect data addressing.
    pub const MODIFIED_INDIRECT: u8 = 0x01;
}

/// Commands that the channel or every device knows.
pub mod command {
    /// Mask of what makes a transfer-in-channel in a format-0 CCW.
    pub const TRANSFER_IN_CHANNEL: u8 = 0x08;
    /// No operation.
    pub const NO_OPERATION: u8 = 0x03;
    /// Basic sense.
    pub const SENSE: u8 = 0x04;
    /// Sense ID.
    pub const SENSE_ID: u8 = 0xe4;
}

/// A channel-command word of either format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ccw {
    /// Command code.
    pub command: u8,
    /// Flags.
    pub flags: u8,
    /// Count in bytes.
    pub count: u16,
    /// Data address.
    pub address: u32,
    /// Whether it is of format 1.
    pub format_1: bool,
}

impl Ccw {
    /// Size in bytes.
    pub const SIZE: u32 = 8;

    /// Decodes a CCW; only what is the same for every command is checked.
    pub fn parse(bytes: &[u8; 8], format_1: bool) -> Self {
        match format_1 {
            false => Self {
                command: bytes[0],
                address: word(bytes, 0) & 0x00ff_ffff,
                flags: bytes[4],
                count: half(bytes, 6),
                format_1,
            },
            true => Self {
                command: bytes[0],
                flags: bytes[1],
                count: half(bytes, 2),
                address: word(bytes, 4),
                format_1,
            },
        }
    }

    /// Whether `flag` is set.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Whether it is a transfer in channel.
    pub fn is_transfer(&self) -> bool {
        match self.format_1 {
            false => self.command & 0x0f == command::TRANSFER_IN_CHANNEL,
            true => self.command == command::TRANSFER_IN_CHANNEL,
        }
    }

    /// Where a transfer in channel leads.
    ///
    /// # Errors
    /// Program check: bits that must be zero are not, or the address is none of
    /// a CCW.
    pub fn target(&self) -> Result<u32, Check> {
        let clean = !self.format_1 || self.flags == 0 && self.count == 0;
        match clean && self.address.is_multiple_of(Self::SIZE) && self.address >> 31 == 0 {
            true => Ok(self.address),
            false => Err(Check::Program),
        }
    }

    /// Checks what every command other than a transfer in channel must keep.
    /// `chained_data` says that it goes on with the command of the one before;
    /// its own command code does not count then.
    ///
    /// # Errors
    /// Program check.
    pub fn check(&self, chained_data: bool) -> Result<(), Check> {
        let invalid_command = !chained_data && self.command & 0x0f == 0;
        // Format 1 allows a count of zero, but not where data is chained.
        let invalid_count =
            self.count == 0 && (!self.format_1 || chained_data || self.has(flag::CHAIN_DATA));
        let invalid_address = self.format_1 && self.address >> 31 != 0;
        match invalid_command
            || invalid_count
            || invalid_address
            || self.has(flag::MODIFIED_INDIRECT)
        {
            true => Err(Check::Program),
            false => Ok(()),
        }
    }
}
