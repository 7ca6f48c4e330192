//! Starting a lab machine in QEMU. The streams of what runs in it are
//! virtio-serial ports.

use std::path::Path;
use std::process::Command;

use crossvisor_boot::initramfs::{IO_PORT, InitConfig, Io, STATUS_PORT};

use crate::emulator::Qemu;
use crate::l1::{Changes, Clocks, Start, Stdio};

/// The port that carries a command's standard input.
const INPUT_PORT: &str = "org.crossvisor.input";
/// The port that carries a command's standard error.
const ERROR_PORT: &str = "org.crossvisor.error";

/// What the machine's kernel is not to do: what helps against leaks that emulated
/// processors do not have, and busy waiting for what guests do next. Both take
/// more time here than elsewhere.
const UNNEEDED: &str = "mitigations=off kvm.halt_poll_ns=0";

/// What `/init` is told, so that it runs `command`.
pub fn init(command: String, stdio: &Stdio) -> InitConfig {
    InitConfig {
        command: Some(command),
        io: io(stdio),
        status_port: Some(STATUS_PORT.to_owned()),
        ..InitConfig::default()
    }
}

/// The command that starts `machine`.
pub fn command(start: &Start<'_>, machine: &Qemu) -> Command {
    let mut qemu = start.parts.emulator.command();
    match start.clocks {
        // 8 ns for each.
        Clocks::Instructions if machine.counts => {
            qemu.args([
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=3,sleep=off",
            ]);
        }
        _ => {
            qemu.args(["-accel", "tcg,thread=multi"]);
        }
    }
    // Before the machine's own options, which may say otherwise.
    qemu.args(["-smp", "2"]);
    qemu.args(machine.options);
    qemu.args(["-m", &format!("{}M", start.memory)]);
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    qemu.arg("-kernel").arg(&start.parts.image);
    qemu.arg("-initrd").arg(start.initramfs);
    qemu.arg("-append").arg(format!(
        "console=hvc0 quiet panic=-1 {UNNEEDED} {}",
        start.parts.machine.cmdline
    ));
    // Slots begin with 1, where QEMU is to be told.
    let slot = |number: usize| match machine.bus {
        Some(bus) => format!(",bus={bus},addr={number:#x}"),
        None => String::new(),
    };
    qemu.arg("-device")
        .arg(format!("virtio-serial-pci{}", slot(1)));
    qemu.arg("-chardev")
        .arg(with_id(&console(&start.stdio), "console"));
    qemu.args(["-device", "virtconsole,chardev=console"]);
    let status = format!("file,path={}", escape(start.status));
    let ports = ports(&start.stdio).iter().copied();
    for (n, (port, backend)) in ports.chain([(STATUS_PORT, status.as_str())]).enumerate() {
        qemu.arg("-chardev")
            .arg(with_id(backend, &format!("port{n}")));
        qemu.arg("-device")
            .arg(format!("virtserialport,chardev=port{n},name={port}"));
    }
    for (n, disk) in start.disks.iter().enumerate() {
        let more = match disk.changes {
            Changes::Kept => "discard=unmap",
            Changes::Forgotten => "snapshot=on",
            Changes::Refused => "read-only=on",
        };
        qemu.arg("-drive").arg(format!(
            "if=none,id=disk{n},format=raw,file={},{more}",
            escape(&disk.path)
        ));
        qemu.arg("-device")
            .arg(format!("virtio-blk-pci,drive=disk{n}{}", slot(n + 2)));
    }
    qemu
}

/// Where the command in the machine finds its input and output.
fn io(stdio: &Stdio) -> Io {
    let some = |port: &str| Some(port.to_owned());
    match stdio {
        Stdio::Console => Io::Console,
        Stdio::Streams(_) => Io::Ports {
            stdin: some(INPUT_PORT),
            stdout: IO_PORT.to_owned(),
            stderr: some(ERROR_PORT),
        },
        Stdio::Output(_) => Io::Ports {
            stdin: None,
            stdout: IO_PORT.to_owned(),
            stderr: None,
        },
    }
}

/// The backend of the machine's console.
fn console(stdio: &Stdio) -> String {
    match stdio {
        Stdio::Console => "stdio,signal=off".to_owned(),
        Stdio::Streams(log) | Stdio::Output(log) => format!("file,path={}", escape(log)),
    }
}

/// The ports of the command, with their backends. A `stdio` backend closes its
/// port at the end of the input, and a guest blocks when it writes to a closed
/// port; so output has backends of its own.
fn ports(stdio: &Stdio) -> &'static [(&'static str, &'static str)] {
    const OUTPUT: (&str, &str) = (IO_PORT, "file,path=/dev/stdout,append=on");
    match stdio {
        Stdio::Console => &[],
        Stdio::Streams(_) => &[
            OUTPUT,
            (ERROR_PORT, "file,path=/dev/stderr,append=on"),
            (INPUT_PORT, "stdio"),
        ],
        Stdio::Output(_) => &[OUTPUT],
    }
}

/// The backend of a chardev, given as `kind,options`, with an id.
fn with_id(backend: &str, id: &str) -> String {
    match backend.split_once(',') {
        Some((kind, options)) => format!("{kind},id={id},{options}"),
        None => format!("{backend},id={id}"),
    }
}

/// A path as a value in QEMU's option lists, where a comma is doubled.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l1::Disk;
    use crate::l1::tests::parts;

    #[test]
    fn a_machine_with_a_disk() {
        let parts = parts("aarch64-gicv2");
        let disks = [Disk {
            path: "/tmp/a,b.img".into(),
            changes: Changes::Refused,
        }];
        let command = Start {
            parts: &parts,
            initramfs: Path::new("/i"),
            memory: 2048,
            disks: &disks,
            stdio: Stdio::Streams("/tmp/log".into()),
            clocks: Clocks::Time,
            status: Path::new("/tmp/s"),
        }
        .command()
        .unwrap();
        let words: Vec<String> = command
            .get_args()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        let line = words.join(" ");
        assert!(line.starts_with("with-lab "), "{line}");
        assert!(
            line.contains("gic-version=2") && line.contains("-m 2048M"),
            "{line}"
        );
        assert!(line.contains("file=/tmp/a,,b.img,read-only=on"), "{line}");
        assert!(line.contains("-chardev stdio,id=port2 "), "{line}");
        assert!(
            line.contains("virtserialport,chardev=port2,name=org.crossvisor.input"),
            "{line}"
        );
        assert!(
            line.contains("-chardev file,id=console,path=/tmp/log"),
            "{line}"
        );
        assert!(line.contains("name=org.crossvisor.status"), "{line}");
    }
}
