//! Errors that reach the user: one line each.

use std::io;

use thiserror::Error;

/// A result of the core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a configuration and the end of a VM. Every message
/// is one line that names the option, file or capability.
#[derive(Debug, Error)]
pub enum Error {
    /// The configuration cannot be met: an option's value and what would work.
    #[error("{option}: {problem}")]
    Config {
        /// The option as the user types it, such as `--cpus`.
        option: &'static str,
        /// What is wrong, and what would work instead.
        problem: String,
    },
    /// The host's KVM lacks something that this machine cannot do without.
    #[error("this host's KVM has no {capability}: {advice}")]
    Capability {
        /// The capability in the KVM API's words.
        capability: String,
        /// What would work instead.
        advice: String,
    },
    /// A system call on something with a name failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to which file or object.
        what: String,
        /// The operating system's word.
        source: io::Error,
    },
    /// What the guest is started from cannot be used; the text names the file.
    #[error("{0}")]
    Boot(String),
    /// The guest did something that KVM cannot go on from.
    #[error("the guest cannot go on: {0}")]
    Guest(String),
}

impl Error {
    /// An [`Error::Config`].
    pub fn config(option: &'static str, problem: impl Into<String>) -> Self {
        Error::Config {
            option,
            problem: problem.into(),
        }
    }

    /// Wraps an operating system error with what was being done.
    pub fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Io {
            what: what.into(),
            source: source.into(),
        }
    }
}
