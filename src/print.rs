//! Standard output and standard error, whoever reads them or no longer does.

use std::fmt;
use std::io::{self, Write};

/// Writes a line to standard error, if that can be. `eprintln!` would panic
/// where nobody reads any more (a closed pipe, a terminal that was hung up),
/// and a message must not end the thread that has it.
pub fn error(message: fmt::Arguments<'_>) {
    line(io::stderr(), message, "\n");
}

/// The same while a guest may have the terminal: it is raw then, and wants a
/// carriage return each line.
pub fn notice(message: fmt::Arguments<'_>) {
    line(io::stderr(), message, "\r\n");
}

fn line(mut to: impl Write, message: fmt::Arguments<'_>, end: &str) {
    // In one piece, so that lines of several threads do not mix. There is
    // nobody left to tell of a failure.
    let _ = to.write_all(format!("crossvisor: {message}{end}").as_bytes());
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
