//! Pages of a controller in the kernel, mapped from its file descriptor.

// A mapping, and what is in it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::plan::Range;

/// A mapping of a controller's pages.
#[derive(Debug)]
pub struct Window {
    start: NonNull<u8>,
    /// Its guest-physical addresses.
    range: Range,
}

// SAFETY: the mapping belongs to no thread, and there are no references into it.
unsafe impl Send for Window {}
// SAFETY: as above; it is memory of a device, which any thread may access.
unsafe impl Sync for Window {}

impl Window {
    /// Maps the pages of `controller` from `offset` on for guest-physical
    /// `range`.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn map(controller: &impl AsRawFd, offset: u64, range: Range) -> io::Result<Self> {
        // SAFETY: the descriptor is open for as long as `controller` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(controller.as_raw_fd()) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let size = usize::try_from(range.size).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping where the kernel finds room.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                size,
                protection,
                MapFlags::SHARED,
                fd,
                offset,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, range })
    }

    /// Where guest-physical `part` is in this process; `None` when not all of it
    /// is in the window.
    pub fn host_address(&self, part: Range) -> Option<u64> {
        let offset = part.base.checked_sub(self.range.base)?;
        (offset.checked_add(part.size)? <= self.range.size)
            .then(|| self.start.as_ptr() as u64 + offset)
    }

    /// The doubleword at guest-physical `address`, which a device has there.
    fn doubleword(&self, address: u64) -> Option<*mut u64> {
        let host = self.host_address(Range::new(address, 8))?;
        (host % 8 == 0).then_some(host as *mut u64)
    }

    /// Loads the big-endian doubleword at guest-physical `address`; `None` when
    /// it is not in the window, or not aligned.
    pub fn load(&self, address: u64) -> Option<u64> {
        let place = self.doubleword(address)?;
        // SAFETY: in the mapping, and aligned; whatever is there is a value.
        Some(u64::from_be(unsafe { place.read_volatile() }))
    }

    /// Stores one; as [`load`](Self::load).
    pub fn store(&self, address: u64, value: u64) -> Option<()> {
        let place = self.doubleword(address)?;
        // SAFETY: in the mapping, and aligned; nothing refers to it.
        unsafe { place.write_volatile(value.to_be()) };
        Some(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: no thread of a vCPU is left by which a guest could reach the
        // slots that it was in, and nothing else refers to it. Unmapping what was
        // mapped does not fail.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.range.size as usize) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const BASE: u64 = 40 << 40;

    fn window() -> Window {
        let page = rustix::param::page_size() as u64;
        let file = memfd_create("window", MemfdFlags::empty()).unwrap();
        let mut file = File::from(file);
        let mut bytes = vec![0; 3 * page as usize];
        bytes[page as usize..][..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        File::write_all(&mut file, &bytes).unwrap();
        Window::map(&file, page, Range::new(BASE, 2 * page)).unwrap()
    }

    #[test]
    fn doublewords_are_big_endian_and_in_the_window() {
        let window = window();
        let size = window.range.size;
        assert_eq!(window.load(BASE), Some(0x0102_0304_0506_0708));
        assert_eq!(window.store(BASE + size - 8, 0x1122), Some(()));
        assert_eq!(window.load(BASE + size - 8), Some(0x1122));
        for outside in [
            0,
            BASE - 8,
            BASE + 4,
            BASE + size - 4,
            BASE + size,
            u64::MAX,
        ] {
            assert_eq!(window.load(outside), None, "{outside:#x}");
            assert_eq!(window.store(outside, 0), None, "{outside:#x}");
        }
    }

    #[test]
    fn parts_are_where_they_are_in_the_mapping() {
        let window = window();
        let size = window.range.size;
        let start = window.start.as_ptr() as u64;
        assert_eq!(window.host_address(Range::new(BASE, size)), Some(start));
        let half = Range::new(BASE + size / 2, size / 2);
        assert_eq!(window.host_address(half), Some(start + size / 2));
        assert_eq!(window.host_address(Range::new(BASE + 8, size)), None);
        assert_eq!(window.host_address(Range::new(BASE - 8, 8)), None);
    }
}
