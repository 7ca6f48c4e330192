//! The cpio "newc" archive format that the kernel unpacks
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::borrow::Cow;

use crate::initrd::Initrd;
use crate::source::Source;

/// Files up to this size, in bytes, are copied into the archive's own buffer
/// when they are in files: more open files than that would not be worth it.
pub(super) const INLINE_MAX: u64 = 256 << 10;

const S_IFDIR: u32 = 0o040000;
const S_IFREG: u32 = 0o100000;
const S_IFLNK: u32 = 0o120000;
const S_IFCHR: u32 = 0o020000;
const S_IFBLK: u32 = 0o060000;

/// A device node's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// Character device.
    Char,
    /// Block device.
    Block,
}

/// Why an entry can't be put in an archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The format's fields have 32 bits.
    #[error("{path}: {size} bytes are more than a cpio archive can hold in one file (4 GiB - 1)")]
    TooLarge {
        /// Path in the archive.
        path: String,
        /// The file's size in bytes.
        size: u64,
    },
    /// A path that would be cut short or leave the root.
    #[error("{0:?} can't be a path in an initramfs")]
    Path(String),
    /// The file can't be read.
    #[error("{path}: {why}")]
    Read {
        /// Path in the archive.
        path: String,
        /// What reading said.
        why: std::io::Error,
    },
}

/// Writes a newc archive. Headers and small files are collected in memory;
/// large files stay where they are until the archive is loaded.
#[derive(Debug, Default)]
pub struct Archive {
    out: Initrd,
    pending: Vec<u8>,
    /// Bytes written so far, for padding.
    len: u64,
    ino: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds a directory with permission bits `mode`. Parents must come before.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<(), Error> {
        self.entry(
            path,
            S_IFDIR | mode & 0o7777,
            Body::Bytes(Cow::Borrowed(&[])),
            (0, 0),
        )
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, content: Source) -> Result<(), Error> {
        self.entry(path, S_IFREG | mode & 0o7777, Body::Source(content), (0, 0))
    }

    /// Adds a symbolic link at `path`.
    pub fn symlink(&mut self, target: &str, path: &str) -> Result<(), Error> {
        if target.is_empty() || target.contains('\0') {
            return Err(Error::Path(target.to_owned()));
        }
        self.entry(
            path,
            S_IFLNK | 0o777,
            Body::Bytes(target.as_bytes().into()),
            (0, 0),
        )
    }

    /// Adds a device node.
    pub fn node(
        &mut self,
        path: &str,
        mode: u32,
        kind: NodeKind,
        major: u32,
        minor: u32,
    ) -> Result<(), Error> {
        let kind = match kind {
            NodeKind::Char => S_IFCHR,
            NodeKind::Block => S_IFBLK,
        };
        self.entry(
            path,
            kind | mode & 0o7777,
            Body::Bytes(Cow::Borrowed(&[])),
            (major, minor),
        )
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Initrd {
        self.header("TRAILER!!!", 0, 0, (0, 0), 0);
        self.flush();
        self.out
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        body: Body<'_>,
        device: (u32, u32),
    ) -> Result<(), Error> {
        let name = normalise(path).ok_or_else(|| Error::Path(path.to_owned()))?;
        let size = match &body {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::Source(source) => source.len(),
        };
        let Ok(size32) = u32::try_from(size) else {
            return Err(Error::TooLarge { path: name, size });
        };
        // Read what is to be inlined before anything is written.
        let body = match body {
            Body::Source(source) if size <= INLINE_MAX => {
                let bytes = source.prefix(size as usize).map_err(|why| Error::Read {
                    path: name.clone(),
                    why,
                })?;
                Body::Bytes(bytes.into())
            }
            other => other,
        };
        self.ino = self.ino.wrapping_add(1);
        self.header(&name, self.ino, mode, device, size32);
        match body {
            Body::Bytes(bytes) => self.write(&bytes),
            Body::Source(source) => {
                self.flush();
                self.len += source.len();
                self.out.push(source);
            }
        }
        self.pad();
        Ok(())
    }

    fn header(&mut self, name: &str, ino: u32, mode: u32, device: (u32, u32), size: u32) {
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        // c_magic, then ino, mode, uid, gid, nlink, mtime, filesize, major and
        // minor of the device it is on, of the device it is, namesize, check.
        let fields = [
            ino,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        let mut text = String::from("070701");
        for field in fields {
            text.push_str(&format!("{field:08X}"));
        }
        self.write(text.as_bytes());
        self.write(name.as_bytes());
        self.write(&[0]);
        self.pad();
    }

    fn write(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        self.len += bytes.len() as u64;
    }

    fn pad(&mut self) {
        let pad = self.len.wrapping_neg() % 4;
        self.write(&[0; 3][..pad as usize]);
    }

    fn flush(&mut self) {
        self.out
            .push(Source::from_bytes(std::mem::take(&mut self.pending)));
    }
}

enum Body<'a> {
    Bytes(Cow<'a, [u8]>),
    Source(Source),
}

/// A path without leading slashes, empty and `.` components; nothing when it
/// is the root itself, has `..`, or can't be stored.
pub(super) fn normalise(path: &str) -> Option<String> {
    let parts: Vec<&str> = path
        .split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .collect();
    let name = parts.join("/");
    // The kernel's limit is PATH_MAX with the NUL.
    let good = !parts.is_empty()
        && !parts.contains(&"..")
        && !name.contains('\0')
        && name.len() < 4096
        && name != "TRAILER!!!";
    good.then_some(name)
}

#[cfg(test)]
#[path = "cpio_test.rs"]
pub(super) mod tests;
