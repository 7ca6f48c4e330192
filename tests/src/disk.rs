//! Disks: what the guest writes the host reads and the other way round, and
//! every request does what it says.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::check::{At, Result, contains, ensure, equal, number, value, within};
use crate::lab::{Lab, text};
use crate::machines::Difference;
use crate::pattern;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("disk-both-ways", 200, both_ways)
        .about(Difference::Pages)
        .lengthy(),
    test("disk-discard-and-write-zeroes", 200, discard)
        .about(Difference::Pages)
        .common(),
    test("disk-several-serial-read-only", 200, several)
        .once()
        .common(),
];

const MIB: usize = 1 << 20;

/// Bits of virtio-blk's features (virtio 1.2, section 5.2.3) and of the queues
/// (section 6).
pub mod feature {
    pub const READ_ONLY: usize = 5;
    pub const FLUSH: usize = 9;
    pub const SEVERAL_QUEUES: usize = 12;
    pub const DISCARD: usize = 13;
    pub const WRITE_ZEROES: usize = 14;
    pub const INDIRECT: usize = 28;
    pub const EVENT_INDEX: usize = 29;
    pub const VERSION_1: usize = 32;
}

/// Makes the guest's shell name the disks `$1`, `$2` and so on as the command line
/// has them: Linux names devices on channels, which it sets online all at once, as
/// they come. Where each is, is in order.
pub const IN_ORDER: &str = "set -- $(for disk in /sys/block/vd*; do
            echo $(readlink -f $disk/device) ${disk##*/}
        done | sort | cut -d ' ' -f 2)
        ";

/// One disk is read, another written: patterns and checksums agree on both
/// sides, over two queues, and a flush reached the device.
fn both_ways(lab: &Lab) -> Result {
    let read = lab.image("read.img", 11, 8 * MIB)?;
    // Not a multiple of a page, as real images are.
    let size = 8 * MIB + 512;
    let written = lab.empty_image("written.img", size as u64)?;
    let sum = |path: &Path| lab.host(&format!("sha256sum < {} | cut -c1-64", text(path)));
    let wanted = sum(&read)?;
    let script = format!(
        "{IN_ORDER}set -e
        a=$1 b=$2
        flushes() {{ awk '{{ print $16 }}' /sys/block/$b/stat; }}
        tool check /dev/$a 0 {len} 11
        echo read=$(sha256sum < /dev/$a | cut -c1-64)
        echo sectors=$(cat /sys/block/$b/size)
        before=$(flushes)
        tool write /dev/$b 0 {size} 12
        echo flushes=$(($(flushes) - before))
        echo 3 > /proc/sys/vm/drop_caches
        tool check /dev/$b 0 {size} 12
        echo written=$(sha256sum < /dev/$b | cut -c1-64)
        echo cache=$(cat /sys/block/$b/queue/write_cache)
        echo queues=$(ls /sys/block/$a/mq | wc -l)
        echo features=$(cat /sys/block/$a/device/features)",
        len = 8 * MIB,
    );
    let out = lab
        .run()
        .args(&["--cpus", "2"])
        .args(&["--disk", &format!("{},queues=2", text(&read))])
        .args(&["--disk", &text(&written)])
        .exec_with_tool(&script)
        .output()?;
    let out = out.succeeds()?;
    equal(
        "checksum in the guest of what the host wrote",
        value(&out, "read")?,
        wanted.trim(),
    )?;
    equal(
        "the disk in sectors",
        number(&out, "sectors")?,
        size as u64 / 512,
    )?;
    let found = fs::read(&written).at(text(&written))?;
    equal("length of the image", found.len(), size)?;
    equal(
        "first wrong byte on the host",
        pattern::difference(12, 0, &found),
        None,
    )?;
    let wanted = sum(&written)?;
    equal(
        "checksum in the guest of what it wrote",
        value(&out, "written")?,
        wanted.trim(),
    )?;
    equal("write cache", value(&out, "cache")?, "write back")?;
    within("flushes for one fsync", number(&out, "flushes")?, 1, 3)?;
    equal("queues", number(&out, "queues")?, 2)?;
    let bits = value(&out, "features")?;
    for (bit, name) in [
        (feature::FLUSH, "flush"),
        (feature::SEVERAL_QUEUES, "several queues"),
        (feature::DISCARD, "discard"),
        (feature::WRITE_ZEROES, "write zeroes"),
        (feature::INDIRECT, "indirect descriptors"),
        (feature::EVENT_INDEX, "event index"),
        (feature::VERSION_1, "virtio 1"),
    ] {
        ensure(is_set(bits, bit), || {
            format!("{name} was not negotiated: {bits}")
        })?;
    }
    ensure(!is_set(bits, feature::READ_ONLY), || {
        "the disk is read-only".into()
    })?;
    // What was only read is as it was.
    let found = fs::read(&read).at(text(&read))?;
    equal(
        "first byte changed of what was read",
        pattern::difference(11, 0, &found),
        None,
    )
}

/// Discarded space goes back to the host; zeroed parts are zero, others as they
/// were.
fn discard(lab: &Lab) -> Result {
    let disk = lab.image("disk.img", 21, 16 * MIB)?;
    let full = blocks(&disk)?;
    let script = format!(
        "set -e
        echo granularity=$(cat /sys/block/vda/queue/discard_granularity)
        echo most=$(cat /sys/block/vda/queue/discard_max_bytes)
        echo zeroes=$(cat /sys/block/vda/queue/write_zeroes_max_bytes)
        blkdiscard -o {mib} -l {four} /dev/vda
        tool zero /dev/vda {at_eight} {mib}
        tool punch /dev/vda {at_ten} {mib}
        tool check /dev/vda 0 {mib} 21",
        mib = MIB,
        four = 4 * MIB,
        at_eight = 8 * MIB,
        at_ten = 10 * MIB,
    );
    let run = lab.run().args(&["--disk", &text(&disk)]);
    let out = run.exec_with_tool(&script).output()?.succeeds()?;
    for key in ["granularity", "most", "zeroes"] {
        ensure(number(&out, key)? > 0, || {
            format!("the guest sees no {key}")
        })?;
    }
    let found = fs::read(&disk).at(text(&disk))?;
    equal("length of the image", found.len(), 16 * MIB)?;
    // Discarded data may be anything, by virtio; crossvisor's files read as
    // zeroes there, as holes do.
    let mut wanted = pattern::bytes(21, 16 * MIB);
    for (from, to) in [(1, 5), (8, 9), (10, 11)] {
        wanted
            .get_mut(from * MIB..to * MIB)
            .unwrap_or_default()
            .fill(0);
    }
    let wrong = found.iter().zip(&wanted).position(|(a, b)| a != b);
    equal("first wrong byte on the host", wrong, None)?;
    // 4 MiB discarded and 1 MiB punched; what was only zeroed may stay
    // allocated.
    let freed = (full - blocks(&disk)?) * 512;
    within(
        "bytes given back to the host",
        freed,
        5 * MIB as u64,
        6 * MIB as u64,
    )
}

/// Five disks, in order, each with its size, content and serial number; one of
/// them can't be written.
fn several(lab: &Lab) -> Result {
    let mut run = lab.run();
    for disk in 0..5u64 {
        let image = lab.image(
            &format!("disk{disk}.img"),
            30 + disk,
            MIB * (disk as usize + 1),
        )?;
        let options = match disk {
            2 => ",readonly,serial=READ ONLY".into(),
            _ => format!(",serial=crossvisor-disk-{disk:04}"),
        };
        run = run.args(&["--disk", &format!("{}{options}", text(&image))]);
    }
    let script = format!(
        "{IN_ORDER}n=0
        for disk in $*; do
            echo serial$n=$(cat /sys/block/$disk/serial)
            echo ro$n=$(cat /sys/block/$disk/ro)
            echo sectors$n=$(cat /sys/block/$disk/size)
            tool check /dev/$disk 0 $(({MIB} * (n + 1))) $((30 + n)) || exit 1
            n=$((n + 1))
        done
        echo disks=$#
        echo third=$3
        echo features=$(cat /sys/block/$3/device/features)
        if tool write /dev/$3 0 4096 99; then echo refused=no; else echo refused=yes; fi
        blockdev --setrw /dev/$3
        if tool write /dev/$3 0 4096 99; then echo forced=no; else echo forced=yes; fi
        tool write /dev/$5 0 4096 98 || exit 2"
    );
    let out = run.exec_with_tool(&script).output()?;
    let printed = out.succeeds()?;
    equal("disks", number(&printed, "disks")?, 5)?;
    for disk in 0..5u64 {
        let (serial, read_only) = match disk {
            2 => ("READ ONLY".to_string(), "1"),
            _ => (format!("crossvisor-disk-{disk:04}"), "0"),
        };
        equal(
            "serial",
            value(&printed, &format!("serial{disk}"))?,
            &serial,
        )?;
        equal(
            "read-only",
            value(&printed, &format!("ro{disk}"))?,
            read_only,
        )?;
        let sectors = number(&printed, &format!("sectors{disk}"))?;
        equal("sectors", sectors, (disk + 1) * 2048)?;
    }
    let bits = value(&printed, "features")?;
    ensure(is_set(bits, feature::READ_ONLY), || {
        "the guest is not told: {bits}".into()
    })?;
    equal(
        "the guest's kernel refuses a write",
        value(&printed, "refused")?,
        "yes",
    )?;
    equal("so does the device", value(&printed, "forced")?, "yes")?;
    let third = format!("/dev/{}", value(&printed, "third")?);
    contains("the reason", &out.errors(), &third)?;
    let found = fs::read(lab.path("disk2.img")).at("disk2.img")?;
    equal(
        "first byte changed of a read-only disk",
        pattern::difference(32, 0, &found),
        None,
    )?;
    let found = fs::read(lab.path("disk4.img")).at("disk4.img")?;
    let start = found.get(..4096).unwrap_or_default();
    equal(
        "first wrong byte of the last disk",
        pattern::difference(98, 0, start),
        None,
    )
}

/// Whether bit `bit` is set in sysfs's `features` of a virtio device: a
/// character for each bit, the lowest first.
pub fn is_set(bits: &str, bit: usize) -> bool {
    bits.as_bytes().get(bit) == Some(&b'1')
}

/// Space that a file takes, in blocks of 512 bytes.
fn blocks(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).at(text(path))?.blocks())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_bits_are_read_from_the_lowest() {
        assert!(is_set("0010", 2));
        assert!(!is_set("0010", 1));
        assert!(!is_set("0010", 4));
    }
}
