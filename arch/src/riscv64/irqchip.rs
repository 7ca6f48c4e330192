//! Which interrupt controller the machine has, and how interrupts reach it.
//!
//! - AIA, the Advanced Interrupt Architecture (RISC-V specification of that
//!   name): an APLIC for wires, which sends them on as messages, and an IMSIC
//!   for each vCPU, which takes messages. KVM has both.
//! - PLIC, the Platform-Level Interrupt Controller: wires only, modelled in
//!   user space ([`super::plic`]).

use crossvisor_devices::irq::MsiMessage;
use crossvisor_vmm::arch::Host;
use crossvisor_vmm::error::Result;
use crossvisor_vmm::hv::Route;

use super::{host, layout};
use crate::shared::choice::{Kind, choose};

/// An interrupt controller of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irqchip {
    /// APLIC and IMSICs.
    Aia,
    /// PLIC.
    Plic,
}

impl Irqchip {
    /// Both, the preferred first.
    pub const ALL: [Irqchip; 2] = [Irqchip::Aia, Irqchip::Plic];

    /// The name that `--irqchip` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Irqchip::Aia => "aia",
            Irqchip::Plic => "plic",
        }
    }

    /// Whether devices can send messages to it.
    pub const fn has_msi(self) -> bool {
        matches!(self, Irqchip::Aia)
    }

    /// Whether `host` offers it.
    pub fn is_offered(self, host: &Host) -> bool {
        match self {
            // The APLIC passes each of its wires on by a number of its own.
            Irqchip::Aia => {
                host.capability(host::AIA_IDS) >= layout::WIRES.into() && host.has(host::IRQFD)
            }
            Irqchip::Plic => true,
        }
    }

    /// The controller for `--irqchip` `name`; `None` or `auto` takes the best
    /// that `host` offers.
    ///
    /// # Errors
    /// The name is unknown or the host does not offer it; says what it offers.
    pub fn choose(name: Option<&str>, host: &Host) -> Result<Irqchip> {
        let known = Irqchip::ALL.map(|irqchip| Kind {
            lacking: match irqchip {
                Irqchip::Aia => "its harts have no Ssaia",
                Irqchip::Plic => "",
            },
            ..Kind::new(irqchip.name(), irqchip, irqchip.is_offered(host))
        });
        Ok(choose("--irqchip", name, &known)?.unwrap_or(Irqchip::Plic))
    }

    /// The routes of the wires: GSI n is source n of the APLIC. KVM has no
    /// routing table without one.
    pub fn wire_routes(self) -> Vec<(u32, Route)> {
        match self {
            Irqchip::Aia => (1..=layout::WIRES)
                .map(|gsi| (gsi, Route::Irqchip { chip: 0, pin: gsi }))
                .collect(),
            Irqchip::Plic => Vec::new(),
        }
    }

    /// Where a message of a device leads, on a machine with `cpus` vCPUs: to
    /// the page of one of the IMSICs.
    pub fn route_msi(self, message: MsiMessage, cpus: u32) -> Option<Route> {
        let imsics = layout::imsics(cpus);
        let to_imsic = (imsics.base..imsics.end()).contains(&message.address);
        (self == Irqchip::Aia && to_imsic).then_some(Route::Msi {
            address: message.address,
            data: message.data,
            device_id: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board() -> Host {
        let mut host = host::typical();
        host.capabilities
            .retain(|capability| capability.name != host::AIA_IDS);
        host
    }

    #[test]
    fn takes_the_best_that_is_offered() {
        let server = host::typical();
        assert_eq!(Irqchip::choose(None, &server).unwrap(), Irqchip::Aia);
        assert_eq!(
            Irqchip::choose(Some("auto"), &server).unwrap(),
            Irqchip::Aia
        );
        assert_eq!(
            Irqchip::choose(Some("plic"), &server).unwrap(),
            Irqchip::Plic
        );
        assert_eq!(Irqchip::choose(None, &board()).unwrap(), Irqchip::Plic);
    }

    #[test]
    fn names_what_is_offered() {
        let error = Irqchip::choose(Some("aia"), &board())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("--irqchip") && error.contains("offers plic and auto"),
            "{error}"
        );
        let error = Irqchip::choose(Some("gicv3"), &host::typical()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("there is no gicv3"), "{error}");
        assert!(error.contains("aia, plic and auto"), "{error}");
    }

    #[test]
    fn messages_lead_to_the_imsics_of_the_vcpus() {
        let send = |irqchip: Irqchip, address| {
            let message = MsiMessage {
                address,
                data: 7,
                device_id: 8,
            };
            irqchip.route_msi(message, 2)
        };
        let second = layout::IMSICS + 0x1000;
        let route = Route::Msi {
            address: second,
            data: 7,
            device_id: None,
        };
        assert_eq!(send(Irqchip::Aia, second), Some(route));
        assert_eq!(send(Irqchip::Plic, second), None);
        assert_eq!(send(Irqchip::Aia, layout::IMSICS + 0x2000), None);
        assert_eq!(send(Irqchip::Aia, layout::IMSICS - 4), None);
        assert_eq!(send(Irqchip::Aia, u64::MAX), None);
    }

    #[test]
    fn wires_are_sources_from_one() {
        let routes = Irqchip::Aia.wire_routes();
        assert_eq!(routes[0], (1, Route::Irqchip { chip: 0, pin: 1 }));
        assert_eq!(routes.len(), layout::WIRES as usize);
        assert!(Irqchip::Plic.wire_routes().is_empty());
    }
}
