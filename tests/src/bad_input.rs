//! What cannot work is refused: one line that names it and says what would
//! work, a non-zero exit status, and nothing changed.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use crate::check::{At, Result, contains, ensure, equal, fail};
use crate::crossvisor::Crossvisor;
use crate::disk::IN_ORDER;
use crate::lab::{Lab, Restore, text};
use crate::net::UserTap;
use crate::pattern;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("refused-kernels", 60, kernels).once(),
    test("refused-initrds", 60, initrds).once(),
    test("refused-cpus-and-memory", 60, cpus_and_memory),
    test("refused-option-values", 60, option_values).once(),
    test("refused-irqchip", 60, irqchip).on(|m| m.other_irqchip().is_some()),
    test("refused-disks", 60, disks).once(),
    test("refused-disk-of-another-vm", 200, locked_disk)
        .once()
        .common(),
    test("refused-taps", 60, taps).once(),
    test("refused-without-kvm", 60, without_kvm).once(),
    test("refused-without-permission", 60, without_permission).once(),
];

const KVM: &str = "/dev/kvm";

/// Runs `command` with a good disk beside what is wrong: it must exit non-zero
/// with one line that has all of `words` in it, and leave the disk alone.
fn refuses(lab: &Lab, command: Crossvisor<'_>, words: &[&str]) -> Result {
    let disk = lab.image("good.img", 61, 1 << 20)?;
    let before = fs::metadata(&disk).at("good.img")?;
    let out = command.args(&["--disk", &text(&disk)]).limit(30).output()?;
    one_line(&out, words)?;
    let after = fs::metadata(&disk).at("good.img")?;
    equal("the good disk's length", after.len(), before.len())?;
    let (then, now) = (before.mtime_nsec(), after.mtime_nsec());
    equal(
        "the good disk's time of change",
        (after.mtime(), now),
        (before.mtime(), then),
    )?;
    let found = fs::read(&disk).at("good.img")?;
    equal(
        "first byte changed of the good disk",
        pattern::difference(61, 0, &found),
        None,
    )
}

/// A refusal says one line, which has all of `words` in it, and nothing else.
fn one_line(out: &crate::crossvisor::Output, words: &[&str]) -> Result {
    match out.code() {
        Some(0) => return fail(format!("exit status 0, not a refusal with {words:?}")),
        None => return fail(format!("death by a signal, not a refusal with {words:?}")),
        Some(_) => {}
    }
    let errors = out.errors();
    equal("stdout of a refusal", out.out(), String::new())?;
    ensure(
        errors.lines().count() == 1 && errors.ends_with('\n'),
        || format!("not one line, but `{}`", errors.trim_end()),
    )?;
    for word in words {
        contains("the refusal", &errors, word)?;
    }
    Ok(())
}

fn kernels(lab: &Lab) -> Result {
    let run = |kernel: &str| lab.crossvisor(&["run", kernel]);
    refuses(
        lab,
        run("/absent/vmlinuz"),
        &["/absent/vmlinuz", "No such file"],
    )?;
    refuses(lab, run("/tmp"), &["/tmp", "directory"])?;

    let empty = text(&lab.file("empty", b"")?);
    refuses(lab, run(&empty), &[&empty, "empty"])?;
    let noise = text(&lab.image("noise", 62, 1 << 20)?);
    refuses(
        lab,
        run(&noise),
        &[&noise, "not a kernel in a known format"],
    )?;

    // Of another architecture, in that one's own format and as ELF.
    let (other, name, elf) = match lab.is("x86_64") {
        true => (arm64_image(), "aarch64", elf_for(183)),
        false => (bzimage(), "x86", elf_for(62)),
    };
    let other = text(&lab.file("other", &other)?);
    refuses(lab, run(&other), &[&other, name, &lab.manifest.arch])?;
    let elf = text(&lab.file("other.elf", &elf)?);
    refuses(lab, run(&elf), &[&elf, &lab.manifest.arch])?;

    // Cut off: each format, in the middle and near the end.
    for (format, kernel) in &lab.manifest.kernel_formats {
        let whole = fs::metadata(kernel).at(text(kernel))?.len();
        // What follows an ELF file's segments is for debuggers.
        let most = match format.as_str() {
            "elf" | "vmlinux" => whole / 4 * 3,
            _ => whole - 4096,
        };
        for len in [whole / 2, most] {
            let cut = cut(lab, &format!("cut-{format}"), &text(kernel), len)?;
            refuses(lab, run(&cut), &[&cut, "truncated"])?;
        }
    }
    Ok(())
}

/// The first `len` bytes of `path` as a file of its own.
fn cut(lab: &Lab, name: &str, path: &str, len: u64) -> Result<String> {
    let mut bytes = vec![0; usize::try_from(len).at("length")?];
    let whole = File::open(path).at(path)?;
    whole.read_exact_at(&mut bytes, 0).at(path)?;
    Ok(text(&lab.file(name, &bytes)?))
}

fn initrds(lab: &Lab) -> Result {
    let kernel = text(&lab.manifest.kernel);
    let run = |arguments: &[&str]| lab.crossvisor(&["run", &kernel]).args(arguments);
    let absent = ["--initrd", "/absent/initrd"];
    refuses(lab, run(&absent), &["/absent/initrd", "No such file"])?;
    let large = text(&lab.empty_image("large", 200 << 20)?);
    let large_run = run(&["--initrd", &large, "--memory", "128M"]);
    refuses(lab, large_run, &["initrd", "--memory"])?;
    let absent = ["--modules", "/absent/modules"];
    refuses(lab, run(&absent), &["--modules", "/absent/modules"])?;
    let absent = ["--initramfs-add", "/absent/file"];
    refuses(
        lab,
        lab.run().args(&absent),
        &["--initramfs-add", "/absent/file"],
    )?;
    let both = ["--initrd", &large, "--exec", "true"];
    refuses(lab, run(&both), &["--initrd", "--exec"])
}

fn cpus_and_memory(lab: &Lab) -> Result {
    let run = |arguments: &[&str]| lab.run().args(arguments);
    refuses(lab, run(&["--cpus", "100000"]), &["--cpus", "100000"])?;
    refuses(lab, run(&["--cpus", "0"]), &["--cpus", "0"])?;
    refuses(lab, run(&["--cpus", "many"]), &["--cpus", "many"])?;
    refuses(lab, run(&["--memory", "4095G"]), &["--memory", "this host"])?;
    refuses(lab, run(&["--memory", "1M"]), &["--memory"])?;
    for wrong in ["0", "12Q", "-1G", "1.5G"] {
        let argument = format!("--memory={wrong}");
        refuses(lab, run(&[&argument]), &["--memory", wrong, "2G"])?;
    }
    Ok(())
}

fn option_values(lab: &Lab) -> Result {
    let run = |arguments: &[&str]| lab.run().args(arguments);
    refuses(
        lab,
        run(&["--transport", "isa"]),
        &["--transport", "isa", "pci", "mmio"],
    )?;
    let guests = lab.guests()?;
    for other in ["pci", "mmio", "ccw"] {
        if !guests.transports.contains(&other) {
            let has = [&["--transport", other], guests.transports].concat();
            refuses(lab, run(&["--transport", other]), &has)?;
        }
    }
    for transport in guests.transports.iter().filter(|name| **name != "ccw") {
        let run = run(&["--virtio-legacy", "--transport", transport]);
        refuses(lab, run, &["--virtio-legacy", transport, "ccw"])?;
    }
    let (mmu, why) = lab.machine().other_mmu();
    refuses(lab, run(&["--mmu", mmu]), &["--mmu", mmu, why])?;
    refuses(
        lab,
        run(&["--console", "vga"]),
        &["--console", "vga", "serial", "virtio"],
    )?;
    refuses(lab, run(&["--irqchip", "i8259"]), &["--irqchip", "i8259"])?;
    refuses(lab, run(&["--nonsense"]), &["--nonsense"])?;
    let long = "x".repeat(10_000);
    refuses(lab, run(&["--cmdline", &long]), &["--cmdline"])
}

/// What the machine's own controller rules out.
fn irqchip(lab: &Lab) -> Result {
    let Some((other, has)) = lab.machine().other_irqchip() else {
        return fail("this machine rules none out");
    };
    let run = lab.run().args(&["--irqchip", other]);
    refuses(lab, run, &["--irqchip", other, has])
}

fn disks(lab: &Lab) -> Result {
    let run = |disk: &str| lab.run().args(&["--disk", disk]);
    refuses(
        lab,
        run("/absent/disk.img"),
        &["/absent/disk.img", "No such file"],
    )?;
    refuses(lab, run("/tmp"), &["/tmp"])?;
    refuses(lab, run("/dev/null"), &["/dev/null"])?;
    let empty = text(&lab.file("empty.img", b"")?);
    refuses(lab, run(&empty), &[&empty, "empty"])?;
    let good = text(&lab.image("other.img", 63, 4096)?);
    let wrong = [
        ("format=qcow2", "format"),
        ("queues=0", "queues=0"),
        ("serial=longer-than-20-characters", "serial"),
    ];
    for (option, word) in wrong {
        refuses(lab, run(&format!("{good},{option}")), &["--disk", word])?;
    }
    // Twice for one VM is two writers, too.
    let twice = run(&good).args(&["--disk", &good]);
    refuses(lab, twice, &[&good])?;
    // A disk that may only be read is not to be had for writing.
    fs::set_permissions(&good, Permissions::from_mode(0o444)).at(&good)?;
    let _kvm = Restore::with(chmod(KVM, 0o666)?);
    fs::set_permissions(lab.path(""), Permissions::from_mode(0o755)).at("folder")?;
    let out = run(&good).uid(12345).limit(30).output()?;
    one_line(&out, &[&good, "ermission denied"])
}

/// While a VM has a disk, no other gets it for writing, nor for reading; two
/// VMs may read the same one.
fn locked_disk(lab: &Lab) -> Result {
    let disk = text(&lab.image("disk.img", 64, 1 << 20)?);
    let shared = text(&lab.image("shared.img", 65, 1 << 20)?);
    let read_only = format!("{shared},readonly");
    let script = format!(
        "{IN_ORDER}tool check /dev/$1 0 1048576 64; echo ready; read line
        tool write /dev/$1 0 4096 66"
    );
    let mut first = lab
        .run()
        .args(&["--disk", &disk, "--disk", &read_only])
        .exec_with_tool(&script)
        .start()?;
    first.expect("ready\n")?;
    let second = |disk: &str| lab.run().args(&["--disk", disk]);
    refuses(lab, second(&disk), &[&disk, "another virtual machine"])?;
    refuses(
        lab,
        second(&format!("{disk},readonly")),
        &[&disk, "another virtual machine"],
    )?;
    refuses(lab, second(&shared), &[&shared, "another virtual machine"])?;
    let both = lab.run().args(&["--disk", &read_only]);
    let out = both
        .exec_with_tool("tool check /dev/vda 0 1048576 65")
        .output()?;
    out.succeeds()?;
    // The first has not noticed.
    first.send("go\n")?;
    first.finish()?.succeeds()?;
    let found = fs::read(&disk).at(&disk)?;
    let start = found.get(..4096).unwrap_or_default();
    equal(
        "first wrong byte that the first VM wrote",
        pattern::difference(66, 0, start),
        None,
    )
}

fn taps(lab: &Lab) -> Result {
    let run = |net: &str| lab.run().args(&["--net", net]);
    refuses(lab, run("tap=lo"), &["tap lo"])?;
    refuses(lab, run("tap=a-name-that-is-too-long"), &["--net", "tap"])?;
    refuses(lab, run("mac=52:54:00:00:00:01"), &["--net", "tap"])?;
    refuses(
        lab,
        run("tap=cvtest2,mac=01:00:5e:00:00:01"),
        &["--net", "01:00:5e:00:00:01"],
    )?;
    refuses(lab, run("tap=cvtest2,speed=9"), &["--net", "speed"])?;
    // One queue, and the VM wants two.
    let _tap = UserTap::make(lab, "cvtest2", "10.9.3.1/24", false)?;
    refuses(lab, run("tap=cvtest2,queues=2"), &["tap cvtest2", "queue"])?;
    // Somebody else's.
    let _kvm = Restore::with(chmod(KVM, 0o666)?);
    let out = run("tap=cvtest2").uid(12345).limit(30).output()?;
    one_line(&out, &["cvtest2"])?;
    let out = run("tap=cvtest3").uid(12345).limit(30).output()?;
    one_line(&out, &["cvtest3"])
}

fn without_kvm(lab: &Lab) -> Result {
    let hidden = format!("{KVM}.hidden");
    fs::rename(KVM, &hidden).at(KVM)?;
    let _back = Restore::with(|| drop(fs::rename(&hidden, KVM)));
    refuses(lab, lab.run(), &[KVM, "no KVM", "cargo lab run"])?;
    refuses(lab, lab.run().exec("true"), &[KVM, "no KVM"])?;
    let doctor = lab.crossvisor(&["doctor"]).output()?;
    one_line(&doctor, &[KVM, "no KVM"])?;
    let doctor = lab.crossvisor(&["doctor", "--json"]).output()?;
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).at("doctor --json")?;
    equal(
        "runs_stock_kernels",
        report["runs_stock_kernels"].as_bool(),
        Some(false),
    )?;
    ensure(doctor.code() != Some(0), || {
        "doctor finds all well without KVM".into()
    })?;
    // A plan needs none.
    let plan = lab.crossvisor(&["plan"]).output()?.succeeds()?;
    contains("the plan", &plan, &format!("{} machine", lab.manifest.arch))
}

fn without_permission(lab: &Lab) -> Result {
    let _back = Restore::with(chmod(KVM, 0o600)?);
    let out = lab.run().uid(12345).limit(30).output()?;
    one_line(&out, &[KVM, "permission", "kvm"])
}

/// Gives `path` these permissions; what is returned puts back those it had.
fn chmod(path: &'static str, mode: u32) -> Result<impl FnMut()> {
    let before = fs::metadata(path).at(path)?.permissions();
    fs::set_permissions(path, Permissions::from_mode(mode)).at(path)?;
    Ok(move || drop(fs::set_permissions(path, before.clone())))
}

/// The least that is an arm64 `Image` of 64 KiB
/// (Documentation/arch/arm64/booting.rst).
fn arm64_image() -> Vec<u8> {
    let mut image = vec![0; 64 << 10];
    put(&mut image, 16, &0x10000u64.to_le_bytes());
    put(&mut image, 24, &0xau64.to_le_bytes());
    put(&mut image, 56, b"ARM\x64");
    image
}

/// The least that is a 64-bit bzImage (Documentation/arch/x86/boot.rst): one
/// sector of setup code, 4 KiB of kernel.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &(4096u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1, 21, 3, 0]);
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    image
}

/// A static ELF program of one segment for the machine `e_machine`.
fn elf_for(machine: u16) -> Vec<u8> {
    let mut elf = vec![0; 8192];
    put(&mut elf, 0, b"\x7fELF\x02\x01\x01");
    put(&mut elf, 16, &2u16.to_le_bytes());
    put(&mut elf, 18, &machine.to_le_bytes());
    put(&mut elf, 20, &1u32.to_le_bytes());
    put(&mut elf, 24, &0x100_0000u64.to_le_bytes());
    put(&mut elf, 32, &64u64.to_le_bytes());
    put(&mut elf, 52, &64u16.to_le_bytes());
    put(&mut elf, 54, &56u16.to_le_bytes());
    put(&mut elf, 56, &1u16.to_le_bytes());
    // PT_LOAD, readable and executable: 4 KiB at file offset 4096.
    put(&mut elf, 64, &1u32.to_le_bytes());
    put(&mut elf, 68, &5u32.to_le_bytes());
    put(&mut elf, 72, &4096u64.to_le_bytes());
    for (offset, value) in [
        (80, 0x100_0000u64),
        (88, 0x100_0000),
        (96, 4096),
        (104, 4096),
        (112, 4096),
    ] {
        put(&mut elf, offset, &value.to_le_bytes());
    }
    elf
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(offset..offset + value.len()) {
        place.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossvisor_boot::KernelImage;

    #[test]
    fn the_kernels_of_other_architectures_are_kernels() {
        for (name, bytes, wanted) in [
            ("image", arm64_image(), "aarch64"),
            ("bzimage", bzimage(), "x86_64"),
            ("elf", elf_for(183), "aarch64"),
            ("elf", elf_for(62), "x86_64"),
        ] {
            let image = KernelImage::from_bytes(name, bytes).unwrap();
            assert_eq!(image.machine().to_string(), wanted, "{name}");
        }
    }
}
