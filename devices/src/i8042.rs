//! The i8042's reset line, without a keyboard behind it.

use crate::Callback;
use crate::bus::BusDevice;

/// Ports that the device answers to, from 0x60.
pub const PORTS: u64 = 5;

/// System control port B (0x61), which PCs decode next to the controller.
const PORT_B: u64 = 1;
/// Status register when read, command register when written (0x64).
const COMMAND: u64 = 4;

/// Timer 2 output, which some calibration loops wait for.
const PORT_B_TIMER2_OUT: u8 = 1 << 5;
/// Output buffer full.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Pulse output line 0, which is wired to the CPU's reset.
const PULSE_RESET: u8 = 0xfe;

/// Ports 0x60 to 0x64 of a PC without a keyboard: command 0xfe resets the
/// machine, which is one of the ways that operating systems try.
///
/// The status register always says that the output buffer is full and the
/// input buffer empty. A driver that probes for a controller first empties the
/// output buffer, and so finds within a few reads that there is none; one that
/// wants a reset waits for the input buffer only, and goes on at once.
pub struct I8042 {
    reset: Callback,
}

impl I8042 {
    /// A controller that calls `reset` on the vCPU thread that asks for it.
    pub fn new(reset: Callback) -> Self {
        Self { reset }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = match offset {
                PORT_B => PORT_B_TIMER2_OUT,
                COMMAND => STATUS_OUTPUT_FULL,
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data.first() == Some(&PULSE_RESET) {
            (self.reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn only_the_pulse_command_resets() {
        let resets = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&resets);
        let device = I8042::new(Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        device.write(4, &[0xaa]);
        device.write(0, &[0xfe]);
        device.write(4, &[]);
        assert_eq!(resets.load(Ordering::SeqCst), 0);
        device.write(4, &[0xfe]);
        assert_eq!(resets.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn probing_sees_a_buffer_that_never_empties_and_reset_does_not_wait() {
        let device = I8042::new(Arc::new(|| ()));
        for _ in 0..32 {
            let mut status = [0];
            device.read(4, &mut status);
            assert_eq!(status[0] & 1, 1, "output buffer full");
            assert_eq!(status[0] & 2, 0, "input buffer empty");
            device.read(0, &mut [0]);
        }
        device.read(0, &mut []);
    }
}
