//! `cargo lab bench`: crossvisor against other VMMs, in the same lab machine.
//!
//! What measures is `crossvisor-tests bench` in the machine. Times there are an
//! emulated machine's: only their ratios mean something, and only those of one
//! run, in which the contenders take turns.

mod peers;
mod report;

use std::path::Path;
use std::process::Stdio as Pipe;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use crossvisor_boot::initramfs::Builder;
use serde::Serialize;

use crate::assets::{self, TESTS};
use crate::cache::{Cache, count, progress};
use crate::error::{AtPath, Error, Result};
use crate::guest::lines_of;
use crate::l1::{Clocks, Parts, Start, Stdio};
use crate::machines::Machine;
use crate::run::memory;
use crate::targets::Target;
use crate::toolchain::Toolchain;

use peers::Peer;
use report::Report;

/// crossvisor in what is reported.
const OWN: &str = "crossvisor";
/// The numbers of vCPUs that are measured.
const CPUS: [u32; 2] = [1, 4];
/// The guests' memory in MiB.
const GUEST_MEMORY: u32 = 512;
/// How long the lab machine may be silent: longer than a run in it may take.
const SILENCE: Duration = Duration::from_secs(700);

/// `/tests/bench.json`: what is to be measured.
#[derive(Debug, Serialize)]
struct Plan<'a> {
    contenders: Vec<Contender>,
    cpus: &'a [u32],
    memory: u32,
    rounds: u32,
}

#[derive(Debug, Serialize)]
struct Contender {
    name: &'static str,
    program: String,
    arguments: Vec<String>,
}

/// Measures crossvisor against each peer on `machine`, in so many rounds, and
/// prints what came of it.
///
/// # Errors
///
/// When something could not be measured.
pub fn run(
    cache: &Cache,
    target: &'static Target,
    machine: Option<&'static Machine>,
    rounds: u32,
) -> Result<()> {
    let machine = match machine {
        Some(machine) => machine,
        None => Machine::of(target)?,
    };
    let mut peers: Vec<Option<&Peer>> = Peer::all(target).map(Some).collect();
    if peers.is_empty() {
        progress(&format!(
            "no peer runs guests in the lab machine of {}: {OWN} is measured alone",
            target.arch
        ));
        peers.push(None);
    }
    let built = Toolchain::get(cache, target)?.build(&["crossvisor", "crossvisor-tests"])?;
    let parts = Parts::get(cache, machine)?;
    for peer in peers {
        let bench = Bench {
            cache,
            target,
            parts: &parts,
            built: &built,
            peer,
            rounds,
        };
        let report = bench.run()?;
        let against = peer.map_or(String::new(), |peer| format!(" against {}", peer.name));
        println!(
            "\n{OWN}{against} on {} ({}): guests with {GUEST_MEMORY} MiB and kernel {}, {}",
            machine.name,
            machine.about,
            parts.guest_kernel.release,
            count(rounds as usize, "round"),
        );
        println!("Medians; of ratios the median, least and greatest of the rounds.\n");
        let (name, aim) = (peer.map(|peer| peer.name), peer.and_then(|peer| peer.aim));
        println!("{}", report.text(OWN, name, aim));
    }
    Ok(())
}

/// The measurement of one peer, or of crossvisor alone.
struct Bench<'a> {
    cache: &'a Cache,
    target: &'static Target,
    parts: &'a Parts,
    built: &'a Path,
    peer: Option<&'static Peer>,
    rounds: u32,
}

impl Bench<'_> {
    /// Runs the lab machine to its end.
    fn run(&self) -> Result<Report> {
        let machine = self.parts.machine;
        let scratch = tempfile::tempdir()
            .map_err(|error| Error::said(format!("a folder for temporary files: {error}")))?;
        let console = scratch.path().join("console");
        let stdio = Stdio::Output(console.clone());
        let initramfs = scratch.path().join("initramfs");
        self.write_initramfs(&stdio, scratch.path(), &initramfs)?;
        let against = self.peer.map_or("alone", |peer| peer.name);
        progress(&format!(
            "starting {} to measure {OWN}: {against}",
            machine.name
        ));
        let status = scratch.path().join("status");
        let start = Start {
            parts: self.parts,
            initramfs: &initramfs,
            memory: memory(),
            disks: &[],
            stdio,
            clocks: Clocks::Time,
            status: &status,
        };
        let mut child = start
            .command()?
            .stdin(Pipe::null())
            .stdout(Pipe::piped())
            .spawn()
            .map_err(|source| Error::Start {
                program: machine.emulator.program().to_owned(),
                source,
            })?;
        let lines = lines_of(child.stdout.take());
        let mut report = Report::default();
        let mut said = String::new();
        let ended = loop {
            match lines.recv_timeout(SILENCE) {
                Ok(line) => match line.strip_prefix("BENCH ") {
                    Some(json) => progress(&report.line(json)?),
                    None => said.push_str(&format!("{line}\n")),
                },
                Err(RecvTimeoutError::Disconnected) => break "the lab machine ended",
                Err(RecvTimeoutError::Timeout) => break "the lab machine fell silent",
            }
        };
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
        if start.reported() == Some(0)
            && report.is_whole(1 + usize::from(self.peer.is_some()), CPUS.len())
        {
            return Ok(report);
        }
        let console = std::fs::read(&console).unwrap_or_default();
        Err(Error::Failed {
            program: format!("measuring on {}", machine.name),
            status: ended.to_owned(),
            output: format!("{}\n{said}", String::from_utf8_lossy(&console)),
        })
    }

    fn write_initramfs(&self, stdio: &Stdio, scratch: &Path, path: &Path) -> Result<()> {
        let mut initramfs = self.parts.initramfs(&self.built.join("crossvisor"))?;
        let crossvisor = format!("{TESTS}/crossvisor");
        let measurer = format!("{TESTS}/crossvisor-tests");
        for (binary, path) in [("crossvisor", &crossvisor), ("crossvisor-tests", &measurer)] {
            initramfs.add_file(&self.built.join(binary), path)?;
        }
        let (kernel, _) = assets::guest_kernel(self.parts, &mut initramfs)?;
        let initrd = format!("{TESTS}/bench.initrd");
        initramfs.add_file(&self.guest_initrd(scratch)?, &initrd)?;
        // The rest of its command line is crossvisor's own choice.
        let own: [&str; 10] = [
            "run",
            &kernel,
            "--initrd",
            &initrd,
            "--cpus",
            "{cpus}",
            "--memory",
            "{memory}M",
            "--cmdline",
            "quiet {words}",
        ];
        let mut contenders = vec![Contender {
            name: OWN,
            program: crossvisor,
            arguments: own.map(str::to_owned).to_vec(),
        }];
        if let Some(peer) = self.peer {
            let cmdline = format!("console={} panic=-1 quiet {{words}}", peer.console);
            let fill = |argument: &&str| {
                argument
                    .replace("{kernel}", &kernel)
                    .replace("{initrd}", &initrd)
                    .replace("{cmdline}", &cmdline)
            };
            contenders.push(Contender {
                name: peer.name,
                program: peer.install(self.cache, self.target, &mut initramfs)?,
                arguments: peer.arguments.iter().copied().flatten().map(fill).collect(),
            });
        }
        let plan = Plan {
            contenders,
            cpus: &CPUS,
            memory: GUEST_MEMORY,
            rounds: self.rounds,
        };
        let json = serde_json::to_vec_pretty(&plan).map_err(Error::said_by)?;
        let file = format!("{TESTS}/bench.json");
        initramfs.add_bytes(&file, json)?;
        let command = format!("exec {measurer} bench {file} 2>&1");
        let config = self.parts.init(command, stdio, &[]);
        initramfs.write(&config, path)
    }

    /// The guests' initramfs: the program that measures, as their init.
    fn guest_initrd(&self, scratch: &Path) -> Result<std::path::PathBuf> {
        let mut builder = Builder::new();
        let initrd = builder
            .add_init(self.built.join("crossvisor-tests"))
            .and_then(|()| builder.build())
            .map_err(Error::said_by)?;
        let path = scratch.join("initrd");
        let mut file = std::fs::File::create(&path).at(&path)?;
        initrd.write_to(&mut file).at(&path)?;
        Ok(path)
    }
}
