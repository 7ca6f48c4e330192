//! Access to a device's configuration space.

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
#[derive(Default)]
pub(crate) struct Layout(Vec<u8>);

impl Layout {
    /// Appends a field, given in the space's byte order (little-endian).
    pub(crate) fn field<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Appends `count` bytes that are not used.
    pub(crate) fn gap(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// The finished space.
    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_end_are_zeroes() {
        let config = Layout::default().field([1, 2]).gap(1).field([4]).done();
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
