//! Interrupts of a virtio-ccw device: bits that the driver looks at, and what
//! makes it look (virtio 1.2, section 4.3.3).

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory,
};

use crate::GuestMem;
use crate::css::{ChannelInterrupts, Subchannel};
use crate::irq::{AdapterIndicator, AdapterVectors};
use crate::virtio::VirtioInterrupt;

/// Where the driver looks for interrupts of queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Indicators {
    /// Nowhere yet.
    None,
    /// At a doubleword, whose bit 63 - n stands for queue n; interrupts are the
    /// subchannel's.
    Classic(u64),
    /// At bits of the adapter's; interrupts are adapter interruptions.
    Adapter(AdapterIndicator),
}

struct State {
    queues: Indicators,
    /// The doubleword for configuration changes; 0 when there is none.
    config: u64,
    /// Whether the vectors deliver what `queues` says.
    bound: bool,
}

pub(super) struct CcwInterrupt {
    mem: GuestMem,
    subchannel: Weak<Subchannel>,
    interrupts: Arc<dyn ChannelInterrupts>,
    vectors: Option<Arc<dyn AdapterVectors>>,
    state: Mutex<State>,
}

impl CcwInterrupt {
    pub(super) fn new(
        mem: GuestMem,
        subchannel: &Arc<Subchannel>,
        vectors: Option<Arc<dyn AdapterVectors>>,
    ) -> Self {
        Self {
            mem,
            // The subchannel holds the device, not the other way round.
            subchannel: Arc::downgrade(subchannel),
            interrupts: subchannel.interrupts(),
            vectors,
            state: Mutex::new(State {
                queues: Indicators::None,
                config: 0,
                bound: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Back to no indicators at all.
    pub(super) fn reset(&self) {
        self.set(Indicators::None);
        self.lock().config = 0;
    }

    /// Takes other indicators for the queues from here on, unbound.
    pub(super) fn set(&self, indicators: Indicators) {
        let mut state = self.lock();
        if std::mem::take(&mut state.bound) {
            self.unbind();
        }
        state.queues = indicators;
    }

    pub(super) fn set_config(&self, address: u64) {
        self.lock().config = address;
    }

    fn unbind(&self) {
        let Some(vectors) = &self.vectors else { return };
        for vector in 0..=u16::MAX {
            // There are as many as queues: the first that is refused is beyond.
            if vectors.route(vector, None).is_err() {
                break;
            }
        }
    }

    /// Has the vectors deliver the adapter interruptions of `queues` queues.
    /// When they cannot, the device's threads do it.
    pub(super) fn bind(&self, queues: u16) {
        let mut state = self.lock();
        let (Indicators::Adapter(first), Some(vectors)) = (state.queues, &self.vectors) else {
            return;
        };
        let bound = (0..queues).try_for_each(|queue| {
            let indicator = AdapterIndicator {
                bit: first.bit.wrapping_add(queue.into()),
                ..first
            };
            vectors.route(queue, Some(indicator))
        });
        match bound {
            Ok(()) => state.bound = true,
            Err(error) => {
                log::debug!("adapter interruptions have no routes: {error}");
                self.unbind();
            }
        }
    }

    fn adapter(&self, first: AdapterIndicator, queue: u16) -> io::Result<()> {
        let mem = self.mem.memory();
        let bit = first.bit.wrapping_add(queue.into());
        let byte = first.address.wrapping_add(bit / 8);
        set_bits(&mem, byte, 0x80 >> (bit % 8))?;
        // While the summary is set, the driver has yet to look.
        match set_bits(&mem, first.summary, 0x01)? & 0x01 {
            0 => self.interrupts.adapter(first.subclass),
            _ => Ok(()),
        }
    }

    /// Sets bit `number`, counted from the right, of the doubleword at
    /// `address`, and calls for attention.
    fn classic(&self, address: u64, number: u16) -> io::Result<()> {
        let byte = address.wrapping_add(7u64.saturating_sub(u64::from(number) / 8));
        set_bits(&self.mem.memory(), byte, 1 << (number % 8))?;
        if let Some(subchannel) = self.subchannel.upgrade() {
            subchannel.alert();
        }
        Ok(())
    }
}

impl VirtioInterrupt for CcwInterrupt {
    fn queue(&self, index: u16) -> io::Result<()> {
        let state = self.lock();
        match state.queues {
            Indicators::None => Ok(()),
            Indicators::Classic(address) => {
                drop(state);
                self.classic(address, index)
            }
            Indicators::Adapter(_) if state.bound => match &self.vectors {
                Some(vectors) => vectors.raise(index),
                None => Ok(()),
            },
            Indicators::Adapter(first) => self.adapter(first, index),
        }
    }

    fn config(&self) -> io::Result<()> {
        let config = self.lock().config;
        match config {
            0 => Ok(()),
            address => self.classic(address, 0),
        }
    }
}

/// Sets bits of the byte at `address`, at once with respect to the guest's own
/// accesses, and returns what it was.
fn set_bits(mem: &GuestMemoryMmap, address: u64, bits: u8) -> io::Result<u8> {
    let slice = mem
        .get_slice(GuestAddress(address), 1)
        .map_err(io::Error::other)?;
    let byte = slice
        .get_atomic_ref::<AtomicU8>(0)
        .map_err(io::Error::other)?;
    Ok(byte.fetch_or(bits, Ordering::SeqCst))
}
