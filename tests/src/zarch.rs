//! What only s390x machines have: a watchdog by DIAGNOSE, and CPUs that stop and
//! restart each other when the guest resets itself.

use crate::check::{Result, contains, equal};
use crate::lab::{Lab, text};
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[test("watchdog-and-sysrq-reset", 250, resets)
    .on(|m| m.arch() == "s390x")
    .once()];

/// In the first life the watchdog is closed as it should be, which stops it, and
/// then set to its shortest time and forgotten. In the second life CPU 1 stops
/// CPU 0, restarts it at once to do the reset, and stops.
const LIVES: &str = "
    count=$(head -c 1 /dev/vda | tr -c 0-9 0)
    echo life $count
    echo $((count + 1)) | dd of=/dev/vda conv=fsync 2>/dev/null
    case $count in
    0)
        insmod /watchdog.ko && insmod /diag288_wdt.ko || exit 21
        state() { cat /sys/class/watchdog/watchdog0/state; }
        exec 3>/dev/watchdog
        echo opened: $(state)
        printf V >&3
        exec 3>&-
        echo closed: $(state)
        watchdog -F -T 15 -t 1000 /dev/watchdog
        ;;
    1)
        taskset 2 sh -c 'echo b > /proc/sysrq-trigger'
        ;;
    2)
        exit 12
        ;;
    esac
    sleep 1000";

fn resets(lab: &Lab) -> Result {
    let disk = lab.empty_image("lives.img", 1 << 20)?;
    let modules = text(&lab.manifest.modules);
    let mut run = lab
        .run_quietly()
        .limit(200)
        .args(&["--cpus", "2", "--disk", &text(&disk)]);
    for module in ["watchdog.ko", "diag288_wdt.ko"] {
        let file = format!("{modules}/kernel/{module}:/{module}");
        run = run.args(&["--initramfs-add", &file]);
    }
    let out = run.exec(LIVES).output()?;
    let printed = out.exits(12)?;
    equal(
        "what the guest said",
        printed.as_str(),
        "life 0\nopened: active\nclosed: inactive\nlife 1\nlife 2\n",
    )?;
    contains("stderr", &out.errors(), "the guest's watchdog has run out")
}
