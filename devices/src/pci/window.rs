//! Windows of guest-physical addresses onto PCI memory space, and where in them
//! base address registers are placed.

use super::config::Bar;

/// The first address beyond the reach of a 32-bit BAR.
const FOUR_GIB: u64 = 1 << 32;

/// A range of guest-physical addresses that a host bridge forwards to PCI
/// memory space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciWindow {
    /// First guest-physical address.
    pub guest_base: u64,
    /// The PCI bus address that it becomes.
    pub pci_base: u64,
    /// Size in bytes.
    pub size: u64,
}

impl PciWindow {
    /// The guest-physical address at which `size` bytes at a PCI bus address
    /// appear; none if they are not wholly in this window.
    pub fn guest_address(&self, pci_address: u64, size: u64) -> Option<u64> {
        let offset = pci_address.checked_sub(self.pci_base)?;
        let end = offset.checked_add(size)?;
        if end > self.size {
            return None;
        }
        self.guest_base.checked_add(offset)
    }

    fn pci_end(&self) -> u64 {
        self.pci_base.saturating_add(self.size)
    }
}

/// Which PCI bus addresses of the windows are taken.
#[derive(Clone, Debug)]
pub(super) struct Allocator {
    windows: Vec<PciWindow>,
    /// First and one-past-last address of what is taken, in rising order.
    taken: Vec<(u64, u64)>,
}

impl Allocator {
    pub(super) fn new(windows: &[PciWindow]) -> Self {
        Self {
            windows: windows.to_vec(),
            taken: Vec::new(),
        }
    }

    /// The lowest free PCI bus address for `bar`, aligned to its size, which is
    /// then taken. A 64-bit BAR goes above 4 GiB where there is a window, and
    /// leaves the scarce low addresses to 32-bit ones.
    pub(super) fn allocate(&mut self, bar: &Bar) -> Option<u64> {
        let high = |w: &&PciWindow| w.pci_end() > FOUR_GIB;
        let low = |w: &&PciWindow| w.pci_end() <= FOUR_GIB;
        let limit = if bar.wide { u64::MAX } else { FOUR_GIB };
        let address = if bar.wide {
            let mut order = self.windows.iter().filter(high);
            let mut then = self.windows.iter().filter(low);
            order
                .find_map(|w| self.fit(w, bar.size, limit))
                .or_else(|| then.find_map(|w| self.fit(w, bar.size, limit)))
        } else {
            self.windows
                .iter()
                .find_map(|w| self.fit(w, bar.size, limit))
        }?;
        let place = self.taken.partition_point(|&(start, _)| start < address);
        self.taken.insert(place, (address, address + bar.size));
        Some(address)
    }

    fn fit(&self, window: &PciWindow, size: u64, limit: u64) -> Option<u64> {
        let end = window.pci_end().min(limit);
        // Address 0 means "not assigned" to many a system.
        let mut start = window.pci_base.max(1).checked_next_multiple_of(size)?;
        for &(taken_start, taken_end) in &self.taken {
            if taken_end <= start {
                continue;
            }
            if start.checked_add(size)? <= taken_start {
                break;
            }
            start = taken_end.checked_next_multiple_of(size)?;
        }
        (start.checked_add(size)? <= end).then_some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: PciWindow = PciWindow {
        guest_base: 0xc000_0000,
        pci_base: 0x8000_0000,
        size: 0x10_0000,
    };
    const HIGH: PciWindow = PciWindow {
        guest_base: 0x80_0000_0000,
        pci_base: 0x80_0000_0000,
        size: 0x100_0000,
    };

    fn bar(size: u64, wide: bool) -> Bar {
        Bar {
            size,
            wide,
            prefetchable: false,
        }
    }

    #[test]
    fn translates_only_what_is_wholly_inside() {
        assert_eq!(LOW.guest_address(0x8000_1000, 0x1000), Some(0xc000_1000));
        assert_eq!(LOW.guest_address(0x800f_f000, 0x1000), Some(0xc00f_f000));
        assert_eq!(LOW.guest_address(0x800f_f000, 0x1001), None);
        assert_eq!(LOW.guest_address(0x7fff_f000, 0x1000), None);
        assert_eq!(LOW.guest_address(u64::MAX - 0xfff, 0x1000), None);
        assert_eq!(LOW.guest_address(0x8000_1000, u64::MAX), None);
    }

    #[test]
    fn aligns_prefers_high_and_fills_gaps() {
        let mut allocator = Allocator::new(&[LOW, HIGH]);
        assert_eq!(allocator.allocate(&bar(0x1000, false)), Some(0x8000_0000));
        assert_eq!(allocator.allocate(&bar(0x4000, false)), Some(0x8000_4000));
        assert_eq!(allocator.allocate(&bar(0x1000, false)), Some(0x8000_1000));
        assert_eq!(allocator.allocate(&bar(0x4000, true)), Some(0x80_0000_0000));
        assert_eq!(allocator.allocate(&bar(0x4000, true)), Some(0x80_0000_4000));
    }

    #[test]
    fn falls_back_to_the_low_window_and_then_refuses() {
        let mut allocator = Allocator::new(&[LOW]);
        assert_eq!(allocator.allocate(&bar(0x8_0000, true)), Some(0x8000_0000));
        assert_eq!(allocator.allocate(&bar(0x8_0000, true)), Some(0x8008_0000));
        assert_eq!(allocator.allocate(&bar(16, false)), None);
        let mut allocator = Allocator::new(&[HIGH]);
        assert_eq!(allocator.allocate(&bar(0x1000, false)), None);
        assert_eq!(allocator.allocate(&bar(1 << 63, true)), None);
        assert_eq!(Allocator::new(&[]).allocate(&bar(16, true)), None);
    }

    #[test]
    fn does_not_place_anything_at_zero() {
        let window = PciWindow {
            guest_base: 0x200_0000_0000,
            pci_base: 0,
            size: 0x1_0000,
        };
        let mut allocator = Allocator::new(&[window]);
        assert_eq!(allocator.allocate(&bar(0x1000, false)), Some(0x1000));
    }
}
