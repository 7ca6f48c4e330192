//! Standard output and standard error, whoever reads them or no longer does.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::Duration;

use crossvisor_devices::output::Output;

/// Takes the lines to standard error, once a guest runs.
static QUEUE: OnceLock<Output> = OnceLock::new();

/// How long a line waits for room among those that nobody has read yet.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long the last lines get to leave.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// From here on a thread of its own writes to standard error: a pipe that is
/// full and that nobody reads must not hold a vCPU, nor the end of the VM.
///
/// # Errors
/// The thread could not be made; says so.
pub fn queue() -> Result<(), String> {
    let failed = |error: io::Error| format!("standard error: {error}");
    if QUEUE.get().is_none() {
        let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(failed)?;
        let queue = Output::new("messages", Box::new(File::from(stderr))).map_err(failed)?;
        // Somebody else's is as good.
        let _ = QUEUE.set(queue);
    }
    Ok(())
}

/// Waits a little until the lines have been written.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(DRAIN_TIME);
    }
}

/// Writes a line to standard error, if that can be. `eprintln!` would panic
/// where nobody reads any more (a closed pipe, a terminal that was hung up),
/// and a message must not end the thread that has it.
pub fn error(message: fmt::Arguments<'_>) {
    say(message, "\n");
}

/// The same while a guest may have the terminal: it is raw then, and wants a
/// carriage return each line.
pub fn notice(message: fmt::Arguments<'_>) {
    say(message, "\r\n");
}

fn say(message: fmt::Arguments<'_>, end: &str) {
    match QUEUE.get() {
        Some(queue) => queue.push_all(text(message, end).as_bytes(), PATIENCE),
        None => line(io::stderr(), message, end),
    }
}

fn text(message: fmt::Arguments<'_>, end: &str) -> String {
    format!("crossvisor: {message}{end}")
}

fn line(mut to: impl Write, message: fmt::Arguments<'_>, end: &str) {
    // In one piece, so that lines of several threads do not mix. There is
    // nobody left to tell of a failure.
    let _ = to.write_all(text(message, end).as_bytes());
}

/// Writes to standard output.
///
/// # Errors
/// It cannot be written, such as a pipe that is closed; says so.
pub fn output(text: &str) -> Result<(), String> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| format!("standard output: {error}"))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_nobody_reads_is_no_reason_to_panic() {
        let (mut reader, writer) = io::pipe().unwrap();
        line(&writer, format_args!("an {}", "error"), "\r\n");
        let mut said = [0; 64];
        let count = reader.read(&mut said).unwrap();
        assert_eq!(&said[..count], b"crossvisor: an error\r\n");
        drop(reader);
        line(&writer, format_args!("nobody reads this"), "\n");
    }
}
