//! Waits for the command while reaping orphans and watching for signals and
//! the power button.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, wait};

use super::super::config::AtEnd;
use super::{say, sys};

/// How long a command has after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(5);
/// How long what the command left running has.
const LEFTOVER_GRACE: Duration = Duration::from_secs(2);
/// How often new input devices are looked for, in the time in which drivers may
/// still be finding them.
const SCAN_EVERY: Duration = Duration::from_secs(1);
const SCAN_UNTIL: Duration = Duration::from_secs(15);

/// How somebody asked the machine to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    PowerOff,
    Reboot,
}

pub(super) struct Supervisor {
    signals: OwnedFd,
    ctrl_alt_del: AtEnd,
    buttons: Vec<(PathBuf, File)>,
}

impl Supervisor {
    /// Takes over signals.
    pub fn new(ctrl_alt_del: AtEnd) -> io::Result<Supervisor> {
        Ok(Supervisor {
            signals: sys::signal_fd()?,
            ctrl_alt_del,
            buttons: Vec::new(),
        })
    }

    /// Waits until the process `main` has ended: its exit status as a shell
    /// has it, and how the machine is to end if somebody asked meanwhile.
    pub fn run(&mut self, main: Pid) -> (u8, Option<End>) {
        let started = Instant::now();
        let mut end = None;
        let mut kill_at: Option<Instant> = None;
        loop {
            if let Some(status) = reap(main) {
                return (status, end);
            }
            let scanning = started.elapsed() < SCAN_UNTIL;
            if scanning {
                self.find_buttons(Path::new("/dev/input"));
            }
            let now = Instant::now();
            if kill_at.is_some_and(|at| at <= now) {
                let _ = kill_process_group(main, Signal::KILL);
                kill_at = Some(now + GRACE);
            }
            let timeout = match kill_at {
                Some(at) => Some(at.saturating_duration_since(now)),
                None if scanning => Some(SCAN_EVERY),
                None => None,
            };
            if let Some(asked) = self.wait(timeout)
                && end.is_none()
            {
                say(format_args!(
                    "{}",
                    match asked {
                        End::PowerOff => "powering off",
                        End::Reboot => "rebooting",
                    }
                ));
                end = Some(asked);
                kill_at = Some(Instant::now() + GRACE);
                // An interactive shell heeds SIGHUP only, others SIGTERM.
                let _ = kill_process_group(main, Signal::TERM);
                let _ = kill_process_group(main, Signal::HUP);
                let _ = kill_process_group(main, Signal::CONT);
            }
        }
    }

    /// Ends every process that is left: SIGTERM, then SIGKILL.
    pub fn stop_all(&mut self) {
        for (signal, grace) in [
            (libc::SIGTERM, LEFTOVER_GRACE),
            (libc::SIGKILL, LEFTOVER_GRACE),
        ] {
            if !reap_all() {
                return;
            }
            sys::kill_all(signal);
            let deadline = Instant::now() + grace;
            while reap_all() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                self.wait(Some(left));
            }
        }
    }

    /// Waits for a signal or an input event.
    fn wait(&mut self, timeout: Option<Duration>) -> Option<End> {
        let timeout = timeout.map(|t| Timespec {
            tv_sec: t.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: t.subsec_nanos().into(),
        });
        let mut fds = vec![PollFd::from_borrowed_fd(
            self.signals.as_fd(),
            PollFlags::IN,
        )];
        let buttons = self.buttons.iter().map(|(_, device)| device.as_fd());
        fds.extend(buttons.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return None;
        }
        let mut end = None;
        let ready: Vec<bool> = fds
            .iter()
            .skip(1)
            .map(|fd| !fd.revents().is_empty())
            .collect();
        let mut ready = ready.into_iter();
        self.buttons.retain(|(_, device)| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            match sys::power_pressed(device.as_fd()) {
                Ok(pressed) => {
                    if pressed {
                        end = Some(End::PowerOff);
                    }
                    true
                }
                Err(_) => false,
            }
        });
        while let Some(signal) = sys::read_signal(&self.signals) {
            end = end.or(meaning(signal, self.ctrl_alt_del));
        }
        end
    }

    /// Opens input devices that are not open yet.
    fn find_buttons(&mut self, dir: &Path) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let event = entry.file_name().to_string_lossy().starts_with("event");
            if !event || self.buttons.iter().any(|(known, _)| *known == path) {
                continue;
            }
            let opened = File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path);
            if let Ok(device) = opened {
                self.buttons.push((path, device));
            }
        }
    }
}

/// What a signal asks for, as busybox's and SysV's tools use them: their
/// poweroff, halt and reboot send SIGUSR2, SIGUSR1 and SIGTERM; SIGPWR is a
/// power failure; the kernel sends SIGINT for Ctrl-Alt-Del.
fn meaning(signal: i32, ctrl_alt_del: AtEnd) -> Option<End> {
    match signal {
        libc::SIGUSR1 | libc::SIGUSR2 | libc::SIGPWR => Some(End::PowerOff),
        libc::SIGTERM => Some(End::Reboot),
        libc::SIGINT => Some(match ctrl_alt_del {
            AtEnd::PowerOff => End::PowerOff,
            AtEnd::Reboot => End::Reboot,
        }),
        _ => None,
    }
}

/// Reaps every process that has ended; the exit status of `main` if it was
/// among them, or if it can't be waited for any more.
fn reap(main: Pid) -> Option<u8> {
    let mut found = None;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == main => found = found.or(exit_status(status)),
            Ok(Some(_)) => {}
            Ok(None) => return found,
            // No child at all, and main was one.
            Err(_) => return found.or(Some(super::STATUS_INIT)),
        }
    }
}

/// Reaps every process that has ended; whether any is left.
fn reap_all() -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// The exit status as shells have it: 128 + N for signal N.
fn exit_status(status: WaitStatus) -> Option<u8> {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => return None,
    };
    Some(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;

    use super::*;

    /// How a shell's end is told. Only that child is waited for: other tests
    /// have children of their own.
    fn status_of(script: &str) -> Option<u8> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", script])
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let waited = rustix::process::waitpid(pid, WaitOptions::empty()).unwrap();
        assert!(child.wait().is_err(), "it has been waited for");
        exit_status(waited.unwrap().1)
    }

    #[test]
    fn exit_statuses_are_as_in_shells() {
        assert_eq!(status_of("exit 0"), Some(0));
        assert_eq!(status_of("exit 255"), Some(255));
        assert_eq!(status_of("kill -KILL $$"), Some(137));
        assert_eq!(status_of("kill -TERM $$"), Some(143));
    }

    #[test]
    fn signals_ask_for_an_end() {
        assert_eq!(meaning(libc::SIGUSR2, AtEnd::Reboot), Some(End::PowerOff));
        assert_eq!(meaning(libc::SIGPWR, AtEnd::Reboot), Some(End::PowerOff));
        assert_eq!(meaning(libc::SIGTERM, AtEnd::PowerOff), Some(End::Reboot));
        assert_eq!(meaning(libc::SIGINT, AtEnd::PowerOff), Some(End::PowerOff));
        assert_eq!(meaning(libc::SIGINT, AtEnd::Reboot), Some(End::Reboot));
        assert_eq!(meaning(libc::SIGCHLD, AtEnd::Reboot), None);
        assert_eq!(meaning(libc::SIGHUP, AtEnd::Reboot), None);
    }

    /// A pipe stands in for an input device: it is found, heeded, and dropped
    /// when it is gone. A signal that is pending is heeded too.
    #[test]
    fn the_power_button_and_signals_are_heeded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("event0");
        assert!(
            Command::new("mkfifo")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        std::fs::write(dir.path().join("mouse0"), "").unwrap();
        // Signals are blocked in this test's own thread only.
        let mut supervisor = Supervisor::new(AtEnd::Reboot).unwrap();
        supervisor.find_buttons(dir.path());
        supervisor.find_buttons(dir.path());
        assert_eq!(supervisor.buttons.len(), 1);

        let mut device = File::options().write(true).open(&path).unwrap();
        assert_eq!(supervisor.wait(Some(Duration::ZERO)), None);
        device.write_all(&sys::tests::event(1, 116, 1)).unwrap();
        assert_eq!(
            supervisor.wait(Some(Duration::from_secs(5))),
            Some(End::PowerOff)
        );
        drop(device);
        assert_eq!(supervisor.wait(Some(Duration::from_secs(5))), None);
        assert!(supervisor.buttons.is_empty());

        sys::tests::raise_in_thread(libc::SIGPWR);
        assert_eq!(
            supervisor.wait(Some(Duration::from_secs(5))),
            Some(End::PowerOff)
        );
    }
}
