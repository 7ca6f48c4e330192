//! Taps of the host, made by the test.

// One ioctl names the interface.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, ioctl, opcode};

/// `struct ifreq` of linux/if.h: a name and, of its union, the flags; 40 bytes
/// where pointers have 64 bits.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// linux/if_tun.h.
const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
/// See [`TUNSETIFF`].
const TUNSETPERSIST: Opcode = opcode::write::<i32>(b'T', 203);
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// An ioctl whose argument is the number itself.
struct Number(Opcode, usize);

// SAFETY: the argument is no pointer, and nothing is returned in memory.
unsafe impl Ioctl for Number {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        self.0
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::without_provenance_mut(self.1)
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// Makes a tap that stays when nobody has it open, with room for several
/// queues if wanted.
pub fn make(name: &str, several_queues: bool) -> io::Result<()> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = Request {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    if several_queues {
        request.flags |= IFF_MULTI_QUEUE;
    }
    for (to, from) in request.name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `Request` is
    // as large as.
    unsafe { ioctl(&tun, Setter::<TUNSETIFF, Request>::new(request)) }?;
    // SAFETY: TUNSETPERSIST takes a number.
    unsafe { ioctl(&tun, Number(TUNSETPERSIST, 1)) }?;
    Ok(())
}
