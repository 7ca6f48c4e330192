//! Exits to user space, as the host's KVM traces them: the same for every VMM.
//!
//! Linux `include/trace/events/kvm.h`: `kvm_userspace_exit` comes at the end of
//! each KVM_RUN, with its reason. On the same thread `kvm_mmio` or (x86)
//! `kvm_pio` tells the place: before it, but a port that is read after it, when
//! what was read is known. [`ENTRIES`] show when the guest's first instruction ran.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::check::{At, Result, fail};

/// Where the kernel's tracing is reached.
const TRACEFS: &str = "/sys/kernel/tracing";

/// The events that are traced, and whether they must be there.
const EVENTS: [(&str, bool); 4] = [
    ("kvm/kvm_userspace_exit", true),
    ("kvm/kvm_mmio", false),
    ("kvm/kvm_pio", false),
    ("sched/sched_process_exec", false),
];

/// The events of an entry into the guest, each of some architectures: Linux
/// `arch/powerpc/kvm/trace_hv.h` and `arch/s390/kvm/trace.h` have their own.
const ENTRIES: [&str; 3] = [
    "kvm/kvm_entry",
    "kvm_hv/kvm_guest_enter",
    "kvm/kvm_s390_sie_enter",
];

/// Places that are reported.
const PLACES: usize = 12;

/// Stands for the place of an exit that is told after it.
const AWAITED: &str = "?";

/// What was traced of one run.
#[derive(Debug, Default)]
pub struct Counts {
    /// Exits by reason.
    pub reasons: BTreeMap<String, u64>,
    /// The places with the most exits.
    pub places: Vec<(String, u64)>,
    /// Microseconds from the VMM's start to the first entry into the guest,
    /// where that is traced.
    pub entry: Option<u64>,
}

/// Tracing that goes on until it is ended or dropped.
pub struct Tracing(());

impl Tracing {
    /// Begins to trace.
    pub fn begin() -> Result<Self> {
        if !Path::new(TRACEFS).join("trace").exists() {
            mount("tracefs", TRACEFS, "tracefs", MountFlags::empty(), None)
                .at(format!("mounting {TRACEFS}"))?;
        }
        set("tracing_on", "0")?;
        set("trace", "")?;
        // KiB for each CPU: an exit takes under 100 bytes.
        set("buffer_size_kb", "32768")?;
        let entries = ENTRIES.map(|event| (event, false));
        for (event, needed) in EVENTS.into_iter().chain(entries) {
            let switch = format!("events/{event}/enable");
            if needed || Path::new(TRACEFS).join(&switch).exists() {
                set(&switch, "1")?;
            }
        }
        set("tracing_on", "1")?;
        Ok(Self(()))
    }

    /// Ends tracing and counts.
    pub fn end(self) -> Result<Counts> {
        set("tracing_on", "0")?;
        let path = Path::new(TRACEFS).join("trace");
        let text = fs::read_to_string(&path).at(path.display().to_string())?;
        count(&text)
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let _ = set("tracing_on", "0");
        let _ = set("events/enable", "0");
        let _ = set("trace", "");
    }
}

fn set(file: &str, text: &str) -> Result {
    let path = Path::new(TRACEFS).join(file);
    fs::write(&path, text).at(path.display().to_string())
}

/// Counts the exits in `text`, lines `thread-id [cpu] flags time: event: ...`.
fn count(text: &str) -> Result<Counts> {
    let mut reasons = BTreeMap::new();
    let mut places: BTreeMap<String, u64> = BTreeMap::new();
    // What each thread wrote or was about to read last.
    let mut last: BTreeMap<&str, String> = BTreeMap::new();
    let (mut started, mut entered) = (None, None);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some(Event {
            thread,
            time,
            name,
            rest,
        }) = event(line)
        else {
            continue;
        };
        match name {
            "sched_process_exec" => started = started.or(time),
            name if is_entry(name) => entered = entered.or(time),
            "kvm_userspace_exit" => {
                let reason = reason(rest);
                let place = match reason.as_str() {
                    "MMIO" | "IO" => last.remove(thread),
                    _ => None,
                };
                if let Some(place) = place {
                    *places.entry(format!("{reason} {place}")).or_default() += 1;
                } else if reason == "IO" {
                    last.insert(thread, AWAITED.to_owned());
                }
                *reasons.entry(reason).or_default() += 1;
            }
            "kvm_pio" if rest.starts_with("pio_read") => {
                let awaited = last.get(thread).is_some_and(|place| place == AWAITED);
                if awaited {
                    last.remove(thread);
                    *places.entry(format!("IO {}", place(rest))).or_default() += 1;
                }
            }
            // A load that has been answered; it was told before.
            "kvm_mmio" if rest.starts_with("mmio read") => {}
            "kvm_mmio" | "kvm_pio" => {
                last.insert(thread, place(rest));
            }
            _ => {}
        }
    }
    if reasons.is_empty() {
        return fail("the host's KVM traced no exits");
    }
    let mut places: Vec<(String, u64)> = places.into_iter().collect();
    places.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    places.truncate(PLACES);
    let entry = match (started, entered) {
        (Some(started), Some(entered)) => entered.checked_sub(started),
        _ => None,
    };
    Ok(Counts {
        reasons,
        places,
        entry,
    })
}

fn is_entry(name: &str) -> bool {
    let mut entries = ENTRIES.iter().filter_map(|event| event.split_once('/'));
    entries.any(|(_, entry)| entry == name)
}

/// A line of the trace.
struct Event<'a> {
    thread: &'a str,
    /// In microseconds.
    time: Option<u64>,
    name: &'a str,
    /// What it says of itself.
    rest: &'a str,
}

fn event(line: &str) -> Option<Event<'_>> {
    // A thread's name may hold spaces; its CPU stands in brackets.
    let (thread, rest) = line.split_once(" [")?;
    let (before, rest) = rest.split_once(": ")?;
    let (name, rest) = rest.split_once(':')?;
    let time = before.split_whitespace().last()?;
    Some(Event {
        thread: thread.trim(),
        // Seconds with six digits after the point.
        time: time.replace('.', "").parse().ok(),
        name: name.trim(),
        rest: rest.trim(),
    })
}

/// `reason KVM_EXIT_IO (2)`, without its prefix and number; `restart` and
/// `error N` stand for an interrupted run.
fn reason(rest: &str) -> String {
    let word = rest.strip_prefix("reason ").unwrap_or(rest);
    let word = word.split(" (").next().unwrap_or(word).trim();
    word.strip_prefix("KVM_EXIT_").unwrap_or(word).to_owned()
}

/// A `kvm_pio` has `pio_write at 0x3f8 size 1 ...`, a `kvm_mmio` has `mmio write
/// len 4 gpa 0x1000 val 0x1` or `mmio unsatisfied-read len ...`.
fn place(rest: &str) -> String {
    let words: Vec<&str> = rest.split_whitespace().collect();
    let after = |key: &str| {
        let at = words.iter().position(|word| *word == key)?;
        words.get(at + 1).copied()
    };
    let place = after("at").or_else(|| after("gpa")).unwrap_or("?");
    let verb = match words.iter().any(|word| word.ends_with("write")) {
        true => "write",
        false => "read",
    };
    format!("{verb} {place}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
#
 crossvisor-410     [001] .....    26.371000: sched_process_exec: filename=/x pid=410 old_pid=410
      vcpu0-412     [001] d..1.    26.371210: kvm_entry: vcpu 0, rip 0x1000200
      vcpu0-412     [001] .....    26.371218: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x61
      vcpu0-412     [001] .....    26.371220: kvm_userspace_exit: reason KVM_EXIT_IO (2)
 CPU 1/KVM-413      [000] .....    26.371225: kvm_mmio: mmio unsatisfied-read len 4 gpa 0xb0000000 val 0x0
      vcpu0-412     [001] .....    26.371230: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x62
 CPU 1/KVM-413      [000] .....    26.371235: kvm_userspace_exit: reason KVM_EXIT_MMIO (6)
 CPU 1/KVM-413      [000] .....    26.371237: kvm_mmio: mmio read len 4 gpa 0xb0000000 val 0x7
      vcpu0-412     [001] .....    26.371240: kvm_userspace_exit: reason KVM_EXIT_IO (2)
      vcpu0-412     [001] d..1.    26.371250: kvm_userspace_exit: reason restart (4)
      vcpu0-412     [001] .....    26.371251: kvm_pio: pio_read at 0x40 size 1 count 1 val 0x0
      vcpu0-412     [001] .....    26.371252: kvm_userspace_exit: reason KVM_EXIT_IO (2)
      vcpu0-412     [001] .....    26.371253: kvm_pio: pio_read at 0x71 size 1 count 1 val 0x26
";

    #[test]
    fn exits_by_reason_and_place() {
        let Counts {
            reasons,
            places,
            entry,
        } = count(TRACE).unwrap();
        assert_eq!(entry, Some(210));
        let reasons: Vec<_> = reasons.iter().map(|(r, n)| (r.as_str(), *n)).collect();
        assert_eq!(reasons, [("IO", 3), ("MMIO", 1), ("restart", 1)]);
        assert_eq!(
            places,
            [
                ("IO write 0x3f8".to_owned(), 2),
                ("IO read 0x71".to_owned(), 1),
                ("MMIO read 0xb0000000".to_owned(), 1)
            ]
        );
        assert!(count("# nothing\n").is_err());
    }

    #[test]
    fn each_architecture_has_its_event_of_an_entry() {
        for entry in [
            "kvm_guest_enter: VCPU 0: pc=0x0",
            "kvm_s390_sie_enter: 00[0-0]: x",
        ] {
            let text = TRACE.replace("kvm_entry: vcpu 0, rip 0x1000200", entry);
            assert_eq!(count(&text).unwrap().entry, Some(210), "{entry}");
        }
    }
}
