//! Options that name one of a few kinds, of which a host may not offer all.

use crossvisor_vmm::error::{Error, Result};

/// A kind that an option may name.
#[derive(Clone, Copy, Debug)]
pub struct Kind<T> {
    /// Its name for the option.
    pub name: &'static str,
    /// The kind.
    pub kind: T,
    /// Whether the host offers it.
    pub offered: bool,
    /// What a host lacks that does not, for people; may be empty.
    pub lacking: &'static str,
}

impl<T> Kind<T> {
    /// A kind of which there is no more to say where it is not offered.
    pub const fn new(name: &'static str, kind: T, offered: bool) -> Self {
        Self {
            name,
            kind,
            offered,
            lacking: "",
        }
    }
}

/// The kind that `option` has the value `name` for: of `known`, the best first.
/// Without a name, or with `auto`, the best that is offered; `None` when none is.
///
/// # Errors
/// The name is unknown or not offered; says what is.
pub fn choose<T: Copy>(
    option: &'static str,
    name: Option<&str>,
    known: &[Kind<T>],
) -> Result<Option<T>> {
    let offered = || known.iter().filter(|kind| kind.offered);
    let best = offered().next().map(|best| best.kind);
    let Some(name) = name.filter(|name| best.is_some() && *name != "auto") else {
        return Ok(best);
    };
    let what = match known.iter().find(|kind| kind.name == name) {
        Some(found) if found.offered => return Ok(Some(found.kind)),
        Some(Kind { lacking: "", .. }) => format!("this host does not offer {name}; it offers"),
        Some(Kind { lacking, .. }) => {
            format!("this host does not offer {name} ({lacking}); it offers")
        }
        None => format!("there is no {name}; this host offers"),
    };
    let names: Vec<&str> = offered().map(|kind| kind.name).collect();
    Err(Error::config(
        option,
        format!("{what} {} and auto", names.join(", ")),
    ))
}
