//! A 16550A UART, as PCs and many boards have it.
//!
//! Registers and bits follow the National Semiconductor PC16550D data sheet.
//! It is a model of our own because the interrupt is a level here: it serves
//! level-triggered wires, and input typed before the driver enabled interrupts
//! raises one when it does.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::chardev::ConsoleInput;
use crate::irq::IrqLine;
use crate::output::Output;

/// Number of registers.
pub const REGISTERS: u64 = 8;

/// How long a vCPU waits for a full output buffer before bytes are dropped.
const PATIENCE: Duration = Duration::from_secs(1);
/// Input that the device holds, beyond the 16 bytes of the real FIFO.
const RX_CAPACITY: usize = 256;

// Registers by offset; the first two are the divisor while LCR.DLAB is set.
const DATA: u64 = 0;
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_RX: u8 = 1 << 0;
const IER_THRE: u8 = 1 << 1;
const IER_MASK: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_THRE: u8 = 0x02;
const IIR_RX: u8 = 0x04;
const IIR_FIFO_ON: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_MASK: u8 = 0x1f;
const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA: u8 = 1 << 0;
const LSR_THR_EMPTY: u8 = 1 << 5;
const LSR_IDLE: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// Divisor of 9600 baud from the usual 1.8432 MHz clock.
const RESET_DIVISOR: u16 = 12;

/// A 16550A UART with an input that never overruns and an output that goes to
/// a thread of its own.
pub struct Serial {
    state: Mutex<State>,
    output: Arc<Output>,
    room: EventFd,
    irq: Arc<dyn IrqLine>,
    shift: u8,
}

struct State {
    rx: VecDeque<u8>,
    /// A pusher found the input full and waits for the event.
    starved: bool,
    /// The transmitter became empty and the driver has not been told.
    thre_pending: bool,
    asserted: bool,
    fifo_on: bool,
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
}

impl State {
    /// Interrupt identification without the FIFO bits, by priority.
    fn interrupt(&self) -> u8 {
        if self.ier & IER_RX != 0 && !self.rx.is_empty() {
            IIR_RX
        } else if self.ier & IER_THRE != 0 && self.thre_pending {
            IIR_THRE
        } else {
            IIR_NONE
        }
    }

    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ]
        .iter()
        .filter(|(control, _)| self.mcr & control != 0)
        .fold(0, |status, (_, bit)| status | bit)
    }
}

impl Serial {
    /// A UART that interrupts through `irq` and prints to `output`. Its
    /// registers are `1 << shift` bytes apart.
    ///
    /// # Errors
    /// An event could not be made.
    pub fn new(irq: Arc<dyn IrqLine>, output: Arc<Output>, shift: u8) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                rx: VecDeque::with_capacity(RX_CAPACITY),
                starved: false,
                thre_pending: false,
                asserted: false,
                fifo_on: false,
                ier: 0,
                lcr: 0x03,
                mcr: MCR_OUT2,
                scratch: 0,
                divisor: RESET_DIVISOR,
            }),
            output,
            room: EventFd::new(EFD_NONBLOCK)?,
            irq,
            shift,
        })
    }

    /// Waits up to `timeout` until the host has taken all output, and returns
    /// whether it did.
    pub fn flush(&self, timeout: Duration) -> bool {
        self.output.flush(timeout)
    }

    /// Prints past the registers: what firmware prints at the same line.
    pub fn print(&self, bytes: &[u8]) {
        self.output.push_all(bytes, PATIENCE);
    }

    /// Takes up to `most` bytes of the input past the registers: what firmware
    /// reads from the same line.
    pub fn take(&self, most: usize) -> Vec<u8> {
        let mut state = self.lock();
        let count = most.min(state.rx.len());
        let bytes = state.rx.drain(..count).collect();
        self.make_room(&mut state);
        self.update_irq(&mut state);
        bytes
    }

    /// Tells a pusher that found the input full when it no longer is.
    fn make_room(&self, state: &mut State) {
        if state.starved && state.rx.len() <= RX_CAPACITY / 2 {
            state.starved = false;
            // Fails only when the event is signalled already.
            let _ = self.room.write(1);
        }
    }

    /// Bytes of output that the host did not take.
    pub fn lost(&self) -> u64 {
        self.output.lost()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The register at `offset`, unless the access falls between registers.
    fn register(&self, offset: u64) -> Option<u64> {
        let register = offset.checked_shr(self.shift.into())?;
        (register < REGISTERS && register << self.shift == offset).then_some(register)
    }

    /// Drives the wire to what the registers say.
    fn update_irq(&self, state: &mut State) {
        let pending = state.interrupt() != IIR_NONE;
        if pending != state.asserted {
            state.asserted = pending;
            if let Err(error) = self.irq.set(pending) {
                log::warn!("serial: cannot drive the interrupt: {error}");
            }
        }
    }

    fn read_register(&self, state: &mut State, register: u64) -> u8 {
        let dlab = state.lcr & LCR_DLAB != 0;
        let [divisor_low, divisor_high] = state.divisor.to_le_bytes();
        match register {
            DATA if dlab => divisor_low,
            IER if dlab => divisor_high,
            DATA => {
                let byte = state.rx.pop_front().unwrap_or(0);
                self.make_room(state);
                byte
            }
            IER => state.ier,
            IIR_FCR => {
                let interrupt = state.interrupt();
                if interrupt == IIR_THRE {
                    state.thre_pending = false;
                }
                let fifo = if state.fifo_on { IIR_FIFO_ON } else { 0 };
                interrupt | fifo
            }
            LCR => state.lcr,
            MCR => state.mcr,
            LSR => {
                let data = if state.rx.is_empty() { 0 } else { LSR_DATA };
                data | LSR_THR_EMPTY | LSR_IDLE
            }
            MSR => state.modem_status(),
            SCR => state.scratch,
            _ => 0,
        }
    }

    fn write_register(&self, state: &mut State, register: u64, value: u8) {
        let dlab = state.lcr & LCR_DLAB != 0;
        let [divisor_low, divisor_high] = state.divisor.to_le_bytes();
        match register {
            DATA if dlab => state.divisor = u16::from_le_bytes([value, divisor_high]),
            IER if dlab => state.divisor = u16::from_le_bytes([divisor_low, value]),
            DATA => {
                if state.mcr & MCR_LOOP != 0 {
                    if state.rx.len() < RX_CAPACITY {
                        state.rx.push_back(value);
                    }
                } else {
                    self.output.push_all(&[value], PATIENCE);
                }
                state.thre_pending = true;
            }
            IER => {
                let value = value & IER_MASK;
                // Enabling the interrupt while the transmitter is empty raises it.
                if value & !state.ier & IER_THRE != 0 {
                    state.thre_pending = true;
                }
                state.ier = value;
            }
            IIR_FCR => {
                state.fifo_on = value & FCR_ENABLE != 0;
                // Typed input is kept over the driver's start, which clears the
                // FIFO: what the user typed ahead must not be lost. Loopback
                // bytes are the driver's own.
                if value & FCR_CLEAR_RX != 0 && state.mcr & MCR_LOOP != 0 {
                    state.rx.clear();
                }
            }
            LCR => state.lcr = value,
            MCR => state.mcr = value & MCR_MASK,
            SCR => state.scratch = value,
            _ => {}
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (Some(register), Some(byte)) = (self.register(offset), data.first_mut()) else {
            return;
        };
        let mut state = self.lock();
        *byte = self.read_register(&mut state, register);
        self.update_irq(&mut state);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Some(register), Some(&value)) = (self.register(offset), data.first()) else {
            return;
        };
        let mut state = self.lock();
        self.write_register(&mut state, register, value);
        self.update_irq(&mut state);
    }
}

impl ConsoleInput for Serial {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = bytes.len().min(RX_CAPACITY.saturating_sub(state.rx.len()));
        state.rx.extend(bytes.iter().take(taken));
        if taken < bytes.len() {
            state.starved = true;
        }
        self.update_irq(&mut state);
        taken
    }

    fn room(&self) -> &EventFd {
        &self.room
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::tests::{Captured, output};
    use crate::testing::Wire;

    struct Setup {
        serial: Serial,
        wire: Arc<Wire>,
        sink: Captured,
    }

    fn setup(shift: u8) -> Setup {
        let wire = Arc::new(Wire::default());
        let sink = Captured::default();
        let serial = Serial::new(wire.clone(), output(&sink), shift).unwrap();
        Setup { serial, wire, sink }
    }

    fn read(serial: &Serial, register: u64) -> u8 {
        let mut byte = [0];
        serial.read(register, &mut byte);
        byte[0]
    }

    #[test]
    fn prints_what_is_written_and_says_so() {
        let s = setup(0);
        s.serial.write(IER, &[IER_THRE]);
        assert!(s.wire.level(), "the transmitter is empty from the start");
        assert_eq!(read(&s.serial, IIR_FCR) & 0x0f, IIR_THRE);
        assert!(!s.wire.level(), "reading IIR acknowledges");
        for byte in b"hello" {
            s.serial.write(DATA, &[*byte]);
        }
        assert!(s.wire.level());
        assert!(s.serial.flush(Duration::from_secs(10)));
        assert_eq!(s.sink.bytes(), b"hello");
        assert_eq!(s.serial.lost(), 0);
    }

    #[test]
    fn input_typed_before_the_driver_started_interrupts_it_then() {
        let s = setup(0);
        assert_eq!(s.serial.push(b"ab"), 2);
        assert!(!s.wire.level());
        s.serial.write(IIR_FCR, &[FCR_ENABLE | FCR_CLEAR_RX]);
        s.serial.write(IER, &[IER_RX]);
        assert!(s.wire.level());
        assert_eq!(read(&s.serial, IIR_FCR), IIR_FIFO_ON | IIR_RX);
        assert_eq!(read(&s.serial, LSR) & LSR_DATA, LSR_DATA);
        assert_eq!(read(&s.serial, DATA), b'a');
        assert!(s.wire.level(), "a level lasts until the last byte");
        assert_eq!(read(&s.serial, DATA), b'b');
        assert!(!s.wire.level());
        assert_eq!(read(&s.serial, LSR) & LSR_DATA, 0);
    }

    #[test]
    fn a_full_input_takes_no_more_and_tells_when_it_does() {
        let s = setup(0);
        let typed: Vec<u8> = (0..1000).map(|i| (i % 251) as u8).collect();
        let mut sent = s.serial.push(&typed);
        assert_eq!(sent, RX_CAPACITY);
        assert!(s.serial.room().read().is_err());
        let mut got = Vec::new();
        while got.len() < typed.len() {
            got.push(read(&s.serial, DATA));
            if s.serial.room().read().is_ok() {
                sent += s.serial.push(&typed[sent..]);
            }
        }
        assert_eq!(got, typed);
    }

    #[test]
    fn loopback_and_scratch_identify_a_16550a() {
        let s = setup(0);
        s.serial.write(MCR, &[MCR_LOOP | MCR_OUT2 | MCR_RTS]);
        assert_eq!(read(&s.serial, MSR) & 0xf0, MSR_DCD | MSR_CTS);
        s.serial.write(DATA, &[0x5a]);
        assert_eq!(read(&s.serial, DATA), 0x5a);
        s.serial.write(MCR, &[0]);
        s.serial.write(SCR, &[0xa5]);
        assert_eq!(read(&s.serial, SCR), 0xa5);
        s.serial.write(IIR_FCR, &[FCR_ENABLE]);
        assert_eq!(read(&s.serial, IIR_FCR) & IIR_FIFO_ON, IIR_FIFO_ON);
        s.serial.write(IER, &[0xff]);
        assert_eq!(read(&s.serial, IER), IER_MASK);
        s.serial.write(LCR, &[LCR_DLAB]);
        s.serial.write(DATA, &[1]);
        s.serial.write(IER, &[2]);
        assert_eq!((read(&s.serial, DATA), read(&s.serial, IER)), (1, 2));
        assert!(s.sink.bytes().is_empty());
    }

    #[test]
    fn wide_strides_and_accesses_off_the_registers() {
        let s = setup(2);
        s.serial.write(SCR << 2, &[0x77, 0, 0, 0]);
        assert_eq!(read(&s.serial, SCR << 2), 0x77);
        s.serial.write((SCR << 2) + 1, &[0x11]);
        assert_eq!(read(&s.serial, SCR << 2), 0x77);
        let mut wide = [0xff; 8];
        s.serial.read(u64::MAX, &mut wide);
        assert_eq!(wide, [0; 8]);
        s.serial.write(0, &[]);
    }
}
