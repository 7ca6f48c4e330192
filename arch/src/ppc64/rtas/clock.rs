//! get-time-of-day and set-time-of-day (Linux on Power Architecture Reference,
//! section 7.3.2).

use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crossvisor_devices::rtc::Calendar;

/// Years that the calls can tell.
const YEARS: std::ops::RangeInclusive<i64> = 1970..=9999;

/// A clock that shows the host's time in UTC, plus what the guest set it off by.
#[derive(Debug, Default)]
pub struct Clock {
    /// Guest time minus host time in seconds.
    offset: Mutex<i64>,
}

impl Clock {
    /// Year, month, day, hour, minute, second, nanoseconds.
    pub fn get(&self) -> [u32; 7] {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX / 2);
        let offset = *self.offset.lock().unwrap_or_else(PoisonError::into_inner);
        let time = Calendar::from_unix(seconds.saturating_add(offset));
        let fields = [
            time.year,
            time.month,
            time.day,
            time.hour,
            time.minute,
            time.second,
        ];
        let [year, month, day, hour, minute, second] =
            fields.map(|field| u32::try_from(field).unwrap_or(0));
        [year, month, day, hour, minute, second, now.subsec_nanos()]
    }

    /// Sets the clock from fields in the order of [`get`](Self::get); `None`
    /// when they are no date.
    pub fn set(&self, fields: &[u32]) -> Option<()> {
        let [year, month, day, hour, minute, second, _] = *fields else {
            return None;
        };
        let sound = YEARS.contains(&year.into())
            && (1..=12).contains(&month)
            && (1..=31).contains(&day)
            && hour < 24
            && minute < 60
            && second < 60;
        if !sound {
            return None;
        }
        let time = Calendar {
            year: year.into(),
            month: month.into(),
            day: day.into(),
            hour: hour.into(),
            minute: minute.into(),
            second: second.into(),
            weekday: 1,
        };
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let now = i64::try_from(now.as_secs()).ok()?;
        let mut offset = self.offset.lock().unwrap_or_else(PoisonError::into_inner);
        *offset = time.to_unix().saturating_sub(now);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_hosts_time_until_it_is_set() {
        let clock = Clock::default();
        let [year, month, day, ..] = clock.get();
        assert!(year >= 2024 && (1..=12).contains(&month) && (1..=31).contains(&day));
        clock.set(&[2000, 2, 29, 12, 30, 0, 0]).unwrap();
        assert_eq!(clock.get()[..5], [2000, 2, 29, 12, 30]);
    }

    #[test]
    fn what_is_no_date_changes_nothing() {
        let clock = Clock::default();
        for wrong in [
            &[][..],
            &[2000, 2, 29, 12, 30, 0],
            &[2000, 0, 1, 0, 0, 0, 0],
            &[2000, 13, 1, 0, 0, 0, 0],
            &[2000, 1, 32, 0, 0, 0, 0],
            &[2000, 1, 1, 24, 0, 0, 0],
            &[2000, 1, 1, 0, 60, 0, 0],
            &[2000, 1, 1, 0, 0, 60, 0],
            &[u32::MAX; 7],
        ] {
            assert_eq!(clock.set(wrong), None, "{wrong:?}");
        }
        assert!(clock.get()[0] >= 2024);
    }
}
