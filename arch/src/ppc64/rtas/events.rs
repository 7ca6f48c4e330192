//! Events that the machine tells its guest of: environmental and power warnings
//! (Linux on Power Architecture Reference, section 10.3.2, "EPOW", and the
//! platform event log, section 10.3.3).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossvisor_devices::irq::IrqLine;

/// check-exception's mask: environmental and power warnings.
const MASK_EPOW: u32 = 0x4000_0000;

/// The sensor of environmental and power warnings, of which there is one.
const SENSOR_EPOW: u32 = 9;
/// Its state, and the log's action: the system shuts down.
const SYSTEM_SHUTDOWN: u8 = 3;
/// Why: an operator asked for it.
const SHUTDOWN_NORMAL: u8 = 1;

/// The power button, as a pending event.
pub struct Events {
    irq: Arc<dyn IrqLine>,
    shutdown: AtomicBool,
}

impl Events {
    /// No event yet; one interrupts through `irq`, an edge-triggered source.
    pub fn new(irq: Arc<dyn IrqLine>) -> Self {
        Self {
            irq,
            shutdown: AtomicBool::new(false),
        }
    }

    /// Asks the guest to shut down.
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.shutdown.store(true, Ordering::Release);
        self.interrupt()
    }

    /// Interrupts again for an event that nobody has taken yet. A source of a XIVE
    /// drops what comes before the guest lets it through, which no exit tells of;
    /// so the guest's other sources are the occasion, which Linux sets up later.
    ///
    /// # Errors
    /// The interrupt could not be delivered.
    pub fn remind(&self) -> io::Result<()> {
        match self.shutdown.load(Ordering::Acquire) {
            true => self.interrupt(),
            false => Ok(()),
        }
    }

    fn interrupt(&self) -> io::Result<()> {
        self.irq.set(true)?;
        self.irq.set(false)
    }

    /// The state of sensor `sensor`; none where there is no such sensor.
    pub fn sensor(&self, sensor: u32, index: u32) -> Option<u32> {
        (sensor == SENSOR_EPOW && index == 0).then(|| match self.shutdown.load(Ordering::Acquire) {
            true => SYSTEM_SHUTDOWN.into(),
            false => 0,
        })
    }

    /// Takes the log of a pending event of the kinds in `mask`.
    pub fn take(&self, mask: u32) -> Option<Vec<u8>> {
        let pending = mask & MASK_EPOW != 0 && self.shutdown.swap(false, Ordering::AcqRel);
        pending.then(shutdown_log)
    }
}

/// An error log of version 6 with a section of type "EP".
fn shutdown_log() -> Vec<u8> {
    // The extended part: its head, which tells the format and who made it.
    let mut extended = vec![0; 16];
    // Valid, and an event log of the platform's format.
    extended[0] = 0x80;
    extended[2] = 0x80 | 0x0e;
    extended[12..].copy_from_slice(b"IBM\0");
    // A section: type, length, version, subtype, and who created it.
    let mut section = Vec::from(*b"EP");
    let body = [
        SYSTEM_SHUTDOWN,
        SHUTDOWN_NORMAL,
        // The whole system; reserved; and no reason codes.
        0,
        0,
    ];
    let len = 8 + body.len() as u16 + 8;
    section.extend(len.to_be_bytes());
    section.extend([2, 0, 0, 0]);
    section.extend(body);
    section.extend([0; 8]);
    extended.extend(section);
    // The fixed part: version 6; an event, which is recovered from in full, with
    // an extended part; nobody's and nothing's; of type EPOW.
    let mut log = vec![6, 1 << 5 | 1 << 2, 0, 64];
    log.extend((extended.len() as u32).to_be_bytes());
    log.extend(extended);
    log
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Wire(Mutex<Vec<bool>>);

    impl IrqLine for Wire {
        fn set(&self, asserted: bool) -> io::Result<()> {
            self.0.lock().unwrap().push(asserted);
            Ok(())
        }
    }

    #[test]
    fn the_button_is_one_event_that_is_taken_once() {
        let wire = Arc::new(Wire::default());
        let events = Events::new(wire.clone());
        assert_eq!(events.sensor(9, 0), Some(0));
        assert_eq!(events.take(u32::MAX), None);
        events.press_power_button().unwrap();
        assert_eq!(*wire.0.lock().unwrap(), [true, false]);
        events.remind().unwrap();
        assert_eq!(*wire.0.lock().unwrap(), [true, false, true, false]);
        assert_eq!(events.sensor(9, 0), Some(3));
        assert_eq!((events.sensor(9, 1), events.sensor(8, 0)), (None, None));
        assert_eq!(events.take(0x8000_0000), None, "of another kind");
        assert!(events.take(0x4000_0000).is_some());
        assert_eq!(events.take(0x4000_0000), None);
        events.remind().unwrap();
        assert_eq!(wire.0.lock().unwrap().len(), 4, "nothing is pending");
        assert_eq!(events.sensor(9, 0), Some(0));
    }

    /// Reads the log as Linux does (arch/powerpc/kernel/rtas.c,
    /// get_pseries_errorlog).
    #[test]
    fn the_log_is_found_by_its_reader() {
        let log = shutdown_log();
        assert_ne!(log[1] >> 2 & 1, 0, "it has an extended part");
        let len = u32::from_be_bytes(log[4..8].try_into().unwrap()) as usize;
        let extended = &log[8..];
        assert_eq!(extended.len(), len);
        assert_eq!(extended[2] & 0xf, 0xe);
        assert_eq!(extended[12..16], *b"IBM\0");
        let section = &extended[16..];
        assert_eq!(section[..2], *b"EP");
        let size = u16::from_be_bytes(section[2..4].try_into().unwrap());
        assert_eq!(usize::from(size), section.len());
        assert_eq!((section[8] & 0xf, section[9] & 0xf), (3, 1));
    }
}
