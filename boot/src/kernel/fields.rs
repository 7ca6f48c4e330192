//! Header fields at fixed offsets, and the Linux banner.

use std::io::Read;

use crate::source::Source;

/// Reads a little-endian field, or nothing if the header ends before it.
fn array<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..)?.first_chunk::<N>().copied()
}

pub(super) fn le16(data: &[u8], at: usize) -> Option<u16> {
    array(data, at).map(u16::from_le_bytes)
}

pub(super) fn le32(data: &[u8], at: usize) -> Option<u32> {
    array(data, at).map(u32::from_le_bytes)
}

pub(super) fn le64(data: &[u8], at: usize) -> Option<u64> {
    array(data, at).map(u64::from_le_bytes)
}

/// What `linux_banner` begins with (init/version.c); a digit follows, which
/// tells it from format strings such as `Linux version %s`.
const BANNER: &[u8] = b"Linux version ";

/// The longest release: `__NEW_UTS_LEN`.
const RELEASE_MAX: usize = 64;

/// Searches an uncompressed kernel for its banner and returns the release.
pub(super) fn find_banner(source: &Source) -> Option<String> {
    let mut reader = source.reader(0);
    let mut buf = vec![0u8; 256 << 10];
    let mut held = 0;
    loop {
        let n = reader.read(buf.get_mut(held..)?).ok()?;
        let data = buf.get(..held + n)?;
        // A match so near to the end of the data that the release may be cut
        // off is left for the next round, unless there is none.
        let keep = BANNER.len() + RELEASE_MAX + 1;
        let last = n == 0;
        let mut at = 0;
        while let Some(found) = find(data.get(at..)?, BANNER) {
            let text = data.get(at + found + BANNER.len()..)?;
            if text.len() <= RELEASE_MAX && !last {
                break;
            }
            if let Some(release) = release_at_start(text) {
                return Some(release);
            }
            at += found + BANNER.len();
        }
        if last {
            return None;
        }
        let total = data.len();
        let from = total.saturating_sub(keep);
        buf.copy_within(from..total, 0);
        held = total - from;
    }
}

/// The first word, when it can be a kernel release.
pub(super) fn release_at_start(text: &[u8]) -> Option<String> {
    let end = text
        .iter()
        .take(RELEASE_MAX + 1)
        .position(|&b| b == b' ' || b == b'\n' || b == 0)
        .or((text.len() <= RELEASE_MAX).then_some(text.len()))?;
    let word = text.get(..end)?;
    let good =
        word.first().is_some_and(u8::is_ascii_digit) && word.iter().all(|b| b.is_ascii_graphic());
    if good {
        String::from_utf8(word.to_vec()).ok()
    } else {
        None
    }
}

/// The first occurrence of `needle`, which must not be empty.
pub(super) fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let (&first, rest) = needle.split_first()?;
    let mut at = 0;
    loop {
        at += haystack.get(at..)?.iter().position(|&b| b == first)?;
        if haystack.get(at + 1..)?.starts_with(rest) {
            return Some(at);
        }
        at += 1;
    }
}
