//! `crossvisor run`.

use std::panic;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use crossvisor_boot::host;
use crossvisor_vmm::arch::Machine;
use crossvisor_vmm::config::{BootImages, Console, Initrd, VmConfig};
use crossvisor_vmm::exit::End;
use crossvisor_vmm::kvm;
use crossvisor_vmm::power::{Event, Power, Requests};
use crossvisor_vmm::resources::{ConsoleOutput, Port, Resources};
use crossvisor_vmm::terminal::{self, InputSlot, RawMode};
use crossvisor_vmm::vm::Vm;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::args::RunArgs;
use crate::doctor;
use crate::exec::{self, Status};
use crate::guest;
use crate::print;

/// Runs a VM to its end and returns what the process exits with.
pub fn run(args: &RunArgs) -> Result<ExitCode, String> {
    let status = Status::default();
    let result = run_to_end(args, &status);
    if args.exec.is_none() {
        return result.map(|()| ExitCode::SUCCESS);
    }
    // The command's own status comes first: what follows it (a kernel that
    // cannot power off) does not change what it was.
    match (status.get(), result) {
        (Some(code), _) => Ok(ExitCode::from(code)),
        (None, result) => {
            let why = result.err();
            let why =
                why.unwrap_or_else(|| "the guest powered off before its command ended".into());
            print::error(format_args!("{why}"));
            Ok(ExitCode::from(exec::NO_STATUS))
        }
    }
}

/// Runs the VM, again after each reset. An end other than power-off, or the
/// user's own wish at the terminal, is an error.
fn run_to_end(args: &RunArgs, status: &Status) -> Result<(), String> {
    let text = |error: crossvisor_vmm::Error| error.to_string();
    let arch = doctor::backend()?;
    let side = arch.kvm().ok_or("internal error: no KVM side")?;
    let kernel = match &args.kernel {
        Some(kernel) => kernel.clone(),
        None => host::kernel().map_err(|error| error.to_string())?,
    };
    let kvm = kvm::open().map_err(text)?;
    let host = side.probe(&kvm).map_err(text)?;
    let config = config(args);
    let machine: Arc<dyn Machine> = Arc::from(arch.machine(&config, &host).map_err(text)?);
    let (images, mut warning) = images(args, &kernel, machine.as_ref())?;
    let resources = resources(args, &config, status).map_err(text)?;

    let (requests, events) = Requests::new();
    print::queue()?;
    end_on_panic(&requests);
    forward_signals(&requests)?;
    let input = InputSlot::default();
    let mut raw = None;
    if args.exec.is_none() && config.console != Console::None {
        raw = RawMode::enter().map_err(text)?;
        terminal::spawn_input(input.clone(), requests.clone(), raw.is_some()).map_err(text)?;
    }
    loop {
        let power = Power::new(&requests);
        let vm = Vm::new(&kvm, machine.clone(), &images, &resources, &power).map_err(text)?;
        if let Some(warning) = warning.take() {
            log::warn!("{warning}");
        }
        input.set(vm.console_input());
        let end = vm.run(&events).map_err(text)?;
        input.set(None);
        if end != End::Reset {
            // The console's last lines, while the terminal is still its own.
            drop(resources);
            drop(raw);
            return match end {
                End::PowerOff | End::Quit | End::Reset => Ok(()),
                End::Killed => Err("ended by a signal; the guest had not powered off".into()),
                End::Panic => Err("the guest's kernel panicked".into()),
                End::Crash(reason) => Err(match doctor::stock_kernel_problem(arch, &kvm, &host) {
                    Some(problem) => problem,
                    None => format!("the guest crashed: {reason}"),
                }),
            };
        }
    }
}

/// The configuration, with what `--exec` needs.
fn config(args: &RunArgs) -> VmConfig {
    let mut config = args.machine.config();
    if args.exec.is_some() {
        config.ports = [exec::STDIN, exec::STDOUT, exec::STDERR, exec::STATUS]
            .map(String::from)
            .to_vec();
        if config.default_cmdline {
            config.cmdline = format!("quiet {}", config.cmdline).trim().into();
        }
    }
    config
}

/// What the guest is started from, and what the user should know about it.
fn images(
    args: &RunArgs,
    kernel: &Path,
    machine: &dyn Machine,
) -> Result<(BootImages, Option<String>), String> {
    let (initrd, warning) = match &args.initrd {
        Some(path) => (Initrd::File(path.clone()), None),
        None => {
            let built = guest::initramfs(args, kernel, machine.plan())?;
            (built.initrd, built.warning)
        }
    };
    let images = BootImages {
        kernel: kernel.to_path_buf(),
        initrd: Some(initrd),
    };
    Ok((images, warning))
}

fn resources(
    args: &RunArgs,
    config: &VmConfig,
    status: &Status,
) -> crossvisor_vmm::Result<Resources> {
    if args.exec.is_none() {
        return Resources::open(config, ConsoleOutput::Stdout, Vec::new());
    }
    let ports = vec![
        Port::stdin(exec::STDIN),
        Port::stdout(exec::STDOUT)?,
        Port::stderr(exec::STDERR)?,
        Port::writer(exec::STATUS, Box::new(status.clone()))?,
    ];
    Resources::open(config, ConsoleOutput::Stderr, ports)
}

/// Ends the VM when one of its threads panics, which is a bug of ours: a device
/// that is gone without a word would be worse.
fn end_on_panic(requests: &Requests) {
    let requests = requests.clone();
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("without a name");
        let reason = format!("internal error: the thread {name} panicked");
        requests.end(End::Crash(reason));
        report(info);
    }));
}

/// SIGTERM and SIGHUP ask the guest to power off, and end it when they come
/// again; SIGINT ends it when it comes twice. What stops or ends the process at
/// once finds the terminal as it was.
fn forward_signals(requests: &Requests) -> Result<(), String> {
    let wanted = [SIGTERM, SIGHUP, SIGINT, SIGQUIT, SIGTSTP, SIGCONT];
    let mut signals = Signals::new(wanted).map_err(|error| format!("signals: {error}"))?;
    let requests = requests.clone();
    let body = move || {
        let mut interrupted = false;
        for signal in signals.forever() {
            match signal {
                SIGINT if !interrupted => {
                    interrupted = true;
                    print::notice(format_args!("interrupt once more to end the VM"));
                }
                SIGINT => requests.end(End::Killed),
                SIGQUIT | SIGTSTP => {
                    terminal::suspend();
                    // Nothing follows SIGQUIT; SIGTSTP returns when the process
                    // is continued, which SIGCONT tells.
                    if let Err(error) = emulate_default_handler(signal) {
                        log::warn!("signal {signal}: {error}");
                    }
                }
                SIGCONT => terminal::resume(),
                _ => requests.send(Event::AskPowerOff),
            }
        }
    };
    thread::Builder::new()
        .name("signals".into())
        .spawn(body)
        .map_err(|error| format!("thread for signals: {error}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_vm() {
        let (requests, events) = Requests::new();
        let before = panic::take_hook();
        // Not to be mistaken for a test that failed.
        panic::set_hook(Box::new(|_| ()));
        end_on_panic(&requests);
        let worker = thread::Builder::new().name("disk0-q0".into());
        let worker = worker.spawn(|| panic!("a bug")).unwrap();
        assert!(worker.join().is_err());
        panic::set_hook(before);
        match events.recv().unwrap() {
            Event::End {
                end: End::Crash(reason),
                ..
            } => assert!(reason.contains("disk0-q0"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}
