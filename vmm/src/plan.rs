//! A plan: the machine that would be built, as data. It can be printed, tested
//! and compared on any host, for any architecture.

use std::collections::BTreeSet;
use std::fmt;

use crossvisor_devices::pci::intx_gsi_index;
use serde::Serialize;

use crate::config::{Console, Transport, VmConfig};
use crate::error::{Error, Result};

/// A range of addresses or ports, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Range {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Range {
    /// A range from `base`, `size` bytes long.
    pub const fn new(base: u64, size: u64) -> Self {
        Self { base, size }
    }

    /// The first address after the range.
    pub const fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }

    /// Whether the two have an address in common.
    pub const fn overlaps(&self, other: &Range) -> bool {
        self.base < other.end() && other.base < self.end()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#014x}-{:#014x}",
            self.base,
            self.end().saturating_sub(1)
        )
    }
}

/// A named range that belongs to the machine rather than to RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// What is there.
    pub name: String,
    /// Whether it is in port space (x86) rather than in memory.
    pub ports: bool,
    /// Where.
    pub range: Range,
    /// The interrupt (GSI) of what is there.
    pub gsi: Option<u32>,
}

/// Kinds of virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// virtio-console.
    Console,
    /// virtio-blk.
    Block,
    /// virtio-net.
    Net,
    /// virtio-rng.
    Entropy,
    /// virtio-input with a power key, on machines without one of their own.
    PowerKey,
}

impl DeviceKind {
    /// The device type (virtio 1.2, section 5).
    pub const fn device_type(self) -> u16 {
        match self {
            DeviceKind::Net => 1,
            DeviceKind::Block => 2,
            DeviceKind::Console => 3,
            DeviceKind::Entropy => 4,
            DeviceKind::PowerKey => 18,
        }
    }

    /// Linux's module with the device's driver.
    pub const fn driver(self) -> &'static str {
        match self {
            DeviceKind::Console => "virtio_console",
            DeviceKind::Block => "virtio_blk",
            DeviceKind::Net => "virtio_net",
            DeviceKind::Entropy => "virtio_rng",
            DeviceKind::PowerKey => "virtio_input",
        }
    }
}

/// Where a virtio device sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    /// A device number on PCI bus 0.
    Pci {
        /// 1 to 31; 0 is the host bridge.
        device: u8,
    },
    /// A register block.
    Mmio {
        /// Guest-physical range.
        range: Range,
        /// Interrupt (GSI).
        gsi: u32,
    },
    /// A subchannel's device number in channel subsystem 0xfe.
    Ccw {
        /// Device number.
        devno: u16,
    },
}

impl Slot {
    /// Linux's module with the transport's driver; none where it is built in or
    /// not there, never a module (virtio-ccw).
    pub const fn driver(&self) -> Option<&'static str> {
        match self {
            Slot::Pci { .. } => Some("virtio_pci"),
            Slot::Mmio { .. } => Some("virtio_mmio"),
            Slot::Ccw { .. } => None,
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Pci { device } => write!(f, "pci 00:{device:02x}.0"),
            Slot::Mmio { range, gsi } => write!(f, "mmio {:#x} gsi {gsi}", range.base),
            Slot::Ccw { devno } => write!(f, "ccw fe.0.{devno:04x}"),
        }
    }
}

/// A virtio device of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Name in messages: `disk0`, `net1`.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Its number among those of its kind, which is its index in the
    /// configuration.
    pub index: usize,
    /// Where it sits.
    pub slot: Slot,
}

/// A window through which the CPU reaches PCI memory space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PciWindow {
    /// Guest-physical range.
    pub range: Range,
    /// PCI bus address of its first byte.
    pub bus_address: u64,
}

/// The PCI root of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pci {
    /// Configuration space by ECAM, 1 MiB for each bus; `None` where firmware
    /// calls reach it.
    pub ecam: Option<Range>,
    /// Window below 4 GiB.
    pub mmio32: PciWindow,
    /// Window above.
    pub mmio64: PciWindow,
    /// GSIs of the four interrupt wires; slot and pin swizzle into them.
    pub intx: [u32; 4],
    /// Whether devices get MSI-X.
    pub msi: bool,
}

impl Pci {
    /// The GSI of interrupt pin `pin` (1 is INTA#) of the device in `slot`.
    pub fn intx_gsi(&self, slot: u8, pin: u8) -> u32 {
        let [a, b, c, d] = self.intx;
        match intx_gsi_index(slot, pin) {
            0 => a,
            1 => b,
            2 => c,
            _ => d,
        }
    }
}

/// The machine that would be built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The architecture's canonical name.
    pub arch: &'static str,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest RAM, by rising address.
    pub memory: Vec<Range>,
    /// What the interrupt controller is, by the architecture's name for it.
    pub irqchip: &'static str,
    /// How the guest's MMU translates addresses, where the architecture has a
    /// choice.
    pub mmu: Option<&'static str>,
    /// The machine's own devices and controllers, by rising address.
    pub regions: Vec<Region>,
    /// The first interrupt number (GSI) that is free for message routes.
    pub first_free_gsi: u32,
    /// The PCI root, if the machine has one.
    pub pci: Option<Pci>,
    /// Virtio devices, in the order in which the guest finds them.
    pub devices: Vec<Device>,
    /// The whole kernel command line.
    pub cmdline: String,
    /// Kernel modules that a Linux guest needs for the machine's own devices,
    /// by name; those of virtio devices follow from `devices` and the slots.
    pub guest_modules: Vec<&'static str>,
    /// Whether a request to power off reaches Linux as Ctrl-Alt-Del, rather
    /// than as a power button.
    pub power_off_is_ctrl_alt_del: bool,
}

impl Plan {
    /// Guest memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.memory.iter().map(|range| range.size).sum()
    }

    /// The region called `name`.
    pub fn region(&self, name: &str) -> Option<&Region> {
        self.regions.iter().find(|region| region.name == name)
    }

    /// Linux's modules with the drivers of the virtio devices and of their
    /// transports.
    pub fn drivers(&self) -> BTreeSet<&'static str> {
        let of = |device: &Device| [device.slot.driver(), Some(device.kind.driver())];
        self.devices.iter().flat_map(of).flatten().collect()
    }

    /// Checks what every plan must keep: nothing overlaps, everything is
    /// aligned to `page_size` where the hypervisor maps it.
    ///
    /// # Errors
    /// Names the two ranges, or the one that is not aligned.
    pub fn check(&self, page_size: u64) -> Result<()> {
        let mut ranges: Vec<(String, Range)> = Vec::new();
        for range in &self.memory {
            if range.base % page_size != 0 || range.size % page_size != 0 {
                return Err(Error::config(
                    "--memory",
                    format!(
                        "RAM at {range} is not a multiple of the host's {page_size}-byte pages"
                    ),
                ));
            }
            ranges.push(("RAM".into(), *range));
        }
        for region in self.regions.iter().filter(|region| !region.ports) {
            ranges.push((region.name.clone(), region.range));
        }
        if let Some(pci) = &self.pci {
            ranges.extend(pci.ecam.map(|ecam| ("PCI ECAM".into(), ecam)));
            ranges.push(("PCI memory below 4G".into(), pci.mmio32.range));
            ranges.push(("PCI memory above 4G".into(), pci.mmio64.range));
        }
        for device in &self.devices {
            if let Slot::Mmio { range, .. } = device.slot {
                ranges.push((device.name.clone(), range));
            }
        }
        ranges.sort_by_key(|(_, range)| range.base);
        for pair in ranges.windows(2) {
            if let [(first, a), (second, b)] = pair
                && a.overlaps(b)
            {
                return Err(Error::config(
                    "--memory",
                    format!("{first} at {a} and {second} at {b} overlap"),
                ));
            }
        }
        Ok(())
    }
}

/// The virtio devices that `config` asks for, in the order in which every
/// machine numbers them; the architecture gives each its slot by `place`.
///
/// # Errors
/// What `place` returns: no room for a device.
pub fn devices(
    config: &VmConfig,
    mut place: impl FnMut(DeviceKind, usize) -> Result<Slot>,
) -> Result<Vec<Device>> {
    let console = config.console == Console::Virtio || !config.ports.is_empty();
    let kinds = [
        (DeviceKind::Console, "console", usize::from(console)),
        (DeviceKind::Block, "disk", config.disks.len()),
        (DeviceKind::Net, "net", config.nets.len()),
        (DeviceKind::Entropy, "entropy", usize::from(config.entropy)),
    ];
    let mut devices = Vec::new();
    for (kind, name, count) in kinds {
        for index in 0..count {
            devices.push(Device {
                name: format!("{name}{index}"),
                kind,
                index,
                slot: place(kind, index)?,
            });
        }
    }
    Ok(devices)
}

/// Hands out PCI device numbers 1 to 31 on bus 0, for [`devices`].
#[derive(Debug, Default)]
pub struct PciSlots(u8);

impl PciSlots {
    /// The next free slot.
    ///
    /// # Errors
    /// All 31 are taken.
    pub fn take(&mut self) -> Result<Slot> {
        if self.0 == 31 {
            return Err(Error::config(
                "--disk, --net",
                "at most 31 virtio devices fit on the PCI bus",
            ));
        }
        self.0 += 1;
        Ok(Slot::Pci { device: self.0 })
    }
}

/// Checks that `config` leaves the MMU alone, for architectures that have one
/// kind only.
///
/// # Errors
/// It names one.
pub fn one_mmu(config: &VmConfig) -> Result<()> {
    match &config.mmu {
        None => Ok(()),
        Some(name) => Err(Error::config(
            "--mmu",
            format!(
                "`{name}` cannot be had: this architecture's guests have one kind of MMU; leave \
                 the option out"
            ),
        )),
    }
}

/// The transport that `config` asks for, or else `native`.
///
/// # Errors
/// The machine has no such transport, and the message lists `supported`; or a
/// legacy interface is asked for that the transport lacks.
pub fn transport(
    config: &VmConfig,
    native: Transport,
    supported: &[Transport],
) -> Result<Transport> {
    let chosen = config.transport.unwrap_or(native);
    let name = |transport: &Transport| format!("{transport:?}").to_lowercase();
    if !supported.contains(&chosen) {
        let names: Vec<String> = supported.iter().map(name).collect();
        return Err(Error::config(
            "--transport",
            format!(
                "this machine has no {} transport; it has {}",
                name(&chosen),
                names.join(" and ")
            ),
        ));
    }
    if config.virtio_legacy && chosen != Transport::Ccw {
        return Err(Error::config(
            "--virtio-legacy",
            format!(
                "only devices over ccw (s390x) have the legacy interface, not those over {}; \
                 leave the option out",
                name(&chosen)
            ),
        ));
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legacy_interface_is_there_on_channels_only() {
        let all = [Transport::Pci, Transport::Mmio, Transport::Ccw];
        let choose = |transport| {
            let config = VmConfig {
                transport,
                virtio_legacy: true,
                ..VmConfig::default()
            };
            super::transport(&config, Transport::Pci, &all)
        };
        assert_eq!(choose(Some(Transport::Ccw)).unwrap(), Transport::Ccw);
        for (chosen, name) in [(None, "pci"), (Some(Transport::Mmio), "mmio")] {
            let error = choose(chosen).unwrap_err().to_string();
            assert!(error.contains("--virtio-legacy"), "{error}");
            assert!(error.contains(name) && error.contains("ccw"), "{error}");
        }
    }
}
