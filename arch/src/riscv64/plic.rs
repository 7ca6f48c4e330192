//! A Platform-Level Interrupt Controller in user space (RISC-V Platform-Level
//! Interrupt Controller Specification 1.0.0), for hosts whose KVM has none to
//! offer.
//!
//! Each vCPU has one context, its supervisor's; the controller drives the
//! vCPU's external interrupt pin by KVM_INTERRUPT.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossvisor_devices::bus::BusDevice;
use crossvisor_devices::irq::IrqLine;
use crossvisor_vmm::wiring::LineSource;

/// The most contexts that the register map has room for.
pub const MAX_CONTEXTS: u64 = 15872;

// The register map (chapter 3); all registers are 32 bits wide.
const PRIORITY_END: u64 = 0x1000;
const PENDING: u64 = 0x1000;
const PENDING_END: u64 = 0x1080;
const ENABLE: u64 = 0x2000;
const ENABLE_STEP: u64 = 0x80;
const CONTEXT: u64 = 0x20_0000;
const CONTEXT_STEP: u64 = 0x1000;
const THRESHOLD: u64 = 0;
const CLAIM: u64 = 4;

/// Priorities are 0 (never) to 7, as on SiFive's.
const MAX_PRIORITY: u32 = 7;

/// Size of the registers of a PLIC with `contexts` contexts, in bytes.
pub const fn size(contexts: u64) -> u64 {
    CONTEXT + contexts * CONTEXT_STEP
}

/// Drives the external interrupt pin of a vCPU.
pub type Pin = Box<dyn Fn(u32, bool) -> io::Result<()> + Send + Sync>;

/// A PLIC.
pub struct Plic {
    state: Mutex<State>,
    pin: Pin,
}

struct State {
    /// By source number; source 0 does not exist.
    sources: Vec<Source>,
    /// By vCPU.
    contexts: Vec<Context>,
}

/// A source and its gateway (chapter 2).
#[derive(Clone, Default)]
struct Source {
    priority: u32,
    /// The level-triggered wire is asserted.
    asserted: bool,
    /// An edge came while the last one was being served.
    latched: bool,
    /// The gateway has passed a request on that no context has claimed.
    pending: bool,
    /// A context has claimed the request and not completed it.
    claimed: bool,
}

impl Source {
    /// Passes a request on when there is one and the last one is done with.
    fn update(&mut self) {
        if !self.claimed && (self.asserted || self.latched) {
            self.latched = false;
            self.pending = true;
        }
    }
}

#[derive(Clone)]
struct Context {
    /// A bit for each source, 32 to a word.
    enabled: Vec<u32>,
    threshold: u32,
    /// What the vCPU's pin was last driven to.
    pin: bool,
}

impl Context {
    fn enables(&self, source: usize) -> bool {
        let word = self.enabled.get(source / 32).copied().unwrap_or(0);
        word >> (source % 32) & 1 != 0
    }
}

impl State {
    /// The source with the highest priority, and of those the lowest number,
    /// that is pending for `context` and has a priority above `floor`.
    fn best(&self, context: &Context, floor: u32) -> Option<usize> {
        let candidates = self.sources.iter().enumerate().filter(|(number, source)| {
            source.pending && source.priority > floor && context.enables(*number)
        });
        candidates
            .max_by_key(|(number, source)| (source.priority, std::cmp::Reverse(*number)))
            .map(|(number, _)| number)
    }
}

impl Plic {
    /// A PLIC for `vcpus` vCPUs with sources 1 to `sources`; `pin` drives a
    /// vCPU's pin.
    pub fn new(vcpus: u32, sources: u32, pin: Pin) -> Arc<Self> {
        let count = sources as usize + 1;
        let context = Context {
            enabled: vec![0; count.div_ceil(32)],
            threshold: 0,
            pin: false,
        };
        Arc::new(Self {
            state: Mutex::new(State {
                sources: vec![Source::default(); count],
                contexts: vec![context; vcpus as usize],
            }),
            pin,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drives the pins whose contexts have something to serve, or no longer.
    fn update_pins(&self, state: &mut State) {
        for number in 0..state.contexts.len() {
            let Some(context) = state.contexts.get(number) else {
                continue;
            };
            let wanted = state.best(context, context.threshold).is_some();
            if wanted == context.pin {
                continue;
            }
            match (self.pin)(number as u32, wanted) {
                Ok(()) => {
                    if let Some(context) = state.contexts.get_mut(number) {
                        context.pin = wanted;
                    }
                }
                Err(error) => log::warn!("plic: cannot interrupt vCPU {number}: {error}"),
            }
        }
    }

    /// Changes a source, and what follows from it.
    fn change(&self, number: u32, change: impl FnOnce(&mut Source)) {
        let mut state = self.lock();
        // Source 0 does not exist.
        if number == 0 {
            return;
        }
        if let Some(source) = state.sources.get_mut(number as usize) {
            change(source);
            source.update();
            self.update_pins(&mut state);
        }
    }

    fn claim(&self, state: &mut State, context: usize) -> u32 {
        // The threshold masks the pin, not the claim (chapter 7).
        let best = state
            .contexts
            .get(context)
            .and_then(|context| state.best(context, 0));
        let Some(number) = best else {
            return 0;
        };
        if let Some(source) = state.sources.get_mut(number) {
            source.pending = false;
            source.claimed = true;
        }
        number as u32
    }

    fn complete(&self, state: &mut State, context: usize, number: u32) {
        // Of a source that the context does not enable, it is ignored (chapter
        // 8).
        let enabled = state
            .contexts
            .get(context)
            .is_some_and(|context| context.enables(number as usize));
        if let Some(source) = state.sources.get_mut(number as usize)
            && enabled
            && source.claimed
        {
            source.claimed = false;
            source.update();
        }
    }

    fn read_register(&self, state: &mut State, offset: u64) -> u32 {
        match Register::at(offset) {
            Register::Priority(number) => state
                .sources
                .get(number)
                .map_or(0, |source| source.priority),
            Register::Pending(word) => (0..32)
                .filter(|bit| {
                    let source = state.sources.get(word * 32 + bit);
                    source.is_some_and(|source| source.pending)
                })
                .fold(0, |bits, bit| bits | 1 << bit),
            Register::Enable(context, word) => {
                let context = state.contexts.get(context);
                context
                    .and_then(|context| context.enabled.get(word))
                    .copied()
                    .unwrap_or(0)
            }
            Register::Threshold(context) => {
                let context = state.contexts.get(context);
                context.map_or(0, |context| context.threshold)
            }
            Register::Claim(context) => {
                let number = self.claim(state, context);
                self.update_pins(state);
                number
            }
            Register::None => 0,
        }
    }

    fn write_register(&self, state: &mut State, offset: u64, value: u32) {
        match Register::at(offset) {
            Register::Priority(number) => {
                if let Some(source) = state.sources.get_mut(number).filter(|_| number != 0) {
                    source.priority = value & MAX_PRIORITY;
                }
            }
            Register::Enable(context, word) => {
                let context = state.contexts.get_mut(context);
                if let Some(bits) = context.and_then(|context| context.enabled.get_mut(word)) {
                    let none = u32::from(word == 0);
                    *bits = value & !none;
                }
            }
            Register::Threshold(context) => {
                if let Some(context) = state.contexts.get_mut(context) {
                    context.threshold = value & MAX_PRIORITY;
                }
            }
            Register::Claim(context) => self.complete(state, context, value),
            Register::Pending(_) | Register::None => return,
        }
        self.update_pins(state);
    }
}

/// What a register is, by its offset.
enum Register {
    Priority(usize),
    Pending(usize),
    /// Context, word.
    Enable(usize, usize),
    Threshold(usize),
    Claim(usize),
    None,
}

impl Register {
    fn at(offset: u64) -> Self {
        if !offset.is_multiple_of(4) || offset >= size(MAX_CONTEXTS) {
            return Register::None;
        }
        match offset {
            0..PRIORITY_END => Register::Priority((offset / 4) as usize),
            PENDING..PENDING_END => Register::Pending(((offset - PENDING) / 4) as usize),
            ENABLE..CONTEXT => {
                let within = offset - ENABLE;
                let context = (within / ENABLE_STEP) as usize;
                Register::Enable(context, ((within % ENABLE_STEP) / 4) as usize)
            }
            CONTEXT.. => {
                let within = offset - CONTEXT;
                let context = (within / CONTEXT_STEP) as usize;
                match within % CONTEXT_STEP {
                    THRESHOLD => Register::Threshold(context),
                    CLAIM => Register::Claim(context),
                    _ => Register::None,
                }
            }
            _ => Register::None,
        }
    }
}

impl BusDevice for Plic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // The registers take accesses of their own size only.
        if data.len() == 4 {
            let value = self.read_register(&mut self.lock(), offset);
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(value) = data.try_into() {
            self.write_register(&mut self.lock(), offset, u32::from_le_bytes(value));
        }
    }
}

/// A wire into the PLIC.
struct Wire {
    plic: Arc<Plic>,
    source: u32,
    edge: bool,
}

impl IrqLine for Wire {
    fn set(&self, asserted: bool) -> io::Result<()> {
        match (self.edge, asserted) {
            (false, _) => self.plic.change(self.source, |source| {
                source.asserted = asserted;
            }),
            (true, true) => self.plic.change(self.source, |source| {
                source.latched = true;
            }),
            (true, false) => {}
        }
        Ok(())
    }
}

/// The wires of a PLIC.
pub struct Wires(pub Arc<Plic>);

impl Wires {
    fn wire(&self, source: u32, edge: bool) -> Arc<dyn IrqLine> {
        Arc::new(Wire {
            plic: self.0.clone(),
            source,
            edge,
        })
    }
}

impl LineSource for Wires {
    fn level_line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        self.wire(gsi, false)
    }

    fn edge_line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        self.wire(gsi, true)
    }
}

#[cfg(test)]
#[path = "plic_tests.rs"]
mod tests;
