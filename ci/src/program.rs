//! Running programs and keeping what they print.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use crate::error::{Error, Result};

/// Runs `command` with no input and returns what it printed on standard output.
///
/// # Errors
///
/// When it cannot be started, or exits with anything but success; the error
/// then carries the end of what it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let program = name(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Start {
            program: program.clone(),
            source,
        })?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(Error::Failed {
        program,
        status: describe(output.status),
        output: format!("{printed}\n{errors}"),
    })
}

/// Runs `command` with the lab's own output streams.
///
/// # Errors
///
/// When it cannot be started, or exits with anything but success.
pub fn run(command: &mut Command) -> Result<()> {
    let program = name(command);
    let status = command
        .stdin(Stdio::null())
        .status()
        .map_err(|source| Error::Start {
            program: program.clone(),
            source,
        })?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        program,
        status: describe(status),
        output: String::new(),
    })
}

/// The file that `program` names: looked up in `PATH` unless it holds a slash.
pub fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        let path = Path::new(program);
        return path.is_file().then(|| path.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// The name under which a failure of `command` is reported: the program, and
/// its first argument where that tells more.
fn name(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let program = program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned();
    command
        .get_args()
        .map(|arg| arg.to_string_lossy())
        .find(|arg| !arg.starts_with('-') && !arg.contains('/'))
        .map_or_else(|| program.clone(), |arg| format!("{program} {arg}"))
}

/// An exit status in words.
pub fn describe(status: ExitStatus) -> String {
    status.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_returns_what_was_printed() {
        let printed = output(Command::new("sh").args(["-c", "echo yes"])).unwrap();
        assert_eq!(printed, "yes\n");
    }

    #[test]
    fn output_of_a_failure_carries_both_streams_and_the_status() {
        let error = output(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.contains("out") && error.contains("err"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = output(&mut Command::new("no-such-program-here"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("cannot start no-such-program-here"),
            "{error}"
        );
        assert!(find("no-such-program-here").is_none());
        assert!(find("sh").is_some());
    }
}
