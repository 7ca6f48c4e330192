//! vCPUs: all there, all at work, and like the host's.

use std::collections::BTreeSet;
use std::fs;

use crate::check::{At, Result, ensure, equal, number, value, within};
use crate::inside::LEAST_TICKS;
use crate::lab::Lab;
use crate::machines::Difference;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("cpus-1", 150, one).once().common(),
    test("cpus-4", 200, four).about(Difference::Interrupts),
    test("cpus-off-and-on", 60, off_and_on).about(Difference::Nesting),
];

const SCRIPT: &str = "
    echo online=$(cat /sys/devices/system/cpu/online)
    echo nproc=$(nproc)
    echo cores=$(cat /sys/devices/system/cpu/cpu*/topology/core_id | sort -u | wc -l)
    echo flags=$(grep -m1 -E '^(flags|Features|features|isa)' /proc/cpuinfo | cut -d: -f2)
    echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
    tool cpus 600";

fn one(lab: &Lab) -> Result {
    let out = lab.run().exec_with_tool(SCRIPT).output()?.succeeds()?;
    look(&out, 1, "0")?;
    equal("clock source", value(&out, "clock")?, lab.guests()?.clock)?;
    features(lab, value(&out, "flags")?)
}

fn four(lab: &Lab) -> Result {
    let out = lab.run().args(&["--cpus", "4"]).exec_with_tool(SCRIPT);
    look(&out.output()?.succeeds()?, 4, "0-3")
}

/// A CPU that the guest stops and starts again works as before.
fn off_and_on(lab: &Lab) -> Result {
    let script = "
        set -e
        cpu=/sys/devices/system/cpu/cpu1/online
        for n in 1 2 3; do
            echo 0 > $cpu
            echo off$n=$(cat /sys/devices/system/cpu/online)
            echo 1 > $cpu
        done
        echo online=$(cat /sys/devices/system/cpu/online)
        tool cpus 200";
    let run = lab.run_quietly().args(&["--cpus", "3"]);
    let out = run.exec_with_tool(script).output()?.succeeds()?;
    for n in 1..=3 {
        equal("CPUs left online", value(&out, &format!("off{n}"))?, "0,2")?;
    }
    equal("CPUs online", value(&out, "online")?, "0-2")?;
    at_work(&out, 3)
}

/// All are online, each is a core, and each was at work.
fn look(out: &str, cpus: u64, online: &str) -> Result {
    equal("CPUs online", value(out, "online")?, online)?;
    equal("nproc", number(out, "nproc")?, cpus)?;
    equal("distinct cores", number(out, "cores")?, cpus)?;
    at_work(out, cpus)
}

/// Each CPU worked as long as it was to.
fn at_work(out: &str, cpus: u64) -> Result {
    for cpu in 0..cpus {
        let ticks = number(out, &format!("cpu{cpu}"))?;
        within(
            &format!("ticks (10 ms or 4 ms) of CPU {cpu}"),
            ticks,
            LEAST_TICKS,
            1000,
        )?;
    }
    Ok(())
}

/// The guest has the host's features: those that programs look for.
fn features(lab: &Lab, flags: &str) -> Result {
    let wanted = lab.guests()?.features;
    let host = fs::read_to_string("/proc/cpuinfo").at("/proc/cpuinfo")?;
    let host: BTreeSet<&str> = host
        .lines()
        .filter(|line| {
            ["flags", "Features", "features", "isa"]
                .iter()
                .any(|key| line.starts_with(key))
        })
        .flat_map(words)
        .collect();
    let guest: BTreeSet<&str> = words(flags).collect();
    let shared = wanted.iter().filter(|flag| host.contains(**flag));
    let lost: Vec<_> = shared.filter(|flag| !guest.contains(**flag)).collect();
    ensure(lost.is_empty(), || {
        format!("the host has {lost:?}, the guest only {flags}")
    })?;
    if lab.is("x86_64") {
        return ensure(guest.contains("hypervisor"), || {
            format!("the guest does not see that it is one: {flags}")
        });
    }
    Ok(())
}

/// The words of a line of /proc/cpuinfo, and of an ISA string of RISC-V in one.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| c.is_whitespace() || c == '_')
}
