//! What a VMM's process holds in memory.

use crate::check::{At, Result, fail, value};

/// Of a process whose /proc/PID/smaps is `text`: KiB that are resident of the
/// guest's memory of `guest` KiB, and KiB beside it, each page divided by the
/// number of its users (proc_pid_smaps(5), `Pss`).
///
/// The guest's memory is the mapping that is at least as large.
pub fn resident(text: &str, guest: u64) -> Result<(u64, u64)> {
    let (mut inside, mut beyond, mut found) = (0, 0, false);
    for mapping in mappings(text) {
        let field = |key: &str| -> Result<u64> {
            let text = value(mapping, key)?;
            let digits = text.split_whitespace().next().unwrap_or_default();
            digits.parse().at(format!("smaps: {key} is `{text}`"))
        };
        let pss = field("Pss")?;
        // A VMM may reserve address space that is larger still.
        if field("Size")? >= guest && pss > 0 {
            found = true;
            inside += pss;
        } else {
            beyond += pss;
        }
    }
    match found {
        true => Ok((inside, beyond)),
        false => fail(format!("no mapping of {guest} KiB for the guest's memory")),
    }
}

/// The paragraphs of `text`: each begins with a line `from-to permissions ...`,
/// and goes on with lines `Key: value`.
fn mappings(text: &str) -> impl Iterator<Item = &str> {
    let is_head = |line: &str| {
        let first = line.split_whitespace().next().unwrap_or_default();
        !first.ends_with(':')
    };
    let mut starts = Vec::new();
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if is_head(line) {
            starts.push(at);
        }
        at += line.len();
    }
    let ends = starts.clone().into_iter().skip(1).chain([text.len()]);
    let ranges: Vec<_> = starts.into_iter().zip(ends).collect();
    ranges
        .into_iter()
        .map(move |(start, end)| text.get(start..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0020000000 rw-p 00000000 00:00 0
Size:             524288 kB
Rss:               99328 kB
Pss:               99328 kB
Pss_Dirty:         99000 kB
THPeligible:           1
VmFlags: rd wr mr mw me nr sd hg
7f0020000000-7f0020001000 rw-p 00000000 08:01 12   /lib/x.so
Size:                  4 kB
Rss:                   4 kB
Pss:                   2 kB
";

    #[test]
    fn the_guest_s_memory_is_told_from_the_rest() {
        assert_eq!(resident(SMAPS, 512 << 10).unwrap(), (99328, 2));
        assert!(resident(SMAPS, 1 << 30).is_err());
        assert!(resident("", 1).is_err());
    }
}
