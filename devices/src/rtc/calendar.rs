//! Dates, as clocks split time.

const SECONDS_PER_DAY: i64 = 86_400;

/// A point in time, split by the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calendar {
    /// Year.
    pub year: i64,
    /// Month, from 1.
    pub month: i64,
    /// Day of the month, from 1.
    pub day: i64,
    /// Hour, from 0.
    pub hour: i64,
    /// Minute.
    pub minute: i64,
    /// Second.
    pub second: i64,
    /// Day of the week; 1 is Sunday.
    pub weekday: i64,
}

impl Calendar {
    /// Splits seconds since the Unix epoch, by the Gregorian calendar's
    /// 400-year cycle counted from 1 March of the year 0.
    pub fn from_unix(time: i64) -> Self {
        let days = time.div_euclid(SECONDS_PER_DAY);
        let of_day = time.rem_euclid(SECONDS_PER_DAY);
        // 719468 days lie between 0000-03-01 and 1970-01-01; 146097 make a cycle.
        let shifted = days + 719_468;
        let cycle = shifted.div_euclid(146_097);
        let day_of_cycle = shifted.rem_euclid(146_097);
        let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524
            - day_of_cycle / 146_096)
            / 365;
        let day_of_year =
            day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = (shifted_month + 2) % 12 + 1;
        Self {
            year: year_of_cycle + cycle * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            hour: of_day / 3600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
            // 1970-01-01 was a Thursday.
            weekday: (days + 4).rem_euclid(7) + 1,
        }
    }

    /// Seconds since the Unix epoch. Fields out of range carry over.
    pub fn to_unix(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let shifted_month = (self.month + 9) % 12;
        let day_of_year = (153 * shifted_month + 2) / 5 + self.day - 1;
        let year_of_cycle = year.rem_euclid(400);
        let days = year.div_euclid(400) * 146_097 + year_of_cycle * 365 + year_of_cycle / 4
            - year_of_cycle / 100
            + day_of_year
            - 719_468;
        days * SECONDS_PER_DAY + self.hour * 3600 + self.minute * 60 + self.second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calendar_round_trips_over_centuries() {
        for day in (-800_000..800_000).step_by(17) {
            let time = day * SECONDS_PER_DAY + day.rem_euclid(SECONDS_PER_DAY);
            assert_eq!(Calendar::from_unix(time).to_unix(), time);
        }
    }
}
