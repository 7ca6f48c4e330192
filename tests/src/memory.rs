//! Guest memory: as much as was asked for, where it was planned, and good for
//! writing.

use std::fs;

use crate::check::{At, Result, contains, ensure, equal, fail, number, skip, value, within};
use crate::lab::{Lab, Restore};
use crate::machines::Difference;
use crate::pvh;
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("memory-64m", 150, smallest).once().lengthy(),
    test("memory-512m", 150, |lab| {
        sees(lab, "512M", 512, 64, "").map(drop)
    })
    .about(Difference::Pages)
    .lengthy(),
    test("memory-3g", 200, |lab| {
        sees(lab, "3G", 3072, 64, "").map(drop)
    })
    .once()
    .common(),
    test("memory-above-4g", 200, above_4g)
        .about(Difference::Pages)
        .lengthy(),
    test("memory-hugepages", 200, hugepages).about(Difference::Pages),
    test("mmu-hpt", 200, |lab| translates(lab, "hpt"))
        .on(|m| m.mmu("hpt").is_some())
        .about(Difference::Nesting),
];

/// A guest that translates as `mmu` says does, on two vCPUs, and uses memory.
fn translates(lab: &Lab, mmu: &str) -> Result {
    let Some(shown) = lab.machine().mmu(mmu) else {
        return fail(format!("{mmu} is not to be tried here"));
    };
    // Quietly: where KVM keeps the page table a machine's every exit is slow.
    let run = lab.run_quietly().args(&["--mmu", mmu, "--cpus", "2"]);
    let script = "set -e
                  echo mmu=$(awk '/^MMU/ { print $3; exit }' /proc/cpuinfo)
                  echo cpus=$(nproc)
                  head -c 8388608 /dev/zero > /tmp/used
                  tool write /tmp/used 0 8388608 53
                  tool check /tmp/used 0 8388608 53
                  echo done";
    let out = run.exec_with_tool(script).output()?.succeeds()?;
    equal("MMU in /proc/cpuinfo", value(&out, "mmu")?, shown)?;
    equal("vCPUs", number(&out, "cpus")?, 2)?;
    contains("the last word", &out, "done")
}

const FOUR_GIB: u64 = 4 << 30;

/// 64 MiB, or the least that the stock kernel goes into. That for x86_64 says so
/// in its header, and crossvisor before anything runs; a smaller guest shows
/// that the machine is there.
fn smallest(lab: &Lab) -> Result {
    if lab.is("x86_64") {
        let out = lab.run().args(&["--memory", "64M"]).exec("true").output()?;
        out.exits(125)?;
        let errors = out.errors();
        contains("stderr", &errors, "does not fit: it needs RAM from 16 to")?;
        contains("stderr", &errors, "use a greater --memory")?;
        let ram: u64 = pvh::ram(lab, "64M")?.iter().map(|(_, size)| size).sum();
        within("KiB of RAM in its map", ram >> 10, 62 << 10, 64 << 10)?;
    }
    let Some(mebibytes) = lab.machine().least_memory() else {
        return fail("no row for its guests in machines.rs");
    };
    let size = format!("{mebibytes}M");
    let script = "grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem
                  head -c 1048576 /dev/zero | wc -c";
    // The kernel as packaged, which takes the least.
    let run = lab.run_kernel(&lab.manifest.kernel);
    let run = run.args(&["--memory", &size]).exec(script);
    let out = run.output()?.succeeds()?;
    let all = mebibytes << 10;
    within("KiB of RAM", ram(&out)? >> 10, all - (2 << 10), all)?;
    within("MemTotal in KiB", number(&out, "MemTotal")?, 16 << 10, all)?;
    contains("what passed through a pipe", &out, "\n1048576\n")
}

/// A guest with `--memory size` and `words` on its command line sees these
/// `mebibytes`, less what the machine and the kernel keep, and can use `used` MiB
/// of them.
fn sees(lab: &Lab, size: &str, mebibytes: u64, used: u64, words: &str) -> Result<String> {
    let host = meminfo("MemAvailable")? >> 10;
    if host < mebibytes {
        return skip(format!(
            "the host has {host} MiB free, {mebibytes} are needed"
        ));
    }
    let script =
        format!("grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem; tool memory {used} 7");
    let run = lab.run().args(&["--memory", size, "--cmdline", words]);
    let out = run.exec_with_tool(&script).output()?.succeeds()?;
    // What firmware tables take, and on x86_64 the hole below 1 MiB.
    let ram = ram(&out)?;
    within(
        "KiB of RAM in /proc/iomem",
        ram >> 10,
        (mebibytes - 2) << 10,
        mebibytes << 10,
    )?;
    // The kernel's own code and data, its bounce buffers (64 MiB where some of
    // the RAM is above 4 GiB), and its record of each page.
    let total = number(&out, "MemTotal")?;
    let kept = 48 + 64 + mebibytes / 32;
    let least = mebibytes.saturating_sub(kept) << 10;
    within("MemTotal in KiB", total, least, mebibytes << 10)?;
    Ok(out)
}

/// More than 4 GiB: some of it is above 4 GiB on every machine. Which of its
/// memory Linux hands out first differs by its page size; here it keeps the last
/// of it for programs, which get that first.
fn above_4g(lab: &Lab) -> Result {
    let out = sees(lab, "4608M", 4608, 64, "movablecore=256M")?;
    let highest = number(&out, "highest")?;
    ensure(highest >= FOUR_GIB, || {
        format!("the highest page of a program is at {highest:#x}")
    })
}

/// Huge pages of the host's are taken while the guest runs, and given back.
fn hugepages(lab: &Lab) -> Result {
    let page = meminfo("Hugepagesize")?;
    if page == 0 {
        return skip("this host's kernel has no huge pages");
    }
    let setting = "/proc/sys/vm/nr_hugepages";
    let before = fs::read_to_string(setting).at(setting)?;
    let _back = Restore::with(|| drop(fs::write(setting, &before)));
    let wanted = (512 << 10) / page;
    // Without any, it says what to do.
    fs::write(setting, "0").at(setting)?;
    let refused = lab.run().args(&["--hugepages"]).exec("true").output()?;
    contains(
        "the refusal",
        &refused.errors(),
        &format!("vm.nr_hugepages={wanted}"),
    )?;
    ensure(refused.code() != Some(0), || {
        "it ran without huge pages".into()
    })?;

    fs::write(setting, wanted.to_string()).at(setting)?;
    equal(
        "huge pages that the host gave",
        meminfo("HugePages_Free")?,
        wanted,
    )?;
    let run = lab.run().args(&["--memory", "512M", "--hugepages"]);
    let mut run = run
        .exec_with_tool("tool memory 64 3; echo ready; read line; echo said $line")
        .start()?;
    run.expect("ready")?;
    let used = wanted - meminfo("HugePages_Free")?;
    within("KiB of huge pages in use", used * page, 64 << 10, 512 << 10)?;
    run.send("done\n")?;
    run.close_input();
    let out = run.finish()?.succeeds()?;
    contains("the guest", &out, "said done")?;
    equal("huge pages given back", meminfo("HugePages_Free")?, wanted)
}

/// The RAM of /proc/iomem, in bytes: lines `from-to : System RAM`, of which
/// only those at the outermost level count.
fn ram(text: &str) -> Result<u64> {
    let mut sum = 0;
    for line in text.lines().filter(|line| line.ends_with(" : System RAM")) {
        let range = line
            .split(" : ")
            .next()
            .and_then(|range| range.split_once('-'));
        let Some((from, to)) = range else {
            return fail(format!("/proc/iomem: `{line}`"));
        };
        let from = u64::from_str_radix(from, 16).at("/proc/iomem")?;
        let to = u64::from_str_radix(to, 16).at("/proc/iomem")?;
        sum += to - from + 1;
    }
    Ok(sum)
}

/// A value of this machine's /proc/meminfo; sizes are in KiB.
fn meminfo(key: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").at("/proc/meminfo")?;
    match text.contains(&format!("{key}:")) {
        true => number(&text, key),
        false => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_of_iomem() {
        let text = "MemTotal: 1 kB\n00001000-0009ffff : System RAM\n\
                    00100000-3fffffff : System RAM\n";
        assert_eq!(ram(text).unwrap(), 0x9f000 + 0x3ff0_0000);
        assert!(ram("x-y : System RAM\n").is_err());
    }
}
