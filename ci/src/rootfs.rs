//! A Debian root file system as a disk image, made without root and for any
//! architecture.
//!
//! Debian's packages are unpacked, not configured by their maintainer scripts,
//! for those would need the guest's processor. What they would have made is
//! either made by systemd itself when it starts (users from sysusers.d, files
//! from tmpfiles.d, the linker's cache) or written here.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::archive::{Archive, Root};
use crate::cache::{Cache, progress};
use crate::error::{AtPath, Error, Result};
use crate::program;
use crate::targets::Target;
use crate::unpacked::Programs;

/// Raised when what is written here changes, so that images are made anew.
const REVISION: u32 = 2;
/// Size of the image; its file is sparse.
const SIZE: &str = "768M";
/// Packages that a small Debian system with systemd has, dependencies aside.
const PACKAGES: [&str; 23] = [
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "dbus",
    "debianutils",
    "e2fsprogs",
    "findutils",
    "grep",
    "hostname",
    "iproute2",
    "kmod",
    "libc-bin",
    "login",
    "mawk",
    "mount",
    "passwd",
    "procps",
    "sed",
    "systemd-sysv",
    "udev",
    "util-linux",
];

/// The image of `target`'s root file system, made if it is not there yet.
///
/// # Errors
///
/// When packages are not to be had or the image can't be written.
pub fn get(cache: &Cache, target: &Target) -> Result<PathBuf> {
    let image = cache
        .folder("images")?
        .join(format!("rootfs-{REVISION}-{}.ext4", target.debian));
    let _lock = cache.lock(&format!("rootfs-{}", target.debian))?;
    if image.exists() {
        return Ok(image);
    }
    let archive = Archive::new(cache);
    let root = archive.root(&Root {
        name: &format!("rootfs-{}", target.debian),
        closure: &PACKAGES,
        alone: &[],
        foreign: Some(target.debian),
    })?;
    let tools = Programs::new(archive.root(&Root {
        name: "e2fsprogs",
        closure: &["e2fsprogs"],
        alone: &[],
        foreign: None,
    })?)?;
    progress(&format!(
        "making a disk with a Debian root file system for {}",
        target.arch
    ));
    configure(&root)?;
    let partial = image.with_extension("partial");
    let _ = fs::remove_file(&partial);
    program::output(
        tools
            .command("usr/sbin/mke2fs")
            .env("MKE2FS_CONFIG", tools.root().join("etc/mke2fs.conf"))
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", "crossvisor"])
            .args(["-E", "root_owner=0:0", "-d"])
            .arg(&root)
            .arg(&partial)
            .arg(SIZE),
    )?;
    if fs::metadata(&root).at(&root)?.uid() != 0 {
        give_to_root(&tools, &root, &partial)?;
    }
    fs::rename(&partial, &image).at(&image)?;
    Ok(image)
}

/// Writes what the packages' scripts would have made.
fn configure(root: &Path) -> Result<()> {
    for (from, to) in [
        ("usr/share/base-passwd/passwd.master", "etc/passwd"),
        ("usr/share/base-passwd/group.master", "etc/group"),
        ("usr/share/base-files/profile", "etc/profile"),
    ] {
        let (from, to) = (root.join(from), root.join(to));
        fs::copy(&from, &to).at(&from)?;
    }
    // Root needs no password: it is a guest on a terminal.
    let passwd = root.join("etc/passwd");
    let text = fs::read_to_string(&passwd).at(&passwd)?;
    fs::write(&passwd, text.replace("root:*:", "root::")).at(&passwd)?;
    for (path, text) in [
        ("etc/hostname", "debian\n"),
        ("etc/fstab", ""),
        (
            "etc/nsswitch.conf",
            "passwd: files systemd\ngroup: files systemd\nshadow: files systemd\nhosts: files dns\n",
        ),
        // Known from the start, or systemd asks questions at the first one.
        ("etc/machine-id", "63726f73737669736f72000000000001\n"),
    ] {
        let path = root.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).at(folder)?;
        }
        fs::write(&path, text).at(&path)?;
    }
    for (target, link) in [
        ("/usr/bin/mawk", "usr/bin/awk"),
        ("dash", "usr/bin/sh"),
        (
            "/usr/lib/systemd/system/multi-user.target",
            "etc/systemd/system/default.target",
        ),
        // Udev's package makes the database of hardware when it is configured.
        // To make it at the first start takes minutes in an emulated machine,
        // and virtio devices have no entries in it.
        (
            "/dev/null",
            "etc/systemd/system/systemd-hwdb-update.service",
        ),
    ] {
        let link = root.join(link);
        if link.symlink_metadata().is_ok() {
            continue;
        }
        if let Some(folder) = link.parent() {
            fs::create_dir_all(folder).at(folder)?;
        }
        symlink(target, &link).at(&link)?;
    }
    for folder in [
        "root",
        "tmp",
        "run",
        "proc",
        "sys",
        "dev",
        "mnt",
        "var/log/journal",
    ] {
        let folder = root.join(folder);
        fs::create_dir_all(&folder).at(&folder)?;
    }
    let tmp = root.join("tmp");
    fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).at(&tmp)
}

/// Makes root the owner of every file in the image, as `dpkg` would have done.
fn give_to_root(tools: &Programs, root: &Path, image: &Path) -> Result<()> {
    let mut paths = Vec::new();
    walk(root, Path::new("/"), &mut paths)?;
    let mut script = String::new();
    for path in paths {
        let path = path.display();
        script.push_str(&format!(
            "set_inode_field \"{path}\" uid 0\nset_inode_field \"{path}\" gid 0\n"
        ));
    }
    let failed = |source| Error::Start {
        program: "debugfs".to_owned(),
        source,
    };
    let mut child = tools
        .command("usr/sbin/debugfs")
        .args(["-w", "-f", "/dev/stdin"])
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(script.as_bytes()).map_err(failed)?;
    }
    let status = child.wait().map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        program: "debugfs".to_owned(),
        status: program::describe(status),
        output: String::new(),
    })
}

/// Collects the paths below `at` in `root`, as they are in the image.
fn walk(root: &Path, at: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    let folder = root.join(at.strip_prefix("/").unwrap_or(at));
    for entry in fs::read_dir(&folder).at(&folder)? {
        let entry = entry.at(&folder)?;
        let path = at.join(entry.file_name());
        if entry.file_type().at(&folder)?.is_dir() {
            walk(root, &path, paths)?;
        }
        paths.push(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An unpacked root as far as `configure` looks at it.
    fn root() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in [
            (
                "usr/share/base-passwd/passwd.master",
                "root:*:0:0:root:/root:/bin/bash\n",
            ),
            ("usr/share/base-passwd/group.master", "root:*:0:\n"),
            ("usr/share/base-files/profile", "\n"),
            ("etc/x", ""),
            ("usr/bin/dash", ""),
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn a_root_is_configured_and_can_be_again() {
        let root = root();
        for _ in 0..2 {
            configure(root.path()).unwrap();
            let passwd = fs::read_to_string(root.path().join("etc/passwd")).unwrap();
            assert!(passwd.starts_with("root::0:0:"), "{passwd}");
            let first = root.path().join("etc/systemd/system/default.target");
            assert!(first.symlink_metadata().unwrap().is_symlink());
            let id = fs::read_to_string(root.path().join("etc/machine-id")).unwrap();
            assert_eq!(id.trim().len(), 32);
            assert!(id.trim().bytes().all(|b| b.is_ascii_hexdigit()));
        }
    }

    #[test]
    fn paths_are_those_in_the_image() {
        let root = root();
        let mut paths = Vec::new();
        walk(root.path(), Path::new("/"), &mut paths).unwrap();
        assert!(paths.contains(&PathBuf::from("/usr/bin/dash")));
        assert!(paths.contains(&PathBuf::from("/etc")));
    }
}
