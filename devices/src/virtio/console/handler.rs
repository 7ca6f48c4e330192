//! The worker of a console: moves bytes between its queues and the host.

use std::os::fd::AsFd;
use std::sync::Arc;

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::control::{self, Due, FromDriver};
use super::port::{Drain, HostInput, HostPort};
use crate::byte_order::ByteOrder;
use crate::fd;
use crate::virtio::buffers::{BufferSet, Readable, Storage, Writable};
use crate::virtio::ring::Chain;
use crate::virtio::worker::{Context, Handler, WorkerQueue};

/// Bytes that pass through a buffer of the worker at a time.
const CHUNK: usize = 4096;
/// Bytes that one port may move before others get their turn.
const BUDGET: usize = 1 << 20;

/// What a queue is for, by its number (section 5.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Bytes for the guest, of this port.
    Receive(usize),
    /// Bytes from the guest, of this port.
    Transmit(usize),
    /// Messages for the driver.
    ControlReceive,
    /// Messages from the driver.
    ControlTransmit,
}

impl Role {
    fn of(index: u16) -> Self {
        let index = usize::from(index);
        match (index, index % 2) {
            (0, _) => Self::Receive(0),
            (1, _) => Self::Transmit(0),
            (2, _) => Self::ControlReceive,
            (3, _) => Self::ControlTransmit,
            (_, 0) => Self::Receive(index / 2 - 1),
            (_, _) => Self::Transmit(index / 2 - 1),
        }
    }

    fn index(self) -> u16 {
        let index = match self {
            Self::Receive(0) => 0,
            Self::Transmit(0) => 1,
            Self::ControlReceive => 2,
            Self::ControlTransmit => 3,
            Self::Receive(port) => 2 * port + 2,
            Self::Transmit(port) => 2 * port + 3,
        };
        index as u16
    }
}

/// How the host takes what the guest has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taking {
    /// As it has room; the rest stays in the queue.
    WithRoom,
    /// All, as far as that is possible: the driver resets the device, as Linux
    /// does before it powers off, and what is still in the queue then is lost.
    All,
}

/// What becomes ready outside the queues: an input or an output of a port, or
/// the question whether the queues are empty.
enum Source {
    Input(usize),
    Room(usize),
    Drain,
}

/// There are less ports than queue numbers, so that no port has this token.
const DRAIN_TOKEN: u32 = u32::MAX;

impl Source {
    fn token(&self) -> u32 {
        let (port, room) = match self {
            Self::Input(port) => (port, 0),
            Self::Room(port) => (port, 1),
            Self::Drain => return DRAIN_TOKEN,
        };
        2 * *port as u32 + room
    }

    fn of(token: u32) -> Self {
        let port = (token / 2) as usize;
        if token == DRAIN_TOKEN {
            Self::Drain
        } else if token.is_multiple_of(2) {
            Self::Input(port)
        } else {
            Self::Room(port)
        }
    }
}

/// Serves all queues of a console.
pub(super) struct PortsHandler {
    ports: Arc<[HostPort]>,
    drain: Arc<Drain>,
    states: Vec<PortState>,
    /// Of control messages.
    order: ByteOrder,
    storage: Storage,
}

/// A port as the driver has it.
#[derive(Default)]
struct PortState {
    due: Due,
    /// The guest reads from it.
    guest_open: bool,
    /// The host has no more input for it.
    ended: bool,
    /// Its input is watched.
    watching: bool,
    /// Its input cannot be watched, since it is always ready.
    unwatchable: bool,
    /// Bytes of the first available transmit chain that the host has taken.
    sent: usize,
    /// The transmit queue holds more than the host has taken.
    left: bool,
}

/// Why reading a stream stopped.
enum Read {
    Bytes(usize),
    NotReady,
    End,
}

impl PortsHandler {
    pub(super) fn new(
        ports: Arc<[HostPort]>,
        drain: Arc<Drain>,
        multiport: bool,
        order: ByteOrder,
    ) -> Self {
        let count = if multiport { ports.len() } else { 1 };
        let mut states: Vec<PortState> = Vec::new();
        states.resize_with(count, PortState::default);
        if let Some(console) = states.first_mut() {
            // The console takes bytes at any time.
            console.guest_open = true;
        }
        Self {
            ports,
            drain,
            states,
            order,
            storage: Storage::default(),
        }
    }

    /// Tells the host that the guest is gone.
    pub(super) fn close_all(&mut self) {
        for (state, port) in self.states.iter_mut().zip(self.ports.iter()) {
            if std::mem::take(&mut state.guest_open)
                && let Some(on_open) = &port.on_open
            {
                on_open(false);
            }
        }
    }

    /// Moves bytes from the guest to the host until there are none, or the host
    /// takes no more.
    fn transmit(&mut self, context: &mut Context, port: usize, taking: Taking) {
        let (Some(state), Some(host)) = (self.states.get_mut(port), self.ports.get(port)) else {
            return;
        };
        let mem = context.mem.memory();
        let Some(queue) = find(&mut context.queues, Role::Transmit(port)) else {
            return;
        };
        let mut budget = match taking {
            Taking::WithRoom => BUDGET,
            // A driver that adds chains all the time does not hold up the end.
            Taking::All => 4 * BUDGET,
        };
        state.left = true;
        loop {
            queue.ignore(&mem);
            while let Some(chain) = queue.pop(&mem) {
                let head = chain.head_index();
                let mut buffers = BufferSet::new(&mem, &mut self.storage);
                match buffers.add(chain) {
                    Ok(chain) => {
                        let (_, rest) = buffers.readable(chain.readable).split_at(state.sent);
                        let len = rest.len();
                        let sent = send(host, rest, budget, taking);
                        if sent < len {
                            state.sent += sent;
                            queue.put_back(1);
                            queue.signal(&mem);
                            if sent == budget {
                                queue.again();
                            }
                            // Otherwise the output says when it has room.
                            return;
                        }
                        budget = budget.saturating_sub(sent.max(1));
                    }
                    Err(error) => queue.complain(&error),
                }
                state.sent = 0;
                queue.complete(&mem, head, 0);
                if budget == 0 {
                    queue.signal(&mem);
                    queue.again();
                    return;
                }
            }
            queue.signal(&mem);
            if !queue.listen(&mem) {
                state.left = false;
                return;
            }
        }
    }

    /// Passes on all that the outputs take; whether that is all there is.
    fn transmit_all(&mut self, context: &mut Context, taking: Taking) -> bool {
        for port in 0..self.states.len() {
            self.transmit(context, port, taking);
        }
        self.states.iter().all(|state| !state.left)
    }

    /// Moves bytes from the host to the guest until there are none, or the
    /// guest has no more room.
    fn receive(&mut self, context: &mut Context, port: usize) {
        let wait = self.receive_bytes(context, port);
        let (Some(state), Some(host)) = (self.states.get_mut(port), self.ports.get(port)) else {
            return;
        };
        let HostInput::Stream(stream) = &host.input else {
            return;
        };
        if wait && !state.watching && !state.unwatchable {
            match context.watch(stream.as_fd(), Source::Input(port).token()) {
                Ok(()) => state.watching = true,
                // A regular file is always ready, and is read when the guest
                // has room.
                Err(_) => {
                    state.unwatchable = true;
                    self.receive_bytes(context, port);
                }
            }
        } else if !wait && state.watching {
            context.unwatch(stream.as_fd());
            state.watching = false;
        }
        self.send_control(context);
    }

    /// Returns whether it goes on when there is more input.
    fn receive_bytes(&mut self, context: &mut Context, port: usize) -> bool {
        let (Some(state), Some(host)) = (self.states.get_mut(port), self.ports.get(port)) else {
            return false;
        };
        if !state.guest_open || state.ended {
            return false;
        }
        let mem = context.mem.memory();
        let Some(queue) = find(&mut context.queues, Role::Receive(port)) else {
            return false;
        };
        let mut budget = BUDGET;
        loop {
            if let HostInput::Console(input) = &host.input
                && input.is_empty()
            {
                queue.signal(&mem);
                return true;
            }
            queue.ignore(&mem);
            let Some(chain) = queue.pop(&mem) else {
                queue.signal(&mem);
                if queue.listen(&mem) {
                    continue;
                }
                return false;
            };
            let head = chain.head_index();
            let mut buffers = BufferSet::new(&mem, &mut self.storage);
            let read = match buffers.add(chain) {
                Ok(chain) => {
                    let buffer = buffers.writable(chain.writable);
                    if buffer.is_empty() {
                        queue.complain(&"a receive buffer without room");
                        Read::Bytes(0)
                    } else {
                        read(host, state, buffer, budget)
                    }
                }
                Err(error) => {
                    queue.complain(&error);
                    Read::Bytes(0)
                }
            };
            match read {
                Read::Bytes(count) => {
                    // A chain is at most 4 GiB long.
                    queue.complete(&mem, head, count as u32);
                    budget = budget.saturating_sub(count.max(1));
                }
                Read::NotReady => {
                    queue.put_back(1);
                    queue.signal(&mem);
                    return true;
                }
                Read::End => {
                    queue.put_back(1);
                    queue.signal(&mem);
                    state.ended = true;
                    state.due.open = Some(false);
                    return false;
                }
            }
            if budget == 0 {
                queue.signal(&mem);
                queue.again();
                return true;
            }
        }
    }

    /// Tells the driver what it is to know, as far as it has buffers for that.
    fn send_control(&mut self, context: &mut Context) {
        if self.states.iter().all(|state| state.due == Due::default()) {
            return;
        }
        let mem = context.mem.memory();
        let Some(queue) = find(&mut context.queues, Role::ControlReceive) else {
            return;
        };
        queue.ignore(&mem);
        let mut budget = queue.size();
        for (id, (state, host)) in (0..).zip(self.states.iter_mut().zip(self.ports.iter())) {
            while state.due != Due::default() {
                if budget == 0 {
                    queue.signal(&mem);
                    queue.again();
                    return;
                }
                budget -= 1;
                let Some((head, chain)) = next_writable(&mem, queue) else {
                    queue.signal(&mem);
                    return;
                };
                let mut buffers = BufferSet::new(&mem, &mut self.storage);
                let Ok(chain) = buffers.add(chain) else {
                    queue.complain(&"a malformed buffer for control messages");
                    queue.complete(&mem, head, 0);
                    continue;
                };
                let message = state.due.next(id, host.name.as_deref(), self.order);
                let message = message.unwrap_or_default();
                let written = buffers.writable(chain.writable).write(&message);
                queue.complete(&mem, head, written as u32);
            }
        }
        queue.signal(&mem);
    }

    /// Does what the driver says.
    fn control(&mut self, context: &mut Context, position: usize) {
        let mem = context.mem.memory();
        let mut opened = Vec::new();
        let Some(queue) = context.queues.get_mut(position) else {
            return;
        };
        let mut storage = std::mem::take(&mut self.storage);
        queue.serve(&mem, |queue, chain| {
            let mut buffers = BufferSet::new(&mem, &mut storage);
            match buffers.add(chain) {
                Ok(chain) => {
                    let mut raw = [0; control::LEN];
                    let read = buffers.readable(chain.readable).read(&mut raw);
                    if read == control::LEN
                        && let Some(message) = FromDriver::parse(raw, self.order)
                    {
                        opened.extend(self.told(message));
                    }
                }
                Err(error) => queue.complain(&error),
            }
            0
        });
        self.storage = storage;
        self.send_control(context);
        for port in opened {
            self.receive(context, port);
        }
    }

    /// Returns a port that the guest has opened.
    fn told(&mut self, message: FromDriver) -> Option<usize> {
        match message {
            FromDriver::DeviceReady => {
                self.states
                    .iter_mut()
                    .for_each(|state| state.due.add = true);
                None
            }
            FromDriver::PortReady(id) => {
                let state = self.states.get_mut(usize::try_from(id).ok()?)?;
                state.due.console = id == 0;
                state.due.name = id != 0;
                state.due.open = Some(!state.ended);
                None
            }
            FromDriver::PortOpen(id, open) => {
                let port = usize::try_from(id).ok()?;
                let state = self.states.get_mut(port)?;
                if port == 0 || state.guest_open == open {
                    return None;
                }
                state.guest_open = open;
                if let Some(on_open) = &self.ports.get(port)?.on_open {
                    on_open(open);
                }
                Some(port)
            }
        }
    }
}

impl Drop for PortsHandler {
    fn drop(&mut self) {
        // Whatever ended its thread, nobody waits for it any more.
        self.drain.set_working(false);
    }
}

/// The queue with this role, if the driver has set it up.
fn find(queues: &mut [WorkerQueue], role: Role) -> Option<&mut WorkerQueue> {
    queues
        .iter_mut()
        .find(|queue| queue.index() == role.index())
}

/// The next chain of `queue`, which is told to notify when there is none.
fn next_writable<'m>(
    mem: &'m GuestMemoryMmap,
    queue: &mut WorkerQueue,
) -> Option<(u16, Chain<'m>)> {
    loop {
        if let Some(chain) = queue.pop(mem) {
            return Some((chain.head_index(), chain));
        }
        if !queue.listen(mem) {
            return None;
        }
        queue.ignore(mem);
    }
}

/// Gives `bytes` to the host, no more than `budget`, and returns how many it
/// took.
fn send(host: &HostPort, mut bytes: Readable<'_>, budget: usize, taking: Taking) -> usize {
    let Some(output) = &host.output else {
        return bytes.len().min(budget);
    };
    let mut sent = 0;
    let mut chunk = [0; CHUNK];
    while sent < budget {
        let wanted = CHUNK.min(budget - sent);
        let mut ahead = bytes;
        let got = ahead.read(chunk.get_mut(..wanted).unwrap_or_default());
        let chunk = chunk.get(..got).unwrap_or_default();
        let taken = match taking {
            Taking::WithRoom => output.push(chunk),
            Taking::All => output.push_last(chunk),
        };
        sent += taken;
        if taken < got || got == 0 {
            break;
        }
        bytes = ahead;
    }
    sent
}

/// Reads input of a port into `buffer`.
fn read(host: &HostPort, state: &PortState, buffer: Writable<'_>, budget: usize) -> Read {
    let (buffer, _) = buffer.split_at(budget);
    match &host.input {
        HostInput::Console(input) => Read::Bytes(input.take(buffer)),
        HostInput::Nothing => Read::NotReady,
        HostInput::Stream(stream) => {
            // It may block, so that it is read only when that cannot happen.
            if !state.unwatchable && !ready(stream.as_fd()) {
                return Read::NotReady;
            }
            match buffer.read_from(stream.as_fd()) {
                Ok(0) => Read::End,
                Ok(count) => Read::Bytes(count),
                Err(error) => match error.kind() {
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted => {
                        Read::NotReady
                    }
                    _ => Read::End,
                },
            }
        }
    }
}

/// Whether a read would not block.
fn ready(stream: std::os::fd::BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut streams = [PollFd::from_borrowed_fd(stream, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut streams, Some(&now)), Ok(count) if count > 0)
}

impl Handler for PortsHandler {
    fn start(&mut self, context: &mut Context) {
        let asked = fd::borrow(&self.drain.asked);
        if let Err(error) = context.watch(asked, Source::Drain.token()) {
            log::error!("console: cannot wait for its end: {error}");
        }
        for (port, (state, host)) in self.states.iter_mut().zip(self.ports.iter()).enumerate() {
            state.watching = false;
            let mut watched = Ok(());
            if let HostInput::Console(input) = &host.input {
                let token = Source::Input(port).token();
                watched = context.watch(fd::borrow(&input.arrived), token);
            }
            if let Some(output) = &host.output {
                let token = Source::Room(port).token();
                watched = watched.and(context.watch(fd::borrow(output.room()), token));
            }
            if let Err(error) = watched {
                log::error!("console port {port}: cannot wait for the host: {error}");
            }
        }
    }

    fn queue(&mut self, context: &mut Context, position: usize) {
        let Some(queue) = context.queues.get(position) else {
            return;
        };
        match Role::of(queue.index()) {
            Role::Receive(port) => self.receive(context, port),
            Role::Transmit(port) => self.transmit(context, port, Taking::WithRoom),
            Role::ControlReceive => self.send_control(context),
            Role::ControlTransmit => self.control(context, position),
        }
    }

    fn event(&mut self, context: &mut Context, token: u32) {
        let source = Source::of(token);
        let ports = Arc::clone(&self.ports);
        match source {
            Source::Input(port) => {
                if let Some(HostInput::Console(input)) = ports.get(port).map(|port| &port.input) {
                    let _ = input.arrived.read();
                }
                self.receive(context, port);
            }
            Source::Room(port) => {
                if let Some(output) = ports.get(port).and_then(|port| port.output.as_ref()) {
                    let _ = output.room().read();
                }
                self.transmit(context, port, Taking::WithRoom);
            }
            Source::Drain => {
                let _ = self.drain.asked.read();
                let empty = self.transmit_all(context, Taking::WithRoom);
                self.drain.answer(empty);
            }
        }
    }

    fn stop(&mut self, context: &mut Context) {
        // A guest may say something and stop at once: what it said counts.
        self.transmit_all(context, Taking::All);
        self.drain.set_working(false);
    }
}
