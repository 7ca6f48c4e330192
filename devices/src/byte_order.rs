//! The two orders in which numbers can lie in memory that host and guest share.

/// The byte order of numbers in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ByteOrder {
    /// The least significant byte comes first.
    #[default]
    Little,
    /// The most significant byte comes first.
    Big,
}

/// An integer that has a byte order in memory.
pub trait Number<const BYTES: usize>: Sized {
    /// Its bytes in `order`.
    fn to_bytes(self, order: ByteOrder) -> [u8; BYTES];

    /// The number that `bytes` are in `order`.
    fn of_bytes(bytes: [u8; BYTES], order: ByteOrder) -> Self;
}

macro_rules! number {
    ($($integer:ty),*) => {$(
        impl Number<{ size_of::<$integer>() }> for $integer {
            fn to_bytes(self, order: ByteOrder) -> [u8; size_of::<$integer>()] {
                match order {
                    ByteOrder::Little => self.to_le_bytes(),
                    ByteOrder::Big => self.to_be_bytes(),
                }
            }

            fn of_bytes(bytes: [u8; size_of::<$integer>()], order: ByteOrder) -> Self {
                match order {
                    ByteOrder::Little => Self::from_le_bytes(bytes),
                    ByteOrder::Big => Self::from_be_bytes(bytes),
                }
            }
        }
    )*};
}

number!(u16, u32, u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lie_in_their_order() {
        assert_eq!(0x1234u16.to_bytes(ByteOrder::Little), [0x34, 0x12]);
        assert_eq!(0x1234u16.to_bytes(ByteOrder::Big), [0x12, 0x34]);
        let bytes = [1, 2, 3, 4];
        assert_eq!(u32::of_bytes(bytes, ByteOrder::Little), 0x0403_0201);
        assert_eq!(u32::of_bytes(bytes, ByteOrder::Big), 0x0102_0304);
        for order in [ByteOrder::Little, ByteOrder::Big] {
            let bytes = 0x0123_4567_89ab_cdefu64.to_bytes(order);
            assert_eq!(u64::of_bytes(bytes, order), 0x0123_4567_89ab_cdef);
        }
    }
}
