//! What a process prints, collected by a thread and waited for by content.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// More than that of a stream is not kept: a guest that prints without end must
/// not take the machine's memory.
const LIMIT: usize = 64 << 20;

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// How far [`Stream::expect`] has read.
    seen: usize,
    ended: bool,
}

/// A stream of output, filled by a thread.
#[derive(Clone, Debug, Default)]
pub struct Stream(Arc<(Mutex<State>, Condvar)>);

impl Stream {
    /// Collects from `source` until its end.
    pub fn collect(mut source: impl Read + Send + 'static) -> Self {
        let stream = Stream::default();
        let filled = stream.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            loop {
                match source.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => filled.push(buffer.get(..count).unwrap_or_default()),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    // A terminal whose other end is closed.
                    Err(_) => break,
                }
            }
            filled.lock().ended = true;
            filled.0.1.notify_all();
        });
        stream
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let room = LIMIT.saturating_sub(state.bytes.len()).min(bytes.len());
        state
            .bytes
            .extend_from_slice(bytes.get(..room).unwrap_or_default());
        drop(state);
        self.0.1.notify_all();
    }

    /// Everything that has arrived.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Waits until `wanted` arrives after what earlier calls returned, and
    /// returns everything from there to its end. `None` at the deadline or the
    /// end of the stream.
    pub fn expect(&self, wanted: &str, deadline: Instant) -> Option<String> {
        let mut state = self.lock();
        loop {
            let new = state.bytes.get(state.seen..).unwrap_or_default();
            if let Some(at) = find(new, wanted.as_bytes()) {
                let end = at + wanted.len();
                let text = String::from_utf8_lossy(new.get(..end).unwrap_or_default());
                let text = text.into_owned();
                state.seen += end;
                return Some(text);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return None;
            }
            let waited = self.0.1.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the stream ends, at most for `limit`; whether it did.
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.0.1.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len().max(1))
        .position(|part| part == wanted)
}

/// Output for people: invalid UTF-8 and control characters made visible, lines
/// indented so that none looks like the runner's own.
pub fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut readable = String::new();
    for line in text.lines() {
        readable.push_str("    ");
        for letter in line.trim_end_matches('\r').chars() {
            match letter {
                '\t' => readable.push('\t'),
                letter if letter.is_control() => {
                    readable.extend(letter.escape_default());
                }
                letter => readable.push(letter),
            }
        }
        readable.push('\n');
    }
    readable
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Write, pipe};

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn text_is_found_however_it_is_cut() {
        let (source, mut sink) = pipe().unwrap();
        let stream = Stream::collect(source);
        sink.write_all(b"boot\r\n/ # ec").unwrap();
        assert_eq!(stream.expect("/ #", soon()).unwrap(), "boot\r\n/ #");
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            sink.write_all(b"ho\n/ # ").unwrap();
        });
        assert_eq!(stream.expect("echo", soon()).unwrap(), " echo");
        // What was found once is not found again.
        assert_eq!(stream.expect("/ #", soon()).unwrap(), "\n/ #");
        writer.join().unwrap();
        assert!(stream.wait_for_end(Duration::from_secs(10)));
        assert_eq!(stream.expect("/ #", soon()), None);
        assert_eq!(stream.bytes(), b"boot\r\n/ # echo\n/ # ");
    }

    #[test]
    fn a_stream_that_says_nothing_times_out() {
        let (source, sink) = pipe().unwrap();
        let stream = Stream::collect(source);
        let deadline = Instant::now() + Duration::from_millis(10);
        assert_eq!(stream.expect("x", deadline), None);
        assert!(!stream.wait_for_end(Duration::from_millis(1)));
        drop(sink);
    }

    #[test]
    fn readable_output_hides_nothing_and_starts_no_line_of_its_own() {
        assert_eq!(
            readable(b"TEST x PASS\r\n\x1b[6n\xff\n"),
            "    TEST x PASS\n    \\u{1b}[6n\u{fffd}\n"
        );
    }
}
