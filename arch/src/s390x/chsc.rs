//! CHANNEL SUBSYSTEM CALL, as far as Linux asks (`drivers/s390/cio/chsc.c`):
//! which facilities there are, which channel paths, and that nothing has
//! happened. The instruction is described nowhere in public but there.

use crossvisor_devices::css::schib::Pmcw;
use crossvisor_devices::css::{CHANNEL_PATH, CHANNEL_PATH_TYPE, ChannelSubsystem, subsystem_id};

use super::cpu::{Cpu, Result, Stop};
use super::interrupt::program;

/// Request codes.
mod code {
    pub const STORE_PATH_DESCRIPTION: u16 = 0x0002;
    pub const STORE_SUBCHANNEL_DESCRIPTION: u16 = 0x0004;
    pub const STORE_EVENT_INFORMATION: u16 = 0x000e;
    pub const STORE_CHARACTERISTICS: u16 = 0x0010;
}

/// Response codes.
mod response {
    pub const DONE: u16 = 0x0001;
    pub const INVALID: u16 = 0x0003;
    pub const UNSUPPORTED: u16 = 0x0004;
    pub const NO_EVENT: u16 = 0x0005;
    pub const FORMAT: u16 = 0x0007;
}

/// General characteristics: dynamic I/O, adapter interruptions, bits from the
/// left (Linux `struct css_general_char`).
const GENERAL: [u64; 1] = [1 << (63 - 12) | 1 << (63 - 41)];

/// A request's or response's header: length and code.
const HEADER: usize = 4;
/// Where a request block may end: the response needs 16 bytes at least.
const REQUEST_MAX: usize = 4096 - 16;

/// Executes the request in the page that `address` names, and returns the
/// condition code.
///
/// # Errors
/// A program interruption.
pub fn call(cpu: &Cpu<'_>, css: &ChannelSubsystem, address: u64) -> Result<u8> {
    if address & 0xfff != 0 {
        return Err(Stop::Program(program::SPECIFICATION));
    }
    let mut head = [0; HEADER];
    cpu.read(address, 0, &mut head)?;
    let length = usize::from(u16::from_be_bytes([head[0], head[1]]));
    if !(16..=REQUEST_MAX).contains(&length) || !length.is_multiple_of(8) {
        return Err(Stop::Program(program::OPERAND));
    }
    let mut request = vec![0; length];
    cpu.read(address, 0, &mut request)?;
    let answer = answer(&request, css);
    cpu.write(address + length as u64, 0, &answer)?;
    Ok(0)
}

/// The response block to a request block.
fn answer(request: &[u8], css: &ChannelSubsystem) -> Vec<u8> {
    let word = |at: usize| {
        request
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .map_or(0, |bytes| u32::from_be_bytes(*bytes))
    };
    let room = 4096 - request.len();
    let (code, body) = match (word(0) & 0xffff) as u16 {
        code::STORE_CHARACTERISTICS if request.len() != 16 => (response::INVALID, Vec::new()),
        code::STORE_CHARACTERISTICS => {
            // A reserved word, 510 words of general characteristics, 508 of
            // those of CHSC itself.
            let mut body = vec![0; room - HEADER];
            for (place, value) in body.iter_mut().skip(4).zip(GENERAL[0].to_be_bytes()) {
                *place = value;
            }
            (response::DONE, body)
        }
        code::STORE_PATH_DESCRIPTION => path_description(word(4), word(8)),
        code::STORE_SUBCHANNEL_DESCRIPTION => {
            let (head, first, last) = (word(4) >> 16, word(4) as u16, word(8));
            match (head, u16::try_from(last)) {
                (0, Ok(last)) if first <= last => subchannel_description(css, first, last, room),
                _ => (response::INVALID, vec![0; 4]),
            }
        }
        code::STORE_EVENT_INFORMATION => (response::NO_EVENT, vec![0; 4]),
        _ => (response::UNSUPPORTED, vec![0; 4]),
    };
    let mut block = ((HEADER + body.len()) as u16).to_be_bytes().to_vec();
    block.extend(code.to_be_bytes());
    block.extend(body);
    block.truncate(room);
    block
}

/// The subchannels from the first number to the last, as many as there is room
/// for: which paths each has (Linux `struct chsc_ssd_area`).
fn subchannel_description(
    css: &ChannelSubsystem,
    first: u16,
    last: u16,
    room: usize,
) -> (u16, Vec<u8>) {
    const SIZE: usize = 32;
    /// Subchannel and device number valid, type 0: I/O.
    const VALID: u8 = 0xc0;
    let mut body = vec![0; 4];
    let fit = room.saturating_sub(HEADER + body.len()) / SIZE;
    for number in (first..=last).take(fit) {
        let mut description = [0; SIZE];
        if let Ok(Some(subchannel)) = css.find(subsystem_id(number).into()) {
            let [devno_high, devno_low] = subchannel.devno().to_be_bytes();
            // After the path mask, no link addresses are valid.
            description[..6].copy_from_slice(&[VALID, 0, devno_high, devno_low, Pmcw::PATH, 0]);
            description[8] = CHANNEL_PATH;
        }
        description[6..8].copy_from_slice(&number.to_be_bytes());
        body.extend(description);
    }
    (response::DONE, body)
}

/// The channel paths from the first number to the last, in the basic format or
/// in format 1.
fn path_description(first: u32, last: u32) -> (u16, Vec<u8>) {
    let (format, wanted) = (first >> 8 & 0xf, first & 0xff..=last & 0xff);
    if first & 0xc000_f000 != 0 || last & 0xffff_ff00 != 0 || wanted.is_empty() {
        return (response::INVALID, vec![0; 4]);
    }
    let size = match format {
        0 => 8,
        1 => 32,
        _ => return (response::FORMAT, vec![0; 4]),
    };
    let mut body = format.to_be_bytes().to_vec();
    for path in wanted {
        let mut description = vec![0; size];
        let here = path == u32::from(CHANNEL_PATH);
        // Valid; logical switch number; type; path number.
        for (place, value) in description.iter_mut().zip([
            if here { 0x80 } else { 0 },
            0,
            if here { CHANNEL_PATH_TYPE } else { 0 },
            path as u8,
        ]) {
            *place = value;
        }
        body.extend(description);
    }
    (response::DONE, body)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bench;

    /// The answer of a subsystem with devices 0x1234 and 0x1235.
    fn answer(request: &[u8]) -> Vec<u8> {
        let bench = Bench::new(1);
        let css = &bench.handler.css;
        for devno in [0x1234, 0x1235] {
            css.add(devno).unwrap();
        }
        super::answer(request, css)
    }

    fn request(length: u16, code: u16, words: [u32; 3]) -> Vec<u8> {
        let mut request = length.to_be_bytes().to_vec();
        request.extend(code.to_be_bytes());
        request.extend(words.map(u32::to_be_bytes).concat());
        request
    }

    #[test]
    fn characteristics_fill_the_page() {
        let answer = answer(&request(16, 0x10, [0; 3]));
        assert_eq!(answer.len(), 4080);
        assert_eq!(answer[..4], [0x0f, 0xf0, 0, 1]);
        // Dynamic I/O is bit 12, adapter interruptions bit 41.
        assert_eq!(answer[8..16], [0, 0x08, 0, 0, 0, 0x40, 0, 0]);
    }

    #[test]
    fn one_path_is_there() {
        let answer = answer(&request(16, 2, [0, 1, 0]));
        assert_eq!(answer[..8], [0, 24, 0, 1, 0, 0, 0, 0]);
        assert_eq!(answer[8..16], [0x80, 0, 0x32, 0, 0, 0, 0, 0]);
        assert_eq!(answer[16..24], [0, 0, 0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn all_paths_in_the_long_format_do_not_run_over() {
        let answer = answer(&request(16, 2, [0x100, 0xff, 0]));
        assert_eq!(answer.len(), 4080);
    }

    #[test]
    fn subchannels_tell_their_paths() {
        let one = answer(&request(16, 4, [1, 1, 0]));
        assert_eq!(one[..8], [0, 40, 0, 1, 0, 0, 0, 0]);
        let description = [0xc0, 0, 0x12, 0x35, 0x80, 0, 0, 1];
        assert_eq!(one[8..16], description);
        assert_eq!(one[16..40], [0; 24]);
        // All, of which only the first two are there; more than fit.
        let all = answer(&request(16, 4, [0, 0xffff, 0]));
        assert_eq!(all.len(), 8 + 127 * 32);
        assert_eq!(all[8 + 64..16 + 64], [0, 0, 0, 0, 0, 0, 0, 2]);
        // None, another subchannel set, a reserved bit.
        for words in [[2, 1, 0], [0x0010_0000, 0, 0], [0, 0x1_0000, 0]] {
            assert_eq!(answer(&request(16, 4, words))[3], 3);
        }
    }

    #[test]
    fn other_requests_are_answered_with_what_is_wrong() {
        assert_eq!(answer(&request(16, 0x0e, [0; 3]))[3], 5);
        assert_eq!(answer(&request(16, 0x31, [0; 3]))[3], 4);
        assert_eq!(answer(&request(16, 2, [5, 1, 0]))[3], 3);
        assert_eq!(answer(&request(16, 2, [0x200, 1, 0]))[3], 7);
    }
}
