//! What the guest prints on either console.

use std::sync::Arc;
use std::time::Duration;

use crossvisor_devices::output::Output;

use super::half;
use crate::s390x::ebcdic;

/// Bytes typed that wait for the guest.
pub(super) const INPUT_MAX: usize = 4096;

/// How long a vCPU waits for a terminal that takes nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// A message data block's type, and those of the objects in it.
const MESSAGE_BLOCK: u16 = 1;
const TEXT_OBJECT: u16 = 4;
/// Header of the block: length, type, tag, revision.
const BLOCK_HEADER: usize = 12;
/// Header of a text object: length, type, line type, control byte, reserved.
const TEXT_HEADER: usize = 10;
/// "MDB " in EBCDIC.
const TAG: [u8; 4] = [0xd4, 0xc4, 0xc2, 0x40];

/// The guest's output.
pub(super) struct Consoles {
    output: Arc<Output>,
}

impl Consoles {
    pub fn new(output: Arc<Output>) -> Self {
        Self { output }
    }

    /// Prints what a VT220 gets.
    pub fn print(&mut self, bytes: &[u8]) {
        self.output.push_all(bytes, PATIENCE);
    }

    /// Prints the lines of a message.
    pub fn print_message(&mut self, data: &[u8]) {
        let end = data.len().min(usize::from(half(data, 0)));
        let block = data.get(..end).unwrap_or_default();
        if half(block, 2) != MESSAGE_BLOCK || block.get(4..8) != Some(&TAG[..]) {
            return;
        }
        let mut at = BLOCK_HEADER;
        while at < block.len() {
            let length = usize::from(half(block, at));
            let Some(object) = block.get(at..at + length).filter(|_| length >= 4) else {
                return;
            };
            if half(object, 2) == TEXT_OBJECT
                && let Some(text) = object.get(TEXT_HEADER..)
            {
                let line = format!("{}\r\n", ebcdic::to_text(text));
                self.print(line.as_bytes());
            }
            at += length;
        }
    }
}
