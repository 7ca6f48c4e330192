//! The folder where the lab keeps what it fetched and made, and its lock.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{AtPath, Error, Result};

/// The environment variable that names the folder.
pub const VARIABLE: &str = "CROSSVISOR_LAB_CACHE";

/// The lab's cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

/// While it lives, no other lab process changes what the lock is about.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Cache {
    /// Opens, and makes where it is missing, the cache folder:
    /// `$CROSSVISOR_LAB_CACHE`, or else `crossvisor-lab` in the user's cache
    /// folder.
    ///
    /// # Errors
    ///
    /// When no such folder can be named or made.
    pub fn open() -> Result<Self> {
        let dir = std::env::var_os(VARIABLE)
            .map(PathBuf::from)
            .or_else(|| {
                std::env::var_os("XDG_CACHE_HOME").map(|d| Path::new(&d).join("crossvisor-lab"))
            })
            .or_else(|| {
                std::env::var_os("HOME").map(|d| Path::new(&d).join(".cache/crossvisor-lab"))
            })
            .ok_or_else(|| {
                Error::said(format!(
                    "no cache folder: set {VARIABLE} to a folder that can be written"
                ))
            })?;
        Self::at(&dir)
    }

    /// Opens the cache in `dir`, and makes it where it is missing.
    ///
    /// # Errors
    ///
    /// When the folder cannot be made.
    pub fn at(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).at(dir)?;
        let dir = dir.canonicalize().at(dir)?;
        // apt's configuration language has no way to write a quote in a string.
        if dir.as_os_str().as_encoded_bytes().contains(&b'"') {
            return Err(Error::said(format!(
                "{}: the cache folder's name may not hold a quotation mark; set {VARIABLE}",
                dir.display()
            )));
        }
        Ok(Self { dir })
    }

    /// A path in the cache.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.dir.join(relative)
    }

    /// A folder in the cache, made where it is missing.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn folder(&self, relative: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.path(relative);
        fs::create_dir_all(&path).at(&path)?;
        Ok(path)
    }

    /// Waits for, and takes, the lock called `name`.
    ///
    /// # Errors
    ///
    /// When the lock's file cannot be made or locked.
    pub fn lock(&self, name: &str) -> Result<Lock> {
        let path = self.folder("locks")?.join(name);
        let file = File::create(&path).at(&path)?;
        if file.try_lock().is_err() {
            progress(&format!("waiting for another lab that works on {name}"));
            file.lock().at(&path)?;
        }
        Ok(Lock { _file: file })
    }
}

/// Says on standard error what the lab does now.
pub fn progress(words: &str) {
    eprintln!("lab: {words}");
}

/// `bytes` as a person reads them.
pub fn size(bytes: u64) -> String {
    const MB: u64 = 1_000_000;
    if bytes >= 10 * MB {
        format!("{} MB", bytes / MB)
    } else if bytes >= MB {
        format!("{}.{} MB", bytes / MB, bytes % MB / 100_000)
    } else {
        format!("{} kB", bytes.div_ceil(1000))
    }
}

/// `n` and `noun`, in the plural unless it is one.
pub fn count(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_for_reading() {
        assert_eq!(size(0), "0 kB");
        assert_eq!(size(1), "1 kB");
        assert_eq!(size(2_345_678), "2.3 MB");
        assert_eq!(size(47_690_140), "47 MB");
    }

    #[test]
    fn a_lock_keeps_others_out_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let lock = cache.lock("x").unwrap();
        let file = File::open(cache.path("locks/x")).unwrap();
        assert!(file.try_lock().is_err());
        drop(lock);
        assert!(file.try_lock().is_ok());
    }

    #[test]
    fn a_folder_that_apt_cannot_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Cache::at(&dir.path().join("a\"b")).unwrap_err().to_string();
        assert!(error.contains("quotation mark"), "{error}");
    }
}
