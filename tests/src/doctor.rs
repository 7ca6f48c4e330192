//! What crossvisor says of the host, of a machine that it would build, and of
//! itself.

use serde_json::Value;

use crate::check::{At, Result, contains, ensure, equal, fail};
use crate::lab::{Lab, text};
use crate::machines::architectures;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("doctor-report", 60, doctor),
    test("plan-of-every-architecture", 60, plans).once(),
    test("help-manual-and-completions", 60, help)
        .once()
        .common(),
];

/// This machine's KVM runs kernels, and doctor says so, to people and programs.
fn doctor(lab: &Lab) -> Result {
    let report = lab.crossvisor(&["doctor"]).output()?.succeeds()?;
    contains(
        "the report",
        &report,
        &format!("{} host", lab.manifest.arch),
    )?;
    contains(
        "the report",
        &report,
        "this /dev/kvm runs unmodified kernels",
    )?;
    let json = lab.crossvisor(&["doctor", "--json"]).output()?.succeeds()?;
    let json: Value = serde_json::from_str(&json).at("doctor --json")?;
    equal(
        "arch",
        json["arch"].as_str(),
        Some(lab.manifest.arch.as_str()),
    )?;
    equal(
        "runs_stock_kernels",
        json["runs_stock_kernels"].as_bool(),
        Some(true),
    )?;
    ensure(json["reason"].is_null(), || {
        format!("a reason for success: {json}")
    })?;
    let page = json["host"]["page_size"].as_u64();
    equal("page size", page, Some(rustix::param::page_size() as u64))?;
    let Some(capabilities) = json["host"]["capabilities"].as_array() else {
        return fail(format!("no capabilities in {json}"));
    };
    ensure(capabilities.len() >= 5, || format!("only {capabilities:?}"))?;
    for capability in capabilities {
        let (name, effect) = (capability["name"].as_str(), capability["effect"].as_str());
        let (Some(name), Some(effect)) = (name, effect) else {
            return fail(format!("no name or no effect: {capability}"));
        };
        ensure(!effect.trim().is_empty(), || {
            format!("{name} has no effect")
        })?;
        contains("the report for people", &report, name)?;
    }
    // The interrupt controller of this machine, by what it offers.
    let offers = |name: &str| {
        let named = |capability: &&Value| capability["name"].as_str() == Some(name);
        let found = capabilities.iter().find(named);
        found
            .and_then(|capability| capability["value"].as_i64())
            .unwrap_or(0)
            != 0
    };
    for (name, there) in lab.machine().capabilities() {
        equal(name, offers(name), *there)?;
    }
    Ok(())
}

/// Every architecture's machine can be planned here, and what its guest would
/// read is written out.
fn plans(lab: &Lab) -> Result {
    let unknown = lab.crossvisor(&["plan", "--arch", "vax"]).output()?;
    ensure(unknown.code() != Some(0), || {
        "there is a plan for a vax".into()
    })?;
    let errors = unknown.errors();
    let Some((_, names)) = errors.trim_end().rsplit_once("there are ") else {
        return fail(format!("no names of architectures in `{errors}`"));
    };
    let names: Vec<&str> = names.split(", ").collect();
    for wanted in architectures() {
        ensure(names.contains(&wanted), || {
            format!("{wanted} is not among {names:?}")
        })?;
    }
    for name in names {
        plan(lab, name)?;
    }
    let alias = lab
        .crossvisor(&["plan", "--arch", "arm64"])
        .output()?
        .succeeds()?;
    contains("the plan for arm64", &alias, "aarch64 machine")
}

fn plan(lab: &Lab, arch: &str) -> Result {
    let folder = text(&lab.path(arch));
    let arguments = ["plan", "--arch", arch, "--cpus", "3", "--memory", "5G"];
    let machine = [
        "--disk",
        "/absent.img",
        "--net",
        "tap=tap7",
        "--cmdline",
        "the=words",
    ];
    let plan = |more: &[&str]| {
        lab.crossvisor(&arguments)
            .args(&machine)
            .args(more)
            .output()
    };
    let people = plan(&[])?.succeeds()?;
    contains(
        "the plan",
        &people,
        &format!("{arch} machine: 3 vCPUs, 5120 MiB"),
    )?;
    for word in ["disk0", "net0", "entropy0", "the=words"] {
        contains("the plan", &people, word)?;
    }
    let json = plan(&["--json", "--dump", &folder])?.succeeds()?;
    let json: Value = serde_json::from_str(&json).at("plan --json")?;
    equal("arch", json["arch"].as_str(), Some(arch))?;
    equal("cpus", json["cpus"].as_u64(), Some(3))?;
    let ranges = json["memory"].as_array().cloned().unwrap_or_default();
    let sizes = ranges.iter().filter_map(|range| range["size"].as_u64());
    equal("memory", sizes.sum::<u64>(), 5 << 30)?;
    let devices = json["devices"].as_array().cloned().unwrap_or_default();
    // Besides those that the machine has of its own.
    let asked = |device: &&Value| device["kind"] != "powerkey";
    equal(
        "virtio devices asked for",
        devices.iter().filter(asked).count(),
        3,
    )?;
    let tree = plan(&["--device-tree"])?;
    match std::path::Path::new(&folder).join("machine.dtb").exists() {
        // The plan as a comment, and the tree.
        true => {
            let source = tree.succeeds()?;
            let comment = format!("// {arch} machine: 3 vCPUs, 5120 MiB");
            for part in [comment.as_str(), "\n/dts-v1/;\n", "\n/ {\n", "\tchosen {\n"] {
                contains("the device tree", &source, part)?;
            }
            let words = source.lines().filter(|line| line.contains("the=words"));
            let words: Vec<&str> = words.map(str::trim).collect();
            ensure(
                matches!(words[..], [plan, tree] if plan.starts_with("// ") && tree.starts_with("bootargs = \"")),
                || format!("the command line is in {words:?}"),
            )?;
        }
        false => {
            let errors = tree.errors();
            ensure(tree.code() == Some(1), || {
                "there is a tree of no tree".into()
            })?;
            contains("what it says", &errors, "--device-tree: ")?;
            contains("what it says", &errors, "--dump DIR")?;
        }
    }
    // Flattened device trees and ACPI tables are told by their first bytes, an
    // IPL parameter block by its length in them.
    let mut tables = 0;
    for entry in std::fs::read_dir(&folder).at(&folder)? {
        let path = entry.at(&folder)?.path();
        let bytes = std::fs::read(&path).at(text(&path))?;
        let length = u32::try_from(bytes.len()).at("a table's length")?;
        let known = bytes.starts_with(&0xd00d_feed_u32.to_be_bytes())
            || (arch == "s390x" && bytes.starts_with(&length.to_be_bytes()))
            || matches!(
                bytes.get(..4),
                Some(b"RSD " | b"XSDT" | b"FACP" | b"APIC" | b"DSDT" | b"MCFG" | b"SPCR" | b"GTDT")
            );
        ensure(known, || {
            format!("{} is no table that is known", path.display())
        })?;
        tables += 1;
    }
    ensure(tables > 0, || {
        format!("{arch} describes nothing to its guest")
    })
}

/// Every command has help, a manual page, and completions.
fn help(lab: &Lab) -> Result {
    let commands = ["run", "plan", "doctor", "completions", "man"];
    let all = lab.crossvisor(&["--help"]).output()?.succeeds()?;
    for command in commands {
        contains("--help", &all, command)?;
        let help = lab.crossvisor(&[command, "--help"]).output()?.succeeds()?;
        contains("--help", &help, &format!("Usage: crossvisor {command}"))?;
    }
    let version = lab.crossvisor(&["--version"]).output()?.succeeds()?;
    ensure(
        version.starts_with("crossvisor ") && version.trim_end().len() > 11,
        || format!("--version says `{version}`"),
    )?;
    let folder = lab.path("man");
    std::fs::create_dir(&folder).at("man")?;
    lab.crossvisor(&["man", &text(&folder)])
        .output()?
        .succeeds()?;
    let page = std::fs::read_to_string(folder.join("crossvisor-run.1")).at("crossvisor-run.1")?;
    contains("the page of run", &page, "memory")?;
    let bash = lab
        .crossvisor(&["completions", "bash"])
        .output()?
        .succeeds()?;
    contains("completions", &bash, "--transport")
}
