//! Stock Debian kernels, unpacked.

use std::fs;
use std::path::{Path, PathBuf};

use crate::archive::{Archive, Root};
use crate::cache::Cache;
use crate::error::{AtPath, Error, Result};
use crate::targets::Target;

/// A kernel and its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its release, as `uname -r` prints it.
    pub release: String,
    /// The image, as packaged.
    pub image: PathBuf,
    /// The folder `/lib/modules/<release>`, as packaged.
    pub modules: PathBuf,
}

impl Kernel {
    /// The kernel that the meta package `meta` stands for.
    ///
    /// # Errors
    ///
    /// When it is not to be had, or the package is not laid out as Debian's
    /// are.
    pub fn get(cache: &Cache, meta: &str, target: &Target) -> Result<Self> {
        let archive = Archive::new(cache);
        let package = archive.resolve(&format!("{meta}:{}", target.debian), "linux-image-")?;
        let name = package.split(':').next().unwrap_or_default().to_owned();
        let root = archive.root(&Root {
            name: &name,
            closure: &[],
            alone: &[&package],
            foreign: None,
        })?;
        Self::within(&root)
    }

    /// The kernel in an unpacked package.
    fn within(root: &Path) -> Result<Self> {
        let modules = ["usr/lib/modules", "lib/modules"]
            .iter()
            .map(|dir| root.join(dir))
            .find(|dir| dir.is_dir())
            .ok_or_else(|| Error::said(format!("{}: no kernel modules", root.display())))?;
        let modules = fs::read_dir(&modules)
            .at(&modules)?
            .flatten()
            .map(|entry| entry.path())
            .next()
            .ok_or_else(|| Error::said(format!("{}: no kernel modules", modules.display())))?;
        let release = modules
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // riscv64's image is called vmlinux.
        let image = ["vmlinuz", "vmlinux"]
            .iter()
            .map(|name| root.join(format!("boot/{name}-{release}")))
            .find(|path| path.is_file())
            .ok_or_else(|| Error::said(format!("{}: no kernel image in boot/", root.display())))?;
        Ok(Self {
            release,
            image,
            modules,
        })
    }
}

/// The static busybox of an architecture.
///
/// # Errors
///
/// When it is not to be had.
pub fn busybox(cache: &Cache, target: &Target) -> Result<PathBuf> {
    let package = format!("busybox-static:{}", target.debian);
    let root = Archive::new(cache).root(&Root {
        name: &format!("busybox-{}", target.debian),
        closure: &[],
        alone: &[&package],
        foreign: None,
    })?;
    ["usr/bin/busybox", "bin/busybox"]
        .iter()
        .map(|path| root.join(path))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::said(format!("{}: no busybox", root.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unpacked_package_is_understood() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert!(Kernel::within(root).is_err());
        fs::create_dir_all(root.join("usr/lib/modules/6.12.1+deb13-arm64")).unwrap();
        let error = Kernel::within(root).unwrap_err().to_string();
        assert!(error.contains("no kernel image"), "{error}");
        fs::create_dir_all(root.join("boot")).unwrap();
        fs::write(root.join("boot/vmlinuz-6.12.1+deb13-arm64"), "x").unwrap();
        let kernel = Kernel::within(root).unwrap();
        assert_eq!(kernel.release, "6.12.1+deb13-arm64");
        assert!(kernel.image.ends_with("vmlinuz-6.12.1+deb13-arm64"));
    }
}
