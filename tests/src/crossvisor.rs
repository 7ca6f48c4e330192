//! Running the binary under test: to its end, or with the user's hands on the
//! terminal.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::check::{At, Result, ensure, fail};
use crate::lab::Lab;
use crate::pty::Terminal;
use crate::stream::{Stream, readable};

/// How long a run may take that names no limit of its own, in seconds: a guest in
/// an emulated machine needs 4 to 8 seconds when that has the host to itself.
const LIMIT: u64 = 120;

/// The option that may be given once.
const CMDLINE: &str = "--cmdline";

/// How long the output may take to arrive after the process has ended.
const DRAIN: Duration = Duration::from_secs(5);

/// What one run printed, and how it ended.
#[derive(Debug)]
pub struct Transcript {
    command: String,
    stdout: Stream,
    stderr: Stream,
    ended: Ended,
}

/// In words, how a run ended.
type Ended = Arc<Mutex<String>>;

impl Transcript {
    /// For people.
    pub fn text(&self) -> String {
        format!(
            "  $ {}\n  ({})\n  stdout:\n{}  stderr:\n{}",
            self.command,
            self.ended.lock().unwrap_or_else(PoisonError::into_inner),
            readable(&self.stdout.bytes()),
            readable(&self.stderr.bytes())
        )
    }
}

/// A command line of crossvisor.
pub struct Crossvisor<'a> {
    lab: &'a Lab,
    arguments: Vec<String>,
    stdin: Option<Vec<u8>>,
    uid: Option<u32>,
    limit: Duration,
}

impl<'a> Crossvisor<'a> {
    /// One without arguments.
    pub fn new(lab: &'a Lab) -> Self {
        Self {
            lab,
            arguments: Vec::new(),
            stdin: None,
            uid: None,
            limit: Duration::ZERO,
        }
        .limit(LIMIT)
    }

    /// Appends arguments. Words for the kernel are put behind those that are
    /// there.
    pub fn args<S: AsRef<str>>(mut self, arguments: &[S]) -> Self {
        let mut arguments = arguments.iter().map(AsRef::as_ref);
        while let Some(argument) = arguments.next() {
            let before = self.arguments.iter().position(|word| word == CMDLINE);
            match before.and_then(|at| self.arguments.get_mut(at + 1)) {
                Some(words) if argument == CMDLINE => {
                    *words = format!("{words} {}", arguments.next().unwrap_or_default());
                }
                _ => self.arguments.push(argument.to_owned()),
            }
        }
        self
    }

    /// Runs `script` in the guest.
    pub fn exec(self, script: &str) -> Self {
        self.args(&["--exec", script])
    }

    /// Like [`exec`](Self::exec), with [`crate::inside`]'s `tool` in the guest.
    pub fn exec_with_tool(self, script: &str) -> Self {
        let tool = self.lab.tool_argument();
        self.args(&["--initramfs-add", &tool]).exec(script)
    }

    /// What it reads from standard input; nothing otherwise.
    pub fn stdin(mut self, bytes: &[u8]) -> Self {
        self.stdin = Some(bytes.to_vec());
        self
    }

    /// Runs as another user, in no group but its own.
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// How long it may take, on machines of the usual speed.
    pub fn limit(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds * self.lab.machine().patience());
        self
    }

    /// Runs it to its end.
    pub fn output(mut self) -> Result<Output> {
        let stdin = self.stdin.take().unwrap_or_default();
        let mut session = self.start()?;
        if let Some(mut input) = session.input.take() {
            // From a thread: it may read slowly, or never.
            thread::spawn(move || {
                let _ = input.write_all(&stdin);
            });
        }
        session.finish()
    }

    /// Starts it with pipes as its standard streams.
    pub fn start(self) -> Result<Session> {
        let mut command = self.command();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().at(self.shown())?;
        let input = child
            .stdin
            .take()
            .map(|pipe| File::from(std::os::fd::OwnedFd::from(pipe)));
        let stdout = child.stdout.take().map(Stream::collect).unwrap_or_default();
        let stderr = child.stderr.take().map(Stream::collect).unwrap_or_default();
        Ok(self.session(child, input, stdout, stderr))
    }

    /// Starts it on a terminal; its standard error is still a pipe.
    pub fn start_on(self, terminal: &Terminal) -> Result<Session> {
        let line = || terminal.line().at("pseudo-terminal");
        let user = || terminal.user().at("pseudo-terminal");
        let mut command = self.command();
        command
            .stdin(line()?)
            .stdout(line()?)
            .stderr(Stdio::piped());
        let mut child = command.spawn().at(self.shown())?;
        let stdout = Stream::collect(user()?);
        let stderr = child.stderr.take().map(Stream::collect).unwrap_or_default();
        let input = Some(user()?);
        Ok(self.session(child, input, stdout, stderr))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.lab.crossvisor);
        command.args(&self.arguments);
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        command
    }

    fn session(
        &self,
        child: Child,
        input: Option<File>,
        stdout: Stream,
        stderr: Stream,
    ) -> Session {
        let ended = Ended::new(Mutex::new("still running".into()));
        self.lab.remember(Transcript {
            command: self.shown(),
            stdout: stdout.clone(),
            stderr: stderr.clone(),
            ended: ended.clone(),
        });
        let started = Instant::now();
        Session {
            command: self.shown(),
            child,
            input,
            stdout,
            stderr,
            started,
            deadline: started + self.limit,
            ended,
        }
    }

    /// The command line for people.
    pub fn shown(&self) -> String {
        let quoted = self.arguments.iter().map(|argument| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:+".contains(c);
            match !argument.is_empty() && argument.chars().all(plain) {
                true => argument.clone(),
                false => format!("'{}'", argument.replace('\n', "; ")),
            }
        });
        let words: Vec<String> = std::iter::once("crossvisor".to_string())
            .chain(quoted)
            .collect();
        words.join(" ")
    }
}

/// A run that has not ended. It is killed when the value is dropped.
pub struct Session {
    command: String,
    child: Child,
    input: Option<File>,
    stdout: Stream,
    stderr: Stream,
    started: Instant,
    deadline: Instant,
    ended: Ended,
}

impl Session {
    /// Types or writes `text`.
    pub fn send(&mut self, text: &str) -> Result {
        let Some(input) = &mut self.input else {
            return fail("standard input is closed");
        };
        input.write_all(text.as_bytes()).at("writing to the VM")
    }

    /// Closes standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Waits until standard output says `wanted`, and returns what it said
    /// since the last time, to the end of that.
    pub fn expect(&mut self, wanted: &str) -> Result<String> {
        let said = self.stdout.expect(wanted, self.deadline);
        said.map_or_else(
            || fail(format!("stdout never said `{}`", wanted.escape_debug())),
            Ok,
        )
    }

    /// Like [`expect`](Self::expect), on standard error.
    pub fn expect_error(&mut self, wanted: &str) -> Result<String> {
        let said = self.stderr.expect(wanted, self.deadline);
        said.map_or_else(
            || fail(format!("stderr never said `{}`", wanted.escape_debug())),
            Ok,
        )
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) -> Result {
        kill_process(self.pid()?, signal).at("sending a signal")
    }

    /// Its process.
    pub fn pid(&self) -> Result<Pid> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        pid.map_or_else(|| fail("no process"), Ok)
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().at("waiting")?.is_none())
    }

    /// Waits for its end, or kills it when its time is over.
    pub fn finish(mut self) -> Result<Output> {
        let status = loop {
            if let Some(status) = self.child.try_wait().at("waiting for the VM")? {
                break status;
            }
            if Instant::now() >= self.deadline {
                self.kill("killed: it took too long");
                let limit = self.deadline.duration_since(self.started).as_secs();
                return fail(format!("`{}` did not end in {limit} s", self.command));
            }
            thread::sleep(Duration::from_millis(5));
        };
        let took = self.started.elapsed().as_millis();
        self.set_ended(format!("{status} after {took} ms"));
        // A terminal has no end of file: this process holds it open.
        self.stderr.wait_for_end(DRAIN);
        self.stdout.wait_for_end(Duration::from_millis(50));
        self.stdout.wait_for_end(match self.input {
            Some(_) => Duration::ZERO,
            None => DRAIN,
        });
        Ok(Output {
            command: self.command.clone(),
            status,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
        })
    }

    fn set_ended(&self, how: String) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = how;
    }

    fn kill(&mut self, why: &str) {
        if self.child.kill().is_ok() {
            self.set_ended(why.into());
        }
        let _ = self.child.wait();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.kill("killed: the test was over");
        }
    }
}

/// How a run ended, and what it printed.
#[derive(Debug)]
pub struct Output {
    command: String,
    status: ExitStatus,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Fails unless the exit status is `wanted`; returns standard output as
    /// text.
    pub fn exits(&self, wanted: i32) -> Result<String> {
        ensure(self.status.code() == Some(wanted), || {
            let found = match (self.status.code(), self.status.signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (None, Some(signal)) => format!("death by signal {signal}"),
                (None, None) => "an unknown end".into(),
            };
            let errors = self.errors();
            let last = errors.lines().last().unwrap_or_default();
            format!("{found} of `{}`, wanted {wanted}: {last}", self.command)
        })?;
        Ok(self.out())
    }

    /// Fails unless the exit status is 0; returns standard output as text.
    pub fn succeeds(&self) -> Result<String> {
        self.exits(0)
    }

    /// The exit status, if it ended by itself.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).replace('\r', "")
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).replace('\r', "")
    }
}
