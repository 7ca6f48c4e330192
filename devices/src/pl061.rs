//! The Arm PrimeCell PL061 GPIO controller, whose line 3 is the machine's
//! power key.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::bus::BusDevice;
use crate::irq::IrqLine;

/// The input line of the power key: high while pressed.
pub const POWER_KEY_LINE: u8 = 3;

/// How long a press lasts: longer than drivers debounce.
const PRESS_TIME: Duration = Duration::from_millis(100);

// Registers, from the PL061 technical reference manual, chapter 3.
/// Data, whose address bits 2 to 9 choose the lines that the access is for.
const DATA_END: u64 = 0x400;
const DIR: u64 = 0x400;
const IS: u64 = 0x404;
const IBE: u64 = 0x408;
const IEV: u64 = 0x40c;
const IE: u64 = 0x410;
const RIS: u64 = 0x414;
const MIS: u64 = 0x418;
const IC: u64 = 0x41c;
const AFSEL: u64 = 0x420;
const ID: u64 = 0xfe0;
const IDS: [u8; 8] = [0x61, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// A PL061 with eight lines; it takes 4 KiB.
pub struct Pl061 {
    state: Mutex<State>,
    irq: Arc<dyn IrqLine>,
}

/// One bit per line in each field.
#[derive(Default)]
struct State {
    /// What drives the lines from outside.
    input: u8,
    /// What the guest drives them to.
    output: u8,
    /// Set: the guest drives the line.
    direction: u8,
    /// Set: interrupts by level, else by edge.
    level_sense: u8,
    both_edges: u8,
    /// Set: high level or rising edge, else low level or falling edge.
    high: u8,
    enabled: u8,
    /// Edges seen and not cleared.
    latched: u8,
    alternate: u8,
    asserted: bool,
}

impl State {
    fn lines(&self) -> u8 {
        self.output & self.direction | self.input & !self.direction
    }

    fn raw_status(&self) -> u8 {
        let level = !(self.lines() ^ self.high);
        self.latched & !self.level_sense | level & self.level_sense
    }

    /// Latches the edges between `before` and now.
    fn latch(&mut self, before: u8) {
        let now = self.lines();
        let rising = now & !before;
        let falling = before & !now;
        let edges = self.both_edges & (rising | falling)
            | !self.both_edges & (self.high & rising | !self.high & falling);
        self.latched |= edges & !self.level_sense;
    }
}

impl Pl061 {
    /// A controller that interrupts through `irq`, with all lines low.
    pub fn new(irq: Arc<dyn IrqLine>) -> Self {
        Self {
            state: Mutex::default(),
            irq,
        }
    }

    /// Drives input `line` (0 to 7) from outside.
    pub fn set_input(&self, line: u8, high: bool) {
        let Some(bit) = 1u8.checked_shl(line.into()) else {
            return;
        };
        let mut state = self.lock();
        let before = state.lines();
        if high {
            state.input |= bit;
        } else {
            state.input &= !bit;
        }
        state.latch(before);
        self.update_irq(&mut state);
    }

    /// Presses the power key, and lets go of it a tenth of a second later.
    ///
    /// # Errors
    /// The thread that lets go could not be started; the key is not pressed.
    pub fn press_power_button(self: &Arc<Self>) -> io::Result<()> {
        let device = Arc::clone(self);
        thread::Builder::new()
            .name("power-key".to_owned())
            .spawn(move || {
                device.set_input(POWER_KEY_LINE, true);
                thread::sleep(PRESS_TIME);
                device.set_input(POWER_KEY_LINE, false);
            })?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update_irq(&self, state: &mut State) {
        let pending = state.raw_status() & state.enabled != 0;
        if pending != state.asserted {
            state.asserted = pending;
            if let Err(error) = self.irq.set(pending) {
                log::warn!("gpio: cannot drive the interrupt: {error}");
            }
        }
    }
}

impl BusDevice for Pl061 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(byte) = data.first_mut() else { return };
        let state = self.lock();
        *byte = match offset {
            0..DATA_END => state.lines() & (offset >> 2) as u8,
            DIR => state.direction,
            IS => state.level_sense,
            IBE => state.both_edges,
            IEV => state.high,
            IE => state.enabled,
            RIS => state.raw_status(),
            MIS => state.raw_status() & state.enabled,
            AFSEL => state.alternate,
            ID.. => usize::try_from((offset - ID) / 4)
                .ok()
                .and_then(|index| IDS.get(index))
                .copied()
                .unwrap_or(0),
            _ => 0,
        };
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.lock();
        let before = state.lines();
        match offset {
            0..DATA_END => {
                let mask = (offset >> 2) as u8;
                state.output = state.output & !mask | value & mask;
            }
            DIR => state.direction = value,
            IS => state.level_sense = value,
            IBE => state.both_edges = value,
            IEV => state.high = value,
            IE => state.enabled = value,
            IC => state.latched &= !value,
            AFSEL => state.alternate = value,
            _ => {}
        }
        state.latch(before);
        self.update_irq(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Wire;

    const KEY: u8 = 1 << POWER_KEY_LINE;

    fn read(device: &Pl061, offset: u64) -> u8 {
        let mut data = [0; 4];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn the_key_interrupts_on_both_edges_as_gpio_keys_sets_it_up() {
        let wire = Arc::new(Wire::default());
        let device = Pl061::new(wire.clone());
        device.write(IBE, &[KEY, 0, 0, 0]);
        device.write(IE, &[KEY, 0, 0, 0]);
        device.set_input(POWER_KEY_LINE, true);
        assert!(wire.level());
        assert_eq!(read(&device, MIS), KEY);
        assert_eq!(read(&device, u64::from(KEY) << 2), KEY);
        assert_eq!(read(&device, 1 << 2), 0, "other lines are masked off");
        device.write(IC, &[KEY]);
        assert!(!wire.level());
        device.set_input(POWER_KEY_LINE, false);
        assert_eq!(wire.edges(), 2);
    }

    #[test]
    fn level_sense_follows_the_line() {
        let wire = Arc::new(Wire::default());
        let device = Pl061::new(wire.clone());
        device.write(IS, &[KEY]);
        device.write(IEV, &[KEY]);
        device.write(IE, &[KEY]);
        device.set_input(POWER_KEY_LINE, true);
        device.write(IC, &[KEY]);
        assert!(wire.level(), "a level cannot be cleared");
        device.set_input(POWER_KEY_LINE, false);
        assert!(!wire.level());
    }

    #[test]
    fn a_press_is_released_again() {
        let device = Arc::new(Pl061::new(Arc::new(Wire::default())));
        device.write(IBE, &[KEY]);
        device.press_power_button().unwrap();
        let wait_for = |status| {
            for _ in 0..500 {
                if read(&device, u64::from(KEY) << 2) == status {
                    return true;
                }
                thread::sleep(Duration::from_millis(10));
            }
            false
        };
        assert!(wait_for(KEY));
        assert!(wait_for(0));
        assert_eq!(read(&device, RIS), KEY);
    }

    #[test]
    fn identifies_itself_and_survives_any_access() {
        let device = Pl061::new(Arc::new(Wire::default()));
        assert_eq!(read(&device, ID), 0x61);
        assert_eq!(read(&device, ID + 28), 0xb1);
        for offset in (0..0x1010).chain([u64::MAX]) {
            device.write(offset, &[0xff; 8]);
            device.read(offset, &mut [0; 8]);
        }
        device.set_input(200, true);
        device.read(0, &mut []);
        device.write(0, &[]);
    }
}
