//! What of the host's a VM uses: opened once, and used again after each reset.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crossvisor_devices::chardev::ConsoleInput;
use crossvisor_devices::disk::{DiskOptions, RawDisk};
use crossvisor_devices::output::Output;
use crossvisor_devices::tap::Tap;
use crossvisor_devices::virtio::block::{Block, BlockOptions};
use crossvisor_devices::virtio::console::{ConsoleOptions, Outputs};
use crossvisor_devices::virtio::input::PowerKey;
use crossvisor_devices::virtio::net::{Net, NetOptions, mac_for};
use crossvisor_devices::virtio::rng::Rng;
use crossvisor_devices::virtio::{self, VirtioDevice};
use rustix::termios::tcgetwinsize;

use crate::config::{Console, VmConfig};
use crate::error::{Error, Result};
use crate::plan::{Device, DeviceKind};

/// Where the guest's console prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleOutput {
    /// Standard output.
    Stdout,
    /// Standard error, when standard output is the command's.
    Stderr,
}

/// How long a byte may wait for others before it goes to the host: guests print
/// byte by byte.
const COLLECT_TIME: Duration = Duration::from_millis(1);

impl ConsoleOutput {
    fn open(self) -> Result<Box<dyn Write + Send>> {
        match self {
            ConsoleOutput::Stdout => duplicate(io::stdout().as_fd()),
            ConsoleOutput::Stderr => duplicate(io::stderr().as_fd()),
        }
    }

    fn output(self) -> Result<Arc<Output>> {
        let output = Output::collecting("console-out", self.open()?, COLLECT_TIME);
        made("the console's output", output)
    }
}

fn made(what: &str, output: io::Result<Output>) -> Result<Arc<Output>> {
    output
        .map(Arc::new)
        .map_err(|source| Error::io(what, source))
}

/// A descriptor of our own for one of the standard streams: unbuffered, and
/// writable from any thread.
fn duplicate(stream: BorrowedFd<'_>) -> Result<Box<dyn Write + Send>> {
    let stream = stream.try_clone_to_owned();
    let stream = stream.map_err(|source| Error::io("standard output", source))?;
    Ok(Box::new(File::from(stream)))
}

/// A named console port, and what is at the host's end of it.
#[derive(Clone)]
pub struct Port {
    name: String,
    stdin: bool,
    output: Option<Arc<Output>>,
}

impl Port {
    /// A port that reads standard input.
    pub fn stdin(name: &str) -> Self {
        Self {
            name: name.into(),
            stdin: true,
            output: None,
        }
    }

    /// A port that writes to standard output.
    ///
    /// # Errors
    /// As for [`writer`](Self::writer).
    pub fn stdout(name: &str) -> Result<Self> {
        Self::writer(name, ConsoleOutput::Stdout.open()?)
    }

    /// A port that writes to standard error.
    ///
    /// # Errors
    /// As for [`writer`](Self::writer).
    pub fn stderr(name: &str) -> Result<Self> {
        Self::writer(name, ConsoleOutput::Stderr.open()?)
    }

    /// A port that writes to `sink`, from the first run of the VM to the last.
    ///
    /// # Errors
    /// The host lacks a descriptor or a thread for it.
    pub fn writer(name: &str, sink: Box<dyn Write + Send>) -> Result<Self> {
        let output = made(name, Output::new("port-out", sink))?;
        Ok(Self {
            name: name.into(),
            stdin: false,
            output: Some(output),
        })
    }
}

impl Port {
    /// The port's host end for one run of the VM.
    fn open(&self) -> Result<virtio::console::Port> {
        let input = match self.stdin {
            true => {
                let stdin = io::stdin().as_fd().try_clone_to_owned();
                Some(stdin.map_err(|source| Error::io("standard input", source))?)
            }
            false => None,
        };
        Ok(virtio::console::Port {
            name: self.name.clone(),
            input,
            output: self.output.clone(),
            on_open: None,
        })
    }
}

/// What of the host's a VM uses.
pub struct Resources {
    config: VmConfig,
    /// Where the guest's console prints. A reader that does not read holds it
    /// up once, not each run anew.
    console: Arc<Output>,
    nowhere: Arc<Output>,
    ports: Vec<Port>,
    disks: Vec<Arc<RawDisk>>,
    taps: Vec<Arc<Tap>>,
}

/// A virtio device, and its console input if it has one.
pub struct Made {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// Where what the user types goes.
    pub console_input: Option<Arc<dyn ConsoleInput>>,
    /// Outputs that the end of the VM waits for.
    pub outputs: Option<Outputs>,
    /// What presses the guest's power button, if the device has it.
    pub power_button: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Made {
    fn new(device: impl VirtioDevice + 'static) -> Self {
        Self {
            device: Box::new(device),
            console_input: None,
            outputs: None,
            power_button: None,
        }
    }
}

impl Resources {
    /// Opens what `config` names. Disks are locked from here on.
    ///
    /// # Errors
    /// A disk or a tap cannot be opened; names it.
    pub fn open(config: &VmConfig, output: ConsoleOutput, ports: Vec<Port>) -> Result<Self> {
        let disks = config.disks.iter().map(|disk| {
            let options = DiskOptions {
                read_only: disk.read_only,
            };
            RawDisk::open(&disk.path, options)
                .map(Arc::new)
                .map_err(|error| Error::Boot(format!("--disk: {error}")))
        });
        let taps = config.nets.iter().map(|net| {
            Tap::open(&net.tap, net.queues)
                .map(Arc::new)
                .map_err(|error| Error::Boot(format!("--net: {error}")))
        });
        let nowhere = made("the console's output", Output::nowhere())?;
        let console = match config.console {
            Console::None => nowhere.clone(),
            _ => output.output()?,
        };
        Ok(Self {
            config: config.clone(),
            console,
            nowhere,
            ports,
            disks: disks.collect::<Result<_>>()?,
            taps: taps.collect::<Result<_>>()?,
        })
    }

    /// Whether guest memory is backed by huge pages.
    pub fn hugepages(&self) -> bool {
        self.config.hugepages
    }

    /// Whether virtio devices have the legacy interface alone.
    pub(crate) fn virtio_legacy(&self) -> bool {
        self.config.virtio_legacy
    }

    /// Whether the guest's console is the machine's own device.
    pub(crate) fn console_is_native(&self) -> bool {
        self.config.console == Console::Native
    }

    /// Where the machine's own console prints: nowhere when the console is
    /// another device or there is none.
    pub(crate) fn native_console(&self) -> Arc<Output> {
        self.console_of(Console::Native)
    }

    fn console_of(&self, kind: Console) -> Arc<Output> {
        match self.config.console == kind {
            true => self.console.clone(),
            false => self.nowhere.clone(),
        }
    }

    /// Makes the device that the plan calls for.
    pub(crate) fn device(&self, planned: &Device) -> Result<Made> {
        match planned.kind {
            DeviceKind::Block => self.block(planned),
            DeviceKind::Console => self.console(planned),
            DeviceKind::Net => self.net(planned),
            DeviceKind::Entropy => Ok(Made::new(Rng::new(&planned.name))),
            DeviceKind::PowerKey => power_key(planned),
        }
    }

    fn block(&self, planned: &Device) -> Result<Made> {
        let disk = self.config.disks.get(planned.index);
        let (disk, file) = disk
            .zip(self.disks.get(planned.index))
            .ok_or_else(|| not_configured(planned))?;
        let options = BlockOptions {
            serial: disk.serial.clone().unwrap_or_default(),
            queues: disk.queues.unwrap_or(self.queues()),
            ..BlockOptions::default()
        };
        Ok(Made::new(Block::new(&planned.name, file.clone(), options)))
    }

    fn net(&self, planned: &Device) -> Result<Made> {
        let net = self.config.nets.get(planned.index);
        let (net, tap) = net
            .zip(self.taps.get(planned.index))
            .ok_or_else(|| not_configured(planned))?;
        let derived = || mac_for(&self.config.name, planned.index as u32);
        let options = NetOptions {
            mac: net.mac.unwrap_or_else(derived),
            mtu: u16::try_from(tap.mtu()).ok(),
            queue_size: NET_QUEUE_SIZE,
        };
        Net::new(&planned.name, tap.clone(), options)
            .map(Made::new)
            .map_err(|source| Error::io(planned.name.clone(), source))
    }

    fn console(&self, planned: &Device) -> Result<Made> {
        let failed = |source| Error::io(planned.name.clone(), source);
        let ours = self.config.console == Console::Virtio;
        let size = tcgetwinsize(io::stdout()).ok();
        let size = size.map(|size| (size.ws_col, size.ws_row));
        let ports = self.ports.iter().map(Port::open);
        let options = ConsoleOptions {
            output: self.console_of(Console::Virtio),
            size: size.filter(|_| ours),
            ports: ports.collect::<Result<_>>()?,
        };
        let console = virtio::console::Console::new(&planned.name, options).map_err(failed)?;
        Ok(Made {
            console_input: ours.then(|| console.input()),
            // A console's last lines are worth a moment only, but a command's
            // output is awaited as any program's in a pipeline.
            outputs: (!self.ports.is_empty()).then(|| console.outputs()),
            ..Made::new(console)
        })
    }

    /// Queues of a device for which the user names none: one for each vCPU, as
    /// long as more of them still help.
    fn queues(&self) -> u16 {
        u16::try_from(self.config.cpus).map_or(MAX_QUEUES, |cpus| cpus.clamp(1, MAX_QUEUES))
    }
}

fn power_key(planned: &Device) -> Result<Made> {
    let failed = |source| Error::io(planned.name.clone(), source);
    let device = PowerKey::new(&planned.name).map_err(failed)?;
    let presser = device.presser().map_err(failed)?;
    let press = move || {
        if let Err(error) = presser.press() {
            log::warn!("power key: {error}");
        }
    };
    Ok(Made {
        power_button: Some(Box::new(press)),
        ..Made::new(device)
    })
}

fn not_configured(planned: &Device) -> Error {
    Error::Boot(format!(
        "internal error: the plan has {}, the configuration does not",
        planned.name
    ))
}

/// Descriptors in each queue of a network device: a burst of full-sized
/// segments (64 KiB in 18 descriptors each, without indirect ones).
const NET_QUEUE_SIZE: u16 = 256;

/// The largest number of queues, and so of threads, that a device gets unasked.
const MAX_QUEUES: u16 = 8;
