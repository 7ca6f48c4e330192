//! Shows that every CPU runs what it is given.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use crate::check::{At, Result, ensure, fail};

/// The ticks that each CPU works for at least.
pub const LEAST_TICKS: u64 = 5;

/// Keeps each online CPU busy for `milliseconds` or [`LEAST_TICKS`], whichever
/// takes longer, all at once, and says for each how many clock ticks of work the
/// kernel counted for it.
pub fn spin(milliseconds: u64) -> Result<String> {
    let before = ticks()?;
    let workers: Vec<_> = (before.iter().copied().enumerate())
        .map(|(cpu, before)| (cpu, thread::spawn(move || work(cpu, milliseconds, before))))
        .collect();
    let mut text = String::new();
    for (cpu, worker) in workers {
        match worker.join() {
            Ok(result) => result?,
            Err(_) => return fail(format!("the thread on CPU {cpu} panicked")),
        }
    }
    for (cpu, (before, after)) in before.iter().zip(ticks()?).enumerate() {
        text += &format!("cpu{cpu}: {}\n", after - before);
    }
    Ok(text)
}

fn work(cpu: usize, milliseconds: u64, before: u64) -> Result {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).at(format!("moving to CPU {cpu}"))?;
    loop {
        let until = Instant::now() + Duration::from_millis(milliseconds);
        while Instant::now() < until {
            let here = sched_getcpu();
            ensure(here == cpu, || format!("on CPU {here}, not on {cpu}"))?;
        }
        // A vCPU that gets little of its host counts few: there is a limit for the
        // whole.
        let now = ticks()?.get(cpu).copied().unwrap_or_default();
        if now >= before + LEAST_TICKS {
            return Ok(());
        }
    }
}

/// Ticks of work in user and kernel mode, for each CPU.
fn ticks() -> Result<Vec<u64>> {
    let text = fs::read_to_string("/proc/stat").at("/proc/stat")?;
    parse(&text)
}

/// The lines `cpuN user nice system ...` of /proc/stat (proc_stat(5)).
fn parse(text: &str) -> Result<Vec<u64>> {
    let mut ticks = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let cpu = words.next().and_then(|word| word.strip_prefix("cpu"));
        let Some(cpu) = cpu.filter(|number| !number.is_empty()) else {
            continue;
        };
        ensure(cpu.parse() == Ok(ticks.len()), || {
            format!(
                "CPU {cpu} comes after {} others: some are offline",
                ticks.len()
            )
        })?;
        let mut sum = 0;
        for word in words.take(3) {
            sum += word.parse::<u64>().at("/proc/stat")?;
        }
        ticks.push(sum);
    }
    Ok(ticks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_each_cpu() {
        let text = "cpu  9 9 9 9\ncpu0 1 2 3 100 4\ncpu1 10 0 5 7\nintr 5\n";
        assert_eq!(parse(text).unwrap(), [6, 15]);
        assert!(parse("cpu0 1 2 3\ncpu2 1 2 3\n").is_err());
    }
}
