//! Addresses that stay the same from one start of a machine to the next.

/// The address of network interface `index` of the machine `vm_name`: unicast,
/// locally administered, and the same on every host and in every version.
pub fn mac_for(vm_name: &str, index: u32) -> [u8; 6] {
    // 64-bit FNV-1a over the name, a separator and the index, with a final mix
    // by MurmurHash3, since FNV spreads its last bytes badly.
    let index = index.to_le_bytes();
    let bytes = vm_name.bytes().chain([0]).chain(index);
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    let [a, b, c, d, e, f, _, _] = (hash ^ (hash >> 33)).to_le_bytes();
    // Bit 0 of the first byte is multicast, bit 1 locally administered.
    [a & 0xfc | 0x02, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn addresses_are_stable_distinct_and_local() {
        assert_eq!(mac_for("debian", 0), STABLE);
        let mut seen = HashSet::new();
        for name in ["", "a", "b", "debian", "debian0", "vm1", "vm2"] {
            for index in 0..64 {
                let mac = mac_for(name, index);
                assert_eq!(mac[0] & 3, 2);
                assert!(seen.insert(mac), "{name} {index}");
            }
        }
    }

    /// Worked out by another program, so that a change of it is seen.
    const STABLE: [u8; 6] = [0x66, 0xe4, 0xe3, 0x9c, 0x06, 0x34];
}
