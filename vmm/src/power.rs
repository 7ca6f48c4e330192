//! Requests to end or restart the VM, from wherever they come.

use std::sync::mpsc::{Receiver, Sender, channel};

use crate::exit::End;

/// Something that the VM's main thread acts on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The VM's run is over.
    End {
        /// How.
        end: End,
        /// What came with KVM_EXIT_SYSTEM_EVENT, if that is where it came from.
        data: Vec<u64>,
    },
    /// The user or the host asks the guest to power off.
    AskPowerOff,
    /// A part of the VMM failed; it cannot go on.
    Fatal(String),
}

/// A handle by which devices, vCPUs and signals make requests.
#[derive(Clone, Debug)]
pub struct Power(Sender<Event>);

impl Power {
    /// A handle, and the end at which its requests arrive.
    pub fn new() -> (Self, Receiver<Event>) {
        let (sender, receiver) = channel();
        (Self(sender), receiver)
    }

    /// Makes a request. When the VM is over already, nothing happens.
    pub fn send(&self, event: Event) {
        // The receiver is gone only when the VM has ended: nothing to ask for.
        let _ = self.0.send(event);
    }

    /// The guest powers off.
    pub fn power_off(&self) {
        self.end(End::PowerOff);
    }

    /// The guest asks for a reset.
    pub fn reset(&self) {
        self.end(End::Reset);
    }

    /// The run is over.
    pub fn end(&self, end: End) {
        let data = Vec::new();
        self.send(Event::End { end, data });
    }
}
