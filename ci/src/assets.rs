//! What the guest tests find in a lab machine.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::cache::Cache;
use crate::error::Result;
use crate::images;
use crate::l1::{Initramfs, Parts};

/// The folder of the tests in a lab machine.
pub const TESTS: &str = "/tests";

/// `/tests/assets/manifest.json`: where the tests find what they need.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct Manifest {
    /// The lab machine's name.
    pub machine: String,
    /// Its architecture.
    pub arch: String,
    /// The stock kernel for guests, as packaged.
    pub kernel: String,
    /// The same kernel in each format that the architecture boots.
    pub kernel_formats: BTreeMap<&'static str, String>,
    /// The kernel's modules folder.
    pub modules: String,
    /// A static busybox.
    pub busybox: String,
    /// A disk with a Debian root file system, where there is one.
    pub rootfs: Option<String>,
}

/// Puts what the tests need into the initramfs of a lab machine: the test
/// binaries of `built`, the kernel in each format, its modules, and the
/// manifest. `rootfs` is the disk, within the machine, that holds a Debian root
/// file system.
///
/// # Errors
///
/// When a kernel can't be converted or a file can't be read.
pub fn add(
    cache: &Cache,
    parts: &Parts,
    built: &Path,
    rootfs: Option<String>,
    initramfs: &mut Initramfs,
) -> Result<()> {
    for binary in ["crossvisor", "crossvisor-tests"] {
        initramfs.add(&built.join(binary), &format!("{TESTS}/{binary}"))?;
    }
    let guest = &parts.guest_kernel;
    let (kernel, modules) = guest_kernel(parts, initramfs)?;
    let mut kernel_formats = BTreeMap::new();
    for format in parts.machine.target()?.formats {
        let file = images::file(cache, guest, format)?;
        let path = if file == guest.image {
            kernel.clone()
        } else {
            let path = format!("{TESTS}/assets/kernel.{format}");
            initramfs.add(&file, &path)?;
            path
        };
        kernel_formats.insert(*format, path);
    }
    let manifest = Manifest {
        machine: parts.machine.name.to_owned(),
        arch: parts.machine.arch.to_owned(),
        kernel,
        kernel_formats,
        modules,
        busybox: "/bin/busybox".to_owned(),
        rootfs,
    };
    let json = serde_json::to_vec_pretty(&manifest).map_err(crate::error::Error::said_by)?;
    initramfs.add_bytes(&format!("{TESTS}/assets/manifest.json"), json)
}

/// Puts the kernel for guests, as packaged, into the initramfs of a lab machine;
/// returns where it and its modules are there.
///
/// # Errors
///
/// When a file can't be read.
pub fn guest_kernel(parts: &Parts, initramfs: &mut Initramfs) -> Result<(String, String)> {
    let guest = &parts.guest_kernel;
    let release = &guest.release;
    // The machine's own kernel is there already.
    if *release == parts.kernel.release {
        return Ok((
            format!("/boot/vmlinuz-{release}"),
            format!("/lib/modules/{release}"),
        ));
    }
    let kernel = format!("{TESTS}/assets/kernel");
    let modules = format!("{TESTS}/assets/modules/{release}");
    initramfs.add(&guest.image, &kernel)?;
    initramfs.guest_modules(guest, &modules)?;
    Ok((kernel, modules))
}
