//! Whether a /dev/kvm runs unmodified kernels: shown by running a short
//! payload, not by asking.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use crossvisor_devices::bus::BusDevice;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arch::{Architecture, Host, NoArchExits, SelfTest};
use crate::bus::Bus;
use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::exit::End;
use crate::hv::Vm;
use crate::kvm::{Kvm, KvmVm};
use crate::plan::Range;
use crate::power::{Event, Power, Requests};
use crate::vcpu::{Gate, Shared, Threads};

/// How long the payload may take. It needs microseconds on hardware and
/// milliseconds in an emulated machine.
const LIMIT: Duration = Duration::from_secs(10);

/// How the payload fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every step ran.
    Passed,
    /// One did not.
    Failed {
        /// The step that did not complete, such as `cmpxchg16b`.
        step: &'static str,
        /// What happened instead.
        reason: String,
    },
}

/// Takes the payload's reports.
struct Report {
    done: AtomicUsize,
    steps: usize,
    power: Power,
}

impl BusDevice for Report {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data) else {
            return;
        };
        // The guest and the host are of one architecture here, and so of one
        // byte order.
        let value = u32::from_ne_bytes(value) as usize;
        if value == self.done.load(Ordering::Relaxed) + 1 {
            self.done.store(value, Ordering::Relaxed);
            if value == self.steps {
                self.power.power_off();
            }
        }
    }
}

/// Runs the payload of `arch` on `kvm`.
///
/// # Errors
/// The VM cannot even be made; the text says why.
pub fn run(arch: &dyn Architecture, kvm: &Kvm, host: &Host) -> Result<Verdict> {
    let test = arch
        .self_test()
        .ok_or_else(|| Error::Boot(format!("{} has no self-test", arch.name())))?;
    let config = VmConfig {
        entropy: false,
        ..VmConfig::default()
    };
    let machine = Arc::from(arch.machine(&config, host)?);
    let memory = load(&test)?;
    let vm = KvmVm::new(kvm, machine, &memory)?;
    let vcpus = vec![vm.create_vcpu(0)?];
    vm.finish()?;
    drive(&test, vcpus)
}

/// The payload in memory of its own.
fn load(test: &SelfTest) -> Result<GuestMemoryMmap> {
    let internal = |error: &dyn std::fmt::Display| Error::Boot(format!("self-test: {error}"));
    let range = (GuestAddress(test.ram_base), test.ram_size as usize);
    let memory = GuestMemoryMmap::from_ranges(&[range]).map_err(|error| internal(&error))?;
    for (address, bytes) in &test.image {
        memory
            .write_slice(bytes, GuestAddress(*address))
            .map_err(|error| internal(&error))?;
    }
    Ok(memory)
}

/// Runs the payload on `vcpus` until it is through, stops or takes too long.
fn drive(test: &SelfTest, vcpus: Vec<Box<dyn crate::hv::Vcpu>>) -> Result<Verdict> {
    let (requests, events) = Requests::new();
    let power = Power::new(&requests);
    let report = Arc::new(Report {
        done: AtomicUsize::new(0),
        steps: test.steps.len(),
        power: power.clone(),
    });
    let mut memory_bus = Bus::default();
    memory_bus.insert(Range::new(test.report, 8), report.clone())?;
    let shared = Arc::new(Shared {
        memory_bus,
        port_bus: Bus::default(),
        handler: Box::new(NoArchExits),
        power,
        gates: vec![Gate::default()],
        stopping: AtomicBool::new(false),
    });
    let mut threads = Threads::spawn(shared.clone(), vcpus)?;
    for gate in &shared.gates {
        gate.start(Some(test.registers.clone()));
    }
    let reason = match events.recv_timeout(LIMIT) {
        Ok(Event::End {
            end: End::PowerOff, ..
        }) => None,
        Ok(Event::End {
            end: End::Crash(reason),
            ..
        }) => Some(reason),
        Ok(other) => Some(format!("{other:?}")),
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            Some(format!("no progress within {} s", LIMIT.as_secs()))
        }
    };
    threads.stop();
    let step = test.steps.get(report.done.load(Ordering::Relaxed));
    Ok(match (step, reason) {
        (Some(step), reason) => Verdict::Failed {
            step,
            reason: reason.unwrap_or_default(),
        },
        (None, _) => Verdict::Passed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::RegisterState;
    use crate::double::{ScriptedVm, Step};

    fn verdict(script: Vec<Step>) -> Verdict {
        let test = SelfTest {
            ram_size: 0x10000,
            ram_base: 0,
            image: vec![(0x1000, vec![1, 2, 3])],
            registers: RegisterState(vec![("pc", 0x1000)]),
            report: 0x2_0000,
            steps: &["first", "second"],
        };
        load(&test).unwrap();
        let vm = ScriptedVm::new(vec![script]);
        drive(&test, vec![vm.create_vcpu(0).unwrap()]).unwrap()
    }

    fn report(step: u32) -> Step {
        Step::Store(0x2_0000, step.to_ne_bytes().to_vec())
    }

    #[test]
    fn all_steps_pass() {
        assert_eq!(verdict(vec![report(1), report(2)]), Verdict::Passed);
    }

    #[test]
    fn the_step_that_fails_is_named() {
        let Verdict::Failed { step, reason } = verdict(vec![report(1), Step::Shutdown]) else {
            panic!("passed");
        };
        assert_eq!(step, "second");
        assert!(reason.contains("triple fault"), "{reason}");
    }

    #[test]
    fn a_step_that_is_left_out_does_not_count() {
        let Verdict::Failed { step, .. } = verdict(vec![report(2), Step::Shutdown]) else {
            panic!("passed");
        };
        assert_eq!(step, "first");
    }
}
