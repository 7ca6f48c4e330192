//! Initial RAM disks: any content, from files or built here, several of them
//! one after the other.

use std::io::{self, Write};
use std::path::Path;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::source::{CopyError, OpenError, Source, check_guest_range};

/// Why an initrd can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be opened or holds nothing.
    #[error("initrd {name}: {why}")]
    Open {
        /// The path that was given.
        name: String,
        /// What is wrong with it.
        why: OpenError,
    },
    /// It does not fit where it was to be put.
    #[error("initrd of {len} bytes does not fit: {why}")]
    Load {
        /// Length of the whole initrd in bytes.
        len: u64,
        /// What is in the way.
        why: CopyError,
    },
}

/// The bytes of an initrd, in order. Files among them stay open and are copied
/// straight into guest memory.
#[derive(Debug, Default)]
pub struct Initrd {
    parts: Vec<Source>,
}

impl Initrd {
    /// One without any content, to be appended to.
    pub fn new() -> Initrd {
        Initrd::default()
    }

    /// Opens one file.
    pub fn open(path: impl AsRef<Path>) -> Result<Initrd, Error> {
        let mut initrd = Initrd::new();
        initrd.append_file(path)?;
        Ok(initrd)
    }

    /// One that is in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Initrd {
        let mut initrd = Initrd::new();
        initrd.push(Source::from_bytes(bytes));
        initrd
    }

    /// Appends an archive from a file.
    pub fn append_file(&mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let source = Source::open(path).map_err(|why| Error::Open {
            name: path.display().to_string(),
            why,
        })?;
        self.align();
        self.push(source);
        Ok(())
    }

    /// Appends another initrd. The kernel unpacks archives one after the other,
    /// so what comes later replaces files of the same name.
    pub fn append(&mut self, other: Initrd) {
        self.align();
        self.parts.extend(other.parts);
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.parts
            .iter()
            .fold(0, |sum, part| sum.saturating_add(part.len()))
    }

    /// Whether there are no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies all of it into guest memory at `addr`. Nothing is written unless
    /// it fits.
    pub fn load<M>(&self, mem: &M, addr: GuestAddress) -> Result<(), Error>
    where
        M: GuestMemoryBackend,
    {
        let len = self.len();
        let fail = |why| Error::Load { len, why };
        check_guest_range(mem, addr, len).map_err(fail)?;
        let mut at = addr.0;
        for part in &self.parts {
            part.copy_to_guest(mem, GuestAddress(at), 0, part.len())
                .map_err(fail)?;
            // Within the range that was checked.
            at = at.saturating_add(part.len());
        }
        Ok(())
    }

    /// Writes all of it, for instance to a file for another VMM.
    pub fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        for part in &self.parts {
            io::copy(&mut part.reader(0), out)?;
        }
        Ok(())
    }

    /// All of it in memory.
    pub fn to_vec(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes)?;
        Ok(bytes)
    }

    /// Appends bytes as they are.
    pub(crate) fn push(&mut self, source: Source) {
        if !source.is_empty() {
            self.parts.push(source);
        }
    }

    /// Pads with zeros to a multiple of 4 bytes: the kernel looks for a cpio
    /// header only there (init/initramfs.c, `unpack_to_rootfs`).
    fn align(&mut self) {
        let pad = self.len().wrapping_neg() % 4;
        if pad > 0 {
            self.push(Source::from_bytes(vec![0; pad as usize]));
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;

    #[test]
    fn archives_are_joined_at_multiples_of_four() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("second");
        std::fs::write(&path, "second").unwrap();
        let mut initrd = Initrd::from_bytes(b"first".to_vec());
        initrd.append_file(&path).unwrap();
        initrd.append(Initrd::from_bytes(b"3".to_vec()));
        let all = b"first\0\0\0second\0\x003";
        assert_eq!(initrd.to_vec().unwrap(), all);
        assert_eq!(initrd.len(), all.len() as u64);

        let ranges = [
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x2000), 0x1000),
        ];
        let mem = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        // Across two regions.
        initrd.load(&mem, GuestAddress(0x1ffa)).unwrap();
        let mut bytes = vec![0; all.len()];
        mem.read_slice(&mut bytes, GuestAddress(0x1ffa)).unwrap();
        assert_eq!(bytes, all);
    }

    #[test]
    fn what_does_not_fit_is_not_loaded() {
        let initrd = Initrd::from_bytes(vec![1; 0x1001]);
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        for at in [0, 0xfff, 0x1000, u64::MAX, u64::MAX - 0x1000] {
            let error = initrd.load(&mem, GuestAddress(at)).unwrap_err().to_string();
            assert!(
                error.starts_with("initrd of 4097 bytes does not fit"),
                "{error}"
            );
        }
        assert_eq!(mem.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        std::fs::write(&empty, "").unwrap();
        for (path, text) in [
            (empty, "is empty"),
            (dir.path().to_owned(), "is a directory"),
            (dir.path().join("absent"), "No such file"),
        ] {
            let error = Initrd::open(&path).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("initrd {}: ", path.display())),
                "{error}"
            );
            assert!(error.contains(text), "{error}");
        }
    }
}
