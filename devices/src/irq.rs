//! Interrupts as a device raises them: a wire, or a set of message vectors.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A wire from a device into an interrupt controller.
///
/// What the wire is underneath (an irqfd, a KVM_IRQ_LINE call, a controller
/// modelled in user space) and whether it is edge- or level-triggered is the
/// plan's business. On an edge-triggered wire each `set(true)` is one
/// interrupt and `set(false)` does nothing.
pub trait IrqLine: Send + Sync {
    /// Drives the wire to `asserted`.
    ///
    /// # Errors
    /// The interrupt could not be delivered to the controller.
    fn set(&self, asserted: bool) -> io::Result<()>;
}

/// A message-signalled interrupt, as the guest programmed it (PCI Local Bus
/// Specification 3.0, section 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address that the device writes to.
    pub address: u64,
    /// Data that it writes.
    pub data: u32,
    /// The requester ID (bus, device, function) of the device that writes, by
    /// which a GICv3 ITS or an IOMMU tells devices apart.
    pub device_id: u32,
}

/// The message vectors of one device.
pub trait MsiVectors: Send + Sync {
    /// Number of vectors.
    fn count(&self) -> u16;

    /// Binds `vector` to a message, or unbinds it (masked or disabled).
    ///
    /// # Errors
    /// No such vector, or the route could not be installed.
    fn route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()>;

    /// Raises `vector`. While it is unbound, nothing happens: the transport
    /// keeps the pending bit.
    ///
    /// # Errors
    /// No such vector, or the interrupt could not be delivered.
    fn raise(&self, vector: u16) -> io::Result<()>;
}

/// Where a device marks its interrupts before it raises an adapter interruption
/// (virtio 1.2, section 4.3.3.2.2): bits in guest memory, counted from the
/// leftmost bit of a byte on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterIndicator {
    /// Guest-physical address from which the device's bits count.
    pub address: u64,
    /// The bit, from there.
    pub bit: u64,
    /// Guest-physical address of the byte whose last bit says that some bit is
    /// set.
    pub summary: u64,
    /// Interruption subclass, 0 to 7.
    pub subclass: u8,
}

/// The adapter interruptions of one device, delivered without the help of a
/// thread that looks at the indicators.
pub trait AdapterVectors: Send + Sync {
    /// Binds `vector` to an indicator, or unbinds it.
    ///
    /// # Errors
    /// No such vector, or the route could not be installed.
    fn route(&self, vector: u16, indicator: Option<AdapterIndicator>) -> io::Result<()>;

    /// Sets the bits of `vector` and interrupts. While it is unbound, nothing
    /// happens.
    ///
    /// # Errors
    /// No such vector, or the interrupt could not be delivered.
    fn raise(&self, vector: u16) -> io::Result<()>;
}

/// A wire that several devices share, such as a PCI host bridge's INTx wires:
/// asserted for as long as any of them asserts it.
pub struct SharedLine {
    line: Arc<dyn IrqLine>,
    /// How many inputs are asserted. The lock also covers the wire, so that the
    /// last one to go does not lower it after another has raised it.
    asserted: Mutex<usize>,
}

impl SharedLine {
    /// Shares `line`, which nothing else may drive from then on.
    pub fn new(line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self {
            line,
            asserted: Mutex::new(0),
        })
    }

    /// An input for one device; it is deasserted when it is dropped.
    pub fn input(self: &Arc<Self>) -> Arc<dyn IrqLine> {
        Arc::new(SharedInput {
            shared: Arc::clone(self),
            asserted: AtomicBool::new(false),
        })
    }
}

struct SharedInput {
    shared: Arc<SharedLine>,
    /// Written under the shared line's lock.
    asserted: AtomicBool,
}

impl IrqLine for SharedInput {
    fn set(&self, asserted: bool) -> io::Result<()> {
        let shared = &self.shared;
        let mut count = shared
            .asserted
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = self.asserted.swap(asserted, Ordering::Relaxed);
        match (before, asserted) {
            (false, true) => *count += 1,
            (true, false) => *count -= 1,
            (false, false) => return Ok(()),
            // Asserted again: an edge of its own on an edge-triggered wire.
            (true, true) => {}
        }
        if asserted || *count == 0 {
            shared.line.set(asserted)
        } else {
            Ok(())
        }
    }
}

impl Drop for SharedInput {
    fn drop(&mut self) {
        // Nobody is left who could be told of a failure.
        let _ = self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<bool>>);

    impl IrqLine for Recorder {
        fn set(&self, asserted: bool) -> io::Result<()> {
            self.0.lock().unwrap().push(asserted);
            Ok(())
        }
    }

    #[test]
    fn shared_line_stays_up_until_the_last_input_goes() {
        let recorder = Arc::new(Recorder::default());
        let shared = SharedLine::new(Arc::clone(&recorder) as Arc<dyn IrqLine>);
        let (a, b) = (shared.input(), shared.input());
        a.set(false).unwrap();
        a.set(true).unwrap();
        b.set(true).unwrap();
        a.set(true).unwrap();
        a.set(false).unwrap();
        a.set(false).unwrap();
        assert_eq!(*recorder.0.lock().unwrap(), [true, true, true]);
        b.set(false).unwrap();
        assert_eq!(*recorder.0.lock().unwrap(), [true, true, true, false]);
    }

    #[test]
    fn dropped_input_is_deasserted() {
        let recorder = Arc::new(Recorder::default());
        let shared = SharedLine::new(Arc::clone(&recorder) as Arc<dyn IrqLine>);
        let a = shared.input();
        a.set(true).unwrap();
        drop(a);
        assert_eq!(*recorder.0.lock().unwrap(), [true, false]);
    }
}
