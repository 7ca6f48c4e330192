use super::*;
use crate::byte_order::Number;
use crate::disk::DiskOptions;
use crate::virtio::testing::{
    BUFFERS, Buf, Driver, DriverQueue, END_OF_RAM, INDIRECT, NEXT, SEAM, WRITE,
    by_either_interface, into, out,
};
use std::os::unix::fs::FileExt;
use tempfile::NamedTempFile;
use virtio_queue::QueueT;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const SECTORS: u64 = 2048;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

struct Setup {
    file: NamedTempFile,
    block: Block,
    interface: Interface,
    driver: Driver,
}

impl Setup {
    fn with(
        interface: Interface,
        read_only: bool,
        queues: u16,
        prepare: impl FnOnce(&mut DriverQueue),
    ) -> Self {
        let file = NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..SECTORS * SECTOR).map(|i| (i / SECTOR) as u8).collect();
        file.as_file().write_all_at(&content, 0).unwrap();
        let disk = RawDisk::open(file.path(), DiskOptions { read_only }).unwrap();
        let options = BlockOptions {
            serial: "crossvisor-0".to_owned(),
            queues,
            queue_size: 16,
        };
        let mut block = Block::new("disk0", Arc::new(disk), options);
        let mut driver = Driver::with(&vec![16; queues.into()], interface);
        prepare(&mut driver.queues[0]);
        block.activate(driver.activation(block.features())).unwrap();
        Self {
            file,
            block,
            interface,
            driver,
        }
    }

    fn new(interface: Interface) -> Self {
        Self::with(interface, false, 1, |_| ())
    }

    fn order(&self) -> ByteOrder {
        self.interface.order()
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_bytes(self.order()));
        header[8..].copy_from_slice(&sector.to_bytes(self.order()));
        self.driver.write(HEADER, &header);
        self.driver.write(STATUS, &[0xee]);
    }

    fn status(&self) -> u8 {
        self.driver.read(STATUS, 1)[0]
    }

    /// One request with `data` between header and status.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buf]) -> (u8, u32) {
        self.header(kind, sector);
        let mut bufs = vec![out(HEADER, 16)];
        bufs.extend(data);
        bufs.push(into(STATUS, 1));
        let head = self.driver.queues[0].add(&bufs);
        let (id, len) = self.driver.queues[0].run();
        assert_eq!(id, head);
        (self.status(), len)
    }

    /// Little-endian by either interface.
    fn segment(&self, sector: u64, sectors: u32, flags: u32) -> Buf {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&sector.to_le_bytes());
        raw[8..12].copy_from_slice(&sectors.to_le_bytes());
        raw[12..].copy_from_slice(&flags.to_le_bytes());
        self.driver.write(DATA, &raw);
        out(DATA, 16)
    }

    fn on_host(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file
            .as_file()
            .read_exact_at(&mut data, sector * SECTOR)
            .unwrap();
        data
    }

    /// The driver has been told, once, that the device needs a reset.
    fn assert_needs_reset(&self) {
        assert!(self.driver.link.needs_reset());
        assert_eq!(self.driver.interrupt.config_count(), 1);
    }

    /// The device still does what it is for.
    fn assert_alive(&mut self) {
        assert_eq!(self.request(IN, 5, &[into(DATA, 512)]), (OK, 513));
        assert_eq!(self.driver.read(DATA, 512), [5; 512]);
    }
}

by_either_interface!(
    reads_and_writes_where_the_driver_says,
    buffers_may_be_split_anywhere_and_cross_regions,
    indirect_tables_longer_than_the_queue,
    serial_and_unknown_requests,
    discard_and_write_zeroes,
    ranges_outside_the_disk_and_partial_sectors_fail,
    a_read_only_disk_is_never_written,
    malformed_chains_are_returned_unused,
    loops_and_wild_links_are_returned_unused,
    an_index_that_jumps_or_a_head_outside_the_table_stops_the_queue,
    rings_that_leave_memory_stop_the_queue_and_not_the_device,
    a_pause_loses_no_request,
    drivers_that_want_no_interrupt_get_none,
    every_queue_works_on_its_own,
    what_is_said_to_be_written_has_no_gap,
    a_reset_takes_back_what_a_driver_chose,
    configuration_space_says_what_the_disk_is,
    a_device_without_its_queue_does_not_start,
);

fn reads_and_writes_where_the_driver_says(interface: Interface) {
    let mut s = Setup::new(interface);
    assert_eq!(s.request(IN, 7, &[into(DATA, 1024)]), (OK, 1025));
    assert_eq!(s.driver.read(DATA, 1024), [[7; 512], [8; 512]].concat());
    s.driver.write(DATA, &[0x5a; 512]);
    assert_eq!(s.request(OUT, 100, &[out(DATA, 512)]), (OK, 1));
    assert_eq!(s.on_host(100, 512), [0x5a; 512]);
    assert_eq!(s.on_host(101, 512), [101; 512]);
    assert_eq!(s.request(FLUSH, 0, &[]), (OK, 1));
    // An interrupt may come after its element is seen.
    s.block.deactivate();
    assert!(s.driver.interrupt.queue_count(0) >= 3);
}

fn buffers_may_be_split_anywhere_and_cross_regions(interface: Interface) {
    let mut s = Setup::new(interface);
    s.header(IN, 9);
    let data = [
        out(HEADER, 3),
        out(HEADER + 3, 0),
        out(HEADER + 3, 13),
        into(SEAM - 100, 300),
        into(DATA, 212),
        into(DATA + 212, 512),
        into(STATUS, 1),
    ];
    s.driver.queues[0].add(&data);
    assert_eq!(s.driver.queues[0].run().1, 1025);
    assert_eq!(s.status(), OK);
    assert_eq!(s.driver.read(SEAM - 100, 300), [9; 300]);
    assert_eq!(s.driver.read(DATA, 212), [9; 212]);
    assert_eq!(s.driver.read(DATA + 212, 512), [10; 512]);

    // The status may share a buffer with the data.
    s.header(IN, 3);
    s.driver.queues[0].add(&[out(HEADER, 16), into(DATA, 513)]);
    assert_eq!(s.driver.queues[0].run().1, 513);
    assert_eq!(s.driver.read(DATA + 511, 2), [3, OK]);

    // And the header with what is written.
    s.header(OUT, 20);
    s.driver.write(HEADER + 16, &[0x77; 512]);
    s.driver.queues[0].add(&[out(HEADER, 528), into(DATA, 1)]);
    s.driver.queues[0].run();
    assert_eq!(s.driver.read(DATA, 1), [OK]);
    assert_eq!(s.on_host(20, 512), [0x77; 512]);
}

fn indirect_tables_longer_than_the_queue(interface: Interface) {
    let mut s = Setup::new(interface);
    s.header(IN, 0);
    let table = BUFFERS + 0x2_0000;
    let mut bufs = vec![out(HEADER, 16)];
    bufs.extend((0..200).map(|i| into(DATA + 512 * i, 512)));
    bufs.push(into(STATUS, 1));
    s.driver.queues[0].add_indirect(table, &bufs);
    assert_eq!(s.driver.queues[0].run().1, 200 * 512 + 1);
    assert_eq!(s.status(), OK);
    for sector in 0..200 {
        assert_eq!(s.driver.read(DATA + 512 * sector, 512), [sector as u8; 512]);
    }
}

fn serial_and_unknown_requests(interface: Interface) {
    let mut s = Setup::new(interface);
    assert_eq!(s.request(GET_ID, 0, &[into(DATA, 20)]), (OK, 21));
    assert_eq!(s.driver.read(DATA, 20), b"crossvisor-0\0\0\0\0\0\0\0\0");
    assert_eq!(s.request(GET_ID, 0, &[into(DATA, 4)]), (OK, 5));
    assert_eq!(s.request(0x1234, 0, &[into(DATA, 512)]), (UNSUPP, 0));
}

fn discard_and_write_zeroes(interface: Interface) {
    let mut s = Setup::new(interface);
    let segment = s.segment(8, 16, 0);
    assert_eq!(s.request(WRITE_ZEROES, 0, &[segment]), (OK, 1));
    assert_eq!(s.on_host(8, 16 * 512), [0; 16 * 512]);
    assert_eq!(s.on_host(24, 512), [24; 512]);
    let segment = s.segment(64, 16, 1);
    assert_eq!(s.request(WRITE_ZEROES, 0, &[segment]), (OK, 1));
    assert_eq!(s.on_host(64, 16 * 512), [0; 16 * 512]);
    let segment = s.segment(128, 8, 0);
    assert_eq!(s.request(DISCARD, 0, &[segment]), (OK, 1));
    assert_eq!(s.on_host(136, 512), [136; 512]);

    for (kind, sector, sectors, flags, expected) in [
        (DISCARD, 0, 8, 1, UNSUPP),
        (DISCARD, 0, 8, 2, UNSUPP),
        (WRITE_ZEROES, 0, 8, 0x8000_0000, UNSUPP),
        (WRITE_ZEROES, SECTORS, 1, 0, IOERR),
        (WRITE_ZEROES, u64::MAX, 1, 0, IOERR),
        (DISCARD, 1, u32::MAX, 0, IOERR),
        (WRITE_ZEROES, 0, MAX_ZERO_SECTORS + 1, 0, IOERR),
    ] {
        let segment = s.segment(sector, sectors, flags);
        assert_eq!(s.request(kind, 0, &[segment]), (expected, 1));
    }
    for len in [0, 15, 17, 16 * 17] {
        assert_eq!(s.request(DISCARD, 0, &[out(DATA, len)]).0, IOERR);
    }
    assert_eq!(s.on_host(0, 512), [0; 512]);
    assert_eq!(s.on_host(1, 512), [1; 512]);
    s.assert_alive();
}

fn ranges_outside_the_disk_and_partial_sectors_fail(interface: Interface) {
    let mut s = Setup::new(interface);
    for (kind, sector, len) in [
        (IN, SECTORS, 512),
        (IN, SECTORS - 1, 1024),
        (IN, u64::MAX, 512),
        (IN, u64::MAX / 512 + 1, 512),
        (IN, 0, 511),
        (IN, 0, 513),
    ] {
        assert_eq!(s.request(kind, sector, &[into(DATA, len)]), (IOERR, 0));
        assert_eq!(s.request(OUT, sector, &[out(DATA, len)]), (IOERR, 1));
    }
    assert_eq!(s.request(IN, SECTORS - 1, &[into(DATA, 512)]), (OK, 513));
    assert_eq!(s.file.as_file().metadata().unwrap().len(), SECTORS * SECTOR);
}

fn a_read_only_disk_is_never_written(interface: Interface) {
    let mut s = Setup::with(interface, true, 1, |_| ());
    assert_ne!(s.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(s.block.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(s.request(OUT, 1, &[out(DATA, 512)]), (IOERR, 1));
    let segment = s.segment(1, 1, 0);
    assert_eq!(s.request(WRITE_ZEROES, 0, &[segment]), (UNSUPP, 1));
    assert_eq!(s.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(s.on_host(1, 512), [1; 512]);
    s.assert_alive();
}

fn malformed_chains_are_returned_unused(interface: Interface) {
    let mut s = Setup::new(interface);
    let chains: [&[Buf]; 9] = [
        // No status, no header, nothing.
        &[out(HEADER, 16)],
        &[out(HEADER, 0)],
        // Readable after writable.
        &[
            out(HEADER, 16),
            into(DATA, 512),
            out(DATA, 512),
            into(STATUS, 1),
        ],
        // Outside memory.
        &[out(END_OF_RAM, 16), into(STATUS, 1)],
        &[out(END_OF_RAM - 8, 16), into(STATUS, 1)],
        &[out(u64::MAX - 7, 16), into(STATUS, 1)],
        &[out(HEADER, 16), into(DATA, u32::MAX), into(STATUS, 1)],
        &[out(HEADER, 16), into(STATUS, 1), into(u64::MAX, 1)],
        // An indirect table that is no whole number of descriptors.
        &[Buf {
            addr: DATA,
            len: 17,
            flags: INDIRECT,
        }],
    ];
    for chain in chains {
        s.header(OUT, 1);
        let head = s.driver.queues[0].add(chain);
        assert_eq!(s.driver.queues[0].run(), (head, 0));
    }
    // A status byte, but no whole header.
    s.header(IN, 0);
    s.driver.queues[0].add(&[out(HEADER, 15), into(STATUS, 1)]);
    assert_eq!(s.driver.queues[0].run().1, 1);
    assert_eq!(s.status(), IOERR);
    assert_eq!(s.on_host(1, 512), [1; 512]);
    s.assert_alive();
}

fn loops_and_wild_links_are_returned_unused(interface: Interface) {
    let mut s = Setup::new(interface);
    s.header(IN, 0);
    let q = &mut s.driver.queues[0];
    let looped = Buf {
        addr: HEADER,
        len: 16,
        flags: NEXT,
    };
    q.descriptor(3, looped, 3);
    q.publish(3);
    assert_eq!(q.run(), (3, 0));
    q.descriptor(3, looped, 4);
    q.descriptor(
        4,
        Buf {
            addr: DATA,
            len: 1,
            flags: NEXT | WRITE,
        },
        3,
    );
    q.publish(3);
    assert_eq!(q.run(), (3, 0));
    q.descriptor(3, looped, 16);
    q.publish(3);
    assert_eq!(q.run(), (3, 0));
    // An indirect table inside an indirect table, and one outside memory.
    q.write_descriptor(
        DATA,
        0,
        Buf {
            addr: DATA,
            len: 16,
            flags: INDIRECT,
        },
        0,
    );
    q.descriptor(
        3,
        Buf {
            addr: DATA,
            len: 16,
            flags: INDIRECT,
        },
        0,
    );
    q.publish(3);
    assert_eq!(q.run(), (3, 0));
    q.descriptor(
        3,
        Buf {
            addr: END_OF_RAM - 8,
            len: 32,
            flags: INDIRECT,
        },
        0,
    );
    q.publish(3);
    assert_eq!(q.run(), (3, 0));
    s.assert_alive();
}

fn an_index_that_jumps_or_a_head_outside_the_table_stops_the_queue(interface: Interface) {
    let mut s = Setup::new(interface);
    s.assert_alive();
    s.driver.queues[0].jump(1 + 17);
    s.driver.queues[0].expect_silence();
    s.assert_needs_reset();

    let mut s = Setup::new(interface);
    s.driver.queues[0].publish(16);
    s.driver.queues[0].expect_silence();
    s.driver.queues[0].publish(u16::MAX);
    s.driver.queues[0].expect_silence();
    s.assert_needs_reset();
    // A reset makes it work again.
    assert_eq!(s.block.deactivate().len(), 1);
    s.driver = Driver::with(&[16], interface);
    s.block
        .activate(s.driver.activation(s.block.features()))
        .unwrap();
    s.assert_alive();
}

fn rings_that_leave_memory_stop_the_queue_and_not_the_device(interface: Interface) {
    // The available index can be read and its entries cannot; and a used ring
    // that cannot be written.
    for (avail, used) in [
        (Some(END_OF_RAM - 4), None),
        (Some(u64::MAX - 1), None),
        (None, Some(END_OF_RAM + 64)),
        (None, Some(u64::MAX - 3)),
    ] {
        for event_idx in [false, true] {
            let mut s = Setup::new(interface);
            s.block.deactivate();
            s.driver = Driver::with(&[16], interface);
            let mut activation = s.driver.activation(s.block.features());
            let queue = &mut activation.queues[0].queue.queue_mut();
            queue.set_event_idx(event_idx);
            if let Some(avail) = avail {
                queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
                if avail < END_OF_RAM {
                    s.driver.write(avail + 2, &[1, 0]);
                }
            }
            if let Some(used) = used {
                queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
            }
            s.block.activate(activation).unwrap();
            s.header(OUT, 1);
            s.driver.queues[0].add(&[out(HEADER, 16), out(DATA, 512), into(STATUS, 1)]);
            s.driver.queues[0].expect_silence();
            assert_eq!(
                s.block.deactivate().len(),
                1,
                "the worker is not caught in a loop"
            );
            s.assert_needs_reset();
        }
    }
}

fn a_pause_loses_no_request(interface: Interface) {
    let mut s = Setup::new(interface);
    s.assert_alive();
    let queues = s.block.deactivate();
    s.header(IN, 6);
    s.driver.queues[0].add(&[out(HEADER, 16), into(DATA, 512), into(STATUS, 1)]);
    s.driver.queues[0].expect_silence();
    let mut activation = s.driver.activation(s.block.features());
    activation.queues = queues;
    s.block.activate(activation).unwrap();
    assert_eq!(s.driver.queues[0].wait().1, 513);
    assert_eq!(s.driver.read(DATA, 512), [6; 512]);
}

fn drivers_that_want_no_interrupt_get_none(interface: Interface) {
    let mut s = Setup::new(interface);
    s.driver.queues[0].set_flags(1);
    s.assert_alive();
    assert_eq!(s.driver.interrupt.queue_count(0), 0);

    let mut s = Setup::with(interface, false, 1, |queue| {
        queue.use_event_idx();
        queue.set_used_event(2);
    });
    s.assert_alive();
    s.assert_alive();
    assert_eq!(s.driver.interrupt.queue_count(0), 0);
    s.assert_alive();
    // The element is in the ring before its interrupt is.
    s.block.deactivate();
    assert_eq!(s.driver.interrupt.queue_count(0), 1);
}

fn every_queue_works_on_its_own(interface: Interface) {
    let mut s = Setup::with(interface, false, 4, |_| ());
    assert_ne!(s.block.features() & 1 << VIRTIO_BLK_F_MQ, 0);
    for round in 0..50 {
        for (i, queue) in s.driver.queues.iter_mut().enumerate() {
            let base = BUFFERS + 0x1000 * (1 + i as u64);
            let sector = round * 4 + i as u64;
            let mut header = [0; 16];
            header[8..].copy_from_slice(&sector.to_bytes(interface.order()));
            let mem = s.driver.mem.memory();
            vm_memory::Bytes::write_slice(&*mem, &header, vm_memory::GuestAddress(base)).unwrap();
            queue.add(&[out(base, 16), into(base + 512, 513)]);
            queue.kick();
        }
        for i in 0..4 {
            assert_eq!(s.driver.queues[i].wait().1, 513);
            let base = BUFFERS + 0x1000 * (1 + i as u64);
            let mut expected = vec![(round * 4 + i as u64) as u8; 512];
            expected.push(OK);
            assert_eq!(s.driver.read(base + 512, 513), expected);
        }
    }
    let queues = s.block.deactivate();
    let indices: Vec<u16> = queues.iter().map(|q| q.index).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
}

fn what_is_said_to_be_written_has_no_gap(interface: Interface) {
    let mut s = Setup::new(interface);
    // A failed read leaves its buffer alone, and so the status is not reached.
    assert_eq!(s.request(IN, SECTORS, &[into(DATA, 512)]), (IOERR, 0));
    assert_eq!(s.request(OUT, SECTORS, &[out(DATA, 512)]), (IOERR, 1));
    assert_eq!(s.request(GET_ID, 0, &[into(DATA, 20)]), (OK, 21));
    assert_eq!(s.request(GET_ID, 0, &[into(DATA, 30)]), (OK, 20));
}

fn a_reset_takes_back_what_a_driver_chose(interface: Interface) {
    let mut s = Setup::new(interface);
    s.block.write_config(interface, WRITEBACK, &[0]);
    s.block.deactivate();
    let mut writeback = [9];
    s.block.read_config(interface, WRITEBACK, &mut writeback);
    assert_eq!(writeback, [0], "a pause keeps it");
    s.block.reset();
    s.block.read_config(interface, WRITEBACK, &mut writeback);
    assert_eq!(writeback, [1]);
}

fn configuration_space_says_what_the_disk_is(interface: Interface) {
    let mut s = Setup::new(interface);
    let order = interface.order();
    let read = |block: &Block, offset, len| {
        let mut data = vec![0xff; len];
        block.read_config(interface, offset, &mut data);
        data
    };
    assert_eq!(read(&s.block, 0, 8), SECTORS.to_bytes(order));
    assert_eq!(read(&s.block, 12, 4), 14u32.to_bytes(order), "seg_max");
    assert_eq!(read(&s.block, 20, 4), 512u32.to_bytes(order), "blk_size");
    assert_eq!(read(&s.block, 24, 2), [3, 0], "4 KiB physical blocks");
    assert_eq!(read(&s.block, 32, 1), [1], "writeback");
    assert_eq!(read(&s.block, 34, 2), 1u16.to_bytes(order), "num_queues");
    assert_eq!(read(&s.block, 36, 4), MAX_DISCARD_SECTORS.to_bytes(order));
    assert_eq!(
        read(&s.block, 44, 4),
        8u32.to_bytes(order),
        "discard alignment"
    );
    assert_eq!(read(&s.block, 48, 4), MAX_ZERO_SECTORS.to_bytes(order));
    assert_eq!(read(&s.block, 56, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    s.block.write_config(interface, 32, &[0]);
    assert_eq!(read(&s.block, 32, 1), [0]);
    // On channels all that is before it is written, too.
    s.block.write_config(interface, 0, &[1; 33]);
    assert_eq!(read(&s.block, 32, 1), [1]);
    s.block.write_config(interface, 0, &[0; 40]);
    assert_eq!(read(&s.block, 32, 1), [0]);
    s.block.write_config(interface, 0, &[0]);
    s.block.write_config(interface, u64::MAX, &[0; 8]);
    assert_eq!(read(&s.block, 0, 8), SECTORS.to_bytes(order));
}

fn a_device_without_its_queue_does_not_start(interface: Interface) {
    let mut s = Setup::new(interface);
    s.block.deactivate();
    let mut activation = s.driver.activation(0);
    activation.queues.clear();
    assert!(matches!(
        s.block.activate(activation),
        Err(ActivateError::MissingQueue(0))
    ));
}
