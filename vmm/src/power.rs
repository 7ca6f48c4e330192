//! Requests to end or restart the VM, from wherever they come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
}

/// A handle by which the terminal, signals and the like make requests, from
/// the first run of a VM to the last.
#[derive(Clone, Debug)]
pub struct Requests(Sender<Event>);

impl Requests {
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

    /// Asks for the end of the run.
    pub fn end(&self, end: End) {
        let data = Vec::new();
        self.send(Event::End { end, data });
    }
}

/// A handle by which the devices and vCPUs of one run announce its end.
#[derive(Clone, Debug)]
pub struct Power {
    requests: Requests,
    ended: Arc<AtomicBool>,
}

impl Power {
    /// A handle for a new run.
    pub fn new(requests: &Requests) -> Self {
        Self {
            requests: requests.clone(),
            ended: Arc::default(),
        }
    }

    /// Whether the end of this run has been announced: vCPUs then run no
    /// further.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Announces the end of the run; only the first one counts. `data` is what
    /// came with KVM_EXIT_SYSTEM_EVENT.
    pub fn end_with(&self, end: End, data: Vec<u64>) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            self.requests.send(Event::End { end, data });
        }
    }

    /// Announces the end of the run.
    pub fn end(&self, end: End) {
        self.end_with(end, Vec::new());
    }

    /// The guest powers off.
    pub fn power_off(&self) {
        self.end(End::PowerOff);
    }

    /// The guest asks for a reset.
    pub fn reset(&self) {
        self.end(End::Reset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_of_a_run_counts() {
        let (requests, events) = Requests::new();
        let power = Power::new(&requests);
        requests.send(Event::AskPowerOff);
        assert!(!power.ended());
        power.reset();
        power.power_off();
        assert!(power.ended());
        let next = Power::new(&requests);
        assert!(!next.ended());
        next.power_off();
        requests.end(End::Quit);
        drop((power, next, requests));
        let end = |end| Event::End { end, data: vec![] };
        assert_eq!(
            events.iter().collect::<Vec<_>>(),
            [
                Event::AskPowerOff,
                end(End::Reset),
                end(End::PowerOff),
                end(End::Quit)
            ]
        );
    }
}
