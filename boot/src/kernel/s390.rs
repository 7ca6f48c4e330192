//! s390 `bzImage`: an image of memory from address 0 on
//! (arch/s390/boot/head.S, arch/s390/include/asm/setup.h).

use super::Reason;
use super::fields::{find, release_at_start};
use crate::source::Source;

const FORMAT: &str = "s390 bzImage";

/// The decompressor, which is not compressed itself, is within so many bytes.
const DECOMPRESSOR: usize = 1 << 20;
/// How an image ends since Linux 6.1, for secure boot: the trailer's size and a
/// mark (`.sb.trailer` in arch/s390/boot/vmlinux.lds.S).
const TRAILER: &[u8] = b"\0\0\0\x20zIPL";
/// The version of that Linux.
const TRAILER_SINCE: (u32, u32) = (6, 1);
/// What follows where the image is signed (Linux `MODULE_SIG_STRING`).
const SIGNED: &[u8] = b"~Module signature appended~\n";
/// How many bytes before the end of who built a kernel its release begins.
const BANNER_MAX: usize = 256;

/// An s390 kernel. Its parameter area is at fixed addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S390Image {
    /// The release, if the decompressor tells it.
    pub release: Option<String>,
}

impl S390Image {
    /// The address of its entry point (`STARTUP_NORMAL_OFFSET`).
    pub const ENTRY: u64 = 0x10000;
    /// What is behind the first instruction there, and its address
    /// (`EP_STRING`, `EP_OFFSET`).
    pub const MARK: &[u8; 6] = b"S390EP";
    /// The mark's address.
    pub const MARK_AT: u64 = 0x10008;
    /// The address of the parameter area (`PARMAREA`).
    pub const PARMAREA: u64 = 0x10400;
    /// The address of the command line (`COMMAND_LINE`).
    pub const COMMAND_LINE: u64 = 0x10480;
}

pub(super) fn is_s390(start: &[u8]) -> bool {
    let rest = start.get(S390Image::MARK_AT as usize..);
    rest.is_some_and(|rest| rest.starts_with(S390Image::MARK))
}

/// The image does not say how long it is; that it is cut off shows where its end
/// must be a certain one.
pub(super) fn parse(source: &Source) -> Result<S390Image, Reason> {
    let release = find_release(&source.prefix(DECOMPRESSOR)?);
    let version = release.as_deref().and_then(version);
    if version.is_some_and(|version| version >= TRAILER_SINCE)
        && !ends_with(source, TRAILER)?
        && !ends_with(source, SIGNED)?
    {
        return Err(Reason::Truncated {
            format: FORMAT,
            what: format!(
                "{} bytes do not end as kernels do since Linux 6.1",
                source.len()
            ),
        });
    }
    Ok(S390Image { release })
}

fn ends_with(source: &Source, end: &[u8]) -> Result<bool, Reason> {
    let mut found = vec![0; end.len()];
    let at = source.len().saturating_sub(end.len() as u64);
    let read = source.read_at(&mut found, at)?;
    Ok(read == end.len() && found == end)
}

/// The release in `kernel_version` (arch/s390/boot/version.c): it is followed by
/// who built the kernel in parentheses, and by a number.
fn find_release(start: &[u8]) -> Option<String> {
    const AFTER: &[u8] = b") #";
    let mut at = 0;
    loop {
        let end = at + find(start.get(at..)?, AFTER)?;
        let text = start.get(end.saturating_sub(BANNER_MAX)..end)?;
        // Bytes before the text may look like a part of it.
        let digits = (0..text.len()).filter(|&i| text.get(i).is_some_and(u8::is_ascii_digit));
        let release = digits
            .filter_map(|i| release_at_start(text.get(i..)?))
            .find(|release| {
                let follows = format!("{release} (");
                version(release).is_some() && find(text, follows.as_bytes()).is_some()
            });
        if release.is_some() {
            return release;
        }
        at = end + AFTER.len();
    }
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let dotted = release.trim_start_matches(|c: char| c.is_ascii_digit());
    let numbers = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    dotted.starts_with('.').then_some(numbers)
}
