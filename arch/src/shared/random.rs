//! Seeds for guests' random number generators.

use crossvisor_vmm::error::{Error, Result};
use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `bytes` from the host's random number generator.
///
/// # Errors
/// The host has none.
pub fn fill(bytes: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let flags = GetRandomFlags::empty();
        filled += rustix::io::retry_on_intr(|| getrandom(&mut *rest, flags))
            .map_err(|errno| Error::io("getrandom", errno))?;
    }
    Ok(())
}
