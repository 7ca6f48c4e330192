use super::*;

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    revision: 1,
    class: 0x01_02_03,
    subsystem_vendor: 0x1234,
    subsystem: 0x5678,
};

const WIDE: Bar = Bar {
    size: 0x4_0000,
    wide: true,
    prefetchable: true,
};
const NARROW: Bar = Bar {
    size: 0x1000,
    wide: false,
    prefetchable: false,
};

fn space() -> ConfigSpace {
    let mut space = ConfigSpace::new(&IDENTITY);
    space.add_bar(0, WIDE).unwrap();
    space.add_bar(2, NARROW).unwrap();
    space
}

fn read32(space: &ConfigSpace, offset: usize) -> u32 {
    let mut data = [0; 4];
    space.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write32(space: &mut ConfigSpace, offset: usize, value: u32) -> Written {
    space.write(offset, &value.to_le_bytes())
}

#[test]
fn header_is_where_it_belongs_and_read_only() {
    let mut space = space();
    let expect = [
        (0x00, 0x1042_1af4),
        (0x08, 0x0102_0301),
        (0x2c, 0x5678_1234),
    ];
    for (offset, value) in expect {
        assert_eq!(read32(&space, offset), value);
        assert_eq!(write32(&mut space, offset, !value), Written::default());
        assert_eq!(read32(&space, offset), value);
    }
    // Each byte and each half of the IDs, by itself.
    let mut byte = [0];
    space.read(1, &mut byte);
    assert_eq!(byte, [0x1a]);
    let mut half = [0; 2];
    space.read(2, &mut half);
    assert_eq!(half, [0x42, 0x10]);
    let mut beyond = [0; 8];
    space.read(0xfc, &mut beyond);
    assert_eq!(beyond, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
}

#[test]
fn sizing_a_bar_shows_its_size_and_kind() {
    let mut space = space();
    for offset in [0x10, 0x14, 0x18, 0x1c] {
        write32(&mut space, offset, u32::MAX);
    }
    assert_eq!(read32(&space, 0x10), 0xfffc_0000 | 0xc);
    assert_eq!(read32(&space, 0x14), u32::MAX);
    assert_eq!(read32(&space, 0x18), 0xffff_f000);
    assert_eq!(read32(&space, 0x1c), 0, "there is no BAR 3");
    assert_eq!(read32(&space, 0x30), 0, "nor an expansion ROM");
    write32(&mut space, 0x10, 0x1234_5678);
    write32(&mut space, 0x14, 0x9abc_def0);
    assert_eq!(space.bar_address(0), Some(0x9abc_def0_1234_0000));
    assert_eq!(space.bar_address(1), None, "the upper half is no BAR");
    assert_eq!(space.bar_address(7), None);
}

#[test]
fn bars_are_decoded_only_with_memory_space_enabled() {
    let mut space = space();
    space.place_bar(0, 0x80_0004_0000);
    space.place_bar(2, 0xc000_0000);
    assert!(space.decoded_bars().is_empty());
    assert!(!write32(&mut space, 0x18, 0xc000_1000).decode);

    let written = space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    assert_eq!(
        written,
        Written {
            command: true,
            decode: true
        }
    );
    let at = |bar, address, size| DecodedBar { bar, address, size };
    assert_eq!(
        space.decoded_bars(),
        [at(0, 0x80_0004_0000, 0x4_0000), at(2, 0xc000_1000, 0x1000)]
    );
    // Moving one by a single byte of its register is seen.
    assert!(space.write(0x1a, &[0x01]).decode);
    assert_eq!(space.bar_address(2), Some(0xc001_1000));
    assert!(!space.write(0x1a, &[0x01]).decode, "it is there already");

    space.reset();
    assert_eq!(space.command(), 0);
    assert_eq!(space.bar_address(2), Some(0xc000_0000));
}

#[test]
fn command_keeps_only_what_it_has() {
    let mut space = space();
    space.write(COMMAND, &[0xff; 4]);
    assert_eq!(space.command(), COMMAND_WRITABLE);
    assert_eq!(space.word(STATUS), 0, "status is read-only");
    // The upper byte alone, as a byte access.
    space.write(COMMAND + 1, &[0]);
    assert_eq!(space.command(), COMMAND_WRITABLE & 0xff);
}

#[test]
fn capabilities_form_a_list() {
    let mut space = space();
    assert_eq!(space.word(STATUS), 0);
    let first = space.add_capability(0x11, &[1, 2, 3], &[0, 0xf0]).unwrap();
    let second = space.add_capability(0x09, &[4; 14], &[]).unwrap();
    assert_eq!((first, second), (0x40, 0x48));
    assert_eq!(space.word(STATUS), 0x10);
    assert_eq!(read32(&space, CAPABILITIES_POINTER), 0x40);
    assert_eq!(read32(&space, 0x40), 0x0201_4811);
    assert_eq!(
        read32(&space, 0x48) & 0xffff,
        0x0009,
        "the last has no next"
    );
    write32(&mut space, 0x40, u32::MAX);
    assert_eq!(read32(&space, 0x40), 0xf201_4811);
}

#[test]
fn what_cannot_be_built_is_refused() {
    let mut space = space();
    assert_eq!(space.add_bar(0, NARROW), Err(ConfigError::BarTaken(0)));
    assert_eq!(
        space.add_bar(1, NARROW),
        Err(ConfigError::BarTaken(1)),
        "the upper half of BAR 0"
    );
    assert_eq!(
        space.add_bar(5, WIDE),
        Err(ConfigError::BarTaken(5)),
        "its upper half would be register 6"
    );
    for size in [0, 8, 0x1800, 1 << 32] {
        let bar = Bar { size, ..NARROW };
        assert_eq!(space.add_bar(3, bar), Err(ConfigError::BarSize(size)));
    }
    assert_eq!(
        space.add_capability(9, &[0; 0xbf], &[]),
        Err(ConfigError::NoRoom(0xc1))
    );
    assert_eq!(space.add_capability(9, &[0; 0xbe], &[]), Ok(0x40));
    assert_eq!(
        space.add_capability(9, &[0], &[]),
        Err(ConfigError::NoRoom(3))
    );
}

#[test]
fn any_write_keeps_the_read_only_bits() {
    let mut space = space();
    let before = space.clone();
    let mut random = 0x1234_5678_9abc_def1_u64;
    for _ in 0..10_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let len = 1 << (random >> 8 & 3);
        space.write((random & 0x1ff) as usize, &random.to_le_bytes()[..len]);
        for at in 0..CONFIG_SIZE {
            let fixed = !space.writable[at];
            assert_eq!(space.bytes[at] & fixed, before.bytes[at] & fixed);
        }
    }
}
