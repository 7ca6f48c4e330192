//! Which interrupt controller guests have: a XIVE, whose pages they reach
//! without an exit, or an XICS, which is hypercalls.

use crossvisor_vmm::arch::Host;
use crossvisor_vmm::config::VmConfig;
use crossvisor_vmm::error::{Error, Result};

use super::host::backing_page;
use crate::shared::choice::{Kind, choose};

/// An interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irqchip {
    /// External interrupt virtualization engine.
    Xive,
    /// External interrupt controller of PAPR.
    Xics,
}

/// The logarithm of the size of the only event queue that KVM takes for a
/// XIVE's (`xive_native_validate_queue_size`): it must be in one page of the
/// memory behind the guest's.
pub const QUEUE_SHIFT: u32 = 16;

impl Irqchip {
    /// All kinds, the best first.
    const ALL: [Irqchip; 2] = [Irqchip::Xive, Irqchip::Xics];

    /// Its name for `--irqchip`.
    pub const fn name(self) -> &'static str {
        match self {
            Irqchip::Xive => "xive",
            Irqchip::Xics => "xics",
        }
    }

    /// The kind for `config` on `host`: the best that it offers, unless one is
    /// named.
    ///
    /// # Errors
    /// The name is unknown or the host does not offer it; says what it offers.
    pub fn of(config: &VmConfig, host: &Host) -> Result<Self> {
        let large_pages = backing_page(config, host) >= 1 << QUEUE_SHIFT;
        let in_kernel = host.has("KVM_CAP_PPC_IRQ_XIVE");
        if config.irqchip.as_deref() == Some(Irqchip::Xive.name()) && in_kernel && !large_pages {
            return Err(Error::config(
                "--irqchip",
                format!(
                    "KVM keeps the queues of a XIVE in pages of {} KiB at least, and this host's \
                     are of {} KiB: with --hugepages it can have one, or choose xics",
                    1 << (QUEUE_SHIFT - 10),
                    host.page_size >> 10
                ),
            ));
        }
        let known = Irqchip::ALL.map(|irqchip| {
            let offered = match irqchip {
                Irqchip::Xive => in_kernel && large_pages,
                Irqchip::Xics => host.has("KVM_CAP_IRQ_XICS"),
            };
            Kind::new(irqchip.name(), irqchip, offered)
        });
        choose("--irqchip", config.irqchip.as_deref(), &known)?.ok_or_else(|| Error::Capability {
            capability: "KVM_CAP_IRQ_XICS".into(),
            advice: "use a kernel with CONFIG_KVM_XICS".into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::host;
    use super::*;

    fn on(page_size: u64, xive: bool) -> Host {
        let mut host = host::typical();
        host.page_size = page_size;
        if !xive {
            host.capabilities
                .retain(|capability| capability.name != "KVM_CAP_PPC_IRQ_XIVE");
        }
        host
    }

    fn named(name: Option<&str>) -> VmConfig {
        VmConfig {
            irqchip: name.map(String::from),
            ..VmConfig::default()
        }
    }

    #[test]
    fn a_xive_is_taken_where_its_queues_have_room() {
        let huge = VmConfig {
            hugepages: true,
            ..VmConfig::default()
        };
        let plain = named(None);
        let chosen = |config: &VmConfig, host: &Host| Irqchip::of(config, host).unwrap();
        assert_eq!(chosen(&plain, &on(65536, true)), Irqchip::Xive);
        assert_eq!(chosen(&plain, &on(4096, true)), Irqchip::Xics);
        assert_eq!(chosen(&huge, &on(4096, true)), Irqchip::Xive);
        assert_eq!(chosen(&huge, &on(4096, false)), Irqchip::Xics);
        assert_eq!(
            chosen(&named(Some("xics")), &on(65536, true)),
            Irqchip::Xics
        );
        assert_eq!(
            chosen(&named(Some("auto")), &on(65536, true)),
            Irqchip::Xive
        );
    }

    #[test]
    fn what_cannot_be_had_is_said() {
        let message = |name, host: &Host| {
            let error = Irqchip::of(&named(Some(name)), host).unwrap_err();
            error.to_string()
        };
        let text = message("xive", &on(4096, true));
        assert!(
            text.starts_with("--irqchip: ") && text.contains("--hugepages"),
            "{text}"
        );
        let text = message("xive", &on(65536, false));
        assert!(text.contains("offers xics and auto"), "{text}");
        let text = message("gicv3", &on(65536, true));
        assert!(text.contains("offers xive, xics and auto"), "{text}");
        let neither = Host {
            capabilities: Vec::new(),
            ..host::typical()
        };
        let error = Irqchip::of(&named(None), &neither).unwrap_err();
        assert!(matches!(error, Error::Capability { .. }), "{error}");
    }
}
