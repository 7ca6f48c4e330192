//! Real-time clocks.

mod calendar;
mod cmos;
mod goldfish;
mod pl031;

pub use calendar::Calendar;
pub use cmos::Cmos;
pub use goldfish::Goldfish;
pub use pl031::Pl031;
