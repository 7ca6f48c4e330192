use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::ccw::{Check, command, flag};
use super::schib::{Pmcw, half, status, word};
use super::*;

/// A device with a command that reads a pattern, one that takes what is
/// written, one that says that it has begun and waits for a word, and nothing
/// else.
#[derive(Default)]
struct Unit {
    written: Mutex<Vec<u8>>,
    resets: Mutex<u32>,
    disabled: Mutex<u32>,
    rung: Mutex<Vec<u32>>,
    hold: Mutex<Option<(Sender<()>, Receiver<()>)>>,
    /// How much had been written when the last reset came.
    before_reset: Mutex<usize>,
}

const READ: u8 = 0x02;
const WRITE: u8 = 0x01;
const CONTROL: u8 = 0x07;
const HOLD: u8 = 0x0b;

impl ControlUnit for Unit {
    fn sense_id(&self) -> SenseId {
        SenseId {
            control_unit: (0x3832, 2),
            device: (0x1234, 5),
        }
    }

    fn command(&self, code: u8, transfer: &mut Transfer<'_>) -> Result<Answer, Check> {
        match code {
            READ => transfer.write(0, b"abcdefgh").map(|_| Answer::Done),
            WRITE => {
                let mut data = vec![0; transfer.count() as usize];
                transfer.read(0, &mut data)?;
                self.written.lock().unwrap().extend(data);
                Ok(Answer::Done)
            }
            CONTROL => Ok(Answer::Done),
            HOLD => {
                let hold = self.hold.lock().unwrap().take();
                let (begun, word) = hold.unwrap();
                begun.send(()).unwrap();
                word.recv().unwrap();
                Ok(Answer::Done)
            }
            _ => Ok(Answer::UnitCheck(SENSE_COMMAND_REJECT)),
        }
    }

    fn reset(&self) {
        *self.resets.lock().unwrap() += 1;
        *self.before_reset.lock().unwrap() = self.written.lock().unwrap().len();
    }

    fn disabled(&self) {
        *self.disabled.lock().unwrap() += 1;
    }

    fn notify(&self, index: u32) {
        self.rung.lock().unwrap().push(index);
    }
}

#[derive(Default)]
struct Interrupts(Mutex<Vec<(u32, u32, u8)>>);

impl ChannelInterrupts for Interrupts {
    fn subchannel(&self, id: u32, parameter: u32, subclass: u8) -> io::Result<()> {
        self.0.lock().unwrap().push((id, parameter, subclass));
        Ok(())
    }

    fn withdraw(&self, id: u32) {
        self.0.lock().unwrap().retain(|(other, ..)| *other != id);
    }

    fn adapter(&self, subclass: u8) -> io::Result<()> {
        self.0.lock().unwrap().push((0, 0, subclass));
        Ok(())
    }

    fn channel_report(&self) -> io::Result<()> {
        self.0.lock().unwrap().push((0, 0, 0xff));
        Ok(())
    }
}

struct Setup {
    css: Arc<ChannelSubsystem>,
    unit: Arc<Unit>,
    interrupts: Arc<Interrupts>,
    mem: GuestMemoryMmap,
}

const ID: u64 = 0x0001_0000;
const PROGRAM: u32 = 0x1000;
const DATA: u32 = 0x2000;
const SIZE: usize = 1 << 20;

fn setup() -> Setup {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
    let interrupts = Arc::new(Interrupts::default());
    let css = ChannelSubsystem::new(interrupts.clone(), GuestMem::new(mem.clone()));
    let unit = Arc::new(Unit::default());
    css.add(0x10).unwrap().connect(unit.clone());
    let setup = Setup {
        css,
        unit,
        interrupts,
        mem,
    };
    assert_eq!(setup.enable(0x2880), Ok(0));
    setup
}

/// A format-1 CCW.
fn ccw(command: u8, flags: u8, count: u16, address: u32) -> [u8; 8] {
    let mut bytes = [command, flags, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&count.to_be_bytes());
    bytes[4..].copy_from_slice(&address.to_be_bytes());
    bytes
}

/// A format-0 CCW.
fn ccw0(command: u8, flags: u8, count: u16, address: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&address.to_be_bytes());
    bytes[0] = command;
    bytes[4] = flags;
    bytes[6..].copy_from_slice(&count.to_be_bytes());
    bytes
}

impl Setup {
    /// MODIFY SUBCHANNEL with these flags: subclass in the upper bits.
    fn enable(&self, flags: u16) -> Outcome {
        let mut schib = self.css.store(ID).unwrap().unwrap();
        schib[4..6].copy_from_slice(&(flags | 1).to_be_bytes());
        self.css.modify(ID, &schib)
    }

    fn orb(control: u16) -> [u8; 32] {
        let mut orb = [0; 32];
        orb[..4].copy_from_slice(&0xcafe_u32.to_be_bytes());
        orb[4..6].copy_from_slice(&control.to_be_bytes());
        orb[6] = 0xff;
        orb[8..12].copy_from_slice(&PROGRAM.to_be_bytes());
        orb
    }

    fn write(&self, program: &[[u8; 8]]) {
        let bytes = program.concat();
        self.mem
            .write_slice(&bytes, GuestAddress(PROGRAM.into()))
            .unwrap();
    }

    /// Starts a format-1 program and returns what TEST SUBCHANNEL stores.
    fn run(&self, program: &[[u8; 8]]) -> [u8; Irb::SIZE] {
        self.run_as(Orb::FORMAT_1, program)
    }

    fn run_as(&self, control: u16, program: &[[u8; 8]]) -> [u8; Irb::SIZE] {
        self.write(program);
        assert_eq!(self.css.start(ID, &Self::orb(control)), Ok(0));
        self.tested()
    }

    fn tested(&self) -> [u8; Irb::SIZE] {
        let (code, irb) = self.css.test(ID).unwrap();
        assert_eq!(code, 0);
        let irb = irb.unwrap();
        self.css.accept_status(ID, &irb);
        irb.bytes()
    }

    fn data<const N: usize>(&self, address: u32) -> [u8; N] {
        let mut data = [0; N];
        self.mem
            .read_slice(&mut data, GuestAddress(address.into()))
            .unwrap();
        data
    }
}

/// CCW address, device status, subchannel status, residual count.
fn ended(irb: &[u8]) -> (u32, u8, u8, u16) {
    (word(irb, 4), irb[8], irb[9], half(irb, 10))
}

const ENDED: u8 = status::CHANNEL_END | status::DEVICE_END;

#[test]
fn a_subchannel_is_found_by_its_identification() {
    let s = setup();
    assert!(s.css.store(ID).unwrap().is_some());
    assert!(s.css.store(ID + 1).unwrap().is_none());
    // Bits beyond the low word do not count; others that must be zero do.
    assert!(s.css.store(ID | 1 << 40).unwrap().is_some());
    for bad in [0, 1, 0x0003_0000, 0x8001_0000, 0xfe01_0000] {
        assert_eq!(s.css.store(bad), Err(Refusal::Operand), "{bad:#x}");
        assert_eq!(s.css.halt(bad), Err(Refusal::Operand));
    }
    assert_eq!(s.css.halt(ID + 1), Ok(3));
    assert!(s.css.add(0x10).is_err(), "the device number is taken");
}

#[test]
fn the_information_block_tells_paths_and_keeps_what_may_be_changed() {
    let s = setup();
    let schib = s.css.store(ID).unwrap().unwrap();
    // Subclass 5, enabled, valid.
    assert_eq!(half(&schib, 4), 0x2881);
    assert_eq!(half(&schib, 6), 0x10);
    assert_eq!((schib[8], schib[11], schib[15]), (0x80, 0x80, 0x80));
    let mut bad = schib;
    bad[4] |= 0x07;
    assert_eq!(s.css.modify(ID, &bad), Err(Refusal::Operand));
    let mut bad = schib;
    bad[24] = 0x80;
    assert_eq!(s.css.modify(ID, &bad), Err(Refusal::Operand));
    // The device number is not changed.
    let mut other = schib;
    other[7] = 0x99;
    assert_eq!(s.css.modify(ID, &other), Ok(0));
    assert_eq!(half(&s.css.store(ID).unwrap().unwrap(), 6), 0x10);
}

#[test]
fn a_disabled_subchannel_is_not_operational() {
    let s = setup();
    assert_eq!(s.enable(0), Ok(0));
    assert_eq!(s.enable(0), Ok(0));
    assert_eq!(*s.unit.disabled.lock().unwrap(), 1);
    assert_eq!(*s.unit.resets.lock().unwrap(), 0);
    assert_eq!(s.css.start(ID, &Setup::orb(Orb::FORMAT_1)), Ok(3));
    assert_eq!(s.css.halt(ID), Ok(3));
    assert_eq!(s.css.clear(ID), Ok(3));
    assert_eq!(s.css.resume(ID), Ok(3));
    assert_eq!(s.css.cancel(ID), Ok(3));
    assert_eq!(s.css.test(ID).unwrap().0, 3);
    assert!(s.css.store(ID).unwrap().is_some());
}

#[test]
fn a_program_runs_and_interrupts_once() {
    let s = setup();
    let irb = s.run(&[ccw(READ, 0, 8, DATA)]);
    assert_eq!(ended(&irb), (PROGRAM + 8, ENDED, 0, 0));
    // Start function; primary, secondary, pending.
    assert_eq!(half(&irb, 2), 0x4007);
    assert_eq!(&s.data::<8>(DATA), b"abcdefgh");
    assert_eq!(*s.interrupts.0.lock().unwrap(), [(0x0001_0000, 0xcafe, 5)]);
    // The status is gone.
    let (code, irb) = s.css.test(ID).unwrap();
    assert_eq!((code, half(&irb.unwrap().bytes(), 2)), (1, 0));
}

#[test]
fn status_that_is_pending_keeps_others_out() {
    let s = setup();
    s.write(&[ccw(CONTROL, 0, 0, 0)]);
    let orb = Setup::orb(Orb::FORMAT_1);
    assert_eq!(s.css.start(ID, &orb), Ok(0));
    assert_eq!(s.css.start(ID, &orb), Ok(1));
    assert_eq!(s.css.resume(ID), Ok(1));
    assert_eq!(s.css.cancel(ID), Ok(1));
    assert_eq!(s.css.halt(ID), Ok(1));
    assert_eq!(s.enable(0), Ok(1));
    // Clear comes through, and takes the status away.
    assert_eq!(s.css.clear(ID), Ok(0));
    let irb = s.tested();
    assert_eq!(half(&irb, 2), status::CLEAR | status::PENDING);
    assert_eq!(s.css.start(ID, &orb), Ok(0));
}

#[test]
fn halt_of_an_idle_subchannel_is_status() {
    let s = setup();
    assert_eq!(s.css.halt(ID), Ok(0));
    assert_eq!(half(&s.tested(), 2), status::HALT | status::PENDING);
    assert_eq!(s.css.cancel(ID), Ok(2));
    assert_eq!(s.css.resume(ID), Ok(2));
}

#[test]
fn counts_that_differ_are_indicated_unless_suppressed() {
    let s = setup();
    let irb = s.run(&[ccw(READ, 0, 12, DATA)]);
    assert_eq!(
        ended(&irb),
        (PROGRAM + 8, ENDED, status::INCORRECT_LENGTH, 4)
    );
    let irb = s.run(&[ccw(READ, flag::SUPPRESS_LENGTH, 12, DATA)]);
    assert_eq!(ended(&irb), (PROGRAM + 8, ENDED, 0, 4));
    // Fewer than the device has is no error of a read.
    let irb = s.run(&[ccw(READ, 0, 3, DATA + 0x100)]);
    assert_eq!(ended(&irb), (PROGRAM + 8, ENDED, 0, 0));
    assert_eq!(s.data(DATA + 0x100), *b"abc\0");
    // A chain stops at a length that is wrong.
    let chain = [
        ccw(READ, flag::CHAIN_COMMAND, 12, DATA),
        ccw(WRITE, 0, 1, DATA),
    ];
    assert_eq!(
        ended(&s.run(&chain)),
        (PROGRAM + 8, ENDED, status::INCORRECT_LENGTH, 4)
    );
    assert!(s.unit.written.lock().unwrap().is_empty());
}

#[test]
fn commands_and_data_are_chained() {
    let s = setup();
    let irb = s.run(&[
        ccw(READ, flag::CHAIN_COMMAND, 8, DATA),
        ccw(WRITE, flag::CHAIN_DATA, 2, DATA + 4),
        // A transfer in channel in the middle of data.
        ccw(command::TRANSFER_IN_CHANNEL, 0, 0, PROGRAM + 32),
        ccw(0xff, 0, 1, 0),
        ccw(0, flag::CHAIN_DATA, 1, DATA),
        ccw(0, flag::SUPPRESS_LENGTH, 3, DATA + 1),
    ]);
    assert_eq!(ended(&irb), (PROGRAM + 48, ENDED, 0, 0));
    assert_eq!(*s.unit.written.lock().unwrap(), b"efabcd");
}

/// The status is that of the CCW that the device ended in; those behind it have
/// not been looked at.
#[test]
fn of_chained_data_only_what_the_transfer_comes_to_counts() {
    let s = setup();
    let chained = flag::CHAIN_DATA | flag::SUPPRESS_LENGTH;
    let length = status::INCORRECT_LENGTH;
    let beyond = ccw(0, 0, 4, 0x8000_0000);
    // The device has 8 bytes. What is chained can't suppress the indication.
    for behind in [ccw(0, flag::INTERRUPT, 6, DATA), beyond] {
        let irb = s.run(&[ccw(READ, chained, 10, DATA), behind]);
        assert_eq!(ended(&irb), (PROGRAM + 8, ENDED, length, 2));
    }
    let irb = s.run(&[ccw(READ, chained, 3, DATA), ccw(0, 0, 9, DATA + 3)]);
    assert_eq!(ended(&irb), (PROGRAM + 16, ENDED, length, 4));
    // One that the transfer comes to.
    s.mem
        .write_slice(&[0; 8], GuestAddress(DATA.into()))
        .unwrap();
    let irb = s.run(&[ccw(READ, chained, 4, DATA), beyond]);
    let check = status::PROGRAM_CHECK;
    assert_eq!(ended(&irb), (PROGRAM + 16, 0, check, 4));
    assert_eq!(&s.data::<8>(DATA), b"abcd\0\0\0\0");
    // Memory that is not there.
    let irb = s.run(&[ccw(READ, chained, 4, DATA), ccw(0, 0, 4, SIZE as u32)]);
    assert_eq!(ended(&irb), (PROGRAM + 16, 0, check, 4));
    let irb = s.run(&[
        ccw(READ, chained, 4, DATA),
        ccw(0, flag::INTERRUPT, 4, DATA),
    ]);
    let controlled = status::PROGRAM_CONTROLLED;
    assert_eq!(ended(&irb), (PROGRAM + 16, ENDED, controlled, 0));
}

#[test]
fn format_0_has_24_bit_addresses() {
    let s = setup();
    let irb = s.run_as(
        0,
        &[
            ccw0(READ, flag::CHAIN_COMMAND, 8, DATA),
            // Any code with these low bits is a transfer in channel.
            ccw0(0x78, 0, 0, PROGRAM + 24),
            [0; 8],
            ccw0(WRITE, 0, 2, DATA),
        ],
    );
    assert_eq!(ended(&irb), (PROGRAM + 32, ENDED, 0, 0));
    assert_eq!(*s.unit.written.lock().unwrap(), b"ab");
}

#[test]
fn skipped_data_is_not_stored() {
    let s = setup();
    let irb = s.run(&[
        ccw(READ, flag::CHAIN_DATA | flag::SKIP, 2, DATA),
        ccw(0, 0, 6, DATA + 2),
    ]);
    assert_eq!(ended(&irb), (PROGRAM + 16, ENDED, 0, 0));
    assert_eq!(&s.data::<8>(DATA), b"\0\0cdefgh");
}

#[test]
fn indirect_addresses_of_both_formats() {
    let s = setup();
    // 31 bits, blocks of 2 KiB: 4 bytes before a block's end, the rest at
    // another's start.
    let list = [(DATA + 0x7fc).to_be_bytes(), 0x8000_u32.to_be_bytes()].concat();
    s.mem.write_slice(&list, GuestAddress(0x3000)).unwrap();
    let irb = s.run(&[ccw(READ, flag::INDIRECT, 8, 0x3000)]);
    assert_eq!(ended(&irb), (PROGRAM + 8, ENDED, 0, 0));
    assert_eq!(&s.data::<4>(DATA + 0x7fc), b"abcd");
    assert_eq!(&s.data::<4>(0x8000), b"efgh");
    // 64 bits, blocks of 4 KiB, then of 2.
    for (control, first) in [(0, 0x4ffc_u64), (Orb::SMALL_BLOCKS, 0x47fc)] {
        let list = [first.to_be_bytes(), 0x9000_u64.to_be_bytes()].concat();
        s.mem.write_slice(&list, GuestAddress(0x3000)).unwrap();
        let control = Orb::FORMAT_1 | Orb::FORMAT_2_IDAWS | control;
        let irb = s.run_as(control, &[ccw(READ, flag::INDIRECT, 8, 0x3000)]);
        assert_eq!(ended(&irb), (PROGRAM + 8, ENDED, 0, 0));
        assert_eq!(&s.data::<4>(first as u32), b"abcd");
        assert_eq!(&s.data::<4>(0x9000), b"efgh");
    }
}

#[test]
fn malformed_programs_are_program_checks() {
    let s = setup();
    let check = |program: &[[u8; 8]], at: u32| {
        let irb = s.run(program);
        let (address, device, subchannel, _) = ended(&irb);
        assert_eq!(
            (address, device, subchannel),
            (at, 0, status::PROGRAM_CHECK),
            "{program:x?}"
        );
        assert_ne!(half(&irb, 2) & status::ALERT, 0);
    };
    let tic = command::TRANSFER_IN_CHANNEL;
    let (chain, data) = (flag::CHAIN_COMMAND, flag::CHAIN_DATA);
    // A command code of zero, a count of zero with data to chain, an address
    // beyond 31 bits, what needs a facility that is not there.
    check(&[ccw(0x10, 0, 1, DATA)], PROGRAM + 8);
    check(&[ccw(READ, data, 0, DATA), ccw(0, 0, 1, DATA)], PROGRAM + 8);
    check(&[ccw(READ, 0, 1, 0x8000_0000)], PROGRAM + 8);
    check(&[ccw(READ, flag::MODIFIED_INDIRECT, 1, DATA)], PROGRAM + 8);
    check(&[ccw(READ, flag::SUSPEND, 1, DATA)], PROGRAM + 8);
    // Memory that is not there.
    check(&[ccw(READ, 0, 8, SIZE as u32 - 4)], PROGRAM + 8);
    check(&[ccw(READ, flag::INDIRECT, 8, SIZE as u32)], PROGRAM + 8);
    // An indirect list that is not aligned; a second address inside a block.
    check(&[ccw(READ, flag::INDIRECT, 8, 0x3002)], PROGRAM + 8);
    let list = [0x27fc_u32.to_be_bytes(), 0x8004_u32.to_be_bytes()].concat();
    s.mem.write_slice(&list, GuestAddress(0x3000)).unwrap();
    check(&[ccw(READ, flag::INDIRECT, 8, 0x3000)], PROGRAM + 8);
    // Transfers in channel: first, to each other, dirty, beyond memory.
    check(&[ccw(tic, 0, 0, PROGRAM)], PROGRAM + 8);
    let control = ccw(CONTROL, chain, 0, 0);
    check(&[control, ccw(tic, 0, 0, PROGRAM + 8)], PROGRAM + 16);
    check(&[control, ccw(tic, 0, 1, PROGRAM)], PROGRAM + 16);
    check(&[control, ccw(tic, 0, 0, PROGRAM + 4)], PROGRAM + 16);
    check(&[control, ccw(tic, 0, 0, SIZE as u32)], PROGRAM + 16);
    // Round and round.
    check(&[control, ccw(tic, 0, 0, PROGRAM)], PROGRAM + 16);
    // A program at an odd place, and one beyond memory.
    for program in [PROGRAM + 4, SIZE as u32] {
        let mut orb = Setup::orb(Orb::FORMAT_1);
        orb[8..12].copy_from_slice(&program.to_be_bytes());
        assert_eq!(s.css.start(ID, &orb), Ok(0));
        assert_eq!(s.tested()[9], status::PROGRAM_CHECK);
    }
}

#[test]
fn what_must_be_zero_in_the_request_block_is_an_operand_exception() {
    let s = setup();
    let refused = |change: fn(&mut [u8; 32])| {
        let mut orb = Setup::orb(Orb::FORMAT_1);
        change(&mut orb);
        assert_eq!(s.css.start(ID, &orb), Err(Refusal::Operand));
    };
    refused(|orb| orb[5] |= 0x04);
    refused(|orb| orb[7] |= 0x40);
    refused(|orb| orb[8] |= 0x80);
    let mut orb = Setup::orb(Orb::FORMAT_1);
    orb[6] = 0x7f;
    assert_eq!(s.css.start(ID, &orb), Ok(3), "there is one path");
}

#[test]
fn a_rejected_command_leaves_sense_data() {
    let s = setup();
    let chain = flag::CHAIN_COMMAND;
    let irb = s.run(&[ccw(0x55, chain, 4, DATA), ccw(READ, 0, 8, DATA)]);
    assert_eq!(ended(&irb), (PROGRAM + 8, ENDED | status::UNIT_CHECK, 0, 4));
    assert_eq!(irb[16], 0, "no concurrent sense");
    assert_eq!(s.data::<1>(DATA), [0], "the chain stopped");
    s.run(&[ccw(command::SENSE, 0, 32, DATA)]);
    assert_eq!(s.data::<2>(DATA), [SENSE_COMMAND_REJECT, 0]);
    // It is gone then.
    s.run(&[ccw(command::SENSE, 0, 32, DATA)]);
    assert_eq!(s.data::<1>(DATA), [0]);
}

#[test]
fn concurrent_sense_comes_with_the_status() {
    let s = setup();
    let mut schib = s.css.store(ID).unwrap().unwrap();
    schib[27] |= Pmcw::CONCURRENT_SENSE as u8;
    assert_eq!(s.css.modify(ID, &schib), Ok(0));
    let irb = s.run(&[ccw(0x55, 0, 4, DATA)]);
    assert_eq!(word(&irb, 16), 0x0120_0000);
    assert_eq!(irb[32], SENSE_COMMAND_REJECT);
    assert_ne!(half(&irb, 0) & status::FLAG_EXTENDED_CONTROL, 0);
}

#[test]
fn sense_id_tells_the_types() {
    let s = setup();
    let irb = s.run(&[ccw(command::SENSE_ID, flag::SUPPRESS_LENGTH, 32, DATA)]);
    assert_eq!(ended(&irb), (PROGRAM + 8, ENDED, 0, 25));
    assert_eq!(s.data(DATA), [0xff, 0x38, 0x32, 2, 0x12, 0x34, 5]);
}

#[test]
fn a_program_is_suspended_and_resumed() {
    let s = setup();
    let control = Orb::FORMAT_1 | Orb::SUSPEND;
    let program = [
        ccw(READ, flag::CHAIN_COMMAND, 8, DATA),
        ccw(WRITE, flag::SUSPEND, 2, DATA),
    ];
    let irb = s.run_as(control, &program);
    let pending = status::INTERMEDIATE | status::PENDING;
    assert_eq!(half(&irb, 2), status::START | status::SUSPENDED | pending);
    assert!(s.unit.written.lock().unwrap().is_empty());
    // The function goes on: another start is refused.
    assert_eq!(s.css.start(ID, &Setup::orb(control)), Ok(2));
    assert_eq!(s.css.resume(ID), Ok(0));
    assert_eq!(ended(&s.tested()), (PROGRAM + 16, ENDED, 0, 0));
    assert_eq!(*s.unit.written.lock().unwrap(), b"ab");
    assert_eq!(s.css.resume(ID), Ok(2));
    // Without the interruption; halted while it is suspended.
    let quiet = control | Orb::QUIET_SUSPENSION;
    s.write(&program);
    assert_eq!(s.css.start(ID, &Setup::orb(quiet)), Ok(0));
    assert_eq!(s.css.test(ID).unwrap().0, 1);
    assert_eq!(s.css.halt(ID), Ok(0));
    let irb = s.tested();
    assert_eq!(
        half(&irb, 2),
        status::START | status::HALT | status::PENDING
    );
}

#[test]
fn a_halt_of_what_is_suspended_leaves_one_interruption() {
    let s = setup();
    s.write(&[ccw(WRITE, flag::SUSPEND, 2, DATA)]);
    for _ in 0..3 {
        assert_eq!(
            s.css.start(ID, &Setup::orb(Orb::FORMAT_1 | Orb::SUSPEND)),
            Ok(0)
        );
        assert_eq!(s.interrupts.0.lock().unwrap().len(), 1);
        assert_eq!(s.css.halt(ID), Ok(0));
        assert_eq!(s.interrupts.0.lock().unwrap().len(), 1);
        // TEST SUBCHANNEL takes one away.
        s.interrupts.0.lock().unwrap().clear();
        let control = half(&s.tested(), 2);
        assert_eq!(control & status::HALT, status::HALT);
    }
}

#[test]
fn a_device_calls_for_attention() {
    let s = setup();
    let subchannel = s.css.find(ID).unwrap().unwrap();
    subchannel.alert();
    subchannel.alert();
    assert_eq!(s.interrupts.0.lock().unwrap().len(), 1);
    assert_eq!(half(&s.tested(), 2), status::ALERT | status::PENDING);
    subchannel.alert();
    assert_eq!(s.interrupts.0.lock().unwrap().len(), 2);
}

#[test]
fn reports_are_queued() {
    let s = setup();
    assert_eq!(s.css.take_report(), (1, 0));
    assert_eq!(s.css.reset_path(0), Ok(0));
    assert_eq!(s.css.reset_path(1), Ok(3));
    assert_eq!(s.css.reset_path(0x100), Err(Refusal::Operand));
    s.css.report(7);
    let (code, first) = s.css.take_report();
    assert_eq!((code, first), (0, 0x4402_0000));
    s.css.return_report(first);
    assert_eq!(s.css.take_report(), (0, 0x4402_0000));
    assert_eq!(s.css.take_report(), (0, 7));
    assert_eq!(s.css.take_report(), (1, 0));
}

#[test]
fn the_last_report_that_fits_says_that_others_are_lost() {
    let s = setup();
    for _ in 0..1000 {
        assert_eq!(s.css.reset_path(0), Ok(0));
    }
    let reports: Vec<u32> = std::iter::from_fn(|| match s.css.take_report() {
        (0, word) => Some(word),
        _ => None,
    })
    .collect();
    assert_eq!(reports.len(), 16);
    assert_eq!(reports[14], 0x4402_0000);
    assert_eq!(reports[15], 0x6402_0000);
}

#[test]
fn a_program_in_circles_ends() {
    let s = setup();
    let circle = [
        ccw(CONTROL, flag::CHAIN_COMMAND, 0, 0),
        ccw(0x08, 0, 0, PROGRAM),
    ];
    let irb = s.run(&circle);
    assert_eq!(irb[9], status::PROGRAM_CHECK);
}

/// Or the device would go on with what is reset.
#[test]
fn a_reset_waits_for_the_program_that_another_cpu_runs() {
    let s = setup();
    let (begun, has_begun) = channel();
    let (word, wait) = channel();
    *s.unit.hold.lock().unwrap() = Some((begun, wait));
    s.write(&[ccw(HOLD, flag::CHAIN_COMMAND, 0, 0), ccw(WRITE, 0, 4, DATA)]);
    thread::scope(|scope| {
        scope.spawn(|| s.css.start(ID, &Setup::orb(Orb::FORMAT_1)));
        has_begun.recv().unwrap();
        let reset = scope.spawn(|| s.css.reset());
        // Time for one that does not wait.
        thread::sleep(Duration::from_millis(20));
        word.send(()).unwrap();
        reset.join().unwrap();
    });
    assert_eq!(*s.unit.before_reset.lock().unwrap(), 4);
    // Disabled, with no status left.
    assert_eq!(s.css.test(ID).unwrap().0, 3);
    assert_eq!(s.enable(0x2880), Ok(0));
    assert_eq!(s.css.test(ID).unwrap().0, 1);
}

#[test]
fn status_that_is_newer_than_what_was_stored_stays() {
    let s = setup();
    s.write(&[ccw(CONTROL, 0, 0, 0)]);
    assert_eq!(s.css.start(ID, &Setup::orb(Orb::FORMAT_1)), Ok(0));
    let (_, irb) = s.css.test(ID).unwrap();
    // Another CPU is quicker, and clears.
    assert_eq!(s.css.clear(ID), Ok(0));
    s.css.accept_status(ID, &irb.unwrap());
    let (code, irb) = s.css.test(ID).unwrap();
    let control = half(&irb.unwrap().bytes(), 2);
    assert_eq!((code, control), (0, status::CLEAR | status::PENDING));
}

#[test]
fn a_reset_disables_and_reaches_the_device() {
    let s = setup();
    s.css.report(7);
    s.css.reset();
    assert_eq!(*s.unit.resets.lock().unwrap(), 1);
    assert_eq!(half(&s.css.store(ID).unwrap().unwrap(), 4), Pmcw::VALID);
    assert_eq!(s.css.take_report(), (1, 0));
    assert!(s.css.notify(ID, 3));
    assert!(!s.css.notify(ID + 1, 3) && !s.css.notify(0, 3));
    assert_eq!(*s.unit.rung.lock().unwrap(), [3]);
}

/// It is compared with no storage key, see [`Orb::control`].
#[test]
fn the_key_of_the_program_is_in_its_status() {
    let s = setup();
    let irb = s.run_as(Orb::FORMAT_1 | 0x9000, &[ccw(READ, 0, 8, DATA)]);
    assert_eq!(half(&irb, 0) & Orb::KEY, 0x9000);
    assert_eq!(ended(&irb), (PROGRAM + 8, ENDED, 0, 0));
    let irb = s.run(&[ccw(READ, 0, 8, DATA)]);
    assert_eq!(half(&irb, 0) & Orb::KEY, 0);
}
