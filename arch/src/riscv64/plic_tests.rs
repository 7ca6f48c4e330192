//! The controller as its driver sees it.

use super::*;

type Pins = Arc<Mutex<Vec<(u32, bool)>>>;

fn plic(vcpus: u32) -> (Arc<Plic>, Pins) {
    let pins = Pins::default();
    let seen = pins.clone();
    let pin = move |vcpu, asserted| {
        seen.lock().unwrap().push((vcpu, asserted));
        Ok(())
    };
    (Plic::new(vcpus, 40, Box::new(pin)), pins)
}

fn take(pins: &Pins) -> Vec<(u32, bool)> {
    std::mem::take(&mut *pins.lock().unwrap())
}

fn read(plic: &Plic, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    plic.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(plic: &Plic, offset: u64, value: u32) {
    plic.write(offset, &value.to_le_bytes());
}

const fn claim(context: u64) -> u64 {
    CONTEXT + context * CONTEXT_STEP + CLAIM
}

/// Gives source `number` a priority and enables it in `context`.
fn enable(plic: &Plic, context: u64, number: u64, priority: u32) {
    write(plic, 4 * number, priority);
    let word = ENABLE + context * ENABLE_STEP + number / 32 * 4;
    let bits = read(plic, word) | 1 << (number % 32);
    write(plic, word, bits);
}

#[test]
fn a_level_is_served_until_it_goes() {
    let (plic, pins) = plic(1);
    let wire = Wires(plic.clone()).level_line(33);
    enable(&plic, 0, 33, 1);
    wire.set(true).unwrap();
    assert_eq!(take(&pins), [(0, true)]);
    assert_eq!(read(&plic, PENDING + 4), 2);
    assert_eq!(read(&plic, claim(0)), 33);
    assert_eq!(take(&pins), [(0, false)]);
    assert_eq!(read(&plic, claim(0)), 0, "it is being served");
    // Still asserted when it is completed: again.
    write(&plic, claim(0), 33);
    assert_eq!(take(&pins), [(0, true)]);
    assert_eq!(read(&plic, claim(0)), 33);
    wire.set(false).unwrap();
    write(&plic, claim(0), 33);
    assert_eq!(take(&pins), [(0, false)]);
    assert_eq!(read(&plic, claim(0)), 0);
}

#[test]
fn an_edge_is_served_once_and_one_more_waits() {
    let (plic, pins) = plic(1);
    let wire = Wires(plic.clone()).edge_line(5);
    enable(&plic, 0, 5, 1);
    wire.set(true).unwrap();
    assert_eq!(read(&plic, claim(0)), 5);
    for _ in 0..3 {
        wire.set(true).unwrap();
    }
    wire.set(false).unwrap();
    write(&plic, claim(0), 5);
    assert_eq!(read(&plic, claim(0)), 5);
    write(&plic, claim(0), 5);
    assert_eq!(read(&plic, claim(0)), 0);
    let pins = take(&pins);
    assert_eq!(pins.last(), Some(&(0, false)));
}

#[test]
fn interrupts_reach_who_enables_them() {
    let (plic, pins) = plic(3);
    let wire = Wires(plic.clone()).level_line(7);
    wire.set(true).unwrap();
    assert!(take(&pins).is_empty());
    enable(&plic, 2, 7, 1);
    assert_eq!(take(&pins), [(2, true)]);
    enable(&plic, 0, 7, 1);
    assert_eq!(take(&pins), [(0, true)]);
    // Who claims first serves it; the other one finds nothing.
    assert_eq!(read(&plic, claim(0)), 7);
    assert_eq!(take(&pins), [(0, false), (2, false)]);
    assert_eq!(read(&plic, claim(2)), 0);
    // Who does not enable it cannot complete it.
    write(&plic, claim(1), 7);
    assert!(take(&pins).is_empty());
    write(&plic, claim(2), 7);
    assert_eq!(take(&pins), [(0, true), (2, true)]);
}

#[test]
fn the_highest_priority_is_served_first() {
    let (plic, _) = plic(1);
    let wires = Wires(plic.clone());
    for (number, priority) in [(3, 1), (9, 4), (10, 4), (11, 0)] {
        enable(&plic, 0, number, priority);
        wires.level_line(number as u32).set(true).unwrap();
    }
    let order: Vec<u32> = (0..4).map(|_| read(&plic, claim(0))).collect();
    assert_eq!(order, [9, 10, 3, 0]);
}

#[test]
fn the_threshold_masks_the_pin() {
    let (plic, pins) = plic(1);
    let wire = Wires(plic.clone()).level_line(7);
    enable(&plic, 0, 7, 3);
    write(&plic, CONTEXT + THRESHOLD, 3);
    wire.set(true).unwrap();
    assert!(take(&pins).is_empty());
    write(&plic, CONTEXT + THRESHOLD, 2);
    assert_eq!(take(&pins), [(0, true)]);
    assert_eq!(read(&plic, CONTEXT), 2);
}

#[test]
fn source_zero_does_not_exist() {
    let (plic, pins) = plic(1);
    write(&plic, 0, 7);
    assert_eq!(read(&plic, 0), 0);
    write(&plic, ENABLE, 1);
    assert_eq!(read(&plic, ENABLE), 0);
    Wires(plic.clone()).level_line(0).set(true).unwrap();
    Wires(plic.clone()).edge_line(41).set(true).unwrap();
    assert!(take(&pins).is_empty());
    assert_eq!(read(&plic, claim(0)), 0);
}

#[test]
fn survives_any_access() {
    let (plic, _) = plic(2);
    let wires = Wires(plic.clone());
    for number in [1, 40, 41, 1024, u32::MAX] {
        wires.level_line(number).set(true).unwrap();
    }
    let places = (0..0x3000)
        .chain(CONTEXT - 8..CONTEXT + 3 * CONTEXT_STEP)
        .chain(size(MAX_CONTEXTS) - 8..size(MAX_CONTEXTS) + 8)
        .chain([u64::MAX - 3, u64::MAX]);
    for offset in places {
        for len in [0, 1, 2, 4, 8] {
            plic.write(offset, &[0xff; 8][..len]);
            plic.read(offset, &mut [0; 8][..len]);
        }
    }
}

#[test]
fn a_pin_that_cannot_be_driven_is_tried_again() {
    let failures = Arc::new(Mutex::new(1));
    let left = failures.clone();
    let pin = move |_, _| {
        let mut left = left.lock().unwrap();
        if *left > 0 {
            *left -= 1;
            return Err(io::ErrorKind::Interrupted.into());
        }
        Ok(())
    };
    let plic = Plic::new(1, 8, Box::new(pin));
    enable(&plic, 0, 1, 1);
    let wire = Wires(plic.clone()).level_line(1);
    wire.set(true).unwrap();
    assert!(!plic.lock().contexts[0].pin);
    wire.set(true).unwrap();
    assert!(plic.lock().contexts[0].pin);
}
