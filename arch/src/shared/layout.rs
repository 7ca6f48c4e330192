//! Parts of address maps and command lines that several machines have.

use crossvisor_boot::cmdline;
use crossvisor_devices::virtio::mmio::MMIO_SIZE;
use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::{Console, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::{PciWindow, Range, Slot};

/// A guest-physical address space that a host's KVM makes as wide as is asked:
/// RAM in one piece, and PCI memory in the last quarter.
#[derive(Clone, Copy, Debug)]
pub struct AddressSpace {
    /// Where RAM begins.
    pub ram_base: u64,
    /// Width in bits unless the RAM needs more: a wider space may cost a level
    /// of page tables.
    pub usual_bits: u32,
    /// The smallest width in bits that there is room for the machine in.
    pub least_bits: u32,
    /// The largest that the architecture has.
    pub most_bits: u32,
}

impl AddressSpace {
    /// Where RAM must end, in a space of `bits` bits: above is PCI memory.
    pub const fn ram_limit(bits: u32) -> u64 {
        (1 << bits) / 4 * 3
    }

    /// PCI memory above RAM.
    pub const fn above_ram(bits: u32) -> Range {
        let base = Self::ram_limit(bits);
        Range::new(base, (1 << bits) - base)
    }

    /// The width for `memory` bytes of RAM on `host`.
    ///
    /// # Errors
    /// The RAM fits into no space of that host's, or not into its pages.
    pub fn bits(&self, memory: u64, host: &Host) -> Result<u32> {
        let most = host.physical_bits.clamp(self.least_bits, self.most_bits);
        if memory == 0 {
            return Err(Error::config("--memory", "a guest needs some memory"));
        }
        if host.page_size == 0 || !memory.is_multiple_of(host.page_size) {
            return Err(Error::config(
                "--memory",
                format!(
                    "{memory} bytes are not a multiple of this host's pages of {} bytes",
                    host.page_size
                ),
            ));
        }
        let end = self.ram_base.checked_add(memory);
        let fits = |bits: &u32| end.is_some_and(|end| end <= Self::ram_limit(*bits));
        (most.min(self.usual_bits)..=most)
            .find(fits)
            .ok_or_else(|| {
                Error::config(
                    "--memory",
                    format!(
                        "{} MiB do not fit into this host's {most} bits of guest-physical \
                         addresses: at most {} MiB do",
                        memory >> 20,
                        (Self::ram_limit(most) - self.ram_base) >> 20
                    ),
                )
            })
    }
}

/// Slots for virtio-mmio devices, [`STEP`](Self::STEP) bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct MmioSlots {
    /// Address of the first one.
    pub base: u64,
    /// Its interrupt; those of the others follow.
    pub first_gsi: u32,
    /// How many there are.
    pub count: u32,
}

impl MmioSlots {
    /// From one slot to the next, in bytes.
    pub const STEP: u64 = 4 << 10;

    /// The slot with this number.
    ///
    /// # Errors
    /// There is none.
    pub fn slot(&self, number: u32) -> Result<Slot> {
        if number >= self.count {
            return Err(Error::config(
                "--disk, --net",
                format!(
                    "at most {} virtio devices fit into this machine's MMIO slots",
                    self.count
                ),
            ));
        }
        Ok(Slot::Mmio {
            range: Range::new(self.base + u64::from(number) * Self::STEP, MMIO_SIZE),
            gsi: self.first_gsi + number,
        })
    }
}

/// A window in which bus addresses are the CPU's.
pub fn identity(range: Range) -> PciWindow {
    PciWindow {
        range,
        bus_address: range.base,
    }
}

/// A machine's default command line, with `native` as the name of its own
/// console, and what the user adds; at most `max` bytes. Linux resets cold,
/// except after a panic: see `Machine::reset_is_panic`.
///
/// # Errors
/// The line is too long or has a character that none can have.
pub fn command_line(config: &VmConfig, native: &str, max: usize) -> Result<String> {
    let console = match config.console {
        Console::Native => format!("console={native}"),
        Console::Virtio => "console=hvc0".into(),
        Console::None => String::new(),
    };
    let defaults = match config.default_cmdline {
        true => [&console, "panic=-1 reboot=panic_warm"],
        false => ["", ""],
    };
    let parts = defaults.into_iter().chain([config.cmdline.as_str()]);
    cmdline::join(parts, max).map_err(|error| Error::config("--cmdline", error.to_string()))
}
