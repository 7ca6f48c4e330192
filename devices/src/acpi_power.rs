//! The power interface of an ACPI hardware-reduced machine: sleep registers,
//! the reset register, and the event register behind a Generic Event Device.
//!
//! The table writer places the block anywhere in a port or memory space and
//! builds from the offsets here: the FADT's SLEEP_CONTROL_REG,
//! SLEEP_STATUS_REG and RESET_REG (ACPI 6.5, section 5.2.9) with RESET_VALUE,
//! `\_S5` as a package that starts with [`SLEEP_TYPE_S5`], and a GED
//! (section 5.6.9) whose `_EVT` method reads the byte [`GED_EVENT`], which
//! clears it, and notifies the power button (value 0x80) when
//! [`EVENT_POWER_BUTTON`] was set.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::Callback;
use crate::bus::BusDevice;
use crate::irq::IrqLine;

/// Size of the block in bytes.
pub const SIZE: u64 = 8;

/// Sleep control register (8 bits, ACPI 6.5, section 4.8.3.7): SLP_TYP in bits
/// 2 to 4, SLP_EN in bit 5.
pub const SLEEP_CONTROL: u64 = 0;
/// Sleep status register (8 bits): WAK_STS in bit 7.
pub const SLEEP_STATUS: u64 = 1;
/// Reset register (8 bits, section 4.8.3.6): [`RESET_VALUE`] resets.
pub const RESET: u64 = 2;
/// Pending events (8 bits); a read clears them.
pub const GED_EVENT: u64 = 4;

/// The value that resets the machine when written to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// The SLP_TYP that means S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Bit in [`GED_EVENT`]: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;

const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0x7;
const SLP_EN: u8 = 1 << 5;

/// The register block; see the module's documentation for its layout.
pub struct AcpiPower {
    events: AtomicU8,
    irq: Arc<dyn IrqLine>,
    power_off: Callback,
    reset: Callback,
}

impl AcpiPower {
    /// A block that raises `irq`, an edge-triggered wire named in the GED's
    /// `_CRS`, for events, and calls `power_off` or `reset` on the vCPU thread
    /// that asks.
    pub fn new(irq: Arc<dyn IrqLine>, power_off: Callback, reset: Callback) -> Self {
        Self {
            events: AtomicU8::new(0),
            irq,
            power_off,
            reset,
        }
    }

    /// Tells the guest that its power button was pressed.
    pub fn press_power_button(&self) {
        self.events.fetch_or(EVENT_POWER_BUTTON, Ordering::SeqCst);
        if let Err(error) = self.irq.set(true).and_then(|()| self.irq.set(false)) {
            log::warn!("cannot raise the guest's power button event: {error}");
        }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in (0..).zip(data) {
            *byte = match offset.wrapping_add(i) {
                GED_EVENT => self.events.swap(0, Ordering::SeqCst),
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Each register is a byte wide, and so is each access to it.
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL
                if value & SLP_EN != 0
                    && value >> SLP_TYP_SHIFT & SLP_TYP_MASK == SLEEP_TYPE_S5 =>
            {
                (self.power_off)();
            }
            RESET if value == RESET_VALUE => (self.reset)(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Wire;
    use std::sync::atomic::AtomicU32;

    fn counter() -> (Arc<AtomicU32>, Callback) {
        let count = Arc::new(AtomicU32::new(0));
        let inner = Arc::clone(&count);
        let callback = move || {
            inner.fetch_add(1, Ordering::SeqCst);
        };
        (count, Arc::new(callback))
    }

    #[test]
    fn only_s5_with_enable_powers_off() {
        let (offs, off) = counter();
        let (resets, reset) = counter();
        let device = AcpiPower::new(Arc::new(Wire::default()), off, reset);
        device.write(SLEEP_CONTROL, &[SLEEP_TYPE_S5 << 2]);
        device.write(SLEEP_CONTROL, &[3 << 2 | 1 << 5]);
        device.write(SLEEP_CONTROL, &[SLEEP_TYPE_S5 << 2 | 1 << 5, 1, 1]);
        device.write(SLEEP_STATUS, &[0x80]);
        assert_eq!(offs.load(Ordering::SeqCst), 0);
        device.write(SLEEP_CONTROL, &[SLEEP_TYPE_S5 << 2 | 1 << 5]);
        assert_eq!(offs.load(Ordering::SeqCst), 1);
        device.write(RESET, &[0]);
        assert_eq!(resets.load(Ordering::SeqCst), 0);
        device.write(RESET, &[RESET_VALUE]);
        assert_eq!(resets.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_button_press_is_one_edge_and_one_bit() {
        let wire = Arc::new(Wire::default());
        let device = AcpiPower::new(wire.clone(), Arc::new(|| ()), Arc::new(|| ()));
        device.press_power_button();
        assert_eq!(wire.edges(), 1);
        assert!(!wire.level());
        let mut event = [0; 4];
        device.read(GED_EVENT, &mut event);
        assert_eq!(event, [EVENT_POWER_BUTTON, 0, 0, 0]);
        device.read(GED_EVENT, &mut event);
        assert_eq!(event, [0; 4]);
        device.read(u64::MAX - 1, &mut event);
    }
}
