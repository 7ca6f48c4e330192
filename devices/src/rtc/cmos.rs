//! The PC's CMOS clock, a Motorola MC146818, and its battery-backed memory.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::calendar::Calendar;
use crate::bus::BusDevice;

/// Index register (port 0x70): bit 7 masks NMIs and is ignored.
const INDEX: u64 = 0;
/// Data register (port 0x71).
const DATA: u64 = 1;
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// The century, where PCs keep it; the ACPI FADT's CENTURY field names it.
const CENTURY: u8 = 0x32;

/// Update in progress.
const A_UIP: u8 = 1 << 7;
/// 32.768 kHz time base, 1024 Hz rate.
const A_RESET: u8 = 0x26;
/// The clock is halted while software sets it.
const B_SET: u8 = 1 << 7;
/// Registers are binary, not BCD.
const B_BINARY: u8 = 1 << 2;
/// Hours count to 24.
const B_24_HOURS: u8 = 1 << 1;
/// Battery good.
const D_VALID: u8 = 1 << 7;
const HOURS_PM: u8 = 1 << 7;

/// The last year that the registers can show.
const YEAR_MAX: i64 = 9999;

/// How long before a new second the update flag is up (data sheet: 244 us).
const UPDATE_TIME: Duration = Duration::from_micros(244);

type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// A clock at two ports that shows the host's time in UTC, plus what the guest
/// set it off by. It has no alarm and raises no interrupt.
pub struct Cmos {
    state: Mutex<State>,
    /// Time since the Unix epoch.
    clock: Clock,
}

struct State {
    index: u8,
    ram: [u8; 128],
    status_a: u8,
    status_b: u8,
    /// Guest time minus host time in seconds.
    offset: i64,
    /// The halted clock, while `B_SET` is on.
    halted: Option<Calendar>,
}

impl Cmos {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::with_clock(Box::new(|| {
            SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
        }))
    }

    fn with_clock(clock: Clock) -> Self {
        Self {
            state: Mutex::new(State {
                index: 0,
                ram: [0; 128],
                status_a: A_RESET,
                status_b: B_24_HOURS,
                offset: 0,
                halted: None,
            }),
            clock,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host_seconds(&self) -> i64 {
        i64::try_from((self.clock)().as_secs()).unwrap_or(i64::MAX / 2)
    }

    fn now(&self, state: &State) -> Calendar {
        state.halted.unwrap_or_else(|| {
            Calendar::from_unix(self.host_seconds().saturating_add(state.offset))
        })
    }

    fn read_register(&self, state: &State, register: u8) -> u8 {
        let time = || self.now(state);
        match register {
            SECONDS => state.encode(time().second),
            MINUTES => state.encode(time().minute),
            HOURS => state.encode_hour(time().hour),
            WEEKDAY => state.encode(time().weekday),
            DAY => state.encode(time().day),
            MONTH => state.encode(time().month),
            YEAR => state.encode(time().year.rem_euclid(100)),
            CENTURY => state.encode(time().year.div_euclid(100) % 100),
            STATUS_A => {
                let to_update = Duration::from_secs(1)
                    .saturating_sub(Duration::from_nanos((self.clock)().subsec_nanos().into()));
                let updating = state.halted.is_none() && to_update <= UPDATE_TIME;
                state.status_a | if updating { A_UIP } else { 0 }
            }
            STATUS_B => state.status_b,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            _ => state.ram.get(usize::from(register)).copied().unwrap_or(0),
        }
    }

    fn write_register(&self, state: &mut State, register: u8, value: u8) {
        match register {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                let mut time = self.now(state);
                let number = state.decode(value);
                match register {
                    SECONDS => time.second = number,
                    MINUTES => time.minute = number,
                    HOURS => time.hour = state.decode_hour(value),
                    WEEKDAY => time.weekday = number,
                    DAY => time.day = number,
                    MONTH => time.month = number.clamp(1, 12),
                    YEAR => time.year = time.year.div_euclid(100) * 100 + number,
                    _ => time.year = number * 100 + time.year.rem_euclid(100),
                }
                // Fields out of range carry over, but not without end.
                time.year = time.year.clamp(0, YEAR_MAX);
                if state.halted.is_some() {
                    state.halted = Some(time);
                } else {
                    state.offset = time.to_unix() - self.host_seconds();
                }
            }
            STATUS_A => state.status_a = value & !A_UIP,
            STATUS_B => {
                if value & B_SET != 0 {
                    state.halted = Some(self.now(state));
                } else if let Some(time) = state.halted.take() {
                    state.offset = time.to_unix() - self.host_seconds();
                }
                state.status_b = value;
            }
            STATUS_C | STATUS_D => {}
            _ => {
                if let Some(byte) = state.ram.get_mut(usize::from(register)) {
                    *byte = value;
                }
            }
        }
    }
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// A number from 0 to 99 as status register B wants it.
    fn encode(&self, number: i64) -> u8 {
        let number = number.clamp(0, 99) as u8;
        if self.status_b & B_BINARY != 0 {
            number
        } else {
            ((number / 10) << 4) | (number % 10)
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.status_b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOURS_PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode(&self, value: u8) -> i64 {
        if self.status_b & B_BINARY != 0 {
            value.into()
        } else {
            i64::from(value >> 4) * 10 + i64::from(value & 0xf)
        }
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.status_b & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let pm = if value & HOURS_PM != 0 { 12 } else { 0 };
        self.decode(value & !HOURS_PM) % 12 + pm
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (DATA, Some(byte)) = (offset, data.first_mut()) {
            let state = self.lock();
            *byte = self.read_register(&state, state.index);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        match offset {
            INDEX => state.index = value & INDEX_MASK,
            DATA => {
                let register = state.index;
                self.write_register(&mut state, register, value);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP: u64 = 1_709_251_198;

    fn stopped_at(time: Duration) -> (Cmos, Arc<Mutex<Duration>>) {
        let clock = Arc::new(Mutex::new(time));
        let inner = Arc::clone(&clock);
        (
            Cmos::with_clock(Box::new(move || *inner.lock().unwrap())),
            clock,
        )
    }

    fn read(cmos: &Cmos, register: u8) -> u8 {
        let mut data = [0];
        cmos.write(0, &[register | 0x80]);
        cmos.read(1, &mut data);
        data[0]
    }

    fn write(cmos: &Cmos, register: u8, value: u8) {
        cmos.write(0, &[register]);
        cmos.write(1, &[value]);
    }

    fn shown(cmos: &Cmos) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|r| read(cmos, r))
    }

    #[test]
    fn shows_the_time_in_bcd_and_carries_over_a_leap_day() {
        let (cmos, clock) = stopped_at(Duration::from_secs(LEAP));
        assert_eq!(shown(&cmos), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        *clock.lock().unwrap() += Duration::from_secs(2);
        assert_eq!(shown(&cmos), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
    }

    #[test]
    fn binary_and_twelve_hour_modes() {
        let (cmos, _clock) = stopped_at(Duration::from_secs(LEAP));
        write(&cmos, STATUS_B, B_BINARY);
        assert_eq!(read(&cmos, HOURS), 11 | HOURS_PM);
        assert_eq!(read(&cmos, MINUTES), 59);
        write(&cmos, HOURS, 12);
        assert_eq!(read(&cmos, HOURS), 12, "midnight");
        write(&cmos, STATUS_B, B_BINARY | B_24_HOURS);
        assert_eq!(read(&cmos, HOURS), 0);
    }

    #[test]
    fn can_be_set_as_drivers_do() {
        let (cmos, clock) = stopped_at(Duration::from_secs(LEAP));
        write(&cmos, STATUS_B, B_24_HOURS | B_SET);
        *clock.lock().unwrap() += Duration::from_secs(100);
        for (register, value) in [
            (CENTURY, 0x19),
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x59),
        ] {
            write(&cmos, register, value);
        }
        write(&cmos, STATUS_B, B_24_HOURS);
        assert_eq!(shown(&cmos), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]);
        *clock.lock().unwrap() += Duration::from_secs(1);
        assert_eq!(shown(&cmos), [0x20, 0, 1, 1, 7, 0, 0, 0]);
    }

    #[test]
    fn says_when_an_update_is_near() {
        let (cmos, clock) = stopped_at(Duration::from_secs(LEAP));
        assert_eq!(read(&cmos, STATUS_A), A_RESET);
        *clock.lock().unwrap() += Duration::from_micros(999_900);
        assert_eq!(read(&cmos, STATUS_A), A_RESET | A_UIP);
        assert_eq!(read(&cmos, STATUS_D), D_VALID);
    }

    #[test]
    fn any_value_anywhere_is_survived() {
        let (cmos, _clock) = stopped_at(Duration::from_secs(LEAP));
        for register in 0..=255 {
            for value in [0xff, 0x00, 0x7f, 0x80] {
                write(&cmos, register, value);
                shown(&cmos);
            }
        }
        cmos.read(0, &mut []);
        cmos.write(9, &[1]);
        cmos.write(1, &[]);
    }

    #[test]
    fn setting_it_forward_again_and_again_ends_with_the_last_year() {
        let (cmos, _clock) = stopped_at(Duration::from_secs(LEAP));
        for _ in 0..1000 {
            for register in [YEAR, DAY, HOURS] {
                write(&cmos, register, 0xff);
            }
        }
        let year = cmos.now(&cmos.lock()).year;
        assert!(year <= YEAR_MAX + 1, "{year}");
    }
}
