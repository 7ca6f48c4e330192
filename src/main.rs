//! The command line of crossvisor: arguments become a configuration, and the
//! core does the rest.

mod args;
mod doctor;
mod exec;
mod guest;
mod plan;
mod run;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use crossvisor_boot::initramfs::init;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    // The same binary is the first process of the built-in initramfs.
    if init::is_init() {
        init::main();
    }
    let cli = Cli::parse();
    log_to_stderr(cli.verbose);
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Plan(args) => plan::plan(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "crossvisor",
                &mut std::io::stdout(),
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { directory } => match directory {
            Some(directory) => clap_mangen::generate_to(Cli::command(), &directory)
                .map(|()| ExitCode::SUCCESS)
                .map_err(|error| format!("{}: {error}", directory.display())),
            None => clap_mangen::Man::new(Cli::command())
                .render(&mut std::io::stdout())
                .map(|()| ExitCode::SUCCESS)
                .map_err(|error| format!("standard output: {error}")),
        },
    };
    result.unwrap_or_else(|message| {
        eprintln!("crossvisor: {message}");
        ExitCode::FAILURE
    })
}

/// Warnings always, more with each `-v`.
fn log_to_stderr(verbose: u8) {
    struct Stderr;

    impl log::Log for Stderr {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.level() <= log::max_level()
        }

        fn log(&self, record: &log::Record<'_>) {
            if self.enabled(record.metadata()) {
                // The terminal may be raw: a carriage return each line.
                eprint!("crossvisor: {}\r\n", record.args());
            }
        }

        fn flush(&self) {}
    }

    log::set_max_level(match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    });
    // Fails only when a logger is set already, which nothing else does.
    let _ = log::set_logger(&Stderr);
}
