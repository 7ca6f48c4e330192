//! A guest starts: from each kernel format, with the built-in initramfs or the
//! user's own initrd.

use std::time::{SystemTime, UNIX_EPOCH};

use crossvisor_boot::initramfs::Builder;

use crate::check::{At, Result, contains, equal, fail, value, within};
use crate::lab::{Lab, text};
use crate::machines::Difference;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("boot-bzimage", 150, |lab| boots(lab, "bzimage"))
        .on(|m| m.boots("bzimage"))
        .once(),
    test("boot-elf", 150, |lab| boots(lab, "elf"))
        .on(|m| m.boots("elf"))
        .once(),
    test("boot-image", 150, |lab| boots(lab, "image"))
        .on(|m| m.boots("image"))
        .once(),
    test("boot-gzip", 150, |lab| boots(lab, "gzip"))
        .on(|m| m.boots("gzip"))
        .once(),
    test("boot-zboot", 150, |lab| boots(lab, "zboot"))
        .on(|m| m.boots("zboot"))
        .once(),
    test("boot-vmlinux", 150, |lab| boots(lab, "vmlinux"))
        .on(|m| m.boots("vmlinux"))
        .once(),
    test("boot-vmlinux-gzip", 150, |lab| boots(lab, "vmlinux-gzip"))
        .on(|m| m.boots("vmlinux-gzip"))
        .once(),
    test("boot-host-kernel", 150, host_kernel)
        .about(Difference::Pages)
        .lengthy(),
    test("boot-own-initrd", 150, own_initrd).once().common(),
];

/// The stock kernel in one of its formats boots and is what it should be.
fn boots(lab: &Lab, format: &str) -> Result {
    let Some(kernel) = lab.manifest.kernel_formats.get(format) else {
        return fail(format!("the lab gave no kernel of format {format}"));
    };
    let out = lab
        .run_kernel(kernel)
        .args(&[
            "--name",
            "boot-test",
            "--cmdline",
            "first.word=1 last.word=2",
        ])
        .exec(
            "echo release=$(uname -r); echo machine=$(uname -m); echo host=$(hostname)
             echo seconds=$(date +%s); echo cmdline=$(cat /proc/cmdline); echo pid=$$",
        )
        .output()?;
    let out = out.succeeds()?;
    let release = lab.manifest.modules.file_name().unwrap_or_default();
    equal(
        "uname -r",
        value(&out, "release")?,
        &release.to_string_lossy(),
    )?;
    equal("uname -m", value(&out, "machine")?, &lab.manifest.arch)?;
    equal("hostname", value(&out, "host")?, "boot-test")?;
    // The user's words come last, after the defaults.
    let cmdline = value(&out, "cmdline")?;
    contains("/proc/cmdline", cmdline, " first.word=1 last.word=2")?;
    let console = format!("console={}", lab.guests()?.console);
    contains("/proc/cmdline", cmdline, &console)?;
    let seconds: u64 = value(&out, "seconds")?.parse().at("date +%s")?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .at("the clock")?;
    within(
        "the guest's clock",
        seconds,
        now.as_secs() - 30,
        now.as_secs() + 2,
    )
}

/// Without any argument that names one, the guest runs the host's kernel.
fn host_kernel(lab: &Lab) -> Result {
    let out = lab
        .crossvisor(&["run", "--exec", "uname -r; cat /proc/modules | wc -l"])
        .output()?;
    let out = out.succeeds()?;
    let mut lines = out.lines();
    let release = lab.host("uname -r")?;
    equal("the guest's kernel", lines.next(), release.lines().next())
}

/// An initrd of the user's, and a command line that is all the user's.
fn own_initrd(lab: &Lab) -> Result {
    let console = format!("console={}", lab.guests()?.console);
    let cmdline = format!("{console} quiet panic=-1 own.word=3");
    let script = "#!/bin/sh\nmount -t proc proc /proc\necho init is $$\n\
                  echo cmdline=$(cat /proc/cmdline)\npoweroff -f\n";
    let mut builder = Builder::new();
    builder.busybox(&lab.manifest.busybox).at("initrd")?;
    builder.add_bytes("/init", 0o755, script).at("initrd")?;
    let initrd = builder.build().at("initrd")?.to_vec().at("initrd")?;
    let initrd = lab.file("initrd", &initrd)?;
    let kernel = text(lab.kernel());
    let out = lab
        .crossvisor(&["run", &kernel, "--initrd", &text(&initrd)])
        .args(&["--no-default-cmdline", "--cmdline", &cmdline])
        .output()?;
    let out = out.succeeds()?;
    contains("console", &out, "init is 1\n")?;
    equal("/proc/cmdline", value(&out, "cmdline")?, &cmdline)
}
