//! Where the command reads and writes: the console's terminal or virtio-serial
//! ports.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::config::Io;

/// How long a port may take to appear after the modules are loaded.
const PORT_WAIT: Duration = Duration::from_secs(5);

/// How long the host may take to say that it has opened a port for input,
/// after the port's name has appeared: the messages follow each other. When it
/// passes, the host has closed its end already: end of file.
const OPEN_WAIT: Duration = Duration::from_millis(300);

/// The command's standard streams.
pub(super) struct Streams {
    pub stdin: File,
    pub stdout: File,
    pub stderr: File,
    /// Whether they are a terminal that can be a controlling terminal.
    pub terminal: bool,
}

impl Streams {
    /// Opens what the configuration asks for.
    pub fn open(io: &Io) -> io::Result<Streams> {
        match io {
            Io::Console => Streams::console(),
            Io::Ports {
                stdin,
                stdout,
                stderr,
            } => {
                let mut ports = Ports::default();
                let out = ports.open(stdout)?;
                let err = match stderr {
                    Some(name) => ports.open(name)?,
                    None => out.try_clone()?,
                };
                let input = match stdin {
                    Some(name) => {
                        let port = ports.open(name)?;
                        wait_for_host(&port);
                        port
                    }
                    None => File::open("/dev/null")?,
                };
                Ok(Streams {
                    stdin: input,
                    stdout: out,
                    stderr: err,
                    terminal: false,
                })
            }
        }
    }

    /// The console. `/dev/console` itself can't be a controlling terminal, the
    /// device behind it can.
    pub fn console() -> io::Result<Streams> {
        let behind = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
        let tty = active_console(&behind)
            .and_then(|name| open_both(&Path::new("/dev").join(name)).ok())
            .filter(|tty| rustix::termios::isatty(tty));
        let (tty, terminal) = match tty {
            Some(tty) => (tty, true),
            None => (open_both(Path::new("/dev/console"))?, false),
        };
        Ok(Streams {
            stdin: tty.try_clone()?,
            stdout: tty.try_clone()?,
            stderr: tty,
            terminal,
        })
    }
}

/// The device of `/dev/console` among the active consoles: the last one.
fn active_console(active: &str) -> Option<&str> {
    active.split_whitespace().last()
}

fn open_both(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
}

/// Opened ports: each can be open only once.
#[derive(Default)]
struct Ports {
    open: Vec<(String, File)>,
}

impl Ports {
    fn open(&mut self, name: &str) -> io::Result<File> {
        if let Some((_, port)) = self.open.iter().find(|(n, _)| n == name) {
            return port.try_clone();
        }
        let port = open_port(name)?;
        self.open.push((name.to_owned(), port.try_clone()?));
        Ok(port)
    }
}

/// Opens the virtio-serial port of that name, for which it waits.
pub(super) fn open_port(name: &str) -> io::Result<File> {
    let deadline = Instant::now() + PORT_WAIT;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(device) = find_port(Path::new("/sys/class/virtio-ports"), name) {
            // The node comes before the name, but by another thread with udev.
            match open_both(&Path::new("/dev").join(device)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                opened => return opened,
            }
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no virtio-serial port {name}"),
            ));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// The device name (`vport1p2`) of the port of that name.
fn find_port(class: &Path, name: &str) -> Option<PathBuf> {
    std::fs::read_dir(class).ok()?.flatten().find_map(|entry| {
        let found = std::fs::read_to_string(entry.path().join("name")).ok()?;
        (found.trim_end() == name).then(|| PathBuf::from(entry.file_name()))
    })
}

/// Waits until the host has its end of a port open, or data is there.
fn wait_for_host(port: &File) {
    let deadline = Instant::now() + OPEN_WAIT;
    loop {
        let mut fds = [PollFd::from_borrowed_fd(port.as_fd(), PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let polled = poll(&mut fds, Some(&now));
        let events = fds[0].revents();
        if polled.is_err()
            || events.contains(PollFlags::IN)
            || !events.contains(PollFlags::HUP)
            || Instant::now() >= deadline
        {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_console_counts() {
        assert_eq!(active_console("tty0 ttyS0\n"), Some("ttyS0"));
        assert_eq!(active_console("hvc0\n"), Some("hvc0"));
        assert_eq!(active_console("\n"), None);
    }

    #[test]
    fn ports_are_found_by_their_whole_name() {
        let class = tempfile::tempdir().unwrap();
        for (device, name) in [
            ("vport0p1", "org.crossvisor.io2"),
            ("vport0p2", "org.crossvisor.io"),
        ] {
            let dir = class.path().join(device);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("name"), format!("{name}\n")).unwrap();
        }
        // A port that has no name yet.
        std::fs::create_dir(class.path().join("vport0p3")).unwrap();
        let found = find_port(class.path(), "org.crossvisor.io");
        assert_eq!(found, Some(PathBuf::from("vport0p2")));
        assert_eq!(find_port(class.path(), "org.crossvisor"), None);
        assert_eq!(find_port(&class.path().join("absent"), "x"), None);
    }
}
