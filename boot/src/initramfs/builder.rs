//! Collects what goes into an initramfs.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::config::{InitConfig, PATH};
use super::cpio::{self, Archive, NodeKind};
use super::elf::Executable;
use super::modules::{self, Module, ModuleTree};
use crate::initrd::Initrd;
use crate::source::{OpenError, Source};

/// Why an initramfs can't be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A host file can't be opened.
    #[error("{}: {why}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: OpenError,
    },
    /// A host file or folder can't be read.
    #[error("{}: {why}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        why: io::Error,
    },
    /// A host file of a kind that an initramfs can't hold.
    #[error("{}: a {kind} can't be put into an initramfs", path.display())]
    Kind {
        /// Which.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Not an executable, or one that needs what can't be found.
    #[error("{}: {why}", path.display())]
    Executable {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// An entry would be below something that is no directory.
    #[error("initramfs: {path} is below {parent}, which is not a directory")]
    Parent {
        /// The entry.
        path: String,
        /// What is in its way.
        parent: String,
    },
    /// The archive format can't hold an entry.
    #[error(transparent)]
    Archive(#[from] cpio::Error),
    /// A kernel module can't be found or read.
    #[error(transparent)]
    Modules(#[from] modules::Error),
}

/// What is at a path.
#[derive(Debug)]
enum Entry {
    Dir {
        mode: u32,
    },
    File {
        mode: u32,
        content: Source,
    },
    Symlink {
        target: String,
    },
    Node {
        mode: u32,
        kind: NodeKind,
        major: u32,
        minor: u32,
    },
}

/// Collects the content of an initramfs. Guest paths are absolute; parents are
/// made as needed, symbolic links among them are followed, and what is added
/// later replaces what was at the same path.
#[derive(Debug)]
pub struct Builder {
    /// By path without leading slash: parents sort before their children.
    entries: BTreeMap<String, Entry>,
    config: Option<InitConfig>,
    modules: Vec<String>,
    busybox_install: bool,
}

impl Default for Builder {
    fn default() -> Self {
        Builder::new()
    }
}

impl Builder {
    /// Begins with the usual empty directories, `/dev/console` and `/dev/null`,
    /// and an `/etc/passwd` that names root.
    pub fn new() -> Builder {
        let mut entries = BTreeMap::new();
        for dir in [
            "bin", "dev", "etc", "lib", "mnt", "proc", "root", "run", "sbin", "sys", "usr", "var",
        ] {
            entries.insert(dir.to_owned(), Entry::Dir { mode: 0o755 });
        }
        entries.insert("tmp".to_owned(), Entry::Dir { mode: 0o1777 });
        // The kernel opens /dev/console for /init before there is a devtmpfs.
        for (path, mode, major, minor) in [("dev/console", 0o600, 5, 1), ("dev/null", 0o666, 1, 3)]
        {
            let node = Entry::Node {
                mode,
                kind: NodeKind::Char,
                major,
                minor,
            };
            entries.insert(path.to_owned(), node);
        }
        for (path, text) in [
            ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
            ("etc/group", "root:x:0:\n"),
        ] {
            let content = Source::from_bytes(text.as_bytes().to_vec());
            entries.insert(
                path.to_owned(),
                Entry::File {
                    mode: 0o644,
                    content,
                },
            );
        }
        Builder {
            entries,
            config: None,
            modules: Vec::new(),
            busybox_install: false,
        }
    }

    /// Adds bytes as a file with permission bits `mode`.
    pub fn add_bytes(
        &mut self,
        path: &str,
        mode: u32,
        bytes: impl Into<Vec<u8>>,
    ) -> Result<(), Error> {
        let content = Source::from_bytes(bytes.into());
        self.insert(path, Entry::File { mode, content })
    }

    /// Adds a file of the host with its permission bits, following symbolic
    /// links.
    pub fn add_file(&mut self, host: impl AsRef<Path>, path: &str) -> Result<(), Error> {
        let host = host.as_ref();
        let mode = metadata(host, false)?.permissions().mode();
        let content = match Source::open(host) {
            Err(OpenError::Empty) => Source::from_bytes(Vec::new()),
            opened => opened.map_err(|why| Error::Open {
                path: host.to_owned(),
                why,
            })?,
        };
        self.insert(
            path,
            Entry::File {
                mode,
                content: inline_small(host, content)?,
            },
        )
    }

    /// Adds a file or a folder with all that is below it, as `path`. Symbolic
    /// links in it stay links; sockets and pipes are left out.
    pub fn add_tree(&mut self, host: impl AsRef<Path>, path: &str) -> Result<(), Error> {
        self.add_below(host.as_ref(), path, 0)
    }

    fn add_below(&mut self, host: &Path, path: &str, depth: usize) -> Result<(), Error> {
        /// Deeper than that it is a mistake.
        const DEPTH_MAX: usize = 128;
        // The folder itself may be a link, what is in it stays what it is.
        let meta = metadata(host, depth > 0)?;
        let kind = meta.file_type();
        if kind.is_symlink() {
            let target = std::fs::read_link(host).map_err(|why| Error::Read {
                path: host.to_owned(),
                why,
            })?;
            return self.symlink(&target.to_string_lossy(), path);
        }
        if kind.is_file() {
            return self.add_file(host, path);
        }
        if kind.is_char_device() || kind.is_block_device() {
            let (major, minor) = device_numbers(meta.rdev());
            let kind = if kind.is_block_device() {
                NodeKind::Block
            } else {
                NodeKind::Char
            };
            let mode = meta.permissions().mode();
            return self.insert(
                path,
                Entry::Node {
                    mode,
                    kind,
                    major,
                    minor,
                },
            );
        }
        if !kind.is_dir() {
            return match depth {
                0 => Err(Error::Kind {
                    path: host.to_owned(),
                    kind: "socket or pipe",
                }),
                _ => Ok(()),
            };
        }
        if depth > DEPTH_MAX {
            return Err(Error::Kind {
                path: host.to_owned(),
                kind: "folder so deep",
            });
        }
        if cpio::normalise(path).is_some() {
            self.insert(
                path,
                Entry::Dir {
                    mode: meta.permissions().mode(),
                },
            )?;
        }
        let read = |why| Error::Read {
            path: host.to_owned(),
            why,
        };
        for entry in std::fs::read_dir(host).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                return Err(Error::Kind {
                    path: entry.path(),
                    kind: "file name that is not UTF-8",
                });
            };
            self.add_below(&entry.path(), &format!("{path}/{name}"), depth + 1)?;
        }
        Ok(())
    }

    /// Adds an empty directory with permission bits `mode`.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<(), Error> {
        self.insert(path, Entry::Dir { mode })
    }

    /// Adds a symbolic link at `path`.
    pub fn symlink(&mut self, target: &str, path: &str) -> Result<(), Error> {
        self.insert(
            path,
            Entry::Symlink {
                target: target.to_owned(),
            },
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
        self.insert(
            path,
            Entry::Node {
                mode,
                kind,
                major,
                minor,
            },
        )
    }

    /// Puts an executable at `/init`. When it is dynamically linked it must be
    /// the one that is running: then its interpreter and the libraries that
    /// this process has mapped are added too.
    ///
    /// On s390x it does not ask for page tables with storage keys there, and
    /// cannot use KVM: the kernel would start its first program in vain, with
    /// EAGAIN, for it then begins the system call anew, which there was none.
    pub fn add_init(&mut self, binary: impl AsRef<Path>) -> Result<(), Error> {
        const INIT: &str = "/init";
        let binary = binary.as_ref();
        let Some(pgste) = self.add_program(binary, INIT)?.pgste else {
            return Ok(());
        };
        let mut bytes = std::fs::read(binary).map_err(|why| Error::Read {
            path: binary.to_owned(),
            why,
        })?;
        // No program header at all (PT_NULL).
        let kind = usize::try_from(pgste)
            .ok()
            .and_then(|at| bytes.get_mut(at..)?.first_chunk_mut::<4>());
        if let Some(kind) = kind {
            *kind = [0; 4];
        }
        self.add_bytes(INIT, 0o755, bytes)
    }

    /// Like [`add_init`](Self::add_init), at any path.
    pub fn add_executable(&mut self, host: impl AsRef<Path>, path: &str) -> Result<(), Error> {
        self.add_program(host.as_ref(), path).map(drop)
    }

    /// Adds an executable with what it is linked with, and returns what it is.
    fn add_program(&mut self, host: &Path, path: &str) -> Result<Executable, Error> {
        let executable = self.executable(host)?;
        self.add_file(host, path)?;
        let Some(interpreter) = &executable.interpreter else {
            return Ok(executable);
        };
        if !same_file(host, Path::new("/proc/self/exe")) {
            return Err(Error::Executable {
                path: host.to_owned(),
                why: "is dynamically linked: a static executable is needed in an initramfs"
                    .to_owned(),
            });
        }
        let maps = Path::new("/proc/self/maps");
        let maps = std::fs::read_to_string(maps).map_err(|why| Error::Read {
            path: maps.to_owned(),
            why,
        })?;
        for library in mapped_executables(&maps) {
            let library = Path::new(library);
            if same_file(library, host) {
                continue;
            }
            // Memory that is mapped from something else than a library.
            let Ok(elf) = self.executable(library) else {
                continue;
            };
            let guest = library.to_string_lossy().into_owned();
            self.add_file(library, &guest)?;
            // The loader looks for the soname, which may be a link's name.
            if let Some(soname) = elf.soname
                && let Some(folder) = library.parent()
                && library.file_name() != Some(soname.as_ref())
            {
                self.symlink(&guest, &folder.join(soname).to_string_lossy())?;
            }
        }
        // The interpreter's own path often goes through links (/lib64).
        let real = Path::new(interpreter)
            .canonicalize()
            .map_err(|why| Error::Read {
                path: PathBuf::from(interpreter),
                why,
            })?;
        let real = real.to_string_lossy().into_owned();
        self.add_file(&real, &real)?;
        if real != *interpreter {
            self.symlink(&real, interpreter)?;
        }
        Ok(executable)
    }

    fn executable(&self, host: &Path) -> Result<Executable, Error> {
        Executable::open(host).map_err(|why| Error::Executable {
            path: host.to_owned(),
            why: why.to_string(),
        })
    }

    /// Adds the modules that `names` need, with their dependencies, to be
    /// loaded by `/init` in that order. Returns the names that were added.
    pub fn modules<S: AsRef<str>>(
        &mut self,
        tree: &ModuleTree,
        names: &[S],
    ) -> Result<Vec<String>, Error> {
        let modules = tree.resolve(names)?;
        self.add_modules(tree.release(), modules)
    }

    /// Like [`modules`](Self::modules), leaving out those that the kernel does
    /// not have.
    pub fn modules_available<S: AsRef<str>>(
        &mut self,
        tree: &ModuleTree,
        names: &[S],
    ) -> Result<Vec<String>, Error> {
        let modules = tree.resolve_available(names)?;
        self.add_modules(tree.release(), modules)
    }

    fn add_modules(&mut self, release: &str, modules: Vec<Module>) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        for module in modules {
            let path = format!("/lib/modules/{release}/{}", module.file_name);
            if !self.modules.contains(&path) {
                self.add_bytes(&path, 0o644, module.content)?;
                self.modules.push(path);
                names.push(module.name);
            }
        }
        Ok(names)
    }

    /// Adds a static busybox as `/bin/busybox`, and a link for each of its
    /// commands. When it can't be run here to ask for them (another
    /// architecture's), there is only `/bin/sh`, and `/init` installs the rest.
    pub fn busybox(&mut self, host: impl AsRef<Path>) -> Result<(), Error> {
        let host = host.as_ref();
        if self.executable(host)?.interpreter.is_some() {
            return Err(Error::Executable {
                path: host.to_owned(),
                why: "is dynamically linked: a static busybox is needed in an initramfs".to_owned(),
            });
        }
        self.add_file(host, "/bin/busybox")?;
        self.symlink("busybox", "/bin/sh")?;
        let listed = Command::new(host)
            .arg("--list")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()
            .filter(|out| out.status.success())
            .and_then(|out| String::from_utf8(out.stdout).ok());
        match listed {
            Some(list) => {
                for name in list.lines().map(str::trim) {
                    let plain = !name.is_empty() && !name.contains('/') && name != "busybox";
                    if plain && !self.entries.contains_key(&format!("bin/{name}")) {
                        self.symlink("busybox", &format!("/bin/{name}"))?;
                    }
                }
            }
            None => self.busybox_install = true,
        }
        // Where the kernel and scripts look for them (kernel/reboot.c).
        for name in ["poweroff", "reboot", "halt"] {
            self.symlink("../bin/busybox", &format!("/sbin/{name}"))?;
        }
        Ok(())
    }

    /// Sets what `/init` is told. The modules that were or will be added are
    /// put after those that it names.
    pub fn init_config(&mut self, config: &InitConfig) {
        self.config = Some(config.clone());
    }

    /// Makes the archive.
    pub fn build(mut self) -> Result<Initrd, Error> {
        let mut config = self.config.take().unwrap_or_default();
        config.modules.append(&mut self.modules);
        config.busybox_install |= self.busybox_install;
        let json = serde_json::to_vec_pretty(&config).map_err(|e| Error::Read {
            path: PathBuf::from(PATH),
            why: e.into(),
        })?;
        self.add_bytes(PATH, 0o644, json)?;

        let mut archive = Archive::new();
        for (path, entry) in self.entries {
            match entry {
                Entry::Dir { mode } => archive.dir(&path, mode)?,
                Entry::File { mode, content } => archive.file(&path, mode, content)?,
                Entry::Symlink { target } => archive.symlink(&target, &path)?,
                Entry::Node {
                    mode,
                    kind,
                    major,
                    minor,
                } => {
                    archive.node(&path, mode, kind, major, minor)?;
                }
            }
        }
        Ok(archive.finish())
    }

    /// Puts an entry at `path` after its parents.
    fn insert(&mut self, path: &str, entry: Entry) -> Result<(), Error> {
        let name = cpio::normalise(path).ok_or_else(|| cpio::Error::Path(path.to_owned()))?;
        let (parent, last) = match name.rsplit_once('/') {
            Some((parent, last)) => (self.real_dir(parent, path)?, last),
            None => (String::new(), name.as_str()),
        };
        let full = join(&parent, last);
        let replaces_dir = matches!(self.entries.get(&full), Some(Entry::Dir { .. }));
        if replaces_dir && !matches!(entry, Entry::Dir { .. }) {
            let prefix = format!("{full}/");
            if let Some(below) = self.entries.keys().find(|k| k.starts_with(&prefix)) {
                return Err(Error::Parent {
                    path: format!("/{below}"),
                    parent: path.to_owned(),
                });
            }
        }
        // A folder that is added where a link to one is goes where it points.
        if matches!(entry, Entry::Dir { .. })
            && matches!(self.entries.get(&full), Some(Entry::Symlink { .. }))
        {
            self.real_dir(&full, path)?;
            return Ok(());
        }
        self.entries.insert(full, entry);
        Ok(())
    }

    /// Follows symbolic links in `dir`, makes what is missing, and returns the
    /// real path.
    fn real_dir(&mut self, dir: &str, wanted: &str) -> Result<String, Error> {
        /// As many links as the kernel follows (`MAXSYMLINKS`).
        const LINKS_MAX: usize = 40;
        let bad = |parent: &str| Error::Parent {
            path: wanted.to_owned(),
            parent: format!("/{parent}"),
        };
        let mut todo: Vec<String> = dir.split('/').rev().map(str::to_owned).collect();
        let mut real = String::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    real = real
                        .rsplit_once('/')
                        .map(|(p, _)| p.to_owned())
                        .unwrap_or_default();
                    continue;
                }
                _ => {}
            }
            let here = join(&real, &part);
            match self.entries.get(&here) {
                Some(Entry::Dir { .. }) => real = here,
                Some(Entry::Symlink { target }) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(bad(&here));
                    }
                    if target.starts_with('/') {
                        real.clear();
                    }
                    todo.extend(target.split('/').rev().map(str::to_owned));
                }
                Some(_) => return Err(bad(&here)),
                None => {
                    self.entries
                        .insert(here.clone(), Entry::Dir { mode: 0o755 });
                    real = here;
                }
            }
        }
        Ok(real)
    }
}

fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() {
        name.to_owned()
    } else {
        format!("{parent}/{name}")
    }
}

fn metadata(path: &Path, link_itself: bool) -> Result<std::fs::Metadata, Error> {
    let meta = if link_itself {
        std::fs::symlink_metadata(path)
    } else {
        std::fs::metadata(path)
    };
    meta.map_err(|why| Error::Read {
        path: path.to_owned(),
        why,
    })
}

/// Reads small files at once, so that a tree of thousands does not keep
/// thousands of files open.
fn inline_small(path: &Path, source: Source) -> Result<Source, Error> {
    if source.len() > cpio::INLINE_MAX {
        return Ok(source);
    }
    let bytes = source
        .prefix(cpio::INLINE_MAX as usize)
        .map_err(|why| Error::Read {
            path: path.to_owned(),
            why,
        })?;
    Ok(Source::from_bytes(bytes))
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (std::fs::metadata(a), std::fs::metadata(b)) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}

fn device_numbers(rdev: u64) -> (u32, u32) {
    (rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

/// The files that /proc/<pid>/maps shows as mapped executable, each once.
fn mapped_executables(maps: &str) -> Vec<&str> {
    let mut files = Vec::new();
    for line in maps.lines() {
        // address perms offset dev inode path; the path may hold spaces.
        let mut rest = line;
        let mut fields = [""; 5];
        for field in &mut fields {
            let trimmed = rest.trim_start();
            let (word, tail) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
            (*field, rest) = (word, tail);
        }
        let path = rest.trim_start();
        if fields[1].contains('x') && path.starts_with('/') && !files.contains(&path) {
            files.push(path);
        }
    }
    files
}

#[cfg(test)]
#[path = "builder_test.rs"]
mod tests;
