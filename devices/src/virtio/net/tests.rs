use super::*;
use crate::byte_order::Number;
use crate::tap::TapError;
use crate::tap::tests::inject;
use crate::virtio::testing::{BUFFERS, Driver, END_OF_RAM, INTERFACES, SEAM, into, out};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::Duration;

const RX: usize = 0;
const TX: usize = 1;

/// A pair's worker with a socket in place of the tap.
struct Pair {
    wire: UnixDatagram,
    worker: Option<Worker<PairHandler>>,
    driver: Driver,
    backend: Arc<Backend>,
    header: Header,
}

impl Pair {
    fn new(mergeable: bool, max_frame: usize) -> Self {
        Self::with(Interface::Modern, mergeable, max_frame)
    }

    fn with(interface: Interface, mergeable: bool, max_frame: usize) -> Self {
        let header = Header {
            counts_buffers: mergeable || !interface.is_legacy(),
            order: interface.order(),
        };
        let (wire, tap) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        tap.set_nonblocking(true).unwrap();
        let tap = Tap::of_queues(vec![File::from(OwnedFd::from(tap))], 1500);
        let gate = Gate {
            open: Mutex::new(true),
            changed: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        let backend = Arc::new(Backend {
            tap: Arc::new(tap),
            gates: vec![gate],
        });
        let driver = Driver::with(&[16, 16], interface);
        let mut pair = Self {
            wire,
            worker: None,
            driver,
            backend,
            header,
        };
        let activation = pair.driver.activation(0);
        pair.start(mergeable, max_frame, activation.queues);
        pair
    }

    fn start(&mut self, mergeable: bool, max_frame: usize, queues: Vec<ActiveQueue>) {
        let handler = PairHandler::new(
            Arc::clone(&self.backend),
            0,
            mergeable,
            self.header,
            max_frame,
        );
        let mem = self.driver.mem.clone();
        let link = &self.driver.link;
        self.worker = Some(Worker::spawn("net0-q0", mem, link, queues, handler).unwrap());
    }

    fn packet(len: usize, seed: u8) -> Vec<u8> {
        let mut packet = vec![0; Header::MAX];
        packet.extend((Header::MAX..len).map(|i| (i as u8).wrapping_add(seed)));
        packet
    }

    /// What the driver sees of `packet` over `count` buffers.
    fn seen(mut packet: Vec<u8>, count: u16) -> Vec<u8> {
        packet[10..12].copy_from_slice(&count.to_le_bytes());
        packet
    }

    fn received(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 70_000];
        for _ in 0..500 {
            if let Ok(len) = self.wire.recv(&mut packet) {
                packet.truncate(len);
                return Some(packet);
            }
            thread::sleep(Duration::from_millis(2));
        }
        None
    }

    /// A packet goes through in either direction.
    fn assert_alive(&mut self) {
        let packet = Self::packet(100, 9);
        self.driver.write(BUFFERS, &packet);
        self.driver.queues[TX].add(&[out(BUFFERS, 100)]);
        assert_eq!(self.driver.queues[TX].run().1, 0);
        assert_eq!(self.received().unwrap(), packet);

        self.driver.queues[RX].add(&[into(BUFFERS, 2000)]);
        self.driver.queues[RX].kick();
        self.wire.send(&packet).unwrap();
        assert_eq!(self.driver.queues[RX].wait().1, 100);
        assert_eq!(self.driver.read(BUFFERS, 100), Self::seen(packet, 1));
    }
}

#[test]
fn transmits_from_wherever_the_buffers_are() {
    let mut p = Pair::new(true, 1530);
    let packet = Pair::packet(1000, 1);
    let parts = [(SEAM - 5, 7), (BUFFERS, 500), (BUFFERS + 0x1000, 493)];
    let mut at = 0;
    for (addr, len) in parts {
        p.driver.write(addr, &packet[at..at + len]);
        at += len;
    }
    let bufs = parts.map(|(addr, len)| out(addr, len as u32));
    p.driver.queues[TX].add(&bufs);
    p.driver.queues[TX].run();
    assert_eq!(p.received().unwrap(), packet);
    p.assert_alive();
}

#[test]
fn spreads_a_packet_over_mergeable_buffers_and_shows_them_together() {
    // Enough buffers for the largest packet, and then too few.
    for count in [4, 2] {
        let mut p = Pair::new(true, 1530);
        for i in 0..count {
            p.driver.queues[RX].add(&[into(BUFFERS + 0x1000 * i, 512)]);
        }
        p.driver.queues[RX].kick();
        let packet = Pair::packet(900, 3);
        p.wire.send(&packet).unwrap();
        assert_eq!(p.driver.queues[RX].wait(), (0, 512));
        assert_eq!(p.driver.queues[RX].used_index(), 2);
        assert_eq!(p.driver.queues[RX].poll(), Some((1, 388)));
        let mut got = p.driver.read(BUFFERS, 512);
        got.extend(p.driver.read(BUFFERS + 0x1000, 388));
        assert_eq!(got, Pair::seen(packet, 2));
        let left = p.driver.queues[RX].used_index();
        assert_eq!(left, 2, "the other buffers stay");
    }
}

#[test]
fn a_packet_waits_for_buffers_and_none_is_lost() {
    let mut p = Pair::new(true, 1530);
    let packets: Vec<_> = (0..5).map(|i| Pair::packet(600, i)).collect();
    for packet in &packets {
        p.wire.send(packet).unwrap();
    }
    p.driver.queues[RX].expect_silence();
    for (packet, base) in packets.into_iter().zip((0..).map(|i| BUFFERS + i * 0x1000)) {
        p.driver.queues[RX].add(&[into(base, 400)]);
        p.driver.queues[RX].expect_silence();
        p.driver.queues[RX].add(&[into(base + 0x800, 400)]);
        assert_eq!(p.driver.queues[RX].run().1, 400);
        assert_eq!(p.driver.queues[RX].wait().1, 200);
        let mut got = p.driver.read(base, 400);
        got.extend(p.driver.read(base + 0x800, 200));
        assert_eq!(got, Pair::seen(packet, 2));
    }
    p.assert_alive();
}

/// Section 5.1.6.1: the number of buffers is in the header only where packets may
/// be spread, and in the guest's order.
#[test]
fn legacy_headers_are_shorter_or_in_the_guests_order() {
    let legacy = Interface::Legacy(ByteOrder::Big);
    let mut p = Pair::with(legacy, true, 1530);
    for i in 0..2 {
        p.driver.queues[RX].add(&[into(BUFFERS + 0x1000 * i, 512)]);
    }
    p.driver.queues[RX].kick();
    p.wire.send(&Pair::packet(900, 3)).unwrap();
    assert_eq!(p.driver.queues[RX].wait(), (0, 512));
    assert_eq!(p.driver.queues[RX].poll(), Some((1, 388)));
    assert_eq!(p.driver.read(BUFFERS + 10, 2), [0, 2]);

    let mut p = Pair::with(legacy, false, 1528);
    assert_eq!(p.header.bytes(), 10);
    p.driver.queues[RX].add(&[into(BUFFERS, 10), into(BUFFERS + 0x1000, 1518)]);
    p.driver.queues[RX].kick();
    let packet: Vec<u8> = (0..100).collect();
    p.wire.send(&packet).unwrap();
    assert_eq!(p.driver.queues[RX].wait().1, 100);
    assert_eq!(p.driver.read(BUFFERS, 10), packet[..10]);
    assert_eq!(p.driver.read(BUFFERS + 0x1000, 90), packet[10..]);
    // The shortest that is sent is a header alone.
    p.driver.write(BUFFERS, &packet);
    p.driver.queues[TX].add(&[out(BUFFERS, 9)]);
    p.driver.queues[TX].add(&[out(BUFFERS, 10)]);
    p.driver.queues[TX].run();
    p.driver.queues[TX].wait();
    assert_eq!(p.received().unwrap(), packet[..10]);
}

#[test]
fn the_number_of_pairs_is_in_the_drivers_order() {
    for interface in INTERFACES {
        let p = Pair::new(true, 1530);
        let gates = [false, false].map(|open| Gate {
            open: Mutex::new(open),
            changed: EventFd::new(EFD_NONBLOCK).unwrap(),
        });
        let backend = Arc::new(Backend {
            tap: Arc::clone(&p.backend.tap),
            gates: gates.into(),
        });
        let handler = ControlHandler::new(Arc::clone(&backend), true, interface.order());
        let mut driver = Driver::with(&[16], interface);
        let (mem, queues) = (driver.mem.clone(), driver.activation(0).queues);
        let worker = Worker::spawn("net0-ctrl", mem, &driver.link, queues, handler).unwrap();
        let mut ack = |pairs: u16| {
            driver.write(BUFFERS, &[4, 0]);
            driver.write(BUFFERS + 2, &pairs.to_bytes(interface.order()));
            driver.queues[0].add(&[out(BUFFERS, 4), into(BUFFERS + 16, 1)]);
            driver.queues[0].run();
            driver.read(BUFFERS + 16, 1)[0]
        };
        assert_eq!((ack(2), ack(3), ack(0x0200)), (0, 1, 1));
        assert!(*backend.gates[1].open.lock().unwrap());
        worker.stop().unwrap();
    }
}

/// A legacy driver sets its address byte by byte, or, on channels, each with all
/// that is before it.
#[test]
fn only_a_legacy_driver_sets_its_address() {
    let p = Pair::new(true, 1530);
    let mut net = Net::new("net0", Arc::clone(&p.backend.tap), options()).unwrap();
    let read = |net: &Net, interface| {
        let mut config = [0xff; 12];
        net.read_config(interface, 0, &mut config);
        config
    };
    let legacy = Interface::Legacy(ByteOrder::Big);
    let original = mac_for("test", 0);
    assert_eq!(read(&net, legacy)[6..], [0, 1, 0, 1, 5, 0x78]);
    net.write_config(Interface::Modern, 0, &[1; 6]);
    assert_eq!(read(&net, legacy)[..6], original);
    let mac = [2, 3, 4, 5, 6, 7];
    for (offset, byte) in (0..).zip(mac) {
        net.write_config(legacy, offset, &[byte]);
    }
    assert_eq!(read(&net, legacy)[..6], mac);
    net.write_config(legacy, 0, &[9; 12]);
    assert_eq!(read(&net, legacy), [9, 9, 9, 9, 9, 9, 0, 1, 0, 1, 5, 0x78]);
    net.reset();
    assert_eq!(read(&net, legacy)[..6], original);
}

#[test]
fn waiting_works_with_event_indices_too() {
    let mut p = Pair::new(true, 1530);
    p.worker.take().unwrap().stop();
    p.driver = Driver::new(&[16, 16]);
    p.driver
        .queues
        .iter_mut()
        .for_each(|queue| queue.use_event_idx());
    let queues = p.driver.activation(0).queues;
    p.start(true, 1530, queues);
    let packet = Pair::packet(700, 1);
    p.wire.send(&packet).unwrap();
    p.driver.queues[RX].add(&[into(BUFFERS, 400)]);
    p.driver.queues[RX].expect_silence();
    // The index at which the driver must notify again is the next one.
    assert_eq!(p.driver.queues[RX].avail_event(), 1);
    p.driver.queues[RX].add(&[into(BUFFERS + 0x1000, 400)]);
    assert_eq!(p.driver.queues[RX].run().1, 400);
    assert_eq!(p.driver.queues[RX].wait().1, 300);
}

#[test]
fn without_merging_a_packet_takes_one_chain_or_is_dropped() {
    let mut p = Pair::new(false, 1530);
    let (small, large) = (Pair::packet(200, 1), Pair::packet(1200, 2));
    p.driver.queues[RX].add(&[into(BUFFERS, 12), into(BUFFERS + 0x1000, 500)]);
    p.driver.queues[RX].add(&[into(BUFFERS + 0x2000, 1530)]);
    p.driver.queues[RX].kick();
    // The first buffer is the one at hand, and too small.
    p.wire.send(&large).unwrap();
    p.wire.send(&small).unwrap();
    assert_eq!(p.driver.queues[RX].wait(), (0, 200));
    assert_eq!(p.driver.read(BUFFERS + 0x1000, 188), small[12..]);
    p.wire.send(&large).unwrap();
    assert_eq!(p.driver.queues[RX].wait(), (2, 1200));
    assert_eq!(p.driver.read(BUFFERS + 0x2000, 1200), Pair::seen(large, 1));
    p.assert_alive();
}

#[test]
fn a_packet_that_never_fits_is_dropped() {
    let mut p = Pair::new(true, 1530);
    for i in 0..16 {
        p.driver.queues[RX].add(&[into(BUFFERS + 0x100 * i, 20)]);
    }
    p.driver.queues[RX].kick();
    p.wire.send(&Pair::packet(1000, 1)).unwrap();
    p.wire.send(&Pair::packet(30, 2)).unwrap();
    assert_eq!(p.driver.queues[RX].wait().1, 20);
    assert_eq!(p.driver.queues[RX].wait().1, 10);
}

#[test]
fn a_packet_that_was_cut_is_dropped() {
    let mut p = Pair::new(true, 1530);
    for _ in 0..2 {
        // Read into the driver's buffers, and then, as they are few, aside.
        p.driver.queues[RX].add(&[into(BUFFERS, 1600)]);
        p.driver.queues[RX].kick();
        p.wire.send(&Pair::packet(1600, 1)).unwrap();
        p.wire.send(&Pair::packet(2000, 2)).unwrap();
        p.wire.send(&Pair::packet(100, 3)).unwrap();
        assert_eq!(p.driver.queues[RX].wait().1, 100);
        p.driver.queues[RX].add(&[into(BUFFERS, 1000)]);
        p.driver.queues[RX].kick();
        p.wire.send(&Pair::packet(1530, 4)).unwrap();
        p.wire.send(&Pair::packet(101, 5)).unwrap();
        assert_eq!(p.driver.queues[RX].wait().1, 101);
    }
    p.assert_alive();
}

#[test]
fn a_pause_keeps_the_buffers_and_a_closed_gate_the_packets() {
    let mut p = Pair::new(true, 1530);
    for i in 0..3 {
        p.driver.queues[RX].add(&[into(BUFFERS + 0x1000 * i, 1530)]);
    }
    p.driver.queues[RX].expect_silence();
    let (_, queues) = p.worker.take().unwrap().stop().unwrap();
    assert_eq!(queues[RX].queue.next_avail(), 0);
    *p.backend.gates[0].open.lock().unwrap() = false;
    p.start(true, 1530, queues);
    p.wire.send(&Pair::packet(64, 1)).unwrap();
    p.driver.queues[RX].expect_silence();
    p.backend.set_pairs(1).unwrap();
    assert_eq!(p.driver.queues[RX].wait(), (0, 64));
}

#[test]
fn hostile_drivers_lose_packets_and_nothing_else() {
    let mut p = Pair::new(true, 1530);
    for bad in [
        vec![out(BUFFERS, 5)],
        vec![out(BUFFERS, 0)],
        vec![into(BUFFERS, 100)],
        vec![out(BUFFERS, u32::MAX)],
        vec![out(BUFFERS, 0x10_0000)],
        vec![out(END_OF_RAM - 10, 100)],
        vec![into(BUFFERS, 100), out(BUFFERS, 100)],
    ] {
        p.driver.queues[TX].add(&bad);
        assert_eq!(p.driver.queues[TX].run().1, 0);
    }
    // More pieces than a system call takes.
    let table = BUFFERS + 0x10_0000;
    p.driver.queues[TX].add_indirect(table, &[out(BUFFERS, 1); 2000]);
    p.driver.queues[TX].run();
    assert_eq!(
        p.wire.recv(&mut [0; 10]).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );

    for bad in [
        vec![out(BUFFERS, 100)],
        vec![out(BUFFERS, 100), into(BUFFERS, 100)],
        vec![into(BUFFERS, 0)],
        vec![into(END_OF_RAM, 100)],
        vec![into(u64::MAX, u32::MAX)],
    ] {
        p.driver.queues[RX].add(&bad);
        assert_eq!(p.driver.queues[RX].run().1, 0);
    }
    p.assert_alive();

    // A useless buffer among good ones is returned once, in its turn.
    let good = p.driver.queues[RX].add(&[into(BUFFERS, 100)]);
    let bad = p.driver.queues[RX].add(&[out(BUFFERS, 100)]);
    let next = p.driver.queues[RX].add(&[into(BUFFERS + 0x1000, 2000)]);
    p.driver.queues[RX].expect_silence();
    p.wire.send(&Pair::packet(500, 1)).unwrap();
    let used = [(); 3].map(|()| p.driver.queues[RX].wait());
    assert_eq!(used, [(good, 100), (bad, 0), (next, 400)]);
    p.assert_alive();

    p.driver.queues[RX].jump(1000);
    p.wire.send(&Pair::packet(100, 0)).unwrap();
    p.driver.queues[RX].expect_silence();
}

/// A real tap, or `None` with the reason said where there can be none.
fn tap(name: &str, queues: u16) -> Option<Tap> {
    match Tap::open(name, queues) {
        Ok(tap) => Some(tap),
        Err(error @ (TapError::Tun { .. } | TapError::Attach { .. })) => {
            assert!(error.to_string().contains(name));
            eprintln!("not checked: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Sends `frame` out of the interface `name`, and returns the packet that the
/// driver gets, which is that behind `header` bytes.
fn receive(driver: &mut Driver, name: &str, frame: &[u8], header: usize) -> Vec<u8> {
    for i in 0..16 {
        driver.queues[RX].add(&[into(BUFFERS + 0x1000 * i, 0x1000)]);
    }
    driver.queues[RX].kick();
    inject(name, frame).unwrap();
    // The host's own multicasts may come first.
    let seen = (0..16).find_map(|i| {
        let (_, len) = driver.queues[RX].wait();
        let packet = driver.read(BUFFERS + 0x1000 * i, len as usize);
        (packet[header..] == *frame).then_some(packet)
    });
    seen.unwrap()
}

fn options() -> NetOptions {
    NetOptions {
        mac: mac_for("test", 0),
        mtu: Some(1400),
        queue_size: 16,
    }
}

#[test]
fn a_real_tap_with_several_queues() {
    let name = format!("cvt{}", std::process::id() % 1_000_000);
    let Some(tap) = tap(&name, 2) else { return };
    assert_eq!((tap.queues(), tap.mtu()), (2, 1500));

    let mut net = Net::new("net0", Arc::new(tap), options()).unwrap();
    assert_eq!(net.queue_sizes(), [16, 16, 16, 16, 64]);
    let mut config = [0xff; 14];
    net.read_config(Interface::Modern, 0, &mut config);
    assert_eq!(config[..6], mac_for("test", 0));
    assert_eq!(config[6..], [1, 0, 2, 0, 0x78, 5, 0, 0]);

    let mut driver = Driver::new(&[16, 16, 16, 16, 64]);
    net.activate(driver.activation(net.features())).unwrap();
    let control = 4;
    let mut command = |bytes: [u8; 4]| {
        driver.write(BUFFERS, &bytes);
        driver.write(BUFFERS + 16, &[0xee]);
        driver.queues[control].add(&[out(BUFFERS, 1), out(BUFFERS + 1, 3), into(BUFFERS + 16, 1)]);
        assert_eq!(driver.queues[control].run().1, 1);
        driver.read(BUFFERS + 16, 1)[0]
    };
    assert_eq!(command([4, 0, 2, 0]), 0, "two pairs");
    assert_eq!(command([4, 0, 2, 0]), 0, "two pairs again");
    assert_eq!(command([4, 0, 0, 0]), 1, "no pairs");
    assert_eq!(command([4, 0, 3, 0]), 1, "more pairs than there are");
    assert_eq!(command([9, 0, 1, 0]), 1, "an unknown class");
    assert_eq!(command([4, 0, 1, 0]), 0, "one pair");
    let gate = |index: usize| *net.backend.gates[index].open.lock().unwrap();
    assert_eq!((gate(0), gate(1)), (true, false));

    // What the guest sends arrives at the host's interface, whose count shows it.
    let mut packet = vec![0; Header::MAX];
    packet.extend([0xff; 6]);
    packet.extend(mac_for("test", 0));
    packet.extend([0x88, 0xb5]);
    packet.resize(Header::MAX + 60, 0);
    driver.write(BUFFERS, &packet);
    let count = || -> u64 {
        let path = format!("/sys/class/net/{name}/statistics/rx_packets");
        let text = std::fs::read_to_string(path);
        text.map_or(u64::MAX, |text| text.trim().parse().unwrap())
    };
    let before = count();
    driver.queues[TX].add(&[out(BUFFERS, packet.len() as u32)]);
    driver.queues[TX].run();
    if before == u64::MAX {
        eprintln!("not checked: no statistics of {name} in /sys");
    } else {
        assert_eq!(count(), before + 1);
    }
    // And what the host sends there arrives in the guest, on a pair in use.
    let mut frame = vec![0xff; 6];
    frame.extend(mac_for("test", 1));
    frame.extend([0x88, 0xb6]);
    frame.resize(64, 0x5a);
    receive(&mut driver, &name, &frame, Header::MAX);
    let queues = net.deactivate();
    assert_eq!(queues.len(), 5);
    // A reset starts with one pair again, and without what came before.
    net.reset();
    for _ in 0..3 {
        inject(&name, &frame).unwrap();
    }
    let mut driver = Driver::new(&[16, 16, 16, 16, 64]);
    driver.queues[RX].add(&[into(BUFFERS, 0x1000)]);
    net.activate(driver.activation(1 << VIRTIO_NET_F_CTRL_VQ))
        .unwrap();
    assert!(!*net.backend.gates[1].open.lock().unwrap());
    let mut other = frame.clone();
    other[30] ^= 1;
    inject(&name, &other).unwrap();
    driver.queues[RX].wait();
    assert_ne!(driver.read(BUFFERS + Header::MAX as u64, 64), frame);
}

#[test]
fn a_real_tap_with_one_queue_needs_no_control_queue() {
    let name = format!("cvs{}", std::process::id() % 1_000_000);
    let Some(tap) = tap(&name, 1) else { return };
    let busy = Tap::open(&name, 1).unwrap_err().to_string();
    assert!(
        busy.contains(&name) && busy.contains("in use by another process"),
        "{busy}"
    );

    let mut net = Net::new("net0", Arc::new(tap), options()).unwrap();
    assert_eq!(net.queue_sizes(), [16, 16]);
    assert!(!has(net.features(), VIRTIO_NET_F_CTRL_VQ));
    let driver = Driver::new(&[16, 16]);
    net.activate(driver.activation(net.features())).unwrap();
    assert_eq!(net.deactivate().len(), 2);
    let mut activation = driver.activation(net.features());
    activation.queues.pop();
    assert!(matches!(
        net.activate(activation),
        Err(ActivateError::MissingQueue(1))
    ));
}

/// Which orders of headers there are is the host kernel's: its own and
/// little-endian ones always, big-endian ones elsewhere by its configuration.
#[test]
fn a_real_tap_takes_legacy_headers() {
    let name = format!("cvl{}", std::process::id() % 1_000_000);
    let Some(tap) = tap(&name, 1) else { return };
    let mut net = Net::new("net0", Arc::new(tap), options()).unwrap();
    for order in [ByteOrder::Little, ByteOrder::Big] {
        for features in [0, 1 << VIRTIO_NET_F_MRG_RXBUF] {
            let header = if features == 0 { 10 } else { 12 };
            net.reset();
            let mut driver = Driver::with(&[16, 16], Interface::Legacy(order));
            if let Err(error) = net.activate(driver.activation(features)) {
                assert_eq!(order, ByteOrder::Big);
                let error = error.to_string();
                assert!(error.contains("CONFIG_TUN_VNET_CROSS_LE"), "{error}");
                eprintln!("not checked: {error}");
                continue;
            }
            let mut frame = vec![0xff; 12];
            frame.extend([0x88, 0xb6]);
            frame.resize(64, 0x5a);
            let packet = receive(&mut driver, &name, &frame, header);
            if header == 12 {
                assert_eq!(packet[10..12], 1u16.to_bytes(order));
            }
            assert_eq!(net.deactivate().len(), 2);
        }
    }
}
