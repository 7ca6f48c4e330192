//! The console: the user's terminal is the guest's, and is the user's again
//! afterwards.

use crate::check::{At, Result, contains, ensure, equal, value};
use crate::crossvisor::Session;
use crate::lab::Lab;
use crate::pty::Terminal;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("console-serial-and-power-off", 100, serial).once(),
    test("console-virtio-and-quit", 100, virtio).once().common(),
    test("console-none", 150, none).once().common(),
];

/// The shell's prompt.
const PROMPT: &str = "/ # ";

/// A shell on the serial port: echo, Ctrl-C, and power-off by the guest.
fn serial(lab: &Lab) -> Result {
    let terminal = Terminal::open(31, 91).at("pseudo-terminal")?;
    let before = terminal.attributes().at("pseudo-terminal")?;
    let mut run = lab.run_quietly().start_on(&terminal)?;
    run.expect(PROMPT)?;
    ensure(terminal.is_raw().at("pseudo-terminal")?, || {
        "the terminal is not raw while the guest has it".into()
    })?;
    let out = talk(&mut run)?;
    let console = format!("/dev/{}", lab.guests()?.console);
    equal("the guest's terminal", value(&out, "tty")?, &console)?;
    equal("its size", value(&out, "size")?, "31 91")?;
    // Ctrl-C reaches the guest, and ends what runs there.
    run.send("sleep 1000; echo ended=$?\n")?;
    run.expect("ended=$?\r\n")?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    run.send("\x03")?;
    run.expect(PROMPT)?;
    run.send("echo after=$?\n")?;
    run.expect("after=130\r\n")?;
    run.send("poweroff\n")?;
    run.finish()?.succeeds()?;
    equal(
        "the terminal's attributes",
        terminal.attributes().at("pseudo-terminal")?,
        before,
    )
}

/// The same on virtio-console, ended by Ctrl-A x.
fn virtio(lab: &Lab) -> Result {
    let terminal = Terminal::open(24, 80).at("pseudo-terminal")?;
    let before = terminal.attributes().at("pseudo-terminal")?;
    let mut run = lab
        .run_quietly()
        .args(&["--console", "virtio"])
        .start_on(&terminal)?;
    run.expect(PROMPT)?;
    let out = talk(&mut run)?;
    equal("the guest's terminal", value(&out, "tty")?, "/dev/hvc0")?;
    // Ctrl-A twice is one for the guest, and Ctrl-A alone does not quit.
    run.send("od -An -tx1 -N3\n")?;
    run.expect("-N3\r\n")?;
    run.send("\x01\x01y\n")?;
    run.expect(" 01 79 0a")?;
    run.expect(PROMPT)?;
    ensure(run.is_running()?, || {
        "it quit without being asked to".into()
    })?;
    run.send("\x01x")?;
    let out = run.finish()?;
    out.succeeds()?;
    equal(
        "the terminal's attributes",
        terminal.attributes().at("pseudo-terminal")?,
        before,
    )
}

/// What is typed is echoed by the guest, and what comes back is whole.
fn talk(run: &mut Session) -> Result<String> {
    // The quotes are in the echo and not in the answer.
    run.send("echo typed-'and'-answered\n")?;
    run.expect("echo typed-'and'-answered")?;
    run.expect("typed-and-answered\r\n")?;
    run.expect(PROMPT)?;
    // Longer than any FIFO, typed at once.
    let long = "0123456789abcdef".repeat(12);
    run.send(&format!("x={long}; echo ${{#x}} letters\n"))?;
    run.expect("192 letters\r\n")?;
    run.expect(PROMPT)?;
    // More output than a terminal's 4 KiB, none of it lost. Where two lab machines
    // share two CPUs, x86_64's takes up to 0.6 s for each 16 letters on hvc0.
    run.send("seq 1 1200; echo all='done'\n")?;
    let out = run.expect("all=done\r\n")?;
    let out = out.replace('\r', "");
    let numbers: Vec<String> = (1..=1200).map(|n| n.to_string()).collect();
    contains(
        "the guest's output",
        &out,
        &format!("\n{}\n", numbers.join("\n")),
    )?;
    run.expect(PROMPT)?;
    run.send("echo tty=$(tty); echo size=$(stty size); echo end='yes'\n")?;
    let out = run.expect("end=yes\r\n")?;
    run.expect(PROMPT)?;
    // The command line itself has `tty=` in it, too.
    Ok(out
        .lines()
        .filter(|line| !line.contains("echo"))
        .collect::<Vec<_>>()
        .join("\n"))
}

/// Without a console, nothing but the command's own output appears.
fn none(lab: &Lab) -> Result {
    let out = lab
        .run()
        .args(&["--console", "none"])
        .exec("(echo to the console > /dev/console) 2>/dev/null; echo consoles=$(cat /proc/consoles); echo to stderr >&2")
        .output()?;
    let printed = out.succeeds()?;
    let console = lab.guests()?.console;
    ensure(!printed.contains(console), || {
        format!("there is a console: {printed}")
    })?;
    contains("stdout", &printed, "consoles=")?;
    equal("stderr", out.errors(), "to stderr\n".to_string())
}
