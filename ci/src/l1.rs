//! Starting a lab machine ("L1"): its initramfs, and what all emulators have in
//! common.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crossvisor_boot::Initrd;
use crossvisor_boot::initramfs::{Builder, InitConfig, ModuleTree};

use crate::cache::Cache;
use crate::emulator::{Emulator, Kind};
use crate::error::{AtPath, Error, Result};
use crate::hercules;
use crate::images;
use crate::kernels::{self, Kernel};
use crate::machines::{COMMON_MODULES, Machine};
use crate::qemu;
use crate::stored;

/// The guest modules that are put into a machine for crossvisor's built-in
/// initramfs to choose from, dependencies aside; what a kernel has built in or
/// lacks is left out.
const GUEST_MODULES: [&str; 20] = [
    // By which guests see their power button.
    "button",
    "gpio_keys",
    "evdev",
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_input",
    "virtio_balloon",
    "virtio_scsi",
    "vmw_vsock_virtio_transport",
    "9pnet_virtio",
    "9p",
    "virtiofs",
    "crc32c_generic",
    "ext4",
    "overlay",
    // Only s390x has it.
    "diag288_wdt",
];

/// What every start of one machine has in common.
#[derive(Debug)]
pub struct Parts {
    /// The machine.
    pub machine: &'static Machine,
    /// What emulates it.
    pub emulator: Emulator,
    /// The kernel that it runs.
    pub kernel: Kernel,
    /// The image of it that the emulator loads.
    pub image: PathBuf,
    /// The kernel that its guests run.
    pub guest_kernel: Kernel,
    /// Busybox for it and for its guests.
    pub busybox: PathBuf,
}

impl Parts {
    /// Finds or gets them.
    ///
    /// # Errors
    ///
    /// When one is not to be had.
    pub fn get(cache: &Cache, machine: &'static Machine) -> Result<Self> {
        let target = machine.target()?;
        let kernel = Kernel::get(cache, machine.kernel, target)?;
        Ok(Self {
            machine,
            emulator: Emulator::get(cache, &machine.emulator)?,
            image: match machine.emulator {
                Kind::Qemu(_) => kernel.image.clone(),
                Kind::Hercules => images::file(cache, &kernel, stored::FORMAT)?,
            },
            kernel,
            guest_kernel: Kernel::get(cache, machine.guest_kernel, target)?,
            busybox: kernels::busybox(cache, target)?,
        })
    }

    /// What the machine's `/init` is told: to run `command`, a shell command,
    /// with its streams and its exit status as `stdio` has them, once `disks`
    /// are there.
    pub fn init(&self, command: String, stdio: &Stdio, disks: &[Disk]) -> InitConfig {
        let config = match &self.machine.emulator {
            Kind::Qemu(_) => qemu::init(command, stdio),
            Kind::Hercules => hercules::init(&command, stdio, disks),
        };
        InitConfig {
            hostname: Some(self.machine.name.to_owned()),
            ..config
        }
    }

    /// Begins the machine's initramfs: `crossvisor`, the static binary for its
    /// architecture, as `/init` and as `/usr/bin/crossvisor`; busybox; the
    /// modules that the machine needs; and its own kernel, with modules for
    /// guests, where a Debian system has them, for crossvisor's defaults.
    ///
    /// # Errors
    ///
    /// When a file can't be read.
    pub fn initramfs(&self, crossvisor: &Path) -> Result<Initramfs> {
        let mut builder = Builder::new();
        let mut add = || -> std::result::Result<(), Box<dyn std::error::Error>> {
            builder.add_init(crossvisor)?;
            // `/init` is a program that cannot use KVM everywhere.
            builder.add_executable(crossvisor, "/usr/bin/crossvisor")?;
            builder.busybox(&self.busybox)?;
            builder.symlink("/bin/busybox", "/usr/bin/busybox")?;
            let tree = ModuleTree::open(&self.kernel.modules, None)?;
            builder.modules(&tree, self.machine.modules)?;
            builder.modules_available(&tree, &COMMON_MODULES)?;
            builder.add_file(
                &self.kernel.image,
                &format!("/boot/vmlinuz-{}", self.kernel.release),
            )?;
            Ok(())
        };
        add().map_err(Error::said_by)?;
        let mut initramfs = Initramfs { builder };
        initramfs.guest_modules(
            &self.kernel,
            &format!("/lib/modules/{}", self.kernel.release),
        )?;
        Ok(initramfs)
    }
}

/// A machine's initramfs in the making.
#[derive(Debug)]
pub struct Initramfs {
    builder: Builder,
}

impl Initramfs {
    /// Adds a file or folder of this machine as `path`.
    ///
    /// # Errors
    ///
    /// When it can't be read.
    pub fn add(&mut self, host: &Path, path: &str) -> Result<()> {
        self.builder.add_tree(host, path).map_err(Error::said_by)
    }

    /// Adds a file of this machine as `path`, following symbolic links.
    ///
    /// # Errors
    ///
    /// When it can't be read.
    pub fn add_file(&mut self, host: &Path, path: &str) -> Result<()> {
        self.builder.add_file(host, path).map_err(Error::said_by)
    }

    /// Adds bytes as the file `path`.
    ///
    /// # Errors
    ///
    /// When the path can't be.
    pub fn add_bytes(&mut self, path: &str, bytes: Vec<u8>) -> Result<()> {
        self.builder
            .add_bytes(path, 0o644, bytes)
            .map_err(Error::said_by)
    }

    /// Adds what guests may need of a kernel's modules as a modules folder.
    ///
    /// # Errors
    ///
    /// When a module can't be read.
    pub fn guest_modules(&mut self, kernel: &Kernel, folder: &str) -> Result<()> {
        let tree = ModuleTree::open(&kernel.modules, None).map_err(Error::said_by)?;
        let modules = tree
            .resolve_available(&GUEST_MODULES)
            .map_err(Error::said_by)?;
        let mut aliases = String::new();
        for module in modules {
            for alias in aliases_in(&module.content) {
                aliases.push_str(&format!("alias {alias} {}\n", module.name));
            }
            self.add_bytes(
                &format!("{folder}/kernel/{}", module.file_name),
                module.content,
            )?;
        }
        // As depmod writes it; ext4, for one, asks for its checksum by an alias.
        self.add_bytes(&format!("{folder}/modules.alias"), aliases.into_bytes())?;
        for list in [
            "modules.builtin",
            "modules.builtin.modinfo",
            "modules.order",
        ] {
            let file = kernel.modules.join(list);
            if file.exists() {
                self.add(&file, &format!("{folder}/{list}"))?;
            }
        }
        Ok(())
    }

    /// Writes the initramfs, in which `/init` does as `config` says, to `path`.
    ///
    /// # Errors
    ///
    /// When it can't be built or written.
    pub fn write(mut self, config: &InitConfig, path: &Path) -> Result<()> {
        self.builder.init_config(config);
        let initrd: Initrd = self.builder.build().map_err(Error::said_by)?;
        let mut file = BufWriter::new(File::create(path).at(path)?);
        initrd
            .write_to(&mut file)
            .and_then(|()| file.flush())
            .at(path)
    }
}

/// The aliases that a module tells of itself: strings `alias=...`, each after
/// and before a NUL (Linux `include/linux/moduleparam.h`, `__MODULE_INFO`).
fn aliases_in(module: &[u8]) -> Vec<String> {
    module
        .split(|&byte| byte == 0)
        .filter_map(|string| string.strip_prefix(b"alias="))
        .filter_map(|alias| String::from_utf8(alias.to_vec()).ok())
        .collect()
}

/// What is connected to the lab machine's standard streams, that is, to those
/// of the process that [`Start::command`] starts.
#[derive(Debug, Clone)]
pub enum Stdio {
    /// The machine's console, for a person at a terminal.
    Console,
    /// The streams of the command in the machine, each by itself. The
    /// machine's console goes to the file.
    Streams(PathBuf),
    /// The command's output and errors in one stream, and no input. The
    /// machine's console goes to the file.
    Output(PathBuf),
}

/// What a lab machine's clocks go by, where its emulator has the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clocks {
    /// The time of this machine: for people, and for what is measured.
    Time,
    /// The instructions that are executed, so that a machine that is slow gets
    /// no more timer interrupts for that, each of which has the emulator forget
    /// what it knows of page tables, and waiting takes no time. Limits of time in
    /// the machine do not depend on what else this one does.
    Instructions,
}

/// A disk of this machine that a lab machine sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// A raw image or block device.
    pub path: PathBuf,
    /// How it may be changed.
    pub changes: Changes,
}

/// Whether what a machine writes to a disk stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changes {
    /// It does.
    Kept,
    /// It is forgotten at the machine's end.
    Forgotten,
    /// The machine can't write.
    Refused,
}

/// One start of a machine.
#[derive(Debug)]
pub struct Start<'a> {
    /// The machine's parts.
    pub parts: &'a Parts,
    /// The initramfs that it runs.
    pub initramfs: &'a Path,
    /// Its memory, in MiB.
    pub memory: u32,
    /// Its disks, with the names of [`Kind::disk`].
    pub disks: &'a [Disk],
    /// What the lab's own standard input and output are.
    pub stdio: Stdio,
    /// What its clocks go by.
    pub clocks: Clocks,
    /// The file that takes the exit status of what it ran.
    pub status: &'a Path,
}

impl Start<'_> {
    /// The command that starts the machine, what it needs being written beside
    /// the initramfs. It ends with the machine, and at the latest with the lab.
    ///
    /// # Errors
    ///
    /// When a file can't be written.
    pub fn command(&self) -> Result<Command> {
        let command = match &self.parts.machine.emulator {
            Kind::Qemu(machine) => qemu::command(self, machine),
            Kind::Hercules => hercules::command(self)?,
        };
        Ok(with_lab(&command))
    }

    /// The exit status that the machine reported, if it came that far.
    pub fn reported(&self) -> Option<i32> {
        let text = fs::read_to_string(self.status).ok()?;
        text.lines().next()?.trim().parse().ok()
    }
}

/// The name of the lab's hidden command that ends with the lab.
pub const WITH_LAB: &str = "with-lab";

/// The lab's own program, for its hidden commands: the one that runs, although
/// another may have been built in its place since.
pub fn lab() -> Command {
    Command::new("/proc/self/exe")
}

/// `command` as a child that the system kills when the lab dies, started by
/// way of the lab's own [`WITH_LAB`] command.
pub fn with_lab(command: &Command) -> Command {
    let mut wrapped = lab();
    wrapped
        .arg(WITH_LAB)
        .arg(std::process::id().to_string())
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    wrapped
}

/// Becomes `program`, to be killed when the process `lab`, its parent, dies.
///
/// # Errors
///
/// Returns only when the program can't be started.
pub fn become_with_lab(lab: u32, program: &str, arguments: &[String]) -> Result<()> {
    use std::os::unix::process::CommandExt;

    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| Error::said(format!("prctl: {error}")))?;
    // It may have died before that.
    if std::os::unix::process::parent_id() != lab {
        return Err(Error::said("the lab has ended"));
    }
    let source = Command::new(program).args(arguments).exec();
    Err(Error::Start {
        program: program.to_owned(),
        source,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A machine's parts, of which no file is there.
    pub fn parts(machine: &str) -> Parts {
        let kernel = Kernel {
            release: "6.12".into(),
            image: "/k".into(),
            modules: "/m".into(),
        };
        Parts {
            machine: Machine::named(machine).unwrap(),
            emulator: Emulator::Installed("/usr/bin/qemu".into()),
            image: kernel.image.clone(),
            kernel: kernel.clone(),
            guest_kernel: kernel,
            busybox: "/b".into(),
        }
    }

    #[test]
    fn aliases_are_read_from_a_module() {
        let module = b"\x7fELF\0license=GPL\0alias=crypto-crc32c\0alias=crc32c\0x=alias=no\0";
        assert_eq!(aliases_in(module), ["crypto-crc32c", "crc32c"]);
    }

    #[test]
    fn a_status_is_a_decimal_line() {
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("status");
        let parts = parts("aarch64");
        let start = Start {
            parts: &parts,
            initramfs: Path::new("/i"),
            memory: 1,
            disks: &[],
            stdio: Stdio::Console,
            clocks: Clocks::Time,
            status: &status,
        };
        assert_eq!(start.reported(), None);
        fs::write(&status, "").unwrap();
        assert_eq!(start.reported(), None);
        fs::write(&status, "42\n").unwrap();
        assert_eq!(start.reported(), Some(42));
        fs::write(&status, "nonsense\n").unwrap();
        assert_eq!(start.reported(), None);
    }
}
