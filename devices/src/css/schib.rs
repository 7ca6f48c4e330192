//! The blocks that I/O instructions fetch and store: ORB, SCHIB, IRB
//! (Principles of Operation, chapters 14 to 16).

use super::Refusal;

/// Big-endian halfword at `at`; 0 beyond the end.
pub(crate) fn half(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

/// Big-endian word at `at`; 0 beyond the end.
pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// An operation-request block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Orb {
    /// Interruption parameter.
    pub parameter: u32,
    /// Key and control bits, in their places in the first half of word 1.
    ///
    /// The key is stored with the status and compared with none: Linux has all
    /// its pages and channel programs under key 0, which fits every storage key,
    /// and QEMU's channel subsystem compares none either. Storage keys are KVM's,
    /// which has an access by key for the hypervisor (KVM_S390_MEM_OP with
    /// SKEY_PROTECTION), so that each of a program's fetches and each piece of
    /// its data would become a system call.
    pub control: u16,
    /// Logical-path mask.
    pub paths: u8,
    /// Whether an immediate command's count is not compared (bit L).
    pub lenient: bool,
    /// Channel-program address.
    pub program: u32,
}

impl Orb {
    /// Size in bytes.
    pub const SIZE: usize = 32;
    /// The key.
    pub const KEY: u16 = 0xf000;
    /// Suspend control.
    pub const SUSPEND: u16 = 0x0800;
    /// Format-1 CCWs.
    pub const FORMAT_1: u16 = 0x0080;
    /// Prefetching is allowed.
    pub const PREFETCH: u16 = 0x0040;
    /// Suppress the interruption of a suspension.
    pub const QUIET_SUSPENSION: u16 = 0x0008;
    /// IDAWs are 64 bits wide.
    pub const FORMAT_2_IDAWS: u16 = 0x0002;
    /// Format-2 IDAWs stand for blocks of 2 KiB rather than 4.
    pub const SMALL_BLOCKS: u16 = 0x0001;

    /// Transport mode, and what is reserved in that byte: not here.
    const INVALID: u16 = 0x0004;
    /// In the byte after the path mask: MIDAWs, which are not here, and what is
    /// reserved; the ORB extension's bit is allowed.
    const INVALID_LAST: u8 = 0x7e;

    /// Decodes it.
    ///
    /// # Errors
    /// Operand exception: a bit that must be zero is not.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Result<Self, Refusal> {
        let orb = Self {
            parameter: word(bytes, 0),
            control: half(bytes, 4),
            paths: bytes[6],
            lenient: bytes[7] & 0x80 != 0,
            program: word(bytes, 8),
        };
        if orb.control & Self::INVALID != 0
            || bytes[7] & Self::INVALID_LAST != 0
            || orb.program & 0x8000_0000 != 0
        {
            return Err(Refusal::Operand);
        }
        Ok(orb)
    }
}

/// Path-management-control word: what a program may change of it, and what it
/// only reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pmcw {
    /// Interruption parameter.
    pub parameter: u32,
    /// Interruption subclass, enabled, modes.
    pub flags: u16,
    /// Device number.
    pub devno: u16,
    /// Logical-path mask.
    pub paths: u8,
    /// Last-path-used mask.
    pub last_used: u8,
    /// Measurement-block index.
    pub measurement: u16,
    /// Path-operational mask.
    pub operational: u8,
    /// The last word: concurrent sense and measurement modes.
    pub features: u32,
}

impl Pmcw {
    /// Enabled.
    pub const ENABLED: u16 = 0x0080;
    /// Device number valid.
    pub const VALID: u16 = 0x0001;
    /// Concurrent sense.
    pub const CONCURRENT_SENSE: u32 = 0x0000_0001;
    /// Subclass, enabled, limit mode, measurement mode, multipath mode.
    const CHANGEABLE: u16 = 0x38fc;
    const INVALID: u16 = 0x0700;
    const FEATURES_INVALID: u32 = 0xff1f_fff8;
    const FEATURES_CHANGEABLE: u32 = 0x0000_0005;

    /// The only channel path of a device: the leftmost of eight.
    pub const PATH: u8 = 0x80;

    /// Interruption subclass.
    pub fn subclass(&self) -> u8 {
        ((self.flags >> 11) & 7) as u8
    }

    /// Whether the subchannel is enabled.
    pub fn enabled(&self) -> bool {
        self.flags & Self::ENABLED != 0
    }

    /// Takes over what MODIFY SUBCHANNEL changes.
    pub fn modify(&mut self, new: &Self) {
        self.parameter = new.parameter;
        self.flags = self.flags & !Self::CHANGEABLE | new.flags & Self::CHANGEABLE;
        self.paths = new.paths;
        self.measurement = new.measurement;
        self.operational = new.operational;
        self.features = new.features & Self::FEATURES_CHANGEABLE;
    }
}

/// Bits of a subchannel-status word's control half-word and status bytes.
pub mod status {
    /// Start function.
    pub const START: u16 = 0x4000;
    /// Halt function.
    pub const HALT: u16 = 0x2000;
    /// Clear function.
    pub const CLEAR: u16 = 0x1000;
    /// All functions.
    pub const FUNCTIONS: u16 = START | HALT | CLEAR;
    /// Resume pending.
    pub const RESUME_PENDING: u16 = 0x0800;
    /// Subchannel active and device active.
    pub const ACTIVE: u16 = 0x00c0;
    /// Suspended.
    pub const SUSPENDED: u16 = 0x0020;
    /// All activity.
    pub const ACTIVITY: u16 = 0x0fe0;
    /// Alert status.
    pub const ALERT: u16 = 0x0010;
    /// Intermediate status.
    pub const INTERMEDIATE: u16 = 0x0008;
    /// Primary status.
    pub const PRIMARY: u16 = 0x0004;
    /// Secondary status.
    pub const SECONDARY: u16 = 0x0002;
    /// Status pending.
    pub const PENDING: u16 = 0x0001;
    /// All of the status control.
    pub const STATUS: u16 = 0x001f;

    /// Flags: suspend control.
    pub const FLAG_SUSPEND: u16 = 0x0800;
    /// Flags: extended status word format 0 with sense in the ECW (bit L).
    pub const FLAG_EXTENDED_FORMAT: u16 = 0x0400;
    /// Flags: CCW format.
    pub const FLAG_FORMAT_1: u16 = 0x0080;
    /// Flags: prefetch.
    pub const FLAG_PREFETCH: u16 = 0x0040;
    /// Flags: extended control, for what is in the ECW.
    pub const FLAG_EXTENDED_CONTROL: u16 = 0x0002;
    /// Flags: path not operational.
    pub const FLAG_NO_PATH: u16 = 0x0001;

    /// Device status: status modifier.
    pub const STATUS_MODIFIER: u8 = 0x40;
    /// Device status: channel end.
    pub const CHANNEL_END: u8 = 0x08;
    /// Device status: device end.
    pub const DEVICE_END: u8 = 0x04;
    /// Device status: unit check.
    pub const UNIT_CHECK: u8 = 0x02;

    /// Subchannel status: program-controlled interruption.
    pub const PROGRAM_CONTROLLED: u8 = 0x80;
    /// Subchannel status: incorrect length.
    pub const INCORRECT_LENGTH: u8 = 0x40;
    /// Subchannel status: program check.
    pub const PROGRAM_CHECK: u8 = 0x20;
}

/// A subchannel-status word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scsw {
    /// Key, format, deferred condition code and other flags.
    pub flags: u16,
    /// Function, activity and status control.
    pub control: u16,
    /// CCW address.
    pub address: u32,
    /// Device status.
    pub device: u8,
    /// Subchannel status.
    pub subchannel: u8,
    /// Residual count.
    pub count: u16,
}

impl Scsw {
    /// Its 12 bytes.
    pub fn bytes(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..2].copy_from_slice(&self.flags.to_be_bytes());
        bytes[2..4].copy_from_slice(&self.control.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.address.to_be_bytes());
        bytes[8] = self.device;
        bytes[9] = self.subchannel;
        bytes[10..].copy_from_slice(&self.count.to_be_bytes());
        bytes
    }
}

/// A subchannel-information block.
#[derive(Clone, Copy, Debug)]
pub struct Schib {
    /// Path management.
    pub pmcw: Pmcw,
    /// Status.
    pub scsw: Scsw,
}

impl Schib {
    /// Size in bytes.
    pub const SIZE: usize = 52;

    /// Decodes what MODIFY SUBCHANNEL looks at.
    ///
    /// # Errors
    /// Operand exception: a bit that must be zero is not.
    pub fn parse_modification(bytes: &[u8; Self::SIZE]) -> Result<Pmcw, Refusal> {
        let pmcw = Pmcw {
            parameter: word(bytes, 0),
            flags: half(bytes, 4),
            devno: half(bytes, 6),
            paths: bytes[8],
            last_used: bytes[10],
            measurement: half(bytes, 12),
            operational: bytes[14],
            features: word(bytes, 24),
        };
        if pmcw.flags & Pmcw::INVALID != 0 || pmcw.features & Pmcw::FEATURES_INVALID != 0 {
            return Err(Refusal::Operand);
        }
        Ok(pmcw)
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; Self::SIZE] {
        let pmcw = &self.pmcw;
        let mut bytes = [0; Self::SIZE];
        bytes[..4].copy_from_slice(&pmcw.parameter.to_be_bytes());
        bytes[4..6].copy_from_slice(&pmcw.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&pmcw.devno.to_be_bytes());
        bytes[8] = pmcw.paths;
        // Path-not-operational mask: the path always is operational.
        bytes[10] = pmcw.last_used;
        bytes[11] = Pmcw::PATH; // path-installed mask
        bytes[12..14].copy_from_slice(&pmcw.measurement.to_be_bytes());
        bytes[14] = pmcw.operational;
        bytes[15] = Pmcw::PATH; // path-available mask
        bytes[16] = super::CHANNEL_PATH;
        bytes[24..28].copy_from_slice(&pmcw.features.to_be_bytes());
        bytes[28..40].copy_from_slice(&self.scsw.bytes());
        bytes
    }
}

/// An interruption-response block.
#[derive(Clone, Copy, Debug)]
pub struct Irb {
    /// Status.
    pub scsw: Scsw,
    /// Sense data, when concurrent sense has fetched some.
    pub sense: Option<[u8; super::subchannel::SENSE_SIZE]>,
}

impl Irb {
    /// Size in bytes of what TEST SUBCHANNEL stores without the
    /// extended-measurement word, which is not here.
    pub const SIZE: usize = 64;

    /// Its bytes: SCSW, extended status word, extended control word.
    pub fn bytes(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..12].copy_from_slice(&self.scsw.bytes());
        // Word 0 of the extended status: the last-path-used mask.
        bytes[13] = Pmcw::PATH;
        if let Some(sense) = &self.sense {
            // Word 1: concurrent sense, and how many bytes.
            let word = 0x0100_0000 | (sense.len() as u32) << 16;
            bytes[16..20].copy_from_slice(&word.to_be_bytes());
            bytes[32..].copy_from_slice(sense);
        }
        bytes
    }
}
