//! The guest side: what the crossvisor binary does when it is `/init`.
//!
//! It mounts what programs expect, loads modules, runs the command or a shell,
//! hands its exit status to the host, and powers the machine off. It must never
//! end by itself: the kernel panics when PID 1 does.

mod report;
mod setup;
mod streams;
mod supervise;
mod sys;

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::system::RebootCommand;

use super::config::{AtEnd, InitConfig, Io, PATH};
use streams::Streams;
use supervise::{End, Supervisor};

/// Exit status for failures of `/init` itself, as of `env` and `timeout`.
const STATUS_INIT: u8 = 125;
/// Exit status for a command that can't be executed.
const STATUS_NOT_EXECUTABLE: u8 = 126;
/// Exit status for a command that is not there.
const STATUS_NOT_FOUND: u8 = 127;

/// Where commands are looked for.
const SEARCH_PATH: &str = "/bin:/sbin:/usr/bin:/usr/sbin:/usr/local/bin";

/// Whether this process is the `/init` of an initramfs that
/// [`Builder`](super::Builder) made: then [`main`] is to be called.
pub fn is_init() -> bool {
    rustix::process::getpid() == rustix::process::Pid::INIT
        && std::env::args_os()
            .next()
            .is_some_and(|name| name == "/init")
        && Path::new(PATH).exists()
}

/// Runs as `/init`, and ends the machine at last. See [`is_init`].
pub fn main() -> ! {
    // A panic would take the kernel down with it. The hook ends the machine
    // itself, so that it serves with and without unwinding, on every thread.
    std::panic::set_hook(Box::new(|info| {
        say(format_args!("internal error: {info}"));
        end_machine(AtEnd::PowerOff)
    }));
    setup::early();
    let end = match std::fs::read(PATH).map(|json| serde_json::from_slice(&json)) {
        Ok(Ok(config)) => run(&config),
        Ok(Err(e)) => {
            say(format_args!("{PATH}: {e}"));
            AtEnd::PowerOff
        }
        Err(e) => {
            say(format_args!("{PATH}: {e}"));
            AtEnd::PowerOff
        }
    };
    end_machine(end)
}

/// Everything between start and end; how the machine ends.
fn run(config: &InitConfig) -> AtEnd {
    // With it off, Ctrl-Alt-Del is SIGINT for PID 1, not an immediate reset.
    if let Err(e) = rustix::system::reboot(RebootCommand::CadOff) {
        say(format_args!("disabling Ctrl-Alt-Del: {e}"));
    }
    let mut supervisor = match Supervisor::new(config.ctrl_alt_del) {
        Ok(supervisor) => supervisor,
        Err(e) => {
            say(format_args!("signals: {e}"));
            return AtEnd::PowerOff;
        }
    };
    setup::late(config);
    let (status, end) = match start(config) {
        Ok(Some(pid)) => supervisor.run(pid),
        Ok(None) => (0, None),
        Err(status) => (status, None),
    };
    // A shell that was ended because the machine was told to go has not failed.
    let status = if end.is_some() && config.command.is_none() {
        0
    } else {
        status
    };
    if let Some(port) = &config.status_port {
        send_status(port, status);
    } else if config.verbose {
        say(format_args!("exit status {status}"));
    }
    supervisor.stop_all();
    match end {
        Some(End::PowerOff) => AtEnd::PowerOff,
        Some(End::Reboot) => AtEnd::Reboot,
        None => config.at_end,
    }
}

/// Starts the command. Nothing to wait for when only a report was wanted; an
/// exit status when it can't be started.
fn start(config: &InitConfig) -> Result<Option<rustix::process::Pid>, u8> {
    for mount in &config.mounts {
        setup::extra_mount(mount).map_err(|e| {
            let (source, target) = (&mount.source, &mount.target);
            say(format_args!("mounting {source} at {target}: {e}"));
            STATUS_INIT
        })?;
    }
    let mut streams = match Streams::open(&config.io) {
        Ok(streams) => streams,
        Err(e) => {
            say(format_args!("standard input and output: {e}"));
            if config.io != Io::Console && config.command.is_some() {
                return Err(STATUS_INIT);
            }
            Streams::console().map_err(|e| {
                say(format_args!("console: {e}"));
                STATUS_INIT
            })?
        }
    };
    let shell = setup::is_executable(Path::new("/bin/sh"));
    if config.report || (config.command.is_none() && !shell) {
        let mut text = report::report();
        if config.command.is_none() && !shell && !config.report {
            text.push_str("There is no /bin/sh here, and no command was given.\n");
        }
        let written = streams
            .stdout
            .write_all(text.as_bytes())
            .and_then(|()| streams.stdout.flush());
        if let Err(e) = written {
            say(format_args!("report: {e}"));
        }
        if config.command.is_none() {
            return Ok(None);
        }
    }
    if let Some((rows, columns)) = config.terminal
        && streams.terminal
    {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let _ = rustix::termios::tcsetwinsize(&streams.stdin, size);
    }
    let mut command = match &config.command {
        Some(line) if shell => {
            let mut sh = Command::new("/bin/sh");
            sh.arg("-c").arg(line);
            sh
        }
        Some(line) => {
            let mut words = line.split_whitespace();
            let Some(program) = words.next() else {
                say(format_args!("the command is empty"));
                return Err(STATUS_NOT_FOUND);
            };
            let mut command = Command::new(program);
            command.args(words);
            command
        }
        None => Command::new("/bin/sh"),
    };
    command
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .env("HOME", "/root")
        .env("USER", "root")
        .env("TERM", "linux")
        .envs(config.env.iter().map(|(key, value)| (key, value)))
        .current_dir(config.workdir.as_deref().unwrap_or("/"))
        .stdin(streams.stdin)
        .stdout(streams.stdout)
        .stderr(streams.stderr);
    sys::new_session(&mut command, streams.terminal);
    match command.spawn() {
        Ok(child) => Ok(i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)),
        Err(e) => {
            say(format_args!("{}: {e}", command.get_program().display()));
            Err(match e.kind() {
                std::io::ErrorKind::NotFound => STATUS_NOT_FOUND,
                _ => STATUS_NOT_EXECUTABLE,
            })
        }
    }
}

fn send_status(port: &str, status: u8) {
    let sent = streams::open_port(port).and_then(|mut port| {
        port.write_all(format!("{status}\n").as_bytes())?;
        port.flush()
    });
    if let Err(e) = sent {
        say(format_args!("exit status {status}: {e}"));
    }
}

/// Ends the machine for good.
fn end_machine(how: AtEnd) -> ! {
    setup::unmount_all();
    let commands = match how {
        AtEnd::PowerOff => [RebootCommand::PowerOff, RebootCommand::Halt],
        AtEnd::Reboot => [RebootCommand::Restart, RebootCommand::PowerOff],
    };
    for command in commands {
        // It returns only when it fails.
        if let Err(e) = rustix::system::reboot(command) {
            say(format_args!("{command:?}: {e}"));
        }
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Says something on the console. That it can't be said is no reason to stop.
fn say(what: fmt::Arguments<'_>) {
    let line = format!("init: {what}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}
