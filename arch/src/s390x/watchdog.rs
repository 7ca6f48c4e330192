//! The watchdog that DIAGNOSE 0x288 sets (Linux
//! `drivers/watchdog/diag288_wdt.c`).

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossvisor_vmm::power::Power;

/// The shortest time that it takes, in seconds.
pub const SHORTEST: u64 = 15;

#[derive(Default)]
struct State {
    deadline: Option<Instant>,
    running: bool,
    over: bool,
}

/// Resets the guest unless it is changed or cancelled in time.
pub struct Watchdog {
    shared: Arc<(Mutex<State>, Condvar)>,
    power: Power,
}

impl Watchdog {
    /// A watchdog that is not set.
    pub fn new(power: Power) -> Self {
        Self {
            shared: Arc::default(),
            power,
        }
    }

    /// Sets it to so many seconds from now. Without `anew` it must be set
    /// already. Returns whether it is.
    ///
    /// # Errors
    /// Its thread could not be made.
    pub fn set(&self, seconds: u64, anew: bool) -> io::Result<bool> {
        let (state, changed) = &*self.shared;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now().checked_add(Duration::from_secs(seconds));
        if seconds < SHORTEST || deadline.is_none() || !anew && state.deadline.is_none() {
            return Ok(false);
        }
        state.deadline = deadline;
        if !state.running {
            let (shared, power) = (self.shared.clone(), self.power.clone());
            thread::Builder::new()
                .name("watchdog".into())
                .spawn(move || watch(&shared, &power))?;
            state.running = true;
        }
        changed.notify_all();
        Ok(true)
    }

    /// Cancels it. Returns whether it was set.
    pub fn cancel(&self) -> bool {
        let (state, _) = &*self.shared;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.deadline.take().is_some()
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let (state, changed) = &*self.shared;
        state.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        changed.notify_all();
    }
}

fn watch(shared: &(Mutex<State>, Condvar), power: &Power) {
    let (state, changed) = shared;
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    while !state.over {
        let wait = match state.deadline {
            None => Duration::MAX,
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
        };
        if wait.is_zero() {
            log::warn!("the guest's watchdog has run out");
            power.reset();
            return;
        }
        (state, _) = changed
            .wait_timeout(state, wait.min(Duration::from_secs(3600)))
            .unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use crossvisor_vmm::exit::End;
    use crossvisor_vmm::power::{Event, Requests};

    use super::*;

    #[test]
    fn it_is_set_changed_and_cancelled() {
        let (requests, _events) = Requests::new();
        let watchdog = Watchdog::new(Power::new(&requests));
        assert!(!watchdog.cancel());
        assert!(!watchdog.set(60, false).unwrap(), "nothing to change");
        assert!(!watchdog.set(14, true).unwrap() && !watchdog.set(u64::MAX, true).unwrap());
        assert!(watchdog.set(60, true).unwrap());
        assert!(watchdog.set(61, false).unwrap());
        assert!(watchdog.cancel() && !watchdog.cancel());
    }

    #[test]
    fn it_resets_the_guest_when_it_has_run_out() {
        let (requests, events) = Requests::new();
        let watchdog = Watchdog::new(Power::new(&requests));
        watchdog.shared.0.lock().unwrap().deadline = Some(Instant::now());
        watch(&watchdog.shared, &watchdog.power);
        let end = Event::End {
            end: End::Reset,
            data: Vec::new(),
        };
        assert_eq!(events.try_recv(), Ok(end));
    }
}
