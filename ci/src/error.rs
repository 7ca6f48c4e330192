//! What can go wrong in the lab, each as one line that says what would help.

use std::io;
use std::path::{Path, PathBuf};

/// The result of a step of the lab.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a step of the lab could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read, written, made or moved.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program's name or path.
        program: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A program ran and failed.
    #[error("{program} failed ({status}){}", tail(output))]
    Failed {
        /// The program's name or path.
        program: String,
        /// Its exit status or signal, in words.
        status: String,
        /// The last lines that it printed.
        output: String,
    },
    /// Anything else, said in a sentence.
    #[error("{0}")]
    Said(String),
}

impl Error {
    /// A reason in words.
    pub fn said(words: impl Into<String>) -> Self {
        Self::Said(words.into())
    }

    /// Another crate's reason, in its own words.
    pub fn said_by(error: impl std::fmt::Display) -> Self {
        Self::Said(error.to_string())
    }
}

/// Names the file in an I/O error.
pub trait AtPath<T> {
    /// Turns the I/O error into one that names `path`.
    ///
    /// # Errors
    ///
    /// The original error, with the path.
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> AtPath<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|source| Error::File {
            path: path.to_owned(),
            source,
        })
    }
}

fn tail(output: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<&str> = output.lines().filter(|l| !l.trim().is_empty()).collect();
    let start = lines.len().saturating_sub(LINES);
    lines
        .into_iter()
        .skip(start)
        .map(|line| format!("\n    {line}"))
        .collect()
}
