//! Real-time clocks.

mod cmos;
mod pl031;

pub use cmos::Cmos;
pub use pl031::Pl031;
