//! The configuration space of a PCI function: a type 0 header, base address
//! registers and a list of capabilities (PCI Local Bus Specification 3.0,
//! chapter 6).

use thiserror::Error;

/// Size of the configuration space of a conventional function, in bytes.
pub const CONFIG_SIZE: usize = 256;

/// Offset of the command register.
pub const COMMAND: usize = 0x04;
/// Offset of the status register.
pub const STATUS: usize = 0x06;
/// Offset of the first base address register.
pub const BAR0: usize = 0x10;
/// Offset of the capabilities pointer.
pub const CAPABILITIES_POINTER: usize = 0x34;
/// Offset of the interrupt line register.
pub const INTERRUPT_LINE: usize = 0x3c;
/// Offset of the interrupt pin register.
pub const INTERRUPT_PIN: usize = 0x3d;

/// Command: the function decodes its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may act as a bus master, which MSI needs.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// Command: the function must not assert its INTx wire.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Status: the function has an interrupt pending for its INTx wire.
pub const STATUS_INTERRUPT: u8 = 1 << 3;
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// The command bits that a guest can set: memory space, bus master, parity and
/// SERR# enable (without effect), Interrupt Disable.
const COMMAND_WRITABLE: u16 =
    COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;

const FIRST_CAPABILITY: usize = 0x40;

/// What a function is, as its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, from the top of the
    /// low 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A memory BAR. Port BARs are not needed by anything here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Size in bytes: a power of 2, 16 or more.
    pub size: u64,
    /// Whether it is 64 bits wide, and so takes two registers.
    pub wide: bool,
    /// Whether a bridge may prefetch from it, so that it can sit in a
    /// prefetchable window.
    pub prefetchable: bool,
}

/// A range of PCI bus addresses that a function answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodedBar {
    /// Number of the BAR (of its first register), 0 to 5.
    pub bar: u8,
    /// PCI bus address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// A mistake in building a configuration space.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No such BAR, taken already, or no room for its second register.
    #[error("BAR {0} is not free")]
    BarTaken(u8),
    /// Not a size that a BAR can have.
    #[error("a BAR cannot be {0:#x} bytes large")]
    BarSize(u64),
    /// The capabilities no longer fit in the configuration space.
    #[error("no room for a capability of {0} bytes")]
    NoRoom(usize),
}

/// What a write has touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The command register has changed.
    pub command: bool,
    /// Which BARs are decoded, or where, has changed.
    pub decode: bool,
}

/// A configuration space: bytes, little-endian, with the bits that a guest can
/// write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    /// What a reset goes back to.
    initial: [u8; CONFIG_SIZE],
    bars: [Option<Bar>; 6],
    last_pointer: usize,
    next_capability: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs or capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            initial: [0; CONFIG_SIZE],
            bars: [None; 6],
            last_pointer: CAPABILITIES_POINTER,
            next_capability: FIRST_CAPABILITY,
        };
        let [prog_if, sub_class, base_class, _] = identity.class.to_le_bytes();
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision, prog_if, sub_class, base_class]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size and latency timer are the system's to note down.
        space.allow(0x0c, &[0xff, 0xff]);
        space.set(INTERRUPT_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Declares the INTx pin that the function uses, 1 (INTA#) to 4.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.set(INTERRUPT_PIN, &[pin]);
    }

    /// Declares BAR `index`.
    ///
    /// # Errors
    /// The register is taken or missing, or the size is not one that a BAR can
    /// have.
    pub fn add_bar(&mut self, index: u8, bar: Bar) -> Result<(), ConfigError> {
        let limit = if bar.wide { 1 << 63 } else { 1 << 31 };
        if !bar.size.is_power_of_two() || !(16..=limit).contains(&bar.size) {
            return Err(ConfigError::BarSize(bar.size));
        }
        let first = usize::from(index);
        let last = first + usize::from(bar.wide);
        let below_wide = first
            .checked_sub(1)
            .and_then(|below| self.bars.get(below).copied().flatten())
            .is_some_and(|below| below.wide);
        let free = self
            .bars
            .get(first..=last)
            .is_some_and(|slots| slots.iter().all(Option::is_none));
        if below_wide || !free {
            return Err(ConfigError::BarTaken(index));
        }
        let flags = u8::from(bar.wide) << 2 | u8::from(bar.prefetchable) << 3;
        let offset = BAR0 + first * 4;
        let mask = !(bar.size - 1);
        self.set(offset, &[flags]);
        if bar.wide {
            self.allow(offset, &mask.to_le_bytes());
        } else {
            self.allow(offset, &((mask & 0xffff_ffff) as u32).to_le_bytes());
        }
        if let Some(slot) = self.bars.get_mut(first) {
            *slot = Some(bar);
        }
        Ok(())
    }

    /// Appends capability `id`, whose `body` follows the two bytes of ID and
    /// next pointer; `writable` has a bit for each of the body's bits that the
    /// guest can write. Returns the offset of the capability.
    ///
    /// # Errors
    /// It does not fit.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<usize, ConfigError> {
        let offset = self.next_capability;
        let size = body.len() + 2;
        let next = (offset + size).next_multiple_of(4);
        if next > CONFIG_SIZE || writable.len() > body.len() {
            return Err(ConfigError::NoRoom(size));
        }
        self.set(self.last_pointer, &[offset as u8]);
        self.set(STATUS, &[STATUS_CAPABILITIES]);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        self.last_pointer = offset + 1;
        self.next_capability = next;
        Ok(offset)
    }

    /// Reads bytes; beyond the space, all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes the writable bits among bytes of any number and alignment.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Written {
        let command = self.command();
        let decoded = self.decoded();
        for (at, new) in (offset..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
        Written {
            command: self.command() != command,
            decode: self.decoded() != decoded,
        }
    }

    /// The 16-bit register at `offset`; zero beyond the space.
    pub fn word(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        if offset + 2 <= CONFIG_SIZE {
            self.read(offset, &mut bytes);
        }
        u16::from_le_bytes(bytes)
    }

    /// The 32-bit register at `offset`; zero beyond the space.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.word(COMMAND)
    }

    /// The BARs that there are, with their numbers.
    pub fn bars(&self) -> impl Iterator<Item = (u8, Bar)> + '_ {
        (0..)
            .zip(&self.bars)
            .filter_map(|(index, bar)| bar.map(|bar| (index, bar)))
    }

    /// The PCI bus address in BAR `index`; none if there is no such BAR.
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        let bar = self.bars.get(usize::from(index)).copied().flatten()?;
        let offset = BAR0 + usize::from(index) * 4;
        let high = if bar.wide { self.dword(offset + 4) } else { 0 };
        Some(u64::from(high) << 32 | u64::from(self.dword(offset) & !0xf))
    }

    /// Places BAR `index` at a PCI bus address, as firmware does, and where a
    /// reset puts it back. Bits that the BAR does not have are dropped.
    pub fn place_bar(&mut self, index: u8, address: u64) {
        let Some(bar) = self.bars.get(usize::from(index)).copied().flatten() else {
            return;
        };
        let offset = BAR0 + usize::from(index) * 4;
        let bytes = address.to_le_bytes();
        let width = if bar.wide { 8 } else { 4 };
        for space in [&mut self.bytes, &mut self.initial] {
            let places = (offset..).zip(bytes.iter().take(width));
            for (at, new) in places {
                if let (Some(byte), Some(mask)) = (space.get_mut(at), self.writable.get(at)) {
                    *byte = *byte & !mask | new & mask;
                }
            }
        }
    }

    /// The BARs that the function answers now: all when the command register
    /// enables memory space, else none.
    pub fn decoded_bars(&self) -> Vec<DecodedBar> {
        self.decoded().iter().flatten().copied().collect()
    }

    fn decoded(&self) -> [Option<DecodedBar>; 6] {
        let mut decoded = [None; 6];
        if self.command() & COMMAND_MEMORY == 0 {
            return decoded;
        }
        for (slot, (index, bar)) in decoded.iter_mut().zip(self.bars()) {
            *slot = self.bar_address(index).map(|address| DecodedBar {
                bar: index,
                address,
                size: bar.size,
            });
        }
        decoded
    }

    /// Goes back to what was built and where [`place_bar`](Self::place_bar) put
    /// the BARs.
    pub fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// Sets bytes, now and for after a reset.
    fn set(&mut self, offset: usize, data: &[u8]) {
        for (at, new) in (offset..).zip(data) {
            for space in [&mut self.bytes, &mut self.initial] {
                if let Some(byte) = space.get_mut(at) {
                    *byte = *new;
                }
            }
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (at, new) in (offset..).zip(mask) {
            if let Some(byte) = self.writable.get_mut(at) {
                *byte = *new;
            }
        }
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
