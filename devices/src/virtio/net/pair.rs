//! A pair of receive and transmit queues, and the packets between them and the
//! tap.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::{Backend, FRAME_OVERHEAD, Gate, MAX_GSO_FRAME, PAIR};
use crate::byte_order::Number;
use crate::fd;
use crate::tap::Header;
use crate::virtio::buffers::{BufferSet, Storage, Writable};
use crate::virtio::worker::{Context, Handler, WorkerQueue};

const TAP: u32 = 0;
const GATE: u32 = 1;

/// Packets received before the worker looks at its other events.
const BUDGET: u32 = 64;
/// Where `num_buffers` is in the virtio-net header.
const NUM_BUFFERS: usize = 10;
/// The longest chain of bytes that can be a packet.
const MAX_TX: usize = MAX_GSO_FRAME + FRAME_OVERHEAD;

/// Serves one pair.
pub(super) struct PairHandler {
    backend: Arc<Backend>,
    pair: usize,
    /// Whether a packet may be spread over several chains.
    mergeable: bool,
    header: Header,
    /// More than the largest packet that the tap is to give, with its header.
    max_frame: usize,
    storage: Storage,
    /// Chains taken for receiving and not filled.
    taken: Vec<Taken>,
    /// Chains of the packet that is being completed.
    used: Vec<(u16, u32)>,
    /// A packet that was read when the driver's buffers were running out, and
    /// waits for more of them. Its memory is taken when that first happens.
    pending: Vec<u8>,
    watching: bool,
    /// The driver has given no more buffers; its notification is awaited.
    starved: bool,
    /// The tap is gone.
    dead: bool,
}

/// A chain for receiving.
struct Taken {
    head: u16,
    buffers: Range<usize>,
    len: usize,
}

/// Why a round of receiving ended.
enum End {
    /// The tap has no packet, or all this round may take.
    Drained,
    /// The driver has too few buffers.
    Starved,
    /// The tap failed.
    Failed(io::Error),
}

impl PairHandler {
    pub(super) fn new(
        backend: Arc<Backend>,
        pair: usize,
        mergeable: bool,
        header: Header,
        max_frame: usize,
    ) -> Self {
        Self {
            backend,
            pair,
            mergeable,
            header,
            max_frame,
            storage: Storage::default(),
            taken: Vec::new(),
            used: Vec::new(),
            pending: Vec::new(),
            watching: false,
            starved: false,
            dead: false,
        }
    }

    fn receive(&mut self, context: &mut Context) {
        let backend = Arc::clone(&self.backend);
        let (Some(gate), Some(tap)) = (backend.gates.get(self.pair), backend.tap.queue(self.pair))
        else {
            return;
        };
        let open = gate.open.lock().unwrap_or_else(PoisonError::into_inner);
        if *open && !self.dead {
            self.receive_round(context, tap);
        } else {
            self.pending.clear();
        }
        self.watch(context, tap, *open && !self.dead && !self.starved);
    }

    fn watch(&mut self, context: &Context, tap: BorrowedFd<'_>, watch: bool) {
        if watch == self.watching {
            return;
        }
        if !watch {
            context.unwatch(tap);
        } else if let Err(error) = context.watch(tap, TAP) {
            log::error!(
                "tap {}: cannot wait for packets: {error}",
                self.backend.tap.name()
            );
            return;
        }
        self.watching = watch;
    }

    fn receive_round(&mut self, context: &mut Context, tap: BorrowedFd<'_>) {
        let receives = |queue: &&mut WorkerQueue| usize::from(queue.index()) % PAIR == 0;
        let mem = context.mem.memory();
        let Some(queue) = context.queues.iter_mut().find(receives) else {
            self.starved = true;
            return;
        };
        queue.ignore(&mem);
        let mut storage = std::mem::take(&mut self.storage);
        let mut buffers = BufferSet::new(&mem, &mut storage);
        let end = self.receive_packets(&mem, queue, &mut buffers, tap);
        self.storage = storage;

        // A queue has at most 32768 chains.
        queue.put_back(self.taken.len() as u16);
        self.taken.clear();
        queue.signal(&mem);
        self.starved = matches!(end, End::Starved);
        if let End::Failed(error) = end {
            log::warn!(
                "tap {}: receiving has stopped: {error}",
                self.backend.tap.name()
            );
            self.dead = true;
        }
    }

    fn receive_packets(
        &mut self,
        mem: &GuestMemoryMmap,
        queue: &mut WorkerQueue,
        buffers: &mut BufferSet<'_>,
        tap: BorrowedFd<'_>,
    ) -> End {
        let mut packets = 0;
        while packets < BUDGET {
            let room = self.take_chains(mem, queue, buffers);
            let target = self.target(buffers);
            let read = if !self.pending.is_empty() {
                Ok((self.pending.len(), usize::MAX))
            } else if room >= self.max_frame {
                target.read_from(tap).map(|len| (len, target.len()))
            } else if room > 0 {
                self.read_aside(tap).map(|len| (len, self.max_frame))
            } else {
                Ok((0, usize::MAX))
            };
            let (len, could_be) = match read {
                Ok(read) => read,
                Err(error) => match Self::ended(error) {
                    Some(end) => return end,
                    None => continue,
                },
            };
            if len >= could_be {
                queue.complain(&"a packet was dropped: it is larger than the tap's MTU");
                self.pending.clear();
                packets += 1;
                continue;
            }
            if room == 0 || len > room {
                // Chains as many as there are descriptors are all there can be.
                let all = self.taken.len() >= queue.size().into();
                if all || (room > 0 && !self.mergeable) {
                    queue.complain(&"a packet was dropped: the driver's buffers are too small");
                    self.pending.clear();
                    packets += 1;
                    continue;
                }
                // What comes after this is announced.
                if queue.listen(mem) {
                    queue.ignore(mem);
                    // A driver that goes on giving useless chains does not keep
                    // the worker here either.
                    packets += 1;
                    continue;
                }
                return End::Starved;
            }
            if !self.pending.is_empty() {
                self.target(buffers).write(&self.pending);
                self.pending.clear();
            }
            self.complete(mem, queue, buffers, len);
            packets += 1;
        }
        if !self.pending.is_empty() {
            queue.again();
        }
        End::Drained
    }

    /// Whether an error of the tap ends the round.
    fn ended(error: io::Error) -> Option<End> {
        match error.kind() {
            io::ErrorKind::WouldBlock => Some(End::Drained),
            io::ErrorKind::Interrupted => None,
            _ => Some(End::Failed(error)),
        }
    }

    /// Takes chains until the largest packet fits, if there are so many, or the
    /// one chain that is for the next packet, and returns how much fits.
    fn take_chains(
        &mut self,
        mem: &GuestMemoryMmap,
        queue: &mut WorkerQueue,
        buffers: &mut BufferSet<'_>,
    ) -> usize {
        let enough = if self.mergeable { self.max_frame } else { 1 };
        let mut room: usize = self.taken.iter().map(|chain| chain.len).sum();
        while room < enough
            && let Some(len) = self.take_chain(mem, queue, buffers)
        {
            room += len;
        }
        room
    }

    /// Takes one chain with room, if there is one, and returns how much.
    fn take_chain(
        &mut self,
        mem: &GuestMemoryMmap,
        queue: &mut WorkerQueue,
        buffers: &mut BufferSet<'_>,
    ) -> Option<usize> {
        // A driver that gives nothing but useless chains, or more than there can
        // be, is left after a while.
        for _ in self.taken.len()..queue.size().into() {
            let chain = queue.pop(mem)?;
            let head = chain.head_index();
            match buffers.add(chain) {
                Ok(chain) => {
                    let len = buffers.writable(chain.writable.clone()).len();
                    if len > 0 && chain.readable.is_empty() {
                        self.taken.push(Taken {
                            head,
                            buffers: chain.writable,
                            len,
                        });
                        return Some(len);
                    }
                    buffers.remove_last(&chain);
                    queue.complain(&"a receive buffer without room or with data");
                }
                Err(error) => queue.complain(&error),
            }
            match self.taken.last() {
                None => queue.complete(mem, head, 0),
                // Those that are taken go back to the queue together, and so
                // must not have one among them that has been returned: it stays
                // in its place, as a buffer without room.
                Some(last) => {
                    let end = last.buffers.end;
                    self.taken.push(Taken {
                        head,
                        buffers: end..end,
                        len: 0,
                    });
                }
            }
        }
        None
    }

    /// The chains that the next packet goes to.
    fn target<'b>(&self, buffers: &'b BufferSet<'_>) -> Writable<'b> {
        let start = self.taken.first().map_or(0, |chain| chain.buffers.start);
        let last = if self.mergeable {
            self.taken.last()
        } else {
            self.taken.first()
        };
        buffers.writable(start..last.map_or(start, |chain| chain.buffers.end))
    }

    /// Reads a packet that may not fit in the driver's buffers.
    fn read_aside(&mut self, tap: BorrowedFd<'_>) -> io::Result<usize> {
        self.pending.resize(self.max_frame, 0);
        let read = rustix::io::read(tap, &mut self.pending);
        self.pending.truncate(*read.as_ref().unwrap_or(&0));
        Ok(read?)
    }

    /// Returns to the driver the chains that a packet of `len` bytes fills.
    fn complete(
        &mut self,
        mem: &GuestMemoryMmap,
        queue: &mut WorkerQueue,
        buffers: &BufferSet<'_>,
        len: usize,
    ) {
        let mut rest = len;
        self.used.clear();
        for chain in &self.taken {
            let part = rest.min(chain.len);
            self.used.push((chain.head, part as u32));
            rest -= part;
            if rest == 0 || !self.mergeable {
                break;
            }
        }
        if self.header.counts_buffers {
            let (_, mut num_buffers) = self.target(buffers).split_at(NUM_BUFFERS);
            let count = self.used.len() as u16;
            num_buffers.write(&count.to_bytes(self.header.order));
        }
        self.taken.drain(..self.used.len());
        queue.complete_together(mem, &self.used);
    }

    fn transmit(&mut self, context: &mut Context, position: usize) {
        let mem = context.mem.memory();
        let (Some(queue), Some(tap)) = (
            context.queues.get_mut(position),
            self.backend.tap.queue(self.pair),
        ) else {
            return;
        };
        queue.serve(&mem, |queue, chain| {
            let mut buffers = BufferSet::new(&mem, &mut self.storage);
            match buffers.add(chain) {
                Ok(chain) => {
                    let packet = buffers.readable(chain.readable);
                    if (self.header.bytes()..=MAX_TX).contains(&packet.len()) {
                        // A packet that the host does not take is lost, as on
                        // any network.
                        let _ = packet.write_to(tap);
                    }
                }
                Err(error) => queue.complain(&error),
            }
            0
        });
    }
}

impl Handler for PairHandler {
    fn start(&mut self, context: &mut Context) {
        let backend = Arc::clone(&self.backend);
        let Some(Gate { changed, .. }) = backend.gates.get(self.pair) else {
            return;
        };
        if let Err(error) = context.watch(fd::borrow(changed), GATE) {
            log::error!(
                "tap {}: cannot wait for changes: {error}",
                backend.tap.name()
            );
        }
    }

    fn queue(&mut self, context: &mut Context, position: usize) {
        let Some(queue) = context.queues.get(position) else {
            return;
        };
        if usize::from(queue.index()) % PAIR == 0 {
            self.receive(context);
        } else {
            self.transmit(context, position);
        }
    }

    fn event(&mut self, context: &mut Context, token: u32) {
        if token == GATE
            && let Some(gate) = self.backend.gates.get(self.pair)
        {
            let _ = gate.changed.read();
        }
        self.receive(context);
    }

    fn stop(&mut self, _: &mut Context) {}
}
