//! Options that name one of a few kinds, of which a host may not offer all.

use crossvisor_vmm::error::{Error, Result};

/// The kind that `option` has the value `name` for: of `known`, the best first,
/// each with its name and whether the host offers it. Without a name, or with
/// `auto`, the best that is offered; `None` when none is.
///
/// # Errors
/// The name is unknown or not offered; says what is.
pub fn choose<T: Copy>(
    option: &'static str,
    name: Option<&str>,
    known: &[(&str, T, bool)],
) -> Result<Option<T>> {
    let offered = || known.iter().filter(|(.., offered)| *offered);
    let best = offered().next().map(|(_, kind, _)| *kind);
    let Some(name) = name.filter(|name| best.is_some() && *name != "auto") else {
        return Ok(best);
    };
    let what = match known.iter().find(|(known, ..)| *known == name) {
        Some((_, kind, true)) => return Ok(Some(*kind)),
        Some(_) => format!("this host does not offer {name}; it offers"),
        None => format!("there is no {name}; this host offers"),
    };
    let names: Vec<&str> = offered().map(|(name, ..)| *name).collect();
    Err(Error::config(
        option,
        format!("{what} {} and auto", names.join(", ")),
    ))
}
