//! Packages from the Debian archive, unpacked into folders of the lab's own.
//!
//! A private apt configuration with its own lists and an empty package
//! database leaves the machine's own alone and needs no root. Its sources are
//! the Debian mirrors that the machine uses already, at Debian 13 ("trixie"),
//! whatever release the machine itself runs; apt verifies the archive's
//! signature and every package's hash. The machine's apt settings, such as a
//! proxy, stay in force. `dpkg -x` unpacks, and nothing is installed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::cache::{Cache, count, progress, size};
use crate::error::{AtPath, Error, Result};
use crate::program;
use crate::sources::Archives;
use crate::targets::TARGETS;

/// The Debian release that everything is taken from.
pub const SUITE: &str = "trixie";
/// The names of the release in the archive, the preferred first: a mirror in
/// the midst of an update may have lists that do not fit under the one, and a
/// whole set under the other, which is the release's as long as it is Debian's
/// current one.
const NAMES: [&str; 2] = [SUITE, "stable"];
/// What Debian's archive keys are called on a Debian system.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// After this the package lists are fetched anew, before something new is got.
const LISTS_LIVE: Duration = Duration::from_hours(12);

/// What is to be unpacked together into one folder.
#[derive(Debug, Clone, Copy)]
pub struct Root<'a> {
    /// The folder's name in the cache; letters, digits and dashes.
    pub name: &'a str,
    /// Packages to unpack with everything that they depend on; each is `name`
    /// or `name:architecture`.
    pub closure: &'a [&'a str],
    /// Packages to unpack by themselves.
    pub alone: &'a [&'a str],
    /// Debian's name of the only architecture that the closure is of; this
    /// machine's when there is none.
    pub foreign: Option<&'a str>,
}

impl Root<'_> {
    /// The names of its packages, for people.
    fn packages(&self) -> String {
        [self.closure, self.alone].concat().join(" ")
    }
}

/// The Debian archive as the lab uses it.
#[derive(Debug)]
pub struct Archive<'a> {
    cache: &'a Cache,
}

/// A file that apt would fetch.
#[derive(Debug, PartialEq, Eq)]
struct Fetch {
    file: String,
    size: u64,
}

impl<'a> Archive<'a> {
    /// The archive, with what it fetched before in `cache`.
    pub fn new(cache: &'a Cache) -> Self {
        Self { cache }
    }

    /// Whether this machine can get packages this way at all.
    pub fn usable() -> bool {
        program::find("apt-get").is_some() && program::find("dpkg").is_some()
    }

    /// The folder that holds `root`'s packages, fetched and unpacked if they
    /// are not there yet.
    ///
    /// # Errors
    ///
    /// On a machine without apt or Debian sources, when a package is not to be
    /// had, or when a file cannot be written; each says what would help.
    pub fn root(&self, root: &Root) -> Result<PathBuf> {
        let dir = self.cache.path("roots").join(root.name);
        let wanted = format!(
            "{SUITE}\n{}\n{}\n{}\n",
            root.closure.join(" "),
            root.alone.join(" "),
            root.foreign.unwrap_or_default()
        );
        // Written last: a folder without it is not complete.
        let stamp = self
            .cache
            .path("roots")
            .join(format!("{}.stamp", root.name));
        if fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
            return Ok(dir);
        }
        let _lock = self.cache.lock("archive")?;
        if fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
            return Ok(dir);
        }
        let _ = fs::remove_file(&stamp);
        self.prepare()?;
        let files = self.fetch(root)?;
        progress(&format!(
            "unpacking {} ({})",
            root.name,
            count(files.len(), "package")
        ));
        let partial = self
            .cache
            .path("roots")
            .join(format!("{}.partial", root.name));
        for old in [&partial, &dir] {
            if old.exists() {
                fs::remove_dir_all(old).at(old)?;
            }
        }
        fs::create_dir_all(&partial).at(&partial)?;
        for file in &files {
            program::output(Command::new("dpkg").arg("-x").arg(file).arg(&partial))?;
        }
        fs::rename(&partial, &dir).at(&dir)?;
        fs::write(&stamp, wanted).at(&stamp)?;
        for file in &files {
            fs::remove_file(file).at(file)?;
        }
        Ok(dir)
    }

    /// The package that the meta package `name` (`linux-image-arm64:arm64`)
    /// stands for now, with its architecture: its first dependency whose name
    /// begins with `prefix`.
    ///
    /// # Errors
    ///
    /// As [`root`](Self::root), or when it depends on no such package.
    pub fn resolve(&self, name: &str, prefix: &str) -> Result<String> {
        let stamp = self.cache.folder("resolved")?.join(name.replace(':', "_"));
        if let Ok(known) = fs::read_to_string(&stamp) {
            return Ok(known);
        }
        let _lock = self.cache.lock("archive")?;
        self.prepare()?;
        let shown =
            program::output(
                self.apt("apt-cache", None)
                    .args(["show", "--no-all-versions", name]),
            )
            .map_err(|error| self.explain(error, name))?;
        let architecture = name.rsplit_once(':').map(|(_, a)| format!(":{a}"));
        let found = dependency(&shown, prefix).ok_or_else(|| {
            Error::said(format!(
                "Debian's package {name} depends on no {prefix}* package"
            ))
        })?;
        let found = format!("{found}{}", architecture.unwrap_or_default());
        fs::write(&stamp, &found).at(&stamp)?;
        Ok(found)
    }

    /// Fetches the packages of `root` and returns their files.
    fn fetch(&self, root: &Root) -> Result<Vec<PathBuf>> {
        let archives = self.cache.path("apt/archives");
        // apt does not name what lies there already, so nothing may.
        if archives.exists() {
            fs::remove_dir_all(&archives).at(&archives)?;
        }
        self.cache.folder("apt/archives/partial")?;
        // `install` puts the files into its archive folder, `download` into
        // the current one; both verify them.
        let ways: [(&[&str], &[&str], &[&str]); 2] = [
            (
                &["install", "--no-install-recommends", "--yes"],
                &["--download-only"],
                root.closure,
            ),
            (&["download"], &[], root.alone),
        ];
        let ways = ways.iter().filter(|(_, _, packages)| !packages.is_empty());
        let mut fetches = Vec::new();
        for (verb, _, packages) in ways.clone() {
            let listed = program::output(
                self.apt("apt-get", root.foreign)
                    .args(*verb)
                    .args(["--print-uris", "-qq"])
                    .args(*packages),
            )
            .map_err(|error| self.explain(error, &packages.join(" ")))?;
            let named = parse_uris(&listed);
            if named.is_empty() {
                return Err(Error::said(format!(
                    "apt names no files for {}",
                    packages.join(" ")
                )));
            }
            fetches.extend(named);
        }
        let total = fetches.iter().map(|f| f.size).sum();
        progress(&format!(
            "fetching {} from the Debian archive: {} ({}, {})",
            root.name,
            root.packages(),
            count(fetches.len(), "package"),
            size(total)
        ));
        for (verb, only, packages) in ways {
            program::output(
                self.apt("apt-get", root.foreign)
                    .current_dir(&archives)
                    .args(*verb)
                    .args(*only)
                    .arg("-qq")
                    .args(*packages),
            )
            .map_err(|error| self.explain(error, &packages.join(" ")))?;
        }
        fetches
            .iter()
            .map(|fetch| {
                let file = archives.join(&fetch.file);
                match fs::metadata(&file) {
                    Ok(meta) if meta.len() == fetch.size => Ok(file),
                    _ => Err(Error::said(format!(
                        "{}: apt did not fetch it in full",
                        file.display()
                    ))),
                }
            })
            .collect()
    }

    /// Writes the private configuration and sees that the lists are there.
    fn prepare(&self) -> Result<()> {
        if !Self::usable() {
            return Err(Error::said(
                "this machine has no apt-get, by which the lab gets what it needs; \
                 install QEMU 9 or newer (qemu-system-x86_64, qemu-system-aarch64), rustup or \
                 cross Rust standard libraries, and run the lab on Debian 12 or 13 for the rest",
            ));
        }
        let archives = Archives::read(Path::new("/etc/apt"));
        if archives.main.is_empty() {
            return Err(Error::said(
                "no Debian archive in this machine's apt configuration (/etc/apt/sources.list, \
                 /etc/apt/sources.list.d): the lab takes its packages from the one that the \
                 machine uses; run it on Debian, or add a Debian source signed by the \
                 debian-archive-keyring",
            ));
        }
        if !Path::new(KEYRING).exists() {
            return Err(Error::said(format!(
                "{KEYRING} is missing, by which packages are verified: install the package \
                 debian-archive-keyring"
            )));
        }
        let dir = self.cache.folder("apt")?;
        for folder in ["apt/lists/partial", "apt/none", "apt/dpkg"] {
            self.cache.folder(folder)?;
        }
        write_changed(&dir.join("dpkg/status"), "")?;
        let sources = dir.join("sources.list");
        let have = fs::read_to_string(&sources).unwrap_or_default();
        let known = NAMES.map(|name| source_lines(&archives, name));
        let mut new = !known.contains(&have)
            | write_changed(&self.configuration(None), &configuration(&dir, None))?;
        for target in &TARGETS {
            let only = Some(target.debian);
            new |= write_changed(&self.configuration(only), &configuration(&dir, only))?;
        }
        let stamp = dir.join("updated");
        let fresh = fs::metadata(&stamp)
            .and_then(|m| m.modified())
            .is_ok_and(|at| {
                SystemTime::now()
                    .duration_since(at)
                    .is_ok_and(|age| age < LISTS_LIVE)
            });
        if fresh && !new {
            return Ok(());
        }
        progress(&format!("fetching Debian's package lists ({SUITE})"));
        for lines in known {
            write_changed(&sources, &lines)?;
            match program::output(self.apt("apt-get", None).args(["update", "-qq"])) {
                Ok(_) if self.lists_are_of_the_suite()? => {
                    return fs::write(&stamp, "").at(&stamp);
                }
                Ok(_) => {}
                // What is missing shows itself in the next step.
                Err(error) => progress(&format!("package lists are incomplete: {error}")),
            }
        }
        Ok(())
    }

    /// Whether what the lists call themselves is the release, whatever name
    /// they were asked for by.
    fn lists_are_of_the_suite(&self) -> Result<bool> {
        let dir = self.cache.path("apt/lists");
        let files = fs::read_dir(&dir).at(&dir)?.flatten();
        let mut releases = files
            .map(|file| file.path())
            .filter(|path| path.to_string_lossy().ends_with("Release"))
            .peekable();
        Ok(releases.peek().is_some()
            && releases.all(|path| {
                let text = fs::read_to_string(path).unwrap_or_default();
                text.lines()
                    .any(|line| line.starts_with(&format!("Codename: {SUITE}")))
            }))
    }

    /// Adds to apt's own words what the lab wanted and what may help.
    fn explain(&self, error: Error, packages: &str) -> Error {
        let _ = fs::remove_file(self.cache.path("apt/updated"));
        Error::said(format!(
            "cannot get {packages} from the Debian archive: {error}\n\
             (the mirrors are those of /etc/apt; the lab's own lists are in {}, and are fetched \
             anew at the next try)",
            self.cache.path("apt").display()
        ))
    }

    fn configuration(&self, only: Option<&str>) -> PathBuf {
        let name = only.unwrap_or("all");
        self.cache.path(format!("apt/{name}.conf"))
    }

    fn apt(&self, program: &str, only: Option<&str>) -> Command {
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(self.configuration(only))
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// The private configuration: for this machine's architecture and all others,
/// or for one alone.
fn configuration(dir: &Path, only: Option<&str>) -> String {
    let dir = dir.display();
    let name = only.unwrap_or("all");
    let native = only.unwrap_or(debian_architecture());
    let others = match only {
        Some(_) => &[][..],
        None => &TARGETS,
    };
    let others = others.iter().map(|target| target.debian);
    let architectures: BTreeSet<&str> = others.chain([native]).collect();
    let architectures: String = architectures
        .iter()
        .map(|name| format!(" \"{name}\";"))
        .collect();
    // Read after the machine's own settings: those that would act on the
    // machine's own apt are taken back.
    format!(
        "#clear APT::Update::Pre-Invoke;\n\
             #clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n\
             #clear DPkg::Pre-Install-Pkgs;\n\
             #clear APT::Architectures;\n\
             #clear APT::Default-Release;\n\
             Dir::State \"{dir}\";\n\
             Dir::State::lists \"{dir}/lists\";\n\
             Dir::State::status \"{dir}/dpkg/status\";\n\
             Dir::State::extended_states \"{dir}/extended_states\";\n\
             Dir::Cache \"{dir}\";\n\
             Dir::Cache::archives \"{dir}/archives\";\n\
             Dir::Cache::pkgcache \"{dir}/{name}.pkgcache\";\n\
             Dir::Cache::srcpkgcache \"{dir}/{name}.srcpkgcache\";\n\
             Dir::Log \"{dir}\";\n\
             Dir::Etc::sourcelist \"{dir}/sources.list\";\n\
             Dir::Etc::sourceparts \"{dir}/none\";\n\
             Dir::Etc::preferences \"{dir}/none\";\n\
             Dir::Etc::preferencesparts \"{dir}/none\";\n\
             APT::Architecture \"{native}\";\n\
             APT::Architectures {{{architectures} }};\n\
             APT::Install-Recommends \"false\";\n\
             APT::Install-Suggests \"false\";\n\
             APT::Sandbox::User \"root\";\n\
             APT::Keep-Downloaded-Packages \"true\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::Retries \"3\";\n"
    )
}

/// What Debian calls the architecture of the machine that the lab runs on.
pub fn debian_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64el",
        other => other,
    }
}

fn source_lines(archives: &Archives, name: &str) -> String {
    let mut lines = String::new();
    let mut add = |uri: &String, suite: &str| {
        lines.push_str(&format!("deb [signed-by={KEYRING}] {uri} {suite} main\n"));
    };
    for uri in &archives.main {
        add(uri, name);
        add(uri, &format!("{name}-updates"));
    }
    for uri in &archives.security {
        add(uri, &format!("{name}-security"));
    }
    lines
}

/// Writes `text` unless the file holds it already; tells whether it wrote.
fn write_changed(path: &Path, text: &str) -> Result<bool> {
    if fs::read_to_string(path).is_ok_and(|have| have == text) {
        return Ok(false);
    }
    fs::write(path, text).at(path)?;
    Ok(true)
}

/// Reads `apt-get --print-uris`: `'URI' FILE SIZE HASH` on each line.
fn parse_uris(listed: &str) -> Vec<Fetch> {
    listed
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix('\'')?.split("' ").nth(1)?.split(' ');
            Some(Fetch {
                file: words.next()?.to_owned(),
                size: words.next()?.parse().ok()?,
            })
        })
        .collect()
}

/// The first package in a `Depends` field whose name begins with `prefix`.
fn dependency(shown: &str, prefix: &str) -> Option<String> {
    let depends = shown
        .lines()
        .find_map(|line| line.strip_prefix("Depends:"))?;
    depends
        .split([',', '|'])
        .filter_map(|one| one.split_whitespace().next())
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_apt_names() {
        let listed = "Reading\n\
            'http://m.example/debian/pool/main/a/acl/libacl1_2.3_amd64.deb' \
            libacl1_1%3a2.3_amd64.deb 32860 SHA256:00\n\
            'broken\n'http://x' only\n";
        assert_eq!(
            parse_uris(listed),
            [Fetch {
                file: "libacl1_1%3a2.3_amd64.deb".into(),
                size: 32860
            }]
        );
    }

    #[test]
    fn what_a_meta_package_stands_for() {
        let shown = "Package: linux-image-arm64\n\
            Depends: kmod, linux-image-6.12.1+deb13-arm64 (= 6.12.1-1), other | linux-image-x\n";
        assert_eq!(
            dependency(shown, "linux-image-").as_deref(),
            Some("linux-image-6.12.1+deb13-arm64")
        );
        assert_eq!(dependency(shown, "qemu"), None);
        assert_eq!(dependency("Package: x\n", "linux"), None);
    }

    #[test]
    fn sources_are_signed_and_of_one_release() {
        let archives = Archives {
            main: vec!["http://m.example/debian".into()],
            security: vec!["http://m.example/debian-security".into()],
        };
        let lines = source_lines(&archives, SUITE);
        assert_eq!(lines.lines().count(), 3);
        for line in lines.lines() {
            assert!(
                line.contains("signed-by=/") && line.contains(" trixie"),
                "{line}"
            );
        }
        assert!(lines.contains("debian-security trixie-security main"));
    }

    #[test]
    fn lists_say_what_release_they_are_of() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let lists = cache.folder("apt/lists").unwrap();
        let ours = || Archive::new(&cache).lists_are_of_the_suite().unwrap();
        assert!(!ours(), "there are none");
        let release = |name: &str, codename: &str| {
            let text = format!("Suite: stable\nCodename: {codename}\n");
            fs::write(lists.join(name), text).unwrap();
        };
        release("m_dists_stable_InRelease", "trixie");
        release("m_dists_stable-security_InRelease", "trixie-security");
        fs::write(lists.join("m_dists_stable_main_Packages"), "").unwrap();
        assert!(ours());
        release("m_dists_stable-updates_InRelease", "forky-updates");
        assert!(!ours());
    }

    #[test]
    fn a_complete_root_is_not_fetched_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let roots = cache.folder("roots/x").unwrap();
        fs::write(cache.path("roots/x.stamp"), "trixie\na b\nc\n\n").unwrap();
        let root = Root {
            name: "x",
            closure: &["a", "b"],
            alone: &["c"],
            foreign: None,
        };
        assert_eq!(Archive::new(&cache).root(&root).unwrap(), roots);
    }
}
