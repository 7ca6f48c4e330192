//! What the tests said: outcomes, the table, the counts.

use std::collections::BTreeMap;
use std::fmt::Write;

/// How one test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It passed, after so many milliseconds where that is known.
    Passed(Option<u64>),
    /// It failed at first, and passed when it was tried once more, in a machine
    /// started anew.
    Retried {
        /// How long the second try took, in milliseconds, where that is known.
        ms: Option<u64>,
        /// Where the log of the first try is.
        first: String,
    },
    /// It failed; why is in its log.
    Failed,
    /// It did not apply, and why.
    Skipped(String),
}

/// How many tests ended in which way.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed.
    pub failed: usize,
    /// Tests that were skipped.
    pub skipped: usize,
}

impl Counts {
    /// Counts one more.
    pub fn add(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed(_) | Outcome::Retried { .. } => self.passed += 1,
            Outcome::Failed => self.failed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
        }
    }

    /// The sum of two.
    pub fn and(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }

    /// The one line that a run ends with.
    pub fn line(self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// Outcomes by row (test) and column (machine).
#[derive(Debug, Default)]
pub struct Table {
    columns: Vec<String>,
    rows: Vec<(String, BTreeMap<String, Outcome>)>,
}

impl Table {
    /// Enters one outcome.
    pub fn set(&mut self, row: &str, column: &str, outcome: Outcome) {
        if !self.columns.iter().any(|c| c == column) {
            self.columns.push(column.to_owned());
        }
        let at = match self.rows.iter().position(|(name, _)| name == row) {
            Some(at) => at,
            None => {
                self.rows.push((row.to_owned(), BTreeMap::new()));
                self.rows.len() - 1
            }
        };
        if let Some((_, cells)) = self.rows.get_mut(at) {
            cells.insert(column.to_owned(), outcome);
        }
    }

    /// How many outcomes of each kind.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for outcome in self.rows.iter().flat_map(|(_, cells)| cells.values()) {
            counts.add(outcome);
        }
        counts
    }

    /// Each test that was skipped, with the reason, and each that was tried
    /// twice.
    pub fn remarks(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (row, cells) in &self.rows {
            for (column, outcome) in cells {
                match outcome {
                    Outcome::Skipped(reason) => {
                        lines.push(format!("SKIPPED {row} on {column}: {reason}"));
                    }
                    Outcome::Retried { first, .. } => lines.push(format!(
                        "RETRIED {row} on {column}: it failed at first ({first})"
                    )),
                    Outcome::Passed(_) | Outcome::Failed => {}
                }
            }
        }
        lines
    }

    /// The table as text, one line for each row.
    pub fn text(&self) -> String {
        let widest = self.rows.iter().map(|(name, _)| name.len()).max();
        let first = widest.unwrap_or_default();
        let mut text = format!("{:first$}", "");
        for column in &self.columns {
            let _ = write!(text, "  {column:>9}");
        }
        text.push('\n');
        for (row, cells) in &self.rows {
            let _ = write!(text, "{row:first$}");
            for column in &self.columns {
                let width = column.len().max(9);
                let _ = write!(text, "  {:>width$}", cell(cells.get(column)));
            }
            text.push('\n');
        }
        text
    }
}

fn cell(outcome: Option<&Outcome>) -> String {
    match outcome {
        None => "-".to_owned(),
        Some(Outcome::Failed) => "FAILED".to_owned(),
        Some(Outcome::Skipped(_)) => "skipped".to_owned(),
        Some(Outcome::Retried { .. }) => "retried".to_owned(),
        Some(Outcome::Passed(None)) => "ok".to_owned(),
        Some(Outcome::Passed(Some(ms))) => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
    }
}

/// Reads what `cargo test` prints: `test NAME ... ok`.
pub fn unit_tests(printed: &str) -> Counts {
    let mut counts = Counts::default();
    for line in printed.lines() {
        let Some(rest) = line.strip_prefix("test ") else {
            continue;
        };
        // A test that prints shares its line with what it printed.
        let Some((name, result)) = rest.split_once(" ... ") else {
            continue;
        };
        if name.starts_with("result:") {
            continue;
        }
        if result.ends_with("ok") {
            counts.passed += 1;
        } else if result.ends_with("FAILED") {
            counts.failed += 1;
        } else if result.contains("ignored") {
            counts.skipped += 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_s_lines_are_counted() {
        let counts = unit_tests(
            "running 4 tests\ntest a::b ... ok\ntest a::c ... FAILED\n\
             test a::d ... ignored, needs a tap\ntest src/x.rs - y (line 3) ... ok\n\
             test result: FAILED. 2 passed; 1 failed; 1 ignored\n",
        );
        assert_eq!(counts.line(), "2 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn the_table_lines_up_and_counts() {
        let mut table = Table::default();
        table.set("boot", "x86_64", Outcome::Passed(Some(12_345)));
        table.set("boot", "aarch64-gicv2", Outcome::Failed);
        table.set("a-long-name", "x86_64", Outcome::Skipped("no tap".into()));
        assert_eq!(
            table.text(),
            "                x86_64  aarch64-gicv2\n\
             boot            12.3 s         FAILED\n\
             a-long-name    skipped              -\n"
        );
        assert_eq!(table.counts().line(), "1 passed, 1 failed, 1 skipped");
        assert_eq!(table.remarks(), ["SKIPPED a-long-name on x86_64: no tap"]);
        let again = Outcome::Retried {
            ms: Some(9),
            first: "/log".into(),
        };
        table.set("boot", "aarch64-gicv2", again);
        assert!(table.text().contains("12.3 s        retried"));
        assert_eq!(table.counts().line(), "2 passed, 0 failed, 1 skipped");
        assert_eq!(
            table.remarks().first().map(String::as_str),
            Some("RETRIED boot on aarch64-gicv2: it failed at first (/log)")
        );
    }
}
