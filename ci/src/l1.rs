//! Starting a lab machine ("L1"): its initramfs and its QEMU.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crossvisor_boot::Initrd;
use crossvisor_boot::initramfs::{Builder, IO_PORT, InitConfig, Io, ModuleTree, STATUS_PORT};

use crate::cache::Cache;
use crate::emulator::Emulator;
use crate::error::{AtPath, Error, Result};
use crate::kernels::{self, Kernel};
use crate::machines::{COMMON_MODULES, Machine};

/// The guest modules that are put into a machine for crossvisor's built-in
/// initramfs to choose from, dependencies aside; what a kernel has built in or
/// lacks is left out.
const GUEST_MODULES: [&str; 19] = [
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
];

/// What every start of one machine has in common.
#[derive(Debug)]
pub struct Parts {
    /// The machine.
    pub machine: &'static Machine,
    /// Its QEMU.
    pub emulator: Emulator,
    /// The kernel that it runs.
    pub kernel: Kernel,
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
        Ok(Self {
            machine,
            emulator: Emulator::get(cache, machine.program, machine.package)?,
            kernel: Kernel::get(cache, machine.kernel, target)?,
            guest_kernel: Kernel::get(cache, machine.guest_kernel, target)?,
            busybox: kernels::busybox(cache, target)?,
        })
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
            builder.symlink("/init", "/usr/bin/crossvisor")?;
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

/// The port that carries a command's standard input.
const INPUT_PORT: &str = "org.crossvisor.input";
/// The port that carries a command's standard error.
const ERROR_PORT: &str = "org.crossvisor.error";

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

impl Stdio {
    /// Where the command in the machine finds its input and output.
    pub fn io(&self) -> Io {
        let some = |port: &str| Some(port.to_owned());
        match self {
            Self::Console => Io::Console,
            Self::Streams(_) => Io::Ports {
                stdin: some(INPUT_PORT),
                stdout: IO_PORT.to_owned(),
                stderr: some(ERROR_PORT),
            },
            Self::Output(_) => Io::Ports {
                stdin: None,
                stdout: IO_PORT.to_owned(),
                stderr: None,
            },
        }
    }

    /// The backend of the machine's console.
    fn console(&self) -> String {
        match self {
            Self::Console => "stdio,signal=off".to_owned(),
            Self::Streams(log) | Self::Output(log) => format!("file,path={}", escape(log)),
        }
    }

    /// The ports of the command, with their backends. A `stdio` backend closes
    /// its port at the end of the input, and a guest blocks when it writes to
    /// a closed port; so output has backends of its own.
    fn ports(&self) -> &'static [(&'static str, &'static str)] {
        const OUTPUT: (&str, &str) = (IO_PORT, "file,path=/dev/stdout,append=on");
        match self {
            Self::Console => &[],
            Self::Streams(_) => &[
                OUTPUT,
                (ERROR_PORT, "file,path=/dev/stderr,append=on"),
                (INPUT_PORT, "stdio"),
            ],
            Self::Output(_) => &[OUTPUT],
        }
    }
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
    /// Its disks: /dev/vda, /dev/vdb and so on.
    pub disks: &'a [Disk],
    /// What the lab's own standard input and output are.
    pub stdio: Stdio,
    /// The file that takes the exit status of what it ran.
    pub status: &'a Path,
}

impl Start<'_> {
    /// The command that starts the machine. It ends with the machine, and at
    /// the latest with the lab.
    ///
    /// # Errors
    ///
    /// When the lab's own executable can't be found.
    pub fn command(&self) -> Result<Command> {
        let machine = self.parts.machine;
        let mut qemu = self.parts.emulator.command();
        // Before the machine's own options, which may say otherwise.
        qemu.args(["-accel", "tcg,thread=multi", "-smp", "2"]);
        qemu.args(machine.options);
        qemu.args(["-m", &format!("{}M", self.memory)]);
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        qemu.arg("-kernel").arg(&self.parts.kernel.image);
        qemu.arg("-initrd").arg(self.initramfs);
        qemu.arg("-append")
            .arg(format!("console=hvc0 quiet panic=-1 {}", machine.cmdline));
        qemu.args(["-device", "virtio-serial-pci"]);
        qemu.arg("-chardev")
            .arg(with_id(&self.stdio.console(), "console"));
        qemu.args(["-device", "virtconsole,chardev=console"]);
        let status = format!("file,path={}", escape(self.status));
        let ports = self.stdio.ports().iter().copied();
        for (n, (port, backend)) in ports.chain([(STATUS_PORT, status.as_str())]).enumerate() {
            qemu.arg("-chardev")
                .arg(with_id(backend, &format!("port{n}")));
            qemu.arg("-device")
                .arg(format!("virtserialport,chardev=port{n},name={port}"));
        }
        for (n, disk) in self.disks.iter().enumerate() {
            let more = match disk.changes {
                Changes::Kept => "discard=unmap",
                Changes::Forgotten => "snapshot=on",
                Changes::Refused => "read-only=on",
            };
            qemu.arg("-drive").arg(format!(
                "if=none,id=disk{n},format=raw,file={},{more}",
                escape(&disk.path)
            ));
            qemu.arg("-device")
                .arg(format!("virtio-blk-pci,drive=disk{n}"));
        }
        with_lab(&qemu)
    }

    /// The exit status that the machine reported, if it came that far.
    pub fn reported(&self) -> Option<i32> {
        let text = fs::read_to_string(self.status).ok()?;
        text.lines().next()?.trim().parse().ok()
    }
}

/// The name of the lab's hidden command that ends with the lab.
pub const WITH_LAB: &str = "with-lab";

/// `command` as a child that the system kills when the lab dies, started by
/// way of the lab's own [`WITH_LAB`] command.
fn with_lab(command: &Command) -> Result<Command> {
    let lab = std::env::current_exe().at(Path::new("/proc/self/exe"))?;
    let mut wrapped = Command::new(lab);
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
    Ok(wrapped)
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

/// The backend of a chardev, given as `kind,options`, with an id.
fn with_id(backend: &str, id: &str) -> String {
    match backend.split_once(',') {
        Some((kind, options)) => format!("{kind},id={id},{options}"),
        None => format!("{backend},id={id}"),
    }
}

/// A path as a value in QEMU's option lists, where a comma is doubled.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Parts {
        let kernel = Kernel {
            release: "6.12".into(),
            image: "/k".into(),
            modules: "/m".into(),
        };
        Parts {
            machine: Machine::named("aarch64-gicv2").unwrap(),
            emulator: Emulator::Installed("/usr/bin/qemu".into()),
            kernel: kernel.clone(),
            guest_kernel: kernel,
            busybox: "/b".into(),
        }
    }

    #[test]
    fn a_machine_with_a_disk() {
        let parts = parts();
        let disks = [Disk {
            path: "/tmp/a,b.img".into(),
            changes: Changes::Refused,
        }];
        let command = Start {
            parts: &parts,
            initramfs: Path::new("/i"),
            memory: 2048,
            disks: &disks,
            stdio: Stdio::Streams("/tmp/log".into()),
            status: Path::new("/tmp/s"),
        }
        .command()
        .unwrap();
        let words: Vec<String> = command
            .get_args()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        let line = words.join(" ");
        assert!(line.starts_with("with-lab "), "{line}");
        assert!(
            line.contains("gic-version=2") && line.contains("-m 2048M"),
            "{line}"
        );
        assert!(line.contains("file=/tmp/a,,b.img,read-only=on"), "{line}");
        assert!(line.contains("-chardev stdio,id=port2 "), "{line}");
        assert!(
            line.contains("virtserialport,chardev=port2,name=org.crossvisor.input"),
            "{line}"
        );
        assert!(
            line.contains("-chardev file,id=console,path=/tmp/log"),
            "{line}"
        );
        assert!(line.contains("name=org.crossvisor.status"), "{line}");
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
        let parts = parts();
        let start = Start {
            parts: &parts,
            initramfs: Path::new("/i"),
            memory: 1,
            disks: &[],
            stdio: Stdio::Console,
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
