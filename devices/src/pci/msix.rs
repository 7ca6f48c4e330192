//! MSI-X: capability, vector table and pending bit array (PCI Local Bus
//! Specification 3.0, section 6.8.2).

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::irq::{MsiMessage, MsiVectors};

/// Capability ID of MSI-X.
pub const CAPABILITY_ID: u8 = 0x11;
/// Size of a table entry, in bytes.
pub const ENTRY_SIZE: u64 = 16;
/// The most vectors that a function can have.
pub const MAX_VECTORS: u16 = 2048;
/// Offset of the message control register in the capability.
pub const CONTROL: usize = 2;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

#[derive(Clone, Copy, Debug)]
struct Entry {
    address_low: u32,
    address_high: u32,
    data: u32,
    masked: bool,
    pending: bool,
    /// What the vector is bound to now.
    route: Option<MsiMessage>,
}

/// As a reset leaves it: masked (section 6.8.2.9).
const EMPTY: Entry = Entry {
    address_low: 0,
    address_high: 0,
    data: 0,
    masked: true,
    pending: false,
    route: None,
};

struct State {
    enabled: bool,
    masked: bool,
    requester: u16,
    entries: Vec<Entry>,
}

/// The MSI-X of one function: what the guest programs, and the vectors that
/// follow it.
///
/// A vector has a route exactly while MSI-X is enabled and neither the function
/// nor the vector is masked; what is raised in between is pending and fires
/// when the mask goes.
pub struct Msix {
    vectors: Arc<dyn MsiVectors>,
    /// A copy of the state's, for [`enabled`](Self::enabled) without the lock.
    enabled: AtomicBool,
    state: Mutex<State>,
}

impl Msix {
    /// With as many vectors as `vectors` has, up to [`MAX_VECTORS`]; disabled.
    pub fn new(vectors: Arc<dyn MsiVectors>) -> Self {
        let count = vectors.count().min(MAX_VECTORS);
        Self {
            vectors,
            enabled: AtomicBool::new(false),
            state: Mutex::new(State {
                enabled: false,
                masked: false,
                requester: 0,
                entries: vec![EMPTY; count.into()],
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.vectors.count().min(MAX_VECTORS)
    }

    /// The body of the capability, for a table and a pending bit array at these
    /// offsets (multiples of 8) of BAR `bar`.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let (control, places) = body.split_at_mut(2);
        control.copy_from_slice(&self.count().saturating_sub(1).to_le_bytes());
        let (table_place, pending_place) = places.split_at_mut(4);
        table_place.copy_from_slice(&(table & !7 | u32::from(bar & 7)).to_le_bytes());
        pending_place.copy_from_slice(&(pending & !7 | u32::from(bar & 7)).to_le_bytes());
        body
    }

    /// The bits of [`capability`](Self::capability) that a guest can write.
    pub fn capability_writable() -> [u8; 2] {
        (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes()
    }

    /// Sets the requester ID that messages carry.
    pub fn set_requester(&self, requester: u16) {
        let mut state = self.state();
        state.requester = requester;
        self.update_all(&mut state);
    }

    /// Whether MSI-X is enabled, and so INTx is not used.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// The guest has written the message control register.
    pub fn set_control(&self, control: u16) {
        let mut state = self.state();
        let enabled = control & CONTROL_ENABLE != 0;
        let masked = control & CONTROL_MASK_ALL != 0;
        if (state.enabled, state.masked) == (enabled, masked) {
            return;
        }
        state.enabled = enabled;
        state.masked = masked;
        self.enabled.store(enabled, Ordering::Release);
        self.update_all(&mut state);
    }

    /// Reads the table at `offset`. Only aligned 32- and 64-bit accesses are
    /// defined; others read as zeroes.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        let state = self.state();
        // Both words of a 64-bit access are in one entry.
        let Some(entry) = entry_index(offset).and_then(|i| state.entries.get(i)) else {
            return;
        };
        let (words, _) = data.as_chunks_mut::<4>();
        for (field, word) in (offset % ENTRY_SIZE / 4..).zip(words) {
            let value = match field {
                0 => entry.address_low,
                1 => entry.address_high,
                2 => entry.data,
                _ => entry.masked.into(),
            };
            *word = value.to_le_bytes();
        }
    }

    /// Writes the table at `offset`; other than aligned 32- and 64-bit accesses
    /// are ignored.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        let mut state = self.state();
        let Some(index) = entry_index(offset) else {
            return;
        };
        let Some(entry) = state.entries.get_mut(index) else {
            return;
        };
        let (words, _) = data.as_chunks::<4>();
        for (field, word) in (offset % ENTRY_SIZE / 4..).zip(words) {
            let value = u32::from_le_bytes(*word);
            match field {
                0 => entry.address_low = value & !3,
                1 => entry.address_high = value,
                2 => entry.data = value,
                _ => entry.masked = value & VECTOR_MASKED != 0,
            }
        }
        self.update(&mut state, index);
    }

    /// Reads the pending bit array at `offset`.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        let state = self.state();
        let Some(entries) = usize::try_from(offset)
            .ok()
            .and_then(|at| at.checked_mul(8))
            .and_then(|first| state.entries.get(first..))
        else {
            return;
        };
        for (byte, entries) in data.iter_mut().zip(entries.chunks(8)) {
            *byte = entries
                .iter()
                .rev()
                .fold(0, |bits, entry| bits << 1 | u8::from(entry.pending));
        }
    }

    /// Raises `vector`, now or when it is unmasked. One that the function does
    /// not have is ignored.
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    pub fn raise(&self, vector: u16) -> io::Result<()> {
        let mut state = self.state();
        match state.entries.get_mut(usize::from(vector)) {
            Some(entry) if entry.route.is_some() => self.vectors.raise(vector),
            Some(entry) => {
                entry.pending = true;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Disables MSI-X and empties the table.
    pub fn reset(&self) {
        let mut state = self.state();
        state.enabled = false;
        state.masked = false;
        self.enabled.store(false, Ordering::Release);
        for entry in &mut state.entries {
            *entry = Entry {
                route: entry.route,
                ..EMPTY
            };
        }
        self.update_all(&mut state);
    }

    fn update_all(&self, state: &mut State) {
        for index in 0..state.entries.len() {
            self.update(state, index);
        }
    }

    /// Makes the route of a vector what the guest has programmed.
    fn update(&self, state: &mut State, index: usize) {
        let (enabled, masked, requester) = (state.enabled, state.masked, state.requester);
        let (Some(entry), Ok(vector)) = (state.entries.get_mut(index), u16::try_from(index)) else {
            return;
        };
        if !enabled {
            entry.pending = false;
        }
        let route = (enabled && !masked && !entry.masked).then(|| MsiMessage {
            address: u64::from(entry.address_high) << 32 | u64::from(entry.address_low),
            data: entry.data,
            device_id: requester.into(),
        });
        if route == entry.route {
            return;
        }
        if let Err(error) = self.vectors.route(vector, route) {
            log::warn!("cannot route MSI-X vector {vector}: {error}");
            // What it is bound to is unknown now: nothing is raised through it
            // until the guest programs it anew.
            entry.route = None;
            return;
        }
        entry.route = route;
        if route.is_some()
            && std::mem::take(&mut entry.pending)
            && let Err(error) = self.vectors.raise(vector)
        {
            log::warn!("cannot raise MSI-X vector {vector}: {error}");
        }
    }
}

fn aligned(offset: u64, len: usize) -> bool {
    match len {
        4 => offset.is_multiple_of(4),
        8 => offset.is_multiple_of(8),
        _ => false,
    }
}

fn entry_index(offset: u64) -> Option<usize> {
    usize::try_from(offset / ENTRY_SIZE).ok()
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
