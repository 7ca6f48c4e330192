//! PCI configuration and message-signalled interrupts by RTAS (Linux on Power
//! Architecture Reference, sections 7.3.4 and 7.3.10.5).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossvisor_devices::pci::config::{CAPABILITIES_POINTER, CONFIG_SIZE};
use crossvisor_devices::pci::msix::{CAPABILITY_ID, CONTROL, ENTRY_SIZE};
use crossvisor_devices::pci::{Bdf, PciRoot};

use super::super::fdt::BUID;
use super::super::sources;
use super::{
    CHANGE_MSI, HARDWARE_ERROR, IBM_READ_PCI_CONFIG, IBM_WRITE_PCI_CONFIG, PARAMETER_ERROR,
    QUERY_INTERRUPT_SOURCE, READ_PCI_CONFIG, Results, WRITE_PCI_CONFIG,
};

// Functions of ibm,change-msi: the oldest, for whatever kind there is; MSI and
// MSI-X by name.
const CHANGE_ANY: u32 = 1;
const CHANGE_MSI_ONLY: u32 = 3;
const CHANGE_MSIX: u32 = 4;
/// The kind of interrupt that it answers with.
const TYPE_MSIX: u32 = 2;
/// A source is triggered by an edge.
const EDGE: u32 = 1;

/// The calls about one PCI host bridge.
pub struct PciCalls {
    root: Arc<PciRoot>,
    /// How many messages each function has been given.
    messages: Mutex<BTreeMap<Bdf, u16>>,
}

/// The function and register of a configuration address (section 7.3.4.1): the
/// register's upper four bits are on top.
fn target(address: u32) -> (Bdf, u16) {
    let bdf = Bdf {
        bus: (address >> 16) as u8,
        device: (address >> 11 & 0x1f) as u8,
        function: (address >> 8 & 7) as u8,
    };
    (bdf, (address >> 20 & 0xf00 | address & 0xff) as u16)
}

/// Whether the two words name this machine's host bridge.
fn is_ours(high: u32, low: u32) -> bool {
    u64::from(high) << 32 | u64::from(low) == BUID
}

/// Size and alignment of a configuration access.
fn access(register: u16, size: u32) -> Option<usize> {
    let size = usize::try_from(size).ok()?;
    let sound = matches!(size, 1 | 2 | 4) && usize::from(register).is_multiple_of(size);
    sound.then_some(size)
}

impl PciCalls {
    /// Calls about `root`.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self {
            root,
            messages: Mutex::default(),
        }
    }

    /// Makes the call with `token`; the guest has room for `room` words of
    /// results, the status included.
    pub fn call(&self, token: u32, args: &[u32], room: usize) -> Results {
        match (token, args) {
            (READ_PCI_CONFIG, [address, size]) => self.read(*address, *size),
            (IBM_READ_PCI_CONFIG, [address, high, low, size]) if is_ours(*high, *low) => {
                self.read(*address, *size)
            }
            (WRITE_PCI_CONFIG, [address, size, value]) => self.write(*address, *size, *value),
            (IBM_WRITE_PCI_CONFIG, [address, high, low, size, value]) if is_ours(*high, *low) => {
                self.write(*address, *size, *value)
            }
            (CHANGE_MSI, [address, high, low, function, count, _]) if is_ours(*high, *low) => {
                self.change_msi(target(*address).0, *function, *count, room)
            }
            (QUERY_INTERRUPT_SOURCE, [address, high, low, index]) if is_ours(*high, *low) => {
                self.query_source(target(*address).0, *index)
            }
            (
                READ_PCI_CONFIG
                | WRITE_PCI_CONFIG
                | IBM_READ_PCI_CONFIG
                | IBM_WRITE_PCI_CONFIG
                | CHANGE_MSI
                | QUERY_INTERRUPT_SOURCE,
                _,
            ) => Err(PARAMETER_ERROR),
            // Nobody's token.
            _ => Err(HARDWARE_ERROR),
        }
    }

    /// The value is a number; configuration space is little-endian.
    fn read(&self, address: u32, size: u32) -> Results {
        let (bdf, register) = target(address);
        let size = access(register, size).ok_or(PARAMETER_ERROR)?;
        let mut bytes = [0; 4];
        if let Some(bytes) = bytes.get_mut(..size) {
            self.root.config_read(bdf, register, bytes);
        }
        Ok(vec![u32::from_le_bytes(bytes)])
    }

    fn write(&self, address: u32, size: u32, value: u32) -> Results {
        let (bdf, register) = target(address);
        let size = access(register, size).ok_or(PARAMETER_ERROR)?;
        if let Some(bytes) = value.to_le_bytes().get(..size) {
            self.root.config_write(bdf, register, bytes);
        }
        Ok(Vec::new())
    }

    fn messages(&self) -> MutexGuard<'_, BTreeMap<Bdf, u16>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a function `count` messages, in place of those that it has, and
    /// programs them; 0 takes them away. The answer tells how many it got.
    fn change_msi(&self, bdf: Bdf, function: u32, count: u32, room: usize) -> Results {
        let table = self.table(bdf).ok_or(PARAMETER_ERROR)?;
        let given = match (function, count) {
            (CHANGE_ANY | CHANGE_MSI_ONLY | CHANGE_MSIX, 0) => 0,
            (CHANGE_MSIX, count) => {
                let most = table.entries.min(sources::MSIS_PER_SLOT);
                u16::try_from(count).map_or(most, |count| count.min(most))
            }
            // No device here has MSI of the older kind.
            _ => return Err(PARAMETER_ERROR),
        };
        for index in 0..given {
            if let Some(message) = sources::message(bdf, index) {
                let at = table.offset + u64::from(index) * ENTRY_SIZE;
                let set = |at, word: u32| {
                    self.root.bar_write(bdf, table.bar, at, &word.to_le_bytes());
                };
                set(at, message.address as u32);
                set(at + 4, (message.address >> 32) as u32);
                set(at + 8, message.data);
            }
        }
        self.messages().insert(bdf, given);
        // The number for a next call, of which there is none; and the kind for
        // callers that ask.
        let mut results = vec![given.into(), 1];
        if room > 3 {
            results.push(TYPE_MSIX);
        }
        Ok(results)
    }

    fn query_source(&self, bdf: Bdf, index: u32) -> Results {
        let given = self.messages().get(&bdf).copied().unwrap_or(0);
        let index = u16::try_from(index).ok().filter(|index| *index < given);
        let source = index.and_then(|index| sources::msi(bdf.device, index));
        Ok(vec![source.ok_or(PARAMETER_ERROR)?, EDGE])
    }

    /// Where the function's MSI-X table is.
    fn table(&self, bdf: Bdf) -> Option<Table> {
        let byte = |register: usize| {
            let mut byte = [0];
            let register = u16::try_from(register).ok()?;
            self.root.config_read(bdf, register, &mut byte);
            Some(byte[0])
        };
        let word = |register| Some(u16::from_le_bytes([byte(register)?, byte(register + 1)?]));
        // No list is longer than the space it is in.
        let mut at = usize::from(byte(CAPABILITIES_POINTER)?);
        for _ in 0..CONFIG_SIZE / 4 {
            if !(0x40..CONFIG_SIZE - 12).contains(&at) {
                return None;
            }
            if byte(at)? == CAPABILITY_ID {
                let [low, high] = [word(at + 4)?, word(at + 6)?].map(u64::from);
                let place = high << 16 | low;
                return Some(Table {
                    bar: (place & 7) as u8,
                    offset: place & !7,
                    entries: (word(at + CONTROL)? & 0x7ff) + 1,
                });
            }
            at = usize::from(byte(at + 1)?);
        }
        None
    }
}

/// Where an MSI-X table is.
struct Table {
    bar: u8,
    offset: u64,
    entries: u16,
}
