//! Programs by which unit tests read back what a guest reads about its machine.

use std::ffi::OsString;

use crate::archive::{Archive, Root};
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::unpacked::Programs;

/// The programs, in Debian's packages device-tree-compiler and acpica-tools.
const PROGRAMS: [&str; 2] = ["dtc", "iasl"];

/// A search path on which they are found first; `None` on a machine without
/// apt, whose own serve where it has them.
///
/// # Errors
///
/// When they are not to be had.
pub fn search_path(cache: &Cache) -> Result<Option<OsString>> {
    if !Archive::usable() {
        return Ok(None);
    }
    let programs = Programs::new(Archive::new(cache).root(&Root {
        name: "checkers",
        closure: &["device-tree-compiler", "acpica-tools"],
        alone: &[],
        foreign: None,
    })?)?;
    let folder = cache.folder("scripts/checkers")?;
    for program in PROGRAMS {
        programs.script(
            &folder.join(program),
            &format!("usr/bin/{program}"),
            "",
            "\"$@\"",
        )?;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder).chain(std::env::split_paths(&path));
    std::env::join_paths(folders)
        .map(Some)
        .map_err(|error| Error::said(format!("PATH: {error}")))
}
