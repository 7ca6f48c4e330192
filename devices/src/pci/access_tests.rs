use std::sync::atomic::AtomicUsize;

use super::*;
use crate::pci::PciWindow;

/// A bus whose only function is its host bridge, 1b36:0008.
fn root() -> Arc<PciRoot> {
    PciRoot::new(&[PciWindow {
        guest_base: 0xc000_0000,
        pci_base: 0xc000_0000,
        size: 0x1000_0000,
    }])
}

fn get<const N: usize>(bus: &dyn BusDevice, offset: u64) -> [u8; N] {
    let mut data = [0xee; N];
    bus.read(offset, &mut data);
    data
}

#[test]
fn ecam_decodes_function_and_register() {
    let ecam = Ecam::new(root());
    assert_eq!(get(&ecam, 0), [0x36, 0x1b, 0x08, 0x00]);
    assert_eq!(get(&ecam, 2), [0x08, 0x00]);
    assert_eq!(get(&ecam, 1), [0x1b]);
    assert_eq!(get(&ecam, 0), [0x36, 0x1b, 0x08, 0x00, 0, 0, 0, 0]);
    assert_eq!(get(&ecam, 0x100), [0xff; 4], "no extended registers");
    assert_eq!(get(&ecam, 0x1000), [0xff; 4], "function 1");
    assert_eq!(get(&ecam, 0x8000), [0xff; 4], "device 1");
    assert_eq!(get(&ecam, 0x10_0000), [0xff; 4], "bus 1");
    assert_eq!(get(&ecam, 0xffe), [0xff; 4], "into the next function");
    assert_eq!(get(&ecam, u64::MAX), [0xff; 8]);
    ecam.write(u64::MAX - 7, &[0; 8]);

    ecam.write(0x3c, &[0x55]);
    assert_eq!(get(&ecam, 0x3c), [0x55, 0, 0, 0]);
    ecam.write(0xffe, &[0; 4]);
}

#[test]
fn mechanism_1_goes_through_address_and_data() {
    let ports = ConfigMechanism1::new(root(), None);
    assert_eq!(get(&ports, 4), [0xff; 4], "not enabled");
    ports.write(0, &0x8000_0000_u32.to_le_bytes());
    assert_eq!(get(&ports, 0), 0x8000_0000_u32.to_le_bytes());
    assert_eq!(get(&ports, 4), [0x36, 0x1b, 0x08, 0x00]);
    assert_eq!(get(&ports, 6), [0x08, 0x00]);
    assert_eq!(get(&ports, 5), [0x1b]);
    assert_eq!(get(&ports, 6), [0xff; 4], "beyond the data register");
    assert_eq!(get(&ports, 4), [0xff; 8]);

    ports.write(0, &0x8000_083c_u32.to_le_bytes());
    assert_eq!(get(&ports, 4), [0xff; 4], "device 1");
    ports.write(0, &0xff00_003f_u32.to_le_bytes());
    assert_eq!(
        get(&ports, 0),
        0x8000_003c_u32.to_le_bytes(),
        "reserved bits are zero"
    );
    ports.write(4, &[0x77]);
    assert_eq!(get(&ports, 4), [0x77]);

    // Bytes and words do not reach the address register.
    ports.write(0, &[0xff]);
    ports.write(2, &[0, 0]);
    assert_eq!(get(&ports, 0), 0x8000_003c_u32.to_le_bytes());
    assert_eq!(get(&ports, 1), [0xff], "no reset control register");
}

#[test]
fn port_cf9_resets() {
    let resets = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&resets);
    let ports = ConfigMechanism1::new(
        root(),
        Some(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        })),
    );
    ports.write(0, &0x8000_3c00_u32.to_le_bytes());
    assert_eq!(get(&ports, 1), [0]);
    ports.write(1, &[0x02]);
    assert_eq!(get(&ports, 1), [0x02]);
    assert_eq!(resets.load(Ordering::Relaxed), 0);
    ports.write(1, &[0x06]);
    assert_eq!(resets.load(Ordering::Relaxed), 1);
    ports.write(1, &[0x0e, 0]);
    assert_eq!(resets.load(Ordering::Relaxed), 1, "only a byte does");
    assert_eq!(get(&ports, 0), 0x8000_3c00_u32.to_le_bytes());
}
