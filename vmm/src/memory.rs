//! Guest RAM, as the plan lays it out.

use std::fs;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::error::{Error, Result};
use crate::plan::Plan;

/// Maps the RAM of `plan`. It is mapped, not touched: what the guest does not
/// use costs nothing. With `hugepages` it is backed by the host's reserved huge
/// pages of the default size.
///
/// # Errors
/// More than the host has, or more huge pages than are free; says how much
/// there is.
pub fn allocate(plan: &Plan, hugepages: bool) -> Result<GuestMemoryMmap> {
    let total: u64 = plan.memory.iter().map(|range| range.size).sum();
    check_host(total, hugepages)?;
    let regions = plan.memory.iter().map(|range| {
        let size = usize::try_from(range.size)
            .map_err(|_| Error::config("--memory", "more than this host can address"))?;
        let flags = mapping_flags(hugepages);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let mapping = map_aligned(size, protection, flags).map_err(|error| {
            Error::config(
                "--memory",
                format!("the host cannot map {} MiB: {error}", range.size >> 20),
            )
        })?;
        GuestRegionMmap::new(mapping, GuestAddress(range.base))
            .ok_or_else(|| Error::config("--memory", "guest memory beyond the 64-bit range"))
    });
    GuestMemoryMmap::from_regions(regions.collect::<Result<_>>()?)
        .map_err(|error| Error::config("--memory", error.to_string()))
}

/// Flags of the mappings. Huge pages are reserved here and now: a guest that
/// touched one that is not there any more would end the VMM by SIGBUS.
fn mapping_flags(hugepages: bool) -> libc::c_int {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    match hugepages {
        true => flags | libc::MAP_HUGETLB,
        false => flags | libc::MAP_NORESERVE,
    }
}

/// The alignment of a mapping: KVM on s390x takes only memory that begins on a
/// segment of 1 MiB. Elsewhere it does no harm.
const ALIGNMENT: usize = 1 << 20;

/// Maps `size` bytes. The kernel says where, mostly directly below what was
/// mapped last: what is too much there is filled until the place is aligned.
fn map_aligned(
    size: usize,
    protection: i32,
    flags: i32,
) -> std::result::Result<MmapRegion, MmapRegionError> {
    let mut fillers = Vec::new();
    loop {
        let mapping = MmapRegion::build(None, size, protection, flags)?;
        let excess = mapping.as_ptr() as usize % ALIGNMENT;
        let wanted = size.is_multiple_of(ALIGNMENT) && flags & libc::MAP_HUGETLB == 0;
        if excess == 0 || !wanted || fillers.len() == 16 {
            return Ok(mapping);
        }
        drop(mapping);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        fillers.push(MmapRegion::<()>::build(
            None,
            excess,
            libc::PROT_NONE,
            flags,
        )?);
    }
}

/// Compares what the guest gets with what the host has.
fn check_host(total: u64, hugepages: bool) -> Result<()> {
    let text =
        fs::read_to_string("/proc/meminfo").map_err(|source| Error::io("/proc/meminfo", source))?;
    let value = |name| meminfo(&text, name);
    if !hugepages {
        let host = (value("MemTotal") + value("SwapTotal")) << 10;
        if host != 0 && total > host {
            return Err(Error::config(
                "--memory",
                format!(
                    "{} MiB is more than this host has ({} MiB with swap)",
                    total >> 20,
                    host >> 20
                ),
            ));
        }
        return Ok(());
    }
    let page = value("Hugepagesize") << 10;
    if page == 0 {
        return Err(Error::config(
            "--hugepages",
            "this host's kernel has no huge pages; leave the option out",
        ));
    }
    if !total.is_multiple_of(page) {
        return Err(Error::config(
            "--memory",
            format!(
                "must be a multiple of the huge page size, {} MiB",
                page >> 20
            ),
        ));
    }
    let free = value("HugePages_Free");
    let needed = total / page;
    if free < needed {
        return Err(Error::config(
            "--hugepages",
            format!(
                "{needed} huge pages of {} MiB are needed and {free} are free; reserve more: \
                 sysctl vm.nr_hugepages={}",
                page >> 20,
                value("HugePages_Total") + needed - free
            ),
        ));
    }
    Ok(())
}

/// The number after `name:` in the text of /proc/meminfo; 0 if it is not there.
fn meminfo(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// The host's page size in bytes.
pub fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_meminfo() {
        let text = "MemTotal:       24689012 kB\nHugePages_Free:        3\n";
        assert_eq!(meminfo(text, "MemTotal"), 24689012);
        assert_eq!(meminfo(text, "HugePages_Free"), 3);
        assert_eq!(meminfo(text, "Mem"), 0);
        assert_eq!(meminfo("", "MemTotal"), 0);
    }

    #[test]
    fn huge_pages_are_reserved_and_others_are_not() {
        let reserved = |hugepages| mapping_flags(hugepages) & libc::MAP_NORESERVE == 0;
        assert!(reserved(true));
        assert!(!reserved(false));
    }

    #[test]
    fn mappings_are_aligned_as_kvm_on_s390x_needs_them() {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mut odd = Vec::new();
        for pages in 1..5 {
            odd.push(MmapRegion::<()>::build(None, pages * 4096, 0, flags));
            let mapping = map_aligned(2 << 20, libc::PROT_READ, flags).unwrap();
            assert_eq!(mapping.as_ptr() as usize % ALIGNMENT, 0);
            odd.push(Ok(mapping));
        }
    }

    #[test]
    fn more_than_the_host_has_is_an_error_that_names_the_option() {
        let error = check_host(1 << 60, false).unwrap_err().to_string();
        assert!(error.starts_with("--memory: "), "{error}");
        assert!(error.contains("more than this host has"), "{error}");
        let error = check_host(1 << 60, true).unwrap_err().to_string();
        assert!(error.contains("huge page"), "{error}");
    }
}
