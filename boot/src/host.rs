//! What the host itself offers to start a guest from.

use std::path::{Path, PathBuf};

use crate::initramfs::Executable;
use crate::initramfs::{ModuleTree, ModulesError};

/// Something of the host's was not found.
#[derive(Debug, thiserror::Error)]
#[error("no {what}: tried {}{hint}", tried.join(", "))]
pub struct NotFound {
    what: String,
    tried: Vec<String>,
    hint: &'static str,
}

/// The running kernel's release, as `uname -r` prints it.
pub fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// The running kernel's image.
pub fn kernel() -> Result<PathBuf, NotFound> {
    kernel_in(Path::new("/"), &release())
}

/// The running kernel's modules.
pub fn modules() -> Result<ModuleTree, ModulesError> {
    let release = release();
    let dir = ["/lib/modules", "/usr/lib/modules"]
        .iter()
        .map(|base| Path::new(base).join(&release))
        .find(|dir| dir.is_dir());
    match dir {
        Some(dir) => ModuleTree::open(dir, Some(&release)),
        None => ModuleTree::open("/lib/modules", Some(&release)),
    }
}

/// A static busybox.
pub fn busybox() -> Result<PathBuf, NotFound> {
    busybox_in(Path::new("/"))
}

fn kernel_in(root: &Path, release: &str) -> Result<PathBuf, NotFound> {
    let places = [
        format!("boot/vmlinuz-{release}"),
        format!("boot/vmlinux-{release}"),
        format!("boot/image-{release}"),
        format!("boot/kernel-{release}"),
        format!("lib/modules/{release}/vmlinuz"),
        format!("usr/lib/modules/{release}/vmlinuz"),
    ];
    let mut tried = Vec::new();
    for place in places {
        let path = root.join(place);
        match std::fs::File::open(&path) {
            Ok(file) if file.metadata().is_ok_and(|m| m.is_file()) => return Ok(path),
            Ok(_) => tried.push(format!("{} (not a file)", path.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                tried.push(path.display().to_string());
            }
            Err(e) => tried.push(format!("{} ({e})", path.display())),
        }
    }
    Err(NotFound {
        what: format!("image of the running kernel {release}"),
        tried,
        hint: "; give a kernel image by its path",
    })
}

fn busybox_in(root: &Path) -> Result<PathBuf, NotFound> {
    let mut tried = Vec::new();
    for place in [
        "bin/busybox",
        "usr/bin/busybox",
        "bin/busybox.static",
        "usr/bin/busybox.static",
    ] {
        let path = root.join(place);
        match Executable::open(&path) {
            Ok(Executable {
                interpreter: None, ..
            }) => return Ok(path),
            Ok(_) => tried.push(format!("{} (dynamically linked)", path.display())),
            Err(_) if !path.exists() => tried.push(path.display().to_string()),
            Err(e) => tried.push(format!("{} ({e})", path.display())),
        }
    }
    Err(NotFound {
        what: "static busybox".to_owned(),
        tried,
        hint: "; install the package busybox-static",
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_first_kernel_that_is_there_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let error = kernel_in(root.path(), "6.1").unwrap_err().to_string();
        assert!(
            error.starts_with("no image of the running kernel 6.1: tried "),
            "{error}"
        );
        assert_eq!(error.matches("6.1").count(), 7, "{error}");
        for place in [
            "lib/modules/6.1/vmlinuz",
            "boot/vmlinux-6.1",
            "boot/vmlinuz-6.1",
        ] {
            let path = root.path().join(place);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "x").unwrap();
            assert_eq!(kernel_in(root.path(), "6.1").unwrap(), path);
        }
        fs::create_dir_all(root.path().join("boot/vmlinuz-6.2")).unwrap();
        let error = kernel_in(root.path(), "6.2").unwrap_err().to_string();
        assert!(error.contains("vmlinuz-6.2 (not a file)"), "{error}");
    }

    #[test]
    fn a_busybox_must_be_static() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("bin")).unwrap();
        fs::create_dir_all(root.path().join("usr/bin")).unwrap();
        fs::write(root.path().join("bin/busybox"), "#!/bin/sh").unwrap();
        let error = busybox_in(root.path()).unwrap_err().to_string();
        assert!(
            error.contains("bin/busybox (not an ELF executable)"),
            "{error}"
        );
        assert!(error.contains("busybox-static"), "{error}");

        let mut elf = vec![0u8; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let path = root.path().join("usr/bin/busybox");
        fs::write(&path, elf).unwrap();
        assert_eq!(busybox_in(root.path()).unwrap(), path);
    }

    #[test]
    fn the_release_is_one_word() {
        let release = release();
        assert!(!release.is_empty() && !release.contains(char::is_whitespace));
        assert_eq!(
            release,
            fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap()
                .trim()
        );
    }
}
