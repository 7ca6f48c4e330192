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
}
