//! What a guest is started from when the user gives no initrd: the built-in
//! initramfs, made on the fly.

use std::path::Path;
use std::sync::Arc;

use crossvisor_boot::initramfs::{AtEnd, Builder, InitConfig, Io, ModuleTree};
use crossvisor_boot::{KernelImage, host};
use crossvisor_vmm::config::Initrd;
use crossvisor_vmm::plan::{DeviceKind, Plan};

use crate::args::RunArgs;
use crate::exec;

/// File systems that a guest with a disk may want to mount, as far as its
/// kernel has them.
const FILE_SYSTEMS: &[&str] = &["ext4", "vfat", "squashfs", "iso9660"];

/// The built-in initramfs, and what the user should know about it once the
/// rest is in order.
pub struct Built {
    /// The archive.
    pub initrd: Initrd,
    /// What it lacks.
    pub warning: Option<String>,
}

/// Makes the built-in initramfs for `plan`.
pub fn initramfs(args: &RunArgs, kernel: &Path, plan: &Plan) -> Result<Built, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut builder = Builder::new();
    builder
        .add_init("/proc/self/exe")
        .map_err(|error| text(&error))?;
    match host::busybox() {
        Ok(busybox) => builder.busybox(busybox).map_err(|error| text(&error))?,
        Err(missing) => log::info!("no shell in the guest: {missing}"),
    }
    let modules = modules(args, kernel)?;
    let warning = modules.is_none().then(|| {
        format!(
            "no modules for {}: drivers must be built into it, or give --modules DIR",
            kernel.display()
        )
    });
    if let Some(modules) = modules {
        builder
            .modules(&modules, &Vec::from_iter(plan.drivers()))
            .map_err(|error| text(&error))?;
        let mut wanted = plan.guest_modules.clone();
        if plan
            .devices
            .iter()
            .any(|device| device.kind == DeviceKind::Block)
        {
            wanted.extend(FILE_SYSTEMS);
        }
        builder
            .modules_available(&modules, &wanted)
            .map_err(|error| text(&error))?;
    }
    for added in &args.initramfs_add {
        let (host, guest) = match added.rsplit_once(':') {
            Some((host, guest)) if guest.starts_with('/') => (host, guest.to_string()),
            _ => (added.as_str(), default_place(added)),
        };
        builder
            .add_tree(host, &guest)
            .map_err(|error| format!("--initramfs-add {added}: {error}"))?;
    }
    let mut config = InitConfig {
        hostname: Some(args.machine.name.clone()),
        ..InitConfig::default()
    };
    if plan.power_off_is_ctrl_alt_del {
        config.ctrl_alt_del = AtEnd::PowerOff;
    }
    if let Some(command) = &args.exec {
        config.command = Some(command.clone());
        config.status_port = Some(exec::STATUS.into());
        config.io = Io::Ports {
            stdin: Some(exec::STDIN.into()),
            stdout: exec::STDOUT.into(),
            stderr: Some(exec::STDERR.into()),
        };
    } else if let Ok(size) = rustix::termios::tcgetwinsize(std::io::stdout()) {
        config.terminal = Some((size.ws_row, size.ws_col));
    }
    builder.init_config(&config);
    let initrd = builder.build().map_err(|error| text(&error))?;
    let bytes = initrd.to_vec().map_err(|error| text(&error))?;
    Ok(Built {
        initrd: Initrd::Built(Arc::new(bytes)),
        warning,
    })
}

/// Where a path of the host's goes in the guest unless the user says: a
/// relative one below `/`, an absolute one to the same place.
fn default_place(path: &str) -> String {
    let relative = path.trim_start_matches("./");
    match relative.starts_with('/') {
        true => relative.to_string(),
        false => format!("/{relative}"),
    }
}

/// The modules folder that belongs to `kernel`; `None` for a kernel of the
/// user's whose modules are nowhere to be found, which may have all built in.
fn modules(args: &RunArgs, kernel: &Path) -> Result<Option<ModuleTree>, String> {
    if let Some(directory) = &args.modules {
        let tree = ModuleTree::open(directory, None);
        return tree
            .map(Some)
            .map_err(|error| format!("--modules: {error}"));
    }
    if args.kernel.is_none() {
        return host::modules().map(Some).map_err(|error| error.to_string());
    }
    let image = KernelImage::open(kernel).map_err(|error| error.to_string())?;
    Ok(image
        .release()
        .and_then(|release| ModuleTree::open(format!("/lib/modules/{release}"), None).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_files_keep_their_place() {
        assert_eq!(default_place("/etc/hosts"), "/etc/hosts");
        assert_eq!(default_place("./tool"), "/tool");
        assert_eq!(default_place("a/b"), "/a/b");
    }
}
