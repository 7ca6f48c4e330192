//! Tap devices: the host's end of a guest's network.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;

use crate::byte_order::ByteOrder;

/// The header in front of each packet, the virtio-net header (virtio 1.2,
/// section 5.1.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whether it ends with `num_buffers`.
    pub counts_buffers: bool,
    /// The byte order of its fields.
    pub order: ByteOrder,
}

impl Header {
    /// The length of the longest, in bytes.
    pub const MAX: usize = 12;

    /// Its length in bytes.
    pub fn bytes(self) -> usize {
        match self.counts_buffers {
            true => Self::MAX,
            false => Self::MAX - 2,
        }
    }
}

impl Default for Header {
    /// As virtio 1.x has it.
    fn default() -> Self {
        Self {
            counts_buffers: true,
            order: ByteOrder::Little,
        }
    }
}

/// More packets than wait in a queue (Linux: 500, unless told otherwise).
const MAX_WAITING: usize = 4096;

const TUN: &str = "/dev/net/tun";

/// Why a tap could not be opened.
#[derive(Debug, Error)]
pub enum TapError {
    /// It cannot be the name of an interface.
    #[error("tap {0:?}: not an interface name (1 to 15 characters, no '/', '%', ':' or space)")]
    Name(String),
    /// The tun driver is not there or not ours to use.
    #[error("tap {name}: cannot open /dev/net/tun: {error}; {hint}")]
    Tun {
        /// The tap's name.
        name: String,
        /// The host's error.
        error: io::Error,
        /// What would work.
        hint: &'static str,
    },
    /// The kernel refused to attach.
    #[error("tap {name}: {problem}: {error}; {hint}")]
    Attach {
        /// The tap's name.
        name: String,
        /// What is in the way.
        problem: &'static str,
        /// The host's error.
        error: io::Error,
        /// What would work.
        hint: String,
    },
    /// The kernel lacks something that a virtio network needs.
    #[error("tap {name}: {what}: {error}")]
    Setup {
        /// The tap's name.
        name: String,
        /// What failed.
        what: &'static str,
        /// The host's error.
        error: io::Error,
    },
}

/// Offloads that a guest takes from the tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets whose checksum is not filled in.
    pub checksum: bool,
    /// TCP segments over IPv4 larger than the MTU.
    pub tso4: bool,
    /// TCP segments over IPv6 larger than the MTU.
    pub tso6: bool,
    /// Such segments with explicit congestion notification.
    pub ecn: bool,
}

/// An open tap device with one or more queues. Packets are preceded by a
/// virtio-net header, see [`Header`].
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
    mtu: u32,
}

impl Tap {
    /// Attaches to the tap `name` with `queues` queues, or makes it and brings
    /// it up where that is permitted; what is made here ends with this value.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(name: &str, queues: u16) -> Result<Self, TapError> {
        check_name(name)?;
        let queues = queues.max(1);
        let control = socket().map_err(|error| setup(name, "no socket for its settings", error))?;
        let existed = interface_flags(control.as_fd(), name).is_ok();
        let tap = Self {
            name: name.to_owned(),
            queues: attach(name, queues)?,
            mtu: mtu(control.as_fd(), name)
                .map_err(|error| setup(name, "cannot read its MTU", error))?,
        };
        for queue in &tap.queues {
            configure(queue, Header::default())
                .map_err(|(what, error)| setup(name, what, error))?;
        }
        if !existed {
            bring_up(control.as_fd(), name)
                .map_err(|error| setup(name, "made, but cannot bring it up", error))?;
        }
        Ok(tap)
    }

    /// A tap whose queues are any descriptors that carry packets.
    #[cfg(test)]
    pub(crate) fn of_queues(queues: Vec<File>, mtu: u32) -> Self {
        Self {
            name: "test".to_owned(),
            queues,
            mtu,
        }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// The interface's MTU in bytes, when it was opened.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    pub(crate) fn queue(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(index).map(AsFd::as_fd)
    }

    /// Drops the packets that wait to be read.
    pub(crate) fn discard_waiting(&self) {
        for queue in &self.queues {
            // One that receives all the time is not waited for.
            for _ in 0..MAX_WAITING {
                // Of a packet, what does not fit is lost; but with less room than
                // for the header, the read fails.
                match rustix::io::read(queue, &mut [0; Header::MAX]) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(_) => break,
                }
            }
        }
    }

    /// Chooses the header, which is that of virtio 1.x until then.
    ///
    /// # Errors
    /// The kernel's, with what it refused.
    pub fn set_header(&self, header: Header) -> io::Result<()> {
        self.queues.iter().try_for_each(|queue| {
            configure(queue, header)
                .map_err(|(what, error)| io::Error::new(error.kind(), format!("{what}: {error}")))
        })
    }

    /// Tells the kernel which packets the guest takes. Segmentation is worth
    /// nothing without checksums, nor congestion notification without it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let Offloads {
            checksum,
            tso4,
            tso6,
            ecn,
        } = offloads;
        let flags = [
            (checksum, libc::TUN_F_CSUM),
            (checksum && tso4, libc::TUN_F_TSO4),
            (checksum && tso6, libc::TUN_F_TSO6),
            (checksum && ecn && (tso4 || tso6), libc::TUN_F_TSO_ECN),
        ];
        let flags = flags
            .iter()
            .filter(|(wanted, _)| *wanted)
            .fold(0, |flags, (_, flag)| flags | flag);
        let Some(first) = self.queues.first() else {
            return Ok(());
        };
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe {
            libc::ioctl(
                first.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        })
    }

    /// Lets the kernel use a queue, or not. A tap of a single queue is always
    /// in use.
    ///
    /// # Errors
    /// The kernel's. A queue that is in that state already is no error.
    pub fn enable_queue(&self, index: usize, enable: bool) -> io::Result<()> {
        let Some(queue) = self.queues.get(index).filter(|_| self.queues.len() > 1) else {
            return Ok(());
        };
        let mut request = request("");
        let flag = if enable {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads the `ifreq` that the pointer leads to.
        let result =
            check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) });
        match result {
            // The kernel's word for "already".
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

fn setup(name: &str, what: &'static str, error: io::Error) -> TapError {
    TapError::Setup {
        name: name.to_owned(),
        what,
        error,
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let valid = (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"/%:".contains(&byte));
    if valid {
        Ok(())
    } else {
        Err(TapError::Name(name.to_owned()))
    }
}

/// Opens one descriptor per queue and attaches each.
fn attach(name: &str, queues: u16) -> Result<Vec<File>, TapError> {
    let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    match attach_all(name, queues, multi) {
        // A tap made for several queues can be used with one, if it is told so.
        Err(TapError::Attach { error, .. })
            if queues == 1 && error.raw_os_error() == Some(libc::EINVAL) =>
        {
            attach_all(name, queues, libc::IFF_MULTI_QUEUE)
        }
        result => result,
    }
}

fn attach_all(name: &str, queues: u16, multi: libc::c_int) -> Result<Vec<File>, TapError> {
    (0..queues)
        .map(|_| {
            let queue = open_tun(name)?;
            let mut request = request(name);
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi;
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            // SAFETY: TUNSETIFF reads and writes the `ifreq` that the pointer
            // leads to.
            check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
                .map_err(|error| explain_attach(name, queues, error))?;
            Ok(queue)
        })
        .collect()
}

fn explain_attach(name: &str, queues: u16, error: io::Error) -> TapError {
    let multi = if queues > 1 { " multi_queue" } else { "" };
    let make = format!("`ip tuntap add dev {name} mode tap user $USER{multi}`");
    let (problem, hint) = match error.raw_os_error() {
        Some(libc::EPERM) => (
            "no permission to open or make it",
            format!("make it as root for your user with {make}, or run with CAP_NET_ADMIN"),
        ),
        Some(libc::EBUSY) => (
            "in use by another process",
            "end that process, or use another tap".to_owned(),
        ),
        Some(libc::EINVAL) if queues > 1 => (
            "not a tap, or not made for several queues",
            format!("use one queue, or delete it and make it as root with {make}"),
        ),
        Some(libc::EINVAL) => (
            "not a tap",
            format!("use another name, or make a tap as root with {make}"),
        ),
        Some(libc::E2BIG) => ("too many queues", "use fewer queues".to_owned()),
        _ => (
            "cannot attach to it",
            format!("make it as root with {make}"),
        ),
    };
    TapError::Attach {
        name: name.to_owned(),
        problem,
        error,
        hint,
    }
}

fn open_tun(name: &str) -> Result<File, TapError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(|error| TapError::Tun {
            name: name.to_owned(),
            hint: match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    "get the right to read and write it, such as by `chmod 666` as root"
                }
                _ => "load the kernel's tun module",
            },
            error,
        })
}

/// Sets up the header: its size and its byte order.
fn configure(queue: &File, header: Header) -> Result<(), (&'static str, io::Error)> {
    let len = header.bytes() as libc::c_int;
    set(queue, libc::TUNSETVNETHDRSZ, len)
        .map_err(|error| ("cannot set the size of its packet header", error))?;
    let little = header.order == ByteOrder::Little;
    set(queue, libc::TUNSETVNETLE, little.into())
        .map_err(|error| ("cannot make its packet header little-endian", error))?;
    // Without little-endian headers they are in the host's own order, unless it
    // is told otherwise; where that is big-endian, it cannot be told.
    if cfg!(target_endian = "little") && !little {
        set(queue, libc::TUNSETVNETBE, 1).map_err(|error| {
            let what = "cannot make its packet header big-endian, which takes a host kernel \
                        with CONFIG_TUN_VNET_CROSS_LE";
            (what, error)
        })?;
    }
    Ok(())
}

/// One of the settings that are an int.
fn set(queue: &File, setting: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the settings above read the int that the pointer leads to.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), setting, &raw const value) })
}

fn socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// A request about the interface `name`, which [`check_name`] has seen.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is made of integers and pointers, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn interface_flags(control: BorrowedFd<'_>, name: &str) -> io::Result<libc::c_short> {
    let mut request = request(name);
    // SAFETY: SIOCGIFFLAGS reads and writes the `ifreq` that the pointer leads to.
    check(unsafe {
        libc::ioctl(
            control.as_raw_fd(),
            libc::SIOCGIFFLAGS as _,
            &raw mut request,
        )
    })?;
    // SAFETY: the call above has filled this field.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}

fn bring_up(control: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = interface_flags(control, name)? | libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads the `ifreq` that the pointer leads to.
    check(unsafe {
        libc::ioctl(
            control.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    })
}

fn mtu(control: BorrowedFd<'_>, name: &str) -> io::Result<u32> {
    let mut request = request(name);
    // SAFETY: SIOCGIFMTU reads and writes the `ifreq` that the pointer leads to.
    check(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCGIFMTU as _, &raw mut request) })?;
    // SAFETY: the call above has filled this field.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(u32::try_from(mtu).unwrap_or(0))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Sends `frame` out of the interface `name`.
    pub(crate) fn inject(name: &str, frame: &[u8]) -> io::Result<()> {
        use rustix::net::{AddressFamily, SocketType, socket};
        let socket = socket(AddressFamily::PACKET, SocketType::RAW, None)?;
        // SAFETY: `sockaddr_ll` is made of integers, for which zeroes are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_ifindex = rustix::net::netdevice::name_to_index(&socket, name)? as libc::c_int;
        address.sll_halen = 6;
        // SAFETY: the pointers lead to a frame and an address of these lengths.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    #[test]
    fn what_waits_can_be_dropped() {
        use std::os::unix::net::UnixDatagram;
        let (wire, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let tap = Tap::of_queues(vec![File::from(OwnedFd::from(tap))], 1500);
        for _ in 0..3 {
            wire.send(&[1; 100]).unwrap();
        }
        tap.discard_waiting();
        wire.send(&[2; 10]).unwrap();
        let mut packet = [0; 200];
        let read = rustix::io::read(tap.queue(0).unwrap(), &mut packet);
        assert_eq!((read, packet[0]), (Ok(10), 2));
    }

    #[test]
    fn names_that_no_interface_has() {
        for name in [
            "",
            "a/b",
            "tap%d",
            "a b",
            "0123456789abcdef",
            "..",
            "é",
            "a\0",
        ] {
            let error = Tap::open(name, 1).unwrap_err();
            assert!(matches!(error, TapError::Name(_)), "{name}: {error}");
        }
    }

    #[test]
    fn what_is_not_a_tap_is_refused_by_name() {
        let error = Tap::open("lo", 1).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("tap lo: "), "{text}");
        assert!(!text.contains('\n'));
    }

    #[test]
    fn refusals_say_what_would_work() {
        let explain = |queues, errno| {
            explain_attach("tap7", queues, io::Error::from_raw_os_error(errno)).to_string()
        };
        let denied = explain(2, libc::EPERM);
        assert!(denied.contains("ip tuntap add dev tap7 mode tap user $USER multi_queue"));
        assert!(explain(1, libc::EBUSY).contains("in use by another process"));
        assert!(explain(4, libc::EINVAL).contains("use one queue"));
        assert!(explain(1, libc::EINVAL).contains("not a tap"));
    }
}
