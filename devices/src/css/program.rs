//! Runs channel programs: fetches CCWs, follows chains and indirect addresses,
//! moves data.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::ccw::{Ccw, Check, command, flag};
use super::schib::{Orb, status};
use super::subchannel::SENSE_SIZE;
use super::{Answer, ControlUnit};
use crate::GuestMem;

/// How many CCWs a program may execute: a dozen times what one for the devices
/// here takes. A channel would run one that goes in circles for ever; the CPU
/// that started it waits here, for commands that may start and stop threads.
const MAX_CCWS: u32 = 256;

/// The data areas of one command, in order, with data chaining and indirect
/// addresses followed already.
pub struct Transfer<'a> {
    memory: &'a GuestMemoryMmap,
    areas: Vec<Area>,
    /// The end of what has been transferred, from the start.
    used: u64,
}

#[derive(Clone, Copy, Debug)]
struct Area {
    address: u64,
    len: u64,
    skip: bool,
}

impl Transfer<'_> {
    /// The count of the command: of all CCWs whose data is chained.
    pub fn count(&self) -> u64 {
        self.areas.iter().map(|area| area.len).sum()
    }

    /// How many bytes were transferred.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The parts of the areas that `len` bytes from `offset` on are in: place
    /// in the transfer's buffer, and area.
    fn parts(&self, offset: u64, len: usize) -> Vec<(usize, Area)> {
        let end = offset.saturating_add(len as u64);
        let mut parts = Vec::new();
        let mut start = 0u64;
        for area in &self.areas {
            let (from, to) = (offset.max(start), end.min(start + area.len));
            if from < to {
                let part = Area {
                    address: area.address.wrapping_add(from - start),
                    len: to - from,
                    skip: area.skip,
                };
                parts.push(((from - offset) as usize, part));
            }
            start += area.len;
        }
        parts
    }

    /// Reads what the guest has put at `offset`, and returns how many bytes of
    /// `data` it is: fewer than asked for when the count is smaller.
    ///
    /// # Errors
    /// Program check: no memory there.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<usize, Check> {
        let mut done = 0;
        for (at, area) in self.parts(offset, data.len()) {
            let len = area.len as usize;
            let Some(part) = data.get_mut(at..at + len) else {
                break;
            };
            self.memory
                .read_slice(part, GuestAddress(area.address))
                .map_err(|_| Check::Program)?;
            done = at + len;
            self.used = self.used.max(offset.saturating_add(done as u64));
        }
        Ok(done)
    }

    /// Writes `data` at `offset`, as far as the count goes.
    ///
    /// # Errors
    /// Program check: no memory there.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<usize, Check> {
        let mut done = 0;
        for (at, area) in self.parts(offset, data.len()) {
            let len = area.len as usize;
            let Some(part) = data.get(at..at + len) else {
                break;
            };
            if !area.skip {
                self.memory
                    .write_slice(part, GuestAddress(area.address))
                    .map_err(|_| Check::Program)?;
            }
            done = at + len;
            self.used = self.used.max(offset.saturating_add(done as u64));
        }
        Ok(done)
    }
}

/// How a channel program ended, or paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// The CCW address of the status: 8 beyond the last CCW used; of a
    /// suspension too.
    pub address: u32,
    /// Device status.
    pub device: u8,
    /// Subchannel status.
    pub subchannel: u8,
    /// Residual count.
    pub count: u16,
    /// Whether it is suspended at the CCW before `address`.
    pub suspended: bool,
}

/// A channel program in progress.
pub(super) struct Program<'a> {
    pub memory: &'a GuestMem,
    pub unit: &'a dyn ControlUnit,
    pub orb: Orb,
    /// Sense data of the device, for SENSE.
    pub sense: &'a mut [u8; SENSE_SIZE],
}

/// What goes wrong in the middle, and where.
struct Stop {
    address: u32,
    check: Check,
    count: u16,
}

/// A CCW of a chain of data.
#[derive(Clone, Copy)]
struct Link {
    ccw: Ccw,
    /// The address after it.
    next: u32,
    /// Where its data begins in the transfer.
    start: u64,
}

impl Link {
    /// What is left of its count when `used` bytes have been transferred.
    fn residual(&self, used: u64) -> u16 {
        let own = used.saturating_sub(self.start);
        let left = u64::from(self.ccw.count).saturating_sub(own);
        u16::try_from(left).unwrap_or(0)
    }
}

impl Program<'_> {
    fn format_1(&self) -> bool {
        self.orb.control & Orb::FORMAT_1 != 0
    }

    /// Fetches the CCW at `address`; following it is at 8 beyond.
    fn fetch(&self, memory: &GuestMemoryMmap, address: u32) -> Result<Ccw, Check> {
        let limit = match self.format_1() {
            true => 0x7fff_ffff,
            false => 0x00ff_ffff,
        };
        if !address.is_multiple_of(Ccw::SIZE) || address > limit {
            return Err(Check::Program);
        }
        let mut bytes = [0; 8];
        memory
            .read_slice(&mut bytes, GuestAddress(address.into()))
            .map_err(|_| Check::Program)?;
        Ok(Ccw::parse(&bytes, self.format_1()))
    }

    /// Runs from `start` on. When `resumed`, the suspend flag of the first CCW
    /// does not count again.
    pub fn run(&mut self, start: u32, resumed: bool) -> Ended {
        match self.run_chain(start, resumed) {
            Ok(ended) => ended,
            Err(stop) => Ended {
                address: stop.address,
                device: 0,
                subchannel: stop.check.status(),
                count: stop.count,
                suspended: false,
            },
        }
    }

    fn run_chain(&mut self, start: u32, resumed: bool) -> Result<Ended, Stop> {
        let memory = self.memory.memory();
        let mut address = start;
        let mut subchannel = 0;
        let mut first = true;
        let mut budget = MAX_CCWS;
        loop {
            let (ccw, next) = self.next(&memory, address, first, &mut budget)?;
            address = next;
            let stop = move |check| Stop {
                address: next,
                check,
                count: ccw.count,
            };
            ccw.check(false).map_err(stop)?;
            if ccw.has(flag::SUSPEND) {
                if self.orb.control & Orb::SUSPEND == 0 {
                    return Err(stop(Check::Program));
                }
                if !(first && resumed) {
                    return Ok(Ended {
                        address,
                        device: 0,
                        subchannel,
                        count: 0,
                        suspended: true,
                    });
                }
            }
            first = false;
            let mut areas = self.areas(&memory, &ccw).map_err(stop)?;
            let mut data = vec![Link {
                ccw,
                next,
                start: 0,
            }];
            let broken = self.chain_data(&memory, &mut data, &mut areas, &mut budget);
            let mut transfer = Transfer {
                memory: &memory,
                areas,
                used: 0,
            };
            let answer = self.execute(ccw.command, &mut transfer);
            // A channel fetches a CCW when the count of the one before has run
            // out: only those count that the transfer has come to.
            let used = transfer.used();
            if let Some((_, stop)) = broken.filter(|(end, _)| used >= *end) {
                return Err(stop);
            }
            let reached = || data.iter().take_while(|link| link.start <= used);
            // Program-controlled interruptions are seen with the final status,
            // as the program's end comes at once.
            if reached().any(|link| link.ccw.has(flag::INTERRUPT)) {
                subchannel |= status::PROGRAM_CONTROLLED;
            }
            // The first begins at 0.
            let Some(last) = reached().last() else {
                return Err(stop(Check::Program));
            };
            address = last.next;
            let residual = last.residual(used);
            let answer = answer.map_err(|check| Stop {
                address,
                check,
                count: residual,
            })?;
            let mut device = status::CHANNEL_END | status::DEVICE_END;
            if let Answer::UnitCheck(sense) = answer {
                *self.sense = [0; SENSE_SIZE];
                self.sense[0] = sense;
                device |= status::UNIT_CHECK;
            }
            // An immediate command's count is not compared where the program
            // says so; otherwise a count that is left over is indicated unless
            // the last CCW of the data suppresses it.
            let immediate = used == 0 && (self.orb.lenient || ccw.command == command::NO_OPERATION);
            let chained = last.ccw.has(flag::CHAIN_DATA);
            let suppressed = last.ccw.has(flag::SUPPRESS_LENGTH) && !chained || immediate;
            if residual != 0 && !suppressed && device & status::UNIT_CHECK == 0 {
                subchannel |= status::INCORRECT_LENGTH;
            }
            let goes_on = last.ccw.has(flag::CHAIN_COMMAND)
                && !chained
                && device & status::UNIT_CHECK == 0
                && subchannel & status::INCORRECT_LENGTH == 0;
            if !goes_on {
                return Ok(Ended {
                    address,
                    device,
                    subchannel,
                    count: residual,
                    suspended: false,
                });
            }
        }
    }

    /// Follows the chain of data that begins with the one link in `data`, and
    /// adds its areas. What is wrong with a CCW of it comes back with the place
    /// in the transfer where it begins.
    fn chain_data(
        &self,
        memory: &GuestMemoryMmap,
        data: &mut Vec<Link>,
        areas: &mut Vec<Area>,
        budget: &mut u32,
    ) -> Option<(u64, Stop)> {
        while let Some(link) = data.last().filter(|link| link.ccw.has(flag::CHAIN_DATA)) {
            let start = link.start + u64::from(link.ccw.count);
            let more = self
                .next(memory, link.next, false, budget)
                .and_then(|(ccw, next)| {
                    let stop = |check| Stop {
                        address: next,
                        check,
                        count: ccw.count,
                    };
                    ccw.check(true).map_err(stop)?;
                    areas.extend(self.areas(memory, &ccw).map_err(stop)?);
                    Ok(Link { ccw, next, start })
                });
            match more {
                Ok(link) => data.push(link),
                Err(stop) => return Some((start, stop)),
            }
        }
        None
    }

    /// The CCW at `address` or where a transfer in channel there leads, and the
    /// address after it.
    fn next(
        &self,
        memory: &GuestMemoryMmap,
        address: u32,
        first: bool,
        budget: &mut u32,
    ) -> Result<(Ccw, u32), Stop> {
        let at = |address: u32| {
            move |check| Stop {
                address: address.wrapping_add(Ccw::SIZE),
                check,
                count: 0,
            }
        };
        let mut ccw = self.fetch(memory, address).map_err(at(address))?;
        let mut address = address;
        *budget = budget.saturating_sub(1);
        if *budget == 0 {
            return Err(at(address)(Check::Program));
        }
        if ccw.is_transfer() {
            // Neither the first CCW nor the target of a transfer may be one.
            if first {
                return Err(at(address)(Check::Program));
            }
            let target = ccw.target().map_err(at(address))?;
            ccw = self.fetch(memory, target).map_err(at(address))?;
            address = target;
            if ccw.is_transfer() {
                return Err(at(address)(Check::Program));
            }
        }
        Ok((ccw, address.wrapping_add(Ccw::SIZE)))
    }

    /// The areas of memory that `ccw` names.
    fn areas(&self, memory: &GuestMemoryMmap, ccw: &Ccw) -> Result<Vec<Area>, Check> {
        let skip = ccw.has(flag::SKIP);
        let mut left = u64::from(ccw.count);
        if left == 0 {
            return Ok(Vec::new());
        }
        if !ccw.has(flag::INDIRECT) {
            return Ok(vec![Area {
                address: ccw.address.into(),
                len: left,
                skip,
            }]);
        }
        let wide = self.orb.control & Orb::FORMAT_2_IDAWS != 0;
        let small = !wide || self.orb.control & Orb::SMALL_BLOCKS != 0;
        let (size, block) = (if wide { 8 } else { 4 }, if small { 2048 } else { 4096 });
        let mut list = u64::from(ccw.address);
        if !list.is_multiple_of(size) {
            return Err(Check::Program);
        }
        let mut areas = Vec::new();
        while left > 0 {
            let address = match wide {
                true => read_be64(memory, list)?,
                false => u64::from(read_be32(memory, list)?),
            };
            // The first may begin anywhere in a block, the others at its start.
            let misplaced = !areas.is_empty() && !address.is_multiple_of(block);
            if misplaced || !wide && address >> 31 != 0 {
                return Err(Check::Program);
            }
            let len = left.min(block - address % block);
            areas.push(Area { address, len, skip });
            left -= len;
            list += size;
        }
        Ok(areas)
    }

    fn execute(&mut self, code: u8, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        match code {
            command::NO_OPERATION => Ok(Answer::Done),
            command::SENSE => {
                let sense = std::mem::replace(self.sense, [0; SENSE_SIZE]);
                transfer.write(0, &sense)?;
                Ok(Answer::Done)
            }
            command::SENSE_ID => {
                transfer.write(0, &self.unit.sense_id().bytes())?;
                Ok(Answer::Done)
            }
            other => self.unit.command(other, transfer),
        }
    }
}

fn read_be64(memory: &GuestMemoryMmap, address: u64) -> Result<u64, Check> {
    let value: u64 = memory
        .load(GuestAddress(address), Ordering::Relaxed)
        .map_err(|_| Check::Program)?;
    Ok(u64::from_be(value))
}

fn read_be32(memory: &GuestMemoryMmap, address: u64) -> Result<u32, Check> {
    let value: u32 = memory
        .load(GuestAddress(address), Ordering::Relaxed)
        .map_err(|_| Check::Program)?;
    Ok(u32::from_be(value))
}
