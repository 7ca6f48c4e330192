//! What KVM_RUN does to the vector registers of the program that calls it, where
//! it loses some: on powerpc64.

use crate::check::{Result, ensure, equal};
use crate::lab::Lab;
use crate::runner::{Test, test};

cfg_if::cfg_if! {
    if #[cfg(target_arch = "powerpc64")] {
        mod powerpc;
        use powerpc::losses;
    } else {
        fn losses(_runs: u32) -> Result<Losses> {
            crate::check::skip("this program is for another architecture")
        }
    }
}

/// The tests of this theme.
pub const TESTS: &[Test] = &[test("vector-registers-kept", 300, kept)
    .on(|m| m.arch() == "ppc64le")
    .once()];

/// Exits to user space in which to look, at a time.
const RUNS: u32 = 20_000;
/// How many times to look for a loss that there has to be.
const PASSES: u32 = 20;

/// After how many of so many runs a vector register that a called function has
/// to preserve was not what it was before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Losses {
    /// The system call by itself.
    bare: u32,
    /// The same by way of crossvisor's access to KVM.
    guarded: u32,
}

/// The system call loses some on nested KVM-HV (8 in 200,000 on Linux 6.12, and up to
/// 6 in 20,000), and crossvisor none: of as many calls as it takes to see that.
fn kept(lab: &Lab) -> Result {
    let nested = lab.machine().capabilities().contains(&("nested", true));
    let mut losses = Losses::default();
    let mut runs = 0;
    for _ in 0..PASSES {
        let pass = self::losses(RUNS)?;
        println!(
            "of {RUNS} calls of KVM_RUN {} lost a vector register",
            pass.bare
        );
        losses.bare += pass.bare;
        losses.guarded += pass.guarded;
        runs += RUNS;
        if losses.bare > 0 || !nested {
            break;
        }
    }
    ensure(losses.bare > 0 || !nested, || {
        format!("none of {runs} bare calls lost a vector register: this shows nothing")
    })?;
    equal(
        "calls that lost a vector register in crossvisor",
        losses.guarded,
        0,
    )
}
