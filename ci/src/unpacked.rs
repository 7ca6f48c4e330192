//! Programs that run out of an unpacked [`Root`](crate::archive::Root).
//!
//! They are started through the root's own dynamic loader, with its own
//! libraries, so that they run on any host of the same processor whatever its
//! C library is.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{AtPath, Error, Result};

/// A root from which programs of the lab's own machine can be run.
#[derive(Debug, Clone)]
pub struct Programs {
    root: PathBuf,
    libraries: PathBuf,
    /// Where libraries are looked for: `libraries`, and then others.
    search_path: OsString,
    loader: PathBuf,
}

impl Programs {
    /// The programs in `root`, which holds a C library for this processor.
    ///
    /// # Errors
    ///
    /// When the root has no dynamic loader.
    pub fn new(root: PathBuf) -> Result<Self> {
        let (triplet, loader) = match std::env::consts::ARCH {
            "x86_64" => ("x86_64-linux-gnu", "ld-linux-x86-64.so.2"),
            "aarch64" => ("aarch64-linux-gnu", "ld-linux-aarch64.so.1"),
            other => {
                return Err(Error::said(format!(
                    "the lab runs on x86_64 and aarch64 machines, not on {other}"
                )));
            }
        };
        let libraries = root.join("usr/lib").join(triplet);
        let loader = libraries.join(loader);
        if !loader.exists() {
            return Err(Error::said(format!(
                "{}: not there; remove the lab's cache and start again",
                loader.display()
            )));
        }
        Ok(Self {
            root,
            search_path: libraries.clone().into(),
            libraries,
            loader,
        })
    }

    /// The folder of the root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of the root's libraries.
    pub fn libraries(&self) -> &Path {
        &self.libraries
    }

    /// Libraries are in `folder` of the root, too.
    pub fn add_libraries(&mut self, folder: &str) {
        self.search_path.push(":");
        self.search_path.push(self.root.join(folder));
    }

    /// A command that runs `program`, a path within the root.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(&self.loader);
        command.args(self.words(program));
        command
    }

    /// Writes a shell script to `path` that runs `program`, a path within the
    /// root, with `arguments`: shell words in which `"$@"` stands for the
    /// script's own. `before` is put in front as it is.
    ///
    /// # Errors
    ///
    /// When the script cannot be written.
    pub fn script(&self, path: &Path, program: &str, before: &str, arguments: &str) -> Result<()> {
        let words: Vec<String> = std::iter::once(self.loader.clone())
            .chain(self.words(program))
            .map(|word| quote(&word.display().to_string()))
            .collect();
        let text = format!("#!/bin/sh\n{before}exec {} {arguments}\n", words.join(" "));
        // Replaced as a whole: another lab may be running the old one.
        let partial = path.with_extension("partial");
        fs::write(&partial, text).at(&partial)?;
        fs::set_permissions(&partial, fs::Permissions::from_mode(0o755)).at(&partial)?;
        fs::rename(&partial, path).at(path)
    }

    fn words(&self, program: &str) -> [PathBuf; 3] {
        [
            "--library-path".into(),
            self.search_path.clone().into(),
            self.root.join(program),
        ]
    }
}

/// `word` as one word of a shell command.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_survive_a_shell() {
        for word in ["plain", "two words", "it's", "$HOME `x` \\ \"y\""] {
            let printed = crate::program::output(
                Command::new("sh").args(["-c", &format!("printf %s {}", quote(word))]),
            )
            .unwrap();
            assert_eq!(printed, word);
        }
    }

    #[test]
    fn a_root_without_a_loader_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Programs::new(dir.path().to_owned()).is_err());
    }
}
