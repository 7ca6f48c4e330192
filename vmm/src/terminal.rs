//! The user's terminal: raw while a guest has it, and as it was afterwards.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crossvisor_devices::chardev::ConsoleInput;
use crossvisor_devices::fd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

use crate::error::{Error, Result};
use crate::exit::End;
use crate::power::Requests;

/// What to put back, for ways out that do not unwind the stack.
static SAVED: Mutex<Saved> = Mutex::new(Saved(None));

fn saved() -> MutexGuard<'static, Saved> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts the terminal back as it was before [`RawMode::enter`]; does nothing
/// when it is not raw.
pub fn restore() {
    let mut saved = saved();
    saved.put_back(io::stdin());
    saved.0 = None;
}

/// Puts the terminal back while the process is stopped, until [`resume`].
pub fn suspend() {
    saved().put_back(io::stdin());
}

/// Makes the terminal raw again after the process was stopped, if it was raw;
/// in the background only once the process is continued in the foreground.
pub fn resume() {
    let stdin = io::stdin();
    // A change from the background would stop the process once more.
    let background = tcgetpgrp(&stdin).is_ok_and(|group| group != getpgrp());
    if !background {
        saved().make_raw_again(stdin);
    }
}

/// The attributes of a terminal before it was made raw; none while it is not.
struct Saved(Option<Termios>);

impl Saved {
    fn make_raw(&mut self, terminal: impl AsFd) -> io::Result<()> {
        let attributes = tcgetattr(&terminal)?;
        let mut raw = attributes.clone();
        raw.make_raw();
        self.0 = Some(attributes);
        Ok(tcsetattr(&terminal, OptionalActions::Now, &raw)?)
    }

    fn make_raw_again(&mut self, terminal: impl AsFd) {
        let line = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        let given_back = tcgetattr(&terminal).is_ok_and(|now| now.local_modes.intersects(line));
        // What the shell has set meanwhile is what it wants back. There is
        // nobody to tell if the terminal is gone.
        if self.0.is_some() && given_back {
            let _ = self.make_raw(terminal);
        }
    }

    fn put_back(&self, terminal: impl AsFd) {
        if let Some(attributes) = &self.0 {
            // There is nobody left to tell if the terminal is gone.
            let _ = tcsetattr(terminal, OptionalActions::Now, attributes);
        }
    }
}

/// Raw mode of the terminal on standard input, until it is dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal raw; `None` when standard input is not one. Output
    /// keeps its line discipline for newlines that the VMM itself prints.
    ///
    /// # Errors
    /// The terminal's attributes cannot be changed.
    pub fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        saved()
            .make_raw(&stdin)
            .map_err(|error| Error::io("terminal attributes", error))?;
        // Whatever thread panics, its message must not go to a raw terminal,
        // and the terminal must be sane if the process ends there.
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Where typed bytes go: the console of the VM that is running now.
#[derive(Clone, Default)]
pub struct InputSlot(Arc<Mutex<Option<Arc<dyn ConsoleInput>>>>);

impl InputSlot {
    /// Connects the console of a new run, or none.
    pub fn set(&self, input: Option<Arc<dyn ConsoleInput>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = input;
    }

    fn get(&self) -> Option<Arc<dyn ConsoleInput>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// What Ctrl-A introduces, as users of QEMU and kvmtool know it.
const ESCAPE: u8 = 0x01;

const HELP: &str = "\r\nCtrl-A x  quit\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n";

/// Finds the escapes in what is typed.
#[derive(Debug, Default)]
struct Escapes {
    pending: bool,
}

/// What typed bytes turn out to be.
#[derive(Debug, Default, PartialEq, Eq)]
struct Typed {
    bytes: Vec<u8>,
    quit: bool,
    help: bool,
}

impl Escapes {
    fn filter(&mut self, input: &[u8]) -> Typed {
        let mut typed = Typed::default();
        for &byte in input {
            if !self.pending {
                match byte {
                    ESCAPE => self.pending = true,
                    _ => typed.bytes.push(byte),
                }
                continue;
            }
            self.pending = false;
            match byte {
                b'x' | b'X' => typed.quit = true,
                b'h' | b'H' | b'?' => typed.help = true,
                ESCAPE | b'a' | b'A' => typed.bytes.push(ESCAPE),
                // Not an escape after all: the guest gets both.
                _ => typed.bytes.extend([ESCAPE, byte]),
            }
        }
        typed
    }
}

/// Starts the thread that carries what is typed to the guest. With `escapes`
/// (a terminal), Ctrl-A x ends the VM. The thread lives as long as the process:
/// a read of a terminal cannot be taken back.
///
/// # Errors
/// The thread could not be made.
pub fn spawn_input(slot: InputSlot, requests: Requests, escapes: bool) -> Result<()> {
    let body = move || {
        let mut stdin = io::stdin().lock();
        let mut filter = Escapes::default();
        let mut buffer = [0; 256];
        loop {
            let count = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::warn!("standard input: {error}");
                    return;
                }
            };
            let Some(input) = buffer.get(..count) else {
                return;
            };
            let typed = match escapes {
                true => filter.filter(input),
                false => Typed {
                    bytes: input.to_vec(),
                    ..Typed::default()
                },
            };
            deliver(&slot, &typed.bytes);
            if typed.help {
                let _ = io::stdout().write_all(HELP.as_bytes());
            }
            if typed.quit {
                requests.end(End::Quit);
            }
        }
    };
    thread::Builder::new()
        .name("terminal".into())
        .spawn(body)
        .map_err(|source| Error::io("thread for the terminal", source))?;
    Ok(())
}

/// Pushes `bytes` into the console, at its pace. Bytes that no console takes
/// for a second are dropped, as on a line that nobody listens to.
fn deliver(slot: &InputSlot, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let Some(console) = slot.get() else {
            return;
        };
        let taken = console.push(bytes).min(bytes.len());
        bytes = bytes.get(taken..).unwrap_or_default();
        if taken == 0 {
            let room = console.room();
            let mut fds = [PollFd::from_borrowed_fd(fd::borrow(room), PollFlags::IN)];
            let timeout = Duration::from_secs(1).try_into().ok();
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return,
                _ => drop(room.read()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_given_back_while_the_process_is_stopped() {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        use rustix::termios::SpecialCodeIndex;
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let line = rustix::fs::open(&name, flags, rustix::fs::Mode::empty()).unwrap();
        let is_raw = || {
            let modes = tcgetattr(&line).unwrap().local_modes;
            !modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
        };

        let mut saved = Saved(None);
        saved.make_raw_again(&line);
        assert!(!is_raw(), "it was not raw before");
        saved.make_raw(&line).unwrap();
        assert!(is_raw());
        saved.put_back(&line);
        assert!(!is_raw());
        // A shell that changes it meanwhile gets its own back in the end.
        let mut changed = tcgetattr(&line).unwrap();
        changed.special_codes[SpecialCodeIndex::VINTR] = 7;
        tcsetattr(&line, OptionalActions::Now, &changed).unwrap();
        saved.make_raw_again(&line);
        assert!(is_raw());
        // SIGCONT comes again without a stop: what is saved is not the raw state.
        saved.make_raw_again(&line);
        saved.put_back(&line);
        assert!(!is_raw());
        let intr = tcgetattr(&line).unwrap().special_codes[SpecialCodeIndex::VINTR];
        assert_eq!(intr, 7);
    }

    fn filter(chunks: &[&[u8]]) -> Typed {
        let mut filter = Escapes::default();
        let mut all = Typed::default();
        for chunk in chunks {
            let typed = filter.filter(chunk);
            all.bytes.extend(typed.bytes);
            all.quit |= typed.quit;
            all.help |= typed.help;
        }
        all
    }

    #[test]
    fn ctrl_a_x_quits_however_it_is_cut() {
        assert!(filter(&[b"\x01x"]).quit);
        assert!(filter(&[b"ls\x01", b"x"]).quit);
        assert!(!filter(&[b"x"]).quit);
        assert!(!filter(&[b"\x01\x01x"]).quit);
    }

    #[test]
    fn everything_else_reaches_the_guest() {
        assert_eq!(filter(&[b"a\x01\x01b"]).bytes, b"a\x01b");
        assert_eq!(filter(&[b"\x01a"]).bytes, b"\x01");
        assert_eq!(filter(&[b"\x01z\x03"]).bytes, b"\x01z\x03");
        let typed = filter(&[b"\x01h"]);
        assert!(typed.help && typed.bytes.is_empty());
    }
}
