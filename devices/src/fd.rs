//! Borrowing the descriptor of an event, which vmm-sys-util gives only as a
//! number.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// `event`'s descriptor, for as long as the event lives.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor and keeps it open while borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
