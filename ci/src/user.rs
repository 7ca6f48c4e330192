//! QEMU's user-mode emulators: unit tests of every architecture on this
//! machine, on s390x in its byte order. They emulate no KVM.

use std::path::PathBuf;

use crate::archive::{Archive, Root};
use crate::cache::Cache;
use crate::error::Result;
use crate::program;
use crate::targets::Target;

/// The emulator that runs static programs of `target`: Debian's, or else the
/// machine's own; `None` when it has none.
///
/// # Errors
///
/// When Debian's is not to be had.
pub fn emulator(cache: &Cache, target: &Target) -> Result<Option<PathBuf>> {
    let name = format!("qemu-{}", target.qemu);
    if !Archive::usable() {
        return Ok(program::find(&name).or_else(|| program::find(&format!("{name}-static"))));
    }
    // They are static themselves, and run as they are.
    let root = Archive::new(cache).root(&Root {
        name: "qemu-user",
        closure: &[],
        alone: &["qemu-user"],
        foreign: None,
    })?;
    Ok(Some(root.join("usr/bin").join(name)))
}
