//! The virtual terminal of a PAPR partition, "hvterm1" (Linux on Power
//! Architecture Reference, section 16.4, "Virtual Terminal"): hypercalls that
//! carry up to 16 characters each.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chardev::ConsoleInput;
use crate::irq::IrqLine;
use crate::output::Output;

/// Characters that one hypercall carries.
pub const MAX_CHARS: usize = 16;

/// How long a vCPU waits for a full output buffer before characters are
/// dropped.
const PATIENCE: Duration = Duration::from_secs(1);
/// Input that the terminal holds.
const RX_CAPACITY: usize = 256;

/// A virtual terminal with an edge-triggered interrupt for input.
pub struct Hvterm {
    state: Mutex<State>,
    output: Arc<Output>,
    room: EventFd,
    irq: Arc<dyn IrqLine>,
}

#[derive(Default)]
struct State {
    rx: VecDeque<u8>,
    /// A pusher found the input full and waits for the event.
    starved: bool,
}

impl Hvterm {
    /// A terminal that interrupts through `irq` and prints to `output`.
    ///
    /// # Errors
    /// An event could not be made.
    pub fn new(irq: Arc<dyn IrqLine>, output: Arc<Output>) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            output,
            room: EventFd::new(EFD_NONBLOCK)?,
            irq,
        })
    }

    /// Prints characters. What nobody takes for a while is lost: a guest that
    /// was told to come again would print nothing else until somebody does,
    /// with its console locked (Linux, hvc_console_print).
    pub fn put(&self, chars: &[u8]) {
        self.output.push_all(chars, PATIENCE);
    }

    /// Characters that the host did not take.
    pub fn lost(&self) -> u64 {
        self.output.lost()
    }

    /// Takes up to [`MAX_CHARS`] characters that were typed.
    pub fn get(&self) -> Vec<u8> {
        let mut state = self.lock();
        let count = state.rx.len().min(MAX_CHARS);
        let chars = state.rx.drain(..count).collect();
        if state.starved && state.rx.len() <= RX_CAPACITY / 2 {
            state.starved = false;
            // Fails only when the event is signalled already.
            let _ = self.room.write(1);
        }
        chars
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleInput for Hvterm {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let was_empty = state.rx.is_empty();
        let count = bytes.len().min(RX_CAPACITY - state.rx.len());
        state.rx.extend(bytes.iter().take(count));
        state.starved |= count < bytes.len();
        // Drivers take all there is after an interrupt.
        if was_empty
            && count > 0
            && let Err(error) = self.irq.set(true).and_then(|()| self.irq.set(false))
        {
            log::warn!("hvterm: cannot raise the interrupt: {error}");
        }
        count
    }

    fn room(&self) -> &EventFd {
        &self.room
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::CAPACITY;
    use crate::output::tests::{Blocked, output};
    use crate::testing::Wire;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn prints_what_is_put() {
        let sink = Sink::default();
        let terminal = Hvterm::new(Arc::new(Wire::default()), output(&sink)).unwrap();
        terminal.put(b"hello, ");
        terminal.put(b"");
        terminal.put(b"world");
        drop(terminal);
        assert_eq!(*sink.0.lock().unwrap(), b"hello, world");
    }

    #[test]
    fn a_guest_goes_on_when_nobody_takes_what_it_prints() {
        let sink = Blocked::default();
        let terminal = Hvterm::new(Arc::new(Wire::default()), output(&sink)).unwrap();
        for _ in 0..2 * CAPACITY / MAX_CHARS {
            terminal.put(&[b'x'; MAX_CHARS]);
        }
        assert!(terminal.lost() > 0);
        sink.open();
    }

    #[test]
    fn input_interrupts_once_until_it_is_taken() {
        let wire = Arc::new(Wire::default());
        let terminal = Hvterm::new(wire.clone(), Arc::new(Output::nowhere().unwrap())).unwrap();
        assert_eq!(terminal.push(b""), 0);
        assert_eq!(wire.edges(), 0);
        assert_eq!(terminal.push(b"0123456789"), 10);
        assert_eq!(terminal.push(b"abcdefghij"), 10);
        assert_eq!(wire.edges(), 1);
        assert_eq!(terminal.get(), b"0123456789abcdef");
        assert_eq!(terminal.get(), b"ghij");
        assert_eq!(terminal.get(), b"");
        assert_eq!(terminal.push(b"x"), 1);
        assert_eq!(wire.edges(), 2);
    }

    #[test]
    fn full_input_takes_no_more_and_says_when_it_does() {
        let terminal = Hvterm::new(
            Arc::new(Wire::default()),
            Arc::new(Output::nowhere().unwrap()),
        )
        .unwrap();
        assert_eq!(terminal.push(&[b'x'; 300]), RX_CAPACITY);
        assert_eq!(terminal.push(b"y"), 0);
        assert!(terminal.room().read().is_err());
        while !terminal.get().is_empty() {}
        assert_eq!(terminal.room().read().unwrap(), 1);
    }
}
