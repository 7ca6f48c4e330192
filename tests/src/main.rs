//! The guest tests of crossvisor: they run in a lab machine, on the host side
//! of its /dev/kvm, and start guests there. `--list` runs anywhere.
//!
//! `cargo lab test` is what calls this; see [`runner`] for what the two say to
//! each other.

mod bad_input;
mod bench;
mod boot;
mod check;
mod console;
mod cpus;
mod crossvisor;
mod disk;
mod doctor;
mod inside;
mod lab;
mod life;
mod machines;
mod memory;
mod net;
mod pattern;
mod pseries;
mod pty;
mod pvh;
mod runner;
mod several;
mod stream;
mod systemd;
mod tap;
mod transports;
mod vectors;
mod zarch;

use std::process::ExitCode;

use crate::lab::Lab;
use crate::machines::Machine;
use crate::runner::Test;

/// Every theme, from what the others need to what needs all of them.
const THEMES: [&[Test]; 15] = [
    doctor::TESTS,
    boot::TESTS,
    life::TESTS,
    console::TESTS,
    cpus::TESTS,
    vectors::TESTS,
    pseries::TESTS,
    zarch::TESTS,
    memory::TESTS,
    transports::TESTS,
    disk::TESTS,
    net::TESTS,
    bad_input::TESTS,
    several::TESTS,
    systemd::TESTS,
];

fn main() -> ExitCode {
    if bench::is_init() {
        bench::become_init();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((first, rest)) if first == inside::COMMAND => inside(rest),
        Some((first, rest)) if first == bench::COMMAND => bench::run(rest)
            .map(|()| ExitCode::SUCCESS)
            .map_err(|failure| failure.to_string()),
        // In a guest, where it is called `tool`, that word is left out.
        _ if called_tool() => inside(&arguments),
        _ => tests(arguments),
    };
    result.unwrap_or_else(|message| {
        eprintln!("crossvisor-tests: {message}");
        ExitCode::from(2)
    })
}

fn called_tool() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    std::path::Path::new(&name).file_name() == Some("tool".as_ref())
}

fn inside(arguments: &[String]) -> Result<ExitCode, String> {
    let said = inside::run(arguments).map_err(|failure| failure.to_string())?;
    print!("{said}");
    Ok(ExitCode::SUCCESS)
}

fn tests(arguments: Vec<String>) -> Result<ExitCode, String> {
    let selection = runner::parse(arguments.into_iter())?;
    let tests: Vec<Test> = all();
    if selection.list {
        let name = selection
            .machine
            .as_deref()
            .ok_or("--list needs --machine")?;
        let machine = Machine { name };
        for test in selection.of(&tests, machine)? {
            println!("{} {}", test.name, test.seconds * machine.patience());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let lab = Lab::open().map_err(|failure| failure.to_string())?;
    let name = match &selection.machine {
        Some(name) => name.clone(),
        None => lab.manifest.machine.clone(),
    };
    let chosen = selection.of(&tests, Machine { name: &name })?;
    let failed = runner::run(&lab, &chosen, &mut std::io::stdout())
        .map_err(|error| format!("standard output: {error}"))?;
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn all() -> Vec<Test> {
    THEMES.into_iter().flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::Selection;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_one_word() {
        let tests = all();
        let names: BTreeSet<&str> = tests.iter().map(|test| test.name).collect();
        assert_eq!(names.len(), tests.len());
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(
            names.iter().all(|name| name.chars().all(plain)),
            "{names:?}"
        );
    }

    #[test]
    fn each_machine_has_its_own() {
        let on = |name| {
            let tests = all();
            let chosen = Selection::default().of(&tests, Machine { name }).unwrap();
            chosen.iter().map(|test| test.name).collect::<BTreeSet<_>>()
        };
        assert!(on("x86_64").contains("boot-bzimage"));
        assert!(!on("x86_64").contains("boot-image"));
        assert!(on("aarch64-16k").contains("memory-hugepages"));
        assert!(!on("aarch64-16k").contains("cpus-4"));
        assert!(on("aarch64").contains("irqchip-gicv3-its"));
        assert!(!on("aarch64").contains("irqchip-gicv2"));
        assert!(on("aarch64-gicv2").contains("irqchip-gicv2m"));
        assert!(!on("aarch64-gicv2").contains("memory-hugepages"));
        assert!(on("ppc64le").contains("memory-64m"));
        assert!(!on("ppc64le").contains("mmu-hpt"));
        assert!(on("ppc64le-powernv").contains("mmu-hpt"));
        assert!(on("ppc64le-powernv").contains("irqchip-xive"));
    }
}
