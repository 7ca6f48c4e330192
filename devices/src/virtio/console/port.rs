//! The host's end of console ports.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chardev::ConsoleInput;
use crate::output::Output;
use crate::virtio::buffers::Writable;

/// Typed bytes that wait for the guest.
const INPUT_CAPACITY: usize = 4096;

/// A stream between host and guest, which the guest finds by its name (Linux:
/// `/dev/virtio-ports/NAME`).
pub struct Port {
    /// Its name, such as `org.crossvisor.io`.
    pub name: String,
    /// Where what the guest reads comes from, once the guest has opened the
    /// port. At its end the guest sees an end of file. It need not be
    /// non-blocking.
    pub input: Option<OwnedFd>,
    /// Where what the guest writes goes; `None`: nowhere.
    pub output: Option<Arc<Output>>,
    /// Called on the device's thread when the guest opens (true) or closes the
    /// port; it must not block.
    pub on_open: Option<OpenCallback>,
}

/// See [`Port::on_open`].
pub type OpenCallback = Box<dyn Fn(bool) + Send + Sync>;

/// A port as the device keeps it over resets.
pub(super) struct HostPort {
    pub(super) name: Option<String>,
    pub(super) input: HostInput,
    pub(super) output: Option<Arc<Output>>,
    pub(super) on_open: Option<OpenCallback>,
}

/// Where a port's input comes from.
pub(super) enum HostInput {
    /// A terminal's user.
    Console(Arc<Input>),
    /// A descriptor.
    Stream(OwnedFd),
    /// Nowhere.
    Nothing,
}

impl HostPort {
    /// Port 0, the console.
    pub(super) fn console(output: Arc<Output>) -> io::Result<Self> {
        Ok(Self {
            name: None,
            input: HostInput::Console(Arc::new(Input::new()?)),
            output: Some(output),
            on_open: None,
        })
    }

    /// One of the other ports.
    pub(super) fn named(port: Port) -> Self {
        Self {
            name: Some(port.name),
            input: port.input.map_or(HostInput::Nothing, HostInput::Stream),
            output: port.output,
            on_open: port.on_open,
        }
    }
}

/// What a user has typed and the guest has not yet taken.
pub(super) struct Input {
    state: Mutex<InputState>,
    /// Signalled when bytes have come.
    pub(super) arrived: EventFd,
    room: EventFd,
}

#[derive(Default)]
struct InputState {
    bytes: VecDeque<u8>,
    /// A pusher found no room and waits for the event.
    starved: bool,
}

impl Input {
    fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            arrived: EventFd::new(EFD_NONBLOCK)?,
            room: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, InputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().bytes.is_empty()
    }

    /// Moves as much as fits into `buffer`, and returns how many bytes that was.
    pub(super) fn take(&self, mut buffer: Writable<'_>) -> usize {
        let mut state = self.lock();
        let (first, second) = state.bytes.as_slices();
        let taken = buffer.write(first) + buffer.write(second);
        state.bytes.drain(..taken);
        if taken > 0 && std::mem::take(&mut state.starved) {
            // Fails only when the event is signalled already.
            let _ = self.room.write(1);
        }
        taken
    }
}

impl ConsoleInput for Input {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = bytes
            .len()
            .min(INPUT_CAPACITY.saturating_sub(state.bytes.len()));
        state.bytes.extend(bytes.iter().take(taken));
        if taken < bytes.len() {
            state.starved = true;
        }
        if taken > 0 {
            let _ = self.arrived.write(1);
        }
        taken
    }

    fn room(&self) -> &EventFd {
        &self.room
    }
}

/// The question to a console's worker whether the guest's queues still hold
/// what no output has taken.
pub(super) struct Drain {
    /// Signalled to the worker when it is asked.
    pub(super) asked: EventFd,
    state: Mutex<DrainState>,
    changed: Condvar,
}

#[derive(Default)]
struct DrainState {
    /// A worker is there to answer.
    working: bool,
    /// Whether the queues are empty, once that has been answered.
    empty: Option<bool>,
}

impl Drain {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            asked: EventFd::new(EFD_NONBLOCK)?,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, DrainState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker starts or ends.
    pub(super) fn set_working(&self, working: bool) {
        self.lock().working = working;
        self.changed.notify_all();
    }

    /// The worker has passed on what it could, and says whether that was all.
    pub(super) fn answer(&self, empty: bool) {
        self.lock().empty = Some(empty);
        self.changed.notify_all();
    }

    /// Asks the worker, and waits for its answer; `None` when none comes in
    /// time. Where no worker is, there is nothing to wait for.
    fn ask(&self, timeout: Duration) -> Option<bool> {
        let mut state = self.lock();
        state.empty = None;
        // Fails only when the event is signalled already.
        let _ = self.asked.write(1);
        let waits = |state: &mut DrainState| state.working && state.empty.is_none();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, timeout, waits)
            .unwrap_or_else(PoisonError::into_inner);
        match state.working {
            true => state.empty,
            false => Some(true),
        }
    }
}

/// The outputs of a console's ports, for who must know that they are through.
#[derive(Clone)]
pub struct Outputs {
    pub(super) outputs: Vec<Arc<Output>>,
    pub(super) drain: Arc<Drain>,
}

impl Outputs {
    /// Waits up to `timeout` until the host has taken everything that the guest
    /// has written, what is still in its queues included, and returns whether
    /// it has. The vCPUs must have stopped before.
    pub fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        loop {
            let Some(empty) = self.drain.ask(left()) else {
                return false;
            };
            if !self.flush(left()) {
                return false;
            }
            if empty {
                return true;
            }
        }
    }

    /// Waits up to `timeout` until the host has taken everything that the
    /// device has got from the guest, and returns whether it did. What is still
    /// in the queues is not waited for: deactivate the device first.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        self.outputs
            .iter()
            .all(|output| output.flush(deadline.saturating_duration_since(Instant::now())))
    }

    /// Bytes that the host did not take.
    pub fn lost(&self) -> u64 {
        self.outputs.iter().map(|output| output.lost()).sum()
    }
}
