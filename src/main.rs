//! The command line of crossvisor: arguments become a configuration, and the
//! core does the rest.

mod args;
mod doctor;
mod exec;
mod guest;
mod logger;
mod plan;
mod print;
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
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage_error(&error),
    };
    logger::install(cli.verbose);
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
    let code = result.unwrap_or_else(|message| {
        print::error(format_args!("{message}"));
        ExitCode::FAILURE
    });
    print::flush();
    code
}

/// Prints help where it was asked for, and otherwise what is wrong, in one line.
fn usage_error(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        error.exit();
    }
    print::error(format_args!("{}", one_line(&error.render().to_string())));
    ExitCode::from(2)
}

/// The problem and the values that would work, out of clap's several lines.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lines = text.lines().map(str::trim).take_while(|line| {
        !line.starts_with("Usage:") && !line.starts_with("For more information")
    });
    let words: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(arguments: &[&str]) -> String {
        let arguments = ["crossvisor"].iter().chain(arguments);
        match Cli::try_parse_from(arguments) {
            Ok(_) => String::new(),
            Err(error) => one_line(&error.render().to_string()),
        }
    }

    #[test]
    fn a_wrong_option_is_said_in_one_line() {
        assert_eq!(
            problem(&["run", "--transport", "isa"]),
            "invalid value 'isa' for '--transport <TRANSPORT>' [possible values: pci, mmio, ccw]"
        );
        for (arguments, parts) in [
            (["run", "--cpus", "many"], ["--cpus", "many"]),
            (["run", "--memory", "12Q"], ["--memory", "512M or 2G"]),
            (["run", "--disk", "x,format=qcow2"], ["--disk", "format"]),
            (["run", "--nonsense", "x"], ["--nonsense", "unexpected"]),
        ] {
            let text = problem(&arguments);
            assert!(!text.contains('\n'), "{text}");
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        let text = problem(&["run", "--initrd", "x", "--exec", "true"]);
        assert!(
            text.contains("--initrd") && text.contains("--exec"),
            "{text}"
        );
    }
}
