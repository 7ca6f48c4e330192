//! A XIVE as a guest has it by itself: where its pages are, and which of them
//! the guest reaches (Linux Documentation/virt/kvm/devices/xive.rst;
//! arch/powerpc/kvm/book3s_xive_native.c).
//!
//! A source has two pages for its event state: a store to the first triggers
//! it, loads from the second say and set whether it is pending (P) and queued
//! (Q). A vCPU has its priority, and takes interrupts, in the third of four
//! pages. KVM maps the machine's own pages there, each in a page of the host's.

pub mod calls;

use crossvisor_vmm::arch::{ControllerPages, Host};
use crossvisor_vmm::plan::{Plan, Range, Region};

use super::sources::{self, Trigger};

/// Where the vCPUs' pages are, and the sources': see `layout`.
const THREADS_BASE: u64 = 40 << 40;
const SOURCES_BASE: u64 = 41 << 40;

/// What maps of KVM's descriptor of a XIVE begin with, in pages
/// (KVM_XIVE_TIMA_PAGE_OFFSET, KVM_XIVE_ESB_PAGE_OFFSET).
const THREADS_PAGE_OFFSET: u64 = 0;
const SOURCES_PAGE_OFFSET: u64 = 4;

/// How many pages a vCPU has: for the hardware, for the hypervisor, for the
/// operating system, for programs.
const THREAD_PAGES: u64 = 4;
const OS_PAGE: u64 = 2;
const USER_PAGE: u64 = 3;

/// Priorities that a guest may use; KVM takes the next one for itself where it
/// has but one escalation for each vCPU.
pub const PRIORITIES: u64 = 7;

/// A machine's XIVE.
#[derive(Clone, Debug)]
pub struct Xive {
    /// The host's page size in bytes.
    page: u64,
    cpus: u32,
    sources: Vec<(u32, Trigger)>,
}

impl Xive {
    /// The XIVE of the machine that `plan` is of, on `host`.
    pub fn new(plan: &Plan, host: &Host) -> Self {
        // vCPUs interrupt each other by the first sources.
        let mut sources: Vec<_> = (0..plan.cpus).map(|cpu| (cpu, Trigger::Edge)).collect();
        sources.extend(sources::sources(plan));
        Self {
            page: host.page_size,
            cpus: plan.cpus,
            sources,
        }
    }

    /// What the plan of a machine with a XIVE on `host` has of it.
    pub fn regions(host: &Host) -> [Region; 2] {
        let region = |name: &str, range| Region {
            name: name.into(),
            ports: false,
            range,
            gsi: None,
        };
        [
            region("xive-threads", threads(host.page_size)),
            region("xive-sources", events(host.page_size)),
        ]
    }

    /// How many vCPUs it interrupts.
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    /// Every source.
    pub fn sources(&self) -> &[(u32, Trigger)] {
        &self.sources
    }

    /// The kind of source `number`, if there is one.
    pub fn trigger(&self, number: u64) -> Option<(u32, Trigger)> {
        let number = u32::try_from(number).ok()?;
        let mut found = self.sources.iter();
        found.find(|(source, _)| *source == number).copied()
    }

    /// The page by which source `number` is triggered, and the one by which it
    /// is told to go on.
    pub fn event_pages(&self, number: u32) -> [u64; 2] {
        let first = SOURCES_BASE + u64::from(number) * 2 * self.page;
        [first, first + self.page]
    }

    /// The logarithm of a page's size.
    pub fn page_shift(&self) -> u32 {
        self.page.trailing_zeros()
    }

    /// The vCPU's page for programs and the one for the operating system, as
    /// the device tree has them.
    pub fn thread_pages(&self) -> [Range; 2] {
        [USER_PAGE, OS_PAGE].map(|page| Range::new(THREADS_BASE + page * self.page, self.page))
    }

    /// The pages, of which the guest gets those that KVM lets it have: not the
    /// hypervisor's, none without a source, and none of sources that go by level,
    /// which are told to go on by H_INT_ESB.
    pub fn pages(&self) -> Vec<ControllerPages> {
        let [_, system] = self.thread_pages();
        let mut visible: Vec<Range> = Vec::new();
        let mut edges: Vec<u32> = self
            .sources()
            .iter()
            .filter(|(_, trigger)| *trigger == Trigger::Edge)
            .map(|(number, _)| *number)
            .collect();
        edges.sort_unstable();
        for number in edges {
            let [first, _] = self.event_pages(number);
            match visible.last_mut() {
                Some(range) if range.end() == first => range.size += 2 * self.page,
                _ => visible.push(Range::new(first, 2 * self.page)),
            }
        }
        vec![
            ControllerPages {
                offset: THREADS_PAGE_OFFSET * self.page,
                range: threads(self.page),
                visible: vec![system],
            },
            ControllerPages {
                offset: SOURCES_PAGE_OFFSET * self.page,
                range: events(self.page),
                visible,
            },
        ]
    }
}

fn threads(page: u64) -> Range {
    Range::new(THREADS_BASE, THREAD_PAGES * page)
}

fn events(page: u64) -> Range {
    Range::new(SOURCES_BASE, u64::from(sources::END) * 2 * page)
}

#[cfg(test)]
#[path = "xive_tests.rs"]
mod tests;
