//! The system calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The signals that `/init` takes through its signal file descriptor.
const SIGNALS: [libc::c_int; 7] = [
    libc::SIGCHLD,
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPWR,
    libc::SIGHUP,
];

/// Blocks [`SIGNALS`] and returns a non-blocking file descriptor that reads
/// them.
pub(super) fn signal_fd() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sigset_t is a valid value of that plain C type, and
    // sigemptyset initialises it anyway.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid sigset_t for the calls' duration, and the old
    // mask is not asked for.
    let fd = unsafe {
        libc::sigemptyset(&mut set);
        for signal in SIGNALS {
            libc::sigaddset(&mut set, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The next pending signal of a [`signal_fd`].
pub(super) fn read_signal(fd: &OwnedFd) -> Option<i32> {
    // struct signalfd_siginfo, of which ssi_signo is the first word.
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    let n = rustix::io::read(fd, &mut info).ok()?;
    let number = info.first_chunk::<4>().filter(|_| n == info.len())?;
    i32::try_from(u32::from_ne_bytes(*number)).ok()
}

/// Sends a signal to every process but this one.
pub(super) fn kill_all(signal: libc::c_int) {
    // SAFETY: no memory is involved. That there may be nobody to signal is
    // fine.
    unsafe { libc::kill(-1, signal) };
}

/// Makes `command` run in a session of its own, with the default signal mask
/// and, if `terminal`, its standard input as controlling terminal.
pub(super) fn new_session(command: &mut Command, terminal: bool) {
    let setup = move || {
        rustix::process::setsid()?;
        if terminal {
            // A shell without job control is better than none.
            let _ = rustix::process::ioctl_tiocsctty(rustix::stdio::stdin());
        }
        // SAFETY: the set is initialised by sigemptyset; sigprocmask is
        // async-signal-safe.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls; it
    // neither allocates nor takes locks.
    unsafe { command.pre_exec(setup) };
}

/// Brings the loopback interface up, like `ip link set lo up` (netdevice(7)).
pub(super) fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is a valid value of that plain C type.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = from.cast_signed() as libc::c_char;
    }
    ioctl(&socket, libc::SIOCGIFFLAGS as _, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has set this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(&socket, libc::SIOCSIFFLAGS as _, &mut request)
}

fn ioctl(socket: &OwnedFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: both requests that are used read and write one ifreq, which
    // `request` borrows exclusively.
    match unsafe { libc::ioctl(socket.as_raw_fd(), number, request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Length of the time stamp that an input event begins with: two longs.
const EVENT_TIME: usize = 2 * size_of::<libc::c_long>();
/// Length of `struct input_event` (include/uapi/linux/input.h).
const EVENT: usize = EVENT_TIME + 8;
/// `EV_KEY` and `KEY_POWER` (include/uapi/linux/input-event-codes.h).
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Reads what an input device has pending; whether the power key was pressed.
/// An error says that the device is gone.
pub(super) fn power_pressed(device: BorrowedFd<'_>) -> io::Result<bool> {
    let mut events = [0u8; 16 * EVENT];
    let n = match rustix::io::read(device, &mut events) {
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(n) => n,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
        Err(e) => return Err(e.into()),
    };
    Ok(has_power_key(events.get(..n).unwrap_or_default()))
}

fn has_power_key(events: &[u8]) -> bool {
    events.chunks_exact(EVENT).any(|event| {
        let [a, b, c, d, e, f, g, h] = event[EVENT_TIME..] else {
            return false;
        };
        u16::from_ne_bytes([a, b]) == EV_KEY
            && u16::from_ne_bytes([c, d]) == KEY_POWER
            && i32::from_ne_bytes([e, f, g, h]) == 1
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Sends a signal to the calling thread.
    pub(in super::super) fn raise_in_thread(signal: libc::c_int) {
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
    }

    pub(in super::super) fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut bytes = vec![0xee; EVENT_TIME];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(code.to_ne_bytes());
        bytes.extend(value.to_ne_bytes());
        bytes
    }

    #[test]
    fn the_power_key_is_told_from_others() {
        let syn = event(0, 0, 0);
        let other = event(EV_KEY, 28, 1);
        let release = event(EV_KEY, KEY_POWER, 0);
        let press = event(EV_KEY, KEY_POWER, 1);
        assert!(!has_power_key(
            &[other.clone(), syn.clone(), release].concat()
        ));
        assert!(has_power_key(&[other, syn, press.clone()].concat()));
        assert!(!has_power_key(&press[..EVENT - 1]));
        assert!(!has_power_key(&[]));
    }

    #[test]
    fn a_child_gets_a_session_and_the_default_signal_mask() {
        let mut command = Command::new("/bin/sh");
        command.args([
            "-c",
            "grep SigBlk /proc/self/status; ps -o pid=,sid= -p $$ || true",
        ]);
        new_session(&mut command, false);
        let out = command.output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("SigBlk:\t0000000000000000"));
        if let Some(ids) = lines.next() {
            let ids: Vec<&str> = ids.split_whitespace().collect();
            assert_eq!(ids.first(), ids.get(1));
        }
    }

    #[test]
    fn input_devices_that_are_gone_are_told() {
        let null = std::fs::File::open("/dev/null").unwrap();
        use std::os::fd::AsFd;
        assert!(power_pressed(null.as_fd()).is_err());
    }
}
