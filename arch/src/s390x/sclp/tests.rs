use crossvisor_devices::chardev::ConsoleInput;

use super::*;
use crate::s390x::testing::{Bench, MEMORY, Regs};

const SCCB: u64 = 0x8000;

/// SERVICE CALL with the command in register 2 and the SCCB in 3.
fn service(bench: &Bench, command: u32, address: u64) -> (Option<u16>, Vec<u32>) {
    let mut regs = Regs::with(&[(2, command.into()), (3, address)]);
    bench.instruction(0xb220, 2 << 20 | 3 << 16, &mut regs);
    let injected = bench.vm.record().injected.clone();
    let signals = injected.iter().filter(|(_, i)| i.kind == 0xffff_2401);
    let parameters = signals
        .filter_map(|(_, i)| i.data.first_chunk())
        .map(|bytes| u32::from_be_bytes(*bytes))
        .collect();
    (bench.program(), parameters)
}

/// Runs a command on an SCCB that begins so, and returns its response.
fn call(bench: &Bench, command: u32, sccb: &[u8]) -> u16 {
    bench.write(SCCB, &[0; 4096]);
    bench.write(SCCB, sccb);
    let (program, signals) = service(bench, command, SCCB);
    assert_eq!(program, None);
    assert_eq!(signals.last().map(|signal| signal & !7), Some(SCCB as u32));
    u16::from_be_bytes(bench.read(SCCB + 6))
}

fn mask(bench: &Bench, listens: u32) {
    let mut sccb = vec![0, 28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4];
    sccb.extend(listens.to_be_bytes());
    assert_eq!(call(bench, command::WRITE_EVENT_MASK, &sccb), 0x20);
    // What SCLP receives: messages and VT220; what it sends: commands, VT220,
    // the request to shut down.
    assert_eq!(bench.read::<4>(SCCB + 20), [0x40, 0, 0, 0x40]);
    assert_eq!(bench.read::<4>(SCCB + 24), [0x80, 0, 0, 0x48]);
}

fn read_events(bench: &Bench) -> u16 {
    call(bench, command::READ_EVENT_DATA, &[0x10, 0, 0, 0, 0, 0x80])
}

#[test]
fn misplaced_blocks_are_program_interruptions() {
    let bench = Bench::new(1);
    bench.write(SCCB, &[0, 16]);
    let program = |address| service(&bench, command::READ_EVENT_DATA, address).0;
    assert_eq!(program(0x1000), Some(6), "in the prefix area");
    assert_eq!(program(SCCB + 4), Some(6), "not on a doubleword");
    assert_eq!(program(1 << 31), Some(6), "beyond 2 GiB");
    assert_eq!(program(MEMORY as u64), Some(5));
    bench.write(SCCB, &[0, 7]);
    assert_eq!(program(SCCB), Some(6), "too short for a header");
    bench.write(SCCB + 8, &[0x10, 0]);
    assert_eq!(program(SCCB + 8), None);
    assert_eq!(bench.read::<2>(SCCB + 14), [1, 0], "crosses a page");
    // At the end of memory, longer than what is left of it.
    bench.write(MEMORY as u64 - 8, &[0, 64]);
    assert_eq!(program(MEMORY as u64 - 8), Some(5));
}

#[test]
fn the_machine_is_told() {
    let bench = Bench::new(70);
    assert_eq!(call(&bench, command::READ_SCP_INFO, &[0x10, 0]), 0x10);
    assert_eq!(
        bench.read::<3>(SCCB + 8),
        [0, 4, 1],
        "4 increments of 1 MiB"
    );
    assert_eq!(bench.read::<4>(SCCB + 16), [0, 70, 0, 144]);
    assert_eq!(bench.read::<2>(SCCB + 120), [0, 69]);
    assert_eq!(bench.read::<1>(SCCB + 134), [0], "no DIAGNOSE 0x318");
    assert_eq!(bench.read::<1>(SCCB + 144 + 69 * 16), [69]);
    // A block that is too short learns how long it must be.
    assert_eq!(call(&bench, command::READ_SCP_INFO, &[1, 0]), 0x300);
    assert_eq!(bench.read::<2>(SCCB), (144 + 70 * 16_u16).to_be_bytes());
    assert_eq!(call(&bench, command::READ_CPU_INFO, &[0x10, 0]), 0x10);
    assert_eq!(bench.read::<4>(SCCB + 8), [0, 70, 0, 16]);
    assert_eq!(call(&bench, 0x0004_0001, &[0x10, 0]), 0x1f0);
}

#[test]
fn diagnose_318_is_told_where_it_is() {
    let facts = Facts {
        memory: 1 << 30,
        cpus: 1,
        consoles: false,
        control_program: true,
    };
    let mut sccb = vec![0; 4096];
    assert_eq!(alone(facts).read_scp_info(&mut sccb), 0x10);
    assert_eq!(sccb[134], 0x80);
}

/// SCLP without a guest.
fn alone(facts: Facts) -> Arc<Sclp> {
    let vm = Arc::new(crossvisor_vmm::double::ScriptedVm::default());
    Sclp::new(facts, vm, Arc::new(Output::nowhere().unwrap())).unwrap()
}

#[test]
fn a_machine_whose_console_is_another_device_has_none_of_sclp_s() {
    let facts = Facts {
        memory: 1 << 30,
        cpus: 1,
        consoles: false,
        control_program: false,
    };
    let mut sccb = vec![0, 28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4];
    sccb.resize(28, 0xff);
    let response = alone(facts).execute(command::WRITE_EVENT_MASK, &mut sccb);
    assert_eq!(response, 0x20);
    assert_eq!(sccb[20..], [0, 0, 0, 0, 0, 0, 0, 8]);
}

#[test]
fn much_memory_is_told_in_the_wide_field() {
    let facts = Facts {
        memory: 1 << 40,
        cpus: 1,
        consoles: false,
        control_program: false,
    };
    let sclp = alone(facts);
    let mut sccb = vec![0; 4096];
    assert_eq!(sclp.read_scp_info(&mut sccb), 0x10);
    assert_eq!(sccb[8..10], [0, 0]);
    assert_eq!(sccb[104..112], (1u64 << 20).to_be_bytes());
}

#[test]
fn masks_of_odd_lengths_are_refused() {
    let bench = Bench::new(1);
    let length = |length: u16| {
        let [high, low] = length.to_be_bytes();
        let sccb = [0, 100, 0, 0, 0, 0, 0, 0, 0, 0, high, low];
        call(&bench, command::WRITE_EVENT_MASK, &sccb)
    };
    assert_eq!(length(0), 0x74f0);
    assert_eq!(length(1022), 0x74f0);
    assert_eq!(length(1021), 0x300);
    assert_eq!(length(1), 0x20);
}

#[test]
fn shutting_down_is_an_event() {
    let bench = Bench::new(1);
    assert_eq!(read_events(&bench), 0x60f0);
    bench.handler.sclp.quiesce();
    assert!(bench.vm.record().injected.is_empty(), "nobody listens");
    mask(&bench, 8);
    bench.handler.sclp.quiesce();
    assert_eq!(bench.vm.record().injected.len(), 1);
    bench.program();
    assert_eq!(read_events(&bench), 0x20);
    assert_eq!(bench.read::<2>(SCCB), [0, 17]);
    assert_eq!(bench.read::<9>(SCCB + 8), [0, 9, 0x1d, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read_events(&bench), 0x60f0);
}

#[test]
fn what_is_typed_goes_to_the_vt220_console() {
    let bench = Bench::new(1);
    mask(&bench, 0x40);
    let sclp = &bench.handler.sclp;
    assert_eq!(sclp.push(b"ls"), 2);
    assert_eq!(read_events(&bench), 0x20);
    assert_eq!(
        bench.read::<9>(SCCB + 8),
        [0, 9, 0x1a, 0, 0, 0, 0, b'l', b's']
    );
    // As much as fits, and no more than there is room for.
    let many = vec![b'x'; 5000];
    assert_eq!(sclp.push(&many), 4096);
    assert_eq!(sclp.push(&many), 0);
    assert_eq!(read_events(&bench), 0x20);
    assert!(sclp.room().read().is_ok());
    assert_eq!(read_events(&bench), 0x20);
    assert_eq!(read_events(&bench), 0x60f0);
}

#[test]
fn lines_go_to_the_line_mode_console_as_commands() {
    let bench = Bench::new(1);
    mask(&bench, 0x8000_0000);
    let sclp = &bench.handler.sclp;
    sclp.push(b"l");
    assert_eq!(read_events(&bench), 0x60f0);
    sclp.push(b"s\rx");
    assert_eq!(read_events(&bench), 0x20);
    let event: [u8; 24] = bench.read(SCCB + 8);
    assert_eq!(event[..6], [0, 24, 1, 0, 0, 0]);
    assert_eq!(
        event[6..],
        [
            0, 18, 0x13, 0x10, 0, 14, 0x12, 0x12, 0, 10, 0x13, 0x20, 6, 0x31, 4, 0x30, 0x93, 0xa2
        ]
    );
    assert_eq!(read_events(&bench), 0x60f0);
}

/// The user's line goes on in another command, as nothing else would make room
/// for its end.
#[test]
fn a_line_that_is_too_long_is_several_commands() {
    let bench = Bench::new(1);
    mask(&bench, 0x8000_0000);
    let sclp = &bench.handler.sclp;
    let mut long = vec![b'x'; 250];
    long.push(b'\n');
    assert_eq!(sclp.push(&long), 251);
    for length in [240, 10] {
        assert_eq!(read_events(&bench), 0x20);
        // The text's own length, with two bytes before it.
        assert_eq!(bench.read::<2>(SCCB + 8 + 18), [length + 4, 0x31]);
        assert_eq!(bench.read::<2>(SCCB + 8 + 20), [length + 2, 0x30]);
    }
    assert_eq!(read_events(&bench), 0x60f0);
    // As much as fits, without an end.
    assert_eq!(sclp.push(&[b'x'; 5000]), 4096);
    assert_eq!(read_events(&bench), 0x20);
    assert!(sclp.room().read().is_ok());
}

/// A sink that a test looks at.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn both_consoles_print() {
    let printed = Printed::default();
    let mut consoles = Consoles::new(Arc::new(
        Output::new("printed", Box::new(printed.clone())).unwrap(),
    ));
    let mut message = vec![0, 0, 0, 1, 0xd4, 0xc4, 0xc2, 0x40, 0, 0, 0, 1];
    // An object that is no text, then "Hi".
    message.extend([0, 6, 0, 1, 9, 9]);
    message.extend([0, 12, 0, 4, 0, 0, 0, 0, 0, 0, 0xc8, 0x89]);
    message[1] = message.len() as u8;
    let mut sccb = vec![0; 8];
    sccb.extend([0, 8, 0x1a, 0, 0, 0, b'o', b'k']);
    let length = message.len() as u8 + 6;
    sccb.extend([0, length, 2, 0, 0, 0]);
    sccb.extend(&message);
    assert_eq!(events::write_data(&mut sccb, &mut consoles), 0x20);
    assert_eq!((sccb[11], sccb[19]), (0x80, 0x80), "processed");
    drop(consoles);
    assert_eq!(*printed.0.lock().unwrap(), b"okHi\r\n");
}

#[test]
fn buffers_that_do_not_fit_are_inconsistent() {
    let mut consoles = Consoles::new(Arc::new(Output::nowhere().unwrap()));
    let mut write = |buffer: &[u8]| {
        let mut sccb = [&[0; 8], buffer].concat();
        events::write_data(&mut sccb, &mut consoles)
    };
    assert_eq!(write(&[]), 0x72f0);
    assert_eq!(write(&[0, 0, 0x1a, 0, 0, 0]), 0x73f0);
    assert_eq!(write(&[0xff, 0xff, 0x1a, 0, 0, 0]), 0x73f0);
    assert_eq!(write(&[0, 6, 0x99, 0, 0, 0]), 0x40f0);
    // Objects that lead nowhere, or to themselves, end a message.
    for length in [0, 3, 0xff] {
        let mut message = vec![0, 24, 2, 0, 0, 0, 0, 18, 0, 1, 0xd4, 0xc4, 0xc2, 0x40];
        message.extend([0, 0, 0, 1, 0, length, 0, 4, 0, 0]);
        assert_eq!(write(&message), 0x20);
    }
}
