//! Starting a lab machine in Hercules, which emulates SIE, the instruction that
//! runs guests on s390x; QEMU's TCG has none.
//!
//! Hercules 3.13 has no virtio, and its SCLP console loses lines: of an SCCB it
//! prints the first event buffer only. So a command's streams and its exit
//! status are written to tapes, whose files Hercules writes block by block and
//! [`attend`] reads as they grow. The machine has no input.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as Pipe};
use std::thread;
use std::time::Duration;

use crossvisor_boot::initramfs::InitConfig;

use crate::error::{AtPath, Error, Result};
use crate::l1::{Changes, Disk, Start, Stdio, lab, with_lab};

/// The name of the lab's hidden command that runs Hercules and reads its tapes.
pub const ATTEND: &str = "attend-hercules";

/// Where the initramfs is loaded, beyond the kernel.
const INITRAMFS: u64 = 64 << 20;
/// Where the kernel finds the address and size of its initramfs, and its
/// command line (Linux `arch/s390/include/asm/setup.h`, parameter area).
const INITRAMFS_FIELDS: u64 = 0x10408;
const COMMAND_LINE: u64 = 0x10480;

/// The first tape drive, by its device number; more follow. The drives are used
/// from the first on, and Linux numbers them in that order.
const DRIVES: u32 = 0x580;
/// The tape of the command's output, or of both its streams in one.
const OUTPUT: usize = 0;
/// The tape of its exit status.
const STATUS: usize = 1;
/// The tape of its errors, where they are by themselves.
const ERRORS: usize = 2;
/// The first disk, by its device number; more follow.
const DISKS: u32 = 0x600;

/// How often tapes are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Commands for Hercules at its start: the machine is ended when Linux has
/// turned off its console at power-off, when it stopped for good, and when
/// something could not be loaded.
const SCRIPT: &str = "hao tgt HHCCP042I SYSCONS\nhao cmd exit\n\
                      hao tgt HHCCP011I CPU\nhao cmd exit\n\
                      hao tgt HHCSC0\nhao cmd exit\n\
                      ipl machine.ins\n";

/// What is to be loaded, and where (the format of Linux's `.ins` files).
const LOADED: [(&str, u64); 4] = [
    ("kernel", 0),
    ("initramfs", INITRAMFS),
    ("parameters", COMMAND_LINE),
    ("fields", INITRAMFS_FIELDS),
];

/// Whether the command's errors have a tape of their own.
fn errors_apart(stdio: &Stdio) -> bool {
    matches!(stdio, Stdio::Streams(_))
}

/// How many tapes there are.
fn tapes(stdio: &Stdio) -> usize {
    if errors_apart(stdio) { 3 } else { 2 }
}

fn drive(tape: usize) -> String {
    format!("{:04x}", DRIVES + tape as u32)
}

fn disk(n: usize) -> String {
    format!("{:04x}", DISKS + n as u32)
}

/// What `/init` is told, so that it runs `command`, with tapes for its streams.
pub fn init(command: &str, stdio: &Stdio, disks: &[Disk]) -> InitConfig {
    let mut script = "ccw=/sys/bus/ccw/devices/0.0\n".to_owned();
    for (n, disk_) in disks.iter().enumerate() {
        if disk_.changes == Changes::Refused {
            script += &format!("echo 1 >$ccw.{}/readonly\n", disk(n));
        }
        script += &format!("echo 1 >$ccw.{}/online\n", disk(n));
    }
    for tape in 0..tapes(stdio) {
        script += &format!("echo 1 >$ccw.{}/online\n", drive(tape));
    }
    let write = |tape: usize| format!("dd bs=32k of=/dev/ntibm{tape} 2>/dev/null");
    let errors = match errors_apart(stdio) {
        true => {
            let write = write(ERRORS);
            script += &format!("mkfifo /errors; {write} </errors & writer=$!\n");
            "/errors"
        }
        false => "&1",
    };
    script += &format!(
        "{{ (\n{command}\n) </dev/null 2>{errors}; echo $? >/status; }} | {}\n",
        write(OUTPUT)
    );
    script += "wait $writer\n";
    script += &format!("{} </status\n", write(STATUS));
    InitConfig {
        command: Some(script),
        ..InitConfig::default()
    }
}

/// Writes what Hercules reads, and returns the lab's command that runs it.
///
/// # Errors
///
/// When a file can't be written.
pub fn command(start: &Start<'_>) -> Result<Command> {
    let folder = start.initramfs.with_extension("hercules");
    fs::create_dir_all(&folder).at(&folder)?;
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).at(&path)
    };
    file("configuration", configuration(start).as_bytes())?;
    file("script", SCRIPT.as_bytes())?;
    let loaded = LOADED.map(|(name, address)| format!("{name} {address:#010x}\n"));
    file("machine.ins", loaded.concat().as_bytes())?;
    let line = format!("quiet panic=-1 {}\0", start.parts.machine.cmdline);
    file("parameters", line.as_bytes())?;
    let size = fs::metadata(start.initramfs).at(start.initramfs)?.len();
    let fields = [INITRAMFS.to_be_bytes(), size.to_be_bytes()];
    file("fields", &fields.concat())?;
    for tape in 0..tapes(&start.stdio) {
        file(&drive(tape), &[])?;
    }
    // What it loads must be in the folder itself, not at the end of a link.
    let kernel = folder.join("kernel");
    fs::copy(&start.parts.image, &kernel).at(&start.parts.image)?;
    fs::hard_link(start.initramfs, folder.join("initramfs")).at(start.initramfs)?;
    let link = |target: &Path, name: &str| {
        let path = folder.join(name);
        let target = std::path::absolute(target).at(target)?;
        symlink(target, &path).at(&path)
    };
    for (n, attached) in start.disks.iter().enumerate() {
        match attached.changes {
            Changes::Kept | Changes::Refused => link(&attached.path, &disk(n))?,
            Changes::Forgotten => {
                let path = folder.join(disk(n));
                fs::copy(&attached.path, &path).at(&path)?;
            }
        }
    }
    let hercules = start.parts.emulator.command();
    let mut command = lab();
    command
        .arg(ATTEND)
        .arg(&folder)
        .arg(match &start.stdio {
            Stdio::Streams(console) | Stdio::Output(console) => console.as_path(),
            Stdio::Console => Path::new("/dev/null"),
        })
        .arg(start.status)
        .arg(hercules.get_program())
        .args(hercules.get_args());
    Ok(command)
}

/// The machine, in Hercules' words. Emulated CPUs are not to be what this
/// machine does last, as they would be by default, but as urgent as the lab
/// itself. Its clock is looked at every millisecond: by default, twenty times as
/// often, that takes a tenth of a CPU.
fn configuration(start: &Start<'_>) -> String {
    let memory = start.memory;
    let priority = rustix::process::getpriority_process(None).unwrap_or(0);
    let mut text = format!(
        "CPUSERIAL 000002\nCPUMODEL 2097\nMODEL EMULATOR\nMAINSIZE {memory}\nXPNDSIZE 0\n\
         NUMCPU 2\nCPUPRIO {priority}\nTIMERINT 1000\nARCHMODE z/Arch\nALRF ENABLE\nOSTAILOR QUIET\nPANRATE SLOW\n\
         PGMPRDOS LICENSED\n0009 3215-C / noprompt\n"
    );
    for tape in 0..tapes(&start.stdio) {
        text += &format!("{0} 3480 {0}\n", drive(tape));
    }
    for n in 0..start.disks.len() {
        text += &format!("{0} 3370 {0}\n", disk(n));
    }
    text
}

/// Runs Hercules in `folder`, passes on what comes on its tapes, and puts the
/// exit status that the command in the machine had into the file `status`.
///
/// # Errors
///
/// When it can't be started or a file can't be written.
pub fn attend(
    folder: &Path,
    console: &Path,
    status: &Path,
    program: &str,
    arguments: &[String],
) -> Result<i32> {
    let mut hercules = Command::new(program);
    hercules
        .args(arguments)
        .args(["-d", "-f", "configuration"])
        .env("HERCULES_RC", "script");
    let log = File::create(console).at(console)?;
    let mut child = with_lab(&hercules)
        .current_dir(folder)
        .stdin(Pipe::null())
        .stdout(log.try_clone().at(console)?)
        .stderr(log)
        .spawn()
        .map_err(|source| Error::Start {
            program: program.to_owned(),
            source,
        })?;
    let mut output = Tape::open(&folder.join(drive(OUTPUT)))?;
    let mut reported = Tape::open(&folder.join(drive(STATUS)))?;
    let errors = folder.join(drive(ERRORS));
    let mut errors = errors.exists().then(|| Tape::open(&errors)).transpose()?;
    loop {
        // Looked at before the tapes: what was written until then is there.
        let ended = child.try_wait().map_err(|source| Error::Start {
            program: program.to_owned(),
            source,
        })?;
        output.pass_on(&mut io::stdout())?;
        if let Some(errors) = &mut errors {
            errors.pass_on(&mut io::stderr())?;
        }
        if let Some(ended) = ended {
            reported.pass_on(&mut File::create(status).at(status)?)?;
            return Ok(ended.code().unwrap_or(1));
        }
        thread::sleep(LOOK);
    }
}

/// The file of a tape, which is being written: blocks, each behind a header
/// (the AWSTAPE format).
struct Tape {
    path: PathBuf,
    file: File,
    /// How far it has been read, in bytes.
    position: u64,
}

impl Tape {
    /// Size of a header: the length of this block's data and of that of the
    /// last one, 16 bits each with the lower byte first, and two bytes of flags.
    const HEADER: usize = 6;

    fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: File::open(path).at(path)?,
            position: 0,
        })
    }

    /// Writes the data of the blocks that are there whole, and not yet written,
    /// to `sink`.
    fn pass_on(&mut self, sink: &mut dyn Write) -> Result<()> {
        let path = self.path.clone();
        while let Some(data) = self.next().at(&path)? {
            sink.write_all(&data)
                .and_then(|()| sink.flush())
                .at(&path)?;
        }
        Ok(())
    }

    /// The next block's data; nothing of a tape mark, which has a header only.
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let size = self.file.metadata()?.len();
        let start = self.position + Self::HEADER as u64;
        if size < start {
            return Ok(None);
        }
        let mut header = [0; Self::HEADER];
        self.file.read_exact_at(&mut header, self.position)?;
        let [low, high, ..] = header;
        let mut data = vec![0; u16::from_le_bytes([low, high]).into()];
        if size < start + data.len() as u64 {
            return Ok(None);
        }
        self.file.read_exact_at(&mut data, start)?;
        self.position = start + data.len() as u64;
        Ok(Some(data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l1::Clocks;
    use crate::l1::tests::parts;

    #[test]
    fn a_machine_with_disks_and_tapes() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["initramfs", "a.img", "b.img"] {
            fs::write(path(name), name).unwrap();
        }
        let disk = |name: &str, changes| Disk {
            path: path(name),
            changes,
        };
        let disks = [
            disk("a.img", Changes::Forgotten),
            disk("b.img", Changes::Refused),
        ];
        let stdio = Stdio::Streams("/tmp/log".into());
        let mut parts = parts("s390x");
        parts.image = path("a.img");
        let command = Start {
            parts: &parts,
            initramfs: &path("initramfs"),
            memory: 2048,
            disks: &disks,
            stdio: stdio.clone(),
            clocks: Clocks::Time,
            status: &path("status"),
        }
        .command()
        .unwrap();
        let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        assert!(words.iter().any(|word| word == ATTEND), "{words:?}");
        let folder = path("initramfs.hercules");
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        let configuration = read("configuration");
        assert!(configuration.contains("\nMAINSIZE 2048\n"));
        assert!(configuration.contains("\n0582 3480 0582\n0600 3370 0600\n0601 3370 0601\n"));
        assert!(read("machine.ins").contains("initramfs 0x04000000\nparameters 0x00010480\n"));
        assert_eq!(read("initramfs"), "initramfs");
        assert!(read("fields").ends_with("\0\0\0\0\x09"));
        // What is written to the first disk is forgotten.
        fs::write(folder.join("0600"), "changed").unwrap();
        assert_eq!(fs::read_to_string(path("a.img")).unwrap(), "a.img");
        assert_eq!(read("0601"), "b.img");

        let script = init("true", &stdio, &disks).command.unwrap();
        assert!(script.contains("echo 1 >$ccw.0601/readonly\n"), "{script}");
        assert!(!script.contains("$ccw.0600/readonly"), "{script}");
        assert!(script.contains("of=/dev/ntibm2"), "{script}");
        let together = init("true", &Stdio::Output("/tmp/log".into()), &[]);
        assert!(!together.command.unwrap().contains("ntibm2"));
    }

    #[test]
    fn a_tape_is_read_as_it_grows() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut tape = Tape::open(file.path()).unwrap();
        let mut read = |more: &[u8]| {
            file.as_file().write_all(more).unwrap();
            let mut sink = Vec::new();
            tape.pass_on(&mut sink).unwrap();
            String::from_utf8(sink).unwrap()
        };
        assert_eq!(read(&[]), "");
        assert_eq!(read(&[2, 0, 0]), "");
        assert_eq!(read(&[0, 0xa0, 0, b'a']), "");
        assert_eq!(read(b"b\x01\0\x02\0\xa0\0c"), "abc");
        // A tape mark, and what another program wrote behind it.
        assert_eq!(read(&[0, 0, 1, 0, 0x40, 0]), "");
        assert_eq!(read(b"\x01\0\0\0\xa0\0d"), "d");
    }
}
