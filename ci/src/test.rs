//! `cargo lab test`: every check in one command.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use crate::cache::{Cache, progress};
use crate::checkers;
use crate::error::{Error, Result};
use crate::guest::{self, Test};
use crate::machines::Machine;
use crate::program;
use crate::results::{Counts, Outcome, Table, unit_tests};
use crate::rootfs;
use crate::targets::{TARGETS, Target};
use crate::toolchain::{Toolchain, cargo, workspace};
use crate::user;

/// The last lines of a failed test's log that are shown; the file holds all.
const SHOWN: usize = 60;
/// Machines that run at the same time.
const MACHINES_AT_ONCE: usize = 2;
/// The column of what runs on this machine.
const HERE: &str = "here";

/// What to test.
#[derive(Debug, Default)]
pub struct Selection<'a> {
    /// One architecture's machines only.
    pub target: Option<&'static Target>,
    /// The guest tests on one machine only, but all that apply to it: those,
    /// too, that need but one machine of its architecture.
    pub machine: Option<&'static Machine>,
    /// Only unit and guest tests whose names hold one of these, or all when
    /// there is none; with some, formatting and clippy are left out.
    pub filters: &'a [String],
}

/// Runs the tests, prints the table and the closing line, and tells whether
/// none failed.
///
/// # Errors
///
/// When the lab itself can't go on; a failed test is no error.
pub fn run(cache: &Cache, selection: &Selection) -> Result<bool> {
    let mut table = Table::default();
    let native = Target::native()?;
    let targets: Vec<&'static Target> = TARGETS
        .iter()
        .filter(|t| selection.target.is_none_or(|only| only == *t))
        .collect();
    let mut toolchains = Vec::new();
    for target in &targets {
        toolchains.push((*target, Toolchain::get(cache, target)?));
    }
    let here = selection.machine.is_none();
    if here && selection.filters.is_empty() {
        format(&mut table);
        for (target, toolchain) in &toolchains {
            clippy(&mut table, target, toolchain);
        }
    }
    let units = if here {
        units(cache, selection.filters)?
    } else {
        Counts::default()
    };
    let mut foreign = Vec::new();
    if here {
        // They take a build each, and have not all been seen to pass in the
        // emulators of user mode: only of an architecture that is named.
        let wanted = selection.target.is_some();
        for (target, toolchain) in &toolchains {
            if wanted && *target != native {
                let counts = foreign_units(cache, &mut table, target, toolchain, selection)?;
                foreign.extend(counts.map(|counts| (target.arch, counts)));
            }
        }
    }
    if units.failed == 0 && units.passed + units.skipped > 0 {
        progress(&format!("unit tests: {}", units.line()));
    }

    let mut failures = Vec::new();
    let lister = match toolchains.iter().find(|(t, _)| *t == native) {
        Some((_, toolchain)) => toolchain.build(&["crossvisor", "crossvisor-tests"]),
        None => Toolchain::get(cache, native).and_then(|t| t.build(&["crossvisor-tests"])),
    };
    let mut plans = Vec::new();
    match lister {
        Err(error) => fail_build(&mut table, native.arch, &error),
        Ok(lister) => {
            for (target, toolchain) in &toolchains {
                let machines: Vec<_> = Machine::all(Some(*target))
                    .filter(|m| match selection.machine {
                        Some(only) => only == *m,
                        None => m.settled || selection.target.is_some(),
                    })
                    .collect();
                if machines.is_empty() {
                    continue;
                }
                let built = match toolchain.build(&["crossvisor", "crossvisor-tests"]) {
                    Ok(built) => built,
                    Err(error) => {
                        fail_build(&mut table, target.arch, &error);
                        continue;
                    }
                };
                for machine in machines {
                    let tests = list(&lister, machine, selection)?;
                    if !tests.is_empty() {
                        plans.push((machine, built.clone(), tests));
                    }
                }
            }
        }
    }
    for (machine, tests, report) in run_machines(cache, plans) {
        match report {
            Ok(report) => {
                for (name, outcome) in report.outcomes {
                    table.set(&name, machine.name, outcome);
                }
                failures.extend(report.logs);
            }
            Err(error) => {
                progress(&format!("{}: {error}", machine.name));
                for test in tests {
                    table.set(&test.name, machine.name, Outcome::Failed);
                }
            }
        }
    }

    for log in &failures {
        show(log);
    }
    for line in table.remarks() {
        println!("{line}");
    }
    println!("\n{}", table.text());
    if here {
        println!("unit tests: {}", units.line());
        for (arch, counts) in foreign {
            println!("unit tests {arch}: {}", counts.line());
        }
        println!();
    }
    let counts = table.counts().and(units);
    println!("{}", counts.line());
    Ok(counts.failed == 0)
}

fn format(table: &mut Table) {
    progress("checking the formatting");
    let outcome = match program::output(
        Command::new(cargo())
            .args(["fmt", "--all", "--", "--check"])
            .current_dir(workspace()),
    ) {
        Ok(_) => Outcome::Passed(None),
        Err(error) => {
            eprintln!("{error}");
            Outcome::Failed
        }
    };
    table.set("formatting", HERE, outcome);
}

fn clippy(table: &mut Table, target: &Target, toolchain: &Toolchain) {
    progress(&format!("clippy for {}", target.arch));
    let outcome = match toolchain.clippy() {
        Ok(true) => Outcome::Passed(None),
        Ok(false) => Outcome::Skipped(
            "the toolchain has no clippy: run `rustup component add clippy`".to_owned(),
        ),
        Err(error) => {
            eprintln!("{error}");
            Outcome::Failed
        }
    };
    table.set(&format!("clippy {}", target.arch), HERE, outcome);
}

/// Runs the unit tests of the whole workspace. When they can't be built, that
/// is one failure.
///
/// # Errors
///
/// When the programs that they check tables with are not to be had.
fn units(cache: &Cache, filters: &[String]) -> Result<Counts> {
    progress("unit tests");
    let mut command = Command::new(cargo());
    command
        .args(["test", "--workspace"])
        .current_dir(workspace());
    count_units(cache, command, filters)
}

/// Runs the unit tests of another architecture on this machine, as one row of
/// the table. `None` when there is no emulator.
fn foreign_units(
    cache: &Cache,
    table: &mut Table,
    target: &Target,
    toolchain: &Toolchain,
    selection: &Selection,
) -> Result<Option<Counts>> {
    let row = format!("unit tests {}", target.arch);
    let Some(emulator) = user::emulator(cache, target)? else {
        let reason = format!("there is no qemu-{}: install qemu-user", target.qemu);
        table.set(&row, HERE, Outcome::Skipped(reason));
        return Ok(None);
    };
    progress(&row);
    let counts = count_units(cache, toolchain.test(&emulator), selection.filters)?;
    let outcome = match counts.failed {
        0 => Outcome::Passed(None),
        _ => Outcome::Failed,
    };
    table.set(&row, HERE, outcome);
    Ok(Some(counts))
}

/// Runs a `cargo test` and counts.
fn count_units(cache: &Cache, mut command: Command, filters: &[String]) -> Result<Counts> {
    let path = checkers::search_path(cache)?;
    let ended = command
        .envs(path.map(|path| ("PATH", path)))
        .args(["--quiet", "--no-fail-fast"])
        .arg("--")
        .args(["--format", "pretty"])
        .args(filters)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output();
    let mut counts = Counts::default();
    match ended {
        Ok(output) => {
            let printed = String::from_utf8_lossy(&output.stdout);
            counts = unit_tests(&printed);
            if !output.status.success() {
                eprintln!("{}", failed_units(&printed));
                counts.failed = counts.failed.max(1);
            }
        }
        Err(error) => {
            eprintln!("cargo test: {error}");
            counts.failed = 1;
        }
    }
    Ok(counts)
}

/// What `cargo test` prints of failures, without the tests that passed.
fn failed_units(printed: &str) -> String {
    printed
        .lines()
        .filter(|line| !line.starts_with("test ") || line.ends_with("FAILED"))
        .filter(|line| !line.starts_with("test result:") && !line.starts_with("running "))
        .filter(|line| !line.is_empty())
        .map(|line| format!("{line}\n"))
        .collect()
}

fn fail_build(table: &mut Table, arch: &str, error: &Error) {
    eprintln!("{error}");
    table.set(&format!("build {arch}"), HERE, Outcome::Failed);
}

/// The guest tests to run on a machine.
fn list(lister: &Path, machine: &Machine, selection: &Selection) -> Result<Vec<Test>> {
    let mut lister = Command::new(lister.join("crossvisor-tests"));
    lister.args(["--list", "--machine", machine.name]);
    if selection.machine.is_some() {
        lister.arg("--every");
    }
    let mut tests = guest::listed(&program::output(&mut lister)?);
    let filters = selection.filters;
    tests.retain(|test| {
        filters.is_empty() || filters.iter().any(|part| test.name.contains(part.as_str()))
    });
    Ok(tests)
}

type Plan = (&'static Machine, PathBuf, Vec<Test>);
type Ran = (&'static Machine, Vec<Test>, Result<guest::Report>);

/// Runs the tests of each machine, some machines at once, and returns them in
/// the order given. What may take longest begins, so that no long one is left
/// to run alone.
fn run_machines(cache: &Cache, mut plans: Vec<Plan>) -> Vec<Ran> {
    let order: Vec<&str> = plans.iter().map(|(machine, ..)| machine.name).collect();
    plans.sort_by_key(|(_, _, tests)| Reverse(longest(tests)));
    let queue = Mutex::new(VecDeque::from(plans));
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..MACHINES_AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().ok().and_then(|mut queue| queue.pop_front());
                    let Some((machine, built, tests)) = next else {
                        break;
                    };
                    let report = rootfs_for(cache, machine, &tests).and_then(|rootfs| {
                        guest::run(cache, machine, &built, rootfs.as_deref(), &tests)
                    });
                    if let Ok(mut done) = done.lock() {
                        done.push((machine, tests, report));
                    }
                }
            });
        }
    });
    let mut done: Vec<Ran> = done.into_inner().unwrap_or_default();
    done.sort_by_key(|(machine, ..)| order.iter().position(|name| *name == machine.name));
    done
}

/// How long the tests may take together.
fn longest(tests: &[Test]) -> Duration {
    tests.iter().map(|test| test.limit).sum()
}

/// The Debian root file system for a machine's guests, if one of the tests is
/// about it: by its name.
fn rootfs_for(cache: &Cache, machine: &Machine, tests: &[Test]) -> Result<Option<PathBuf>> {
    if !tests.iter().any(|test| test.name.contains("systemd")) {
        return Ok(None);
    }
    rootfs::get(cache, machine.target()?).map(Some)
}

/// Prints the end of a failed test's log.
fn show(log: &Path) {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    println!("\n--- failed: {}", log.display());
    let start = lines.len().saturating_sub(SHOWN);
    for line in lines.iter().skip(start) {
        println!("    {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_of_failed_unit_tests() {
        let shown = failed_units(
            "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n\
             ---- b stdout ----\nboom\n\ntest result: FAILED. 1 passed\n",
        );
        assert_eq!(
            shown,
            "test b ... FAILED\nfailures:\n---- b stdout ----\nboom\n"
        );
    }
}
