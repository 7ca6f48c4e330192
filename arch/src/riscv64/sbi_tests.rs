//! Calls as KVM hands them over.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::Duration;

use crossvisor_devices::chardev::ConsoleInput;
use crossvisor_devices::irq::IrqLine;
use crossvisor_devices::output::Output;
use crossvisor_vmm::exit::{End, NoLogicalMemory, SYNC_REGS_SIZE};
use vm_memory::GuestMemoryMmap;

use super::*;

const RAM: u64 = 2 << 30;
const RAM_SIZE: usize = 1 << 16;

struct NoWire;

impl IrqLine for NoWire {
    fn set(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Scene {
    sbi: Sbi,
    memory: GuestMemoryMmap,
    screen: Screen,
}

impl Scene {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM), RAM_SIZE)]).unwrap();
        let screen = Screen::default();
        let line = Serial::new(
            Arc::new(NoWire),
            Arc::new(Output::new("screen", Box::new(screen.clone())).unwrap()),
            0,
        )
        .unwrap();
        Self {
            sbi: Sbi::new(GuestMem::new(memory.clone()), Arc::new(line)),
            memory,
            screen,
        }
    }

    fn exit(&self, reason: u32, words: &[u64]) -> ([u8; RUN_UNION_SIZE], Action) {
        let mut data = [0; RUN_UNION_SIZE];
        for (index, value) in words.iter().enumerate() {
            set_word(&mut data, index, *value);
        }
        let mut sync_regs = [0; SYNC_REGS_SIZE];
        let exit = ArchExit {
            reason,
            data: &mut data,
            sync_regs: &mut sync_regs,
            psw: &mut [0; 2],
            logical: &NoLogicalMemory,
        };
        let action = self.sbi.handle(0, exit);
        (data, action)
    }

    /// Makes a call; returns error and value.
    fn call(&self, extension: u64, function: u64, arguments: [u64; 3]) -> (i64, u64) {
        let [a, b, c] = arguments;
        let (data, action) = self.exit(EXIT_SBI, &[extension, function, a, b, c, 0, 0, 0, 9, 9]);
        assert_eq!(action, Action::Continue);
        (word(&data, ERROR) as i64, word(&data, VALUE))
    }

    fn printed(&self) -> Vec<u8> {
        assert!(self.sbi.line.flush(Duration::from_secs(60)));
        std::mem::take(&mut *self.screen.0.lock().unwrap())
    }
}

#[test]
fn prints_bytes_and_buffers() {
    let scene = Scene::new();
    scene
        .memory
        .write_slice(b"hello", GuestAddress(RAM))
        .unwrap();
    assert_eq!(scene.call(DBCN, DBCN_WRITE, [5, RAM, 0]), (0, 5));
    assert_eq!(
        scene.call(DBCN, DBCN_WRITE_BYTE, [b'!'.into(), 0, 0]),
        (0, 0)
    );
    assert_eq!(scene.call(PUTCHAR, 0, [b'?'.into(), 0, 0]).0, 0);
    assert_eq!(scene.printed(), b"hello!?");
    // A long one is taken piece by piece.
    let (error, taken) = scene.call(DBCN, DBCN_WRITE, [RAM_SIZE as u64, RAM, 0]);
    assert_eq!((error, taken), (0, PIECE));
    assert_eq!(scene.printed().len() as u64, PIECE);
}

#[test]
fn reads_what_was_typed() {
    let scene = Scene::new();
    assert_eq!(scene.call(DBCN, DBCN_READ, [8, RAM, 0]), (0, 0));
    assert_eq!(scene.call(GETCHAR, 0, [0; 3]).0, -1);
    assert_eq!(scene.sbi.line.push(b"abcdef"), 6);
    assert_eq!(scene.call(GETCHAR, 0, [0; 3]).0, i64::from(b'a'));
    assert_eq!(scene.call(DBCN, DBCN_READ, [3, RAM, 0]), (0, 3));
    let mut bytes = [0; 4];
    scene
        .memory
        .read_slice(&mut bytes, GuestAddress(RAM))
        .unwrap();
    assert_eq!(&bytes, b"bcd\0");
    assert_eq!(scene.call(DBCN, DBCN_READ, [100, RAM, 0]), (0, 2));
}

#[test]
fn buffers_outside_memory_are_refused() {
    let scene = Scene::new();
    let end = RAM + RAM_SIZE as u64;
    let bad = [
        [5, RAM - 1, 0],
        [5, end - 4, 0],
        [5, RAM, 1],
        [u64::MAX, RAM, 0],
        [5, u64::MAX, u64::MAX],
    ];
    scene.sbi.line.push(b"typed");
    for arguments in bad {
        for function in [DBCN_WRITE, DBCN_READ] {
            let (error, value) = scene.call(DBCN, function, arguments);
            assert_eq!((error, value), (-3, 0), "{arguments:x?}");
        }
    }
    assert!(scene.printed().is_empty());
    assert_eq!(scene.call(DBCN, DBCN_READ, [5, RAM, 0]), (0, 5), "kept");
}

#[test]
fn what_is_not_known_is_not_supported() {
    let scene = Scene::new();
    for (extension, function) in [(DBCN, 3), (0, 0), (u64::MAX, 0), (0x0900_0000, 1)] {
        assert_eq!(scene.call(extension, function, [1, 2, 3]), (-2, 0));
    }
}

#[test]
fn the_seed_is_entropy_and_other_csrs_are_zero() {
    let scene = Scene::new();
    let read = |number| {
        let (data, action) = scene.exit(EXIT_CSR, &[number, 0, 0, 77]);
        assert_eq!(action, Action::Continue);
        word(&data, CSR_VALUE)
    };
    let seeds: Vec<u64> = (0..64).map(|_| read(SEED)).collect();
    assert!(seeds.iter().all(|seed| seed >> 16 == 0x8000));
    assert!(seeds.iter().any(|seed| *seed != seeds[0]));
    assert_eq!(read(0xc00), 0);
}

#[test]
fn other_exits_end_the_vm() {
    let scene = Scene::new();
    let (_, action) = scene.exit(99, &[]);
    assert!(matches!(action, Action::End(End::Crash(_))), "{action:?}");
}
