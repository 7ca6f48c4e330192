//! What a test finds in the lab machine: the binary under test, kernels, a
//! folder of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;

use crate::check::{At, Result, ensure, fail};
use crate::crossvisor::{Crossvisor, Transcript};
use crate::machines::{Arch, Machine};
use crate::pattern;

/// Where the lab puts the tests.
const TESTS: &str = "/tests";

/// Words by which Linux leaves out what it tests of its own ciphers and of its
/// source of randomness, and what it does against leaks that emulated processors
/// do not have (Linux `Documentation/admin-guide/kernel-parameters`): a fifth of
/// a boot and more where the guest is emulated twice over, and nothing of the
/// VMM's.
const UNTESTED: &str = "cryptomgr.notests initcall_blacklist=jent_mod_init mitigations=off";

/// The format of the stock kernel with nothing in it to decompress, which the
/// lab makes where that takes longer than the rest of a boot.
const STORED: &str = "image-stored";

/// `assets/manifest.json`, as the lab writes it.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    /// Name of the lab machine.
    pub machine: String,
    /// Its architecture, and so the guests'.
    pub arch: String,
    /// The stock kernel for guests, as packaged.
    pub kernel: PathBuf,
    /// The same kernel by name of format.
    #[serde(default)]
    pub kernel_formats: BTreeMap<String, PathBuf>,
    /// The modules folder of that kernel.
    pub modules: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// A Debian root file system: a disk or an image.
    #[serde(default)]
    pub rootfs: Option<PathBuf>,
}

/// What a test works with.
#[derive(Debug)]
pub struct Lab {
    /// What the lab put here.
    pub manifest: Manifest,
    /// The binary under test.
    pub crossvisor: PathBuf,
    /// This binary, which guests run too; see [`crate::inside`].
    pub tool: PathBuf,
    /// A folder of the test's own, removed after it.
    work: PathBuf,
    transcripts: Mutex<Vec<Transcript>>,
}

impl Lab {
    /// Reads the manifest in the folder that `CROSSVISOR_TESTS` names, or the
    /// usual one.
    pub fn open() -> Result<Self> {
        let tests = std::env::var_os("CROSSVISOR_TESTS").unwrap_or_else(|| TESTS.into());
        Self::in_folder(Path::new(&tests))
    }

    /// Reads the manifest of the tests in `tests`.
    pub fn in_folder(tests: &Path) -> Result<Self> {
        let path = tests.join("assets/manifest.json");
        let json = fs::read(&path).at(path.display().to_string())?;
        Ok(Self {
            manifest: serde_json::from_slice(&json).at(path.display().to_string())?,
            crossvisor: tests.join("crossvisor"),
            tool: std::env::current_exe().at("/proc/self/exe")?,
            work: std::env::temp_dir().join(format!("crossvisor-tests.{}", std::process::id())),
            transcripts: Mutex::default(),
        })
    }

    /// The lab machine.
    pub fn machine(&self) -> Machine<'_> {
        Machine {
            name: &self.manifest.machine,
        }
    }

    /// What the machine's guests are like.
    pub fn guests(&self) -> Result<&'static Arch> {
        let guests = self.machine().guests();
        guests.map_or_else(
            || fail(format!("no row for {} in machines.rs", self.manifest.arch)),
            Ok,
        )
    }

    /// Prepares for the next test: an empty folder, no transcripts.
    pub fn begin(&self) -> Result {
        self.end();
        fs::create_dir_all(&self.work).at(self.work.display().to_string())
    }

    /// Removes what the last test left.
    pub fn end(&self) {
        self.lock().clear();
        // What can't be removed is found by the next `begin`.
        let _ = fs::remove_dir_all(&self.work);
    }

    /// Whether the guests' architecture is `arch`.
    pub fn is(&self, arch: &str) -> bool {
        self.manifest.arch == arch
    }

    /// `crossvisor` with arguments of the test's choice.
    pub fn crossvisor<S: AsRef<str>>(&self, arguments: &[S]) -> Crossvisor<'_> {
        Crossvisor::new(self).args(arguments)
    }

    /// The stock kernel in the format that boots soonest.
    pub fn kernel(&self) -> &Path {
        let stored = self.manifest.kernel_formats.get(STORED);
        stored.unwrap_or(&self.manifest.kernel)
    }

    /// `crossvisor run` with the stock kernel and its modules.
    pub fn run(&self) -> Crossvisor<'_> {
        self.run_kernel(self.kernel())
    }

    /// The same without the kernel's messages on the console, which take longer
    /// than all the rest of a boot.
    pub fn run_quietly(&self) -> Crossvisor<'_> {
        self.run().args(&["--cmdline", "quiet"])
    }

    /// `crossvisor run` with `kernel` and the stock kernel's modules, and
    /// without the kernel's tests of its own ciphers.
    pub fn run_kernel(&self, kernel: &Path) -> Crossvisor<'_> {
        let (kernel, modules) = (text(kernel), text(&self.manifest.modules));
        let more = self.machine().guests().map_or("", |arch| arch.cmdline);
        let words = format!("{UNTESTED} {more}");
        self.crossvisor(&["run", &kernel, "--modules", &modules])
            .args(&["--cmdline", words.trim_end()])
    }

    /// The argument that puts this binary into a guest as `tool`.
    pub fn tool_argument(&self) -> String {
        format!("{}:/bin/tool", self.tool.display())
    }

    /// A path in the test's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.work.join(name)
    }

    /// A file in the test's folder with `bytes` in it.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, bytes).at(path.display().to_string())?;
        Ok(path)
    }

    /// A disk image of `size` bytes that holds the pattern of `seed`.
    pub fn image(&self, name: &str, seed: u64, size: usize) -> Result<PathBuf> {
        self.file(name, &pattern::bytes(seed, size))
    }

    /// A disk image of `size` bytes that holds nothing.
    pub fn empty_image(&self, name: &str, size: u64) -> Result<PathBuf> {
        let path = self.path(name);
        let file = fs::File::create(&path).at(path.display().to_string())?;
        file.set_len(size).at(path.display().to_string())?;
        Ok(path)
    }

    /// Runs a shell command on the host, which must succeed; returns what it
    /// printed.
    pub fn host(&self, command: &str) -> Result<String> {
        let out = Command::new("/bin/sh").arg("-c").arg(command).output();
        let out = out.at(command)?;
        let printed = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure(out.status.success(), || {
            let errors = String::from_utf8_lossy(&out.stderr);
            format!(
                "on the host: `{command}`: {}\n{printed}{errors}",
                out.status
            )
        })?;
        Ok(printed)
    }

    /// Remembers a run of crossvisor, to be printed when the test fails.
    pub fn remember(&self, transcript: Transcript) {
        self.lock().push(transcript);
    }

    /// What every run of crossvisor in this test printed, for people.
    pub fn transcripts(&self) -> String {
        self.lock().iter().map(Transcript::text).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Transcript>> {
        self.transcripts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Puts something back when a test is over, however it ends.
pub struct Restore<F: FnMut()>(F);

impl<F: FnMut()> Restore<F> {
    /// Calls `back` at the end of the value's life.
    pub fn with(back: F) -> Self {
        Self(back)
    }
}

impl<F: FnMut()> Drop for Restore<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A lab of which no file is there, and the folder that it is in.
    pub fn without_files() -> (tempfile::TempDir, Lab) {
        let folder = tempfile::tempdir().unwrap();
        let assets = folder.path().join("assets");
        fs::create_dir(&assets).unwrap();
        let manifest = r#"{"machine":"m","arch":"a","kernel":"","modules":"/m","busybox":""}"#;
        fs::write(assets.join("manifest.json"), manifest).unwrap();
        let lab = Lab::in_folder(folder.path()).unwrap();
        (folder, lab)
    }

    #[test]
    fn words_for_the_kernel_are_gathered() {
        let (_folder, lab) = without_files();
        let run = lab
            .run_kernel(Path::new("/k"))
            .args(&["--cmdline", "quiet", "--cpus", "2"]);
        let shown = run.shown();
        let words = format!("--modules /m --cmdline '{UNTESTED} quiet' --cpus 2");
        assert!(shown.ends_with(&words), "{shown}");
    }

    #[test]
    fn the_lab_s_manifest_is_read() {
        let json = r#"{"machine":"aarch64-16k","arch":"aarch64","kernel":"/k",
            "kernel_formats":{"image":"/k","gzip":"/g"},"modules":"/m/6.12",
            "busybox":"/bin/busybox","rootfs":null,"later":[1]}"#;
        let manifest: Manifest = serde_json::from_str(json).unwrap();
        assert_eq!(manifest.machine, "aarch64-16k");
        assert_eq!(manifest.kernel_formats.len(), 2);
        assert_eq!(manifest.rootfs, None);
    }
}
