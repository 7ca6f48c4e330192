//! `--exec`: the guest's end of the command's streams, and its status.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

// The console ports that carry a command's streams and its status.
pub use crossvisor_boot::initramfs::{
    IO_PORT as STDOUT, STATUS_PORT as STATUS, STDERR_PORT as STDERR, STDIN_PORT as STDIN,
};

/// Exit status when the guest ended without a status of its command.
pub const NO_STATUS: u8 = 125;

/// Collects what arrives at the status port.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<Vec<u8>>>);

impl Status {
    /// The command's exit status, once it has arrived.
    pub fn get(&self) -> Option<u8> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::str::from_utf8(&bytes).ok()?.trim().parse().ok()
    }
}

impl Write for Status {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut status = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A status has three digits; whatever a guest sends beyond is not one.
        let room = 16usize.saturating_sub(status.len()).min(bytes.len());
        status.extend_from_slice(bytes.get(..room).unwrap_or_default());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_number() {
        let mut status = Status::default();
        assert_eq!(status.get(), None);
        status.write_all(b"4").unwrap();
        status.write_all(b"2\n").unwrap();
        assert_eq!(status.get(), Some(42));
        status.write_all(&[b'9'; 100]).unwrap();
        assert_eq!(status.get(), None);
    }
}
