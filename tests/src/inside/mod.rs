//! What this binary does inside a guest, where tests put it as `tool`: what
//! busybox cannot do.

mod cpus;
mod disk;
mod memory;
mod net;

pub use cpus::LEAST_TICKS;
pub use net::serve;

use crate::check::{At, Result, fail};

/// The first argument that makes this binary the tool.
pub const COMMAND: &str = "inside";

/// Runs the tool's command line and returns what it says.
pub fn run(arguments: &[String]) -> Result<String> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["cpus", milliseconds] => cpus::spin(number(milliseconds)?),
        ["memory", mebibytes, seed] => memory::fill(number(mebibytes)?, number(seed)?),
        ["write", path, offset, len, seed] => {
            disk::write(path, number(offset)?, number(len)?, number(seed)?)
        }
        ["check", path, offset, len, seed] => {
            disk::check(path, number(offset)?, number(len)?, number(seed)?)
        }
        ["zero", path, offset, len] => disk::zero(path, number(offset)?, number(len)?, false),
        ["punch", path, offset, len] => disk::zero(path, number(offset)?, number(len)?, true),
        ["bulk", address, streams, mebibytes] => {
            net::bulk(address, number(streams)?, number(mebibytes)?)
        }
        _ => fail(format!("the tool has no `{}`", words.join(" "))),
    }
}

fn number(text: &str) -> Result<u64> {
    text.parse().at(format!("`{text}`"))
}
