//! x86 bzImage: the Linux/x86 boot protocol
//! (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").

use super::Reason;
use super::fields::{le16, le32, le64, release_at_start};
use crate::machine::Machine;
use crate::source::Source;

const FORMAT: &str = "bzImage";

const SECTOR: u64 = 512;

// Offsets from the beginning of the file.
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
const JUMP: usize = 0x200;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const LOADFLAGS: usize = 0x211;
const INITRD_ADDR_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const RELOCATABLE: usize = 0x234;
const MIN_ALIGNMENT: usize = 0x235;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

/// `LOADED_HIGH`: the protected-mode part goes to 0x100000 or above.
const LOADED_HIGH: u8 = 1 << 0;
/// `XLF_KERNEL_64`: there is a 64-bit entry at 0x200 of the protected-mode part.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `XLF_CAN_BE_LOADED_ABOVE_4G`.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;

/// The setup header of a bzImage.
#[derive(Clone, Debug)]
pub struct BzImage {
    /// Boot protocol version, such as 0x020f for 2.15.
    pub version: u16,
    /// `loadflags`.
    pub loadflags: u8,
    /// `xloadflags`; 0 before protocol 2.12.
    pub xloadflags: u16,
    /// Where the protected-mode part begins in the file, in bytes.
    pub kernel_offset: u64,
    /// Length of the protected-mode part in bytes.
    pub kernel_len: u64,
    /// Whether it runs at other addresses than `pref_address`.
    pub relocatable: bool,
    /// `kernel_alignment` in bytes, a power of two.
    pub kernel_alignment: u32,
    /// `min_alignment` as a power of two; 0 before protocol 2.10.
    pub min_alignment: u8,
    /// The preferred load address; 0x100000 before protocol 2.10.
    pub pref_address: u64,
    /// How much linear memory the kernel needs from its load address on before
    /// it knows its memory map, in bytes; the length before protocol 2.10.
    pub init_size: u32,
    /// The greatest command line length without the NUL, in bytes.
    pub cmdline_size: u32,
    /// The highest address that an initrd's last byte may have.
    pub initrd_addr_max: u32,
    /// Where the compressed payload is, from the protected-mode part's start
    /// in bytes; 0 before protocol 2.08.
    pub payload_offset: u32,
    /// Length of the compressed payload in bytes.
    pub payload_length: u32,
    /// The version text, such as `6.12.57+deb13-amd64 (...) #1 SMP ...`.
    pub kernel_version: Option<String>,
    /// The header as it is in the file from 0x1f1 on, to be copied to the same
    /// offset of the boot parameters ("zero page").
    pub setup_header: Vec<u8>,
}

impl BzImage {
    /// Offset of the setup header, in the file as in the boot parameters.
    pub const SETUP_HEADER_OFFSET: usize = SETUP_SECTS;

    /// Offset of the 64-bit entry point in the protected-mode part.
    pub const ENTRY_64: u64 = 0x200;

    /// Whether it can be entered in 64-bit mode.
    pub fn is_64bit(&self) -> bool {
        self.xloadflags & XLF_KERNEL_64 != 0
    }

    /// Whether kernel, boot parameters, command line and initrd may be above
    /// 4 GiB.
    pub fn can_be_loaded_above_4g(&self) -> bool {
        self.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0
    }

    /// x86_64 when there is a 64-bit entry.
    pub fn machine(&self) -> Machine {
        if self.is_64bit() {
            Machine::X86_64
        } else {
            Machine::Other("32-bit x86")
        }
    }

    /// The release, the first word of the version text.
    pub fn release(&self) -> Option<&str> {
        let text = self.kernel_version.as_deref()?;
        text.split(' ').next().filter(|word| !word.is_empty())
    }

    pub(super) fn footprint(&self) -> u64 {
        self.kernel_len.max(self.init_size.into())
    }
}

pub(super) fn is_bzimage(start: &[u8]) -> bool {
    le16(start, BOOT_FLAG) == Some(0xaa55) && start.get(HEADER..HEADER + 4) == Some(b"HdrS")
}

pub(super) fn parse(source: &Source) -> Result<BzImage, Reason> {
    let truncated = |what: String| Reason::Truncated {
        format: FORMAT,
        what,
    };
    let damaged = |what: String| Reason::Damaged {
        format: FORMAT,
        what,
    };
    let cut = || {
        truncated(format!(
            "{} bytes do not hold the setup header",
            source.len()
        ))
    };

    // The setup code is at most 64 sectors ("setup_sects"), a byte of them
    // can't be more than 256.
    let setup = source.prefix(256 * SECTOR as usize)?;
    let version = le16(&setup, VERSION).ok_or_else(cut)?;
    if version < 0x0206 {
        return Err(Reason::Unsupported(format!(
            "bzImage with boot protocol {}.{:02}: 2.06 (Linux 2.6.22) or later is needed",
            version >> 8,
            version & 0xff
        )));
    }
    let header_end = HEADER + usize::from(*setup.get(JUMP + 1).ok_or_else(cut)?);
    let setup_header = setup.get(SETUP_SECTS..header_end).ok_or_else(cut)?.to_vec();
    // Fields that the header is too short for read as absent.
    let header = setup.get(..header_end).ok_or_else(cut)?;
    let byte = |at: usize| header.get(at).copied().unwrap_or(0);
    let since = |wanted: u16| version >= wanted;

    let setup_sects = match byte(SETUP_SECTS) {
        0 => 4,
        n => n,
    };
    let kernel_offset = (u64::from(setup_sects) + 1) * SECTOR;
    let in_file = source.len().checked_sub(kernel_offset).filter(|&n| n > 0);
    let in_file =
        in_file.ok_or_else(|| truncated(format!("nothing after {setup_sects} setup sectors")))?;
    // syssize counts paragraphs of 16 bytes; the last one may be cut short.
    let paragraphs = u64::from(le32(header, SYSSIZE).ok_or_else(cut)?);
    if paragraphs == 0 {
        return Err(damaged("its size is 0".to_owned()));
    }
    let promised = paragraphs * 16;
    if in_file + 15 < promised {
        return Err(truncated(format!(
            "the header promises {promised} bytes of kernel, there are {in_file}"
        )));
    }
    let kernel_len = in_file.min(promised);

    let loadflags = byte(LOADFLAGS);
    if loadflags & LOADED_HIGH == 0 {
        return Err(Reason::Unsupported(
            "zImage that loads low: a bzImage is needed".to_owned(),
        ));
    }
    let kernel_alignment = le32(header, KERNEL_ALIGNMENT).unwrap_or(0);
    let relocatable = byte(RELOCATABLE) != 0;
    if relocatable && !kernel_alignment.is_power_of_two() {
        return Err(damaged(format!(
            "kernel_alignment {kernel_alignment:#x} is no power of two"
        )));
    }
    let (pref_address, init_size) = if since(0x020a) {
        (
            le64(header, PREF_ADDRESS).ok_or_else(cut)?,
            le32(header, INIT_SIZE).ok_or_else(cut)?,
        )
    } else {
        (0x10_0000, u32::try_from(kernel_len).unwrap_or(u32::MAX))
    };
    let (payload_offset, payload_length) = if since(0x0208) {
        (
            le32(header, PAYLOAD_OFFSET).unwrap_or(0),
            le32(header, PAYLOAD_LENGTH).unwrap_or(0),
        )
    } else {
        (0, 0)
    };
    if u64::from(payload_offset) + u64::from(payload_length) > kernel_len {
        return Err(damaged("the payload reaches beyond the kernel".to_owned()));
    }

    Ok(BzImage {
        version,
        loadflags,
        xloadflags: if since(0x020c) {
            le16(header, XLOADFLAGS).unwrap_or(0)
        } else {
            0
        },
        kernel_offset,
        kernel_len,
        relocatable,
        kernel_alignment,
        min_alignment: if since(0x020a) {
            byte(MIN_ALIGNMENT)
        } else {
            0
        },
        pref_address,
        init_size,
        cmdline_size: le32(header, CMDLINE_SIZE).ok_or_else(cut)?,
        initrd_addr_max: le32(header, INITRD_ADDR_MAX).ok_or_else(cut)?,
        payload_offset,
        payload_length,
        kernel_version: version_text(&setup, header),
        setup_header,
    })
}

/// The text that `kernel_version` points to, from 0x200 on, in the setup code.
fn version_text(setup: &[u8], header: &[u8]) -> Option<String> {
    let pointer = le16(header, KERNEL_VERSION).filter(|&p| p != 0)?;
    let text = setup.get(usize::from(pointer) + 0x200..)?;
    let text = text.get(..text.iter().take(512).position(|&b| b == 0)?)?;
    release_at_start(text)?;
    let text = std::str::from_utf8(text).ok()?;
    text.chars()
        .all(|c| !c.is_control())
        .then(|| text.to_owned())
}
