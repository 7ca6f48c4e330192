//! What can be said on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use crossvisor_vmm::config::{Console, Disk, Net, Transport, VmConfig};

/// A KVM virtual machine monitor that runs the same on every architecture.
#[derive(Parser)]
#[command(version, about, propagate_version = true)]
pub struct Cli {
    /// Say more on standard error; twice for even more
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run a virtual machine on this host
    Run(RunArgs),
    /// Print the machine that would be built, for any architecture
    Plan(PlanArgs),
    /// Say what this host's KVM can do, and what it cannot
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write all of them
    Man {
        /// Folder to write the pages of all commands to
        directory: Option<PathBuf>,
    },
}

/// What describes the machine, for every command that builds or plans one.
#[derive(Args)]
pub struct MachineArgs {
    /// Name of the VM; MAC addresses are derived from it
    #[arg(long, default_value = "crossvisor")]
    pub name: String,
    /// Number of virtual CPUs
    #[arg(long, short = 'c', default_value_t = 1, value_name = "N")]
    pub cpus: u32,
    /// Guest memory, such as 64M or 2G (MiB when there is no unit)
    #[arg(long, short = 'm', default_value = "512M", value_name = "SIZE", value_parser = parse_size)]
    pub memory: u64,
    /// Back guest memory by the host's huge pages
    #[arg(long)]
    pub hugepages: bool,
    /// Kernel command line, appended to the machine's defaults
    #[arg(
        long,
        default_value = "",
        value_name = "ARGS",
        hide_default_value = true
    )]
    pub cmdline: String,
    /// Leave the machine's default kernel command line out
    #[arg(long)]
    pub no_default_cmdline: bool,
    /// Interrupt controller; what there is depends on architecture and host
    #[arg(long, value_name = "KIND")]
    pub irqchip: Option<String>,
    /// How the guest's MMU translates, where there is a choice (ppc64le: radix
    /// or hpt)
    #[arg(long, value_name = "KIND")]
    pub mmu: Option<String>,
    /// Virtio transport [default: the architecture's own]
    #[arg(long, value_enum)]
    pub transport: Option<TransportArg>,
    /// Offer virtio devices by the legacy interface alone, as before virtio 1.0
    /// (s390x)
    #[arg(long)]
    pub virtio_legacy: bool,
    /// Which device the guest's console is
    #[arg(long, value_enum, default_value_t = ConsoleArg::Serial)]
    pub console: ConsoleArg,
    /// A disk: a raw image file or a block device
    #[arg(long, value_name = "PATH[,readonly][,serial=TEXT][,queues=N]", value_parser = parse_disk)]
    pub disk: Vec<Disk>,
    /// A network interface on a tap of the host's
    #[arg(long, value_name = "tap=NAME[,mac=ADDRESS][,queues=N]", value_parser = parse_net)]
    pub net: Vec<Net>,
    /// Leave the entropy device out
    #[arg(long)]
    pub no_entropy: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum TransportArg {
    /// PCI
    Pci,
    /// MMIO register blocks
    Mmio,
    /// Channel I/O
    Ccw,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConsoleArg {
    /// The machine's own: a serial port, hvterm or SCLP
    #[value(alias = "native")]
    Serial,
    /// virtio-console
    Virtio,
    /// None
    None,
}

impl MachineArgs {
    /// The configuration that these arguments ask for.
    pub fn config(&self) -> VmConfig {
        VmConfig {
            name: self.name.clone(),
            cpus: self.cpus,
            memory: self.memory,
            hugepages: self.hugepages,
            cmdline: self.cmdline.clone(),
            default_cmdline: !self.no_default_cmdline,
            irqchip: self.irqchip.clone(),
            mmu: self.mmu.clone(),
            transport: self.transport.map(|transport| match transport {
                TransportArg::Pci => Transport::Pci,
                TransportArg::Mmio => Transport::Mmio,
                TransportArg::Ccw => Transport::Ccw,
            }),
            virtio_legacy: self.virtio_legacy,
            console: match self.console {
                ConsoleArg::Serial => Console::Native,
                ConsoleArg::Virtio => Console::Virtio,
                ConsoleArg::None => Console::None,
            },
            disks: self.disk.clone(),
            nets: self.net.clone(),
            entropy: !self.no_entropy,
            ports: Vec::new(),
        }
    }
}

#[derive(Args)]
pub struct RunArgs {
    /// Kernel image [default: this host's own]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk [default: a built-in one]
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Run a command in the guest, power off, and exit with its status (125
    /// when the guest ended without one)
    #[arg(long, value_name = "COMMAND", conflicts_with = "initrd")]
    pub exec: Option<String>,
    /// Add a file or folder to the built-in initial RAM disk
    #[arg(long, value_name = "PATH[:GUEST-PATH]", conflicts_with = "initrd")]
    pub initramfs_add: Vec<String>,
    /// Module folder of the kernel, such as /lib/modules/VERSION [default: the
    /// one of the host's kernel]
    #[arg(long, value_name = "DIR", conflicts_with = "initrd")]
    pub modules: Option<PathBuf>,
    #[command(flatten)]
    pub machine: MachineArgs,
}

#[derive(Args)]
pub struct PlanArgs {
    /// Architecture of the guest [default: this host's]
    #[arg(long)]
    pub arch: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print the device tree, too (aarch64, riscv64, ppc64le): its source text, with
    /// the plan as a comment
    #[arg(long, conflicts_with = "json")]
    pub device_tree: bool,
    /// Write what the guest reads about its machine (FDT, ACPI tables) here
    #[arg(long, value_name = "DIR")]
    pub dump: Option<PathBuf>,
    #[command(flatten)]
    pub machine: MachineArgs,
}

#[derive(Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Parses a size: a whole number with K, M, G or T (binary), MiB without.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size; write for example 512M or 2G");
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let shift = match unit.to_ascii_lowercase().as_str() {
        "k" | "kib" => 10,
        "" | "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(wrong)?;
    match bytes {
        0 => Err(wrong()),
        _ => Ok(bytes),
    }
}

/// Splits `NAME=VALUE` and bare words at commas.
fn fields(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    text.split(',').map(|field| match field.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (field, None),
    })
}

fn parse_queues(value: &str) -> Result<u16, String> {
    match value.parse() {
        Ok(queues) if (1..=64).contains(&queues) => Ok(queues),
        _ => Err(format!("queues={value}: a number from 1 to 64 is wanted")),
    }
}

fn parse_disk(text: &str) -> Result<Disk, String> {
    let (path, options) = match text.split_once(',') {
        Some((path, options)) => (path, Some(options)),
        None => (text, None),
    };
    if path.is_empty() {
        return Err("a path comes first: PATH[,readonly][,serial=TEXT][,queues=N]".into());
    }
    let mut disk = Disk {
        path: path.into(),
        read_only: false,
        serial: None,
        queues: None,
    };
    for field in options.into_iter().flat_map(fields) {
        match field {
            ("readonly" | "ro", None) => disk.read_only = true,
            ("serial", Some(serial)) if serial.len() <= 20 => disk.serial = Some(serial.into()),
            ("serial", Some(_)) => return Err("serial: at most 20 bytes".into()),
            ("queues", Some(value)) => disk.queues = Some(parse_queues(value)?),
            (name, _) => {
                return Err(format!(
                    "`{name}` is not an option of a disk; there are readonly, serial=TEXT and \
                     queues=N"
                ));
            }
        }
    }
    Ok(disk)
}

fn parse_net(text: &str) -> Result<Net, String> {
    let mut tap = None;
    let mut mac = None;
    let mut queues = 1;
    for field in fields(text) {
        match field {
            ("tap", Some(name)) if (1..16).contains(&name.len()) => tap = Some(name.to_string()),
            ("tap", _) => return Err("tap: an interface name has 1 to 15 bytes".into()),
            ("mac", Some(address)) => mac = Some(parse_mac(address)?),
            ("queues", Some(value)) => queues = parse_queues(value)?,
            (name, _) => {
                return Err(format!(
                    "`{name}` is not an option of a network interface; there are tap=NAME, \
                     mac=ADDRESS and queues=N"
                ));
            }
        }
    }
    let tap = tap.ok_or("tap=NAME is missing")?;
    Ok(Net { tap, mac, queues })
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("`{text}` is not a MAC address such as 52:54:00:12:34:56");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2);
        *byte = part
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .ok_or_else(wrong)?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac[0] & 1 != 0 {
        return Err(format!(
            "`{text}` is a group address; an interface needs an individual one (first byte even)"
        ));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("64"), Ok(64 << 20));
        assert_eq!(parse_size("2g"), Ok(2 << 30));
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        for wrong in ["", "M", "0", "-1M", "1.5G", "2X", "99999999999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn disks() {
        let disk = parse_disk("a.img,readonly,serial=S1,queues=2").unwrap();
        assert_eq!(disk.path, PathBuf::from("a.img"));
        assert!(disk.read_only);
        assert_eq!(disk.serial.as_deref(), Some("S1"));
        assert_eq!(disk.queues, Some(2));
        for wrong in [
            "",
            ",ro",
            "a,b",
            "a,queues=0",
            "a,serial=123456789012345678901",
        ] {
            assert!(parse_disk(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nets() {
        let net = parse_net("tap=tap0,mac=52:54:00:12:34:56,queues=2").unwrap();
        assert_eq!(net.mac, Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        assert_eq!((net.tap.as_str(), net.queues), ("tap0", 2));
        for wrong in [
            "",
            "tap0",
            "tap=",
            "tap=0123456789abcdef",
            "tap=a,mac=1",
            "tap=a,x=1",
        ] {
            assert!(parse_net(wrong).is_err(), "{wrong}");
        }
        assert!(parse_net("tap=a,mac=01:00:5e:00:00:01").is_err());
    }
}
