//! How a guest's life goes and ends, and what crossvisor's exit status says of
//! it.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;

use crate::check::{At, Result, contains, ensure, equal, fail};
use crate::lab::{Lab, text};
use crate::machines::Difference;
use crate::pattern;
use crate::pty::Terminal;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("exec-status-and-streams", 200, streams),
    test("exec-killed-by-signal", 150, killed).once().common(),
    test("reset-in-place", 200, reset).about(Difference::Interrupts),
    test("panic-told-apart", 150, panic).once(),
    test("triple-fault-told-apart", 150, triple_fault).on(|machine| machine.arch() == "x86_64"),
    test("sigterm-powers-off", 200, sigterm).about(Difference::Interrupts),
    test("sigint-twice-ends", 150, sigint).once().common(),
];

/// Standard input, output and error are the command's, every byte as it was,
/// and its status is crossvisor's.
fn streams(lab: &Lab) -> Result {
    let mut input = pattern::bytes(41, 1 << 20);
    // What terminals would change or act upon.
    input.extend(0..=255u8);
    input.extend(b"\r\n\x03\x04\x01x\x11\x13");
    let out = lab
        .run()
        .stdin(&input)
        .exec("echo first error >&2; cat; echo last error >&2; exit 3")
        .output()?;
    out.exits(3)?;
    equal("bytes that came back", out.stdout.len(), input.len())?;
    let wrong = out.stdout.iter().zip(&input).position(|(a, b)| a != b);
    equal("first wrong byte that came back", wrong, None)?;
    contains("stderr", &out.errors(), "first error\n")?;
    contains("stderr", &out.errors(), "last error\n")
}

/// A command that a signal ends has the status that a shell gives it.
fn killed(lab: &Lab) -> Result {
    let out = lab
        .run()
        .exec("echo before; kill -9 $$; echo after")
        .output()?;
    let printed = out.exits(128 + 9)?;
    equal("stdout", printed.as_str(), "before\n")
}

/// A reset starts the guest again in the same process, with its disks as it
/// left them.
fn reset(lab: &Lab) -> Result {
    let disk = lab.empty_image("boots.img", 1 << 20)?;
    let out = lab
        .run()
        .args(&["--disk", &text(&disk)])
        .exec(
            "count=$(head -c 1 /dev/vda | tr -c 0-9 0)
            echo boot $count
            echo $((count + 1)) | dd of=/dev/vda conv=fsync 2>/dev/null
            [ $count = 2 ] && exit 12
            reboot -f",
        )
        .output()?;
    let printed = out.exits(12)?;
    equal(
        "what the guest said",
        printed.as_str(),
        "boot 0\nboot 1\nboot 2\n",
    )?;
    let found = fs::read(&disk).at("boots.img")?;
    equal("the disk's first byte", found.first(), Some(&b'3'))
}

/// A panic of the guest's kernel ends crossvisor, which says so, and does not
/// start the guest again.
fn panic(lab: &Lab) -> Result {
    let out = lab
        .run()
        .exec("echo alive; sleep 0.5; echo c > /proc/sysrq-trigger; sleep 100")
        .output()?;
    // The status of --exec for a guest that ended without one.
    let printed = out.exits(125)?;
    equal("what the guest said", printed.as_str(), "alive\n")?;
    contains(
        "stderr",
        &out.errors(),
        "crossvisor: the guest's kernel panicked\n",
    )?;
    // The kernel's own words reach the user.
    contains("stderr", &out.errors(), "sysrq triggered crash")
}

/// A triple fault is neither a power-off nor a reset.
fn triple_fault(lab: &Lab) -> Result {
    let out = lab
        .run()
        .args(&["--cmdline", "reboot=t"])
        .exec("echo alive; sleep 0.5; reboot -f; sleep 100")
        .output()?;
    let printed = out.exits(125)?;
    equal("what the guest said", printed.as_str(), "alive\n")?;
    contains("stderr", &out.errors(), "triple fault")
}

/// SIGTERM presses the guest's power button, and the guest powers off.
fn sigterm(lab: &Lab) -> Result {
    let terminal = Terminal::open(24, 80).at("pseudo-terminal")?;
    let before = terminal.attributes().at("pseudo-terminal")?;
    let mut run = lab.run_quietly().start_on(&terminal)?;
    run.expect("/ # ")?;
    run.signal(Signal::TERM)?;
    run.expect("init: powering off")?;
    let out = run.finish()?;
    out.succeeds()?;
    equal(
        "the terminal's attributes",
        terminal.attributes().at("pseudo-terminal")?,
        before,
    )
}

/// One SIGINT is for asking, the second ends the VM.
fn sigint(lab: &Lab) -> Result {
    let mut run = lab
        .run()
        .exec("echo up; read line; echo still $line; sleep 1000")
        .start()?;
    run.expect("up\n")?;
    run.signal(Signal::INT)?;
    run.expect_error("interrupt once more")?;
    std::thread::sleep(Duration::from_millis(300));
    ensure(run.is_running()?, || "one SIGINT ended it".into())?;
    run.send("here\n")?;
    run.expect("still here\n")?;
    run.signal(Signal::INT)?;
    let out = run.finish()?;
    match out.code() {
        None | Some(0) => return fail("it ended as if the guest had powered off"),
        Some(_) => {}
    }
    contains("stderr", &out.errors(), "ended by a signal")
}
