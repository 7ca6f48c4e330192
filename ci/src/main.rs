//! The lab: `cargo lab ...`.
//!
//! Machines that offer /dev/kvm for every architecture, by emulation, on a
//! machine that may have none; and everything that building, testing and
//! measuring crossvisor in them takes, fetched without root into a cache.
//!
//! - [`archive`] gets packages from the Debian archive, [`unpacked`] runs
//!   programs out of them.
//! - [`toolchain`] builds for every target; [`kernels`], [`images`] and [`rootfs`]
//!   are what guests run; [`checkers`] read back what guests read.
//! - [`user`] runs unit tests of other architectures by QEMU's user mode.
//! - [`machines`] is the table of machines, [`l1`] starts one, in [`qemu`] or
//!   [`hercules`].
//! - [`run`] is `cargo lab run`; [`test`] is `cargo lab test`, with [`guest`],
//!   [`assets`] and [`results`]; [`bench`] is `cargo lab bench`.

mod archive;
mod assets;
mod bench;
mod cache;
mod checkers;
mod emulator;
mod error;
mod guest;
mod hercules;
mod images;
mod kernels;
mod l1;
mod machines;
mod program;
mod qemu;
mod results;
mod rootfs;
mod run;
mod sources;
mod stored;
mod targets;
mod test;
mod toolchain;
mod unpacked;
mod user;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use cache::{Cache, progress};
use error::Result;
use l1::Parts;
use machines::Machine;
use targets::Target;
use toolchain::Toolchain;

/// Machines that offer /dev/kvm for every architecture, by emulation.
///
/// What is needed is fetched from the Debian archive that this machine's apt
/// uses, without root, into $CROSSVISOR_LAB_CACHE or ~/.cache/crossvisor-lab.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build crossvisor and run `crossvisor run ARGS`, on this machine's
    /// /dev/kvm where it can run stock kernels, or else in a lab machine.
    ///
    /// Without ARGS: a shell in a guest with a Debian kernel, or a short report
    /// of it when there is no terminal. The exit status is crossvisor's. Files
    /// and folders named in ARGS are copied into the lab machine, disks are
    /// attached to it; taps are the lab machine's own.
    Run {
        /// The guest's architecture; this machine's by default.
        #[arg(long)]
        arch: Option<String>,
        /// Always use this lab machine.
        #[arg(long)]
        machine: Option<String>,
        /// Arguments of `crossvisor run`.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Run all tests: formatting, clippy for every target, unit tests, and the
    /// guest tests in the lab machines.
    ///
    /// Ends with a table of tests and machines and a line of counts. What a
    /// failed guest test said is kept in the cache's folder `results`.
    Test {
        /// For one architecture only.
        #[arg(long)]
        arch: Option<String>,
        /// Only the guest tests, on one lab machine: those, too, that otherwise
        /// run on one machine of its architecture only.
        #[arg(long)]
        machine: Option<String>,
        /// Only unit and guest tests whose names hold one of these.
        #[arg(value_name = "FILTER")]
        filters: Vec<String>,
    },
    /// Measure crossvisor against QEMU, both in the same lab machine.
    ///
    /// The same kernel and initramfs, the VMMs taking turns: process start to
    /// guest init and to exit with 1 and 4 vCPUs, resident memory beyond the
    /// guest's, exits to user space until init by reason, size of the program.
    /// An emulated machine's times mean nothing by themselves: look at the
    /// ratios, and at their spread. A missed aim is no failure.
    Bench {
        /// The architecture; this machine's by default.
        #[arg(long)]
        arch: Option<String>,
        /// Always use this lab machine.
        #[arg(long)]
        machine: Option<String>,
        /// Timed rounds for each number of vCPUs.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        rounds: u32,
    },
    /// Get all that the other commands need.
    Setup {
        /// For one architecture only.
        #[arg(long)]
        arch: Option<String>,
    },
    /// Run a program that ends with the lab.
    #[command(name = l1::WITH_LAB, hide = true)]
    WithLab {
        lab: u32,
        program: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run Hercules in a folder, and read its tapes.
    #[command(name = hercules::ATTEND, hide = true)]
    AttendHercules {
        folder: PathBuf,
        console: PathBuf,
        status: PathBuf,
        program: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    match act(Cli::parse().command) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            eprintln!("lab: error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(command: Command) -> Result<i32> {
    match command {
        Command::Run {
            arch,
            machine,
            arguments,
        } => {
            let (target, machine) = choose(arch.as_deref(), machine.as_deref())?;
            let target = target.map_or_else(Target::native, Ok)?;
            run::run(&Cache::open()?, target, machine, &arguments)
        }
        Command::Test {
            arch,
            machine,
            filters,
        } => {
            let (target, machine) = choose(arch.as_deref(), machine.as_deref())?;
            let selection = test::Selection {
                target,
                machine,
                filters: &filters,
            };
            let passed = test::run(&Cache::open()?, &selection)?;
            Ok(i32::from(!passed))
        }
        Command::Bench {
            arch,
            machine,
            rounds,
        } => {
            let (target, machine) = choose(arch.as_deref(), machine.as_deref())?;
            let target = target.map_or_else(Target::native, Ok)?;
            bench::run(&Cache::open()?, target, machine, rounds).map(|()| 0)
        }
        Command::Setup { arch } => {
            let cache = Cache::open()?;
            let only = arch.as_deref().map(Target::named).transpose()?;
            for target in targets::TARGETS
                .iter()
                .filter(|t| only.is_none_or(|o| o == *t))
            {
                Toolchain::get(&cache, target)?;
            }
            for machine in Machine::all(only) {
                Parts::get(&cache, machine)?;
                progress(&format!("{} is ready: {}", machine.name, machine.about));
            }
            Ok(0)
        }
        Command::WithLab {
            lab,
            program,
            arguments,
        } => l1::become_with_lab(lab, &program, &arguments).map(|()| 0),
        Command::AttendHercules {
            folder,
            console,
            status,
            program,
            arguments,
        } => hercules::attend(&folder, &console, &status, &program, &arguments),
    }
}

/// The architecture and the machine that the options name; a machine implies
/// its architecture.
fn choose(
    arch: Option<&str>,
    machine: Option<&str>,
) -> Result<(Option<&'static Target>, Option<&'static Machine>)> {
    let target = arch.map(Target::named).transpose()?;
    let Some(machine) = machine.map(Machine::named).transpose()? else {
        return Ok((target, None));
    };
    let own = machine.target()?;
    if let Some(target) = target.filter(|t| *t != own) {
        return Err(error::Error::said(format!(
            "the machine {} is {}, not {}",
            machine.name, machine.arch, target.arch
        )));
    }
    Ok((Some(own), Some(machine)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_machine_implies_its_architecture() {
        let (target, machine) = choose(None, Some("aarch64-gicv2")).unwrap();
        assert_eq!(target.unwrap().arch, "aarch64");
        assert_eq!(machine.unwrap().name, "aarch64-gicv2");
        assert!(choose(Some("x86_64"), Some("aarch64-gicv2")).is_err());
        assert_eq!(choose(None, None).unwrap(), (None, None));
        assert_eq!(
            choose(Some("arm64"), None).unwrap().0.unwrap().arch,
            "aarch64"
        );
    }
}
