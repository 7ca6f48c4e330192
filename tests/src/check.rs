//! What a test asserts with, and how it fails.

use std::fmt::Debug;

/// Why a test did not pass.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Something was not as expected; the text says what was wanted.
    #[error("{0}")]
    Failed(String),
    /// The machine lacks what the test needs.
    #[error("skipped: {0}")]
    Skipped(String),
}

/// The result of a test or a step of it.
pub type Result<T = ()> = std::result::Result<T, Failure>;

/// A failure with `text`.
pub fn fail<T>(text: impl Into<String>) -> Result<T> {
    Err(Failure::Failed(text.into()))
}

/// The end of a test on a machine that lacks what it needs.
pub fn skip<T>(reason: impl Into<String>) -> Result<T> {
    Err(Failure::Skipped(reason.into()))
}

/// Fails with `text` unless `condition` holds.
pub fn ensure(condition: bool, text: impl FnOnce() -> String) -> Result {
    match condition {
        true => Ok(()),
        false => fail(text()),
    }
}

/// Fails unless `found` is `wanted`.
pub fn equal<T: PartialEq + Debug>(what: &str, found: T, wanted: T) -> Result {
    ensure(found == wanted, || {
        format!("{what}: found {found:?}, wanted {wanted:?}")
    })
}

/// Fails unless `text` contains `part`.
pub fn contains(what: &str, text: &str, part: &str) -> Result {
    ensure(text.contains(part), || {
        format!("{what}: no `{part}` in `{}`", text.trim_end())
    })
}

/// Fails unless `number` is within `range`, its ends included.
pub fn within<T: PartialOrd + Debug>(what: &str, number: T, from: T, to: T) -> Result {
    ensure(number >= from && number <= to, || {
        format!("{what}: {number:?} is not from {from:?} to {to:?}")
    })
}

/// Gives an error of the operating system, or of a parser, a place.
pub trait At<T> {
    /// Fails with `what` and the error.
    fn at(self, what: impl AsRef<str>) -> Result<T>;
}

impl<T, E: std::fmt::Display> At<T> for std::result::Result<T, E> {
    fn at(self, what: impl AsRef<str>) -> Result<T> {
        self.map_err(|error| Failure::Failed(format!("{}: {error}", what.as_ref())))
    }
}

/// The value of the first line `key: value` or `key=value` in `text`, trimmed.
pub fn value<'a>(text: &'a str, key: &str) -> Result<&'a str> {
    let found = text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix(key)?.trim_start();
        rest.strip_prefix([':', '=']).map(str::trim)
    });
    found.map_or_else(|| fail(format!("no `{key}` in `{}`", text.trim_end())), Ok)
}

/// Like [`value`], as a number; a unit after it is left out.
pub fn number(text: &str, key: &str) -> Result<u64> {
    let found = value(text, key)?;
    let digits = found.split_whitespace().next().unwrap_or_default();
    digits.parse().at(format!("`{key}` is `{found}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_key() {
        let text = "MemTotal:   2048 kB\nMemFree: x\r\nserial=S 1\n";
        assert_eq!(value(text, "serial").unwrap(), "S 1");
        assert_eq!(number(text, "MemTotal").unwrap(), 2048);
        assert_eq!(value(text, "MemFree").unwrap(), "x");
        assert!(number(text, "MemFree").is_err());
        assert!(value(text, "Mem").is_err());
        assert!(value(text, "absent").is_err());
    }

    #[test]
    fn assertions_name_what_they_wanted() {
        assert!(equal("a", 1, 1).is_ok());
        let error = equal("answer", 1, 42).unwrap_err().to_string();
        assert_eq!(error, "answer: found 1, wanted 42");
        assert!(within("n", 3, 1, 3).is_ok());
        assert!(within("n", 4, 1, 3).is_err());
        assert!(contains("c", "abc", "bc").is_ok());
        assert!(contains("c", "abc", "x").is_err());
    }
}
