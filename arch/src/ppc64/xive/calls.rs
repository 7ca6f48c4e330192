//! The hypercalls by which a guest sets up its XIVE (Linux on Power
//! Architecture Reference, section 14.5.4.9; Linux
//! arch/powerpc/sysdev/xive/spapr.c): where sources lead, where a vCPU's queues
//! are. KVM hands all of them on, and is told the outcome by attributes of its
//! device.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossvisor_devices::irq::IrqLine;
use crossvisor_vmm::hv;
use crossvisor_vmm::plan::Range;
use crossvisor_vmm::wiring::LineSource;

use super::{PRIORITIES, Xive};
use crate::ppc64::hcall::{Answer, H_HARDWARE, H_P2, H_P3, H_P4, H_P5, H_PARAMETER, H_SUCCESS};
use crate::ppc64::irqchip::QUEUE_SHIFT;
use crate::ppc64::sources::{self, Trigger};

// Function numbers.
const H_INT_GET_SOURCE_INFO: u64 = 0x3a8;
/// Where a source leads.
pub const H_INT_SET_SOURCE_CONFIG: u64 = 0x3ac;
const H_INT_GET_SOURCE_CONFIG: u64 = 0x3b0;
const H_INT_GET_QUEUE_INFO: u64 = 0x3b4;
const H_INT_SET_QUEUE_CONFIG: u64 = 0x3b8;
const H_INT_GET_QUEUE_CONFIG: u64 = 0x3bc;
const H_INT_ESB: u64 = 0x3c8;
const H_INT_SYNC: u64 = 0x3cc;
const H_INT_RESET: u64 = 0x3d0;

// What H_INT_GET_SOURCE_INFO tells of a source.
/// It goes by level.
const SOURCE_LEVEL: u64 = 1 << 2;
/// Its pages are reached by H_INT_ESB.
const SOURCE_BY_HYPERCALL: u64 = 1 << 3;

// Flags of H_INT_SET_SOURCE_CONFIG.
const SOURCE_MASK: u64 = 1 << 0;
const SOURCE_SET_EISN: u64 = 1 << 1;
/// The priority of a source that interrupts nobody.
const MASKED: u64 = 0xff;
/// The largest number that a queue entry has room for, beside its generation.
const EISN_MAX: u64 = (1 << 31) - 1;

/// Flag of H_INT_SET_QUEUE_CONFIG and of KVM's: notify for each event. KVM has
/// no other queues.
const QUEUE_NOTIFY: u64 = 1;

/// Flag of H_INT_ESB: a store.
const ESB_STORE: u64 = 1;

// Offsets of loads in the second page of a source's, after which it may
// trigger again.
const EVENT_EOI: u64 = 0x000;
const EVENT_EOI_END: u64 = 0x400;
const EVENT_SET_00: u64 = 0xc00;
const EVENT_SET_00_END: u64 = 0xd00;
/// All that such a page has.
const EVENT_END: u64 = 0x1000;

/// What there is no address of.
const NOWHERE: u64 = u64::MAX;

// Attributes of KVM's device (Documentation/virt/kvm/devices/xive.rst).
const GROUP_CONTROL: u32 = 1;
const GROUP_SOURCE_CONFIG: u32 = 3;
const GROUP_QUEUE_CONFIG: u32 = 4;
const GROUP_SOURCE_SYNC: u32 = 5;
const CONTROL_RESET: u64 = 1;
const TARGET_SHIFT: u32 = 3;
const MASK_SHIFT: u32 = 32;
const EISN_SHIFT: u32 = 33;

/// Where a source leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    cpu: u64,
    priority: u64,
    eisn: u64,
}

#[derive(Debug, Default)]
struct State {
    targets: BTreeMap<u32, Target>,
    /// Where events are queued, by vCPU and priority.
    queues: BTreeMap<(u64, u64), u64>,
}

/// Handles a machine's hypercalls about its XIVE.
pub struct XiveCalls {
    vm: Arc<dyn hv::Vm>,
    xive: Xive,
    memory: Vec<Range>,
    lines: Arc<Lines>,
    state: Mutex<State>,
}

/// A status, when it is not success; or the words in r4 and on.
type Outcome = Result<Vec<u64>, i64>;

impl XiveCalls {
    /// Handles the hypercalls of `vm`, which has `memory` and its level-triggered
    /// wires from `lines`.
    pub fn new(vm: Arc<dyn hv::Vm>, xive: Xive, memory: Vec<Range>, lines: Arc<Lines>) -> Self {
        Self {
            vm,
            xive,
            memory,
            lines,
            state: Mutex::default(),
        }
    }

    /// The answer to hypercall `number`; `None` when it is another's.
    pub fn call(&self, number: u64, args: &[u64; 9]) -> Option<Answer> {
        let [flags, a, b, c, d, ..] = *args;
        let outcome = match number {
            H_INT_GET_SOURCE_INFO => self.source_info(flags, a),
            H_INT_SET_SOURCE_CONFIG => self.set_source(flags, a, [b, c, d]),
            H_INT_GET_SOURCE_CONFIG => self.source_config(flags, a),
            H_INT_GET_QUEUE_INFO => self.queue_info(flags, a, b),
            H_INT_SET_QUEUE_CONFIG => self.set_queue(flags, (a, b), c, d),
            H_INT_GET_QUEUE_CONFIG => self.queue_config(flags, a, b),
            H_INT_ESB => self.event_state(flags, a, b, c),
            H_INT_SYNC => self.sync(flags, a),
            H_INT_RESET => self.reset(flags),
            _ => return None,
        };
        Some(match outcome {
            Ok(words) => (H_SUCCESS, words),
            Err(status) => (status, Vec::new()),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn source(&self, number: u64) -> Result<(u32, Trigger), i64> {
        self.xive.trigger(number).ok_or(H_P2)
    }

    /// Checks a vCPU and a priority, for the queue that they name.
    fn check_queue(&self, cpu: u64, priority: u64) -> Result<(), i64> {
        match () {
            () if cpu >= u64::from(self.xive.cpus()) => Err(H_P2),
            () if priority >= PRIORITIES => Err(H_P3),
            () => Ok(()),
        }
    }

    fn set(&self, group: u32, attribute: u64, value: &[u8]) -> Result<(), i64> {
        let set = self.vm.set_controller(group, attribute, value);
        set.map_err(|error| {
            log::warn!("the guest's XIVE, attribute {attribute:#x} of group {group}: {error}");
            H_HARDWARE
        })
    }

    fn source_info(&self, flags: u64, number: u64) -> Outcome {
        none_of(flags, u64::MAX)?;
        let (number, trigger) = self.source(number)?;
        let (flags, [first, second]) = match trigger {
            Trigger::Edge => (0, self.xive.event_pages(number)),
            Trigger::Level => (SOURCE_LEVEL | SOURCE_BY_HYPERCALL, [NOWHERE; 2]),
        };
        Ok(vec![flags, second, first, self.xive.page_shift().into()])
    }

    fn set_source(&self, flags: u64, number: u64, [cpu, priority, eisn]: [u64; 3]) -> Outcome {
        none_of(flags, !(SOURCE_MASK | SOURCE_SET_EISN))?;
        let (number, _) = self.source(number)?;
        let mut state = self.state();
        let old = state.targets.get(&number).map(|target| target.eisn);
        let eisn = match flags & SOURCE_SET_EISN {
            0 => old.unwrap_or(number.into()),
            _ => eisn,
        };
        // KVM does nothing where target and number are what it has, and does not look
        // at the mask before that (kvmppc_xive_native_update_source_config); it
        // looks at nothing else of a source that it masks.
        let masked = 1 << MASK_SHIFT | (old.unwrap_or(0) ^ 1) << EISN_SHIFT;
        if priority == MASKED {
            self.set(GROUP_SOURCE_CONFIG, number.into(), &word(masked))?;
            state.targets.remove(&number);
            return Ok(Vec::new());
        }
        match () {
            () if cpu >= u64::from(self.xive.cpus()) => return Err(H_P3),
            () if priority >= PRIORITIES => return Err(H_P4),
            () if eisn > EISN_MAX => return Err(H_P5),
            () => {}
        }
        let mask = flags & SOURCE_MASK;
        let value = match mask {
            0 => priority | cpu << TARGET_SHIFT | eisn << EISN_SHIFT,
            _ => masked,
        };
        self.set(GROUP_SOURCE_CONFIG, number.into(), &word(value))?;
        let target = Target {
            cpu,
            priority: if mask == 0 { priority } else { MASKED },
            eisn,
        };
        state.targets.insert(number, target);
        Ok(Vec::new())
    }

    fn source_config(&self, flags: u64, number: u64) -> Outcome {
        none_of(flags, u64::MAX)?;
        let (number, _) = self.source(number)?;
        let target = self.state().targets.get(&number).copied();
        let target = target.unwrap_or(Target {
            cpu: 0,
            priority: MASKED,
            eisn: number.into(),
        });
        Ok(vec![target.cpu, target.priority, target.eisn])
    }

    /// There is no page of notifications: queues always notify.
    fn queue_info(&self, flags: u64, cpu: u64, priority: u64) -> Outcome {
        none_of(flags, u64::MAX)?;
        self.check_queue(cpu, priority)?;
        Ok(vec![NOWHERE, 0])
    }

    fn set_queue(&self, flags: u64, key: (u64, u64), address: u64, shift: u64) -> Outcome {
        none_of(flags, !QUEUE_NOTIFY)?;
        let (cpu, priority) = key;
        self.check_queue(cpu, priority)?;
        let queue = match shift {
            0 => None,
            _ if shift != u64::from(QUEUE_SHIFT) => return Err(H_P5),
            _ if flags & QUEUE_NOTIFY == 0 => return Err(H_PARAMETER),
            _ if !self.holds_queue(address) => return Err(H_P4),
            _ => Some(address),
        };
        // struct kvm_ppc_xive_eq: flags, size, address, the generation and the
        // index that the queue begins with.
        let mut value = [0; 64];
        if let Some(address) = queue {
            let notify = (QUEUE_NOTIFY as u32).to_ne_bytes();
            value[..4].copy_from_slice(&notify);
            value[4..8].copy_from_slice(&QUEUE_SHIFT.to_ne_bytes());
            value[8..16].copy_from_slice(&address.to_ne_bytes());
            value[16..20].copy_from_slice(&1_u32.to_ne_bytes());
        }
        let mut state = self.state();
        let attribute = priority | cpu << TARGET_SHIFT;
        self.set(GROUP_QUEUE_CONFIG, attribute, &value)?;
        match queue {
            Some(address) => state.queues.insert(key, address),
            None => state.queues.remove(&key),
        };
        Ok(Vec::new())
    }

    /// Whether a queue at `address` is aligned and in RAM.
    fn holds_queue(&self, address: u64) -> bool {
        let size = 1 << QUEUE_SHIFT;
        let end = address.checked_add(size);
        address.is_multiple_of(size)
            && end.is_some_and(|end| {
                let mut ranges = self.memory.iter();
                ranges.any(|range| range.base <= address && end <= range.end())
            })
    }

    fn queue_config(&self, flags: u64, cpu: u64, priority: u64) -> Outcome {
        none_of(flags, u64::MAX)?;
        self.check_queue(cpu, priority)?;
        let queue = self.state().queues.get(&(cpu, priority)).copied();
        Ok(match queue {
            Some(address) => vec![QUEUE_NOTIFY, address, QUEUE_SHIFT.into(), 0],
            None => vec![0; 4],
        })
    }

    /// H_INT_ESB: an access to the second page of a source. A wire that is still
    /// asserted triggers again, for what KVM has behind the source does not know
    /// of levels.
    fn event_state(&self, flags: u64, number: u64, offset: u64, data: u64) -> Outcome {
        none_of(flags, !ESB_STORE)?;
        let (number, trigger) = self.source(number)?;
        if offset >= EVENT_END || !offset.is_multiple_of(8) {
            return Err(H_P3);
        }
        let failed = |error: io::Error| {
            log::warn!("the guest's XIVE, source {number:#x}: {error}");
            H_HARDWARE
        };
        let [_, page] = self.xive.event_pages(number);
        if flags & ESB_STORE != 0 {
            self.vm
                .store_controller(page + offset, data)
                .map_err(failed)?;
            return Ok(vec![NOWHERE]);
        }
        let value = self.vm.load_controller(page + offset).map_err(failed)?;
        let goes_on = (EVENT_EOI..EVENT_EOI_END).contains(&offset)
            || (EVENT_SET_00..EVENT_SET_00_END).contains(&offset);
        if goes_on && trigger == Trigger::Level {
            self.lines.trigger_again(number).map_err(failed)?;
        }
        Ok(vec![value])
    }

    fn sync(&self, flags: u64, number: u64) -> Outcome {
        none_of(flags, u64::MAX)?;
        let (number, _) = self.source(number)?;
        self.set(GROUP_SOURCE_SYNC, number.into(), &[])?;
        Ok(Vec::new())
    }

    fn reset(&self, flags: u64) -> Outcome {
        none_of(flags, u64::MAX)?;
        let mut state = self.state();
        self.set(GROUP_CONTROL, CONTROL_RESET, &[])?;
        *state = State::default();
        Ok(Vec::new())
    }
}

/// Refuses `flags` with any of `reserved`.
fn none_of(flags: u64, reserved: u64) -> Result<(), i64> {
    match flags & reserved {
        0 => Ok(()),
        _ => Err(H_PARAMETER),
    }
}

fn word(value: u64) -> [u8; 8] {
    value.to_ne_bytes()
}

/// The level-triggered wires, which are asserted again when the guest is done
/// with one that still is.
pub struct Lines {
    vm: Arc<dyn hv::Vm>,
    wires: Vec<Arc<Wire>>,
}

impl Lines {
    /// The wires of `vm`'s PCI host bridge.
    pub fn new(vm: Arc<dyn hv::Vm>) -> Self {
        let wire = |source| {
            Arc::new(Wire {
                vm: vm.clone(),
                source,
                asserted: Mutex::new(false),
            })
        };
        Self {
            wires: sources::INTX.map(wire).into(),
            vm,
        }
    }

    fn trigger_again(&self, source: u32) -> io::Result<()> {
        match self.wires.iter().find(|wire| wire.source == source) {
            Some(wire) if *wire.asserted() => self.vm.set_irq_line(source, true),
            _ => Ok(()),
        }
    }
}

struct Wire {
    vm: Arc<dyn hv::Vm>,
    source: u32,
    /// The lock also covers the call, so that KVM has the last state.
    asserted: Mutex<bool>,
}

impl Wire {
    fn asserted(&self) -> MutexGuard<'_, bool> {
        self.asserted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IrqLine for Wire {
    fn set(&self, asserted: bool) -> io::Result<()> {
        let mut state = self.asserted();
        *state = asserted;
        self.vm.set_irq_line(self.source, asserted)
    }
}

/// An edge-triggered wire: each assertion is an event.
struct Pulse {
    vm: Arc<dyn hv::Vm>,
    source: u32,
}

impl IrqLine for Pulse {
    fn set(&self, asserted: bool) -> io::Result<()> {
        match asserted {
            true => self.vm.set_irq_line(self.source, true),
            false => Ok(()),
        }
    }
}

impl LineSource for Lines {
    fn level_line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        match self.wires.iter().find(|wire| wire.source == gsi) {
            Some(wire) => wire.clone(),
            None => self.edge_line(gsi),
        }
    }

    fn edge_line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(Pulse {
            vm: self.vm.clone(),
            source: gsi,
        })
    }
}

#[cfg(test)]
#[path = "calls_tests.rs"]
mod tests;
