//! Real-time clocks.

mod calendar;
mod cmos;
mod pl031;

pub use calendar::Calendar;
pub use cmos::Cmos;
pub use pl031::Pl031;
