//! The Goldfish real-time clock, which Linux has a driver for wherever there is
//! a device tree (the Android emulator's "goldfish" platform,
//! GOLDFISH-VIRTUAL-HARDWARE.TXT, section "Goldfish RTC").

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::bus::BusDevice;
use crate::irq::IrqLine;

// Registers, 32 bits each.
/// Low half of the time in nanoseconds since the Unix epoch; reading it keeps
/// the high half for [`TIME_HIGH`], writing it sets the clock to both halves.
const TIME_LOW: u64 = 0x00;
const TIME_HIGH: u64 = 0x04;
/// Low half of the alarm's time; writing it sets the alarm to both halves.
const ALARM_LOW: u64 = 0x08;
const ALARM_HIGH: u64 = 0x0c;
const IRQ_ENABLED: u64 = 0x10;
const CLEAR_ALARM: u64 = 0x14;
/// Whether an alarm is set.
const ALARM_STATUS: u64 = 0x18;
const CLEAR_INTERRUPT: u64 = 0x1c;

/// A clock that shows the host's time in UTC, plus what the guest set it off
/// by. It takes 4 KiB, and raises an edge on its wire when the alarm goes off.
pub struct Goldfish {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// The alarm has been set or cleared, or the clock is gone.
    changed: Condvar,
    irq: Arc<dyn IrqLine>,
}

#[derive(Default)]
struct State {
    /// What the guest's clock is ahead of the host's, in nanoseconds, modulo
    /// 2^64.
    offset: u64,
    /// The high half that goes with the low half read last.
    kept_high: u32,
    /// High halves that were written before their low halves.
    time_high: u32,
    alarm_high: u32,
    alarm: u64,
    alarm_set: bool,
    irq_enabled: bool,
    /// The alarm went off and the guest has not cleared that.
    pending: bool,
    /// The thread that waits for the alarm is there.
    waiting: bool,
    gone: bool,
}

/// The host's time, in nanoseconds since the Unix epoch.
fn host_time() -> u64 {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl State {
    fn now(&self) -> u64 {
        host_time().wrapping_add(self.offset)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An edge if the alarm has gone off and the guest wants to know.
    fn interrupt(&self, state: &State) {
        if state.pending && state.irq_enabled {
            if let Err(error) = self.irq.set(true) {
                log::warn!("rtc: cannot interrupt: {error}");
            }
            let _ = self.irq.set(false);
        }
    }

    /// Lets the alarm go off when it is due; returns how long that is away.
    fn ring(&self, state: &mut State) -> Option<Duration> {
        if !state.alarm_set {
            return None;
        }
        let now = state.now();
        if state.alarm > now {
            return Some(Duration::from_nanos(state.alarm - now));
        }
        state.alarm_set = false;
        state.pending = true;
        self.interrupt(state);
        None
    }
}

/// The longest that the alarm's thread sleeps at once: the host's clock may be
/// set meanwhile.
const NAP: Duration = Duration::from_secs(1);

/// The alarm's thread.
fn wait(shared: &Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let mut state = shared.lock();
        if state.gone {
            return;
        }
        let Some(left) = shared.ring(&mut state) else {
            state.waiting = false;
            return;
        };
        drop(shared.changed.wait_timeout(state, left.min(NAP)));
    }
}

impl Goldfish {
    /// A clock that shows the host's time and interrupts through the
    /// edge-triggered wire `irq`.
    pub fn new(irq: Arc<dyn IrqLine>) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                changed: Condvar::new(),
                irq,
            }),
        }
    }

    /// The alarm has been set or the clock moved: rings at once or waits.
    fn watch(&self, state: &mut State) {
        if self.shared.ring(state).is_none() || state.waiting {
            self.shared.changed.notify_all();
            return;
        }
        let shared = Arc::downgrade(&self.shared);
        let thread = thread::Builder::new().name("rtc-alarm".to_owned());
        match thread.spawn(move || wait(&shared)) {
            Ok(_) => state.waiting = true,
            Err(error) => log::warn!("rtc: no alarm: {error}"),
        }
    }
}

impl Drop for Goldfish {
    fn drop(&mut self) {
        self.shared.lock().gone = true;
        self.shared.changed.notify_all();
    }
}

impl BusDevice for Goldfish {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.shared.lock();
        let value = match offset {
            TIME_LOW => {
                let now = state.now();
                state.kept_high = (now >> 32) as u32;
                now as u32
            }
            TIME_HIGH => state.kept_high,
            ALARM_LOW => state.alarm as u32,
            ALARM_HIGH => (state.alarm >> 32) as u32,
            IRQ_ENABLED => state.irq_enabled.into(),
            ALARM_STATUS => state.alarm_set.into(),
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        let mut state = self.shared.lock();
        let whole = |high: u32| u64::from(high) << 32 | u64::from(value);
        match offset {
            TIME_HIGH => state.time_high = value,
            TIME_LOW => {
                state.offset = whole(state.time_high).wrapping_sub(host_time());
                self.watch(&mut state);
            }
            ALARM_HIGH => state.alarm_high = value,
            ALARM_LOW => {
                state.alarm = whole(state.alarm_high);
                state.alarm_set = true;
                self.watch(&mut state);
            }
            IRQ_ENABLED => {
                state.irq_enabled = value & 1 != 0;
                self.shared.interrupt(&state);
            }
            CLEAR_ALARM => {
                state.alarm_set = false;
                self.shared.changed.notify_all();
            }
            CLEAR_INTERRUPT => state.pending = false,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Wire;

    const SECOND: u64 = 1_000_000_000;

    fn clock() -> (Goldfish, Arc<Wire>) {
        let wire = Arc::new(Wire::default());
        (Goldfish::new(wire.clone()), wire)
    }

    fn read(clock: &Goldfish, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        clock.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn time(clock: &Goldfish) -> u64 {
        let low = read(clock, TIME_LOW);
        u64::from(read(clock, TIME_HIGH)) << 32 | u64::from(low)
    }

    fn write(clock: &Goldfish, offset: u64, value: u32) {
        clock.write(offset, &value.to_le_bytes());
    }

    /// Writes both halves, as the driver does.
    fn set(clock: &Goldfish, low: u64, high: u64, value: u64) {
        write(clock, high, (value >> 32) as u32);
        write(clock, low, value as u32);
    }

    #[test]
    fn shows_the_hosts_time_and_can_be_set() {
        let (clock, _) = clock();
        assert!(time(&clock).abs_diff(host_time()) < 60 * SECOND);
        set(&clock, TIME_LOW, TIME_HIGH, 1000 * SECOND);
        assert!(time(&clock).abs_diff(1000 * SECOND) < 60 * SECOND);
    }

    #[test]
    fn an_alarm_goes_off_once() {
        let (clock, wire) = clock();
        write(&clock, IRQ_ENABLED, 1);
        let soon = time(&clock) + SECOND / 50;
        set(&clock, ALARM_LOW, ALARM_HIGH, soon);
        let rung = (0..1000).any(|_| {
            thread::sleep(Duration::from_millis(10));
            wire.edges() == 1
        });
        assert!(rung);
        assert_eq!(read(&clock, ALARM_STATUS), 0);
        assert_eq!(read(&clock, ALARM_LOW), soon as u32);
        write(&clock, CLEAR_INTERRUPT, 1);
        write(&clock, IRQ_ENABLED, 1);
        assert_eq!(wire.edges(), 1);
    }

    #[test]
    fn an_alarm_in_the_past_goes_off_at_once_and_waits_for_its_interrupt() {
        let (clock, wire) = clock();
        set(&clock, ALARM_LOW, ALARM_HIGH, 5);
        assert_eq!(read(&clock, ALARM_STATUS), 0);
        assert_eq!(wire.edges(), 0);
        write(&clock, IRQ_ENABLED, 1);
        assert_eq!(wire.edges(), 1);
    }

    #[test]
    fn a_cleared_alarm_stays_silent() {
        let (clock, wire) = clock();
        write(&clock, IRQ_ENABLED, 1);
        let later = time(&clock) + 3600 * SECOND;
        set(&clock, ALARM_LOW, ALARM_HIGH, later);
        assert_eq!(read(&clock, ALARM_STATUS), 1);
        write(&clock, CLEAR_ALARM, 1);
        assert_eq!(read(&clock, ALARM_STATUS), 0);
        // The clock passes the time that was set.
        set(&clock, TIME_LOW, TIME_HIGH, later + SECOND);
        assert_eq!(wire.edges(), 0);
        // Set again, it rings at once.
        set(&clock, ALARM_LOW, ALARM_HIGH, later);
        assert_eq!(wire.edges(), 1);
    }

    #[test]
    fn survives_any_access() {
        let (clock, _) = clock();
        for offset in (0..0x30).chain([u64::MAX]) {
            for len in [0, 1, 2, 4, 8] {
                clock.write(offset, &[0xff; 8][..len]);
                clock.read(offset, &mut [0; 8][..len]);
            }
        }
    }
}
