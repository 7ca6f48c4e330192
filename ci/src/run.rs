//! `cargo lab run`: crossvisor, built and run, on this machine's /dev/kvm or in
//! a lab machine.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitStatus};

use crossvisor_boot::initramfs::InitConfig;

use crate::cache::{Cache, progress};
use crate::emulator::Kind;
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::l1::{Changes, Clocks, Disk, Parts, Start, Stdio};
use crate::machines::Machine;
use crate::targets::Target;
use crate::toolchain::Toolchain;
use crate::unpacked::quote;

/// What a guest tells of itself when there is no terminal for a shell.
const REPORT: &str = "echo \"kernel   $(uname -srm)\"\n\
    echo \"cpus     $(nproc)\"\n\
    echo \"memory   $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB\"\n\
    echo \"devices  $(for d in /sys/bus/virtio/devices/*; do \
    basename $(readlink $d/driver || echo none); done 2>/dev/null | sort | tr '\\n' ' ')\"\n";

/// Runs `crossvisor run` with `arguments` and returns its exit status.
///
/// # Errors
///
/// When something that it takes can't be had or built, or when the lab machine
/// ends without a word.
pub fn run(
    cache: &Cache,
    target: &'static Target,
    machine: Option<&'static Machine>,
    arguments: &[String],
) -> Result<i32> {
    let mut arguments = arguments.to_vec();
    let emulated = match machine {
        Some(machine) => machine,
        None => Machine::of(target)?,
    };
    let terminal =
        io::stdin().is_terminal() && io::stdout().is_terminal() && emulated.emulator.has_terminal();
    if !terminal && !given(&arguments, "--exec") && !given(&arguments, "--initrd") {
        arguments.push("--exec".to_owned());
        arguments.push(REPORT.to_owned());
    }
    let binary = Toolchain::get(cache, target)?
        .build(&["crossvisor"])?
        .join("crossvisor");
    if machine.is_none() && target.is_native() {
        match direct(&binary) {
            Ok(()) => return run_here(cache, target, &binary, &arguments),
            Err(reason) => progress(&format!("{reason}; so crossvisor runs in a lab machine")),
        }
    }
    run_in(cache, emulated, &binary, &arguments, terminal)
}

/// Whether this machine's /dev/kvm can run stock kernels, as `crossvisor
/// doctor` finds; the reason when it can't.
fn direct(binary: &Path) -> std::result::Result<(), String> {
    // Its exit status only repeats what the report says.
    let output = Command::new(binary)
        .args(["doctor", "--json"])
        .stdin(process::Stdio::null())
        .output()
        .map_err(|error| format!("crossvisor doctor: {error}"))?;
    verdict(&output.stdout)
}

/// Whether the report of `crossvisor doctor --json` says that stock kernels
/// run; its reason when it does not.
fn verdict(report: &[u8]) -> std::result::Result<(), String> {
    let report: serde_json::Value = serde_json::from_slice(report)
        .map_err(|error| format!("crossvisor doctor --json: {error}"))?;
    if report.get("runs_stock_kernels") == Some(&serde_json::Value::Bool(true)) {
        return Ok(());
    }
    let reason = report.get("reason").and_then(serde_json::Value::as_str);
    Err(reason.map_or_else(
        || "this machine's /dev/kvm can't run stock kernels".to_owned(),
        str::to_owned,
    ))
}

/// Runs crossvisor on this machine, with a Debian kernel unless one is given.
fn run_here(cache: &Cache, target: &Target, binary: &Path, arguments: &[String]) -> Result<i32> {
    let mut command = Command::new(binary);
    command.arg("run");
    if !names_kernel(arguments) {
        let kernel = Kernel::get(cache, Machine::of(target)?.guest_kernel, target)?;
        command.arg(&kernel.image);
        if !given(arguments, "--modules") {
            command.arg("--modules").arg(&kernel.modules);
        }
    }
    let status = command
        .args(arguments)
        .status()
        .map_err(|source| Error::Start {
            program: binary.display().to_string(),
            source,
        })?;
    status
        .code()
        .ok_or_else(|| Error::said(format!("crossvisor ended by {status}")))
}

/// Runs crossvisor in a lab machine.
fn run_in(
    cache: &Cache,
    machine: &'static Machine,
    binary: &Path,
    arguments: &[String],
    terminal: bool,
) -> Result<i32> {
    let parts = Parts::get(cache, machine)?;
    let scratch = tempfile::tempdir()
        .map_err(|error| Error::said(format!("a folder for temporary files: {error}")))?;
    let carried = carry(arguments, &machine.emulator);
    let mut initramfs = parts.initramfs(binary)?;
    for (host, path) in &carried.files {
        initramfs.add(host, path)?;
    }
    let stdio = if terminal {
        Stdio::Console
    } else {
        Stdio::Streams(scratch.path().join("console"))
    };
    let words: Vec<String> = carried.arguments.iter().map(|word| quote(word)).collect();
    let command = format!("exec crossvisor run {}", words.join(" "));
    let config = InitConfig {
        terminal: terminal_size(),
        ..parts.init(command, &stdio, &carried.disks)
    };
    let image = scratch.path().join("initramfs");
    initramfs.write(&config, &image)?;
    progress(&format!(
        "starting {}: {} in {}, {}",
        machine.name,
        machine.about,
        machine.emulator.name(),
        parts.kernel.release
    ));
    let status = scratch.path().join("status");
    let start = Start {
        parts: &parts,
        initramfs: &image,
        memory: memory(),
        disks: &carried.disks,
        stdio: stdio.clone(),
        clocks: Clocks::Time,
        status: &status,
    };
    let mut command = start.command()?;
    let ended = match &stdio {
        Stdio::Console => command.status(),
        Stdio::Streams(_) | Stdio::Output(_) => forward(&mut command),
    }
    .map_err(|source| Error::Start {
        program: machine.emulator.program().to_owned(),
        source,
    })?;
    if let Some(status) = start.reported() {
        return Ok(status);
    }
    let console = match &stdio {
        Stdio::Console => String::new(),
        Stdio::Streams(log) | Stdio::Output(log) => {
            std::fs::read_to_string(log).unwrap_or_default()
        }
    };
    Err(Error::Failed {
        program: format!("the lab machine {}", machine.name),
        status: format!("{ended}, without a status of crossvisor"),
        output: console,
    })
}

/// Runs `command` and passes on what it prints. The machine opens its streams
/// by name, so they are pipes: a file would be written over from its start.
fn forward(command: &mut Command) -> io::Result<ExitStatus> {
    let mut child = command
        .stdout(process::Stdio::piped())
        .stderr(process::Stdio::piped())
        .spawn()?;
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        if let Some(mut output) = output {
            scope.spawn(move || io::copy(&mut output, &mut io::stdout()));
        }
        if let Some(mut errors) = errors {
            scope.spawn(move || io::copy(&mut errors, &mut io::stderr()));
        }
    });
    child.wait()
}

/// What of this machine goes into a lab machine, and the arguments as they are
/// there.
#[derive(Debug, Default, PartialEq, Eq)]
struct Carried {
    arguments: Vec<String>,
    files: Vec<(PathBuf, String)>,
    disks: Vec<Disk>,
}

/// Finds what `arguments` name of this machine. A disk image is attached to
/// the lab machine as a disk (raw images; what the guest writes stays). Every
/// other argument that is the path of a file or folder is copied in, whole,
/// and read-only in effect. What follows `--exec` and `--cmdline` stays as it
/// is.
fn carry(arguments: &[String], emulator: &Kind) -> Carried {
    let mut carried = Carried::default();
    let mut before = "";
    for argument in arguments {
        let (option, value) = match argument.split_once('=') {
            Some((option, value)) if option.starts_with("--") => (option, value),
            _ => (before, argument.as_str()),
        };
        let kept = argument.strip_suffix(value).unwrap_or_default();
        let there = match option {
            "--exec" | "--cmdline" => None,
            "--disk" => carried.disk(value, emulator),
            _ => carried.file(value),
        };
        carried.arguments.push(match there {
            Some(there) => format!("{kept}{there}"),
            None => argument.clone(),
        });
        before = if argument.starts_with("--") && !argument.contains('=') {
            argument
        } else {
            ""
        };
    }
    carried
}

impl Carried {
    /// A disk, given as `PATH`, `PATH,OPTIONS` or `path=PATH,OPTIONS`.
    fn disk(&mut self, value: &str, emulator: &Kind) -> Option<String> {
        let mut parts: Vec<String> = value.split(',').map(str::to_owned).collect();
        let read_only = parts.iter().skip(1).any(|p| {
            matches!(
                p.as_str(),
                "ro" | "readonly" | "read-only" | "readonly=on" | "ro=on"
            )
        });
        let first = parts.first_mut()?;
        let path = first
            .rsplit_once('=')
            .map_or(first.as_str(), |(_, path)| path);
        let host = Path::new(path).canonicalize().ok()?;
        let there = emulator.disk(self.disks.len())?;
        let key = first.strip_suffix(path).unwrap_or_default().to_owned();
        self.disks.push(Disk {
            path: host,
            changes: if read_only {
                Changes::Refused
            } else {
                Changes::Kept
            },
        });
        *first = format!("{key}{there}");
        Some(parts.join(","))
    }

    /// A file or folder.
    fn file(&mut self, value: &str) -> Option<String> {
        if value.is_empty() || value.starts_with('-') {
            return None;
        }
        let host = Path::new(value).canonicalize().ok()?;
        let name = host.file_name()?.to_string_lossy().into_owned();
        let there = format!("/host/{}/{name}", self.files.len());
        self.files.push((host, there.clone()));
        Some(there)
    }
}

/// Whether `option` is among `arguments`, as one word or with `=VALUE`.
fn given(arguments: &[String], option: &str) -> bool {
    arguments.iter().any(|argument| {
        argument
            .strip_prefix(option)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

/// Whether `arguments` name a kernel: a file that is no option's value.
fn names_kernel(arguments: &[String]) -> bool {
    let before = std::iter::once("").chain(arguments.iter().map(String::as_str));
    arguments.iter().zip(before).any(|(argument, before)| {
        !argument.starts_with('-') && !before.starts_with("--") && Path::new(argument).is_file()
    })
}

/// A lab machine's memory in MiB. It is only taken from this machine as far as
/// it is used, so it can be more than its guests' stock sizes.
pub fn memory() -> u32 {
    const ENOUGH: u64 = 12 << 30;
    let info = rustix::system::sysinfo();
    if info.totalram.saturating_mul(info.mem_unit.into()) >= ENOUGH {
        6144
    } else {
        2048
    }
}

/// The terminal's size in rows and columns, where there is one.
fn terminal_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(io::stdin()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator::Qemu;
    use std::fs;

    /// What the lab's disks are called does not depend on more.
    const EMULATOR: Kind = Kind::Qemu(Qemu {
        program: "",
        package: "",
        bus: None,
        options: &[],
        counts: false,
    });

    fn words(line: &[&str]) -> Vec<String> {
        line.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn files_and_disks_are_carried_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().canonicalize().unwrap().join(name);
            fs::write(&path, "x").unwrap();
            path.display().to_string()
        };
        let (kernel, initrd, a, b) = (path("vmlinuz"), path("i"), path("a.img"), path("b.img"));
        let carried = carry(
            &words(&[
                &kernel,
                &format!("--initrd={initrd}"),
                "--disk",
                &a,
                "--disk",
                &format!("path={b},readonly,serial=x"),
                "--cpus",
                "4",
                "--exec",
                &a,
            ]),
            &EMULATOR,
        );
        assert_eq!(
            carried.arguments,
            [
                "/host/0/vmlinuz",
                "--initrd=/host/1/i",
                "--disk",
                "/dev/vda",
                "--disk",
                "path=/dev/vdb,readonly,serial=x",
                "--cpus",
                "4",
                "--exec",
                &a
            ]
        );
        assert_eq!(carried.files.len(), 2);
        assert_eq!(carried.disks[0].changes, Changes::Kept);
        assert_eq!(carried.disks[1].changes, Changes::Refused);
    }

    #[test]
    fn what_is_not_there_stays_as_it_was_given() {
        let given = words(&["/no/such/kernel", "--disk", "/no/such/disk", "--memory=1G"]);
        let carried = carry(&given, &EMULATOR);
        assert_eq!(carried.arguments, given);
        assert!(carried.files.is_empty() && carried.disks.is_empty());
    }

    #[test]
    fn doctor_s_verdict_and_reason() {
        assert_eq!(verdict(br#"{"runs_stock_kernels": true}"#), Ok(()));
        let refused = br#"{"runs_stock_kernels": false, "reason": "no SSE"}"#;
        assert_eq!(verdict(refused), Err("no SSE".to_owned()));
        assert!(verdict(b"").is_err());
    }

    #[test]
    fn a_kernel_is_told_from_an_option_s_value() {
        let exe = std::env::current_exe().unwrap().display().to_string();
        assert!(names_kernel(&words(&[&exe])));
        assert!(names_kernel(&words(&["--cpus", "4", &exe])));
        assert!(!names_kernel(&words(&["--initrd", &exe])));
        assert!(!names_kernel(&words(&["--exec", "true"])));
        assert!(given(&words(&["--exec=x"]), "--exec"));
        assert!(!given(&words(&["--executor"]), "--exec"));
    }
}
