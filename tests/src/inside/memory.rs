//! Writes memory, reads it back, and says where it is.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::check::{At, Result, ensure, fail};
use crate::pattern;

/// Fills `mebibytes` of memory with the pattern of `seed`, reads all of it
/// back, and says at which guest-physical addresses its pages are.
pub fn fill(mebibytes: u64, seed: u64) -> Result<String> {
    let Ok(len) = usize::try_from(mebibytes << 20) else {
        return fail("more memory than there are addresses");
    };
    let page = rustix::param::page_size();
    let mut memory = vec![0u8; len];
    pattern::fill(seed, 0, &mut memory);
    let frames = frames(memory.as_ptr().addr(), len, page)?;
    if let Some(at) = pattern::difference(seed, 0, &memory) {
        return fail(format!("byte {at} is not what was written"));
    }
    let (Some(lowest), Some(highest)) = (frames.iter().min(), frames.iter().max()) else {
        return fail("none of the pages is in memory");
    };
    Ok(format!(
        "pages: {}\nlowest: {}\nhighest: {}\n",
        frames.len(),
        lowest * page as u64,
        highest * page as u64
    ))
}

/// The page frames of `len` bytes at `address`
/// (Documentation/admin-guide/mm/pagemap.rst).
fn frames(address: usize, len: usize, page: usize) -> Result<Vec<u64>> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let pagemap = File::open("/proc/self/pagemap").at("/proc/self/pagemap")?;
    let count = len / page;
    let mut entries = vec![0; count * 8];
    pagemap
        .read_exact_at(&mut entries, (address / page * 8) as u64)
        .at("/proc/self/pagemap")?;
    let mut frames = Vec::with_capacity(count);
    for entry in entries.chunks_exact(8) {
        let entry = entry
            .iter()
            .rev()
            .fold(0, |n, byte| n << 8 | u64::from(*byte));
        let entry = match cfg!(target_endian = "big") {
            true => entry.swap_bytes(),
            false => entry,
        };
        ensure(entry & PRESENT != 0, || "a page is not in memory".into())?;
        frames.push(entry & FRAME);
    }
    Ok(frames)
}
