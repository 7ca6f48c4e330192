//! What the built-in `/init` is told, as JSON in the initramfs.

use serde::{Deserialize, Serialize};

/// Where `/init` reads its configuration.
pub const PATH: &str = "/etc/crossvisor/init.json";

/// The usual name of the virtio-serial port that carries a command's standard
/// input and output.
pub const IO_PORT: &str = "org.crossvisor.io";

/// The usual name of a virtio-serial port for standard input only; see
/// [`Io::Ports`] for why it may have to be a port of its own.
pub const STDIN_PORT: &str = "org.crossvisor.stdin";

/// The usual name of a virtio-serial port for standard error only.
pub const STDERR_PORT: &str = "org.crossvisor.stderr";

/// The usual name of the virtio-serial port that the exit status goes to, as a
/// decimal number and a line feed.
///
/// The guest closes the port and powers off right after it has queued that
/// line: a VMM must look at what is in its transmit queues before it ends.
pub const STATUS_PORT: &str = "org.crossvisor.status";

/// What `/init` does. Every field has a default: a shell on the console, and
/// power-off after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InitConfig {
    /// Kernel modules by their paths in the initramfs, in the order in which
    /// they are loaded, with the parameters that the kernel's command line has
    /// for them. [`Builder::modules`](super::Builder::modules) fills it.
    pub modules: Vec<String>,
    /// What is run: by `/bin/sh -c` where there is a shell, otherwise split at
    /// white space and executed. A shell when there is none.
    pub command: Option<String>,
    /// Whether a short report on the guest (kernel, CPUs, memory, devices) is
    /// written first. With it, no shell is run when there is no command.
    pub report: bool,
    /// Where the command's standard input and output go.
    pub io: Io,
    /// Name of the virtio-serial port that takes the exit status.
    pub status_port: Option<String>,
    /// The host name.
    pub hostname: Option<String>,
    /// Environment of the command, beyond HOME, PATH and TERM.
    pub env: Vec<(String, String)>,
    /// Size of the terminal in rows and columns, for a command on the console.
    pub terminal: Option<(u16, u16)>,
    /// File systems to mount before the command runs, in order. One that can't
    /// be mounted ends the guest with status 125.
    pub mounts: Vec<Mount>,
    /// The command's working directory; `/` by default.
    pub workdir: Option<String>,
    /// What happens when the command has ended.
    pub at_end: AtEnd,
    /// What Ctrl-Alt-Del means: a reboot, as on PCs, unless told otherwise.
    pub ctrl_alt_del: AtEnd,
    /// Whether `/init` runs `busybox --install` first.
    /// [`Builder::busybox`](super::Builder::busybox) sets it.
    pub busybox_install: bool,
    /// Whether `/init` tells what it does on the console.
    pub verbose: bool,
}

impl Default for InitConfig {
    fn default() -> Self {
        InitConfig {
            modules: Vec::new(),
            command: None,
            report: false,
            io: Io::Console,
            status_port: None,
            hostname: None,
            env: Vec::new(),
            terminal: None,
            mounts: Vec::new(),
            workdir: None,
            at_end: AtEnd::PowerOff,
            ctrl_alt_del: AtEnd::Reboot,
            busybox_install: false,
            verbose: false,
        }
    }
}

/// Where the command's standard input and output go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Io {
    /// The console, as a controlling terminal with its own session.
    #[default]
    Console,
    /// Virtio-serial ports, which are plain streams, by their names. A name
    /// that is given for several streams is opened once.
    ///
    /// While the host end of a port is closed, the guest reads end-of-file from
    /// it and *blocks* in writing to it (Linux drivers/char/virtio_console.c,
    /// `port_fops_read` and `will_write_block`). So a host that closes the
    /// input early and still wants the output gives two ports. It must keep
    /// what it has for the guest, and then the news that it closed its end,
    /// until the guest has opened the port.
    Ports {
        /// Standard input; `/dev/null` when absent.
        stdin: Option<String>,
        /// Standard output.
        stdout: String,
        /// Standard error; with standard output when absent.
        stderr: Option<String>,
    },
}

impl Io {
    /// One port for all three.
    pub fn port(name: impl Into<String>) -> Io {
        let name = name.into();
        Io::Ports {
            stdin: Some(name.clone()),
            stdout: name,
            stderr: None,
        }
    }
}

/// A file system to be mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Device, or the tag of a shared folder.
    pub source: String,
    /// Where; made if need be.
    pub target: String,
    /// Its type, such as `ext4`, `9p` or `virtiofs`.
    pub fstype: String,
    /// Options of the file system, comma-separated.
    #[serde(default)]
    pub options: String,
    /// Whether it is mounted read-only.
    #[serde(default)]
    pub read_only: bool,
}

/// What happens when the command has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtEnd {
    /// The machine is powered off.
    #[default]
    PowerOff,
    /// The machine is reset.
    Reboot,
}
