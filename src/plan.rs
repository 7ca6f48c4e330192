//! `crossvisor plan`.

use std::fs;
use std::process::ExitCode;

use crossvisor_arch as arch;
use crossvisor_vmm::arch::{Architecture, Description, Host, Machine};
use crossvisor_vmm::kvm;
use crossvisor_vmm::plan::Plan;

use crate::args::PlanArgs;
use crate::print;

/// Prints the machine that would be built.
pub fn plan(args: &PlanArgs) -> Result<ExitCode, String> {
    let arch = architecture(args.arch.as_deref())?;
    let host = host(arch);
    let machine = arch
        .machine(&args.machine.config(), &host)
        .map_err(|error| error.to_string())?;
    let describe = || machine.describe().map_err(|error| error.to_string());
    if let Some(directory) = &args.dump {
        for description in describe()? {
            let path = directory.join(description.name);
            fs::create_dir_all(directory)
                .and_then(|()| fs::write(&path, &description.bytes))
                .map_err(|error| format!("--dump: {}: {error}", path.display()))?;
        }
    }
    let text = match () {
        () if args.json => {
            serde_json::to_string_pretty(machine.plan()).map_err(|error| error.to_string())? + "\n"
        }
        () if args.device_tree => with_tree(&text(machine.as_ref()), arch, &describe()?)?,
        () => text(machine.as_ref()),
    };
    print::output(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The source text of the machine's device tree, after `plan` as a comment: dtc
/// takes it as it is.
fn with_tree(
    plan: &str,
    arch: &dyn Architecture,
    descriptions: &[Description],
) -> Result<String, String> {
    let mut sources = descriptions
        .iter()
        .filter_map(|description| arch::dts::source(&description.bytes));
    let source = sources.next().ok_or_else(|| {
        format!(
            "--device-tree: a guest of {} has none; --dump DIR writes what it reads instead",
            arch.name()
        )
    })?;
    let comment: Vec<String> = plan
        .lines()
        .map(|line| format!("// {line}").trim_end().to_string())
        .collect();
    Ok(format!("{}\n\n{source}", comment.join("\n")))
}

/// The architecture called `name`, or this host's.
fn architecture(name: Option<&str>) -> Result<&'static dyn Architecture, String> {
    match name {
        Some(name) => arch::find(name).ok_or_else(|| {
            let names: Vec<_> = arch::ALL.iter().map(|arch| arch.name()).collect();
            format!(
                "--arch: there is no architecture `{name}`; there are {}",
                names.join(", ")
            )
        }),
        None => arch::host().ok_or_else(|| {
            "--arch: give one, for crossvisor has no backend for this host's own".to_string()
        }),
    }
}

/// This host, if it is of the architecture and has a KVM to ask; otherwise a
/// typical one.
fn host(arch: &dyn Architecture) -> Host {
    arch.kvm()
        .and_then(|side| side.probe(&kvm::open().ok()?).ok())
        .unwrap_or_else(|| arch.typical_host())
}

/// The plan for people to read.
fn text(machine: &dyn Machine) -> String {
    let plan: &Plan = machine.plan();
    let mut text = format!(
        "{} machine: {} vCPU{}, {} MiB, {}{}\n\nmemory\n",
        plan.arch,
        plan.cpus,
        if plan.cpus == 1 { "" } else { "s" },
        plan.memory.iter().map(|range| range.size).sum::<u64>() >> 20,
        plan.irqchip,
        plan.mmu.map(|mmu| format!(", {mmu}")).unwrap_or_default()
    );
    let mut rows = Vec::new();
    for range in &plan.memory {
        rows.push((
            range.base,
            format!("{range}  RAM, {} MiB", range.size >> 20),
        ));
    }
    for region in plan.regions.iter().filter(|region| !region.ports) {
        let gsi = gsi(region.gsi);
        rows.push((
            region.range.base,
            format!("{}  {}{gsi}", region.range, region.name),
        ));
    }
    if let Some(pci) = &plan.pci {
        if let Some(ecam) = pci.ecam {
            rows.push((ecam.base, format!("{ecam}  PCI configuration space (ECAM)")));
        }
        for window in [pci.mmio32, pci.mmio64] {
            let range = window.range;
            rows.push((range.base, format!("{range}  PCI memory window")));
        }
    }
    rows.sort();
    for (_, row) in rows {
        text += &format!("  {row}\n");
    }
    let ports: Vec<_> = plan.regions.iter().filter(|region| region.ports).collect();
    if !ports.is_empty() {
        text += "\nports\n";
    }
    for region in ports {
        let (first, last) = (region.range.base, region.range.end().saturating_sub(1));
        let gsi = gsi(region.gsi);
        text += &format!("  {first:#06x}-{last:#06x}  {}{gsi}\n", region.name);
    }
    if !plan.devices.is_empty() {
        text += "\nvirtio devices\n";
    }
    for device in &plan.devices {
        text += &format!("  {:<10} {}\n", device.name, device.slot);
    }
    text += &format!("\ncommand line\n  {}\n", plan.cmdline);
    text
}

fn gsi(gsi: Option<u32>) -> String {
    gsi.map(|gsi| format!(", gsi {gsi}")).unwrap_or_default()
}
