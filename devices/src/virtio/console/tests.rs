use super::*;
use crate::byte_order::{ByteOrder, Number};
use crate::output::tests::{Blocked, Captured, output};
use crate::virtio::testing::{BUFFERS, Buf, Driver, END_OF_RAM, by_either_interface, into, out};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

const RX: usize = 0;
const TX: usize = 1;
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
const PORT_RX: usize = 4;
const PORT_TX: usize = 5;

/// Control messages are exchanged here.
const CONTROL: u64 = BUFFERS + 0x8_0000;

struct Setup {
    console: Console,
    order: ByteOrder,
    driver: Driver,
    screen: Captured,
}

impl Setup {
    fn new(interface: Interface, ports: Vec<Port>) -> Self {
        let screen = Captured::default();
        let mut console = Console::new(
            "console0",
            ConsoleOptions {
                output: output(&screen),
                size: Some((132, 43)),
                ports,
            },
        )
        .unwrap();
        let driver = Driver::with(console.queue_sizes(), interface);
        console
            .activate(driver.activation(console.features()))
            .unwrap();
        Self {
            console,
            order: interface.order(),
            driver,
            screen,
        }
    }

    fn tell(&mut self, id: u32, event: u16, value: u16) {
        let mut raw = [0; 8];
        raw[..4].copy_from_slice(&id.to_bytes(self.order));
        raw[4..6].copy_from_slice(&event.to_bytes(self.order));
        raw[6..].copy_from_slice(&value.to_bytes(self.order));
        self.driver.write(CONTROL, &raw);
        self.driver.queues[CONTROL_TX].add(&[out(CONTROL, 8)]);
        assert_eq!(self.driver.queues[CONTROL_TX].run().1, 0);
    }

    /// The next message to the driver: id, event, value and what follows.
    fn told(&mut self) -> (u32, u16, u16, String) {
        let at = CONTROL + 0x100;
        self.driver.queues[CONTROL_RX].add(&[into(at, 100)]);
        let (_, len) = self.driver.queues[CONTROL_RX].run();
        let raw = self.driver.read(at, len as usize);
        let short = |at: usize| u16::of_bytes([raw[at], raw[at + 1]], self.order);
        let id = u32::of_bytes(raw[..4].try_into().unwrap(), self.order);
        let name = String::from_utf8(raw[8..].to_vec()).unwrap();
        (id, short(4), short(6), name)
    }

    /// What Linux does to set up a console and one named port.
    fn set_up(&mut self, name: &str) {
        self.tell(0xffff_ffff, 0, 1);
        assert_eq!(self.told(), (0, 1, 1, String::new()));
        assert_eq!(self.told(), (1, 1, 1, String::new()));
        self.tell(0, 3, 1);
        assert_eq!(self.told(), (0, 4, 1, String::new()));
        assert_eq!(self.told(), (0, 6, 1, String::new()));
        self.tell(1, 3, 1);
        assert_eq!(self.told(), (1, 7, 1, name.to_owned()));
        assert_eq!(self.told(), (1, 6, 1, String::new()));
    }

    fn print(&mut self, queue: usize, text: &[u8]) {
        self.driver.write(BUFFERS, text);
        self.driver.queues[queue].add(&[out(BUFFERS, text.len() as u32)]);
        assert_eq!(self.driver.queues[queue].run().1, 0);
    }

    /// Reads up to `len` bytes from a receive queue.
    fn get(&mut self, queue: usize, len: u32) -> Vec<u8> {
        self.driver.queues[queue].add(&[into(BUFFERS + 0x1000, len)]);
        let (_, len) = self.driver.queues[queue].run();
        self.driver.read(BUFFERS + 0x1000, len as usize)
    }

    fn flush(&self) {
        assert!(self.console.outputs().flush(Duration::from_secs(10)));
    }
}

fn port(input: Option<OwnedFd>, output: Option<Arc<Output>>) -> Port {
    Port {
        name: "org.crossvisor.io".to_owned(),
        input,
        output,
        on_open: None,
    }
}

by_either_interface!(
    a_plain_console_prints_and_reads,
    typing_too_much_is_held_back_and_nothing_is_lost,
    a_blocked_terminal_holds_up_the_guest_and_not_the_end,
    an_end_can_wait_for_all_that_the_guest_has_written,
    what_the_guest_said_last_counts,
    ports_are_announced_opened_and_ended,
    a_regular_file_is_read_to_its_end,
    a_stream_waits_for_the_guest_to_have_room,
    a_reset_forgets_who_had_opened_what,
    a_driver_without_ports_gets_the_console,
    hostile_drivers_get_nothing_out_of_it,
);

fn a_plain_console_prints_and_reads(interface: Interface) {
    let mut s = Setup::new(interface, Vec::new());
    assert_eq!(s.console.features(), 1 << F_SIZE);
    assert_eq!(s.console.queue_sizes().len(), 2);
    let mut config = [0xff; 12];
    s.console.read_config(interface, 0, &mut config);
    let expected: [u8; 12] = match interface {
        Interface::Modern => [132, 0, 43, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        Interface::Legacy(_) => [0, 132, 0, 43, 0, 0, 0, 1, 0, 0, 0, 0],
    };
    assert_eq!(config, expected);

    s.driver.write(BUFFERS, b"hello, ");
    s.driver.write(BUFFERS + 100, b"world\n");
    s.driver.queues[TX].add(&[out(BUFFERS, 7), out(BUFFERS + 100, 6)]);
    s.driver.queues[TX].run();
    s.flush();
    assert_eq!(s.screen.bytes(), b"hello, world\n");

    let input = s.console.input();
    assert_eq!(input.push(b"typed ahead"), 11);
    assert_eq!(s.get(RX, 5), b"typed");
    assert_eq!(s.get(RX, 100), b" ahead");
    s.driver.queues[RX].add(&[into(BUFFERS, 1), into(BUFFERS + 0x100, 50)]);
    s.driver.queues[RX].expect_silence();
    input.push(b"later");
    assert_eq!(s.driver.queues[RX].wait().1, 5);
    assert_eq!(s.driver.read(BUFFERS + 0x100, 4), b"ater");
}

fn typing_too_much_is_held_back_and_nothing_is_lost(interface: Interface) {
    let mut s = Setup::new(interface, Vec::new());
    let input = s.console.input();
    let typed: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
    let mut sent = input.push(&typed);
    assert!(sent < typed.len());
    let mut got = Vec::new();
    while got.len() < typed.len() {
        got.extend(s.get(RX, 1000));
        if input.room().read().is_ok() {
            sent += input.push(&typed[sent..]);
        }
    }
    assert_eq!(got, typed);
}

fn a_blocked_terminal_holds_up_the_guest_and_not_the_end(interface: Interface) {
    let sink = Blocked::default();
    let options = ConsoleOptions {
        output: output(&sink),
        size: None,
        ports: Vec::new(),
    };
    let mut console = Console::new("console0", options).unwrap();
    let mut driver = Driver::with(console.queue_sizes(), interface);
    console.activate(driver.activation(0)).unwrap();
    let text: Vec<u8> = (0..300_000u32).map(|i| (i % 253) as u8).collect();
    driver.write(BUFFERS, &text);
    driver.queues[TX].add(&[out(BUFFERS, 100_000), out(BUFFERS + 100_000, 200_000)]);
    driver.queues[TX].expect_silence();
    // Stopping does not wait for the terminal, and loses nothing: a driver that
    // resets the device never comes back for what is in its queue.
    let queues = console.deactivate();
    assert_eq!(queues[TX].queue.next_avail(), 1);
    assert_eq!(driver.queues[TX].wait(), (0, 0));
    driver.queues[RX].add(&[into(BUFFERS + 0x8_0000, 10)]);
    let mut activation = driver.activation(0);
    activation.queues = queues;
    // The receive queue has been used before, as in any paused guest.
    activation.queues[RX].queue.set_next_avail(1);
    console.activate(activation).unwrap();
    // Nothing more is taken than there is room for.
    driver.queues[TX].add(&[out(BUFFERS, 100)]);
    driver.queues[TX].expect_silence();
    sink.open();
    assert_eq!(driver.queues[TX].wait().1, 0);
    assert!(console.outputs().flush(Duration::from_secs(10)));
    assert_eq!(sink.captured.bytes(), [&text[..], &text[..100]].concat());
    assert_eq!(console.outputs().lost(), 0);
}

fn an_end_can_wait_for_all_that_the_guest_has_written(interface: Interface) {
    let sink = Blocked::default();
    let mut s = Setup::new(interface, vec![port(None, Some(output(&sink)))]);
    let outputs = s.console.outputs();
    assert!(outputs.drain(Duration::from_secs(10)));
    // More than the output holds, in several chains.
    let text: Vec<u8> = (0..400_000u32).map(|i| (i % 253) as u8).collect();
    s.driver.write(BUFFERS, &text);
    for piece in 0..4 {
        s.driver.queues[PORT_TX].add(&[out(BUFFERS + piece * 100_000, 100_000)]);
    }
    // No notification.
    assert!(!outputs.drain(Duration::from_millis(20)));
    sink.open();
    assert!(outputs.drain(Duration::from_secs(10)));
    assert_eq!(sink.captured.bytes(), text);
    // Without a driver there is nothing to wait for.
    s.console.deactivate();
    assert!(outputs.drain(Duration::from_secs(10)));
}

fn what_the_guest_said_last_counts(interface: Interface) {
    let mut s = Setup::new(interface, Vec::new());
    s.driver.write(BUFFERS, b"bye");
    s.driver.queues[TX].add(&[out(BUFFERS, 3)]);
    // No notification.
    s.console.deactivate();
    s.flush();
    assert_eq!(s.screen.bytes(), b"bye");
}

fn ports_are_announced_opened_and_ended(interface: Interface) {
    let (host, guest) = UnixStream::pair().unwrap();
    let captured = Captured::default();
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&events);
    let mut s = Setup::new(
        interface,
        vec![Port {
            on_open: Some(Box::new(move |open| log.lock().unwrap().push(open))),
            ..port(Some(guest.into()), Some(output(&captured)))
        }],
    );
    assert_eq!(s.console.queue_sizes().len(), 6);
    s.set_up("org.crossvisor.io");

    // Nothing is given to a port that nobody in the guest reads.
    (&host).write_all(b"first").unwrap();
    s.driver.queues[PORT_RX].add(&[into(BUFFERS + 0x2000, 100)]);
    s.driver.queues[PORT_RX].expect_silence();
    s.tell(1, 6, 1);
    assert_eq!(s.driver.queues[PORT_RX].wait().1, 5);
    assert_eq!(s.driver.read(BUFFERS + 0x2000, 5), b"first");
    s.print(PORT_TX, b"output");
    s.print(TX, b"console");
    s.flush();
    assert_eq!(captured.bytes(), b"output");
    assert_eq!(s.screen.bytes(), b"console");

    (&host).write_all(b"last").unwrap();
    drop(host);
    assert_eq!(s.get(PORT_RX, 100), b"last");
    s.driver.queues[PORT_RX].add(&[into(BUFFERS, 100)]);
    s.driver.queues[PORT_RX].expect_silence();
    assert_eq!(s.told(), (1, 6, 0, String::new()), "end of file");
    s.tell(1, 6, 0);
    s.tell(1, 6, 0);
    assert_eq!(*events.lock().unwrap(), [true, false]);
}

fn a_regular_file_is_read_to_its_end(interface: Interface) {
    let content: Vec<u8> = (0..100_000u32).map(|i| (i % 241) as u8).collect();
    let mut file: File = tempfile::tempfile().unwrap();
    file.write_all(&content).unwrap();
    file.rewind().unwrap();
    let mut s = Setup::new(interface, vec![port(Some(file.into()), None)]);
    s.set_up("org.crossvisor.io");
    s.tell(1, 6, 1);
    let mut got = Vec::new();
    while got.len() < content.len() {
        got.extend(s.get(PORT_RX, 3000));
    }
    assert_eq!(got, content);
    s.driver.queues[PORT_RX].add(&[into(BUFFERS, 100)]);
    s.driver.queues[PORT_RX].kick();
    assert_eq!(s.told(), (1, 6, 0, String::new()));
}

fn a_stream_waits_for_the_guest_to_have_room(interface: Interface) {
    let (host, guest) = UnixStream::pair().unwrap();
    let mut s = Setup::new(interface, vec![port(Some(guest.into()), None)]);
    s.set_up("org.crossvisor.io");
    s.tell(1, 6, 1);
    let content: Vec<u8> = (0..500_000u32).map(|i| (i % 239) as u8).collect();
    let sent = content.clone();
    let writer = thread::spawn(move || (&host).write_all(&sent).unwrap());
    let mut got = Vec::new();
    while got.len() < content.len() {
        got.extend(s.get(PORT_RX, 4096));
    }
    writer.join().unwrap();
    assert_eq!(got, content);
    // Nobody listens to what this port says; it is taken all the same.
    s.print(PORT_TX, b"into the void");
}

fn a_reset_forgets_who_had_opened_what(interface: Interface) {
    let (host, guest) = UnixStream::pair().unwrap();
    let mut s = Setup::new(interface, vec![port(Some(guest.into()), None)]);
    s.set_up("org.crossvisor.io");
    s.tell(1, 6, 1);
    s.console.deactivate();
    s.driver = Driver::with(s.console.queue_sizes(), interface);
    s.console
        .activate(s.driver.activation(s.console.features()))
        .unwrap();
    (&host).write_all(b"late").unwrap();
    s.driver.queues[PORT_RX].add(&[into(BUFFERS, 100)]);
    s.driver.queues[PORT_RX].expect_silence();
    s.set_up("org.crossvisor.io");
    s.tell(1, 6, 1);
    assert_eq!(s.driver.queues[PORT_RX].wait().1, 4);
}

fn a_driver_without_ports_gets_the_console(interface: Interface) {
    let mut s = Setup::new(interface, vec![port(None, None)]);
    s.console.deactivate();
    s.driver = Driver::with(&[64, 64], interface);
    s.console.activate(s.driver.activation(0)).unwrap();
    s.print(TX, b"plain");
    s.flush();
    assert_eq!(s.screen.bytes(), b"plain");
    s.console.deactivate();
    let mut activation = s.driver.activation(0);
    activation.queues.remove(0);
    assert!(matches!(
        s.console.activate(activation),
        Err(ActivateError::MissingQueue(0))
    ));
}

fn hostile_drivers_get_nothing_out_of_it(interface: Interface) {
    let mut s = Setup::new(interface, vec![port(None, None)]);
    // Messages about ports that do not exist, unknown, short and empty ones.
    for (id, event, value) in [
        (2, 3, 1),
        (u32::MAX, 3, 1),
        (u32::MAX, 6, 1),
        (7, 6, 0),
        (0, 6, 0),
        (1, 99, 1),
        (1, 1, 1),
        (0, 0, 0),
    ] {
        s.tell(id, event, value);
    }
    for bad in [
        out(CONTROL, 7),
        out(CONTROL, 0),
        into(CONTROL, 8),
        out(END_OF_RAM, 8),
        out(CONTROL, u32::MAX),
    ] {
        s.driver.queues[CONTROL_TX].add(&[bad]);
        assert_eq!(s.driver.queues[CONTROL_TX].run().1, 0);
    }
    // Asking again and again without listening costs nothing.
    for _ in 0..1000 {
        s.tell(0, 0, 1);
        s.tell(1, 3, 1);
    }
    let bad: [(usize, Buf); 7] = [
        (CONTROL_RX, out(CONTROL, 8)),
        (CONTROL_RX, into(END_OF_RAM, 8)),
        (TX, into(BUFFERS, 8)),
        (TX, out(END_OF_RAM - 4, 8)),
        (PORT_TX, out(u64::MAX, 1)),
        (RX, out(BUFFERS, 8)),
        (RX, into(END_OF_RAM, 8)),
    ];
    s.console.input().push(b"x");
    for (queue, buf) in bad {
        s.driver.queues[queue].add(&[buf]);
        assert_eq!(s.driver.queues[queue].run().1, 0, "queue {queue}");
    }
    assert_eq!(s.get(RX, 10), b"x");
    assert_eq!(s.told(), (1, 1, 1, String::new()));
    for queue in [TX, PORT_TX, CONTROL_TX, RX, PORT_RX, CONTROL_RX] {
        s.driver.queues[queue].jump(50_000);
        s.driver.queues[queue].expect_silence();
    }
    assert_eq!(s.console.deactivate().len(), 6);
}
