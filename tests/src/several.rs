//! Several VMs at the same time.

use std::fs;

use crate::check::{At, Result, contains, ensure, equal, fail, value};
use crate::crossvisor::Session;
use crate::lab::{Lab, text};
use crate::net::UserTap;
use crate::pattern;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[test("two-vms-at-once", 300, two).once().common()];

const MIB: usize = 1 << 20;

/// One of the VMs: its name, and the number that all of its own follows from.
struct Vm {
    name: &'static str,
    number: u64,
}

const ALPHA: Vm = Vm {
    name: "alpha",
    number: 1,
};
const BETA: Vm = Vm {
    name: "beta",
    number: 2,
};

impl Vm {
    fn disk(&self) -> String {
        format!("{}.img", self.name)
    }

    fn start(&self, lab: &Lab) -> Result<Session> {
        let (name, number) = (self.name, self.number);
        let disk = text(&lab.path(&self.disk()));
        let script = format!(
            "set -e
            ip addr add 10.9.{net}.2/24 dev eth0; ip link set eth0 up
            echo host=$(hostname)
            echo mac=$(cat /sys/class/net/eth0/address)
            tool check /dev/vda 0 {MIB} {seed}
            echo ready; read line
            ping -c 2 -W 60 10.9.{net}.1
            tool write /dev/vda 0 {MIB} {written}",
            net = 10 + number,
            seed = 70 + number,
            written = 80 + number,
        );
        lab.run()
            .args(&["--name", name, "--disk", &disk])
            .args(&["--net", &format!("tap=cvtwo{number}")])
            .exec_with_tool(&script)
            .limit(200)
            .start()
    }

    /// Lets the VM go on from `ready`, and returns its MAC address.
    fn end(&self, lab: &Lab, before: &str, mut vm: Session) -> Result<String> {
        vm.send("go\n")?;
        let out = vm.finish()?.succeeds()?;
        contains("the guest's ping", &out, "2 packets received")?;
        equal("hostname", value(before, "host")?, self.name)?;
        let found = fs::read(lab.path(&self.disk())).at(self.disk())?;
        let wrong = pattern::difference(80 + self.number, 0, &found);
        equal(
            &format!("first wrong byte of {}'s disk", self.name),
            wrong,
            None,
        )?;
        Ok(value(before, "mac")?.to_string())
    }
}

/// Two VMs run side by side, each with its own disk, tap, name and MAC address;
/// the address is the same when a VM runs again.
fn two(lab: &Lab) -> Result {
    let _taps = [
        UserTap::make(lab, "cvtwo1", "10.9.11.1/24", false)?,
        UserTap::make(lab, "cvtwo2", "10.9.12.1/24", false)?,
    ];
    for vm in [&ALPHA, &BETA] {
        lab.image(&vm.disk(), 70 + vm.number, MIB)?;
    }
    let (mut alpha, mut beta) = (ALPHA.start(lab)?, BETA.start(lab)?);
    // Both are up before either goes on.
    let alpha_said = alpha.expect("ready\n")?;
    let beta_said = beta.expect("ready\n")?;
    let alpha_mac = ALPHA.end(lab, &alpha_said, alpha)?;
    ensure(beta.is_running()?, || "beta ended with alpha".into())?;
    let beta_mac = BETA.end(lab, &beta_said, beta)?;
    if alpha_mac == beta_mac {
        return fail(format!("both have the MAC address {alpha_mac}"));
    }
    lab.image(&ALPHA.disk(), 70 + ALPHA.number, MIB)?;
    let mut again = ALPHA.start(lab)?;
    let said = again.expect("ready\n")?;
    equal(
        "MAC address of alpha's second life",
        ALPHA.end(lab, &said, again)?,
        alpha_mac,
    )
}
