//! Rust for every target: the standard library, a linker, clippy.
//!
//! In this order: what the user's own toolchain has; what rustup adds; Debian's
//! compiler with its standard libraries, unpacked into the lab's cache. What is
//! built is static, so that it runs in a lab machine that holds nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::archive::{Archive, Root};
use crate::cache::{Cache, progress};
use crate::error::{AtPath, Error, Result};
use crate::program;
use crate::targets::Target;
use crate::unpacked::{Programs, quote};

/// How long `rustup target add` may take before the lab goes another way.
const RUSTUP_PATIENCE: Duration = Duration::from_secs(180);

/// How to call cargo for one target.
#[derive(Debug)]
pub struct Toolchain {
    target: &'static Target,
    environment: Vec<(String, String)>,
    lint: Lint,
}

/// Which clippy sees the target's standard library.
#[derive(Debug)]
enum Lint {
    /// `cargo clippy` of the user's toolchain.
    Own,
    /// Debian's clippy-driver, of the same version as Debian's compiler.
    Driver(PathBuf),
    /// The user's toolchain has no clippy.
    Missing,
}

impl Toolchain {
    /// Finds or gets what building for `target` needs.
    ///
    /// # Errors
    ///
    /// When no way leads to a standard library or a linker.
    pub fn get(cache: &Cache, target: &'static Target) -> Result<Self> {
        let archive = Archive::new(cache);
        let mut environment = Vec::new();
        let lint = if has_std(target) || add_std(target) {
            if program::output(Command::new(cargo()).args(["clippy", "--version"])).is_ok() {
                Lint::Own
            } else {
                Lint::Missing
            }
        } else {
            let (rustc, driver) = debian_rust(cache, &archive, target)?;
            environment.push(("RUSTC".to_owned(), rustc.display().to_string()));
            Lint::Driver(driver)
        };
        let mut flags = "-C target-feature=+crt-static".to_owned();
        if !(target.is_native() && links_statically()) {
            let linker = linker(cache, &archive, target)?;
            environment.push((variable(target, "LINKER"), linker.display().to_string()));
            flags.push_str(" -C linker-flavor=ld");
        }
        environment.push((variable(target, "RUSTFLAGS"), flags));
        Ok(Self {
            target,
            environment,
            lint,
        })
    }

    /// Builds the binaries of `packages` in release mode and returns the folder
    /// that they are in.
    ///
    /// # Errors
    ///
    /// When cargo fails; what it printed stands on standard error.
    pub fn build(&self, packages: &[&str]) -> Result<PathBuf> {
        progress(&format!(
            "building {} for {}",
            packages.join(", "),
            self.target.arch
        ));
        let mut command = self.cargo("build");
        command.args(["--release", "--quiet"]);
        for package in packages {
            command.args(["--package", package]);
        }
        program::run(&mut command)?;
        Ok(target_dir().join(self.target.triple).join("release"))
    }

    /// Runs clippy for the whole workspace with warnings denied. Returns false
    /// where there is no clippy to run.
    ///
    /// # Errors
    ///
    /// When clippy has something to say; it stands on standard error.
    pub fn clippy(&self) -> Result<bool> {
        let mut command = match &self.lint {
            Lint::Missing => return Ok(false),
            Lint::Own => self.cargo("clippy"),
            Lint::Driver(driver) => {
                // As cargo-clippy itself does it.
                let mut command = self.cargo("check");
                command
                    .env("RUSTC_WORKSPACE_WRAPPER", driver)
                    .env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
                command
            }
        };
        command.args(["--workspace", "--all-targets", "--quiet"]);
        if matches!(self.lint, Lint::Own) {
            command.args(["--", "-D", "warnings"]);
        }
        program::run(&mut command)?;
        Ok(true)
    }

    /// `cargo test` for the whole workspace but the lab itself, which is a
    /// program of this machine. The tests are run by `emulator`.
    pub fn test(&self, emulator: &Path) -> Command {
        let mut command = self.cargo("test");
        command
            .args(["--workspace", "--exclude", env!("CARGO_PKG_NAME")])
            .env(variable(self.target, "RUNNER"), emulator);
        command
    }

    fn cargo(&self, verb: &str) -> Command {
        let mut command = Command::new(cargo());
        command
            .arg(verb)
            .args(["--target", self.target.triple])
            .current_dir(workspace())
            // These would replace the target's own flags.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }
}

/// Cargo's variable for a setting of `target`.
fn variable(target: &Target, setting: &str) -> String {
    let triple = target.triple.to_uppercase().replace('-', "_");
    format!("CARGO_TARGET_{triple}_{setting}")
}

/// The cargo that started the lab.
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// The folder of the workspace.
pub fn workspace() -> &'static Path {
    let ci = Path::new(env!("CARGO_MANIFEST_DIR"));
    ci.parent().unwrap_or(ci)
}

/// The folder that cargo builds into.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}

/// Whether the user's compiler has the target's standard library.
fn has_std(target: &Target) -> bool {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    program::output(
        Command::new(rustc)
            .args(["--print", "target-libdir", "--target", target.triple])
            .current_dir(workspace()),
    )
    .ok()
    .and_then(|dir| fs::read_dir(dir.trim()).ok())
    .is_some_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libstd-") && name.ends_with(".rlib")
        })
    })
}

/// Has rustup add the target's standard library; false when that fails.
fn add_std(target: &Target) -> bool {
    if std::env::var_os("RUSTC").is_some() || program::find("rustup").is_none() {
        return false;
    }
    progress(&format!(
        "adding Rust's standard library for {} to your toolchain (rustup target add {})",
        target.arch, target.triple
    ));
    let Ok(mut child) = Command::new("rustup")
        .args(["target", "add", target.triple])
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
    else {
        return false;
    };
    let deadline = Instant::now() + RUSTUP_PATIENCE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success() && has_std(target),
            Ok(None) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return false;
            }
        }
    }
}

/// Debian's compiler and clippy-driver, with the standard libraries of the
/// target and of this machine (for build scripts), as scripts to be run.
fn debian_rust(cache: &Cache, archive: &Archive, target: &Target) -> Result<(PathBuf, PathBuf)> {
    if !Archive::usable() {
        return Err(Error::said(format!(
            "Rust's standard library for {0} is missing: run `rustup target add {0}`",
            target.triple
        )));
    }
    let rust = archive.root(&Root {
        name: "rust",
        closure: &["rust-web-clippy", "libstd-rust-web-dev"],
        alone: &["rustc-web"],
        foreign: None,
    })?;
    let programs = Programs::new(rust.clone())?;
    if !target.is_native() {
        let package = format!("libstd-rust-web-dev:{}", target.debian);
        let std = archive.root(&Root {
            name: &format!("rust-std-{}", target.debian),
            closure: &[],
            alone: &[&package],
            foreign: None,
        })?;
        let link = rust.join("usr/lib/rustlib").join(target.triple);
        let std = std.join("usr/lib/rustlib").join(target.triple);
        if !link.exists() {
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(&std, &link).at(&link)?;
        }
    }
    let scripts = cache.folder("scripts")?;
    let sysroot = quote(&rust.join("usr").display().to_string());
    let rustc = scripts.join("rustc");
    programs.script(
        &rustc,
        "usr/bin/rustc",
        "",
        &format!("--sysroot {sysroot} \"$@\""),
    )?;
    let driver = scripts.join("clippy-driver");
    programs.script(
        &driver,
        "usr/bin/clippy-driver",
        "",
        &format!("\"$@\" --sysroot {sysroot}"),
    )?;
    Ok((rustc, driver))
}

/// Whether this machine's C compiler finds a static C library.
fn links_statically() -> bool {
    program::output(Command::new("cc").arg("-print-file-name=libc.a"))
        .is_ok_and(|path| Path::new(path.trim()).is_absolute())
}

/// A linker for `target`, as a script to be run: GNU ld with the start-up
/// files and libraries of Debian's C library.
fn linker(cache: &Cache, archive: &Archive, target: &Target) -> Result<PathBuf> {
    let programs = Programs::new(archive.root(&Root {
        name: &format!("binutils-{}", target.debian),
        closure: &[target.binutils],
        alone: &[],
        foreign: None,
    })?)?;
    let (libc, libgcc) = (
        format!("libc6-dev:{}", target.debian),
        format!("libgcc-14-dev:{}", target.debian),
    );
    let sysroot = archive.root(&Root {
        name: &format!("libc-{}", target.debian),
        closure: &[],
        alone: &[&libc, &libgcc],
        foreign: None,
    })?;
    let script = cache.folder("scripts")?.join(format!("ld-{}", target.arch));
    let sysroot_word = quote(&sysroot.display().to_string());
    let gnu = target.gnu;
    // rustc calls a plain linker without the C start-up files. Which ones
    // depends on whether the executable can be loaded anywhere. What is meant
    // for ld by way of a C compiler (.cargo/config.toml) comes without the
    // compiler's prefix.
    let before = format!(
        "root={sysroot_word}\n\
         lib=$root/usr/lib/{gnu}\n\
         gcc=$root/usr/lib/gcc/{gnu}/14\n\
         start=$lib/crt1.o begin=$gcc/crtbeginT.o end=$gcc/crtend.o\n\
         for word; do\n    case $word in\n    -pie|-static-pie) \
         start=$lib/rcrt1.o begin=$gcc/crtbeginS.o end=$gcc/crtendS.o;;\n    esac\n    \
         shift\n    set -- \"$@\" \"${{word#-Wl,}}\"\ndone\n"
    );
    programs.script(
        &script,
        &format!("usr/bin/{gnu}-ld.bfd"),
        &before,
        "--sysroot=\"$root\" \"$start\" \"$lib/crti.o\" \"$begin\" \"$@\" \
         -L\"$lib\" -L\"$gcc\" --start-group -lgcc -lgcc_eh -lc --end-group \
         \"$end\" \"$lib/crtn.o\"",
    )?;
    Ok(script)
}
