//! What several architectures say of a host's KVM in the same way.

use crossvisor_vmm::arch::Capability;

/// What crossvisor does with a capability of that value.
pub type Effect = fn(i64) -> String;

/// `missing` for 0, `there` for any other value.
pub fn choose(value: i64, there: &str, missing: &str) -> String {
    match value {
        0 => missing.into(),
        _ => there.into(),
    }
}

/// The capabilities of `uses`, with the values that `value` gives.
pub fn capabilities(
    uses: &[(&'static str, Effect)],
    value: impl Fn(&'static str) -> i64,
) -> Vec<Capability> {
    let found = uses.iter().map(|(name, effect)| {
        let value = value(name);
        Capability {
            name,
            value,
            effect: effect(value),
        }
    });
    found.collect()
}
