//! One subchannel: its state, and what each I/O instruction does to it
//! (Principles of Operation, chapters 14 and 16).

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use super::program::{Ended, Program};
use super::schib::{Irb, Orb, Pmcw, Schib, Scsw, status};
use super::{ChannelInterrupts, ConditionCode, ControlUnit, subsystem_id};
use crate::GuestMem;

/// Bytes of sense data that a device here has.
pub const SENSE_SIZE: usize = 32;

struct State {
    pmcw: Pmcw,
    scsw: Scsw,
    orb: Orb,
    sense: [u8; SENSE_SIZE],
    /// A channel program runs right now, on the thread of another CPU; or a
    /// reset is on its way, and none may begin.
    running: bool,
    /// HALT or CLEAR SUBCHANNEL came while it ran.
    halted: u16,
    /// Alert status came while it ran, to be presented after it.
    alert: bool,
}

/// A subchannel.
pub struct Subchannel {
    number: u16,
    devno: u16,
    memory: GuestMem,
    interrupts: Arc<dyn ChannelInterrupts>,
    unit: OnceLock<Arc<dyn ControlUnit>>,
    state: Mutex<State>,
    /// The channel program has ended.
    ended: Condvar,
}

impl Subchannel {
    pub(super) fn new(
        number: u16,
        devno: u16,
        memory: GuestMem,
        interrupts: Arc<dyn ChannelInterrupts>,
    ) -> Self {
        Self {
            number,
            devno,
            memory,
            interrupts,
            unit: OnceLock::new(),
            state: Mutex::new(initial(devno)),
            ended: Condvar::new(),
        }
    }

    /// Connects the device. Only the first one counts.
    pub fn connect(&self, unit: Arc<dyn ControlUnit>) {
        let _ = self.unit.set(unit);
    }

    /// Its device number.
    pub fn devno(&self) -> u16 {
        self.devno
    }

    /// Its subsystem identification word.
    pub fn id(&self) -> u32 {
        subsystem_id(self.number)
    }

    /// Where its interrupts go.
    pub fn interrupts(&self) -> Arc<dyn ChannelInterrupts> {
        self.interrupts.clone()
    }

    pub(super) fn unit(&self) -> Option<Arc<dyn ControlUnit>> {
        self.unit.get().cloned()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces pending status to the program.
    fn interrupt(&self, state: &State) {
        let (parameter, subclass) = (state.pmcw.parameter, state.pmcw.subclass());
        if let Err(error) = self.interrupts.subchannel(self.id(), parameter, subclass) {
            log::warn!("subchannel {:04x}: cannot interrupt: {error}", self.number);
        }
    }

    /// Presents alert status that no function asked for: how a device calls for
    /// attention. It waits while a channel program runs; status that is pending
    /// already calls for it too.
    pub fn alert(&self) {
        let mut state = self.lock();
        if state.running {
            state.alert = true;
            return;
        }
        self.present_alert(&mut state);
    }

    fn present_alert(&self, state: &mut State) {
        if !state.pmcw.enabled() || state.scsw.control & status::PENDING != 0 {
            return;
        }
        state.scsw.control |= status::ALERT | status::PENDING;
        self.interrupt(state);
    }

    pub(super) fn start(&self, orb: Orb) -> ConditionCode {
        let mut state = self.lock();
        let Some(unit) = self.unit().filter(|_| state.pmcw.enabled()) else {
            return 3;
        };
        if state.scsw.control & status::PENDING != 0 {
            return 1;
        }
        if state.scsw.control & status::FUNCTIONS != 0 {
            return 2;
        }
        if orb.paths & state.pmcw.paths & Pmcw::PATH == 0 {
            return 3;
        }
        state.orb = orb;
        state.pmcw.parameter = orb.parameter;
        let carried = Orb::KEY | Orb::SUSPEND | Orb::FORMAT_1 | Orb::PREFETCH | 0x38;
        state.scsw = Scsw {
            flags: orb.control & carried,
            control: status::START,
            ..Scsw::default()
        };
        self.run(state, unit.as_ref(), orb.program, false);
        0
    }

    pub(super) fn resume(&self) -> ConditionCode {
        let mut state = self.lock();
        let Some(unit) = self.unit().filter(|_| state.pmcw.enabled()) else {
            return 3;
        };
        let control = state.scsw.control;
        if control & status::PENDING != 0 {
            return 1;
        }
        // Only a suspended start function of a program that may be suspended,
        // to which nothing else happens.
        let functions = control & status::FUNCTIONS;
        if functions != status::START
            || control & status::RESUME_PENDING != 0
            || state.orb.control & Orb::SUSPEND == 0
            || control & status::SUSPENDED == 0
        {
            return 2;
        }
        state.scsw.control &= !status::SUSPENDED;
        // The suspended CCW is the one before the address of the status.
        let at = state.scsw.address.wrapping_sub(8);
        self.run(state, unit.as_ref(), at, true);
        0
    }

    /// Runs a channel program without the lock, which what the device does on
    /// other threads may need.
    fn run(
        &self,
        mut state: MutexGuard<'_, State>,
        unit: &dyn ControlUnit,
        start: u32,
        resumed: bool,
    ) {
        state.scsw.control |= status::ACTIVE;
        state.running = true;
        state.halted = 0;
        let (orb, mut sense) = (state.orb, state.sense);
        drop(state);
        let mut program = Program {
            memory: &self.memory,
            unit,
            orb,
            sense: &mut sense,
        };
        let ended = program.run(start, resumed);
        let mut state = self.lock();
        state.running = false;
        state.sense = sense;
        state.scsw.control &= !status::ACTIVITY;
        match std::mem::take(&mut state.halted) {
            0 => self.finish(&mut state, &ended),
            function => self.complete(&mut state, function),
        }
        if std::mem::take(&mut state.alert) {
            self.present_alert(&mut state);
        }
        self.ended.notify_all();
    }

    fn finish(&self, state: &mut State, ended: &Ended) {
        let scsw = &mut state.scsw;
        scsw.address = ended.address;
        scsw.device = ended.device;
        scsw.subchannel = ended.subchannel;
        scsw.count = ended.count;
        if ended.suspended {
            scsw.control |= status::SUSPENDED;
            if state.orb.control & Orb::QUIET_SUSPENSION != 0 {
                return;
            }
            scsw.control |= status::INTERMEDIATE | status::PENDING;
        } else {
            scsw.control |= status::PRIMARY | status::SECONDARY | status::PENDING;
            let checks = !(status::PROGRAM_CONTROLLED | status::INCORRECT_LENGTH);
            if ended.device & status::UNIT_CHECK != 0 || ended.subchannel & checks != 0 {
                scsw.control |= status::ALERT;
            }
        }
        self.interrupt(state);
    }

    pub(super) fn halt(&self) -> ConditionCode {
        let state = self.lock();
        if !state.pmcw.enabled() || self.unit().is_none() {
            return 3;
        }
        let control = state.scsw.control;
        let final_status = status::ALERT | status::PRIMARY | status::SECONDARY;
        if control & status::PENDING != 0
            && (control & final_status != 0 || control & status::STATUS == status::PENDING)
        {
            return 1;
        }
        if control & (status::HALT | status::CLEAR) != 0 {
            return 2;
        }
        self.stop(state, status::HALT);
        0
    }

    pub(super) fn clear(&self) -> ConditionCode {
        let state = self.lock();
        if !state.pmcw.enabled() || self.unit().is_none() {
            return 3;
        }
        self.stop(state, status::CLEAR);
        0
    }

    /// Performs a halt or clear function: at once, or when the program that
    /// runs on another thread has ended.
    fn stop(&self, mut state: MutexGuard<'_, State>, function: u16) {
        if state.running {
            state.halted |= function;
            state.scsw.control |= function;
            return;
        }
        self.complete(&mut state, function);
    }

    fn complete(&self, state: &mut State, function: u16) {
        // Of status that this one takes the place of: a program that halts what
        // is suspended could pile them up.
        self.interrupts.withdraw(self.id());
        if function & status::CLEAR != 0 {
            state.scsw = Scsw {
                control: status::CLEAR | status::PENDING,
                ..Scsw::default()
            };
            state.sense = [0; SENSE_SIZE];
        } else {
            state.scsw.control &= !(status::ACTIVITY | status::STATUS);
            state.scsw.control |= status::HALT | status::PENDING;
            state.scsw.device = 0;
            state.scsw.subchannel = 0;
            state.scsw.count = 0;
        }
        self.interrupt(state);
    }

    pub(super) fn cancel(&self) -> ConditionCode {
        let state = self.lock();
        if !state.pmcw.enabled() || self.unit().is_none() {
            return 3;
        }
        match state.scsw.control & status::PENDING != 0 {
            true => 1,
            false => 2,
        }
    }

    pub(super) fn modify(&self, new: &Pmcw) -> ConditionCode {
        let mut state = self.lock();
        if state.pmcw.flags & Pmcw::VALID == 0 {
            return 0;
        }
        if state.scsw.control & status::PENDING != 0 {
            return 1;
        }
        if state.scsw.control & status::FUNCTIONS != 0 || state.running {
            return 2;
        }
        let was = state.pmcw.enabled();
        state.pmcw.modify(new);
        let disabled = was && !state.pmcw.enabled();
        drop(state);
        if disabled && let Some(unit) = self.unit() {
            unit.disabled();
        }
        0
    }

    pub(super) fn store(&self) -> [u8; Schib::SIZE] {
        let state = self.lock();
        Schib {
            pmcw: state.pmcw,
            scsw: state.scsw,
        }
        .bytes()
    }

    pub(super) fn test(&self) -> (ConditionCode, Option<Irb>) {
        let state = self.lock();
        if !state.pmcw.enabled() {
            return (3, None);
        }
        let mut irb = Irb {
            scsw: state.scsw,
            sense: None,
        };
        let pending = state.scsw.control & status::PENDING != 0;
        let sense = state.scsw.device & status::UNIT_CHECK != 0
            && state.pmcw.features & Pmcw::CONCURRENT_SENSE != 0;
        if pending && sense {
            irb.scsw.flags |= status::FLAG_EXTENDED_FORMAT | status::FLAG_EXTENDED_CONTROL;
            irb.sense = Some(state.sense);
        }
        (if pending { 0 } else { 1 }, Some(irb))
    }

    /// Takes the status away that TEST SUBCHANNEL has stored in `irb`, unless
    /// another CPU has taken it and there is a new one.
    pub(super) fn accept_status(&self, irb: &Irb) {
        let mut state = self.lock();
        let control = state.scsw.control;
        let stored = Scsw {
            flags: state.scsw.flags,
            ..irb.scsw
        };
        if control & status::PENDING == 0 || state.scsw != stored {
            return;
        }
        // What is cleared depends on what the status was: a status that is
        // intermediate only leaves the functions (figure "Conditions and
        // Indications Cleared at the Subchannel by TEST SUBCHANNEL").
        let only_intermediate = control & status::STATUS == status::INTERMEDIATE | status::PENDING;
        state.scsw.control &= !status::STATUS;
        if !only_intermediate {
            state.scsw.control &= !(status::FUNCTIONS | status::ACTIVITY);
            state.scsw.flags &= !status::FLAG_NO_PATH;
            if state.scsw.device & status::UNIT_CHECK != 0
                && state.pmcw.features & Pmcw::CONCURRENT_SENSE != 0
            {
                state.sense = [0; SENSE_SIZE];
            }
            state.scsw.device = 0;
            state.scsw.subchannel = 0;
        } else if control & status::HALT != 0 && control & status::SUSPENDED != 0 {
            state.scsw.control &= !(status::FUNCTIONS | status::ACTIVITY);
        } else {
            state.scsw.subchannel = 0;
        }
    }

    /// Resets the subchannel and its device, after the end of a channel program
    /// that another CPU has started, or it would go on with what is reset.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        while state.running {
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.running = true;
        state.pmcw.flags &= !Pmcw::ENABLED;
        drop(state);
        if let Some(unit) = self.unit() {
            unit.reset();
        }
        self.interrupts.withdraw(self.id());
        *self.lock() = initial(self.devno);
        self.ended.notify_all();
    }
}

/// A subchannel after a reset: valid, disabled, idle.
fn initial(devno: u16) -> State {
    State {
        pmcw: Pmcw {
            parameter: 0,
            flags: Pmcw::VALID,
            devno,
            paths: Pmcw::PATH,
            last_used: Pmcw::PATH,
            measurement: 0,
            operational: 0xff,
            features: 0,
        },
        scsw: Scsw::default(),
        orb: Orb::default(),
        sense: [0; SENSE_SIZE],
        running: false,
        halted: 0,
        alert: false,
    }
}
