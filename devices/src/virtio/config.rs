//! Access to a device's configuration space.

use crate::byte_order::{ByteOrder, Number};

/// Copies what `config` holds at `offset` to `data`; beyond its end there are
/// zeroes.
pub(crate) fn read(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let available = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    for (byte, value) in data.iter_mut().zip(available) {
        *byte = *value;
    }
}

/// The part of a write of `data` at `offset` that falls on the `len` bytes from
/// `field` on, each byte with its position there. Transports differ in how much
/// they write for one field: those on channels write all that is before it, too.
pub(crate) fn written(
    offset: u64,
    data: &[u8],
    field: u64,
    len: usize,
) -> impl Iterator<Item = (usize, u8)> {
    data.iter().zip(0..).filter_map(move |(&value, index)| {
        let position = offset.checked_add(index)?.checked_sub(field)?;
        let position = usize::try_from(position).ok()?;
        (position < len).then_some((position, value))
    })
}

/// A configuration space under construction, field after field.
pub(crate) struct Layout {
    space: Vec<u8>,
    order: ByteOrder,
}

impl Layout {
    /// An empty space whose numbers are in `order`.
    pub(crate) fn new(order: ByteOrder) -> Self {
        Self {
            space: Vec::new(),
            order,
        }
    }

    /// Appends a number.
    pub(crate) fn number<const N: usize>(self, number: impl Number<N>) -> Self {
        let bytes = number.to_bytes(self.order);
        self.bytes(bytes)
    }

    /// Appends bytes as they are.
    pub(crate) fn bytes<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        self.space.extend(bytes);
        self
    }

    /// Appends `count` bytes that are not used.
    pub(crate) fn gap(mut self, count: usize) -> Self {
        self.space.resize(self.space.len() + count, 0);
        self
    }

    /// The finished space.
    pub(crate) fn done(self) -> Vec<u8> {
        self.space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_end_are_zeroes() {
        let layout = Layout::new(ByteOrder::Little);
        let config = layout.bytes([1, 2]).gap(1).bytes([4]).done();
        let mut data = [0xff; 4];
        read(&config, 1, &mut data);
        assert_eq!(data, [2, 0, 4, 0]);
        for offset in [4, 1000, u64::MAX] {
            data = [0xff; 4];
            read(&config, offset, &mut data);
            assert_eq!(data, [0; 4]);
        }
    }

    #[test]
    fn numbers_are_in_the_order_of_the_space() {
        let layout = |order| Layout::new(order).number(0x0102u16).number(3u32).done();
        assert_eq!(layout(ByteOrder::Little), [2, 1, 3, 0, 0, 0]);
        assert_eq!(layout(ByteOrder::Big), [1, 2, 0, 0, 0, 3]);
    }

    #[test]
    fn a_write_reaches_a_field_from_wherever_it_starts() {
        let part = |offset, data: &[u8]| Vec::from_iter(written(offset, data, 4, 2));
        assert_eq!(part(4, &[1]), [(0, 1)]);
        assert_eq!(part(5, &[1]), [(1, 1)]);
        assert_eq!(part(0, &[0, 1, 2, 3, 4, 5, 6]), [(0, 4), (1, 5)]);
        assert_eq!(part(0, &[1, 2, 3, 4]), []);
        assert_eq!(part(6, &[1]), []);
        assert_eq!(part(u64::MAX, &[1, 2]), []);
    }
}
