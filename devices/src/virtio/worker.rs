//! Threads that do a device's work: they own its queues while the driver runs.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::epoll;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::Chain;
use super::{ActiveQueue, DriverLink};
use crate::{GuestMem, fd};

const STOP: u64 = u64::MAX;
/// Tokens from here on are queues, by position; below are the handler's own.
const QUEUES: u64 = 1 << 32;
const MAX_EVENTS: usize = 16;

/// What a device does on its worker thread. No method may block for long: while
/// it runs, the device cannot stop.
pub trait Handler: Send + 'static {
    /// Called once when the thread starts, also when it goes on after a pause.
    fn start(&mut self, context: &mut Context);

    /// The driver notified the queue at `position` in [`Context::queues`], or
    /// the worker just started.
    fn queue(&mut self, context: &mut Context, position: usize);

    /// A descriptor watched under `token` is ready.
    fn event(&mut self, context: &mut Context, token: u32);

    /// Called once before the thread ends: buffers taken and not used must go
    /// back to their queue.
    fn stop(&mut self, context: &mut Context);
}

/// What a handler works with.
pub struct Context {
    /// Guest memory.
    pub mem: GuestMem,
    /// The worker's queues.
    pub queues: Vec<WorkerQueue>,
    epoll: OwnedFd,
}

impl Context {
    /// Calls [`Handler::event`] with `token` whenever `source` can be read or
    /// has hung up.
    ///
    /// # Errors
    /// The host cannot wait for this kind of descriptor, such as a regular
    /// file (`PermissionDenied`), or watches it already (`AlreadyExists`).
    pub fn watch(&self, source: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        self.add(source, token.into())
    }

    /// Ends [`watch`](Self::watch); what is not watched is ignored.
    pub fn unwatch(&self, source: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, source);
    }

    fn add(&self, source: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        epoll::add(&self.epoll, source, data, epoll::EventFlags::IN)?;
        Ok(())
    }
}

/// A queue in the hands of its device.
///
/// A ring that the driver broke beyond use (indices that jump, rings outside
/// memory) is logged once and then ignored until the device is reset, which
/// DEVICE_NEEDS_RESET asks for.
pub struct WorkerQueue {
    active: ActiveQueue,
    link: Arc<DriverLink>,
    device: String,
    /// The used index when the driver was last interrupted, or not, for good
    /// reason.
    signalled: u16,
    /// The available index said that there is more, and it was not yet taken.
    promised: bool,
    broken: bool,
    complained: bool,
}

impl WorkerQueue {
    fn new(device: &str, active: ActiveQueue, link: Arc<DriverLink>) -> Self {
        Self {
            link,
            signalled: active.queue.next_used(),
            active,
            device: device.to_owned(),
            promised: false,
            broken: false,
            complained: false,
        }
    }

    /// The queue's number in the device.
    pub fn index(&self) -> u16 {
        self.active.index
    }

    /// The number of descriptors in its table.
    pub fn size(&self) -> u16 {
        self.active.queue.size()
    }

    /// Takes the next chain that the driver made available.
    pub fn pop<'m>(&mut self, mem: &'m GuestMemoryMmap) -> Option<Chain<'m>> {
        if self.broken {
            return None;
        }
        let queue = &mut self.active.queue;
        match queue.pop(mem) {
            Ok(Some(chain)) if chain.head_index() >= self.active.queue.size() => {
                self.fail("an available index outside the descriptor table");
                None
            }
            Ok(Some(chain)) => {
                self.promised = false;
                Some(chain)
            }
            Ok(None) => {
                if self.promised {
                    self.fail("an available ring that cannot be read");
                }
                None
            }
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    /// Gives back the last `count` chains that were taken and not used.
    pub fn put_back(&mut self, count: u16) {
        let queue = &mut self.active.queue;
        queue.set_next_avail(queue.next_avail().wrapping_sub(count));
    }

    /// Returns the chain that starts at `head` to the driver, with `written`
    /// bytes in its device-writable buffers.
    pub fn complete(&mut self, mem: &GuestMemoryMmap, head: u16, written: u32) {
        self.complete_together(mem, &[(head, written)]);
    }

    /// Returns several chains, each with the bytes written to it, so that the
    /// driver sees either none of them or all.
    pub fn complete_together(&mut self, mem: &GuestMemoryMmap, chains: &[(u16, u32)]) {
        if self.broken {
            return;
        }
        if let Err(error) = self.active.queue.add_used(mem, chains) {
            self.fail(error);
        }
    }

    /// Interrupts the driver for what was completed, unless it does not want to
    /// know.
    pub fn signal(&mut self, mem: &GuestMemoryMmap) {
        let queue = &self.active.queue;
        let new = queue.next_used();
        if self.broken || new == self.signalled {
            return;
        }
        let old = std::mem::replace(&mut self.signalled, new);
        if !queue.wants_interrupt(mem, old) {
            return;
        }
        let told = self.link.used(self.active.index);
        self.check_told(told);
    }

    /// Asks the driver to notify again, and returns whether it has already made
    /// more available, so that no notification may come for that.
    pub fn listen(&mut self, mem: &GuestMemoryMmap) -> bool {
        if self.broken {
            return false;
        }
        match self.active.queue.enable_notification(mem) {
            Ok(more) => {
                self.promised = more;
                more
            }
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    /// Asks the driver not to notify, while the worker looks by itself.
    pub fn ignore(&mut self, mem: &GuestMemoryMmap) {
        if !self.broken
            && let Err(error) = self.active.queue.disable_notification(mem)
        {
            self.fail(error);
        }
    }

    /// Makes the worker call [`Handler::queue`] for this queue once more.
    pub fn again(&self) {
        // Fails only when the event is signalled already.
        let _ = self.active.notify.write(1);
    }

    /// Passes each available chain to `serve`, which returns how many bytes it
    /// wrote into it, and returns the chain to the driver. A driver that adds
    /// chains all the time does not keep it here: it ends after one table's
    /// worth and comes [`again`](Self::again).
    pub fn serve<'m>(
        &mut self,
        mem: &'m GuestMemoryMmap,
        mut serve: impl FnMut(&mut Self, Chain<'m>) -> u32,
    ) {
        let mut budget = self.size();
        loop {
            self.ignore(mem);
            while let Some(chain) = self.pop(mem) {
                let head = chain.head_index();
                let written = serve(self, chain);
                self.complete(mem, head, written);
                self.signal(mem);
                budget -= 1;
                if budget == 0 {
                    self.again();
                    return;
                }
            }
            if !self.listen(mem) {
                return;
            }
        }
    }

    /// Says once what a driver did wrong.
    pub fn complain(&mut self, problem: &dyn std::fmt::Display) {
        if !self.complained {
            self.complained = true;
            log::warn!("{} queue {}: {problem}", self.device, self.active.index);
        }
    }

    fn fail(&mut self, problem: impl std::fmt::Display) {
        self.complain(&format_args!("{problem}; the queue stops until a reset"));
        self.broken = true;
        let told = self.link.set_needs_reset();
        self.check_told(told);
    }

    fn check_told(&mut self, told: io::Result<()>) {
        if let Err(error) = told {
            self.complain(&format_args!("cannot interrupt the driver: {error}"));
        }
    }
}

/// A running worker thread, which ends when this is dropped.
pub struct Worker<H> {
    thread: Option<JoinHandle<(H, Vec<ActiveQueue>)>>,
    stop: EventFd,
}

impl<H: Handler> Worker<H> {
    /// Starts a thread named `name` that runs `handler` for `queues`.
    ///
    /// # Errors
    /// The thread or one of its event sources could not be made.
    pub fn spawn(
        name: &str,
        mem: GuestMem,
        link: &Arc<DriverLink>,
        queues: Vec<ActiveQueue>,
        mut handler: H,
    ) -> io::Result<Self> {
        let queues = queues
            .into_iter()
            .map(|active| WorkerQueue::new(name, active, Arc::clone(link)))
            .collect();
        let mut context = Context {
            mem,
            queues,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        };
        let stop = EventFd::new(EFD_NONBLOCK)?;
        context.add(fd::borrow(&stop), STOP)?;
        for (queue, token) in context.queues.iter().zip(QUEUES..) {
            context.add(fd::borrow(&queue.active.notify), token)?;
        }
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                run(&mut handler, &mut context);
                let queues = context.queues.into_iter().map(|queue| queue.active);
                (handler, queues.collect())
            })?;
        Ok(Self {
            thread: Some(thread),
            stop,
        })
    }

    /// Ends the thread and returns what it owned, or `None` if it panicked.
    pub fn stop(mut self) -> Option<(H, Vec<ActiveQueue>)> {
        self.join()
    }
}

impl<H> Worker<H> {
    fn join(&mut self) -> Option<(H, Vec<ActiveQueue>)> {
        // Fails only when the event is signalled already.
        let _ = self.stop.write(1);
        self.thread.take()?.join().ok()
    }
}

impl<H> Drop for Worker<H> {
    fn drop(&mut self) {
        self.join();
    }
}

fn run(handler: &mut impl Handler, context: &mut Context) {
    handler.start(context);
    // What was made available before the thread listened.
    for position in 0..context.queues.len() {
        handler.queue(context, position);
    }
    let mut events = Vec::with_capacity(MAX_EVENTS);
    loop {
        events.clear();
        let space = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(context.epoll.as_fd(), space, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::error!("a device worker cannot wait for events: {error}");
                break;
            }
        }
        if events.iter().any(|event| event.data.u64() == STOP) {
            break;
        }
        for event in &events {
            let token = event.data.u64();
            match u32::try_from(token) {
                Ok(token) => handler.event(context, token),
                Err(_) => {
                    let position = (token - QUEUES) as usize;
                    if let Some(queue) = context.queues.get(position) {
                        let _ = queue.active.notify.read();
                        handler.queue(context, position);
                    }
                }
            }
        }
    }
    handler.stop(context);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::Interface;
    use crate::virtio::buffers::{BufferSet, ChainError, Storage};
    use crate::virtio::testing::{
        BUFFERS, CountedInterrupt, Driver, DriverQueue, by_either_interface, into, out,
    };
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
    use std::time::{Duration, Instant};
    use vm_memory::GuestAddressSpace;

    /// Uses each chain without a look at it.
    struct Echo;

    impl Handler for Echo {
        fn start(&mut self, _: &mut Context) {}

        fn queue(&mut self, context: &mut Context, position: usize) {
            let mem = context.mem.memory();
            let queue = &mut context.queues[position];
            queue.serve(&mem, |_, _| 7);
        }

        fn event(&mut self, _: &mut Context, _: u32) {}

        fn stop(&mut self, _: &mut Context) {}
    }

    fn spawn(driver: &Driver) -> Worker<Echo> {
        let activation = driver.activation(0);
        let (mem, queues) = (activation.mem, activation.queues);
        Worker::spawn("echo", mem, &activation.link, queues, Echo).unwrap()
    }

    /// Waits for used buffers as a driver does: by interrupts alone.
    fn sleep_until_used(queue: &mut DriverQueue, interrupt: &CountedInterrupt) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let seen = interrupt.queue_count(0);
            queue.set_used_event(queue.seen());
            fence(Ordering::SeqCst);
            if queue.poll().is_some() {
                return;
            }
            while interrupt.queue_count(0) == seen {
                assert!(Instant::now() < deadline, "an interrupt was lost");
                thread::yield_now();
            }
        }
    }

    by_either_interface!(
        no_notification_and_no_interrupt_is_lost,
        a_driver_that_never_stops_does_not_keep_the_worker,
        chains_completed_together_wrap_around_the_ring,
        what_is_put_back_comes_again,
    );

    fn no_notification_and_no_interrupt_is_lost(interface: Interface) {
        let mut driver = Driver::with(&[8], interface);
        driver.queues[0].use_event_idx();
        let worker = spawn(&driver);
        let queue = &mut driver.queues[0];
        let mut kicks = 0;
        let mut in_flight = 0;
        for round in 0..20_000u32 {
            queue.add(&[into(BUFFERS, 16)]);
            in_flight += 1;
            // As virtqueue_kick_prepare does: only when the device asked for it.
            fence(Ordering::SeqCst);
            let (event, new) = (queue.avail_event(), queue.available());
            if new.wrapping_sub(event).wrapping_sub(1) < 1 {
                queue.kick();
                kicks += 1;
            }
            while in_flight > round % 8 {
                sleep_until_used(queue, &driver.interrupt);
                in_flight -= 1;
            }
        }
        assert!(kicks > 0);
        worker.stop().unwrap();
    }

    fn a_driver_that_never_stops_does_not_keep_the_worker(interface: Interface) {
        let mut driver = Driver::with(&[8], interface);
        let worker = spawn(&driver);
        let (done, rounds) = (AtomicBool::new(false), AtomicU32::new(0));
        thread::scope(|scope| {
            let queue = &mut driver.queues[0];
            let (done, rounds) = (&done, &rounds);
            scope.spawn(move || {
                // The ring is as full as it can be.
                for head in 0..8 {
                    queue.descriptor(head, out(BUFFERS, 1), 0);
                    queue.publish(head);
                }
                queue.kick();
                while !done.load(Ordering::Relaxed) {
                    if let Some((head, _)) = queue.poll() {
                        queue.publish(head);
                        queue.kick();
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            let deadline = Instant::now() + Duration::from_secs(20);
            while rounds.load(Ordering::Relaxed) < 1000 && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
            let stopped = worker.stop();
            done.store(true, Ordering::Relaxed);
            assert_eq!(stopped.unwrap().1.len(), 1);
        });
        assert!(rounds.into_inner() >= 1000);
    }

    fn chains_completed_together_wrap_around_the_ring(interface: Interface) {
        let mut driver = Driver::with(&[4], interface);
        let mem = driver.mem.memory();
        let mut queue = WorkerQueue::new("test", driver.queues[0].active(), driver.link.clone());
        for round in 0..50u32 {
            let heads: Vec<u16> = (0..3)
                .map(|_| driver.queues[0].add(&[out(BUFFERS, 1)]))
                .collect();
            let mut used = Vec::new();
            for head in &heads {
                assert_eq!(queue.pop(&mem).unwrap().head_index(), *head);
                used.push((*head, round));
            }
            assert!(queue.pop(&mem).is_none());
            queue.complete_together(&mem, &used);
            for head in heads {
                assert_eq!(driver.queues[0].poll(), Some((head, round)));
            }
            assert_eq!(driver.queues[0].poll(), None);
        }
        queue.complete_together(&mem, &[]);
        assert_eq!(driver.queues[0].poll(), None);
    }

    fn what_is_put_back_comes_again(interface: Interface) {
        let mut driver = Driver::with(&[4], interface);
        let mem = driver.mem.memory();
        let mut queue = WorkerQueue::new("test", driver.queues[0].active(), driver.link.clone());
        let heads = [0, 1].map(|_| driver.queues[0].add(&[out(BUFFERS, 1)]));
        for _ in 0..3 {
            for head in heads {
                assert_eq!(queue.pop(&mem).unwrap().head_index(), head);
            }
            queue.put_back(2);
        }
    }

    #[test]
    fn cursors_split_and_copy_at_any_place() {
        let mut driver = Driver::new(&[16]);
        let pattern: Vec<u8> = (0..60).collect();
        let lens = [1u32, 7, 0, 20, 2, 30];
        let mut bufs = Vec::new();
        let mut at = 0;
        for (i, len) in lens.into_iter().enumerate() {
            let addr = BUFFERS + 0x1000 * i as u64;
            driver.write(addr, &pattern[at..at + len as usize]);
            bufs.push(out(addr, len));
            at += len as usize;
        }
        bufs.push(into(BUFFERS + 0x8000, 10));
        bufs.push(into(BUFFERS + 0x9000, 10));
        driver.queues[0].add(&bufs);
        let mem = driver.mem.memory();
        let mut queue = WorkerQueue::new("test", driver.queues[0].active(), driver.link.clone());
        let mut storage = Storage::default();
        let mut set = BufferSet::new(&mem, &mut storage);
        let chain = set.add(queue.pop(&mem).unwrap()).unwrap();
        let all = set.readable(chain.readable.clone());
        assert_eq!(all.len(), 60);
        for split in 0..=61 {
            let (mut head, mut tail) = all.split_at(split);
            let (mut first, mut second) = ([0; 100], [0; 100]);
            let (a, b) = (head.read(&mut first), tail.read(&mut second));
            assert_eq!((a, b), (split.min(60), 60 - split.min(60)));
            assert_eq!([&first[..a], &second[..b]].concat(), pattern);
            assert!(head.is_empty() && tail.is_empty());
        }
        let (mut front, mut back) = set.writable(chain.writable).split_at(13);
        assert_eq!(back.write(b"backward"), 7);
        assert_eq!(front.write(b"four"), 4);
        assert_eq!(front.write(b"and more than fits"), 9);
        let mut written = driver.read(BUFFERS + 0x8000, 10);
        written.extend(driver.read(BUFFERS + 0x9000, 10));
        assert_eq!(written, b"fourand more backwar");
        assert!(set.readable(1000..2000).is_empty());

        driver.queues[0].add(&[into(BUFFERS, 1), out(BUFFERS, 1)]);
        assert_eq!(set.add(queue.pop(&mem).unwrap()), Err(ChainError::Order));
    }
}
