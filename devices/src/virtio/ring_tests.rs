use super::*;
use crate::virtio::Interface;
use crate::virtio::buffers::{BufferSet, ChainError, Storage};
use crate::virtio::queue_config::{QueueArea, QueueConfig};
use crate::virtio::testing::{
    BUFFERS, Buf, Driver, END_OF_RAM, INDIRECT, INTERFACES, NEXT, WRITE, into, out,
};
use vm_memory::GuestAddressSpace;

/// Runs `test` with a ring of four descriptors and its driver, in either order.
fn both(event_idx: bool, test: impl Fn(&mut Driver, &mut Ring, &GuestMemoryMmap)) {
    for interface in INTERFACES {
        let mut driver = Driver::with(&[4], interface);
        if event_idx {
            driver.queues[0].use_event_idx();
        }
        let mem = driver.mem.memory();
        let mut ring = driver.queues[0].active().queue;
        test(&mut driver, &mut ring, &mem);
    }
}

/// What the buffers of the next chain are, or what is wrong with it.
fn take(ring: &mut Ring, mem: &GuestMemoryMmap) -> Result<(usize, usize), ChainError> {
    let chain = ring.pop(mem).unwrap().unwrap();
    let mut storage = Storage::default();
    let mut set = BufferSet::new(mem, &mut storage);
    let chain = set.add(chain)?;
    let (readable, writable) = (set.readable(chain.readable), set.writable(chain.writable));
    Ok((readable.len(), writable.len()))
}

#[test]
fn the_order_is_that_of_the_interface() {
    let interface = Interface::Legacy(ByteOrder::Big);
    let mut driver = Driver::with(&[4], interface);
    driver.queues[0].add(&[out(BUFFERS, 0x0102)]);
    let [table, available, used] = driver.queues[0].areas();
    assert_eq!(driver.read(table, 16), {
        let mut descriptor = BUFFERS.to_be_bytes().to_vec();
        descriptor.extend([0, 0, 1, 2, 0, 0, 0, 1]);
        descriptor
    });
    assert_eq!(driver.read(available, 6), [0, 0, 0, 1, 0, 0]);
    let mem = driver.mem.memory();
    let mut ring = driver.queues[0].active().queue;
    assert_eq!(take(&mut ring, &mem), Ok((0x0102, 0)));
    ring.add_used(&mem, &[(0, 0x0304)]).unwrap();
    assert_eq!(driver.read(used, 12), [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, 4]);
    ring.disable_notification(&mem).unwrap();
    assert_eq!(driver.read(used, 2), [0, 1]);
}

#[test]
fn indices_wrap_around() {
    both(false, |driver, ring, mem| {
        // Every index of a halfword, and more.
        for round in 0..70_000u32 {
            let head = driver.queues[0].add(&[out(BUFFERS, 1), into(BUFFERS, 2)]);
            assert_eq!(take(ring, mem), Ok((1, 2)));
            assert!(ring.pop(mem).unwrap().is_none());
            ring.add_used(mem, &[(head, round)]).unwrap();
            assert_eq!(driver.queues[0].poll(), Some((head, round)));
        }
        assert_eq!(ring.next_avail(), (70_000 % 0x1_0000) as u16);
        assert_eq!(ring.next_used(), ring.next_avail());
    });
}

#[test]
fn an_index_that_jumps_is_an_error() {
    both(false, |driver, ring, mem| {
        // As many as there are descriptors can wait, and no more.
        driver.queues[0].jump(4);
        assert!(ring.pop(mem).unwrap().is_some());
        driver.queues[0].jump(6);
        assert!(ring.pop(mem).is_err());
        driver.queues[0].jump(0);
        assert!(ring.pop(mem).is_err());
        driver.queues[0].jump(5);
        assert!(ring.pop(mem).unwrap().is_some());
    });
}

#[test]
fn indirect_tables_are_followed_once() {
    let table = BUFFERS + 0x1_0000;
    both(false, |driver, ring, mem| {
        let queue = &mut driver.queues[0];
        // More buffers than the queue has descriptors.
        let many = [into(BUFFERS, 3); 10];
        queue.add_indirect(table, &many);
        assert_eq!(take(ring, mem), Ok((0, 30)));
        // Behind a descriptor of the queue's own.
        queue.write_descriptor(table, 0, into(BUFFERS, 5), 0);
        let indirect = |addr, len| Buf {
            addr,
            len,
            flags: INDIRECT,
        };
        queue.add(&[out(BUFFERS, 2), indirect(table, 16)]);
        assert_eq!(take(ring, mem), Ok((2, 5)));
        // A table in a table, one of part of a descriptor, of none, of more than
        // there can be, and outside memory.
        queue.write_descriptor(table, 0, indirect(table + 16, 16), 0);
        for bad in [
            indirect(table, 16),
            indirect(table, 17),
            indirect(table, 0),
            indirect(table, 0x10_0000),
            indirect(END_OF_RAM, 16),
            indirect(u64::MAX - 8, 16),
        ] {
            queue.add(&[bad]);
            assert_eq!(take(ring, mem), Err(ChainError::Broken));
        }
    });
}

#[test]
fn malformed_chains_end() {
    both(false, |driver, ring, mem| {
        let queue = &mut driver.queues[0];
        let next = |flags| Buf {
            addr: BUFFERS,
            len: 1,
            flags: NEXT | flags,
        };
        // A loop; the way out of the table; more than 4 GiB; a head outside.
        queue.descriptor(0, next(0), 1);
        queue.descriptor(1, next(0), 0);
        queue.publish(0);
        assert_eq!(take(ring, mem), Err(ChainError::Broken));
        queue.descriptor(0, next(0), 4);
        queue.publish(0);
        assert_eq!(take(ring, mem), Err(ChainError::Broken));
        queue.publish(4);
        assert_eq!(ring.pop(mem).unwrap().unwrap().head_index(), 4);
        queue.publish(u16::MAX);
        assert_eq!(take(ring, mem), Err(ChainError::Broken));
        let huge = |flags| Buf {
            addr: 0,
            len: u32::MAX,
            flags,
        };
        queue.descriptor(0, huge(NEXT), 1);
        queue.descriptor(1, huge(0), 0);
        let chain = |ring: &mut Ring| ring.pop(mem).unwrap().unwrap().count();
        queue.publish(0);
        assert_eq!(chain(ring), 1);
        // What the device writes comes last.
        queue.descriptor(0, next(WRITE), 1);
        queue.descriptor(1, out(BUFFERS, 1), 0);
        queue.publish(0);
        assert_eq!(take(ring, mem), Err(ChainError::Order));
        queue.add(&[out(END_OF_RAM, 1)]);
        assert_eq!(take(ring, mem), Err(ChainError::Address));
    });
}

#[test]
fn notifications_are_asked_for_by_flag() {
    both(false, |driver, ring, mem| {
        let used = driver.queues[0].areas()[2];
        let flags = |driver: &Driver| driver.read(used, 2).iter().copied().max();
        ring.disable_notification(mem).unwrap();
        assert_eq!(flags(driver), Some(1));
        assert!(!ring.enable_notification(mem).unwrap());
        assert_eq!(flags(driver), Some(0));
        driver.queues[0].add(&[out(BUFFERS, 1)]);
        assert!(ring.enable_notification(mem).unwrap());
        assert!(ring.wants_interrupt(mem, 0));
        driver.queues[0].set_flags(1);
        assert!(!ring.wants_interrupt(mem, 0));
    });
}

#[test]
fn notifications_are_asked_for_by_event_index() {
    both(true, |driver, ring, mem| {
        for round in 0..70_000u32 {
            let head = driver.queues[0].add(&[out(BUFFERS, 1)]);
            ring.disable_notification(mem).unwrap();
            assert!(ring.pop(mem).unwrap().is_some());
            assert!(!ring.enable_notification(mem).unwrap());
            assert_eq!(driver.queues[0].avail_event(), ring.next_avail());
            let old = ring.next_used();
            // The driver waits for this one, or for the one after it.
            let early = round % 2 == 0;
            let wanted = if early { old } else { old.wrapping_add(1) };
            driver.queues[0].set_used_event(wanted);
            ring.add_used(mem, &[(head, 0)]).unwrap();
            assert_eq!(ring.wants_interrupt(mem, old), early);
            assert!(driver.queues[0].poll().is_some());
        }
        driver.queues[0].add(&[out(BUFFERS, 1)]);
        assert!(ring.enable_notification(mem).unwrap());
    });
}

#[test]
fn rings_lie_in_memory_and_are_aligned() {
    let mem = Driver::new(&[4]).mem.memory();
    let config = QueueConfig {
        size: 4,
        enabled: true,
        descriptor: 0x1000,
        driver: 0x2000,
        device: 0x3000,
        ..QueueConfig::new(4)
    };
    let places = |area, address| {
        let mut config = config;
        match area {
            QueueArea::Descriptor => config.descriptor = address,
            QueueArea::Driver => config.driver = address,
            QueueArea::Device => config.device = address,
        }
        config
    };
    for order in [ByteOrder::Little, ByteOrder::Big] {
        assert!(config.rings(&*mem, false, order).is_some());
        for size in [0, 3, 8] {
            let config = QueueConfig { size, ..config };
            assert!(config.rings(&*mem, false, order).is_none());
        }
        for (area, address) in [
            (QueueArea::Descriptor, 0x1008),
            (QueueArea::Driver, 0x2001),
            (QueueArea::Device, 0x3002),
            (QueueArea::Descriptor, END_OF_RAM - 32),
            (QueueArea::Driver, END_OF_RAM - 8),
            (QueueArea::Device, END_OF_RAM - 16),
            (QueueArea::Device, u64::MAX - 3),
        ] {
            let config = places(area, address);
            assert!(config.rings(&*mem, false, order).is_none(), "{config:x?}");
        }
    }
}
