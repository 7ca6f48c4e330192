//! Virtio over PCI, over MMIO and over channel I/O, with messages and with wires,
//! under each interrupt controller.

use crate::check::{Result, contains, ensure, equal, fail, number, value};
use crate::crossvisor::Output;
use crate::disk::{feature, is_set};
use crate::lab::{Lab, text};
use crate::machines::Difference;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("pci-with-messages-and-entropy", 150, pci)
        .on(|m| m.has_transport("pci") && m.has_messages())
        .about(Difference::Interrupts),
    test("pci-with-wires", 150, wires)
        .on(|m| m.has_transport("pci"))
        .about(Difference::Interrupts),
    test("ccw", 150, ccw).on(|m| m.has_transport("ccw")).once(),
    test("ccw-legacy-interface", 200, legacy)
        .on(|m| m.has_transport("ccw"))
        .once(),
    test("mmio", 150, mmio)
        .on(|m| m.has_transport("mmio"))
        .about(Difference::Interrupts),
    test("no-entropy-device", 150, no_entropy).once().common(),
    test("irqchip-gicv3-its", 150, |lab| controller(lab, "gicv3-its"))
        .on(|m| m.irqchip("gicv3-its").is_some())
        .about(Difference::Interrupts),
    test("irqchip-gicv3", 150, |lab| controller(lab, "gicv3"))
        .on(|m| m.irqchip("gicv3").is_some())
        .about(Difference::Interrupts),
    test("irqchip-gicv2m", 150, |lab| controller(lab, "gicv2m"))
        .on(|m| m.irqchip("gicv2m").is_some())
        .about(Difference::Interrupts),
    test("irqchip-gicv2", 150, |lab| controller(lab, "gicv2"))
        .on(|m| m.irqchip("gicv2").is_some())
        .about(Difference::Interrupts),
    test("irqchip-aia", 150, |lab| controller(lab, "aia"))
        .on(|m| m.irqchip("aia").is_some())
        .about(Difference::Interrupts),
    test("irqchip-plic", 150, |lab| controller(lab, "plic"))
        .on(|m| m.irqchip("plic").is_some())
        .about(Difference::Interrupts),
    test("irqchip-xive", 150, |lab| controller(lab, "xive"))
        .on(|m| m.irqchip("xive").is_some())
        .about(Difference::Nesting),
    test("irqchip-xive-wires", 150, xive_wires)
        .on(|m| m.irqchip("xive").is_some())
        .about(Difference::Nesting),
    test("irqchip-xics", 150, |lab| controller(lab, "xics"))
        .on(|m| m.irqchip("xics").is_some())
        .about(Difference::Nesting),
];

const MIB: usize = 1 << 20;

/// Reads a disk and the entropy device, and says how their interrupts came.
const SCRIPT: &str = "
    set -e
    sed -n 's/.*\\(V[AI][IR]: .*\\)/before \\1/p' /proc/interrupts
    echo interrupts-before=$(awk '/virtio|Virtual I.O/ { for (i = 2; i < 6; i++) n += $i } END { print n }' /proc/interrupts)
    tool check /dev/vda 0 1048576 51
    tool write /dev/vda 0 1048576 52
    echo where=$(readlink -f /sys/block/vda/device)
    echo source=$(cat /sys/class/misc/hw_random/rng_current)
    echo first=$(dd if=/dev/hwrng bs=32 count=1 2>/dev/null | xxd -p | tr -d '\\n')
    echo second=$(dd if=/dev/hwrng bs=32 count=1 2>/dev/null | xxd -p | tr -d '\\n')
    echo interrupts=$(awk '/virtio|Virtual I.O/ { for (i = 2; i < 6; i++) n += $i } END { print n }' /proc/interrupts)
    echo devices=$(ls /sys/bus/virtio/devices | wc -l)
    grep -E 'virtio|Virtual I.O|XICS|XIVE' /proc/interrupts";

/// Runs [`SCRIPT`] with `arguments`; what the guest said.
fn guest(lab: &Lab, arguments: &[&str]) -> Result<String> {
    Ok(guest_with(lab, arguments, "")?.out())
}

/// The same with `more` of a script behind it.
fn guest_with(lab: &Lab, arguments: &[&str], more: &str) -> Result<Output> {
    let disk = lab.image("disk.img", 51, MIB)?;
    let disk_argument = format!("{},serial=S-1", text(&disk));
    let run = lab.run().args(&["--disk", &disk_argument]).args(arguments);
    let script = format!("{SCRIPT}{more}");
    let output = run.stdin(b"typed\n").exec_with_tool(&script).output()?;
    let out = output.succeeds()?;
    contains("source of entropy", value(&out, "source")?, "virtio_rng")?;
    let (first, second) = (value(&out, "first")?, value(&out, "second")?);
    equal("hexadecimal digits of entropy", first.len(), 64)?;
    ensure(first != second && first != "0".repeat(64), || {
        format!("no entropy: {first}, {second}")
    })?;
    equal(
        "virtio devices (console, disk, entropy)",
        number(&out, "devices")?,
        3 + lab.guests()?.own_devices,
    )?;
    ensure(
        number(&out, "interrupts")? > number(&out, "interrupts-before")?,
        || format!("no interrupts came:\n{out}"),
    )?;
    let found = std::fs::read(&disk).unwrap_or_default();
    let wrong = crate::pattern::difference(52, 0, &found);
    equal(
        "first wrong byte on the host",
        (found.len(), wrong),
        (MIB, None),
    )?;
    Ok(output)
}

fn pci(lab: &Lab) -> Result {
    let out = guest(lab, &["--transport", "pci"])?;
    contains(
        "where the disk is",
        value(&out, "where")?,
        "/pci0000:00/0000:00:",
    )?;
    contains("/proc/interrupts", &out, "MSI")?;
    contains("/proc/interrupts", &out, "-req.0")
}

/// A guest that uses no messages gets its interrupts by wire.
fn wires(lab: &Lab) -> Result {
    let out = guest(lab, &["--cmdline", "pci=nomsi", "--cpus", "2"])?;
    contains(
        "where the disk is",
        value(&out, "where")?,
        "/pci0000:00/0000:00:",
    )?;
    no_messages(&out)
}

fn mmio(lab: &Lab) -> Result {
    let out = guest(lab, &["--transport", "mmio", "--cpus", "2"])?;
    let place = value(&out, "where")?;
    ensure(
        place.contains("virtio-mmio")
            || place.contains("virtio_mmio")
            || place.contains("LNRO0005"),
        || format!("the disk is at {place}"),
    )?;
    no_messages(&out)
}

/// What a guest on channels reads of its machine: IPL parameters, its name, its
/// control units.
const MACHINE: &str = "
    echo ipl=$(cat /sys/firmware/ipl/ipl_type) $(cat /sys/firmware/ipl/device)
    sed -n 's/^VM00 Extended Name: */name=/p; s/^VM00 UUID: */uuid=/p' /proc/sysinfo
    echo units=$(cat /sys/bus/ccw/devices/*/cutype | sort)
    echo path=$(cat /sys/devices/css0/chp0.00/type /sys/devices/css0/chp0.00/status)";

/// What was negotiated with each virtio device: its type and the feature bits.
const FEATURES: &str = "
    for device in /sys/bus/virtio/devices/*; do
        echo negotiated $(cat $device/device $device/features)
    done";

/// Checks for each virtio device whether virtio 1 was negotiated.
fn negotiated(out: &str, version_1: bool) -> Result {
    let devices = out
        .lines()
        .filter_map(|line| line.strip_prefix("negotiated "));
    let bits: Vec<&str> = devices.filter_map(|line| line.split(' ').nth(1)).collect();
    equal("devices with features", bits.len(), 3)?;
    ensure(
        bits.iter()
            .all(|bits| is_set(bits, feature::VERSION_1) == version_1),
        || format!("virtio 1 should be {version_1}:\n{out}"),
    )?;
    // Indirect descriptors and event indices are in use either way.
    let rings = [feature::INDIRECT, feature::EVENT_INDEX];
    ensure(
        bits.iter()
            .all(|bits| rings.iter().all(|bit| is_set(bits, *bit))),
        || format!("the rings' features are missing:\n{out}"),
    )
}

/// More of the disk, whose numbers are in the guest's byte order: its size, its
/// serial number, and a request with segments. And the console, both ways.
const LEGACY: &str = "
    echo serial=$(cat /sys/block/vda/serial)
    echo sectors=$(cat /sys/block/vda/size)
    echo cache=$(cat /sys/block/vda/queue/write_cache)
    tool zero /dev/vda 65536 131072
    tool check /dev/vda 0 65536 52
    tool write /dev/vda 0 1048576 52
    echo consoles=$(cat /proc/consoles)
    echo said on hvc0 > /dev/hvc0
    read line; echo line=$line";

/// Devices that offer nothing but the interface from before virtio 1.0, where all
/// is in the guest's byte order: disk, console with its ports, entropy. The
/// network is in another test.
fn legacy(lab: &Lab) -> Result {
    let more = format!("{LEGACY}{FEATURES}");
    let arguments = ["--virtio-legacy", "--console", "virtio", "--cpus", "2"];
    let output = guest_with(lab, &arguments, &more)?;
    let out = output.out();
    negotiated(&out, false)?;
    equal("serial number", value(&out, "serial")?, "S-1")?;
    equal("the disk in sectors", number(&out, "sectors")?, 2048)?;
    equal("write cache", value(&out, "cache")?, "write back")?;
    contains("consoles", value(&out, "consoles")?, "hvc0")?;
    equal("standard input", value(&out, "line")?, "typed")?;
    contains("the console", &output.errors(), "said on hvc0\n")
}

/// Devices are behind subchannels, and interrupt by an adapter's indicators
/// rather than by their subchannels. The guest was loaded from its disk, as far
/// as it can tell.
fn ccw(lab: &Lab) -> Result {
    let more = format!("{MACHINE}{FEATURES}");
    let out = guest_with(lab, &["--transport", "ccw", "--cpus", "2"], &more)?.out();
    negotiated(&out, true)?;
    let place = value(&out, "where")?;
    let (kind, device) = value(&out, "ipl")?.split_once(' ').unwrap_or_default();
    equal("how it was loaded", kind, "ccw")?;
    contains("the disk that it was loaded from", place, device)?;
    equal("the VM's name", value(&out, "name")?, "crossvisor")?;
    ensure(value(&out, "uuid")?.len() == 36, || "no UUID".into())?;
    // Disk, console, entropy, by their types.
    equal(
        "control units",
        value(&out, "units")?,
        "3832/02 3832/03 3832/04",
    )?;
    equal("the channel path", value(&out, "path")?, "32 online")?;
    contains("where the disk is", place, "/css0/0.0.")?;
    let counted = |name: &str| -> u64 {
        let line = out.lines().find_map(|line| line.trim().strip_prefix(name));
        let words = line.unwrap_or_default().split_whitespace();
        words.map_while(|word| word.parse::<u64>().ok()).sum()
    };
    // Setting a device up takes many channel programs, each with an
    // interruption of its own.
    let came = |name: &str| counted(name).saturating_sub(counted(&format!("before {name}")));
    ensure(came("VAI:") > came("VIR:"), || {
        format!("adapter interruptions are fewer than others:\n{out}")
    })
}

/// No device on PCI was seen to interrupt by messages; the wires of an APLIC are
/// messages by themselves, under another name.
fn no_messages(out: &str) -> Result {
    ensure(!out.contains("PCI-MSI"), || {
        format!("messages were used:\n{out}")
    })
}

/// The guest has the controller that was asked for, and works with it.
fn controller(lab: &Lab, name: &str) -> Result {
    let Some(irqchip) = lab.machine().irqchip(name) else {
        return fail(format!("{name} is not to be tried here"));
    };
    let cpus = irqchip.cpus.to_string();
    let out = guest(lab, &["--irqchip", name, "--cpus", &cpus])?;
    contains("/proc/interrupts", &out, irqchip.shown)
}

/// Wires lead to sources of a XIVE that the guest reaches by hypercall only.
fn xive_wires(lab: &Lab) -> Result {
    let out = guest(lab, &["--irqchip", "xive", "--cmdline", "pci=nomsi"])?;
    contains("/proc/interrupts", &out, "XIVE")?;
    no_messages(&out)
}

fn no_entropy(lab: &Lab) -> Result {
    let out = lab
        .run()
        .args(&["--no-entropy"])
        .exec("echo devices=$(ls /sys/bus/virtio/devices | wc -l)")
        .output()?
        .succeeds()?;
    equal(
        "virtio devices (console)",
        number(&out, "devices")?,
        1 + lab.guests()?.own_devices,
    )
}
