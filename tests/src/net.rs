//! The network: a guest and its host reach each other through a tap.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::check::{At, Result, contains, ensure, equal, fail, number, value, within};
use crate::disk::is_set;
use crate::inside;
use crate::lab::Lab;
use crate::machines::Difference;
use crate::runner::{Test, test};
use crate::tap;

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("net-ping-and-bulk-on-queues", 240, |lab| queues(lab, &[])).about(Difference::Interrupts),
    test("net-by-the-legacy-interface", 240, |lab| {
        queues(lab, &["--virtio-legacy"])
    })
    .on(|m| m.has_transport("ccw"))
    .once(),
    test("net-tap-made-for-the-vm", 200, made).once().common(),
];

/// Bits of virtio-net's features (virtio 1.2, section 5.1.3).
mod feature {
    pub const CHECKSUM: usize = 0;
    pub const GUEST_CHECKSUM: usize = 1;
    pub const MAC: usize = 5;
    pub const GUEST_TSO4: usize = 7;
    pub const GUEST_TSO6: usize = 8;
    pub const HOST_TSO4: usize = 11;
    pub const HOST_TSO6: usize = 12;
    pub const SEVERAL_QUEUES: usize = 22;
    pub const VERSION_1: usize = 32;
}

/// The largest Ethernet frame without segmentation offload.
const FRAME: u64 = 1514;

const STREAMS: u64 = 4;
/// Of each stream, each way.
const MEBIBYTES: u64 = 8;

/// A tap of the user's with two queue pairs: pings both ways, then TCP both ways
/// over both queues, in frames larger than a wire would carry. The devices are
/// those of virtio 1, unless `arguments` have them otherwise.
fn queues(lab: &Lab, arguments: &[&str]) -> Result {
    let _tap = UserTap::make(lab, "cvtest0", "10.9.1.1/24", true)?;
    let listener = TcpListener::bind("10.9.1.1:0").at("a socket on the tap")?;
    let address = listener.local_addr().at("a socket on the tap")?;
    let script = format!(
        "set -e
        ip addr add 10.9.1.2/24 dev eth0; ip link set eth0 up
        echo mac=$(cat /sys/class/net/eth0/address)
        echo features=$(cat /sys/class/net/eth0/device/features)
        echo queues=$(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)
        ping -c 3 -W 60 10.9.1.1
        echo ready; read line
        tool bulk {address} {STREAMS} {MEBIBYTES}
        cd /sys/class/net/eth0/statistics
        for name in tx_bytes tx_packets rx_bytes rx_packets tx_errors rx_errors; do
            echo $name=$(cat $name)
        done
        echo device=$(basename $(readlink -f /sys/class/net/eth0/device))
        grep -E 'virtio|Virtual I.O' /proc/interrupts",
    );
    let mut run = lab
        .run()
        .args(&["--cpus", "2"])
        .args(&["--net", "tap=cvtest0,mac=52:54:00:0a:0b:0c,queues=2"])
        .args(arguments)
        .exec_with_tool(&script)
        .limit(200)
        .start()?;
    let before = run.expect("ready\n")?;
    contains(
        "the guest's ping",
        &before,
        "3 packets transmitted, 3 packets received",
    )?;
    let ping = lab.host("ping -c 3 -W 60 10.9.1.2")?;
    contains(
        "the host's ping",
        &ping,
        "3 packets transmitted, 3 packets received",
    )?;
    // The guest answers for the address that was given on the command line.
    let neighbours = fs::read_to_string("/proc/net/arp").at("/proc/net/arp")?;
    contains("the host's ARP table", &neighbours, "52:54:00:0a:0b:0c")?;
    let server = thread::spawn(move || inside::serve(&listener, STREAMS, MEBIBYTES));
    run.send("go\n")?;
    let out = run.finish()?.succeeds()?;
    server
        .join()
        .unwrap_or_else(|_| fail("the server panicked"))?;

    equal(
        "MAC address in the guest",
        value(&out, "mac")?,
        "52:54:00:0a:0b:0c",
    )?;
    equal("queue pairs", number(&out, "queues")?, 2)?;
    let bits = value(&out, "features")?;
    for (bit, name) in [
        (feature::CHECKSUM, "checksum offload"),
        (
            feature::GUEST_CHECKSUM,
            "checksum offload towards the guest",
        ),
        (feature::MAC, "MAC address"),
        (
            feature::GUEST_TSO4,
            "segmentation offload towards the guest, IPv4",
        ),
        (
            feature::GUEST_TSO6,
            "segmentation offload towards the guest, IPv6",
        ),
        (feature::HOST_TSO4, "segmentation offload, IPv4"),
        (feature::HOST_TSO6, "segmentation offload, IPv6"),
        (feature::SEVERAL_QUEUES, "several queues"),
    ] {
        ensure(is_set(bits, bit), || {
            format!("{name} was not negotiated: {bits}")
        })?;
    }
    equal(
        "virtio 1",
        is_set(bits, feature::VERSION_1),
        !arguments.contains(&"--virtio-legacy"),
    )?;
    let total = (STREAMS * MEBIBYTES) << 20;
    for way in ["tx", "rx"] {
        let bytes = number(&out, &format!("{way}_bytes"))?;
        let packets = number(&out, &format!("{way}_packets"))?;
        within(&format!("{way} bytes"), bytes, total, total * 2)?;
        equal(
            &format!("{way} errors"),
            number(&out, &format!("{way}_errors"))?,
            0,
        )?;
        // Acknowledgements are packets too, and small: the mean still shows
        // that no frame was cut to the size of a wire.
        within(
            &format!("mean {way} packet"),
            bytes / packets,
            FRAME + 1,
            65536,
        )?;
    }
    let device = value(&out, "device")?;
    let queues = ["input.0", "input.1", "output.0", "output.1"];
    // A wire is all of the device's, and may be another device's, too.
    // Adapter interruptions are counted together, in the line that ends so.
    let names = match (
        lab.machine().has_transport("ccw"),
        lab.machine().has_messages(),
    ) {
        (true, _) => vec!["AI".to_string()],
        (false, true) => queues.map(|queue| format!("{device}-{queue}")).to_vec(),
        (false, false) => vec![device.to_string()],
    };
    for name in names {
        let interrupts = interrupts(&out, &name)?;
        ensure(interrupts > 0, || format!("no interrupt of {name}:\n{out}"))?;
    }
    Ok(())
}

/// A tap that does not exist is made, with a MAC address that follows from the
/// VM's name, and is gone after the VM.
fn made(lab: &Lab) -> Result {
    let device = PathBuf::from("/sys/class/net/cvtest1");
    ensure(!device.exists(), || "cvtest1 exists already".into())?;
    let mut run = lab
        .run()
        .args(&["--name", "alpha", "--net", "tap=cvtest1"])
        .args(&["--cmdline", "virtio_net.napi_tx=0"])
        .exec(
            "set -e
            echo napi_tx=$(cat /sys/module/virtio_net/parameters/napi_tx)
            ip addr add 10.9.2.2/24 dev eth0; ip link set eth0 up
            echo mac=$(cat /sys/class/net/eth0/address)
            ping -c 1 -W 60 10.9.2.1",
        )
        .start()?;
    appears(&device)?;
    lab.host("ip addr add 10.9.2.1/24 dev cvtest1; ip link set cvtest1 up")?;
    run.close_input();
    let out = run.finish()?.succeeds()?;
    contains("the guest's ping", &out, "1 packets received")?;
    ensure(!device.exists(), || "cvtest1 outlives the VM".into())?;
    equal("the module's parameter", value(&out, "napi_tx")?, "N")?;
    let mac = value(&out, "mac")?;
    let first = mac.split(':').next().unwrap_or_default();
    let first = u8::from_str_radix(first, 16).at(format!("MAC address `{mac}`"))?;
    // Individual and locally administered (IEEE 802, section 8.2).
    equal("low bits of the MAC address", first & 3, 2)
}

/// A tap made by the test, for the time of the value's life.
pub struct UserTap<'a> {
    lab: &'a Lab,
    name: &'static str,
}

impl Drop for UserTap<'_> {
    fn drop(&mut self) {
        // It is gone already when a test has failed to make it.
        let _ = self.lab.host(&format!("ip link delete {}", self.name));
    }
}

impl<'a> UserTap<'a> {
    /// Makes it, gives it an address and brings it up.
    pub fn make(
        lab: &'a Lab,
        name: &'static str,
        address: &str,
        several_queues: bool,
    ) -> Result<Self> {
        tap::make(name, several_queues).at(format!("making tap {name}"))?;
        let tap = Self { lab, name };
        lab.host(&format!(
            "ip addr add {address} dev {name}; ip link set {name} up"
        ))?;
        Ok(tap)
    }
}

/// Waits until a path exists.
fn appears(path: &Path) -> Result {
    let deadline = Instant::now() + Duration::from_secs(300);
    while !path.exists() {
        ensure(Instant::now() < deadline, || {
            format!("{} never appeared", path.display())
        })?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The sum of a line of /proc/interrupts over all CPUs: of the one that ends
/// with a list of names that has `name` in it.
fn interrupts(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.any(|word| word.trim_end_matches(',') == name)
    });
    let Some(line) = line else {
        return fail(format!("no interrupt of {name} in\n{text}"));
    };
    let counts = line.split_whitespace().skip(1);
    Ok(counts.map_while(|word| word.parse::<u64>().ok()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_summed_over_cpus() {
        let text = " 25:   3  40  PCI-MSIX-0000:00:02.0   1-edge      virtio1-input.0\n\
                    26:  0 0 PCI-MSIX-0000:00:02.0 2-edge virtio1-output.0\n";
        assert_eq!(interrupts(text, "virtio1-input.0").unwrap(), 43);
        assert_eq!(interrupts(text, "virtio1-output.0").unwrap(), 0);
        assert!(interrupts(text, "virtio1-input.1").is_err());
        let shared = " 13:  9 1  SiFive PLIC   2 Level     virtio1, virtio5\n";
        assert_eq!(interrupts(shared, "virtio1").unwrap(), 10);
        assert_eq!(interrupts(shared, "virtio5").unwrap(), 10);
    }
}
