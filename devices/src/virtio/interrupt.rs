//! The interrupt status register with a wire behind it, as virtio-mmio and
//! virtio-pci without MSI-X have it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::irq::IrqLine;

/// Interrupt status: a queue has used buffers (virtio 1.2, sections 4.1.4.5 and
/// 4.2.2).
pub const ISR_QUEUE: u8 = 1;
/// Interrupt status: the configuration or the device status has changed.
pub const ISR_CONFIG: u8 = 2;

struct State {
    status: u8,
    enabled: bool,
    /// What the wire was last told.
    asserted: bool,
}

/// Interrupt status bits and the wire that they drive.
pub struct StatusLine {
    line: Arc<dyn IrqLine>,
    // One lock over the bits and the wire: an acknowledgement must not lower
    // the wire after a new interrupt has raised it.
    state: Mutex<State>,
}

impl StatusLine {
    /// With no bit set, and the wire in use.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self {
            line,
            state: Mutex::new(State {
                status: 0,
                enabled: true,
                asserted: false,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets `bits` and asserts the wire, again if it is asserted already: on an
    /// edge-triggered wire each interrupt is an edge of its own.
    ///
    /// # Errors
    /// The interrupt could not be delivered; the bits are set nevertheless.
    pub fn raise(&self, bits: u8) -> io::Result<()> {
        let mut state = self.state();
        state.status |= bits;
        self.drive(&mut state, true)
    }

    /// Sets `bits` without an interrupt.
    pub fn mark(&self, bits: u8) {
        self.state().status |= bits;
    }

    /// The bits that are set.
    pub fn status(&self) -> u8 {
        self.state().status
    }

    /// Clears `bits`, deasserts the wire when none is left, and returns those
    /// that were set before.
    pub fn acknowledge(&self, bits: u8) -> u8 {
        let mut state = self.state();
        let before = state.status;
        state.status &= !bits;
        self.drive_quietly(&mut state);
        before
    }

    /// Takes the wire in use or out of it (the PCI command register's Interrupt
    /// Disable, or MSI-X in its place). Out of use it is deasserted, and bits
    /// that are set meanwhile assert it when it comes back.
    pub fn enable(&self, enabled: bool) {
        let mut state = self.state();
        if state.enabled != enabled {
            state.enabled = enabled;
            self.drive_quietly(&mut state);
        }
    }

    fn drive_quietly(&self, state: &mut State) {
        if let Err(error) = self.drive(state, false) {
            log::warn!("cannot drive an interrupt line: {error}");
        }
    }

    fn drive(&self, state: &mut State, again: bool) -> io::Result<()> {
        let asserted = state.enabled && state.status != 0;
        if asserted == state.asserted && !(asserted && again) {
            return Ok(());
        }
        state.asserted = asserted;
        self.line.set(asserted)
    }
}
