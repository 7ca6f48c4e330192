//! Console output that never makes a vCPU or a device worker wait for long.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes that may wait for the host to take them.
pub const CAPACITY: usize = 64 * 1024;

/// Bytes beyond [`CAPACITY`] for what would be lost otherwise: as much as Linux
/// puts into a queue of a console, twice.
const RESERVE: usize = 4 << 20;

/// Bytes that are worth a write of their own.
const PIECE: usize = 4096;

/// Bytes that are written at once. The less, the sooner there is room again in
/// front of a slow sink.
const CHUNK: usize = 16 * 1024;

/// How long the last bytes get to leave when the output is dropped.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// How long a sink that would block is left alone.
const RETRY_TIME: Duration = Duration::from_millis(5);

/// A bounded buffer in front of a [`Write`], emptied by a thread of its own.
///
/// What arrives in single bytes leaves in larger pieces. A sink that fails
/// loses its bytes, which [`lost`](Self::lost) counts: a guest must not stop
/// because nobody reads what it prints.
pub struct Output {
    shared: Arc<Shared>,
    room: EventFd,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled when bytes arrive or the output closes.
    work: Condvar,
    /// Signalled when bytes have left.
    progress: Condvar,
    lost: AtomicU64,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Bytes that the thread has taken and not yet written.
    in_flight: usize,
    /// A pusher found no room and waits for the event.
    starved: bool,
    /// The thread waits for bytes, and must be told of them.
    idle: bool,
    /// Somebody has waited for room in vain, and there has been none since.
    stuck: bool,
    /// Somebody waits for the bytes to leave.
    urgent: bool,
    closed: bool,
    /// There is no sink.
    nowhere: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Output {
    /// Starts a thread named `name` that writes to `sink`.
    ///
    /// # Errors
    /// The thread or its event could not be made.
    pub fn new(name: &str, sink: Box<dyn Write + Send>) -> io::Result<Self> {
        Self::collecting(name, sink, Duration::ZERO)
    }

    /// The same, where the first byte waits up to `delay` for others, so that a
    /// device that prints byte by byte does not wake the thread for each.
    ///
    /// # Errors
    /// The thread or its event could not be made.
    pub fn collecting(
        name: &str,
        sink: Box<dyn Write + Send>,
        delay: Duration,
    ) -> io::Result<Self> {
        let output = Self::idle()?;
        let shared = Arc::clone(&output.shared);
        let room = output.room.try_clone()?;
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || drain(&shared, &room, sink, delay))?;
        Ok(output)
    }

    /// Takes all there is, and writes it nowhere.
    ///
    /// # Errors
    /// The event could not be made.
    pub fn nowhere() -> io::Result<Self> {
        let output = Self::idle()?;
        output.shared.lock().nowhere = true;
        Ok(output)
    }

    fn idle() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                work: Condvar::new(),
                progress: Condvar::new(),
                lost: AtomicU64::new(0),
            }),
            room: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Takes as many of `bytes` as there is room for, and returns how many.
    /// When that is not all, [`room`](Self::room) is signalled later.
    pub fn push(&self, bytes: &[u8]) -> usize {
        self.push_within(bytes, CAPACITY)
    }

    /// The same with much more room, for what cannot wait: its writer is about
    /// to take it back.
    pub fn push_last(&self, bytes: &[u8]) -> usize {
        self.push_within(bytes, CAPACITY + RESERVE)
    }

    fn push_within(&self, bytes: &[u8], capacity: usize) -> usize {
        let mut state = self.shared.lock();
        if state.nowhere {
            return bytes.len();
        }
        let taken = bytes.len().min(capacity.saturating_sub(state.bytes.len()));
        state.bytes.extend(bytes.iter().take(taken));
        if taken < bytes.len() {
            state.starved = true;
        }
        let wake = state.idle || state.bytes.len() >= PIECE;
        drop(state);
        if taken > 0 && wake {
            self.shared.work.notify_one();
        }
        taken
    }

    /// Takes all of `bytes`, waiting up to `patience` for room. What finds none
    /// is lost, and counted; from then on nothing waits until the sink has
    /// taken something again, or a device that prints byte by byte would wait
    /// for each.
    pub fn push_all(&self, bytes: &[u8], patience: Duration) {
        let mut rest = bytes;
        let deadline = Instant::now() + patience;
        loop {
            let taken = self.push(rest);
            rest = rest.get(taken..).unwrap_or_default();
            if rest.is_empty() {
                return;
            }
            let mut state = self.shared.lock();
            if state.bytes.len() < CAPACITY {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.stuck {
                state.stuck = true;
                self.shared
                    .lost
                    .fetch_add(rest.len() as u64, Ordering::Relaxed);
                return;
            }
            drop(self.shared.progress.wait_timeout(state, left));
        }
    }

    /// Signalled when there is room again after [`push`](Self::push) took less
    /// than it was given.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// Bytes that never reached the sink.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// Waits up to `timeout` until everything pushed so far has been written,
    /// and returns whether it was.
    pub fn flush(&self, timeout: Duration) -> bool {
        let mut state = self.shared.lock();
        state.urgent = true;
        self.shared.work.notify_one();
        let (mut state, wait) = self
            .shared
            .progress
            .wait_timeout_while(state, timeout, |s| !s.bytes.is_empty() || s.in_flight > 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.urgent = false;
        !wait.timed_out()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_one();
        // The thread is not joined: a sink that blocks for ever must not hold
        // up the end of the process.
        self.flush(DRAIN_TIME);
    }
}

/// The thread: takes what is there, writes it, until closed and empty.
fn drain(shared: &Shared, room: &EventFd, mut sink: Box<dyn Write + Send>, delay: Duration) {
    let mut chunk = Vec::with_capacity(CHUNK);
    let mut state = shared.lock();
    loop {
        state.idle = true;
        state = shared
            .work
            .wait_while(state, |s| s.bytes.is_empty() && !s.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if state.bytes.is_empty() {
            return;
        }
        state.idle = false;
        if !delay.is_zero() {
            let more = |s: &mut State| s.bytes.len() < PIECE && !s.urgent && !s.closed;
            (state, _) = shared
                .work
                .wait_timeout_while(state, delay, more)
                .unwrap_or_else(PoisonError::into_inner);
        }
        chunk.clear();
        let taken = state.bytes.len().min(CHUNK);
        chunk.extend(state.bytes.drain(..taken));
        state.in_flight = chunk.len();
        state.stuck = false;
        if std::mem::take(&mut state.starved) {
            // An eventfd write fails only when its counter is full, and then it
            // is signalled already.
            let _ = room.write(1);
        }
        drop(state);
        shared.progress.notify_all();

        let left = write(&mut *sink, &chunk);
        shared.lost.fetch_add(left as u64, Ordering::Relaxed);

        state = shared.lock();
        state.in_flight = 0;
        shared.progress.notify_all();
    }
}

/// Writes all of `bytes`, or as many as the sink takes, and returns how many are
/// left. A sink that would block is asked again: whoever shares a terminal or a
/// pipe with this process may have made it so.
fn write(sink: &mut dyn Write, bytes: &[u8]) -> usize {
    let mut rest = bytes;
    while !rest.is_empty() {
        match sink.write(rest) {
            Ok(0) => break,
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => thread::sleep(RETRY_TIME),
                _ => break,
            },
        }
    }
    // What it took and cannot pass on is its own to count.
    let _ = sink.flush();
    rest.len()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A sink whose content the test can look at.
    #[derive(Clone, Default)]
    pub(crate) struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Captured {
        pub(crate) fn bytes(&self) -> Vec<u8> {
            self.0.lock().unwrap().clone()
        }
    }

    impl Write for Captured {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A sink that takes nothing until its gate opens.
    #[derive(Clone, Default)]
    pub(crate) struct Blocked {
        gate: Arc<(Mutex<bool>, Condvar)>,
        pub(crate) captured: Captured,
    }

    impl Blocked {
        pub(crate) fn open(&self) {
            *self.gate.0.lock().unwrap() = true;
            self.gate.1.notify_all();
        }
    }

    impl Write for Blocked {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let open = self.gate.0.lock().unwrap();
            drop(self.gate.1.wait_while(open, |open| !*open).unwrap());
            self.captured.write(buf)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// An output to `sink`.
    pub(crate) fn output(sink: &(impl Write + Clone + Send + 'static)) -> Arc<Output> {
        Arc::new(Output::new("out", Box::new(sink.clone())).unwrap())
    }

    struct Failing;

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn writes_in_order_and_drains_on_drop() {
        let sink = Captured::default();
        let output = Output::new("out", Box::new(sink.clone())).unwrap();
        for byte in 0..=255u8 {
            assert_eq!(output.push(&[byte]), 1);
        }
        drop(output);
        assert_eq!(sink.bytes(), (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn a_blocked_sink_bounds_the_buffer_and_signals_room() {
        let sink = Blocked::default();
        let output = Output::new("out", Box::new(sink.clone())).unwrap();
        let data = vec![7; CAPACITY];
        // The thread may take one buffer's worth out of the way.
        let mut pushed = 0;
        let mut full = false;
        for _ in 0..3 {
            let taken = output.push(&data);
            pushed += taken;
            full |= taken < data.len();
            thread::sleep(Duration::from_millis(20));
        }
        assert!(full);
        assert!(pushed <= 2 * CAPACITY);
        assert!(!output.flush(Duration::from_millis(20)));
        output.push_all(&[1, 2, 3], Duration::from_millis(20));
        assert_eq!(output.lost(), 3);
        // It has been waited for once: nobody waits again.
        for _ in 0..1000 {
            output.push_all(&[4], Duration::from_secs(3600));
        }
        assert_eq!(output.lost(), 1003);
        sink.open();
        assert!(output.flush(Duration::from_secs(10)));
        assert!(output.room().read().is_ok());
        assert_eq!(sink.captured.bytes().len(), pushed);
        output.push_all(&[5], Duration::from_secs(10));
        assert!(output.flush(Duration::from_secs(10)));
        assert_eq!(output.lost(), 1003);
    }

    #[test]
    fn single_bytes_are_collected_and_a_flush_does_not_wait() {
        #[derive(Clone, Default)]
        struct Writes(Arc<AtomicU64>);
        impl Write for Writes {
            fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
                self.0.fetch_add(1, Ordering::SeqCst);
                Ok(buf.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let writes = Writes::default();
        let hour = Duration::from_secs(3600);
        let output = Output::collecting("out", Box::new(writes.clone()), hour).unwrap();
        for _ in 0..100 {
            output.push(b"x");
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(writes.0.load(Ordering::SeqCst), 0);
        assert!(output.flush(Duration::from_secs(10)));
        assert_eq!(writes.0.load(Ordering::SeqCst), 1);
        // A large piece leaves at once.
        output.push(&[0; PIECE]);
        for _ in 0..1000 {
            thread::sleep(Duration::from_millis(5));
            if writes.0.load(Ordering::SeqCst) == 2 {
                return;
            }
        }
        panic!("the piece did not leave");
    }

    #[test]
    fn a_sink_that_would_block_gets_everything() {
        use std::os::unix::net::UnixStream;
        let (mut reader, writer) = UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let output = Output::new("out", Box::new(writer)).unwrap();
        let text: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let expected = text.clone();
        let pusher = thread::spawn(move || {
            output.push_all(&text, Duration::from_secs(60));
            assert!(output.flush(Duration::from_secs(60)));
            output.lost()
        });
        let mut got = vec![0; expected.len()];
        io::Read::read_exact(&mut reader, &mut got).unwrap();
        assert_eq!(got, expected);
        assert_eq!(pusher.join().unwrap(), 0);
    }

    #[test]
    fn nowhere_takes_all() {
        let output = Output::nowhere().unwrap();
        for _ in 0..10 {
            assert_eq!(output.push(&[1; CAPACITY]), CAPACITY);
        }
        assert!(output.flush(Duration::ZERO));
        assert_eq!(output.lost(), 0);
    }

    #[test]
    fn a_failing_sink_is_counted() {
        let output = Output::new("out", Box::new(Failing)).unwrap();
        output.push(b"gone");
        assert!(output.flush(Duration::from_secs(10)));
        assert_eq!(output.lost(), 4);
    }
}
