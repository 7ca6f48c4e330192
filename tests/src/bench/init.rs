//! The guest's init: says that it runs, and powers off.

use std::io::Write;
use std::time::Duration;

use rustix::system::{RebootCommand, reboot};

use super::MARK;

/// The word of the kernel's command line by which init stays when it has said
/// that it runs. The kernel passes words that it does not know on to init.
pub const HOLD: &str = "bench-hold";

/// Whether this process is a guest's init.
pub fn is_init() -> bool {
    std::process::id() == 1
}

/// Is the guest's init.
pub fn become_init() -> ! {
    let mut console = std::io::stdout();
    // Nobody would hear of a failure; the lab misses the mark.
    let _ = console
        .write_all(MARK)
        .and_then(|()| console.write_all(b"\n"));
    let _ = console.flush();
    if !std::env::args().any(|word| word == HOLD) {
        let _ = reboot(RebootCommand::PowerOff);
    }
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}
