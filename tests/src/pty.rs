//! A pseudo-terminal: the user's terminal, as crossvisor sees it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// The two ends of a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// Where the user sits.
    user: File,
    /// Where programs sit. It stays open here, so that its attributes can be
    /// asked for when the program is gone.
    line: File,
}

/// What of a terminal's attributes a program must put back.
#[derive(Debug, PartialEq, Eq)]
pub struct Attributes {
    modes: [u32; 4],
    special: Vec<u8>,
}

impl Terminal {
    /// Opens a new one of `rows` by `columns` characters.
    pub fn open(rows: u16, columns: u16) -> io::Result<Self> {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&user)?;
        unlockpt(&user)?;
        let name = ptsname(&user, Vec::new())?;
        let flags =
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let line = rustix::fs::open(&name, flags, rustix::fs::Mode::empty())?;
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&user, size)?;
        Ok(Self {
            user: user.into(),
            line: line.into(),
        })
    }

    /// A descriptor of the user's end.
    pub fn user(&self) -> io::Result<File> {
        self.user.try_clone()
    }

    /// A descriptor of the program's end.
    pub fn line(&self) -> io::Result<OwnedFd> {
        self.line.as_fd().try_clone_to_owned()
    }

    /// The attributes as they are now.
    pub fn attributes(&self) -> io::Result<Attributes> {
        let mut attributes = tcgetattr(&self.line)?;
        // Without the speed, of which a pseudo-terminal has none: the input's is
        // left out where it is the output's, or spelled out, as a system's
        // library has it, and QEMU's user mode does not tell either on powerpc.
        attributes.set_speed(38_400)?;
        Ok(Attributes {
            modes: [
                attributes.input_modes.bits(),
                attributes.output_modes.bits(),
                attributes.control_modes.bits(),
                attributes.local_modes.bits(),
            ],
            special: special(&attributes),
        })
    }

    /// Whether every key reaches the program at once, without an echo.
    pub fn is_raw(&self) -> io::Result<bool> {
        let line = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        Ok(!tcgetattr(&self.line)?.local_modes.intersects(line))
    }
}

fn special(attributes: &Termios) -> Vec<u8> {
    use rustix::termios::SpecialCodeIndex as Index;
    [
        Index::VINTR,
        Index::VQUIT,
        Index::VERASE,
        Index::VKILL,
        Index::VEOF,
        Index::VMIN,
        Index::VTIME,
        Index::VSUSP,
    ]
    .into_iter()
    .map(|index| attributes.special_codes[index])
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::termios::{OptionalActions, tcgetwinsize, tcsetattr};

    #[test]
    fn raw_mode_is_seen_and_so_is_its_end() {
        let terminal = Terminal::open(24, 80).unwrap();
        let size = tcgetwinsize(terminal.line().unwrap()).unwrap();
        assert_eq!((size.ws_row, size.ws_col), (24, 80));
        let before = terminal.attributes().unwrap();
        assert!(!terminal.is_raw().unwrap());
        let saved = tcgetattr(&terminal.line).unwrap();
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(&terminal.line, OptionalActions::Now, &raw).unwrap();
        assert!(terminal.is_raw().unwrap());
        assert_ne!(terminal.attributes().unwrap(), before);
        tcsetattr(&terminal.line, OptionalActions::Now, &saved).unwrap();
        assert_eq!(terminal.attributes().unwrap(), before);
    }
}
