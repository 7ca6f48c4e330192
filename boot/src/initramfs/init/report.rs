//! A short report on the guest, for when there is no shell to look around with.

use std::fmt::Write;
use std::path::Path;

/// The report, several lines.
pub(super) fn report() -> String {
    report_from(Path::new("/"))
}

fn report_from(root: &Path) -> String {
    let uname = rustix::system::uname();
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let mut text = String::new();
    // Writing to a String can't fail.
    let _ = writeln!(
        text,
        "kernel:   {} {} {}",
        uname.sysname().to_string_lossy(),
        uname.release().to_string_lossy(),
        uname.machine().to_string_lossy()
    );
    let cpus = read("sys/devices/system/cpu/online");
    let _ = writeln!(
        text,
        "CPUs:     {} online ({})",
        count_cpus(&cpus),
        cpus.trim()
    );
    let memory = read("proc/meminfo");
    let total = memory.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib: u64 = total
        .and_then(|t| t.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    let _ = writeln!(text, "memory:   {} MiB", kib / 1024);
    let _ = writeln!(text, "clock:    {}", read(CLOCK).trim());
    for (title, class) in [
        ("disks:   ", "sys/class/block"),
        ("network: ", "sys/class/net"),
        ("virtio:  ", "sys/bus/virtio/devices"),
        ("PCI:     ", "sys/bus/pci/devices"),
    ] {
        let names = names_in(&root.join(class));
        if !names.is_empty() {
            let _ = writeln!(text, "{title} {}", names.join(" "));
        }
    }
    text
}

const CLOCK: &str = "sys/devices/system/clocksource/clocksource0/current_clocksource";

/// Names in a folder of sysfs, sorted; with the driver where one is bound.
fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let driver = std::fs::read_link(entry.path().join("driver")).ok();
            match driver.as_deref().and_then(Path::file_name) {
                Some(driver) => format!("{name}({})", driver.to_string_lossy()),
                None => name,
            }
        })
        .collect();
    names.sort();
    names
}

/// How many CPUs a list such as `0-3,5` names (cpulists of sysfs).
fn count_cpus(list: &str) -> u64 {
    list.trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(count_cpus("0\n"), 1);
        assert_eq!(count_cpus("0-3"), 4);
        assert_eq!(count_cpus("0-1,4,6-7\n"), 5);
        assert_eq!(count_cpus(""), 0);
        assert_eq!(count_cpus("3-1,x"), 0);
    }

    #[test]
    fn the_report_shows_what_sysfs_and_proc_say() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("sys/devices/system/cpu/online", "0-3\n");
        put(
            "proc/meminfo",
            "MemTotal:        2097152 kB\nMemFree: 1 kB\n",
        );
        put("sys/class/block/vda/size", "8\n");
        let virtio = root.path().join("sys/bus/virtio/devices/virtio0");
        std::fs::create_dir_all(&virtio).unwrap();
        std::os::unix::fs::symlink("../drivers/virtio_blk", virtio.join("driver")).unwrap();
        let text = report_from(root.path());
        assert!(text.contains("4 online (0-3)"), "{text}");
        assert!(text.contains("2048 MiB"), "{text}");
        assert!(text.contains("vda"), "{text}");
        assert!(text.contains("virtio0(virtio_blk)"), "{text}");
        assert!(!text.contains("PCI"), "{text}");
    }
}
