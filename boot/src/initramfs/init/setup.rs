//! What is set up before the command runs: file systems, modules, names.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use super::super::config::{InitConfig, Mount};
use super::super::modules::{canonical, name_of};
use super::{say, sys};

/// Mounts the kernel's own file systems and points the standard streams to the
/// console.
pub(super) fn early() {
    let strict = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let dev = MountFlags::NOSUID;
    let tmp = MountFlags::NOSUID | MountFlags::NODEV;
    for (source, target, fstype, flags, options) in [
        ("devtmpfs", "/dev", "devtmpfs", dev, "mode=0755"),
        ("proc", "/proc", "proc", strict, ""),
        ("sysfs", "/sys", "sysfs", strict, ""),
        (
            "devpts",
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "mode=0620,gid=5,ptmxmode=0666",
        ),
        ("tmpfs", "/dev/shm", "tmpfs", tmp, "mode=1777"),
        ("tmpfs", "/tmp", "tmpfs", tmp, "mode=1777"),
        ("tmpfs", "/run", "tmpfs", tmp, "mode=0755"),
    ] {
        if let Err(e) = mount_at(source, target, fstype, flags, options) {
            say(format_args!("mounting {target}: {e}"));
        }
        if target == "/dev" {
            // What is said from here on must reach the console, even when the
            // kernel found no /dev/console to start with.
            if let Err(e) = console_stdio() {
                say(format_args!("/dev/console: {e}"));
            }
        }
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        // Without them shells do nearly as well.
        let _ = symlink(target, link);
    }
}

fn console_stdio() -> io::Result<()> {
    let console = File::options()
        .read(true)
        .write(true)
        .open("/dev/console")?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    Ok(())
}

/// Loads modules and sets names, as configured. Failures are told, and the
/// rest goes on.
pub(super) fn late(config: &InitConfig) {
    let cmdline = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    for module in &config.modules {
        if let Err(e) = load_module(module, &parameters(&cmdline, module)) {
            say(format_args!("module {module}: {e}"));
        } else if config.verbose {
            say(format_args!("loaded {module}"));
        }
    }
    // The console's driver may have been among the modules.
    if !config.modules.is_empty()
        && let Err(e) = console_stdio()
    {
        say(format_args!("/dev/console: {e}"));
    }
    if let Err(e) = sys::loopback_up() {
        say(format_args!("loopback interface: {e}"));
    }
    if let Some(name) = &config.hostname
        && let Err(e) = rustix::system::sethostname(name.as_bytes())
    {
        say(format_args!("host name {name}: {e}"));
    }
    if config.busybox_install {
        let installed = std::process::Command::new("/bin/busybox")
            .args(["--install", "-s", "/bin"])
            .status();
        match installed {
            Ok(status) if status.success() => {}
            Ok(status) => say(format_args!("busybox --install: {status}")),
            Err(e) => say(format_args!("/bin/busybox: {e}")),
        }
    }
}

/// Loads a module. One that is loaded already is fine.
fn load_module(path: &str, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    let file = File::open(path)?;
    let loaded = match rustix::system::finit_module(&file, &parameters, 0) {
        Err(Errno::NOSYS) => rustix::system::init_module(&std::fs::read(path)?, &parameters),
        other => other,
    };
    match loaded {
        Err(Errno::EXIST) => Ok(()),
        other => Ok(other?),
    }
}

/// What a kernel's command line has for the module at `path`: words
/// `module.parameter` or `module.parameter=value`, of which the kernel itself
/// only takes those for what is built in (Documentation/admin-guide/
/// kernel-parameters.rst). As the module takes them, with blanks between.
fn parameters(cmdline: &str, path: &str) -> String {
    let module = name_of(Path::new(path));
    let mut quoted = false;
    // A value in double quotes may hold blanks.
    let words = cmdline.trim_end().split(|c| {
        quoted ^= c == '"';
        c == ' ' && !quoted
    });
    let told = words
        // What follows is /init's own.
        .take_while(|word| *word != "--")
        .filter_map(|word| {
            let (name, parameter) = word.split_once('.')?;
            (Some(canonical(name)) == module).then_some(parameter)
        });
    told.collect::<Vec<_>>().join(" ")
}

/// Mounts a file system that the configuration asks for.
pub(super) fn extra_mount(what: &Mount) -> io::Result<()> {
    let flags = if what.read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    mount_at(
        &what.source,
        &what.target,
        &what.fstype,
        flags,
        &what.options,
    )
}

fn mount_at(
    source: &str,
    target: &str,
    fstype: &str,
    flags: MountFlags,
    options: &str,
) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    let options = CString::new(options)?;
    match mount(source, target, fstype, flags, options.as_c_str()) {
        // The kernel mounts devtmpfs by itself when it is configured to.
        Err(Errno::BUSY) => Ok(()),
        other => Ok(other?),
    }
}

/// Writes everything to disk, then unmounts what can be, and makes the rest
/// read-only.
pub(super) fn unmount_all() {
    rustix::fs::sync();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for (target, fstype) in mount_points(&mounts).into_iter().rev() {
        let kernels_own = matches!(
            fstype.as_str(),
            "rootfs" | "proc" | "sysfs" | "devtmpfs" | "devpts" | "tmpfs" | "ramfs"
        );
        if kernels_own {
            continue;
        }
        if unmount(target.as_str(), UnmountFlags::empty()).is_err() {
            let no_data = c"";
            let _ = mount_remount(target.as_str(), MountFlags::RDONLY, no_data);
        }
    }
    rustix::fs::sync();
}

/// Mount points and types of /proc/self/mounts, in order, with the octal
/// escapes for blanks in paths undone (proc_pid_mounts(5)).
fn mount_points(mounts: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let mut words = line.split(' ');
        if let (Some(_), Some(target), Some(fstype)) = (words.next(), words.next(), words.next()) {
            found.push((unescape(target), fstype.to_owned()));
        }
    }
    found
}

fn unescape(text: &str) -> String {
    let mut plain = text.to_owned();
    for (escape, c) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        plain = plain.replace(escape, c);
    }
    plain
}

/// Whether there is something at `path` that can be executed.
pub(super) fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read() {
        let text = "rootfs / rootfs rw 0 0\n/dev/vda /mnt/a\\040b ext4 rw,relatime 0 0\nshort\n";
        assert_eq!(
            mount_points(text),
            [
                ("/".to_owned(), "rootfs".to_owned()),
                ("/mnt/a b".to_owned(), "ext4".to_owned())
            ]
        );
    }

    #[test]
    fn modules_have_their_parameters_from_the_command_line() {
        let line = "console=ttyS0 kvm.halt_poll_ns=0 kvm-amd.nested root=kvm.x \
                    kvm.text=\"a b\" virtio_blk.queue_depth=4 -- kvm.late=1\n";
        for (path, told) in [
            ("/lib/modules/6/kvm.ko", "halt_poll_ns=0 text=\"a b\""),
            ("/lib/modules/6/kvm-amd.ko.xz", "nested"),
            ("virtio_blk.ko", "queue_depth=4"),
            ("/lib/modules/6/tun.ko", ""),
        ] {
            assert_eq!(parameters(line, path), told, "{path}");
        }
        assert_eq!(parameters("", "kvm.ko"), "");
    }

    #[test]
    fn executables_are_told_from_other_files() {
        assert!(is_executable(Path::new("/bin/sh")));
        assert!(!is_executable(Path::new("/etc/passwd")));
        assert!(!is_executable(Path::new("/bin")));
        assert!(!is_executable(Path::new("/absent")));
    }
}
