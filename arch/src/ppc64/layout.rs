//! The address map.
//!
//! | from | what |
//! |---|---|
//! | 0 | RAM, in one piece |
//! | 32 TiB + 2 GiB | PCI memory below 4 GiB |
//! | 33 TiB | PCI memory above 4 GiB |
//! | 40 TiB | a XIVE's pages of vCPUs |
//! | 41 TiB | a XIVE's pages of sources |
//!
//! What firmware would have: RTAS is a stub in RAM (see `load`), the console and
//! the power of the machine are hypercalls. All of it is below 2^46, the
//! smallest guest-physical address space that KVM-HV gives.

use crossvisor_boot::cmdline;
use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::{Console, Transport, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::{self, Pci, PciSlots, PciWindow, Plan, Range};

use super::irqchip::Irqchip;
use super::mmu::Mmu;
use super::sources;
use super::xive::Xive;

/// The most RAM: where PCI begins.
const RAM_MAX: u64 = 32 << 40;
/// The least RAM. Debian's kernels start in 96 MiB and more, in 128 with pages of 64
/// KiB; smaller ones need less.
pub const RAM_MIN: u64 = 64 << 20;

const PCI_MMIO32: PciWindow = PciWindow {
    range: Range::new(RAM_MAX + (2 << 30), (2 << 30) - (64 << 10)),
    bus_address: 2 << 30,
};
const PCI_MMIO64: PciWindow = PciWindow {
    range: Range::new(33 << 40, 1 << 40),
    bus_address: 33 << 40,
};

/// The longest command line without its NUL: powerpc's COMMAND_LINE_SIZE is 2048
/// (arch/powerpc/include/uapi/asm/setup.h).
const CMDLINE_MAX: usize = 2047;

/// Plans a machine.
///
/// # Errors
/// Names the option that cannot be met.
pub fn plan(config: &VmConfig, host: &Host, mmu: Mmu, irqchip: Irqchip) -> Result<Plan> {
    check(config, host)?;
    check_queues(config)?;
    plan::transport(config, Transport::Pci, &[Transport::Pci])?;
    let mut slots = PciSlots::default();
    let devices = plan::devices(config, |_, _| slots.take())?;
    let plan = Plan {
        arch: super::NAME,
        cpus: config.cpus,
        memory: vec![Range::new(0, config.memory)],
        irqchip: irqchip.name(),
        mmu: Some(mmu.name()),
        regions: match irqchip {
            Irqchip::Xive => Xive::regions(host).into(),
            Irqchip::Xics => Vec::new(),
        },
        // Messages go by the numbers of their sources, and this table by none;
        // what it counts only has to be apart.
        first_free_gsi: 0,
        pci: Some(Pci {
            ecam: None,
            mmio32: PCI_MMIO32,
            mmio64: PCI_MMIO64,
            intx: sources::INTX,
            msi: true,
        }),
        devices,
        cmdline: command_line(config)?,
        guest_modules: Vec::new(),
        power_off_is_ctrl_alt_del: false,
    };
    plan.check(host.page_size)?;
    Ok(plan)
}

/// Checks that each device has enough messages: one for each queue that interrupts,
/// and one for its configuration. With fewer Linux would have all queues share one.
fn check_queues(config: &VmConfig) -> Result<()> {
    let most = sources::MSIS_PER_SLOT - 1;
    let refused = |option, queues, most| {
        let problem = format!(
            "queues={queues}: this machine's devices have {} messages each, enough for queues={most}",
            sources::MSIS_PER_SLOT
        );
        Err(Error::config(option, problem))
    };
    let mut disks = config.disks.iter().filter_map(|disk| disk.queues);
    if let Some(queues) = disks.find(|queues| *queues > most) {
        return refused("--disk", queues, most);
    }
    // A queue is a pair of them here.
    let most = most / 2;
    match config.nets.iter().find(|net| net.queues > most) {
        Some(net) => refused("--net", net.queues, most),
        None => Ok(()),
    }
}

fn check(config: &VmConfig, host: &Host) -> Result<()> {
    if !(1..=host.max_vcpus).contains(&config.cpus) {
        return Err(Error::config(
            "--cpus",
            format!(
                "{} is not between 1 and {}, which this host's KVM allows",
                config.cpus, host.max_vcpus
            ),
        ));
    }
    if !(RAM_MIN..=RAM_MAX).contains(&config.memory) {
        return Err(Error::config(
            "--memory",
            format!(
                "{} MiB: this machine has from {} MiB to {} MiB",
                config.memory >> 20,
                RAM_MIN >> 20,
                RAM_MAX >> 20
            ),
        ));
    }
    if host.page_size == 0 || !config.memory.is_multiple_of(host.page_size) {
        return Err(Error::config(
            "--memory",
            format!(
                "{} bytes are not a multiple of this host's pages of {} bytes",
                config.memory, host.page_size
            ),
        ));
    }
    Ok(())
}

/// The defaults and what the user adds. A panic needs no word here: Linux tells
/// of it by RTAS.
fn command_line(config: &VmConfig) -> Result<String> {
    let console = match config.console {
        Console::Native | Console::Virtio => "console=hvc0",
        Console::None => "",
    };
    let defaults = match config.default_cmdline {
        true => [console, "panic=-1"],
        false => ["", ""],
    };
    let parts = defaults.into_iter().chain([config.cmdline.as_str()]);
    cmdline::join(parts, CMDLINE_MAX).map_err(|error| Error::config("--cmdline", error.to_string()))
}
