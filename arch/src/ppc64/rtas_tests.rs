//! Calls as a guest makes them, by words in its memory.

use std::io;

use crossvisor_devices::irq::IrqLine;
use vm_memory::GuestMemoryMmap;

use super::*;

struct NoWire;

impl IrqLine for NoWire {
    fn set(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

const RAM: u64 = 1 << 20;
const AT: u64 = 0x8000;

struct Scene {
    memory: GuestMem,
    events: Arc<Events>,
    rtas: Rtas,
}

impl Scene {
    fn new(cpus: u32) -> Self {
        let ranges = [(GuestAddress(0), RAM as usize)];
        let memory = GuestMem::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let events = Arc::new(Events::new(Arc::new(NoWire)));
        let rtas = Rtas::new(memory.clone(), cpus, events.clone(), None, None);
        Self {
            memory,
            events,
            rtas,
        }
    }

    fn words(&self, address: u64, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.memory
            .memory()
            .write_slice(&bytes, GuestAddress(address))
            .unwrap();
    }

    /// Makes a call; its results and what the vCPU does then.
    fn call(&self, token: u32, args: &[u32], results: u32) -> (Vec<i32>, Action) {
        let mut words = vec![token, args.len() as u32, results];
        words.extend(args);
        words.extend(vec![0xdead_beef; results as usize + 1]);
        self.words(AT, &words);
        let action = self.rtas.call(0, AT, 0x0200_0000).unwrap();
        let mut bytes = vec![0; (results as usize + 1) * 4];
        let first = AT + 12 + args.len() as u64 * 4;
        self.memory
            .memory()
            .read_slice(&mut bytes, GuestAddress(first))
            .unwrap();
        let mut words: Vec<i32> = bytes
            .chunks(4)
            .map(|word| i32::from_be_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words.pop(), Some(0xdead_beef_u32 as i32), "written beyond");
        (words, action)
    }
}

#[test]
fn tokens_are_unique() {
    let mut tokens: Vec<u32> = TOKENS.iter().map(|(_, token)| *token).collect();
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), TOKENS.len());
    assert!(!tokens.contains(&0));
}

#[test]
fn the_stub_is_five_big_endian_instructions() {
    let stub = stub();
    assert_eq!(stub.len(), 20);
    assert_eq!(stub[8..12], [0x60, 0x63, 0xf0, 0x00]);
    assert_eq!(stub[12..16], [0x44, 0x00, 0x00, 0x22]);
}

#[test]
fn ends_are_told_apart() {
    let scene = Scene::new(1);
    let end = |token, args: &[u32]| scene.call(token, args, 1);
    assert_eq!(
        end(POWER_OFF, &[0, 0]),
        (vec![0], Action::End(End::PowerOff))
    );
    assert_eq!(end(SYSTEM_REBOOT, &[]), (vec![0], Action::End(End::Reset)));
    assert_eq!(end(OS_TERM, &[0x1000]), (vec![0], Action::End(End::Panic)));
}

#[test]
fn non_volatile_memory_keeps_what_is_stored() {
    let scene = Scene::new(1);
    scene.words(0x100, &[0x1234_5678]);
    let (results, _) = scene.call(NVRAM_STORE, &[nvram::SIZE - 4, 0x100, 4], 2);
    assert_eq!(results, [0, 4]);
    let (results, _) = scene.call(NVRAM_FETCH, &[nvram::SIZE - 4, 0x200, 4], 2);
    assert_eq!(results, [0, 4]);
    let mut found = [0; 4];
    let memory = scene.memory.memory();
    memory.read_slice(&mut found, GuestAddress(0x200)).unwrap();
    assert_eq!(found, [0x12, 0x34, 0x56, 0x78]);
    let (results, _) = scene.call(NVRAM_STORE, &[nvram::SIZE, 0x100, 4], 2);
    assert_eq!(results[0], PARAMETER_ERROR);
}

#[test]
fn nothing_is_done_where_its_results_have_no_room() {
    let scene = Scene::new(2);
    // The arguments are the last words of RAM.
    let at = RAM - 24;
    scene.words(at, &[START_CPU, 3, 1, 1, 0x60, 7]);
    assert_eq!(scene.rtas.call(0, at, 0), None);
    let (results, _) = scene.call(QUERY_CPU_STOPPED_STATE, &[1], 2);
    assert_eq!(results, [0, 0], "still stopped");
    scene.words(at - 4, &[START_CPU, 3, 1, 1, 0x60, 7]);
    assert!(scene.rtas.call(0, at - 4, 0).is_some());
}

#[test]
fn vcpus_start_once_and_again_after_they_stopped() {
    let scene = Scene::new(2);
    let state = |cpu| scene.call(QUERY_CPU_STOPPED_STATE, &[cpu], 2).0;
    assert_eq!((state(0), state(1)), (vec![0, 2], vec![0, 0]));
    assert_eq!(state(2)[0], PARAMETER_ERROR);
    let (results, action) = scene.call(START_CPU, &[1, 0x60, 7], 1);
    assert_eq!(results, [0]);
    let Action::Start { vcpu, registers } = action else {
        panic!("{action:?}");
    };
    assert_eq!(vcpu, 1);
    assert_eq!(
        (registers.get("pc"), registers.get("r3")),
        (Some(0x60), Some(7))
    );
    assert_eq!(registers.get("lpcr"), Some(0x0200_0000));
    assert_eq!(registers.get("msr"), Some(1 << 63 | 1 << 12));
    assert_eq!(state(1), [0, 2]);
    for wrong in [1, 0, 2, u32::MAX] {
        let (results, action) = scene.call(START_CPU, &[wrong, 0, 0], 1);
        assert_eq!((results, action), (vec![PARAMETER_ERROR], Action::Continue));
    }
    // vCPU 0 stops itself; its results are written as those of any call.
    assert_eq!(scene.call(STOP_SELF, &[], 1).1, Action::Park);
    assert_eq!(state(0), [0, 0]);
}

#[test]
fn a_vcpu_is_stopped_once_its_results_are_written() {
    const UNTOUCHED: u32 = 0xdead_beef;
    let scene = Scene::new(1);
    for _ in 0..300 {
        scene.words(AT, &[STOP_SELF, 0, 1, UNTOUCHED]);
        scene.rtas.cpus()[0] = CpuState::Running;
        std::thread::scope(|scope| {
            let call = scope.spawn(|| scene.rtas.call(0, AT, 0));
            while scene.rtas.cpus()[0] == CpuState::Running && !call.is_finished() {
                std::hint::spin_loop();
            }
            let mut status = [0; 4];
            let at = GuestAddress(AT + 12);
            scene.memory.memory().read_slice(&mut status, at).unwrap();
            assert_eq!(status, [0; 4]);
        });
        assert_eq!(scene.rtas.cpus()[0], CpuState::Stopped);
    }
}

#[test]
fn the_time_of_day_is_read_and_set() {
    let scene = Scene::new(1);
    let (now, _) = scene.call(GET_TIME_OF_DAY, &[], 8);
    assert_eq!(now[0], 0);
    assert!(now[1] >= 2024);
    let date = [2001, 2, 3, 4, 5, 6, 0];
    assert_eq!(scene.call(SET_TIME_OF_DAY, &date, 1).0, [0]);
    assert_eq!(scene.call(GET_TIME_OF_DAY, &[], 8).0[..4], [0, 2001, 2, 3]);
    let wrong = [2001, 0, 3, 4, 5, 6, 0];
    assert_eq!(scene.call(SET_TIME_OF_DAY, &wrong, 1).0, [PARAMETER_ERROR]);
}

#[test]
fn the_power_button_is_an_event_in_the_guests_buffer() {
    let scene = Scene::new(1);
    let check = |buffer, len| {
        let args = [0x500, 0x1000, 0x4000_0000, 0, buffer, len];
        scene.call(CHECK_EXCEPTION, &args, 1).0
    };
    assert_eq!(check(0x9000, 1024), [1], "there is no event");
    scene.events.press_power_button().unwrap();
    assert_eq!(scene.call(GET_SENSOR_STATE, &[9, 0], 2).0, [0, 3]);
    assert_eq!(check(0x9000, 1024), [0]);
    let mut log = [0; 4];
    scene
        .memory
        .memory()
        .read_slice(&mut log, GuestAddress(0x9000))
        .unwrap();
    assert_eq!(log, [6, 0x24, 0, 64]);
    // A buffer that is short, and one outside RAM.
    scene.events.press_power_button().unwrap();
    assert_eq!(check(RAM as u32 - 4, 4), [0]);
    scene.events.press_power_button().unwrap();
    for (buffer, len) in [(RAM as u32 - 4, 1024), (u32::MAX, 1), (0, u32::MAX)] {
        assert_eq!(check(buffer, len), [PARAMETER_ERROR]);
    }
    // The event is still there.
    assert_eq!(check(0x9000, 1024), [0]);
    assert_eq!(check(0x9000, 1024), [1]);
    assert_eq!(
        scene.call(GET_SENSOR_STATE, &[1, 0], 2).0[0],
        PARAMETER_ERROR
    );
}

#[test]
fn nobodys_calls_and_wrong_arguments_are_answered() {
    let scene = Scene::new(1);
    for (token, args) in [
        (0, &[][..]),
        (u32::MAX, &[1, 2, 3]),
        (POWER_OFF, &[]),
        (START_CPU, &[1]),
        (CHECK_EXCEPTION, &[1]),
        (CHANGE_MSI, &[0; 6]),
        (XICS_TOKENS[0].1, &[1, 2, 3]),
    ] {
        let (results, action) = scene.call(token, args, 1);
        assert!(results[0] < 0, "{token:#x}");
        assert_eq!(action, Action::Continue);
    }
    // No room for results.
    assert!(scene.call(GET_TIME_OF_DAY, &[], 0).0.is_empty());
}

#[test]
fn what_is_no_call_is_left_alone() {
    let scene = Scene::new(2);
    for words in [[1, 17, 0], [1, 0, 17], [1, u32::MAX, u32::MAX], [1, 16, 1]] {
        scene.words(AT, &words);
        assert_eq!(scene.rtas.call(0, AT, 0), None);
    }
    for address in [RAM, RAM - 4, u64::MAX, u64::MAX - 11, 1 << 60] {
        let _ = scene.rtas.call(0, address, 0);
    }
    // Arguments and results that end beyond RAM.
    scene.words(RAM - 12, &[GET_TIME_OF_DAY, 0, 8]);
    assert_eq!(scene.rtas.call(0, RAM - 12, 0), None);
    scene.words(RAM - 12, &[POWER_OFF, 2, 0]);
    assert_eq!(scene.rtas.call(0, RAM - 12, 0), None);
    // One that ends where RAM does, and wants no results.
    scene.words(RAM - 24, &[START_CPU, 3, 0, 1, 0x60, 7]);
    let action = scene.rtas.call(0, RAM - 24, 0);
    assert!(matches!(action, Some(Action::Start { .. })), "{action:?}");
}
