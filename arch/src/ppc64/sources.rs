//! The interrupt sources of devices (Linux on Power Architecture Reference,
//! chapter 6, "Interrupt Controller"), the same under an XICS and a XIVE: a
//! source's number is its GSI, for KVM has no routing table here
//! (arch/powerpc/kvm/book3s_xics.c, kvm_irq_map_gsi).
//!
//! Linux keeps numbers below 16 to itself; of a XIVE those below the number of
//! vCPUs interrupt one vCPU from another.

use crossvisor_devices::irq::MsiMessage;
use crossvisor_devices::pci::Bdf;
use crossvisor_vmm::hv::Route;
use crossvisor_vmm::plan::{Plan, Slot};

/// Environmental and power warnings.
pub const EPOW: u32 = 0x1000;
/// The virtual terminal.
pub const VTY: u32 = 0x1001;
/// The four wires of the PCI host bridge.
pub const INTX: [u32; 4] = [0x1010, 0x1011, 0x1012, 0x1013];
/// The first source for messages. KVM keeps sources by the 1024.
pub const FIRST_MSI: u32 = 0x1400;
/// How many sources the device in each PCI slot has for messages: a power of
/// two, as firmware hands them out.
pub const MSIS_PER_SLOT: u16 = 32;

/// Where devices' messages go; the data is the number of the source. Nothing
/// is there to be read or written by a vCPU.
pub const MSI_ADDRESS: u64 = 0x400_0000_0000;

/// How a source interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// By each rising edge, and messages.
    Edge,
    /// While it is asserted.
    Level,
}

impl Trigger {
    /// The second cell of an interrupt specifier (section B.6.9.1.1).
    pub const fn cell(self) -> u32 {
        match self {
            Trigger::Edge => 0,
            Trigger::Level => 1,
        }
    }
}

/// The first source of the device in PCI slot `slot`.
fn first_msi(slot: u8) -> u32 {
    FIRST_MSI + u32::from(slot) * u32::from(MSIS_PER_SLOT)
}

/// The source of message `index` of the device in PCI slot `slot`; none beyond
/// those that a slot has.
pub fn msi(slot: u8, index: u16) -> Option<u32> {
    (index < MSIS_PER_SLOT).then(|| first_msi(slot) + u32::from(index))
}

/// The number after the last that a source of any machine has.
pub const END: u32 = FIRST_MSI + 32 * MSIS_PER_SLOT as u32;

/// Every source of the machine's devices.
pub fn sources(plan: &Plan) -> Vec<(u32, Trigger)> {
    let mut sources = vec![(EPOW, Trigger::Edge), (VTY, Trigger::Edge)];
    sources.extend(INTX.map(|source| (source, Trigger::Level)));
    for device in &plan.devices {
        if let Slot::Pci { device: slot } = device.slot {
            let own = (0..MSIS_PER_SLOT).filter_map(|index| msi(slot, index));
            sources.extend(own.map(|source| (source, Trigger::Edge)));
        }
    }
    sources
}

/// Where a message of a device leads: to one of the sources of its slot.
pub fn route_msi(message: MsiMessage) -> Option<Route> {
    let slot = u8::try_from(message.device_id >> 3).ok()?;
    let first = first_msi(slot);
    let own = first..first + u32::from(MSIS_PER_SLOT);
    (message.address == MSI_ADDRESS && own.contains(&message.data))
        .then_some(Route::Source(message.data))
}

/// The message that firmware gives message `index` of the device at `bdf`.
pub fn message(bdf: Bdf, index: u16) -> Option<MsiMessage> {
    Some(MsiMessage {
        address: MSI_ADDRESS,
        data: msi(bdf.device, index)?,
        device_id: bdf.requester_id().into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BDF: Bdf = Bdf {
        bus: 0,
        device: 3,
        function: 0,
    };

    #[test]
    fn messages_lead_to_the_sources_of_their_own_slot() {
        for index in 0..MSIS_PER_SLOT {
            let message = message(BDF, index).unwrap();
            assert_eq!(route_msi(message), Some(Route::Source(message.data)));
            let other = MsiMessage {
                device_id: 4 << 3,
                ..message
            };
            assert_eq!(route_msi(other), None);
            let elsewhere = MsiMessage {
                address: 0xfee0_0000,
                ..message
            };
            assert_eq!(route_msi(elsewhere), None);
        }
        assert_eq!(message(BDF, MSIS_PER_SLOT), None);
        for device_id in [u32::MAX, 0xffff, 256 << 3] {
            let wild = MsiMessage {
                address: MSI_ADDRESS,
                data: u32::MAX,
                device_id,
            };
            assert_eq!(route_msi(wild), None);
        }
    }

    #[test]
    fn slots_share_no_source() {
        let mut all: Vec<u32> = (0..32)
            .flat_map(|slot| (0..MSIS_PER_SLOT).filter_map(move |index| msi(slot, index)))
            .chain(INTX)
            .chain([EPOW, VTY])
            .collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(all.iter().all(|source| *source < END));
    }
}
