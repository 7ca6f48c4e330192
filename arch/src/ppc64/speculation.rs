//! What a guest is told of the processor's ways with speculation
//! (H_GET_CPU_CHARACTERISTICS, whose words have the bits of
//! KVM_PPC_GET_CPU_CHAR: Linux arch/powerpc/include/asm/hvcall.h).

use crossvisor_vmm::arch::Host;

/// The capability of what the processor has.
pub const CHARACTER: &str = "CPU character";
/// The capability of what a guest has to do.
pub const BEHAVIOUR: &str = "CPU behaviour";

/// What a guest has to do unless it is told otherwise: flush the L1 data cache
/// where privilege changes, and hold bounds checks by barriers; and that security
/// goes before speed (KVM_PPC_CPU_BEHAV_FAVOUR_SECURITY, _L1D_FLUSH_PR,
/// _BNDS_CHK_SPEC_BAR).
const UNLESS_KNOWN: u64 = 1 << 63 | 1 << 62 | 1 << 61;

/// The two capabilities' values: of what KVM says the bits that it knows by its
/// masks. Zeroes where it knows nothing, as on a bare machine whose firmware does
/// not tell: to a guest they would say that nothing is to be done.
pub fn known(character: u64, behaviour: u64, masks: [u64; 2]) -> [(&'static str, i64); 2] {
    let [known_character, known_behaviour] = masks;
    let told = match masks {
        [0, 0] => [0, 0],
        _ => [
            character & known_character,
            behaviour & known_behaviour | UNLESS_KNOWN & !known_behaviour,
        ],
    };
    let [character, behaviour] = told.map(u64::cast_signed);
    [(CHARACTER, character), (BEHAVIOUR, behaviour)]
}

/// What H_GET_CPU_CHARACTERISTICS answers; `None` where there is nothing to be
/// told, and the guest does all that it can.
pub fn answer(host: &Host) -> Option<[u64; 2]> {
    let told = [CHARACTER, BEHAVIOUR].map(|name| host.capability(name).cast_unsigned());
    (told != [0, 0]).then_some(told)
}

#[cfg(test)]
mod tests {
    use super::super::host;
    use super::*;

    #[test]
    fn a_guest_is_told_what_the_host_knows_and_to_do_the_rest() {
        let told = |character, behaviour, masks| {
            let known = known(character, behaviour, masks);
            let value = |name| known.iter().find(|(known, _)| *known == name);
            answer(&Host {
                capabilities: host::capabilities(|name| value(name).map_or(1, |(_, value)| *value)),
                ..host::typical()
            })
        };
        let all = u64::MAX;
        let (flush, count_cache) = (1 << 61, 1 << 58);
        assert_eq!(told(flush, 1 << 63, [all, all]), Some([flush, 1 << 63]));
        // A bit that is not known says nothing; three of them are on then.
        let answered = Some([0, 0b111 << 61 | count_cache]);
        assert_eq!(told(flush, all, [!flush, count_cache]), answered);
        assert_eq!(told(0, 0, [flush, 0]), Some([0, 0b111 << 61]));
        assert_eq!(told(all, all, [0, 0]), None);
        assert_eq!(answer(&host::typical()), None);
    }
}
