//! Which Generic Interrupt Controller the machine has, and how interrupts reach
//! it through KVM (Documentation/virt/kvm/devices/arm-vgic{,-v3,-its}.rst).

use crossvisor_devices::irq::MsiMessage;
use crossvisor_vmm::arch::Host;
use crossvisor_vmm::error::{Error, Result};
use crossvisor_vmm::hv::Route;

use super::layout;
use crate::shared::choice::{Kind, choose};

/// An interrupt controller of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gic {
    /// GICv2: wires only.
    V2,
    /// GICv2 with a v2m frame, which turns messages into shared interrupts.
    V2m,
    /// GICv3: wires only.
    V3,
    /// GICv3 with an Interrupt Translation Service for messages.
    V3Its,
}

/// A GICv2 addresses its CPUs by the bits of a byte (GICv2 architecture
/// specification, GICD_ITARGETSR).
pub const V2_MAX_VCPUS: u32 = 8;

/// KVM's VGIC_V3_MAX_CPUS (include/kvm/arm_vgic.h).
pub const V3_MAX_VCPUS: u32 = 512;

/// The first shared peripheral interrupt's INTID; those below are private to a
/// CPU (GIC architecture specification, "INTIDs").
pub const SPI_BASE: u32 = 32;

/// What KVM calls the number of interrupts: the private and the shared ones, a
/// multiple of 32.
const IRQS_WITHOUT_V2M: u32 = SPI_BASE + layout::WIRES;
const IRQS_WITH_V2M: u32 = IRQS_WITHOUT_V2M + layout::V2M_SPIS;

/// Register in a v2m frame that a message is written to (Server Base System
/// Architecture, appendix "GICv2m", MSI_SETSPI_NS).
pub const V2M_SETSPI: u64 = 0x40;

/// Register in the ITS's second 64 KiB frame that a message is written to (GIC
/// architecture specification, GITS_TRANSLATER).
pub const ITS_TRANSLATER: u64 = 0x1_0040;

impl Gic {
    /// All, the preferred first.
    pub const ALL: [Gic; 4] = [Gic::V3Its, Gic::V3, Gic::V2m, Gic::V2];

    /// The name that `--irqchip` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Gic::V2 => "gicv2",
            Gic::V2m => "gicv2m",
            Gic::V3 => "gicv3",
            Gic::V3Its => "gicv3-its",
        }
    }

    /// Whether it is a GICv3.
    pub const fn is_v3(self) -> bool {
        matches!(self, Gic::V3 | Gic::V3Its)
    }

    /// Whether devices can send messages to it.
    pub const fn has_msi(self) -> bool {
        matches!(self, Gic::V2m | Gic::V3Its)
    }

    /// The most vCPUs that it serves on `host`.
    pub fn max_vcpus(self, host: &Host) -> u32 {
        let limit = match self.is_v3() {
            true => V3_MAX_VCPUS,
            false => V2_MAX_VCPUS,
        };
        limit.min(host.max_vcpus)
    }

    /// Whether `host` offers it.
    pub fn is_offered(self, host: &Host) -> bool {
        // A message reaches a device's irqfd through the routing table.
        let messages = host.has("KVM_CAP_IRQFD") && host.has("KVM_CAP_IRQ_ROUTING");
        match self {
            Gic::V2 => host.has("gicv2"),
            Gic::V2m => host.has("gicv2") && messages,
            Gic::V3 => host.has("gicv3"),
            Gic::V3Its => host.has("gicv3") && host.has("gicv3-its") && messages,
        }
    }

    /// The controller for `--irqchip` `name`; `None` or `auto` takes the best
    /// that `host` offers.
    ///
    /// # Errors
    /// The name is unknown or the host does not offer it; says what it offers.
    pub fn choose(name: Option<&str>, host: &Host) -> Result<Gic> {
        let known = Gic::ALL.map(|gic| Kind::new(gic.name(), gic, gic.is_offered(host)));
        choose("--irqchip", name, &known)?.ok_or_else(|| Error::Capability {
            capability: "interrupt controller for guests (GICv2 or GICv3)".into(),
            advice: "its own interrupt controller lacks the virtualization extensions, or the \
                     firmware does not describe them"
                .into(),
        })
    }

    /// How many interrupts the controller has, private ones included.
    pub const fn irqs(self) -> u32 {
        match self {
            Gic::V2m => IRQS_WITH_V2M,
            _ => IRQS_WITHOUT_V2M,
        }
    }

    /// Where a message of a device leads.
    pub fn route_msi(self, message: MsiMessage) -> Option<Route> {
        match self {
            Gic::V3Its => {
                let doorbell = layout::ITS.base + ITS_TRANSLATER;
                (message.address == doorbell).then_some(Route::Msi {
                    address: message.address,
                    data: message.data,
                    device_id: Some(message.device_id),
                })
            }
            Gic::V2m => {
                let doorbell = layout::V2M.base + V2M_SETSPI;
                let pin = message.data.checked_sub(SPI_BASE)?;
                let own = layout::V2M_FIRST_SPI..layout::V2M_FIRST_SPI + layout::V2M_SPIS;
                (message.address == doorbell && own.contains(&pin))
                    .then_some(Route::Irqchip { chip: 0, pin })
            }
            Gic::V2 | Gic::V3 => None,
        }
    }
}

/// KVM_ARM_IRQ_TYPE_SPI in its place in KVM_IRQ_LINE's number (KVM API,
/// section 4.25).
const IRQ_LINE_SPI: u32 = 1 << 24;

/// KVM_IRQ_LINE's number for the wire `gsi`, which is shared interrupt `gsi`.
pub fn irq_line(gsi: u32) -> u32 {
    IRQ_LINE_SPI | (gsi + SPI_BASE)
}

/// The routes of the wires: GSI n is shared interrupt n.
pub fn wire_routes() -> Vec<(u32, Route)> {
    (0..layout::WIRES)
        .map(|gsi| (gsi, Route::Irqchip { chip: 0, pin: gsi }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::host;
    use super::*;

    fn host_with(names: &[&str]) -> Host {
        let mut host = host::typical();
        for capability in &mut host.capabilities {
            if capability.name.starts_with("gic") {
                capability.value = i64::from(names.contains(&capability.name));
            }
        }
        host
    }

    #[test]
    fn takes_the_best_that_is_offered() {
        let both = host_with(&["gicv2", "gicv3", "gicv3-its"]);
        assert_eq!(Gic::choose(None, &both).unwrap(), Gic::V3Its);
        assert_eq!(Gic::choose(Some("auto"), &both).unwrap(), Gic::V3Its);
        let board = host_with(&["gicv2"]);
        assert_eq!(Gic::choose(None, &board).unwrap(), Gic::V2m);
        let no_its = host_with(&["gicv3"]);
        assert_eq!(Gic::choose(None, &no_its).unwrap(), Gic::V3);
        for gic in Gic::ALL {
            assert_eq!(Gic::choose(Some(gic.name()), &both).unwrap(), gic);
        }
    }

    #[test]
    fn names_what_is_offered() {
        let board = host_with(&["gicv2"]);
        for name in ["gicv3", "gicv3-its"] {
            let error = Gic::choose(Some(name), &board).unwrap_err().to_string();
            assert!(error.contains("--irqchip"), "{error}");
            assert!(error.contains(name), "{error}");
            assert!(error.contains("offers gicv2m, gicv2 and auto"), "{error}");
        }
        let error = Gic::choose(Some("apic"), &board).unwrap_err().to_string();
        assert!(error.contains("there is no apic"), "{error}");
        let error = Gic::choose(None, &host_with(&[])).unwrap_err();
        assert!(matches!(error, Error::Capability { .. }), "{error}");
    }

    #[test]
    fn without_routing_there_are_no_messages() {
        let mut host = host_with(&["gicv2", "gicv3", "gicv3-its"]);
        for capability in &mut host.capabilities {
            if capability.name == "KVM_CAP_IRQ_ROUTING" {
                capability.value = 0;
            }
        }
        assert_eq!(Gic::choose(None, &host).unwrap(), Gic::V3);
        assert!(Gic::choose(Some("gicv2m"), &host).is_err());
    }

    #[test]
    fn the_its_sees_who_sends() {
        let message = MsiMessage {
            address: layout::ITS.base + 0x1_0040,
            data: 3,
            device_id: 0x18,
        };
        let route = Route::Msi {
            address: message.address,
            data: 3,
            device_id: Some(0x18),
        };
        assert_eq!(Gic::V3Its.route_msi(message), Some(route));
        assert_eq!(Gic::V3.route_msi(message), None);
        let elsewhere = MsiMessage {
            address: layout::V2M.base + V2M_SETSPI,
            ..message
        };
        assert_eq!(Gic::V3Its.route_msi(elsewhere), None);
    }

    #[test]
    fn v2m_messages_are_shared_interrupts_of_the_frame() {
        let send = |address, data| {
            Gic::V2m.route_msi(MsiMessage {
                address,
                data,
                device_id: 8,
            })
        };
        let doorbell = layout::V2M.base + 0x40;
        let first = SPI_BASE + layout::V2M_FIRST_SPI;
        let pin = layout::V2M_FIRST_SPI;
        assert_eq!(send(doorbell, first), Some(Route::Irqchip { chip: 0, pin }));
        // Not the doorbell; a wire's interrupt; a private one; beyond the end.
        assert_eq!(send(doorbell + 4, first), None);
        assert_eq!(send(doorbell, first - 1), None);
        assert_eq!(send(doorbell, 27), None);
        assert_eq!(send(doorbell, Gic::V2m.irqs()), None);
        assert_eq!(send(doorbell, u32::MAX), None);
        assert!(send(doorbell, Gic::V2m.irqs() - 1).is_some());
    }

    #[test]
    fn interrupt_counts_are_what_kvm_takes() {
        // KVM_DEV_ARM_VGIC_GRP_NR_IRQS: 64 to 1024, in steps of 32.
        for gic in Gic::ALL {
            let irqs = gic.irqs();
            assert!((64..=1024).contains(&irqs) && irqs % 32 == 0, "{irqs}");
        }
        assert_eq!(irq_line(4), 0x0100_0024);
        assert_eq!(wire_routes().len(), layout::WIRES as usize);
    }
}
