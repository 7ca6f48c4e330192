//! The guest tests of one lab machine: starting it, following what the test
//! runner in it says, and starting it again when it dies.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio as Pipe;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::assets;
use crate::cache::{Cache, count, progress};
use crate::error::{AtPath, Error, Result};
use crate::l1::{Changes, Clocks, Disk, Parts, Start, Stdio};
use crate::machines::Machine;
use crate::results::Outcome;
use crate::run::memory;
use crate::unpacked::quote;

/// How long a machine may take from power-on to the first test.
const BOOT: Duration = Duration::from_secs(300);
/// How long a test may take that names no limit of its own.
const TEST: Duration = Duration::from_secs(120);
/// How long a machine may take to power off after the last test.
const POWER_OFF: Duration = Duration::from_secs(30);

/// A test to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// Its name: one word.
    pub name: String,
    /// How long it may take.
    pub limit: Duration,
}

/// Reads `crossvisor-tests --list`: a name on each line, and a limit in seconds
/// where the test has one of its own.
pub fn listed(printed: &str) -> Vec<Test> {
    printed
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?.to_owned();
            let limit = words
                .next()
                .and_then(|seconds| seconds.parse().ok())
                .map_or(TEST, Duration::from_secs);
            Some(Test { name, limit })
        })
        .collect()
}

/// One line of the test runner.
#[derive(Debug, PartialEq, Eq)]
enum Event<'a> {
    Started(&'a str),
    Ended(&'a str, Outcome),
    Log(&'a str),
}

fn parse(line: &str) -> Event<'_> {
    let log = Event::Log(line);
    let Some(rest) = line.strip_prefix("TEST ") else {
        return log;
    };
    let Some((name, verb)) = rest.split_once(' ') else {
        return log;
    };
    let (verb, more) = verb.split_once(' ').unwrap_or((verb, ""));
    match verb {
        "START" => Event::Started(name),
        "PASS" => Event::Ended(name, Outcome::Passed(more.trim().parse().ok())),
        "FAIL" => Event::Ended(name, Outcome::Failed),
        "SKIP" => Event::Ended(name, Outcome::Skipped(more.trim().to_owned())),
        _ => log,
    }
}

/// What is known of a machine's tests so far.
#[derive(Debug, Default)]
struct Progress {
    outcomes: BTreeMap<String, Outcome>,
    current: Option<String>,
    logs: BTreeMap<String, String>,
    /// What was said outside of any test.
    outside: String,
}

impl Progress {
    /// Takes in one line; tells which test ended with it.
    fn line(&mut self, line: &str) -> Option<String> {
        match parse(line) {
            Event::Started(name) => {
                self.current = Some(name.to_owned());
                self.logs.insert(name.to_owned(), String::new());
                None
            }
            Event::Ended(name, outcome) => {
                self.outcomes.insert(name.to_owned(), outcome);
                self.current = None;
                Some(name.to_owned())
            }
            Event::Log(line) => {
                let log = match &self.current {
                    Some(name) => self.logs.entry(name.clone()).or_default(),
                    None => &mut self.outside,
                };
                log.push_str(line);
                log.push('\n');
                None
            }
        }
    }

    /// Marks `name` as failed, for a reason that it could not tell itself.
    fn fail(&mut self, name: &str, reason: &str) {
        self.outcomes.insert(name.to_owned(), Outcome::Failed);
        let log = self.logs.entry(name.to_owned()).or_default();
        log.push_str(reason);
        log.push('\n');
    }

    /// Writes the log of the test `name` into the folder `results`.
    fn write_log(&self, results: &Path, name: &str) -> Result<PathBuf> {
        let path = results.join(format!("{name}.log"));
        let log = self.logs.get(name).map_or("", String::as_str);
        fs::write(&path, log).at(&path)?;
        Ok(path)
    }

    /// Those of `tests` that failed.
    fn failed<'a>(&self, tests: &'a [Test]) -> Vec<&'a Test> {
        tests
            .iter()
            .filter(|t| self.outcomes.get(&t.name) == Some(&Outcome::Failed))
            .collect()
    }

    /// Forgets how `tests` ended, so that they can run again. Their logs are
    /// kept in `results` under other names; which, by test.
    fn forget(&mut self, tests: &[Test], results: &Path) -> Result<BTreeMap<String, String>> {
        let mut firsts = BTreeMap::new();
        for test in tests {
            let log = self.write_log(results, &test.name)?;
            let first = results.join(format!("{}.first.log", test.name));
            fs::rename(&log, &first).at(&log)?;
            self.outcomes.remove(&test.name);
            self.logs.remove(&test.name);
            firsts.insert(test.name.clone(), first.display().to_string());
        }
        Ok(firsts)
    }

    /// Marks the tests of `firsts` that have passed since as retried.
    fn mark_retried(&mut self, firsts: &BTreeMap<String, String>) {
        for (name, first) in firsts {
            if let Some(outcome) = self.outcomes.get_mut(name)
                && let Outcome::Passed(ms) = *outcome
            {
                let first = first.clone();
                *outcome = Outcome::Retried { ms, first };
            }
        }
    }

    /// Marks those of `tests` that have no outcome yet as failed.
    fn fail_remaining(&mut self, tests: &[Test], reason: &str) {
        let names: Vec<String> = self
            .remaining(tests)
            .iter()
            .map(|t| t.name.clone())
            .collect();
        for name in names {
            self.fail(&name, reason);
        }
    }

    fn remaining<'a>(&self, tests: &'a [Test]) -> Vec<&'a Test> {
        tests
            .iter()
            .filter(|t| !self.outcomes.contains_key(&t.name))
            .collect()
    }
}

/// What came of a machine's tests.
#[derive(Debug)]
pub struct Report {
    /// Each test's outcome.
    pub outcomes: Vec<(String, Outcome)>,
    /// The files that hold the logs of those that failed.
    pub logs: Vec<PathBuf>,
}

/// Runs `tests` on `machine` with the binaries in `built`. `rootfs` is the image
/// of a Debian root file system for its guests.
///
/// # Errors
///
/// When the machine can't be prepared or started.
pub fn run(
    cache: &Cache,
    machine: &'static Machine,
    built: &Path,
    rootfs: Option<&Path>,
    tests: &[Test],
) -> Result<Report> {
    let parts = Parts::get(cache, machine)?;
    let results = cache.path("results").join(machine.name);
    if results.exists() {
        fs::remove_dir_all(&results).at(&results)?;
    }
    fs::create_dir_all(&results).at(&results)?;
    let session = Session {
        cache,
        parts: &parts,
        built,
        rootfs,
        results: &results,
    };
    let mut state = Progress::default();
    session.run_all(tests, &mut state);
    // An emulated machine that emulates another one fails by itself now and
    // then: what failed is tried once more, and said to be.
    let again: Vec<Test> = state.failed(tests).into_iter().cloned().collect();
    if !again.is_empty() {
        progress(&format!("{}: trying once more what failed", machine.name));
        let firsts = state.forget(&again, &results)?;
        session.run_all(&again, &mut state);
        state.mark_retried(&firsts);
    }
    let mut report = Report {
        outcomes: Vec::new(),
        logs: Vec::new(),
    };
    for test in tests {
        let outcome = state.outcomes.remove(&test.name);
        let outcome = outcome.unwrap_or(Outcome::Failed);
        // Again: the lab itself may have added to it.
        let log = state.write_log(&results, &test.name)?;
        if outcome == Outcome::Failed {
            report.logs.push(log);
        }
        report.outcomes.push((test.name.clone(), outcome));
    }
    Ok(report)
}

fn say(machine: &Machine, test: &str, outcome: &Outcome) {
    let words = match outcome {
        Outcome::Passed(None) => "ok".to_owned(),
        Outcome::Passed(Some(ms)) => format!("ok ({}.{} s)", ms / 1000, ms % 1000 / 100),
        Outcome::Retried { .. } => "ok at the second try".to_owned(),
        Outcome::Failed => "FAILED".to_owned(),
        Outcome::Skipped(reason) => format!("skipped: {reason}"),
    };
    progress(&format!("{}: {test}: {words}", machine.name));
}

/// One life of a machine.
struct Session<'a> {
    cache: &'a Cache,
    parts: &'a Parts,
    built: &'a Path,
    rootfs: Option<&'a Path>,
    results: &'a Path,
}

impl Session<'_> {
    /// Runs `tests`, in as many lives of the machine as that takes. Those that
    /// it can't be started for have failed; what is known of others stays.
    fn run_all(&self, tests: &[Test], state: &mut Progress) {
        loop {
            let remaining = state.remaining(tests);
            if remaining.is_empty() {
                return;
            }
            let before = state.outcomes.len();
            let ended = match self.run(&remaining, state) {
                Ok(ended) => ended,
                Err(error) => {
                    progress(&format!("{}: {error}", self.parts.machine.name));
                    state.fail_remaining(tests, &error.to_string());
                    return;
                }
            };
            if let Some(current) = state.current.take() {
                state.fail(&current, &ended);
                say(self.parts.machine, &current, &Outcome::Failed);
            } else if state.outcomes.len() == before {
                // Another start would end in the same way.
                state.fail_remaining(tests, &ended);
                return;
            }
        }
    }

    /// Runs `tests` until the machine ends, and returns in words how it did.
    fn run(&self, tests: &[&Test], state: &mut Progress) -> Result<String> {
        let machine = self.parts.machine;
        let scratch = tempfile::tempdir()
            .map_err(|error| Error::said(format!("a folder for temporary files: {error}")))?;
        let console = scratch.path().join("console");
        let initramfs = scratch.path().join("initramfs");
        let stdio = Stdio::Output(console.clone());
        let disks: Vec<Disk> = self
            .rootfs
            .iter()
            .map(|path| Disk {
                path: path.to_path_buf(),
                changes: Changes::Forgotten,
            })
            .collect();
        self.write_initramfs(tests, &stdio, &disks, &initramfs)?;
        progress(&format!(
            "starting {} for {}",
            machine.name,
            count(tests.len(), "test")
        ));
        let status = scratch.path().join("status");
        let start = Start {
            parts: self.parts,
            initramfs: &initramfs,
            memory: memory(),
            disks: &disks,
            stdio,
            clocks: Clocks::Instructions,
            status: &status,
        };
        let errors = scratch.path().join("errors");
        let mut child = start
            .command()?
            .stdin(Pipe::null())
            .stdout(Pipe::piped())
            .stderr(fs::File::create(&errors).at(&errors)?)
            .spawn()
            .map_err(|source| Error::Start {
                program: machine.emulator.program().to_owned(),
                source,
            })?;
        let lines = lines_of(child.stdout.take());
        let mut deadline = Instant::now() + BOOT;
        let ended = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => break "the lab machine ended".to_owned(),
                Err(RecvTimeoutError::Timeout) => {
                    break "the lab machine was ended: time ran out".to_owned();
                }
            };
            let was = state.current.clone();
            if let Some(name) = state.line(&line) {
                if let Some(outcome) = state.outcomes.get(&name) {
                    say(machine, &name, outcome);
                }
                // Now rather than at the end, for whoever watches.
                state.write_log(self.results, &name)?;
                deadline = Instant::now() + POWER_OFF;
            }
            if state.current != was
                && let Some(name) = &state.current
            {
                let limit = tests
                    .iter()
                    .find(|t| t.name == *name)
                    .map_or(TEST, |t| t.limit);
                deadline = Instant::now() + limit;
            }
        };
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
        let console = fs::read(&console).unwrap_or_default();
        let errors = fs::read(&errors).unwrap_or_default();
        let told = format!(
            "{ended}\n--- its console:\n{}\n--- {}:\n{}\n--- outside of any test:\n{}",
            String::from_utf8_lossy(&console),
            machine.emulator.name(),
            String::from_utf8_lossy(&errors),
            std::mem::take(&mut state.outside),
        );
        let log = self.results.join("machine.txt");
        fs::write(&log, &told).at(&log)?;
        Ok(told)
    }

    fn write_initramfs(
        &self,
        tests: &[&Test],
        stdio: &Stdio,
        disks: &[Disk],
        path: &Path,
    ) -> Result<()> {
        let machine = self.parts.machine;
        let mut initramfs = self.parts.initramfs(&self.built.join("crossvisor"))?;
        // The first disk, if there is one.
        let rootfs = disks.first().and_then(|_| machine.emulator.disk(0));
        assets::add(self.cache, self.parts, self.built, rootfs, &mut initramfs)?;
        let names: Vec<String> = tests.iter().map(|test| quote(&test.name)).collect();
        let command = format!(
            "exec {}/crossvisor-tests --machine {} {}",
            assets::TESTS,
            machine.name,
            names.join(" ")
        );
        let config = self.parts.init(command, stdio, disks);
        initramfs.write(&config, path)
    }
}

/// The lines that a child prints, from a thread of their own.
pub fn lines_of(output: Option<std::process::ChildStdout>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    if let Some(output) = output {
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line);
                if sender.send(text.trim_end().to_owned()).is_err() {
                    break;
                }
                line.clear();
            }
        });
    }
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_with_limits() {
        let tests = listed("boot-bzimage\nsystemd 300\n\n");
        assert_eq!(tests.len(), 2);
        assert_eq!(tests[0].limit, TEST);
        assert_eq!(tests[1].name, "systemd");
        assert_eq!(tests[1].limit, Duration::from_secs(300));
    }

    #[test]
    fn lines_of_the_runner() {
        assert_eq!(parse("TEST a START"), Event::Started("a"));
        assert_eq!(
            parse("TEST a PASS 1234"),
            Event::Ended("a", Outcome::Passed(Some(1234)))
        );
        assert_eq!(
            parse("TEST a SKIP no tap here"),
            Event::Ended("a", Outcome::Skipped("no tap here".into()))
        );
        assert_eq!(parse("TEST a"), Event::Log("TEST a"));
        assert_eq!(parse("TEST a WALKS"), Event::Log("TEST a WALKS"));
        assert_eq!(parse("anything"), Event::Log("anything"));
    }

    #[test]
    fn logs_belong_to_the_test_that_runs() {
        let tests = listed("a\nb\nc");
        let mut state = Progress::default();
        for line in ["before", "TEST a START", "one", "TEST a FAIL 3", "between"] {
            state.line(line);
        }
        state.line("TEST b START");
        state.line("two");
        assert_eq!(state.logs.get("a").map(String::as_str), Some("one\n"));
        assert_eq!(state.outside, "before\nbetween\n");
        assert_eq!(state.current.as_deref(), Some("b"));
        state.fail("b", "died");
        assert_eq!(state.logs.get("b").map(String::as_str), Some("two\ndied\n"));
        let remaining = state.remaining(&tests);
        assert_eq!(remaining.len(), 1);
        assert_eq!(remaining[0].name, "c");
    }

    #[test]
    fn what_is_known_stays_when_a_machine_does_not_start() {
        let tests = listed("a\nb");
        let mut state = Progress::default();
        state.line("TEST a PASS 1");
        state.fail_remaining(&tests, "no such emulator");
        assert_eq!(state.outcomes["a"], Outcome::Passed(Some(1)));
        assert_eq!(state.outcomes["b"], Outcome::Failed);
        assert_eq!(state.logs["b"], "no such emulator\n");
    }

    #[test]
    fn what_failed_is_tried_once_more_and_said_to_be() {
        let tests = listed("a\nb\nc");
        let dir = tempfile::tempdir().unwrap();
        let mut state = Progress::default();
        for line in ["TEST a START", "why", "TEST a FAIL 3", "TEST c PASS 1"] {
            state.line(line);
        }
        state.fail("b", "died");
        let again: Vec<Test> = state.failed(&tests).into_iter().cloned().collect();
        let names: Vec<&str> = again.iter().map(|test| test.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        let firsts = state.forget(&again, dir.path()).unwrap();
        assert_eq!(fs::read_to_string(&firsts["a"]).unwrap(), "why\n");
        assert_eq!(state.remaining(&tests).len(), 2);
        state.line("TEST a PASS 5");
        state.line("TEST b FAIL 6");
        state.mark_retried(&firsts);
        let first = firsts["a"].clone();
        let ms = Some(5);
        assert_eq!(state.outcomes["a"], Outcome::Retried { ms, first });
        assert_eq!(state.outcomes["b"], Outcome::Failed);
        assert_eq!(state.outcomes["c"], Outcome::Passed(Some(1)));
    }
}
