//! Interrupts of virtio over PCI: MSI-X where the guest has enabled it, the
//! INTx wire and its status bits where not (virtio 1.2, sections 4.1.4.5 and
//! 4.1.5.1.2).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::super::VirtioInterrupt;
use super::super::interrupt::{ISR_CONFIG, ISR_QUEUE, StatusLine};
use crate::irq::{IrqLine, MsiVectors};
use crate::pci::msix::Msix;

/// "No vector": this event raises no interrupt.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Which vector each event of the device raises, and the wire for want of any.
pub(super) struct PciInterrupt {
    msix: Option<Msix>,
    intx: StatusLine,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl PciInterrupt {
    pub(super) fn new(
        queues: usize,
        vectors: Option<Arc<dyn MsiVectors>>,
        intx: Arc<dyn IrqLine>,
    ) -> Self {
        Self {
            msix: vectors.filter(|v| v.count() > 0).map(Msix::new),
            intx: StatusLine::new(intx),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    pub(super) fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref()
    }

    pub(super) fn intx(&self) -> &StatusLine {
        &self.intx
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// Binds configuration changes to a vector; one that there is not becomes
    /// [`NO_VECTOR`], by which the driver sees the refusal.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.known(vector), Ordering::Relaxed);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |v| v.load(Ordering::Relaxed))
    }

    /// Binds a queue's used buffers to a vector, likewise.
    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.known(vector), Ordering::Relaxed);
        }
    }

    /// What a reset of the virtio device resets: the vectors' binding and the
    /// status. MSI-X itself belongs to the PCI function.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.intx.acknowledge(u8::MAX);
    }

    fn known(&self, vector: u16) -> u16 {
        match &self.msix {
            Some(msix) if vector < msix.count() => vector,
            _ => NO_VECTOR,
        }
    }

    fn enabled_msix(&self) -> Option<&Msix> {
        self.msix.as_ref().filter(|msix| msix.enabled())
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn queue(&self, index: u16) -> io::Result<()> {
        let Some(msix) = self.enabled_msix() else {
            return self.intx.raise(ISR_QUEUE);
        };
        match self.queue_vector(index) {
            NO_VECTOR => Ok(()),
            vector => msix.raise(vector),
        }
    }

    fn config(&self) -> io::Result<()> {
        let Some(msix) = self.enabled_msix() else {
            return self.intx.raise(ISR_CONFIG);
        };
        // With MSI-X too, the status tells that the configuration has changed.
        self.intx.mark(ISR_CONFIG);
        match self.config_vector() {
            NO_VECTOR => Ok(()),
            vector => msix.raise(vector),
        }
    }
}
