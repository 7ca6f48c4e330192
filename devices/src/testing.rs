//! Doubles that the devices' unit tests share.

use std::io;
use std::sync::Mutex;

use crate::irq::IrqLine;

/// A wire that remembers its level and its rising edges.
#[derive(Default)]
pub(crate) struct Wire(Mutex<(bool, u32)>);

impl Wire {
    pub(crate) fn level(&self) -> bool {
        self.0.lock().unwrap().0
    }

    /// Rising edges so far.
    pub(crate) fn edges(&self) -> u32 {
        self.0.lock().unwrap().1
    }
}

impl IrqLine for Wire {
    fn set(&self, asserted: bool) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        if asserted && !state.0 {
            state.1 += 1;
        }
        state.0 = asserted;
        Ok(())
    }
}
