//! The root bus: functions, their configuration spaces, and which of them
//! answers at which address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use thiserror::Error;

use super::Bdf;
use super::config::{Bar, ConfigSpace, DecodedBar, Identity};
use super::function::{ConfigEffect, PciFunction};
use super::window::{Allocator, PciWindow};
use crate::bus::BusDevice;

/// Device numbers on a bus.
const SLOTS: u8 = 32;

/// The generic host bridge of Red Hat's ID space, which no driver binds to:
/// systems that look for a host bridge before they trust the bus find one.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// Why a function could not be added.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PciError {
    /// The slot is taken, or there is no such slot.
    #[error("PCI slot {0} is not free (slots are 1 to 31)")]
    Slot(u8),
    /// All slots are taken.
    #[error("all 31 PCI slots are taken")]
    Full,
    /// The windows have no room for a BAR.
    #[error("no PCI address space for a BAR of {0:#x} bytes")]
    Space(u64),
}

/// Where a BAR appears to the guest.
struct Mapping {
    guest_base: u64,
    size: u64,
    bar: u8,
    bdf: Bdf,
    function: Arc<dyn PciFunction>,
}

struct State {
    functions: BTreeMap<Bdf, Arc<dyn PciFunction>>,
    allocator: Allocator,
}

/// A PCI host bridge with one bus behind it.
///
/// Function 00:00.0 is the bridge itself. Configuration accesses take a lock;
/// accesses to BARs look the function up without one.
pub struct PciRoot {
    windows: Vec<PciWindow>,
    state: Mutex<State>,
    /// By rising guest address. Replaced as a whole, under the state's lock.
    mappings: ArcSwap<Vec<Mapping>>,
}

impl PciRoot {
    /// A bus with nothing but its host bridge. BARs are placed in `windows`,
    /// which must not overlap each other.
    pub fn new(windows: &[PciWindow]) -> Arc<Self> {
        let bridge: Arc<dyn PciFunction> =
            Arc::new(HostBridge(Mutex::new(ConfigSpace::new(&HOST_BRIDGE))));
        let bdf = Bdf {
            bus: 0,
            device: 0,
            function: 0,
        };
        Arc::new(Self {
            windows: windows.to_vec(),
            state: Mutex::new(State {
                functions: BTreeMap::from([(bdf, bridge)]),
                allocator: Allocator::new(windows),
            }),
            mappings: ArcSwap::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The windows, each with what answers in it: the core puts it on the
    /// memory bus at the window's `guest_base`.
    pub fn windows(self: &Arc<Self>) -> Vec<(PciWindow, Arc<dyn BusDevice>)> {
        self.windows
            .iter()
            .map(|window| {
                let bus: Arc<dyn BusDevice> = Arc::new(WindowBus {
                    root: Arc::clone(self),
                    guest_base: window.guest_base,
                });
                (*window, bus)
            })
            .collect()
    }

    /// Adds `function` in `slot`, or in the lowest free one, and places its
    /// BARs. It decodes none of them until the guest enables memory space.
    ///
    /// # Errors
    /// The slot is taken, or there is no room for a BAR; nothing has changed
    /// then.
    pub fn add(&self, function: Arc<dyn PciFunction>, slot: Option<u8>) -> Result<Bdf, PciError> {
        let mut state = self.state();
        let at = |device| Bdf {
            bus: 0,
            device,
            function: 0,
        };
        let bdf = match slot {
            Some(slot) if slot >= SLOTS || state.functions.contains_key(&at(slot)) => {
                return Err(PciError::Slot(slot));
            }
            Some(slot) => at(slot),
            None => (1..SLOTS)
                .map(at)
                .find(|bdf| !state.functions.contains_key(bdf))
                .ok_or(PciError::Full)?,
        };
        let mut allocator = state.allocator.clone();
        let placed = function
            .bars()
            .into_iter()
            .map(|(index, bar)| {
                let address = allocator.allocate(&bar).ok_or(PciError::Space(bar.size))?;
                Ok((index, address))
            })
            .collect::<Result<Vec<_>, PciError>>()?;
        for (index, address) in placed {
            function.place_bar(index, address);
        }
        function.attach(bdf);
        state.allocator = allocator;
        state.functions.insert(bdf, function);
        Ok(bdf)
    }

    /// The functions on the bus, in rising order.
    pub fn functions(&self) -> Vec<Bdf> {
        self.state().functions.keys().copied().collect()
    }

    /// Reads a configuration register; all ones where there is no function.
    pub fn config_read(&self, bdf: Bdf, register: u16, data: &mut [u8]) {
        match self.function(bdf) {
            Some(function) => function.config_read(register, data),
            None => data.fill(0xff),
        }
    }

    /// Writes a configuration register, and follows what the function then
    /// decodes.
    pub fn config_write(&self, bdf: Bdf, register: u16, data: &[u8]) {
        if let Some(function) = self.function(bdf)
            && function.config_write(register, data).decode
        {
            let state = self.state();
            self.remap(&state, bdf, &function);
        }
    }

    /// Writes at `offset` of BAR `bar` of the function `bdf`, wherever the BAR
    /// is and whether it is decoded or not: as firmware sets a device up that
    /// the guest only then drives.
    pub fn bar_write(&self, bdf: Bdf, bar: u8, offset: u64, data: &[u8]) {
        if let Some(function) = self.function(bdf) {
            function.bar_write(bar, offset, data);
        }
    }

    /// Resets every function, as at the reset of the machine.
    pub fn reset(&self) {
        let state = self.state();
        for (bdf, function) in &state.functions {
            function.reset();
            self.remap(&state, *bdf, function);
        }
    }

    fn function(&self, bdf: Bdf) -> Option<Arc<dyn PciFunction>> {
        self.state().functions.get(&bdf).cloned()
    }

    /// Makes the mappings of one function what it decodes now. `_state` shows
    /// that the caller holds the lock, without which an older view of a
    /// function could overwrite a newer one.
    fn remap(&self, _state: &State, bdf: Bdf, function: &Arc<dyn PciFunction>) {
        let decoded = function.decoded_bars();
        let mapped: Vec<(DecodedBar, u64)> = decoded
            .into_iter()
            .filter_map(|bar| {
                let guest = self
                    .windows
                    .iter()
                    .find_map(|w| w.guest_address(bar.address, bar.size))?;
                Some((bar, guest))
            })
            .collect();
        let old = self.mappings.load();
        let mut new: Vec<Mapping> = old
            .iter()
            .filter(|m| m.bdf != bdf)
            .map(|m| Mapping {
                function: Arc::clone(&m.function),
                ..*m
            })
            .collect();
        new.extend(mapped.iter().map(|(bar, guest_base)| Mapping {
            guest_base: *guest_base,
            size: bar.size,
            bar: bar.bar,
            bdf,
            function: Arc::clone(function),
        }));
        new.sort_by_key(|m| (m.guest_base, m.bdf, m.bar));
        self.mappings.store(Arc::new(new));
        let places: Vec<_> = mapped
            .iter()
            .map(|(bar, guest)| (bar.bar, *guest))
            .collect();
        function.bars_mapped(&places);
    }

    /// Calls `access` with the mapping that answers at `address` and the offset
    /// in it; false when none does. Where a guest has made BARs overlap, the
    /// one that starts higher answers.
    fn at(&self, address: u64, len: usize, access: impl FnOnce(&Mapping, u64)) -> bool {
        let mappings = self.mappings.load();
        let next = mappings.partition_point(|m| m.guest_base <= address);
        let Some(mapping) = next.checked_sub(1).and_then(|i| mappings.get(i)) else {
            return false;
        };
        let offset = address - mapping.guest_base;
        let end = u64::try_from(len)
            .ok()
            .and_then(|len| offset.checked_add(len));
        if end.is_none_or(|end| end > mapping.size) {
            return false;
        }
        access(mapping, offset);
        true
    }
}

/// What answers in a window: the function whose BAR is decoded there. Nobody's
/// addresses read as all ones, as a master abort does.
struct WindowBus {
    root: Arc<PciRoot>,
    guest_base: u64,
}

impl BusDevice for WindowBus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let address = self.guest_base.wrapping_add(offset);
        let len = data.len();
        if !self.root.at(address, len, |m, at| {
            m.function.bar_read(m.bar, at, &mut *data)
        }) {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let address = self.guest_base.wrapping_add(offset);
        self.root.at(address, data.len(), |m, at| {
            m.function.bar_write(m.bar, at, data);
        });
    }
}

/// The bridge's own function: a header and nothing else.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn attach(&self, _bdf: Bdf) {}

    fn bars(&self) -> Vec<(u8, Bar)> {
        Vec::new()
    }

    fn place_bar(&self, _bar: u8, _address: u64) {}

    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.config().read(register.into(), data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect {
        self.config().write(register.into(), data);
        ConfigEffect::default()
    }

    fn decoded_bars(&self) -> Vec<DecodedBar> {
        Vec::new()
    }

    fn bars_mapped(&self, _mapped: &[(u8, u64)]) {}

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {
        self.config().reset();
    }
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
