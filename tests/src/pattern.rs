//! Content whose every byte can be told from its seed and its place, so that
//! what is lost, moved or mixed up is seen.

/// `len` bytes of the pattern of `seed`, from its start.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fill(seed, 0, &mut bytes);
    bytes
}

/// Fills `bytes` with the pattern of `seed` from `offset` bytes on, which is a
/// multiple of 8.
pub fn fill(seed: u64, offset: u64, bytes: &mut [u8]) {
    for (index, word) in (offset / 8..).zip(bytes.chunks_mut(8)) {
        let value = mix(seed, index).to_le_bytes();
        word.copy_from_slice(value.get(..word.len()).unwrap_or_default());
    }
}

/// The offset of the first byte of `bytes` that is not as [`fill`] makes it.
pub fn difference(seed: u64, offset: u64, bytes: &[u8]) -> Option<u64> {
    let mut wanted = vec![0; bytes.len()];
    fill(seed, offset, &mut wanted);
    let at = bytes.iter().zip(&wanted).position(|(a, b)| a != b)?;
    Some(offset + at as u64)
}

/// The finaliser of SplitMix64 over seed and place.
fn mix(seed: u64, index: u64) -> u64 {
    let mut z = seed
        .wrapping_add(index)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(seed.rotate_left(32));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_the_whole() {
        let whole = bytes(7, 1003);
        let mut part = vec![0; 100];
        fill(7, 504, &mut part);
        assert_eq!(part, whole[504..604]);
        assert_ne!(bytes(8, 1003), whole);
    }

    #[test]
    fn one_wrong_byte_is_found() {
        let mut found = bytes(1, 4096);
        assert_eq!(difference(1, 0, &found), None);
        found[999] ^= 1;
        assert_eq!(difference(1, 0, &found), Some(999));
        // Sectors that changed places.
        found[999] ^= 1;
        found.rotate_left(512);
        assert_eq!(difference(1, 0, &found), Some(0));
    }
}
