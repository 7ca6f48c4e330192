//! Standard output and standard error, whoever reads them or no longer does.

use std::fmt;
use std::io::{self, Write};

/// Writes a line to standard error, if that can be. `eprintln!` would panic
/// where nobody reads any more (a closed pipe, a terminal that was hung up),
/// and a message must not end the thread that has it.
pub fn error(message: fmt::Arguments<'_>) {
    line(message, "\n");
}

/// The same while a guest may have the terminal: it is raw then, and wants a
/// carriage return each line.
pub fn notice(message: fmt::Arguments<'_>) {
    line(message, "\r\n");
}

fn line(message: fmt::Arguments<'_>, end: &str) {
    // In one piece, so that lines of several threads do not mix. There is
    // nobody left to tell of a failure.
    let _ = io::stderr().write_all(format!("crossvisor: {message}{end}").as_bytes());
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
    use std::process::{Command, Stdio};

    use super::*;

    /// Set in the process whose standard error nobody reads.
    const UNREAD: &str = "CROSSVISOR_TEST_UNREAD";

    #[test]
    fn a_standard_error_that_nobody_reads_is_no_reason_to_panic() {
        if std::env::var_os(UNREAD).is_some() {
            crate::log_to_stderr(0);
            log::warn!("a warning");
            error(format_args!("an error"));
            return;
        }
        let (_, unread) = io::pipe().unwrap();
        let name = "print::tests::a_standard_error_that_nobody_reads_is_no_reason_to_panic";
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(UNREAD, "1")
            .stdin(Stdio::null())
            .stderr(unread)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(
            child.status.success() && said.contains("1 passed"),
            "{said}"
        );
    }
}
