//! A whole distribution: Debian on a virtio disk, booted by systemd.

use crossvisor_boot::initramfs::{Builder, ModuleTree};

use crate::check::{At, Result, contains, equal, number, skip, value};
use crate::lab::{Lab, text};
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[test("systemd-to-multi-user", 420, multi_user)
    .once()
    .lengthy()];

/// Mounts the disk as an initramfs does, and hands over to systemd. A unit that
/// is made in /run says, after multi-user.target, how things are, and powers
/// off.
const INIT: &str = r#"#!/bin/sh
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
mount -t tmpfs -o mode=0755 run /run
for module in $(cat /modules); do insmod $module || echo "init: $module failed"; done
for try in $(seq 1000); do [ -b /dev/vda ] && break; sleep 0.1; done
mount -t ext4 /dev/vda /root || exec sh
units=/run/systemd/system
mkdir -p $units/multi-user.target.wants
cat > $units/report.service <<'END'
[Unit]
Description=What the test asks
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh /run/report
END
ln -s ../report.service $units/multi-user.target.wants/
cat > /run/report <<'END'
exec > /dev/console 2>&1
echo
echo "report: target=$(systemctl is-active multi-user.target)"
echo "report: init=$(cat /proc/1/comm)"
echo "report: system=$(. /etc/os-release; echo $ID $VERSION_ID)"
echo "report: root=$(awk '$2 == "/" { print $1, $3 }' /proc/mounts)"
echo "report: cpus=$(nproc)"
echo written by the guest > /var/tmp/marker && sync && echo "report: marker=$(cat /var/tmp/marker)"
systemctl --failed --no-legend --plain | sed 's/^/report: failed-unit /'
echo "report: failed=$(systemctl --failed --no-legend --plain | grep -c .)"
echo "report: end=yes"
systemctl poweroff
END
mount --move /run /root/run
umount /proc /sys
mount --move /dev /root/dev
exec switch_root /root /sbin/init
"#;

fn multi_user(lab: &Lab) -> Result {
    let Some(rootfs) = &lab.manifest.rootfs else {
        return skip("the lab has no Debian root file system");
    };
    let tree = ModuleTree::open(&lab.manifest.modules, None).at("modules")?;
    let names = ["virtio_pci", "virtio_blk", "ext4"];
    let mut builder = Builder::new();
    builder.busybox(&lab.manifest.busybox).at("initrd")?;
    builder.add_bytes("/init", 0o755, INIT).at("initrd")?;
    let mut list = String::new();
    for module in tree.resolve(&names).at("modules")? {
        let path = format!("/{}", module.file_name);
        builder
            .add_bytes(&path, 0o644, module.content)
            .at("initrd")?;
        list += &format!("{path}\n");
    }
    builder.add_bytes("/modules", 0o644, list).at("initrd")?;
    let initrd = builder.build().at("initrd")?.to_vec().at("initrd")?;
    let initrd = lab.file("initrd", &initrd)?;
    let kernel = text(lab.kernel());
    let out = lab
        .crossvisor(&["run", &kernel, "--initrd", &text(&initrd)])
        .args(&["--cpus", "2", "--memory", "1G", "--disk", &text(rootfs)])
        .args(&["--cmdline", "quiet root=/dev/vda rw systemd.show_status=0"])
        // Its own limits are made for machines that are not emulated twice.
        .args(&["--cmdline", "systemd.default_timeout_start_sec=1000"])
        .args(&["--cmdline", "systemd.default_device_timeout_sec=1000"])
        .limit(400)
        .output()?;
    let out = out.succeeds()?;
    let report: String = out
        .lines()
        .filter_map(|line| line.split_once("report: "))
        .map(|(_, said)| format!("{said}\n"))
        .collect();
    equal("end of the report", value(&report, "end")?, "yes")?;
    equal("multi-user.target", value(&report, "target")?, "active")?;
    equal("process 1", value(&report, "init")?, "systemd")?;
    contains("the system", value(&report, "system")?, "debian 13")?;
    equal(
        "the root file system",
        value(&report, "root")?,
        "/dev/vda ext4",
    )?;
    equal("CPUs", number(&report, "cpus")?, 2)?;
    equal(
        "a file on the disk",
        value(&report, "marker")?,
        "written by the guest",
    )?;
    equal("units that failed", number(&report, "failed")?, 0)
}
