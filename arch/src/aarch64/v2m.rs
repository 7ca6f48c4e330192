//! The register page of a GICv2m frame (Server Base System Architecture,
//! appendix "GICv2m architecture").
//!
//! Drivers read from it which shared interrupts are for messages. Messages
//! themselves never arrive here: a device's message is a route of KVM's.

use crossvisor_devices::bus::BusDevice;

use super::gic::SPI_BASE;
use super::layout::{V2M_FIRST_SPI, V2M_SPIS};

/// First INTID in bits 25 to 16, number of them in bits 9 to 0.
const MSI_TYPER: u64 = 0x008;
/// Implementer and product; nobody's.
const MSI_IIDR: u64 = 0xfcc;

/// A GICv2m frame; it has no state.
#[derive(Debug)]
pub struct V2mFrame;

impl BusDevice for V2mFrame {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            MSI_TYPER => (SPI_BASE + V2M_FIRST_SPI) << 16 | V2M_SPIS,
            MSI_IIDR => 0,
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_which_interrupts_are_for_messages() {
        let mut typer = [0xff; 4];
        V2mFrame.read(8, &mut typer);
        let typer = u32::from_le_bytes(typer);
        assert_eq!(typer >> 16 & 0x3ff, 128);
        assert_eq!(typer & 0x3ff, 384);
        let mut iidr = [0xff; 4];
        V2mFrame.read(0xfcc, &mut iidr);
        assert_eq!(iidr, [0; 4]);
    }

    #[test]
    fn survives_odd_accesses() {
        V2mFrame.write(0x40, &[1, 2, 3, 4]);
        let mut wide = [0xff; 8];
        V2mFrame.read(u64::MAX, &mut wide);
        assert_eq!(wide, [0; 8]);
        let mut narrow = [0xff; 1];
        V2mFrame.read(8, &mut narrow);
        assert_eq!(narrow, [0x80]);
    }
}
