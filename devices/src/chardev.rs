//! The two ends of a console: what the user types, and what the guest prints.

use vmm_sys_util::eventfd::EventFd;

/// The device's end of a terminal: where bytes typed by the user go in.
///
/// Output goes the other way through a plain [`std::io::Write`], given to the
/// device when it is made.
pub trait ConsoleInput: Send + Sync {
    /// Takes as many of `bytes` as the device has room for and returns how many.
    fn push(&self, bytes: &[u8]) -> usize;

    /// Signalled when there is room again after [`push`](Self::push) took less
    /// than it was given.
    fn room(&self) -> &EventFd;
}
