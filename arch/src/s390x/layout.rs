//! The address map: RAM from 0, and nothing else. Devices are behind the
//! channel subsystem.

use crossvisor_boot::cmdline;
use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::{Console, Transport, VmConfig};
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::plan::{self, Plan, Range, Slot};

/// RAM comes in segments of so many bytes: KVM maps no smaller ones.
pub const SEGMENT: u64 = 1 << 20;
/// The largest piece of RAM, in bytes, within KVM's limit of 2^31 - 1 pages for
/// a memory slot.
const PIECE: u64 = 4 << 40;
/// How many CPUs SCLP's list has room for, in a block of 4 KiB.
const MAX_CPUS: u32 = 240;
/// The interrupt controller.
pub const FLIC: &str = "flic";

/// The longest command line without its NUL (COMMAND_LINE_SIZE of recent
/// kernels, arch/s390/Kconfig); what an image takes, its header says.
const CMDLINE_MAX: usize = 4095;

/// Plans a machine.
///
/// # Errors
/// Names the option that cannot be met.
pub fn plan(config: &VmConfig, host: &Host) -> Result<Plan> {
    let max = host.max_vcpus.min(MAX_CPUS);
    if !(1..=max).contains(&config.cpus) {
        return Err(Error::config(
            "--cpus",
            format!("{} vCPUs: this host serves 1 to {max}", config.cpus),
        ));
    }
    if let Some(name) = config.irqchip.as_deref().filter(|name| *name != FLIC) {
        return Err(Error::config(
            "--irqchip",
            format!("`{name}` cannot be had: an s390x machine has `{FLIC}`"),
        ));
    }
    plan::one_mmu(config)?;
    plan::transport(config, Transport::Ccw, &[Transport::Ccw])?;
    let mut next = 0u32;
    let devices = plan::devices(config, |_, _| {
        let devno = u16::try_from(next).map_err(|_| {
            Error::config(
                "--disk, --net",
                "at most 65536 devices fit into a subchannel set",
            )
        })?;
        next += 1;
        Ok(Slot::Ccw { devno })
    })?;
    let plan = Plan {
        arch: super::NAME,
        cpus: config.cpus,
        memory: memory(config.memory, host)?,
        irqchip: FLIC,
        mmu: None,
        regions: Vec::new(),
        first_free_gsi: 0,
        pci: None,
        devices,
        cmdline: command_line(config)?,
        guest_modules: Vec::new(),
        // Linux calls ctrl_alt_del (drivers/s390/char/sclp_quiesce.c).
        power_off_is_ctrl_alt_del: true,
    };
    plan.check(host.page_size)?;
    Ok(plan)
}

fn memory(size: u64, host: &Host) -> Result<Vec<Range>> {
    if size == 0 || !size.is_multiple_of(SEGMENT) {
        return Err(Error::config(
            "--memory",
            format!("{size} bytes are not a multiple of 1 MiB, as s390x guests have it"),
        ));
    }
    let limit = 1u64.checked_shl(host.physical_bits).unwrap_or(u64::MAX);
    if size > limit {
        return Err(Error::config(
            "--memory",
            format!(
                "{} MiB are more than this host's KVM gives a guest: at most {} MiB",
                size >> 20,
                limit >> 20
            ),
        ));
    }
    let starts = (0..size).step_by(PIECE as usize);
    Ok(starts
        .map(|base| Range::new(base, PIECE.min(size - base)))
        .collect())
}

/// The defaults and what the user adds. A panic needs none: Linux stops in a
/// disabled wait then, which tells it from a reboot.
fn command_line(config: &VmConfig) -> Result<String> {
    let console = match (config.default_cmdline, config.console) {
        (false, _) | (_, Console::None) => "",
        (_, Console::Native) => "console=ttysclp0",
        (_, Console::Virtio) => "console=hvc0",
    };
    cmdline::join([console, config.cmdline.as_str()], CMDLINE_MAX)
        .map_err(|error| Error::config("--cmdline", error.to_string()))
}

#[cfg(test)]
mod tests {
    use crossvisor_vmm::config::{Disk, Net};

    use super::super::host;
    use super::*;

    fn config() -> VmConfig {
        VmConfig::default()
    }

    fn error(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut config = config();
        change(&mut config);
        plan(&config, &host::typical()).unwrap_err().to_string()
    }

    #[test]
    fn devices_are_numbered_in_order() {
        let disk = Disk {
            path: "/x".into(),
            read_only: false,
            serial: None,
            queues: None,
        };
        let net = Net {
            tap: "t".into(),
            mac: None,
            queues: 1,
        };
        let config = VmConfig {
            disks: vec![disk.clone(), disk],
            nets: vec![net],
            ..config()
        };
        let plan = plan(&config, &host::typical()).unwrap();
        let slots: Vec<_> = plan.devices.iter().map(|d| d.slot.to_string()).collect();
        assert_eq!(
            slots,
            [
                "ccw fe.0.0000",
                "ccw fe.0.0001",
                "ccw fe.0.0002",
                "ccw fe.0.0003"
            ]
        );
        assert_eq!(plan.cmdline, "console=ttysclp0");
        assert!(plan.pci.is_none());
        let drivers = ["virtio_blk", "virtio_net", "virtio_rng"];
        assert_eq!(Vec::from_iter(plan.drivers()), drivers);
    }

    #[test]
    fn memory_is_in_one_piece_as_long_as_kvm_takes_it() {
        let host = host::typical();
        let ranges = memory(3 << 30, &host).unwrap();
        assert_eq!(ranges, [Range::new(0, 3 << 30)]);
        let ranges = memory(9 << 40, &host).unwrap();
        assert_eq!(
            ranges,
            [
                Range::new(0, PIECE),
                Range::new(PIECE, PIECE),
                Range::new(2 * PIECE, 1 << 40)
            ]
        );
    }

    #[test]
    fn what_cannot_be_met_is_named() {
        assert!(error(|c| c.cpus = 241).contains("--cpus"));
        assert!(error(|c| c.cpus = 0).contains("--cpus"));
        assert!(error(|c| c.memory = 0).contains("--memory"));
        assert!(error(|c| c.memory = (1 << 30) + 4096).contains("multiple of 1 MiB"));
        assert!(error(|c| c.memory = 1 << 50).contains("at most"));
        assert!(error(|c| c.irqchip = Some("gicv3".into())).contains("flic"));
        assert!(error(|c| c.transport = Some(Transport::Pci)).contains("ccw"));
        assert!(error(|c| c.mmu = Some("hash".into())).contains("--mmu"));
        assert!(error(|c| c.cmdline = "x".repeat(5000)).contains("--cmdline"));
    }
}
