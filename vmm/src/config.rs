//! What the user asked for, free of architecture and serialisable.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A virtual machine as the user describes it. The same value serves the
/// command line, a file and a control interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// The VM's name; what is derived from it (MAC addresses) is stable.
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Back guest memory by the host's huge pages.
    pub hugepages: bool,
    /// Kernel command line of the user, appended to the machine's defaults.
    pub cmdline: String,
    /// Whether the machine's default command line is used.
    pub default_cmdline: bool,
    /// Interrupt controller by the architecture's name for it; `None` lets the
    /// architecture choose from what the host offers.
    pub irqchip: Option<String>,
    /// How the guest's MMU translates addresses, by the architecture's name for
    /// it; `None` lets the architecture choose. Few have a choice.
    pub mmu: Option<String>,
    /// Virtio transport; `None` is the architecture's native one.
    pub transport: Option<Transport>,
    /// Whether devices offer the legacy interface and no other, as before virtio
    /// 1.0.
    pub virtio_legacy: bool,
    /// Which device the guest's console is.
    pub console: Console,
    /// Disks, in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// Network interfaces, in the order the guest sees them.
    pub nets: Vec<Net>,
    /// Whether there is an entropy device.
    pub entropy: bool,
    /// Named virtio-console ports besides the console.
    pub ports: Vec<String>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: "crossvisor".into(),
            cpus: 1,
            memory: 512 << 20,
            hugepages: false,
            cmdline: String::new(),
            default_cmdline: true,
            irqchip: None,
            mmu: None,
            transport: None,
            virtio_legacy: false,
            console: Console::Native,
            disks: Vec::new(),
            nets: Vec::new(),
            entropy: true,
            ports: Vec::new(),
        }
    }
}

/// How virtio devices are found and driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Virtio over PCI (virtio 1.2, section 4.1).
    Pci,
    /// Virtio over MMIO (section 4.2).
    Mmio,
    /// Virtio over channel I/O (section 4.3).
    Ccw,
}

/// Which device the guest's console is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// The machine's own: a UART, hvterm or SCLP.
    Native,
    /// virtio-console, `hvc0` in a Linux guest.
    Virtio,
    /// None: the guest's output goes nowhere.
    None,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Serial number that the guest reads, at most 20 bytes.
    #[serde(default)]
    pub serial: Option<String>,
    /// Number of queues; `None` is one for each vCPU, within limits.
    #[serde(default)]
    pub queues: Option<u16>,
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// Name of the host's tap interface; made when it does not exist and that
    /// is permitted.
    pub tap: String,
    /// MAC address; `None` derives a stable one from the VM's name.
    #[serde(default)]
    pub mac: Option<[u8; 6]>,
    /// Number of queue pairs.
    #[serde(default = "one")]
    pub queues: u16,
}

fn one() -> u16 {
    1
}

/// The files a guest is started from.
#[derive(Clone, Debug)]
pub struct BootImages {
    /// The kernel, in a format that the architecture boots.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<Initrd>,
}

/// Where an initial RAM disk comes from.
#[derive(Clone, Debug)]
pub enum Initrd {
    /// A file of the user's.
    File(PathBuf),
    /// Made on the fly.
    Built(Arc<Vec<u8>>),
}
