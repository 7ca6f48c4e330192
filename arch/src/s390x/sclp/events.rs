//! Events between SCLP and the guest: masks, what the guest writes, what it
//! reads (Linux `drivers/s390/char/sclp.h`).

use std::collections::VecDeque;

use super::console::{Consoles, INPUT_MAX};
use super::{HEADER, half, put, response};
use crate::s390x::ebcdic;

/// Types of events.
pub(super) mod kind {
    /// A command from the operator: input of the line-mode console.
    pub const OPERATOR_COMMAND: u8 = 0x01;
    /// A message: output of the line-mode console.
    pub const MESSAGE: u8 = 0x02;
    /// Input and output of the VT220 console.
    pub const VT220: u8 = 0x1a;
    /// The request to shut down.
    pub const QUIESCE: u8 = 0x1d;
}

/// The bit of an event's type in a mask.
const fn bit(kind: u8) -> u64 {
    1 << (64 - kind as u32)
}

/// What the guest may send, and what it may receive.
const RECEIVED: u64 = bit(kind::MESSAGE) | bit(kind::VT220);
const SENT: u64 = bit(kind::OPERATOR_COMMAND) | bit(kind::VT220) | bit(kind::QUIESCE);

/// An event buffer's header: length, type, flags, reserved.
pub(super) const EVENT_HEADER: usize = 6;
/// Flag: the event has been dealt with.
const PROCESSED: u8 = 0x80;

/// VT220 data follows (Linux `drivers/s390/char/sclp_vt220.c`,
/// `SCLP_VT220_SESSION_DATA`); 1 would end the session.
const SESSION_DATA: u8 = 0;

/// The most bytes of text in an operator's command: lengths in it are of one
/// byte.
const LINE_MAX: usize = 240;

/// Which events the guest listens to, and which wait for it.
#[derive(Default)]
pub(super) struct State {
    /// What the guest receives.
    listens: u64,
    /// What the user typed.
    input: VecDeque<u8>,
    quiesce: bool,
    /// A push found no room.
    starved: bool,
}

impl State {
    pub fn quiesce(&mut self) {
        self.quiesce = true;
    }

    /// Takes what the user types, as far as there is room.
    pub fn type_in(&mut self, bytes: &[u8]) -> usize {
        let room = INPUT_MAX.saturating_sub(self.input.len());
        let taken = bytes.len().min(room);
        self.input.extend(bytes.iter().take(taken));
        self.starved |= taken < bytes.len();
        taken
    }

    /// Whether somebody waits for room, and there is some.
    pub fn has_room(&mut self) -> bool {
        self.input.len() < INPUT_MAX && std::mem::take(&mut self.starved)
    }

    fn listens_to(&self, kind: u8) -> bool {
        self.listens & bit(kind) != 0
    }

    /// The line that was typed: how many bytes, and how many with what ends it.
    /// Nobody waits for the end of one that is as long as a line can be.
    fn line(&self) -> Option<(usize, usize)> {
        let mut start = self.input.iter().take(LINE_MAX + 1);
        match start.position(|byte| matches!(byte, b'\r' | b'\n')) {
            Some(end) => Some((end, end + 1)),
            None if self.input.len() > LINE_MAX => Some((LINE_MAX, LINE_MAX)),
            None => None,
        }
    }

    /// Input goes to the VT220 console where the guest has one open, and
    /// otherwise to the line-mode console, by whole lines.
    fn input_kind(&self) -> Option<u8> {
        if self.input.is_empty() {
            None
        } else if self.listens_to(kind::VT220) {
            Some(kind::VT220)
        } else if self.listens_to(kind::OPERATOR_COMMAND) && self.line().is_some() {
            Some(kind::OPERATOR_COMMAND)
        } else {
            None
        }
    }

    /// Whether there is something that the guest listens to.
    pub fn has_events(&self) -> bool {
        self.quiesce && self.listens_to(kind::QUIESCE) || self.input_kind().is_some()
    }

    /// Write event mask: the guest says what it receives and sends, SCLP what
    /// it does, which with `consoles` is more than the request to shut down.
    pub fn write_mask(&mut self, sccb: &mut [u8], consoles: bool) -> u16 {
        const MASKS: usize = 12;
        let length = usize::from(half(sccb, 10));
        if length == 0 || length > 1021 {
            return response::INVALID_MASK_LENGTH;
        }
        if sccb.len() < MASKS + 4 * length {
            return response::TOO_SHORT;
        }
        let mut listens = [0; 8];
        for (byte, value) in listens.iter_mut().zip(&sccb[MASKS..MASKS + length]) {
            *byte = *value;
        }
        self.listens = u64::from_be_bytes(listens);
        let (received, sent) = match consoles {
            true => (RECEIVED, SENT),
            false => (0, bit(kind::QUIESCE)),
        };
        for (number, mask) in [(2, received), (3, sent)] {
            let mut bytes = vec![0; length];
            for (byte, value) in bytes.iter_mut().zip(mask.to_be_bytes()) {
                *byte = value;
            }
            put(sccb, MASKS + number * length, &bytes);
        }
        response::NORMAL
    }

    /// Read event data: as many events as fit.
    pub fn read_data(&mut self, sccb: &mut [u8]) -> u16 {
        // Byte 2: unconditional, or selective with a mask that follows.
        let wanted = match sccb.get(2) {
            Some(0) => self.listens,
            Some(1) => {
                let mut mask = [0; 8];
                for (byte, value) in mask.iter_mut().zip(sccb.iter().skip(HEADER)) {
                    *byte = *value;
                }
                // A mask of the short kind has 4 bytes.
                let mask = u64::from_be_bytes(mask) & 0xffff_ffff_0000_0000;
                if mask & !self.listens != 0 {
                    return response::INVALID_FUNCTION;
                }
                mask
            }
            _ => return response::INVALID_FUNCTION,
        };
        if !self.has_events() {
            return response::NO_EVENTS;
        }
        let room = sccb.len().saturating_sub(HEADER);
        let mut events = Vec::new();
        if self.quiesce && self.listens_to(kind::QUIESCE) && wanted & bit(kind::QUIESCE) != 0 {
            // No time limit, in seconds.
            let event = event(kind::QUIESCE, &[0, 0, 0]);
            if event.len() <= room {
                events.extend(event);
                self.quiesce = false;
            }
        }
        match self.input_kind().filter(|kind| wanted & bit(*kind) != 0) {
            Some(kind::VT220) => {
                let fits = room.saturating_sub(events.len() + EVENT_HEADER + 1);
                let typed: Vec<u8> = self.input.drain(..self.input.len().min(fits)).collect();
                if !typed.is_empty() {
                    events.extend(event(kind::VT220, &[&[SESSION_DATA], &typed[..]].concat()));
                }
            }
            Some(_) => {
                let (length, taken) = self.line().unwrap_or_default();
                let line: Vec<u8> = self.input.iter().copied().take(length).collect();
                let event = event(kind::OPERATOR_COMMAND, &operator_command(&line));
                if events.len() + event.len() <= room {
                    events.extend(event);
                    self.input.drain(..taken);
                }
            }
            None => {}
        }
        if events.is_empty() {
            return match room < EVENT_HEADER + 2 {
                true => response::EXCEEDS_SCCB,
                false => response::NO_EVENTS,
            };
        }
        put(sccb, HEADER, &events);
        // The length is adjusted where the guest allows it.
        if sccb.get(5).is_some_and(|mask| mask & 0x80 != 0) {
            put(sccb, 5, &[0]);
            let length = (HEADER + events.len()) as u16;
            put(sccb, 0, &length.to_be_bytes());
        }
        response::NORMAL
    }
}

/// An event buffer.
fn event(kind: u8, data: &[u8]) -> Vec<u8> {
    let length = (EVENT_HEADER + data.len()) as u16;
    let mut event = length.to_be_bytes().to_vec();
    event.extend([kind, 0, 0, 0]);
    event.extend(data);
    event
}

/// A line that the operator typed, in the vectors that it comes in: a message
/// unit (0x1310) with a management-services unit (0x1212) with a text command
/// (0x1320), in whose self-defining message (0x31) is the text (0x30).
fn operator_command(line: &[u8]) -> Vec<u8> {
    let text: String = line.iter().copied().map(char::from).collect();
    let text = ebcdic::from_text(&text);
    let sub = |key: u8, data: &[u8]| [&[data.len() as u8 + 2, key], data].concat();
    let vector = |id: u16, data: &[u8]| {
        let length = (data.len() as u16 + 4).to_be_bytes();
        [&length[..], &id.to_be_bytes(), data].concat()
    };
    let message = sub(0x31, &sub(0x30, &text));
    vector(0x1310, &vector(0x1212, &vector(0x1320, &message)))
}

/// Write event data: each event buffer goes to where it belongs.
pub(super) fn write_data(sccb: &mut [u8], consoles: &mut Consoles) -> u16 {
    let mut at = HEADER;
    let mut answer = response::NORMAL;
    if sccb.len() < HEADER + EVENT_HEADER {
        return response::INVALID_BUFFER;
    }
    while at < sccb.len() {
        let length = usize::from(half(sccb, at));
        if length < EVENT_HEADER {
            return response::INCONSISTENT;
        }
        let Some(buffer) = sccb.get(at..at + length) else {
            return response::INCONSISTENT;
        };
        let (head, data) = buffer.split_at(EVENT_HEADER);
        let known = match head.get(2) {
            Some(&kind::VT220) => {
                consoles.print(data);
                true
            }
            Some(&kind::MESSAGE) => {
                consoles.print_message(data);
                true
            }
            _ => false,
        };
        if known {
            let flags = head.get(3).copied().unwrap_or(0) | PROCESSED;
            put(sccb, at + 3, &[flags]);
        } else {
            answer = response::INVALID_FUNCTION;
        }
        at += length;
    }
    answer
}
