//! What was measured, as a table.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Deserialize;

use crate::error::{Error, Result};

/// MiB that crossvisor is to hold beyond the guest's memory at most.
const MEMORY_AIM: f64 = 5.0;
/// MiB that crossvisor's static binary is to have at most.
const PROGRAM_AIM: f64 = 6.0;

/// One thing measured, as the lab machine reports it.
#[derive(Debug, Deserialize)]
struct Line {
    contender: String,
    cpus: u32,
    measured: Measured,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Measured {
    /// The size of a program's file.
    Program { bytes: u64 },
    /// A timed run, in microseconds.
    Boot { round: u32, init: u64, exit: u64 },
    /// A run that did not come to its end.
    Failed { why: String },
    /// KiB of resident memory.
    Memory { guest: u64, beyond: u64 },
    /// Exits to user space.
    Exits {
        reasons: BTreeMap<String, u64>,
        places: Vec<(String, u64)>,
        /// Microseconds from the start to the first entry into the guest.
        entry: Option<u64>,
    },
}

/// What is known of one contender with one number of vCPUs.
#[derive(Debug, Default)]
struct Cell {
    /// Microseconds to init and to the end, by round.
    boots: BTreeMap<u32, (u64, u64)>,
    /// Runs that did not come to their end.
    failed: u64,
    /// KiB of the guest and beyond.
    memory: Option<(u64, u64)>,
    reasons: BTreeMap<String, u64>,
    places: Vec<(String, u64)>,
    /// Microseconds to the first entry into the guest.
    entry: Option<u64>,
}

/// All that was measured so far.
#[derive(Debug, Default)]
pub struct Report {
    programs: BTreeMap<String, u64>,
    cells: BTreeMap<(u32, String), Cell>,
}

impl Report {
    /// Takes in what follows `BENCH ` in a line of the lab machine; says it in
    /// a few words for people who wait.
    ///
    /// # Errors
    ///
    /// When it is not what the lab machine says.
    pub fn line(&mut self, json: &str) -> Result<String> {
        let line: Line = serde_json::from_str(json)
            .map_err(|error| Error::said(format!("the measurement `{json}`: {error}")))?;
        let mut said = format!("{}, {}: ", line.contender, vcpus(line.cpus));
        if let Measured::Program { bytes } = line.measured {
            said = format!("{}: {} bytes", line.contender, bytes);
            self.programs.insert(line.contender, bytes);
            return Ok(said);
        }
        let cell = self.cells.entry((line.cpus, line.contender)).or_default();
        match line.measured {
            Measured::Boot { round, init, exit } => {
                let (to_init, to_exit) = (seconds(init as f64), seconds(exit as f64));
                let _ = write!(said, "init at {to_init}, end at {to_exit}");
                cell.boots.insert(round, (init, exit));
            }
            Measured::Failed { why } => {
                let _ = write!(said, "failed: {why}");
                cell.failed += 1;
            }
            Measured::Memory { guest, beyond } => {
                let _ = write!(
                    said,
                    "{beyond} KiB beyond {guest} KiB of the guest's memory"
                );
                cell.memory = Some((guest, beyond));
            }
            Measured::Exits {
                reasons,
                places,
                entry,
            } => {
                let sum: u64 = reasons.values().sum();
                let _ = write!(said, "{sum} exits to user space until init");
                (cell.reasons, cell.places, cell.entry) = (reasons, places, entry);
            }
            Measured::Program { .. } => {}
        }
        Ok(said)
    }

    /// The table: `own` against `peer`, of whose boot time `own` is to take at
    /// most the part `aim`; or `own` alone.
    pub fn text(&self, own: &str, peer: Option<&str>, aim: Option<f64>) -> String {
        let alone = peer.is_none();
        let peer = peer.unwrap_or("no peer");
        let of_peer = |count: u64| (!alone).then_some(count);
        let mut rows = Vec::new();
        let none = Cell::default();
        let cell =
            |cpus: u32, name: &str| self.cells.get(&(cpus, name.to_owned())).unwrap_or(&none);
        let mut numbers: Vec<u32> = self.cells.keys().map(|(cpus, _)| *cpus).collect();
        numbers.dedup();
        for &cpus in &numbers {
            let (ours, theirs) = (cell(cpus, own), cell(cpus, peer));
            let (our_boots, their_boots) = match alone {
                true => (ours.boots.values().copied().collect(), Vec::new()),
                false => rounds(ours, theirs),
            };
            for (what, pick) in TIMES {
                rows.push(times(
                    format!("start to {what}, {}", vcpus(cpus)),
                    our_boots.iter().map(pick).collect(),
                    their_boots.iter().map(pick).collect(),
                    aim.filter(|_| what == TIMES[0].0),
                ));
            }
            if ours.failed + theirs.failed > 0 {
                let what = format!("runs that failed, {}", vcpus(cpus));
                rows.push(counts(what, ours.failed, of_peer(theirs.failed)));
            }
        }
        for &cpus in &numbers {
            let pick = |name| -> Vec<u64> { cell(cpus, name).entry.into_iter().collect() };
            let what = format!("start to the first entry, {}", vcpus(cpus));
            rows.push(times(what, pick(own), pick(peer), None));
        }
        for &cpus in &numbers {
            let pick = |name| {
                cell(cpus, name)
                    .memory
                    .map(|(_, beyond)| beyond as f64 / 1024.0)
            };
            let what = format!("memory beyond the guest's, {}", vcpus(cpus));
            rows.push(sizes(what, pick(own), pick(peer), MEMORY_AIM));
        }
        let pick = |name: &str| {
            self.programs
                .get(name)
                .map(|&b| b as f64 / f64::from(1 << 20))
        };
        rows.push(sizes("program".into(), pick(own), pick(peer), PROGRAM_AIM));
        for &cpus in &numbers {
            let (ours, theirs) = (&cell(cpus, own).reasons, &cell(cpus, peer).reasons);
            let sum = |reasons: &BTreeMap<String, u64>| reasons.values().sum::<u64>();
            rows.push(counts(
                format!("exits until init, {}", vcpus(cpus)),
                sum(ours),
                of_peer(sum(theirs)),
            ));
            let mut names: Vec<&String> = ours.keys().chain(theirs.keys()).collect();
            names.sort();
            names.dedup();
            for name in names {
                let of = |reasons: &BTreeMap<String, u64>| reasons.get(name).copied().unwrap_or(0);
                rows.push(counts(format!("  {name}"), of(ours), of_peer(of(theirs))));
            }
        }
        let head = ["", own, peer, "ratio", "aim"].map(str::to_owned);
        let mut text = columns(&head, &rows);
        for &cpus in &numbers {
            for name in [own, peer].into_iter().take(if alone { 1 } else { 2 }) {
                let places = &cell(cpus, name).places;
                // Not every host's KVM tells where an exit was.
                if places.is_empty() {
                    continue;
                }
                let places: Vec<String> = places
                    .iter()
                    .map(|(place, count)| format!("{count} {place}"))
                    .collect();
                let _ = writeln!(
                    text,
                    "most exits of {name}, {}: {}",
                    vcpus(cpus),
                    places.join(", ")
                );
            }
        }
        text
    }

    /// Whether every figure is there.
    pub fn is_whole(&self, contenders: usize, numbers: usize) -> bool {
        self.programs.len() == contenders
            && self.cells.len() == contenders * numbers
            && self.cells.values().all(|cell| {
                !cell.boots.is_empty() && cell.memory.is_some() && !cell.reasons.is_empty()
            })
    }
}

/// Microseconds to init and to the end.
type Boot = (u64, u64);

/// The times of the rounds in which neither failed.
fn rounds(ours: &Cell, theirs: &Cell) -> (Vec<Boot>, Vec<Boot>) {
    let pair = |(round, ours): (&u32, &Boot)| Some((*ours, *theirs.boots.get(round)?));
    ours.boots.iter().filter_map(pair).unzip()
}

/// A time of a boot, by name.
type Time = (&'static str, fn(&(u64, u64)) -> u64);

const TIMES: [Time; 2] = [("init", |(init, _)| *init), ("exit", |(_, exit)| *exit)];

type Row = [String; 5];

/// Medians, and the ratios of the two in each round: their median, the least
/// and the greatest.
fn times(what: String, ours: Vec<u64>, theirs: Vec<u64>, aim: Option<f64>) -> Row {
    let ratios: Vec<f64> = ours
        .iter()
        .zip(&theirs)
        .map(|(a, b)| *a as f64 / *b as f64)
        .collect();
    let middle = |times: &[u64]| {
        let times: Vec<f64> = times.iter().map(|&time| time as f64).collect();
        median(&times).map_or("-".into(), seconds)
    };
    let ratio = median(&ratios);
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    [
        what,
        middle(&ours),
        middle(&theirs),
        match ratio {
            None => "-".into(),
            Some(ratio) if ratios.len() == 1 => format!("{ratio:.2}"),
            Some(ratio) => format!("{ratio:.2} ({least:.2} to {most:.2})"),
        },
        match (ratio, aim) {
            (Some(ratio), Some(aim)) => format!("{aim:.2}: {}", verdict(ratio <= aim)),
            _ => String::new(),
        },
    ]
}

/// Sizes in MiB.
fn sizes(what: String, ours: Option<f64>, theirs: Option<f64>, aim: f64) -> Row {
    let text = |size: Option<f64>| size.map_or("-".into(), |size| format!("{size:.2} MiB"));
    [
        what,
        text(ours),
        text(theirs),
        match (ours, theirs) {
            (Some(ours), Some(theirs)) => format!("{:.2}", ours / theirs),
            _ => "-".into(),
        },
        ours.map_or(String::new(), |ours| {
            format!("{aim} MiB: {}", verdict(ours <= aim))
        }),
    ]
}

/// `theirs` is `None` without a peer.
fn counts(what: String, ours: u64, theirs: Option<u64>) -> Row {
    let ratio = theirs.filter(|&theirs| theirs != 0);
    [
        what,
        ours.to_string(),
        theirs.map_or("-".into(), |theirs| theirs.to_string()),
        ratio.map_or("-".into(), |theirs| {
            format!("{:.2}", ours as f64 / theirs as f64)
        }),
        String::new(),
    ]
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

fn vcpus(cpus: u32) -> String {
    crate::cache::count(cpus as usize, "vCPU")
}

fn seconds(micros: f64) -> String {
    format!("{:.3} s", micros / 1e6)
}

/// The middle of `values`, or the mean of the two in the middle.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    let upper = *sorted.get(half)?;
    match sorted.len() % 2 {
        1 => Some(upper),
        _ => Some((sorted.get(half - 1)? + upper) / 2.0),
    }
}

/// Rows under a head, the first column to the left and the others to the right.
fn columns(head: &Row, rows: &[Row]) -> String {
    let width = |at: usize| {
        let cells = rows.iter().chain([head]).filter_map(|row| row.get(at));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for row in [head].into_iter().chain(rows) {
        let mut line = String::new();
        for (at, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            match at {
                0 => line.push_str(&format!("{cell:width$}")),
                _ => line.push_str(&format!("  {cell:>width$}")),
            }
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        for line in [
            r#"{"contender":"a","cpus":0,"measured":{"program":{"bytes":3145728}}}"#,
            r#"{"contender":"b","cpus":0,"measured":{"program":{"bytes":6291456}}}"#,
            r#"{"contender":"a","cpus":1,"measured":{"boot":{"round":0,"init":1000000,"exit":2000000}}}"#,
            r#"{"contender":"b","cpus":1,"measured":{"boot":{"round":0,"init":4000000,"exit":4000000}}}"#,
            r#"{"contender":"b","cpus":1,"measured":{"boot":{"round":1,"init":2000000,"exit":4000000}}}"#,
            r#"{"contender":"a","cpus":1,"measured":{"boot":{"round":1,"init":1200000,"exit":2200000}}}"#,
            r#"{"contender":"a","cpus":1,"measured":{"memory":{"guest":100,"beyond":6144}}}"#,
            r#"{"contender":"b","cpus":1,"measured":{"memory":{"guest":100,"beyond":12288}}}"#,
            r#"{"contender":"a","cpus":1,"measured":{"exits":{"reasons":{"IO":3},"places":[["IO write 0x3f8",2]],"entry":200000}}}"#,
        ] {
            report.line(line).unwrap();
        }
        report
    }

    #[test]
    fn ratios_are_of_rounds_and_aims_are_judged() {
        let text = report().text("a", Some("b"), Some(0.45));
        let row = |begin: &str| {
            let line = text.lines().find(|line| line.starts_with(begin)).unwrap();
            let line = line.strip_prefix(begin).unwrap();
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            row("start to init, 1 vCPU"),
            "1.100 s 3.000 s 0.42 (0.25 to 0.60) 0.45: met"
        );
        assert_eq!(
            row("start to exit, 1 vCPU"),
            "2.100 s 4.000 s 0.53 (0.50 to 0.55)"
        );
        assert_eq!(
            row("memory beyond the guest's, 1 vCPU"),
            "6.00 MiB 12.00 MiB 0.50 5 MiB: missed"
        );
        assert_eq!(row("program"), "3.00 MiB 6.00 MiB 0.50 6 MiB: met");
        assert_eq!(row("  IO"), "3 0 -");
        assert!(text.contains("most exits of a, 1 vCPU: 2 IO write 0x3f8\n"));
    }

    #[test]
    fn a_round_that_failed_is_counted_and_compared_with_nothing() {
        let mut report = report();
        for line in [
            r#"{"contender":"b","cpus":1,"measured":{"failed":{"why":"fell silent"}}}"#,
            r#"{"contender":"a","cpus":1,"measured":{"boot":{"round":2,"init":9000000,"exit":9000000}}}"#,
        ] {
            report.line(line).unwrap();
        }
        let text = report.text("a", Some("b"), None);
        let row = |begin: &str| text.lines().find(|line| line.starts_with(begin)).unwrap();
        assert!(
            row("start to init").ends_with("0.42 (0.25 to 0.60)"),
            "{text}"
        );
        let words: Vec<&str> = row("runs that failed").split_whitespace().collect();
        assert_eq!(
            words,
            ["runs", "that", "failed,", "1", "vCPU", "0", "1", "0.00"]
        );
    }

    #[test]
    fn without_a_peer_there_are_figures_and_no_ratios() {
        let mut report = Report::default();
        for line in [
            r#"{"contender":"a","cpus":0,"measured":{"program":{"bytes":3145728}}}"#,
            r#"{"contender":"a","cpus":1,"measured":{"boot":{"round":0,"init":1000000,"exit":2000000}}}"#,
            r#"{"contender":"a","cpus":1,"measured":{"memory":{"guest":100,"beyond":1024}}}"#,
            r#"{"contender":"a","cpus":1,"measured":{"exits":{"reasons":{"IO":3},"places":[],"entry":null}}}"#,
        ] {
            report.line(line).unwrap();
        }
        assert!(report.is_whole(1, 1) && !report.is_whole(2, 1));
        let text = report.text("a", None, Some(0.45));
        let row = |begin: &str| {
            let line = text.lines().find(|line| line.starts_with(begin)).unwrap();
            line.split_whitespace()
                .skip(5)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(row("start to init, 1 vCPU"), "1.000 s - -");
        let exits = text.lines().find(|line| line.starts_with("  IO"));
        let words: Vec<&str> = exits.unwrap().split_whitespace().collect();
        assert_eq!(words, ["IO", "3", "-", "-"]);
        assert!(!text.contains("most exits of"), "{text}");
    }

    #[test]
    fn what_is_missing_is_noticed() {
        let mut report = report();
        assert!(!report.is_whole(2, 1));
        report
            .line(r#"{"contender":"b","cpus":1,"measured":{"exits":{"reasons":{"IO":3},"places":[],"entry":400000}}}"#)
            .unwrap();
        assert!(report.is_whole(2, 1));
        let text = report.text("a", Some("b"), None);
        let row = text.lines().find(|line| line.contains("first entry"));
        let words: Vec<&str> = row.unwrap().split_whitespace().skip(7).collect();
        assert_eq!(words, ["0.200", "s", "0.400", "s", "0.50"]);
        assert!(!report.is_whole(2, 2));
        assert!(report.line("nonsense").is_err());
    }
}
