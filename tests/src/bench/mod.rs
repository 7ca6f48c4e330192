//! Measures VMMs side by side: started by `cargo lab bench` in a lab machine,
//! on the host side of its /dev/kvm.
//!
//! Every VMM boots the same kernel and the same initramfs, in which this binary
//! is `/init`: it writes [`MARK`] to the console and powers off. The clock runs
//! from just before the VMM's process is spawned until the mark arrives in the
//! pipe that is the VMM's standard output, and until the process is gone. So
//! neither VMM needs anything but its console, and both pay for it alike.
//!
//! Counting exits slows a VMM down and memory is looked at while the guest
//! stands still: each has runs of its own, apart from those that are timed.

mod exits;
mod init;
mod memory;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use init::{become_init, is_init};

use crate::check::{At, Result, ensure, fail};

/// The first argument that makes this binary measure.
pub const COMMAND: &str = "bench";

/// What a guest's init writes when it runs.
const MARK: &[u8] = b"init-runs";

/// How long a guest may take to its init, and then to its end: in an emulated
/// machine that shares a busy host, four vCPUs can need minutes.
const LIMIT: Duration = Duration::from_secs(300);

/// How often what is measured once is tried.
const ATTEMPTS: u32 = 3;

/// What is to be measured, as the lab writes it.
#[derive(Debug, Deserialize)]
struct Plan {
    /// The VMMs, in the order in which even rounds run them.
    contenders: Vec<Contender>,
    /// Numbers of vCPUs.
    cpus: Vec<u32>,
    /// The guest's memory in MiB.
    memory: u64,
    /// Timed rounds.
    rounds: u32,
}

/// A VMM under measurement.
#[derive(Debug, Deserialize)]
struct Contender {
    /// Its name in what is reported.
    name: String,
    /// Its program.
    program: PathBuf,
    /// Its arguments, in which `{cpus}`, `{memory}` (in MiB) and `{words}`
    /// (what the kernel's command line ends with) stand for the run's own.
    arguments: Vec<String>,
}

/// One thing measured, as the lab reads it: a line of JSON after `BENCH `.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Measured {
    /// The size of a program's file.
    Program { bytes: u64 },
    /// A timed run.
    Boot { round: u32, init: u64, exit: u64 },
    /// A run that did not come to its end, and why.
    Failed { why: String },
    /// Resident memory while the guest's init stands still.
    Memory { guest: u64, beyond: u64 },
    /// Exits to user space until init: how many for each reason, and at the
    /// places (a port or an address) with the most. Microseconds to the first
    /// entry into the guest, where the host's KVM tells.
    Exits {
        reasons: BTreeMap<String, u64>,
        places: Vec<(String, u64)>,
        entry: Option<u64>,
    },
}

/// A line for the lab.
#[derive(Debug, Serialize)]
struct Line<'a> {
    contender: &'a str,
    cpus: u32,
    measured: Measured,
}

/// Measures what the file named in `arguments` asks for.
pub fn run(arguments: &[String]) -> Result {
    let [path] = arguments else {
        return fail(format!("usage: {COMMAND} PLAN"));
    };
    let json = fs::read(path).at(path)?;
    let plan: Plan = serde_json::from_slice(&json).at(path)?;
    for contender in &plan.contenders {
        let meta = fs::metadata(&contender.program).at(contender.program.display().to_string())?;
        let bytes = meta.len();
        say(contender, 0, Measured::Program { bytes })?;
    }
    for &cpus in &plan.cpus {
        // Not timed: what the machine does for the first time.
        for contender in &plan.contenders {
            unless_failed(contender, cpus, timed(&plan, contender, cpus))?;
        }
        for round in 0..plan.rounds {
            let mut order: Vec<&Contender> = plan.contenders.iter().collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for contender in order {
                let run = timed(&plan, contender, cpus);
                if let Some((init, exit)) = unless_failed(contender, cpus, run)? {
                    say(contender, cpus, Measured::Boot { round, init, exit })?;
                }
            }
        }
        for contender in &plan.contenders {
            let (guest, beyond) = once(contender, cpus, || resident(&plan, contender, cpus))?;
            say(contender, cpus, Measured::Memory { guest, beyond })?;
            let exits::Counts {
                reasons,
                places,
                entry,
            } = once(contender, cpus, || counted(&plan, contender, cpus))?;
            let measured = Measured::Exits {
                reasons,
                places,
                entry,
            };
            say(contender, cpus, measured)?;
        }
    }
    Ok(())
}

/// What a run came to. One that failed is told of and counted, whoever's it was,
/// and the others go on: an emulated machine is not as reliable as a real one.
fn unless_failed<T>(contender: &Contender, cpus: u32, run: Result<T>) -> Result<Option<T>> {
    match run {
        Ok(run) => Ok(Some(run)),
        Err(error) => {
            let why = error.to_string();
            say(contender, cpus, Measured::Failed { why })?;
            Ok(None)
        }
    }
}

/// What the first run that does not fail comes to.
fn once<T>(contender: &Contender, cpus: u32, run: impl Fn() -> Result<T>) -> Result<T> {
    for _ in 1..ATTEMPTS {
        if let Some(done) = unless_failed(contender, cpus, run())? {
            return Ok(done);
        }
    }
    run()
}

fn say(contender: &Contender, cpus: u32, measured: Measured) -> Result {
    let line = Line {
        contender: &contender.name,
        cpus,
        measured,
    };
    println!("BENCH {}", serde_json::to_string(&line).at("JSON")?);
    Ok(())
}

/// Microseconds from the start of the process to init and to its end.
fn timed(plan: &Plan, contender: &Contender, cpus: u32) -> Result<(u64, u64)> {
    let mut running = Running::start(plan, contender, cpus, "")?;
    let init = running.init()?;
    let exit = running.end()?;
    Ok((init, exit))
}

/// KiB that are resident of the guest's memory, and beside it.
fn resident(plan: &Plan, contender: &Contender, cpus: u32) -> Result<(u64, u64)> {
    let mut running = Running::start(plan, contender, cpus, init::HOLD)?;
    running.init()?;
    let path = format!("/proc/{}/smaps", running.child.id());
    let text = fs::read_to_string(&path).at(&path)?;
    memory::resident(&text, plan.memory << 10)
}

/// Exits to user space until init.
fn counted(plan: &Plan, contender: &Contender, cpus: u32) -> Result<exits::Counts> {
    let tracing = exits::Tracing::begin()?;
    let mut running = Running::start(plan, contender, cpus, init::HOLD)?;
    running.init()?;
    tracing.end()
}

/// A VMM that runs. It is killed when this is dropped.
struct Running {
    child: Child,
    what: String,
    started: Instant,
    output: Receiver<(Instant, Vec<u8>)>,
    /// What it printed so far.
    printed: Vec<u8>,
}

impl Running {
    fn start(plan: &Plan, contender: &Contender, cpus: u32, words: &str) -> Result<Self> {
        let fill = |argument: &String| {
            argument
                .replace("{cpus}", &cpus.to_string())
                .replace("{memory}", &plan.memory.to_string())
                .replace("{words}", words)
        };
        let what = format!("{} with {cpus} vCPU(s)", contender.name);
        let mut command = Command::new(&contender.program);
        command
            .args(contender.arguments.iter().map(fill))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().at(&what)?;
        let (sender, output) = mpsc::channel();
        if let Some(mut pipe) = child.stdout.take() {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                    let chunk = buffer.get(..count).unwrap_or_default().to_vec();
                    if sender.send((Instant::now(), chunk)).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self {
            child,
            what,
            started,
            output,
            printed: Vec::new(),
        })
    }

    /// Waits for the mark of the guest's init; microseconds since the start.
    fn init(&mut self) -> Result<u64> {
        loop {
            let left = LIMIT.saturating_sub(self.started.elapsed());
            match self.output.recv_timeout(left) {
                Ok((at, chunk)) => {
                    self.printed.extend(chunk);
                    if self.printed.windows(MARK.len()).any(|part| part == MARK) {
                        return Ok(micros(at - self.started));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return self.failed("its guest's init did not run in time");
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return self.failed("ended before its guest's init ran");
                }
            }
        }
    }

    /// Waits for the end of the process; microseconds since the start.
    fn end(&mut self) -> Result<u64> {
        // Its output ends with it; the wait is then a short one.
        while let Ok((_, chunk)) = self.output.recv_timeout(LIMIT) {
            self.printed.extend(chunk);
        }
        let Some(status) = self.ended()? else {
            return self.failed("did not end with its guest");
        };
        let exit = micros(self.started.elapsed());
        ensure(status.success(), || format!("{}: {status}", self.what))?;
        Ok(exit)
    }

    /// Its exit status; none while it still runs after its output has ended.
    fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.child.try_wait().at(&self.what)? {
                Some(status) => return Ok(Some(status)),
                None if Instant::now() > deadline => return Ok(None),
                None => thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    fn failed<T>(&self, why: &str) -> Result<T> {
        let printed = crate::stream::readable(&self.printed);
        fail(format!("{} {why}; it printed:\n{printed}", self.what))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(script: &str) -> Running {
        let plan = Plan {
            contenders: Vec::new(),
            cpus: Vec::new(),
            memory: 64,
            rounds: 0,
        };
        let shell = Contender {
            name: "shell".into(),
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
        };
        Running::start(&plan, &shell, 3, "words").unwrap()
    }

    #[test]
    fn a_run_is_timed_to_its_mark_and_its_end() {
        let mut run = running("echo {cpus} {memory} {words}; printf init-; printf runs; echo more");
        let init = run.init().unwrap();
        let exit = run.end().unwrap();
        assert!(init <= exit);
        assert!(run.printed.starts_with(b"3 64 words\ninit-runs"));
    }

    #[test]
    fn what_is_measured_once_is_tried_again() {
        let contender = Contender {
            name: "shell".into(),
            program: "/bin/sh".into(),
            arguments: Vec::new(),
        };
        let runs = std::cell::Cell::new(0);
        let run = |good: u32| {
            runs.set(runs.get() + 1);
            ensure(runs.get() == good, || "failed".to_owned())
        };
        once(&contender, 1, || run(ATTEMPTS)).unwrap();
        runs.set(0);
        assert!(once(&contender, 1, || run(ATTEMPTS + 1)).is_err());
        assert_eq!(runs.get(), ATTEMPTS);
    }

    #[test]
    fn a_run_without_a_mark_and_one_that_fails_are_errors() {
        let error = running("echo nothing").init().unwrap_err().to_string();
        assert!(
            error.contains("ended before") && error.contains("nothing"),
            "{error}"
        );
        let mut run = running("echo init-runs; exit 3");
        run.init().unwrap();
        let error = run.end().unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
    }
}
