//! What only pseries machines have: guests of the other byte order, a clock that
//! firmware sets, much that Linux warns of where it is not as firmware has it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;

use crate::check::{At, Result, contains, ensure, equal, fail, value};
use crate::lab::{Lab, text};
use crate::runner::{Test, test};

/// The tests of this theme.
pub const TESTS: &[Test] = &[
    test("big-endian-guest", 60, big_endian)
        .on(|m| m.arch() == "ppc64le")
        .once(),
    test("clock-set", 150, clock_set)
        .on(|m| m.arch() == "ppc64le")
        .once(),
    test("kernel-log", 150, kernel_log)
        .on(|m| m.arch() == "ppc64le")
        .once(),
    test("xics-takes-few-processors", 150, few_processors).on(|m| m.irqchip("xive").is_some()),
    test("sigterm-while-booting", 150, sigterm_early).on(|m| m.irqchip("xive").is_some()),
];

/// A guest of a few instructions that never leaves the byte order in which a
/// partition begins. It says that it was entered with a device tree in r3, none
/// of Open Firmware in r5, and in big-endian mode; the year, by RTAS; that the
/// first PCI device is virtio's, by RTAS; and powers off.
fn big_endian(lab: &Lab) -> Result {
    let folder = text(&lab.path("plan"));
    lab.crossvisor(&["plan", "--dump", &folder])
        .output()?
        .succeeds()?;
    let path = lab.path("plan").join("machine.dtb");
    let tree = std::fs::read(&path).at(text(&path))?;
    let token = |name| number_in(&tree, name);
    let kernel = [
        token("get-time-of-day"),
        token("ibm,read-pci-config"),
        token("power-off"),
    ];
    let [Some(clock), Some(pci), Some(off)] = kernel else {
        return fail(format!("the tree has not all of {kernel:?}"));
    };
    let kernel = lab.file("big-endian", &elf(&image(clock, pci, off)))?;
    let out = lab
        .crossvisor(&["run", &text(&kernel), "--memory", "128M"])
        .output()?
        .succeeds()?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .at("the clock")?;
    // A year has 365.2425 days; at its very turn either will do.
    let year = 1970 + now.as_secs() / 31_556_952;
    for said in ["it is entered  ", "it finds virtio"] {
        contains("what it said", &out, said)?;
    }
    let years = [year - 1, year, year + 1].map(|year| format!("{year} by its RTAS"));
    ensure(years.iter().any(|said| out.contains(said)), || {
        format!("no year near {year} in what it said:\n{out}")
    })
}

/// The first property `name` of four bytes in a flattened device tree.
fn number_in(tree: &[u8], name: &str) -> Option<u32> {
    let word = |at: usize| {
        let bytes = tree.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_be_bytes(*bytes))
    };
    // The structure's and the strings' offsets (Devicetree Specification 0.4,
    // section 5.2).
    let (structure, strings) = (word(8)? as usize, word(12)? as usize);
    let mut names = tree.get(strings..)?.split(|byte| *byte == 0);
    let mut offset = 0;
    loop {
        let string = names.next()?;
        if string == name.as_bytes() {
            break;
        }
        offset += string.len() as u32 + 1;
    }
    // FDT_PROP, its length, its name.
    let places = (structure..strings).step_by(4);
    let mut found = places
        .filter(|at| [word(*at), word(at + 4), word(at + 8)] == [Some(3), Some(4), Some(offset)]);
    word(found.next()? + 12)
}

/// How the calls of RTAS begin: the token, how many arguments, how many results.
type Call = Vec<u32>;

/// The guest's memory from 0: instructions, what it says, its RTAS calls. Where
/// RTAS is entered follows from where the guest ends: on the next page of 64 KiB.
fn image(clock: u32, pci: u32, off: u32) -> Vec<u8> {
    // The host bridge's unit identifier, and slot 1.
    let pci: Call = vec![pci, 4, 2, 1 << 11, 0x8000_0002, 0, 4];
    let parts: [(usize, Vec<u8>); 8] = [
        (0, bytes(&CODE)),
        (0x200, b"it is entered  \n".into()),
        (0x210, b"     by its RTAS".into()),
        (0x220, b"it finds virtio\n".into()),
        (0x230, b"something wrong\n".into()),
        (0x240, bytes(&[clock, 0, 8])),
        (0x280, bytes(&pci)),
        (0x2c0, bytes(&[off, 2, 1, u32::MAX, u32::MAX])),
    ];
    let mut image = vec![0; 0x300];
    for (at, part) in parts {
        image[at..at + part.len()].copy_from_slice(&part);
    }
    image
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Its instructions (Power ISA 3.0), as an assembler makes them.
const CODE: [u32; 61] = [
    // Entered as it should be?
    0x2825_0000, // cmpldi r5,0
    0x4082_00b0, // bne wrong
    0x8083_0000, // lwz r4,0(r3)
    0x3ca0_d00d, // lis r5,0xd00d
    0x60a5_feed, // ori r5,r5,0xfeed
    0x7c04_2840, // cmplw r4,r5
    0x4082_009c, // bne wrong
    0x7c80_00a6, // mfmsr r4
    0x7084_0001, // andi. r4,r4,1: LE
    0x4082_0090, // bne wrong
    0x3be0_0200, // li r31,0x200
    0x4800_0095, // bl say
    // get-time-of-day: the year in decimal digits, from the last one.
    0x3860_0240, // li r3,0x240
    0x4800_00a9, // bl rtas
    0x8080_024c, // lwz r4,0x24c(0): status
    0x2804_0000, // cmplwi r4,0
    0x4082_0074, // bne wrong
    0x8080_0250, // lwz r4,0x250(0)
    0x38c0_000a, // li r6,10
    0x38e0_0214, // li r7,0x214
    0x3900_0004, // li r8,4
    0x7d09_03a6, // mtctr r8
    0x7d04_3396, // digit: divwu r8,r4,r6
    0x7d28_31d6, // mullw r9,r8,r6
    0x7d29_2050, // subf r9,r9,r4
    0x3929_0030, // addi r9,r9,'0'
    0x9d27_ffff, // stbu r9,-1(r7)
    0x7d04_4378, // mr r4,r8
    0x4200_ffe8, // bdnz digit
    0x3be0_0210, // li r31,0x210
    0x4800_0049, // bl say
    // ibm,read-pci-config: the vendor in the lower half of the first word.
    0x3860_0280, // li r3,0x280
    0x4800_005d, // bl rtas
    0x8080_029c, // lwz r4,0x29c(0): status
    0x2804_0000, // cmplwi r4,0
    0x4082_0028, // bne wrong
    0x8080_02a0, // lwz r4,0x2a0(0)
    0x5484_043e, // clrlwi r4,r4,16
    0x2804_1af4, // cmplwi r4,0x1af4
    0x4082_0018, // bne wrong
    0x3be0_0220, // li r31,0x220
    0x4800_001d, // bl say
    0x3860_02c0, // off: li r3,0x2c0
    0x4800_0031, // bl rtas
    0x4800_0000, // b .
    0x3be0_0230, // wrong: li r31,0x230
    0x4800_0009, // bl say
    0x4bff_ffec, // b off
    // 16 characters from r31 on, by H_PUT_TERM_CHAR.
    0x3860_0058, // say: li r3,0x58
    0x3880_0000, // li r4,0
    0x38a0_0010, // li r5,16
    0xe8df_0000, // ld r6,0(r31)
    0xe8ff_0008, // ld r7,8(r31)
    0x4400_0022, // sc 1
    0x4e80_0020, // blr
    // The call of RTAS that r3 points to.
    0x7fc8_02a6, // rtas: mflr r30
    0x3c80_0001, // lis r4,1
    0x7c89_03a6, // mtctr r4
    0x4e80_0421, // bctrl
    0x7fc8_03a6, // mtlr r30
    0x4e80_0020, // blr
];

/// A big-endian ELF of one segment, `image` at 0, where it is entered.
fn elf(image: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    // 64-bit, big-endian, an executable for 64-bit PowerPC.
    let mut file = b"\x7fELF\x02\x02\x01\0\0\0\0\0\0\0\0\0\0\x02\0\x15\0\0\0\x01".to_vec();
    let doublewords = |file: &mut Vec<u8>, words: &[u64]| {
        file.extend(words.iter().flat_map(|word| word.to_be_bytes()));
    };
    // Entry; program headers; no section headers.
    doublewords(&mut file, &[0, HEADER, 0]);
    file.extend(bytes(&[0]));
    let halves = [HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0];
    file.extend(halves.iter().flat_map(|half| half.to_be_bytes()));
    // PT_LOAD, readable, writable, executable.
    file.extend(bytes(&[1, 7]));
    let size = image.len() as u64;
    doublewords(&mut file, &[HEADER + PROGRAM_HEADER, 0, 0, size, size, 4]);
    file.extend(image);
    file
}

/// Time that Linux writes to the clock is there when it reads it.
fn clock_set(lab: &Lab) -> Result {
    let script = "set -e
        date -u -s '2031-02-03 04:05:06' > /dev/null
        hwclock -w -u
        date -u -s '2001-01-01 00:00:00' > /dev/null
        hwclock -s -u
        echo now=$(date -u '+%Y-%m-%d')";
    let out = lab.run_quietly().exec(script).output()?.succeeds()?;
    equal("the date that was set", value(&out, "now")?, "2031-02-03")
}

/// SIGTERM powers a guest off that does not listen to its power button yet: of a XIVE
/// the source drops what comes then.
fn sigterm_early(lab: &Lab) -> Result {
    let mut run = lab.run().start()?;
    run.expect("Linux version")?;
    run.signal(Signal::TERM)?;
    run.finish()?.succeeds()?;
    Ok(())
}

/// The virtual processors that KVM's XICS takes of the machine's XIVE are as many as
/// the guest has, not the 2048 of the largest: those of two guests are close by.
fn few_processors(lab: &Lab) -> Result {
    lab.host("mount -t debugfs none /sys/kernel/debug 2> /dev/null; cd /sys/kernel/debug/kvm")?;
    let start = || lab.run().args(&["--irqchip", "xics"]).start();
    let _guests = [start()?, start()?];
    let deadline = Instant::now() + Duration::from_secs(60);
    let processors = loop {
        let shown = lab.host("cat /sys/kernel/debug/kvm/*/xive 2> /dev/null; true")?;
        let found = processors(&shown);
        if found.len() >= 2 || Instant::now() > deadline {
            break found;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let [first, second] = processors[..] else {
        return fail(format!("two guests have the processors {processors:x?}"));
    };
    ensure(first.abs_diff(second) < 2048, || {
        format!("the guests' processors are {first:#x} and {second:#x}")
    })
}

/// The numbers in `VCPU 0: VP:0x400/00`, as KVM's debugfs has it.
fn processors(text: &str) -> Vec<u64> {
    let numbers = text.lines().filter_map(|line| {
        let (_, number) = line.split_once("VP:0x")?;
        let (number, _) = number.split_once('/')?;
        u64::from_str_radix(number, 16).ok()
    });
    numbers.collect()
}

/// What Linux warns of on any partition that has none of it: virtual functions,
/// and a key store of the platform's.
const WARNED_OF: [&str; 2] = ["SR-IOV", "plpks"];

/// What the machine has a part in; other warnings are about time, of which an
/// emulated machine takes more than Linux thinks right.
const MACHINES_OWN: [&str; 12] = [
    "WARNING:", "BUG:", "Oops", "OF:", "pci", "PCI", "iommu", "rtas", "RTAS", "xics", "nvram",
    "virtio",
];

/// What Linux says of the processor's weaknesses, a line for each: its name, and
/// what it does about it.
const WEAKNESSES: &str = "cd /sys/devices/system/cpu/vulnerabilities && grep . *";

/// Linux finds nothing in the machine to warn of, and does about the processor's
/// weaknesses what the host does, where that knows.
fn kernel_log(lab: &Lab) -> Result {
    let disk = text(&lab.image("disk.img", 1, 1 << 20)?);
    let run = lab.run_quietly().args(&["--disk", &disk]);
    let script = format!("dmesg -r; {WEAKNESSES}");
    let out = run.exec(&script).output()?.succeeds()?;
    contains("the kernel's log", &out, "Linux version")?;
    let warnings = unexpected(&out);
    ensure(warnings.is_empty(), || {
        format!("the guest's kernel warns:\n{}", warnings.join("\n"))
    })?;
    let doctor = lab.crossvisor(&["doctor"]).output()?.succeeds()?;
    let host = lab.host(WEAKNESSES)?;
    contains("what the host does", &host, "meltdown:")?;
    if !doctor.contains("guests are told what the processor has") {
        println!("the host knows nothing of speculation");
        return Ok(());
    }
    host.lines()
        .try_for_each(|line| contains("what the guest does", &out, line))
}

/// Lines of the kernel's log, each after its level in brackets, that warn or worse
/// of what is the machine's and is not expected.
fn unexpected(log: &str) -> Vec<&str> {
    let is_warning = |line: &&str| {
        let level = line.strip_prefix('<').and_then(|rest| rest.split_once('>'));
        let level = level.and_then(|(level, _)| level.parse::<u32>().ok());
        // The level is in the lower three bits; 4 is a warning.
        level.is_some_and(|level| level & 7 <= 4)
    };
    let has = |line: &str, words: &[&str]| words.iter().any(|word| line.contains(word));
    log.lines()
        .filter(is_warning)
        .filter(|line| has(line, &MACHINES_OWN) && !has(line, &WARNED_OF))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_by_its_name() {
        let mut tree = vec![0_u8; 16];
        tree[8..12].copy_from_slice(&16_u32.to_be_bytes());
        tree[12..16].copy_from_slice(&48_u32.to_be_bytes());
        let words = [3, 4, 6, 0x11, 3, 4, 0, 0x22];
        tree.extend(bytes(&words));
        tree.extend(b"other\0power-off\0");
        assert_eq!(number_in(&tree, "power-off"), Some(0x11));
        assert_eq!(number_in(&tree, "other"), Some(0x22));
        assert_eq!(number_in(&tree, "power"), None);
        assert_eq!(number_in(&tree[..20], "other"), None);
    }

    #[test]
    fn processors_are_found_in_what_kvm_shows() {
        let text = "=========\nVCPU state\n=========\nVCPU 0: VP:0x480/02\n    CPPR:0x0\n";
        assert_eq!(processors(text), [0x480]);
    }

    #[test]
    fn warnings_about_the_machine_are_found() {
        let log = "<6>[    0.0] pci 0000:00:01.0: of no concern\n\
                   <4>[    0.1] WARNING: CPU: 0 PID: 1 at arch/powerpc/iommu.c:807\n\
                   <4>[    0.2] hrtimer: interrupt took 1 ns\n\
                   <3>[    0.3] pci 0000:00:01.0: No hypervisor support for SR-IOV\n\
                   <12>[    1.0] virtio: of a program\n\
                   no level: pci";
        let found = unexpected(log);
        assert_eq!(found.len(), 2);
        assert!(found[0].contains("iommu.c:807") && found[1].contains("of a program"));
    }

    #[test]
    fn the_parts_of_the_guest_are_apart() {
        assert!(CODE.len() * 4 <= 0x200);
        let image = image(1, 2, 3);
        assert_eq!(image[0x240..0x24c], bytes(&[1, 0, 8])[..]);
        assert_eq!(image[0x2c0..0x2c4], bytes(&[3])[..]);
        let elf = elf(&image);
        assert_eq!(elf.len(), 64 + 56 + image.len());
        assert_eq!(elf[120..], image);
    }
}
