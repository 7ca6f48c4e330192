//! Runs tests one after the other and says how each ended, in the words that
//! the lab reads.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::check::{Failure, Result};
use crate::lab::Lab;
use crate::machines::{Difference, Machine};

/// On which machines of an architecture a test runs, unless it is asked for by
/// name or all are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// On every one.
    All,
    /// On the first, and on those that differ from it in this.
    Differing(Difference),
    /// On the first.
    First,
}

/// A test.
#[derive(Clone, Copy)]
pub struct Test {
    /// One word.
    pub name: &'static str,
    /// How long it may take, in seconds.
    pub seconds: u64,
    /// The machines that it applies to.
    pub on: fn(Machine<'_>) -> bool,
    /// On which machines of an architecture it runs.
    pub scope: Scope,
    /// Whether no architecture's own code has a part in what it shows that
    /// another test does not show there.
    pub common: bool,
    /// Whether it takes minutes where instructions are interpreted.
    pub lengthy: bool,
    /// The test.
    pub run: fn(&Lab) -> Result,
}

impl Test {
    /// The same test on the first machine of each architecture only: for what
    /// does not depend on the board.
    pub const fn once(self) -> Self {
        Self {
            scope: Scope::First,
            ..self
        }
    }

    /// The same test on the first machine of each architecture, and on those
    /// that differ in what it is about.
    pub const fn about(self, what: Difference) -> Self {
        Self {
            scope: Scope::Differing(what),
            ..self
        }
    }

    /// The same test where what all architectures have in common is shown.
    pub const fn common(self) -> Self {
        Self {
            common: true,
            ..self
        }
    }

    /// The same test where the emulator does not interpret each instruction.
    pub const fn lengthy(self) -> Self {
        Self {
            lengthy: true,
            ..self
        }
    }

    /// The same test on machines for which `on` holds.
    pub const fn on(self, on: fn(Machine<'_>) -> bool) -> Self {
        Self { on, ..self }
    }

    /// Whether the matrix has it run on `machine`.
    fn in_scope(&self, machine: Machine<'_>) -> bool {
        // The first machine of an architecture has its name.
        let first = machine.name == machine.arch();
        let on_machine = match self.scope {
            Scope::All => true,
            Scope::Differing(what) => first || machine.differs_in(what),
            Scope::First => first,
        };
        let on_arch = machine.guests().is_none_or(|arch| {
            (arch.shows_common || !self.common) && !(arch.interpreted && self.lengthy)
        });
        on_machine && on_arch
    }
}

/// A test on every machine.
pub const fn test(name: &'static str, seconds: u64, run: fn(&Lab) -> Result) -> Test {
    Test {
        name,
        seconds,
        on: |_| true,
        scope: Scope::All,
        common: false,
        lengthy: false,
        run,
    }
}

/// What was asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// The machine.
    pub machine: Option<String>,
    /// Only list.
    pub list: bool,
    /// Those, too, that the matrix leaves to other machines.
    pub every: bool,
    /// Only tests whose names hold this.
    pub filter: Option<String>,
    /// Only these, in this order.
    pub names: Vec<String>,
}

/// Reads the command line.
///
/// # Errors
/// What is wrong with it, with the usage.
pub fn parse(arguments: impl Iterator<Item = String>) -> std::result::Result<Selection, String> {
    let mut arguments = arguments;
    let mut selection = Selection::default();
    while let Some(argument) = arguments.next() {
        let mut value = || {
            let missing = || format!("{argument}: its value is missing\n{USAGE}");
            arguments.next().ok_or_else(missing)
        };
        match argument.as_str() {
            "--list" => selection.list = true,
            "--every" => selection.every = true,
            "--machine" => selection.machine = Some(value()?),
            "--filter" => selection.filter = Some(value()?),
            "--only" => {
                let names = value()?;
                selection.names.extend(names.split(',').map(String::from));
            }
            option if option.starts_with('-') => {
                return Err(format!("there is no option {option}\n{USAGE}"));
            }
            _ => selection.names.push(argument),
        }
    }
    Ok(selection)
}

const USAGE: &str = "usage: crossvisor-tests --list --machine MACHINE [--every] [--filter TEXT]
       crossvisor-tests [--machine MACHINE] [--every] [--filter TEXT] [--only NAME,... | NAME...]
runs the tests on this machine, as the lab has set it up; --list runs anywhere; --every: those, too,
that do not run on every machine of an architecture, as all do that are named";

impl Selection {
    /// The tests that were asked for and apply to `machine`.
    ///
    /// # Errors
    /// A name that is no test.
    pub fn of<'t>(
        &self,
        tests: &'t [Test],
        machine: Machine<'_>,
    ) -> std::result::Result<Vec<&'t Test>, String> {
        let chosen = |test: &&Test| {
            let wanted = |part: &String| test.name.contains(part.as_str());
            self.filter.as_ref().is_none_or(wanted) && (test.on)(machine)
        };
        if self.names.is_empty() {
            let in_scope = |test: &&Test| self.every || test.in_scope(machine);
            return Ok(tests.iter().filter(chosen).filter(in_scope).collect());
        }
        let mut found = Vec::new();
        for name in &self.names {
            let test = tests.iter().find(|test| test.name == name);
            found.extend(test.filter(chosen));
            if test.is_none() {
                return Err(format!(
                    "there is no test {name}; --list shows those there are"
                ));
            }
        }
        Ok(found)
    }
}

/// Runs `tests` in order; how many failed.
pub fn run(lab: &Lab, tests: &[&Test], out: &mut dyn Write) -> std::io::Result<usize> {
    let mut failed = 0;
    for test in tests {
        writeln!(out, "TEST {} START", test.name)?;
        out.flush()?;
        let started = Instant::now();
        let result = lab.begin().and_then(|()| run_one(lab, test));
        let took = started.elapsed().as_millis();
        match &result {
            Ok(()) => writeln!(out, "TEST {} PASS {took}", test.name)?,
            Err(Failure::Skipped(reason)) => {
                let reason = reason.replace('\n', " ");
                writeln!(out, "TEST {} SKIP {reason}", test.name)?;
            }
            Err(Failure::Failed(reason)) => {
                failed += 1;
                write!(out, "{}", lab.transcripts())?;
                for line in reason.lines() {
                    writeln!(out, "  FAILED: {line}")?;
                }
                writeln!(out, "TEST {} FAIL {took}", test.name)?;
            }
        }
        out.flush()?;
        lab.end();
    }
    Ok(failed)
}

/// Runs one test; a panic in it is a failure like others.
fn run_one(lab: &Lab, test: &Test) -> Result {
    catch_unwind(AssertUnwindSafe(|| (test.run)(lab))).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no reason given");
        Err(Failure::Failed(format!("the test panicked: {text}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{fail, skip};
    use crate::lab::tests::without_files;

    fn selection(line: &str) -> Selection {
        parse(line.split_whitespace().map(String::from)).unwrap()
    }

    const TESTS: &[Test] = &[
        test("boot-first", 60, |_| Ok(())),
        test("boot-second", 60, |_| {
            fail("it is as it is\nTEST boot-first PASS 1")
        })
        .on(|machine| machine.arch() == "aarch64"),
        test("net-third", 60, |_| skip("no tap\nhere")).once(),
        test("net-fourth", 60, |_| panic!("oh")).common(),
        test("net-fifth", 60, |_| Ok(())).lengthy(),
    ];

    fn names(line: &str, machine: &str) -> Vec<&'static str> {
        let chosen = selection(line).of(TESTS, Machine { name: machine });
        chosen.unwrap().iter().map(|test| test.name).collect()
    }

    #[test]
    fn tests_are_chosen_by_machine_name_and_filter() {
        assert_eq!(names("", "x86_64").len(), 4);
        assert_eq!(names("", "aarch64").len(), 5);
        assert_eq!(names("", "aarch64-16k").len(), 4);
        assert_eq!(names("--every", "aarch64-16k").len(), 5);
        assert_eq!(
            names("", "riscv64"),
            ["boot-first", "net-third", "net-fifth"]
        );
        assert_eq!(names("--every", "riscv64").len(), 4);
        assert_eq!(names("", "s390x"), ["boot-first", "net-third"]);
        assert_eq!(names("--every", "s390x").len(), 4);
        assert_eq!(names("net-third", "aarch64-16k"), ["net-third"]);
        assert_eq!(
            names("--filter boot", "aarch64"),
            ["boot-first", "boot-second"]
        );
        assert_eq!(
            names("net-third boot-first", "x86_64"),
            ["net-third", "boot-first"]
        );
        assert_eq!(
            names("--only boot-second,net-third", "x86_64"),
            ["net-third"]
        );
        let unknown = selection("nonsense").of(TESTS, Machine { name: "x86_64" });
        assert!(unknown.err().unwrap().contains("nonsense"));
    }

    #[test]
    fn the_command_line_is_read() {
        let found = selection("--list --machine aarch64 --filter a");
        assert!(found.list);
        assert_eq!(found.machine.as_deref(), Some("aarch64"));
        assert_eq!(found.filter.as_deref(), Some("a"));
        assert!(parse(["--only".to_string()].into_iter()).is_err());
        assert!(parse(["--nonsense".to_string()].into_iter()).is_err());
    }

    #[test]
    fn outcomes_are_said_in_the_lab_s_words() {
        let (_folder, lab) = without_files();
        let mut out = Vec::new();
        let chosen: Vec<&Test> = TESTS.iter().collect();
        std::panic::set_hook(Box::new(|_| {}));
        let failed = run(&lab, &chosen, &mut out).unwrap();
        let _ = std::panic::take_hook();
        assert_eq!(failed, 2);
        let out = String::from_utf8(out).unwrap();
        let verdicts: Vec<&str> = out
            .lines()
            .filter(|line| line.starts_with("TEST ") && !line.ends_with("START"))
            .map(|line| line.trim_end_matches(|c: char| c.is_ascii_digit()))
            .collect();
        assert_eq!(
            verdicts,
            [
                "TEST boot-first PASS ",
                "TEST boot-second FAIL ",
                "TEST net-third SKIP no tap here",
                "TEST net-fourth FAIL ",
                "TEST net-fifth PASS "
            ]
        );
        assert!(out.contains("FAILED: the test panicked: oh"), "{out}");
    }
}
