//! The log: warnings always, more with each `-v`.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::print;

/// Lines that may come at once.
const BURST: u32 = 50;
/// How long until there may be one more.
const REFILL: Duration = Duration::from_millis(200);

/// Logs to standard error. A guest that goes on doing what a warning is about
/// does not fill the host's disks with it; who asks for more than warnings gets
/// all.
pub fn install(verbose: u8) {
    struct Stderr(Option<Mutex<Limit>>);

    impl log::Log for Stderr {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.level() <= log::max_level()
        }

        fn log(&self, record: &log::Record<'_>) {
            if !self.enabled(record.metadata()) {
                return;
            }
            if let Some(limit) = &self.0 {
                let mut limit = limit.lock().unwrap_or_else(PoisonError::into_inner);
                match limit.admit(Instant::now()) {
                    None => return,
                    Some(0) => {}
                    Some(count) => {
                        print::notice(format_args!("{count} warnings were left out"));
                    }
                }
            }
            print::notice(*record.args());
        }

        fn flush(&self) {
            print::flush();
        }
    }

    log::set_max_level(match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    });
    let limit = (verbose == 0).then(|| Mutex::new(Limit::new(Instant::now())));
    // Fails only when a logger is set already, which nothing else does.
    let _ = log::set_boxed_logger(Box::new(Stderr(limit)));
}

/// How many lines there may be.
struct Limit {
    left: u32,
    /// Up to when what is left has been counted.
    counted: Instant,
    left_out: u64,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            counted: now,
            left_out: 0,
        }
    }

    /// Whether there may be a line now, and how many were left out before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.counted);
        let more = passed.as_millis() / REFILL.as_millis();
        match u32::try_from(more) {
            Ok(more) if more < BURST => {
                self.left = (self.left + more).min(BURST);
                self.counted += REFILL * more;
            }
            _ => (self.left, self.counted) = (BURST, now),
        }
        let Some(left) = self.left.checked_sub(1) else {
            self.left_out += 1;
            return None;
        };
        self.left = left;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_is_cut_and_counted() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        let admitted = (0..1000).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(admitted, BURST as usize);
        let later = start + REFILL;
        assert_eq!(limit.admit(later), Some(1000 - u64::from(BURST)));
        assert_eq!(limit.admit(later), None);
        // After a quiet time it is as at first, and no more than that.
        let much_later = start + REFILL * 1_000_000;
        let admitted = (0..1000).filter(|_| limit.admit(much_later).is_some());
        assert_eq!(admitted.count(), BURST as usize);
    }
}
