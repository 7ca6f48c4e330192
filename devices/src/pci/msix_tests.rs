use super::*;

/// Vectors that remember their routes and what was raised.
struct Vectors {
    count: u16,
    fail: AtomicBool,
    state: Mutex<Recorded>,
}

#[derive(Default)]
struct Recorded {
    routes: Vec<Option<MsiMessage>>,
    calls: usize,
    raised: Vec<u16>,
}

impl Vectors {
    fn new(count: u16) -> Arc<Self> {
        Arc::new(Self {
            count,
            fail: AtomicBool::new(false),
            state: Mutex::new(Recorded {
                routes: vec![None; count.into()],
                ..Recorded::default()
            }),
        })
    }

    fn route_of(&self, vector: usize) -> Option<MsiMessage> {
        self.state.lock().unwrap().routes[vector]
    }

    fn calls(&self) -> usize {
        self.state.lock().unwrap().calls
    }

    fn take_raised(&self) -> Vec<u16> {
        std::mem::take(&mut self.state.lock().unwrap().raised)
    }
}

impl MsiVectors for Vectors {
    fn count(&self) -> u16 {
        self.count
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        if self.fail.load(Ordering::Relaxed) {
            return Err(io::Error::other("no more routes"));
        }
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        state.routes[usize::from(vector)] = message;
        Ok(())
    }

    fn raise(&self, vector: u16) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        assert!(state.routes[usize::from(vector)].is_some());
        state.raised.push(vector);
        Ok(())
    }
}

fn msix(count: u16) -> (Arc<Vectors>, Msix) {
    let vectors = Vectors::new(count);
    let msix = Msix::new(Arc::clone(&vectors) as Arc<dyn MsiVectors>);
    msix.set_requester(0x18);
    (vectors, msix)
}

fn program(msix: &Msix, vector: u64, address: u64, data: u32, masked: bool) {
    let base = vector * ENTRY_SIZE;
    msix.table_write(base, &address.to_le_bytes());
    msix.table_write(base + 8, &data.to_le_bytes());
    msix.table_write(base + 12, &u32::from(masked).to_le_bytes());
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.pending_read(0, &mut data);
    u64::from_le_bytes(data)
}

const MESSAGE: MsiMessage = MsiMessage {
    address: 0xfee0_1000,
    data: 0x41,
    device_id: 0x18,
};

#[test]
fn routes_follow_enable_and_masks() {
    let (vectors, msix) = msix(3);
    program(&msix, 1, MESSAGE.address, MESSAGE.data, false);
    assert_eq!(vectors.calls(), 0, "nothing is enabled yet");
    msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
    assert!(msix.enabled());
    assert_eq!(vectors.calls(), 0, "all are masked");
    msix.set_control(CONTROL_ENABLE);
    assert_eq!(vectors.route_of(1), Some(MESSAGE));
    assert_eq!(vectors.calls(), 1, "the others are masked one by one");

    msix.table_write(ENTRY_SIZE + 12, &1_u32.to_le_bytes());
    assert_eq!(vectors.route_of(1), None);
    msix.table_write(ENTRY_SIZE + 12, &0_u32.to_le_bytes());
    assert_eq!(vectors.route_of(1), Some(MESSAGE));

    // A new message while unmasked takes effect at once.
    msix.table_write(ENTRY_SIZE + 8, &0x42_u32.to_le_bytes());
    assert_eq!(vectors.route_of(1).map(|m| m.data), Some(0x42));
    msix.set_control(0);
    assert!(!msix.enabled());
    assert_eq!(vectors.route_of(1), None);
}

#[test]
fn masked_interrupts_wait_and_fire_once() {
    let (vectors, msix) = msix(70);
    msix.set_control(CONTROL_ENABLE);
    program(&msix, 0, MESSAGE.address, 1, false);
    msix.raise(0).unwrap();
    assert_eq!(vectors.take_raised(), [0]);

    msix.raise(65).unwrap();
    msix.raise(65).unwrap();
    assert_eq!(pending(&msix), 0);
    let mut word = [0; 4];
    msix.pending_read(8, &mut word);
    assert_eq!(word, [2, 0, 0, 0], "vector 65");
    program(&msix, 65, MESSAGE.address, 2, false);
    assert_eq!(vectors.take_raised(), [65]);
    msix.pending_read(8, &mut word);
    assert_eq!(word, [0; 4]);

    // The function mask holds all of them back.
    msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
    msix.raise(0).unwrap();
    msix.raise(65).unwrap();
    assert!(vectors.take_raised().is_empty());
    assert_eq!(pending(&msix), 1);
    msix.set_control(CONTROL_ENABLE);
    assert_eq!(vectors.take_raised(), [0, 65]);
    assert_eq!(pending(&msix), 0);
}

#[test]
fn disabling_forgets_what_is_pending() {
    let (vectors, msix) = msix(1);
    msix.set_control(CONTROL_ENABLE);
    msix.raise(0).unwrap();
    assert_eq!(pending(&msix), 1);
    msix.set_control(0);
    assert_eq!(pending(&msix), 0);
    program(&msix, 0, MESSAGE.address, 1, false);
    msix.set_control(CONTROL_ENABLE);
    assert!(vectors.take_raised().is_empty());
}

#[test]
fn reset_unroutes_and_masks() {
    let (vectors, msix) = msix(2);
    msix.set_control(CONTROL_ENABLE);
    program(&msix, 0, MESSAGE.address, 1, false);
    assert!(vectors.route_of(0).is_some());
    msix.reset();
    assert_eq!(vectors.route_of(0), None);
    let mut entry = [0xff; 8];
    msix.table_read(0, &mut entry);
    assert_eq!(entry, [0; 8]);
    msix.table_read(8, &mut entry);
    assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0]);
    msix.set_control(CONTROL_ENABLE);
    assert_eq!(vectors.route_of(0), None, "masked after a reset");
}

#[test]
fn a_route_that_fails_leaves_the_interrupt_pending() {
    let (vectors, msix) = msix(1);
    msix.set_control(CONTROL_ENABLE);
    vectors.fail.store(true, Ordering::Relaxed);
    program(&msix, 0, MESSAGE.address, 1, false);
    msix.raise(0).unwrap();
    assert_eq!(pending(&msix), 1);
    vectors.fail.store(false, Ordering::Relaxed);
    program(&msix, 0, MESSAGE.address, 1, false);
    assert_eq!(vectors.take_raised(), [0]);

    // Nor is it raised through the route that should have been replaced.
    vectors.fail.store(true, Ordering::Relaxed);
    msix.table_write(8, &2_u32.to_le_bytes());
    msix.raise(0).unwrap();
    assert!(vectors.take_raised().is_empty());
    assert_eq!(pending(&msix), 1);
}

#[test]
fn the_table_takes_only_defined_accesses() {
    let (_, msix) = msix(2);
    program(&msix, 1, u64::MAX, u32::MAX, true);
    let before = |msix: &Msix| {
        let mut entry = [0; 16];
        let (low, high) = entry.split_at_mut(8);
        msix.table_read(ENTRY_SIZE, low);
        msix.table_read(ENTRY_SIZE + 8, high);
        entry
    };
    let entry = before(&msix);
    assert_eq!(
        entry[..4],
        [0xfc, 0xff, 0xff, 0xff],
        "dword-aligned address"
    );
    msix.table_write(16, &[0]);
    msix.table_write(16, &[0; 2]);
    msix.table_write(18, &[0; 4]);
    msix.table_write(20, &[0; 8]);
    msix.table_write(32, &[0; 8]);
    msix.table_write(!7, &[0; 8]);
    assert_eq!(before(&msix), entry);
    let mut data = [0xaa; 4];
    msix.table_read(32, &mut data);
    assert_eq!(data, [0; 4], "there is no vector 2");
    let mut data = [0xaa; 2];
    msix.table_read(16, &mut data);
    assert_eq!(data, [0; 2]);
    msix.pending_read(!7, &mut [0; 8]);
    msix.raise(2).unwrap();
}

#[test]
fn capability_tells_size_and_places() {
    let (_, msix) = msix(5);
    assert_eq!(
        msix.capability(2, 0x2_0000, 0x3_0000),
        [4, 0, 0x02, 0, 2, 0, 0x02, 0, 3, 0]
    );
    let many = Msix::new(Vectors::new(5000));
    assert_eq!(many.count(), MAX_VECTORS);
}

#[test]
fn random_programming_keeps_routes_true() {
    let (vectors, msix) = msix(9);
    let mut random = 0xdead_beef_cafe_f00d_u64;
    for _ in 0..20_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let bytes = random.rotate_left(23).to_le_bytes();
        match random % 8 {
            0 => msix.set_control((random >> 16) as u16),
            1 => msix.raise((random >> 20 & 0xf) as u16).unwrap(),
            2 if random >> 40 & 0xff == 0 => msix.reset(),
            _ => {
                let len = [1, 2, 4, 4, 4, 8, 8, 8][(random >> 8 & 7) as usize];
                msix.table_write(random >> 12 & 0xff, &bytes[..len]);
            }
        }
        let state = msix.state();
        for (index, entry) in state.entries.iter().enumerate() {
            let live = state.enabled && !state.masked && !entry.masked;
            assert_eq!(entry.route.is_some(), live);
            assert_eq!(vectors.route_of(index), entry.route);
            assert!(!(live && entry.pending));
        }
    }
}
