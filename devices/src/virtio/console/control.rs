//! Control messages about ports (virtio 1.2, section 5.3.6.2).

use crate::byte_order::{ByteOrder, Number};

/// Bytes of a message without what may follow it.
pub(super) const LEN: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FromDriver {
    /// It knows ports, and wants to hear of them.
    DeviceReady,
    /// It has set up a port.
    PortReady(u32),
    /// Somebody in the guest opened (true) or closed a port.
    PortOpen(u32, bool),
}

impl FromDriver {
    /// The message in `raw`, unless it is of no interest.
    pub(super) fn parse(raw: [u8; LEN], order: ByteOrder) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = raw;
        let id = u32::of_bytes([a, b, c, d], order);
        let event = u16::of_bytes([e, f], order);
        let value = u16::of_bytes([g, h], order);
        match (event, value) {
            (DEVICE_READY, 1) => Some(Self::DeviceReady),
            (PORT_READY, 1) => Some(Self::PortReady(id)),
            (PORT_OPEN, value) => Some(Self::PortOpen(id, value != 0)),
            _ => None,
        }
    }
}

/// What a driver is to be told about one port. At most one of each kind is due
/// at any time, so that a driver that asks without listening costs no memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) add: bool,
    pub(super) console: bool,
    pub(super) name: bool,
    pub(super) open: Option<bool>,
}

impl Due {
    /// Takes the next message about port `id`, whose name is `name`, in the
    /// order that drivers expect.
    pub(super) fn next(
        &mut self,
        id: u32,
        name: Option<&str>,
        order: ByteOrder,
    ) -> Option<Vec<u8>> {
        let (event, value, name): (u16, u16, _) = if std::mem::take(&mut self.add) {
            (PORT_ADD, 1, None)
        } else if std::mem::take(&mut self.console) {
            (CONSOLE_PORT, 1, None)
        } else if std::mem::take(&mut self.name) {
            (PORT_NAME, 1, name)
        } else {
            (PORT_OPEN, u16::from(self.open.take()?), None)
        };
        let mut message = Vec::with_capacity(LEN);
        message.extend(id.to_bytes(order));
        message.extend(event.to_bytes(order));
        message.extend(value.to_bytes(order));
        message.extend(name.unwrap_or_default().bytes());
        Some(message)
    }
}
