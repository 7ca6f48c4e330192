//! The modules of a kernel: names, dependencies and content.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use crate::compress::{self, Compression};
use crate::source::{OpenError, Source};

/// The most that a compressed module may decompress to, in bytes.
const MODULE_LIMIT: u64 = 128 << 20;

/// Why modules can't be found or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a modules folder nor a place that holds one.
    #[error(
        "{}: no kernel modules{}: give a folder such as /lib/modules/<release>, or where a \
         kernel package was unpacked{}",
        dir.display(),
        release.as_ref().map(|r| format!(" of Linux {r}")).unwrap_or_default(),
        if found.is_empty() { String::new() } else { format!(" (there are {})", found.join(", ")) }
    )]
    NoTree {
        /// What was given.
        dir: PathBuf,
        /// The release that was looked for.
        release: Option<String>,
        /// The releases that are there.
        found: Vec<String>,
    },
    /// A module that is neither there nor built into the kernel.
    #[error(
        "kernel module {name} is not in {}, and not built in{}",
        dir.display(),
        needed_by.as_ref().map(|n| format!(" ({n} needs it)")).unwrap_or_default()
    )]
    Missing {
        /// The module.
        name: String,
        /// The modules folder.
        dir: PathBuf,
        /// What depends on it, when it was not asked for by name.
        needed_by: Option<String>,
    },
    /// Modules that need each other.
    #[error("kernel module {name} in {} depends on itself", dir.display())]
    Cycle {
        /// One of them.
        name: String,
        /// The modules folder.
        dir: PathBuf,
    },
    /// A file or folder can't be read.
    #[error("{}: {why}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        why: io::Error,
    },
    /// A module can't be opened.
    #[error("{}: {why}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: OpenError,
    },
    /// A module can't be decompressed.
    #[error("{}: {why}", path.display())]
    Compression {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: compress::Error,
    },
    /// The modules of another kernel.
    #[error(
        "{}: modules of Linux {release}, but the kernel is Linux {kernel}: it would load none \
         of them",
        dir.display()
    )]
    WrongRelease {
        /// The modules folder.
        dir: PathBuf,
        /// Its release.
        release: String,
        /// The kernel's release.
        kernel: String,
    },
    /// A file that is no kernel module.
    #[error("{}: not a kernel module", path.display())]
    NotAModule {
        /// Which.
        path: PathBuf,
    },
}

/// A kernel's modules folder, `/lib/modules/<release>`, as installed or as
/// unpacked from a package.
#[derive(Debug)]
pub struct ModuleTree {
    dir: PathBuf,
    release: String,
    /// Paths relative to `dir` by name, with underscores.
    files: BTreeMap<String, PathBuf>,
    /// Direct or transitive dependencies, by name, from modules.dep; nothing
    /// when there is no such file and the modules themselves must be asked.
    deps: Option<BTreeMap<String, Vec<String>>>,
    builtin: BTreeSet<String>,
}

/// A module that is to be loaded.
#[derive(Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Its file's name without compression suffix, such as `virtio-rng.ko`.
    pub file_name: String,
    /// Its content, decompressed.
    pub content: Vec<u8>,
}

impl ModuleTree {
    /// Opens a modules folder: `/lib/modules/<release>` itself, a folder that
    /// holds such folders, or a root file system (an unpacked package) with
    /// them in `lib/modules` or `usr/lib/modules`. Where there are several,
    /// `release` chooses.
    pub fn open(path: impl AsRef<Path>, release: Option<&str>) -> Result<ModuleTree, Error> {
        let path = path.as_ref();
        if is_tree(path) {
            return ModuleTree::read(path.to_owned());
        }
        let mut found = BTreeMap::new();
        for base in [
            path.to_owned(),
            path.join("lib/modules"),
            path.join("usr/lib/modules"),
        ] {
            // A base that is not there, or not readable, has no trees.
            for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
                if is_tree(&entry.path()) {
                    found.insert(
                        entry.file_name().to_string_lossy().into_owned(),
                        entry.path(),
                    );
                }
            }
        }
        let chosen = match release {
            Some(release) => found.get(release),
            None if found.len() == 1 => found.values().next(),
            None => None,
        };
        match chosen {
            Some(dir) => ModuleTree::read(dir.clone()),
            None => Err(Error::NoTree {
                dir: path.to_owned(),
                release: release.map(str::to_owned),
                found: found.into_keys().collect(),
            }),
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kernel's release: the folder's name.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Checks that these are the modules of the kernel with release `kernel`,
    /// as [`KernelImage::release`](crate::KernelImage::release) tells it.
    pub fn require_release(&self, kernel: &str) -> Result<(), Error> {
        if self.release == kernel {
            return Ok(());
        }
        Err(Error::WrongRelease {
            dir: self.dir.clone(),
            release: self.release.clone(),
            kernel: kernel.to_owned(),
        })
    }

    /// Whether there is a file for the module.
    pub fn contains(&self, name: &str) -> bool {
        self.files.contains_key(&canonical(name))
    }

    /// Whether the kernel has the module built in.
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&canonical(name))
    }

    /// The modules that must be loaded for `names`, with all that they depend
    /// on, in load order, each once. Modules that are built in are left out.
    /// `virtio-blk` and `virtio_blk` are the same; a name that is no module may
    /// be an alias, such as `fs-ext4`, when there is a modules.alias.
    pub fn resolve<S: AsRef<str>>(&self, names: &[S]) -> Result<Vec<Module>, Error> {
        let mut walk = Walk {
            tree: self,
            done: BTreeSet::new(),
            doing: vec![],
            out: vec![],
        };
        for name in names {
            walk.visit(&canonical(name.as_ref()), Need::Asked)?;
        }
        Ok(walk.out)
    }

    /// Like [`resolve`](Self::resolve), leaving out names that the kernel does
    /// not have. What those that are there depend on must still be there.
    pub fn resolve_available<S: AsRef<str>>(&self, names: &[S]) -> Result<Vec<Module>, Error> {
        let there: Vec<&str> = names
            .iter()
            .map(AsRef::as_ref)
            .filter(|name| self.contains(name) || !self.by_alias(&canonical(name)).is_empty())
            .collect();
        self.resolve(&there)
    }

    fn read(dir: PathBuf) -> Result<ModuleTree, Error> {
        let canonical_dir = dir.canonicalize().unwrap_or_else(|_| dir.clone());
        let release = canonical_dir
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let builtin = read_optional(&dir.join("modules.builtin"))?.unwrap_or_default();
        let builtin = builtin
            .lines()
            .filter_map(|line| name_of(Path::new(line)))
            .collect();
        let mut files = BTreeMap::new();
        let deps = match read_optional(&dir.join("modules.dep"))? {
            Some(text) => {
                let mut deps = BTreeMap::new();
                for line in text.lines() {
                    let Some((file, needs)) = line.split_once(':') else {
                        continue;
                    };
                    let Some(name) = name_of(Path::new(file)) else {
                        continue;
                    };
                    files.insert(name.clone(), PathBuf::from(file));
                    // depmod lists what must be loaded first last.
                    let needs = needs.split_whitespace().rev();
                    deps.insert(name, needs.filter_map(|p| name_of(Path::new(p))).collect());
                }
                Some(deps)
            }
            None => {
                walk_files(&dir, Path::new(""), &mut files, 0)?;
                None
            }
        };
        Ok(ModuleTree {
            dir,
            release,
            files,
            deps,
            builtin,
        })
    }

    /// Modules whose alias patterns in modules.alias match.
    fn by_alias(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.join("modules.alias")).unwrap_or_default();
        let mut found = Vec::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if let (Some("alias"), Some(pattern), Some(module)) =
                (words.next(), words.next(), words.next())
                && matches(canonical(pattern).as_bytes(), name.as_bytes())
                && self.contains(module)
            {
                found.push(canonical(module));
            }
        }
        found
    }

    fn load(&self, name: &str, file: &Path) -> Result<(Module, ModInfo), Error> {
        let path = self.dir.join(file);
        let source = Source::open(&path).map_err(|why| Error::Open {
            path: path.clone(),
            why,
        })?;
        let read = |why| Error::Read {
            path: path.clone(),
            why,
        };
        let start = source.prefix(16).map_err(read)?;
        let content = match Compression::detect(&start) {
            Some(how) => how
                .decompress(source.reader(0), MODULE_LIMIT)
                .map_err(|why| Error::Compression {
                    path: path.clone(),
                    why,
                })?,
            None => {
                let size = usize::try_from(source.len().min(MODULE_LIMIT)).unwrap_or(usize::MAX);
                source.prefix(size).map_err(read)?
            }
        };
        let info =
            ModInfo::parse(&content).ok_or_else(|| Error::NotAModule { path: path.clone() })?;
        let file_name = file.file_name().unwrap_or_default().to_string_lossy();
        let file_name = match file_name.find(".ko") {
            Some(at) => file_name.get(..at + 3).unwrap_or(&file_name).to_owned(),
            None => file_name.into_owned(),
        };
        Ok((
            Module {
                name: name.to_owned(),
                file_name,
                content,
            },
            info,
        ))
    }
}

/// Why a module is visited.
enum Need<'a> {
    Asked,
    By(&'a str),
    /// By a softdep: nothing happens when it is not there.
    Soft,
}

/// A depth-first walk over dependencies.
struct Walk<'a> {
    tree: &'a ModuleTree,
    done: BTreeSet<String>,
    doing: Vec<String>,
    out: Vec<Module>,
}

impl Walk<'_> {
    fn visit(&mut self, name: &str, need: Need<'_>) -> Result<(), Error> {
        if self.done.contains(name) {
            return Ok(());
        }
        let soft = matches!(need, Need::Soft);
        if self.doing.iter().any(|n| n == name) {
            // Softdeps that point back are common, and harmless.
            let dir = self.tree.dir.clone();
            return if soft {
                Ok(())
            } else {
                Err(Error::Cycle {
                    name: name.to_owned(),
                    dir,
                })
            };
        }
        let Some(file) = self.tree.files.get(name) else {
            if self.tree.builtin.contains(name) {
                return Ok(());
            }
            let aliased = self.tree.by_alias(name);
            if aliased.is_empty() && !soft {
                return Err(Error::Missing {
                    name: name.to_owned(),
                    dir: self.tree.dir.clone(),
                    needed_by: match need {
                        Need::By(who) => Some(who.to_owned()),
                        Need::Asked | Need::Soft => None,
                    },
                });
            }
            for module in aliased {
                self.visit(&module, Need::Soft)?;
            }
            return Ok(());
        };
        let (module, info) = self.tree.load(name, file)?;
        self.doing.push(name.to_owned());
        for before in &info.soft_before {
            self.visit(before, Need::Soft)?;
        }
        let listed = self.tree.deps.as_ref().and_then(|deps| deps.get(name));
        for dependency in listed.unwrap_or(&info.depends) {
            self.visit(dependency, Need::By(name))?;
        }
        self.doing.pop();
        self.done.insert(name.to_owned());
        self.out.push(module);
        for after in &info.soft_after {
            self.visit(after, Need::Soft)?;
        }
        Ok(())
    }
}

/// What a module says about itself in its `.modinfo` section: NUL-terminated
/// `key=value` strings (include/linux/module.h, `MODULE_INFO`).
#[derive(Debug, Default, PartialEq, Eq)]
struct ModInfo {
    depends: Vec<String>,
    soft_before: Vec<String>,
    soft_after: Vec<String>,
}

impl ModInfo {
    fn parse(module: &[u8]) -> Option<ModInfo> {
        use object::{Object, ObjectSection};
        let file = object::File::parse(module).ok()?;
        let section = file.section_by_name(".modinfo")?;
        let mut info = ModInfo::default();
        for item in section.data().ok()?.split(|&b| b == 0) {
            let Some((key, value)) = std::str::from_utf8(item).ok()?.split_once('=') else {
                continue;
            };
            match key {
                "depends" => {
                    let names = value.split(',').map(str::trim).filter(|n| !n.is_empty());
                    info.depends.extend(names.map(canonical));
                }
                "softdep" => {
                    let mut before = true;
                    for word in value.split_whitespace() {
                        match word {
                            "pre:" => before = true,
                            "post:" => before = false,
                            name if before => info.soft_before.push(canonical(name)),
                            name => info.soft_after.push(canonical(name)),
                        }
                    }
                }
                _ => {}
            }
        }
        Some(info)
    }
}

/// A module's name as the kernel has it: dashes are underscores.
pub(super) fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The module name of a file such as `kernel/fs/ext4/ext4.ko.xz`.
pub(super) fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|e| file.strip_suffix(e))?;
    (!stem.is_empty()).then(|| canonical(stem))
}

fn is_tree(dir: &Path) -> bool {
    ["kernel", "modules.dep", "modules.builtin", "modules.order"]
        .iter()
        .any(|name| dir.join(name).exists())
}

fn read_optional(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(why) => Err(Error::Read {
            path: path.to_owned(),
            why,
        }),
    }
}

/// Collects module files below `dir`. Symbolic links (`build`, `source`) are
/// not followed.
fn walk_files(
    dir: &Path,
    below: &Path,
    files: &mut BTreeMap<String, PathBuf>,
    depth: usize,
) -> Result<(), Error> {
    /// Deeper than any kernel's tree.
    const DEPTH_MAX: usize = 32;
    let here = dir.join(below);
    let read = |why| Error::Read {
        path: here.clone(),
        why,
    };
    for entry in std::fs::read_dir(&here).map_err(read)? {
        let entry = entry.map_err(read)?;
        let kind = entry.file_type().map_err(read)?;
        let path = below.join(entry.file_name());
        if kind.is_dir() && depth < DEPTH_MAX {
            walk_files(dir, &path, files, depth + 1)?;
        } else if kind.is_file()
            && let Some(name) = name_of(&path)
            // depmod's default: what is in updates/ comes first.
            && (path.starts_with("updates") || !files.contains_key(&name))
        {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// Shell pattern matching with `*`, `?` and `[...]`, as module aliases use it.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    // The position after the last star, and the text that it is tried at.
    let mut retry: Option<(&[u8], &[u8])> = None;
    let (mut pattern, mut text) = (pattern, text);
    loop {
        match (pattern.split_first(), text.split_first()) {
            (Some((b'*', rest)), _) => {
                retry = Some((rest, text));
                pattern = rest;
                continue;
            }
            (None, None) => return true,
            (Some((&p, rest)), Some((&t, text_rest))) => {
                if let Some(after) = one_matches(p, rest, t) {
                    (pattern, text) = (after, text_rest);
                    continue;
                }
            }
            _ => {}
        }
        // Let the last star take one more character.
        match retry {
            Some((after_star, from)) if !from.is_empty() => {
                let from = from.get(1..).unwrap_or_default();
                retry = Some((after_star, from));
                (pattern, text) = (after_star, from);
            }
            _ => return false,
        }
    }
}

/// Matches one character against the pattern element that begins with `first`;
/// the pattern after it when it does.
fn one_matches(first: u8, rest: &[u8], c: u8) -> Option<&[u8]> {
    match first {
        b'?' => Some(rest),
        b'[' => {
            let end = rest.iter().position(|&b| b == b']')?;
            let (set, after) = (rest.get(..end)?, rest.get(end + 1..)?);
            let mut set = set;
            loop {
                match set {
                    [low, b'-', high, more @ ..] => {
                        if (*low..=*high).contains(&c) {
                            return Some(after);
                        }
                        set = more;
                    }
                    [one, more @ ..] => {
                        if *one == c {
                            return Some(after);
                        }
                        set = more;
                    }
                    [] => return None,
                }
            }
        }
        other => (other == c).then_some(rest),
    }
}

#[cfg(test)]
#[path = "modules_test.rs"]
pub(super) mod tests;
