//! How a guest reaches configuration space: ECAM (PCI Express Base
//! Specification 3.0, section 7.2.2), and on x86 configuration mechanism #1
//! (PCI Local Bus Specification 3.0, section 3.2.2.3.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use super::Bdf;
use super::root::PciRoot;
use crate::bus::BusDevice;

/// Bytes of ECAM space for each bus.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;

/// Memory-mapped configuration space: 4 KiB for each function, from bus 0 up.
pub struct Ecam {
    root: Arc<PciRoot>,
}

impl Ecam {
    /// Onto `root`; for one bus it takes [`ECAM_BUS_SIZE`] bytes.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root }
    }

    /// The function and register at `offset`; none where bus numbers end, or
    /// when an access would run into the next function.
    fn target(offset: u64, len: usize) -> Option<(Bdf, u16)> {
        let register = (offset & 0xfff) as u16;
        if usize::from(register) + len > 0x1000 {
            return None;
        }
        let bdf = Bdf {
            bus: u8::try_from(offset >> 20).ok()?,
            device: (offset >> 15 & 0x1f) as u8,
            function: (offset >> 12 & 0x7) as u8,
        };
        Some((bdf, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset, data.len()) {
            Some((bdf, register)) => self.root.config_read(bdf, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bdf, register)) = Self::target(offset, data.len()) {
            self.root.config_write(bdf, register, data);
        }
    }
}

/// First port of [`ConfigMechanism1`].
pub const MECHANISM1_PORT: u16 = 0xcf8;
/// Number of ports of [`ConfigMechanism1`].
pub const MECHANISM1_SIZE: u16 = 8;

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Offset of the reset control register, among the address register's bytes.
const RESET_CONTROL: u64 = 1;
/// Reset control: resets the CPU when set.
const RESET_CPU: u8 = 1 << 2;

/// Configuration mechanism #1: the address register at port 0xcf8, the data
/// register at 0xcfc, and at 0xcf9 the reset control register that chipsets
/// have had there since the 82371SB.
pub struct ConfigMechanism1 {
    root: Arc<PciRoot>,
    address: AtomicU32,
    reset_control: AtomicU8,
    on_reset: Option<Box<dyn Fn() + Send + Sync>>,
}

impl ConfigMechanism1 {
    /// Onto `root`. `on_reset` is called when the guest resets the machine
    /// through port 0xcf9; without it that register does not exist.
    pub fn new(root: Arc<PciRoot>, on_reset: Option<Box<dyn Fn() + Send + Sync>>) -> Self {
        Self {
            root,
            address: AtomicU32::new(0),
            reset_control: AtomicU8::new(0),
            on_reset,
        }
    }

    /// The function and register that the data register stands for, `offset`
    /// bytes into it.
    fn target(&self, offset: u64, len: usize) -> Option<(Bdf, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let lane = u16::try_from(offset.checked_sub(4)?).ok()?;
        if address & ADDRESS_ENABLE == 0 || usize::from(lane) + len > 4 {
            return None;
        }
        let bdf = Bdf {
            bus: (address >> 16 & 0xff) as u8,
            device: (address >> 11 & 0x1f) as u8,
            function: (address >> 8 & 0x7) as u8,
        };
        Some((bdf, (address & 0xfc) as u16 + lane))
    }
}

impl BusDevice for ConfigMechanism1 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((bdf, register)) = self.target(offset, data.len()) {
            return self.root.config_read(bdf, register, data);
        }
        if offset == 0
            && let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data)
        {
            *word = self.address.load(Ordering::Relaxed).to_le_bytes();
        } else if offset == RESET_CONTROL
            && self.on_reset.is_some()
            && let [byte] = data
        {
            *byte = self.reset_control.load(Ordering::Relaxed);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bdf, register)) = self.target(offset, data.len()) {
            return self.root.config_write(bdf, register, data);
        }
        if offset == 0
            && let Ok(word) = <[u8; 4]>::try_from(data)
        {
            // Only a whole double word reaches the address register.
            let address = u32::from_le_bytes(word) & !0x7f00_0003;
            self.address.store(address, Ordering::Relaxed);
        } else if offset == RESET_CONTROL
            && let Some(on_reset) = &self.on_reset
            && let [byte] = *data
        {
            self.reset_control
                .store(byte & !RESET_CPU, Ordering::Relaxed);
            if byte & RESET_CPU != 0 {
                on_reset();
            }
        }
    }
}

#[cfg(test)]
#[path = "access_tests.rs"]
mod tests;
