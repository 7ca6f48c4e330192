//! The exits of an s390x machine: which instruction or event it is, and who
//! handles it (Documentation/virt/kvm/api.rst, section 5; the interception
//! codes are those of SIE, Linux `arch/s390/kvm/intercept.c`).

use std::sync::Arc;

use crossvisor_devices::GuestMem;
use crossvisor_devices::css::{ChannelSubsystem, Irb, Orb, Refusal, Schib};
use crossvisor_vmm::arch::ExitHandler;
use crossvisor_vmm::exit::{Action, ArchExit, End, RUN_UNION_SIZE};
use crossvisor_vmm::hv;
use crossvisor_vmm::power::Power;

use super::cpu::{Cpu, Result, Stop};
use super::interrupt::{self, program};
use super::ipl::IplParameters;
use super::sclp::Sclp;
use super::sigp::Cpus;
use super::stsi::Identity;
use super::watchdog::Watchdog;
use super::{chsc, diag, stsi};

/// KVM_EXIT_*.
mod reason {
    pub const SIEIC: u32 = 13;
    pub const RESET: u32 = 14;
    pub const TSCH: u32 = 22;
    pub const STSI: u32 = 25;
}

/// Interception codes.
mod intercept {
    pub const INSTRUCTION: u8 = 0x04;
    pub const PROGRAM: u8 = 0x08;
    pub const EXTERNAL: u8 = 0x14;
    pub const IO: u8 = 0x18;
    pub const WAIT: u8 = 0x1c;
    pub const STOP: u8 = 0x28;
    pub const OPERATION: u8 = 0x2c;
}

/// Instructions by their first halfword, or the first byte where the other has
/// operands.
mod instruction {
    pub const DIAGNOSE: u8 = 0x83;
    pub const SIGNAL_PROCESSOR: u8 = 0xae;
    pub const SERVICE_CALL: u16 = 0xb220;
    pub const CLEAR: u16 = 0xb230;
    pub const HALT: u16 = 0xb231;
    pub const MODIFY: u16 = 0xb232;
    pub const START: u16 = 0xb233;
    pub const STORE: u16 = 0xb234;
    pub const RESUME: u16 = 0xb238;
    pub const STORE_REPORT: u16 = 0xb239;
    pub const STORE_PATH_STATUS: u16 = 0xb23a;
    pub const RESET_PATH: u16 = 0xb23b;
    pub const SET_MONITOR: u16 = 0xb23c;
    pub const SET_ADDRESS_LIMIT: u16 = 0xb237;
    pub const CHANNEL_SUBSYSTEM_CALL: u16 = 0xb25f;
    pub const CANCEL: u16 = 0xb276;
    pub const PERFORM_TOPOLOGY: u16 = 0xb9a2;
}

/// The instruction address of the wait that Linux ends in when it was asked to
/// shut down (`drivers/s390/char/sclp_quiesce.c`).
const QUIESCED: u64 = 0xfff;
/// Below are codes that a program leaves rather than places where it stopped.
const CODES: u64 = 0x1_0000;

/// An operand: base register and displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operand {
    base: u8,
    displacement: u32,
}

/// The base and displacement of an instruction of format S, RS or RSI.
fn operand(ipb: u32) -> Operand {
    Operand {
        base: (ipb >> 28) as u8,
        displacement: ipb >> 16 & 0xfff,
    }
}

/// The register numbers of an instruction of format RRE.
fn registers(ipb: u32) -> (u8, u8) {
    ((ipb >> 20 & 15) as u8, (ipb >> 16 & 15) as u8)
}

/// What handles the exits of one machine.
pub struct Handler {
    pub(super) vm: Arc<dyn hv::Vm>,
    pub(super) memory: GuestMem,
    pub(super) css: Arc<ChannelSubsystem>,
    pub(super) sclp: Arc<Sclp>,
    pub(super) cpus: Cpus,
    pub(super) ipl: IplParameters,
    pub(super) watchdog: Watchdog,
    pub(super) power: Power,
    pub(super) identity: Identity,
    pub(super) count: u32,
}

/// Fields of the exit's union, in the host's byte order.
struct Fields<'a>(&'a [u8; RUN_UNION_SIZE]);

impl Fields<'_> {
    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    fn half(&self, at: usize) -> u16 {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u16::from_ne_bytes(*bytes))
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    fn doubleword(&self, at: usize) -> u64 {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    }
}

impl ExitHandler for Handler {
    fn handle(&self, vcpu: u32, exit: ArchExit<'_>) -> Action {
        let mut cpu = Cpu {
            address: vcpu,
            exit,
            memory: &self.memory,
        };
        let handled = match cpu.exit.reason {
            reason::SIEIC => self.intercepted(&mut cpu),
            reason::RESET => Ok(Action::End(End::Reset)),
            reason::TSCH => self.test_subchannel(&mut cpu),
            reason::STSI => self.system_information(&mut cpu),
            other => Ok(crash(
                vcpu,
                &format!("left with KVM exit reason {other}, which this machine does not have"),
            )),
        };
        match handled {
            Ok(action) => action,
            Err(Stop::Injected) => Action::Continue,
            Err(Stop::Program(code)) => {
                match self.vm.inject(Some(vcpu), &interrupt::program(code)) {
                    Ok(()) => Action::Continue,
                    Err(error) => crash(vcpu, &format!("cannot be interrupted: {error}")),
                }
            }
            Err(Stop::Failed(why)) => crash(vcpu, &why),
        }
    }

    fn started(&self, vcpu: u32) {
        self.cpus.started(vcpu);
    }
}

fn crash(vcpu: u32, why: &str) -> Action {
    Action::End(End::Crash(format!("vCPU {vcpu}: {why}")))
}

impl Handler {
    fn intercepted(&self, cpu: &mut Cpu<'_>) -> Result<Action> {
        let fields = Fields(cpu.exit.data);
        let (code, ipa, ipb) = (fields.byte(0), fields.half(2), fields.word(4));
        match code {
            intercept::INSTRUCTION => self.instruction(cpu, ipa, ipb),
            intercept::WAIT => Ok(self.cpus.waits(cpu, waits_for_ever(cpu))),
            intercept::STOP => Ok(self.cpus.stopped(cpu)),
            // KVM injects one itself, unless that leads to the next.
            intercept::OPERATION => Ok(loops(cpu, "an operation exception")),
            intercept::PROGRAM => Ok(loops(cpu, "a program interruption")),
            intercept::EXTERNAL => Ok(loops(cpu, "an external interruption")),
            intercept::IO => Ok(loops(cpu, "an I/O interruption")),
            other => Ok(crash(
                cpu.address,
                &format!(
                    "intercepted with code {other:#x} at {:#x}",
                    cpu.psw_address()
                ),
            )),
        }
    }

    fn instruction(&self, cpu: &mut Cpu<'_>, ipa: u16, ipb: u32) -> Result<Action> {
        let [opcode, registers_byte] = ipa.to_be_bytes();
        let (r1, r3) = (registers_byte >> 4, registers_byte & 15);
        let at = operand(ipb);
        match opcode {
            instruction::DIAGNOSE => {
                let code = cpu.operand(at.base, at.displacement) as u16;
                return diag::diagnose(self, cpu, r1, r3, code);
            }
            instruction::SIGNAL_PROCESSOR => {
                let order = cpu.operand(at.base, at.displacement) as u8;
                return self.cpus.signal(cpu, r1, r3, order);
            }
            _ => {}
        }
        let condition = self.condition(cpu, ipa, ipb)?;
        if let Some(condition) = condition {
            cpu.set_condition(condition);
        }
        Ok(Action::Continue)
    }

    /// Instructions that end with a condition code, or with none.
    fn condition(&self, cpu: &mut Cpu<'_>, ipa: u16, ipb: u32) -> Result<Option<u8>> {
        cpu.require_supervisor()?;
        let id = cpu.general(1);
        let refused = |Refusal::Operand| Stop::Program(program::OPERAND);
        let css = &self.css;
        let condition = match ipa {
            instruction::SERVICE_CALL => {
                let (r1, r2) = registers(ipb);
                let (code, address) = (cpu.general(r1), cpu.general(r2));
                self.sclp.call(cpu, code, address)?
            }
            instruction::CLEAR => css.clear(id).map_err(refused)?,
            instruction::HALT => css.halt(id).map_err(refused)?,
            instruction::RESUME => css.resume(id).map_err(refused)?,
            instruction::CANCEL => css.cancel(id).map_err(refused)?,
            instruction::RESET_PATH => css.reset_path(id).map_err(refused)?,
            instruction::MODIFY => {
                let mut schib = [0; Schib::SIZE];
                let address = aligned(cpu, ipb)?;
                cpu.read(address, operand(ipb).base, &mut schib)?;
                css.modify(id, &schib).map_err(refused)?
            }
            instruction::START => {
                let mut orb = [0; Orb::SIZE];
                let address = aligned(cpu, ipb)?;
                cpu.read(address, operand(ipb).base, &mut orb)?;
                css.start(id, &orb).map_err(refused)?
            }
            instruction::STORE => {
                let address = aligned(cpu, ipb)?;
                match css.store(id).map_err(refused)? {
                    None => 3,
                    Some(schib) => {
                        cpu.write(address, operand(ipb).base, &schib)?;
                        0
                    }
                }
            }
            instruction::STORE_REPORT => {
                let address = aligned(cpu, ipb)?;
                let (condition, word) = css.take_report();
                let stored = cpu.write(address, operand(ipb).base, &word.to_be_bytes());
                if stored.is_err() && condition == 0 {
                    css.return_report(word);
                }
                stored?;
                condition
            }
            instruction::STORE_PATH_STATUS => {
                let at = operand(ipb);
                let address = cpu.operand(at.base, at.displacement);
                if address & 31 != 0 {
                    return Err(Stop::Program(program::SPECIFICATION));
                }
                cpu.write(address, at.base, &[0; 32])?;
                return Ok(None);
            }
            // No measurements are made and no address limit is kept.
            instruction::SET_MONITOR => {
                let (modes, area) = (cpu.general(1), cpu.general(2));
                return monitor(modes, area).map(|()| None);
            }
            instruction::SET_ADDRESS_LIMIT => {
                return match id & 0x8000_ffff {
                    0 => Ok(None),
                    _ => Err(Stop::Program(program::OPERAND)),
                };
            }
            instruction::CHANNEL_SUBSYSTEM_CALL => {
                let (r1, _) = registers(ipb);
                let address = cpu.wrap(cpu.general(r1));
                chsc::call(cpu, css, address)?
            }
            instruction::PERFORM_TOPOLOGY => topology(cpu, registers(ipb).0)?,
            _ => return Err(Stop::Program(program::OPERATION)),
        };
        Ok(Some(condition))
    }

    /// TEST SUBCHANNEL: KVM has taken the interruption of this subchannel away,
    /// if there was one.
    fn test_subchannel(&self, cpu: &mut Cpu<'_>) -> Result<Action> {
        let fields = Fields(cpu.exit.data);
        let (id, parameter, word) = (fields.word(0), fields.word(4), fields.word(8));
        let (ipb, dequeued) = (fields.word(12), fields.byte(16) != 0);
        let tested = self.store_status(cpu, ipb);
        if tested.is_err() && dequeued {
            // The status is still there, and so must be its interruption.
            let subclass = (word >> 27 & 7) as u8;
            let again = interrupt::subchannel(id, parameter, subclass);
            if let Err(error) = self.vm.inject(None, &again) {
                log::warn!("an I/O interruption is lost: {error}");
            }
        }
        cpu.set_condition(tested?);
        Ok(Action::Continue)
    }

    fn store_status(&self, cpu: &Cpu<'_>, ipb: u32) -> Result<u8> {
        cpu.require_supervisor()?;
        let address = aligned(cpu, ipb)?;
        let id = cpu.general(1);
        let tested = self.css.test(id);
        let (condition, irb) =
            tested.map_err(|Refusal::Operand| Stop::Program(program::OPERAND))?;
        if let Some(irb) = irb {
            let bytes: [u8; Irb::SIZE] = irb.bytes();
            cpu.write(address, operand(ipb).base, &bytes)?;
            self.css.accept_status(id, &irb);
        }
        Ok(condition)
    }

    fn system_information(&self, cpu: &mut Cpu<'_>) -> Result<Action> {
        let fields = Fields(cpu.exit.data);
        let place = (fields.doubleword(0), fields.byte(8));
        let (function, selectors) = (fields.byte(10), (fields.byte(11), fields.half(12)));
        stsi::complete(cpu, &self.identity, self.count, function, selectors, place)?;
        Ok(Action::Continue)
    }
}

/// The operand's address, which must be on a word.
fn aligned(cpu: &Cpu<'_>, ipb: u32) -> Result<u64> {
    let at = operand(ipb);
    let address = cpu.operand(at.base, at.displacement);
    match address & 3 {
        0 => Ok(address),
        _ => Err(Stop::Program(program::SPECIFICATION)),
    }
}

/// SET CHANNEL MONITOR: modes in general register 1, the area for measurements
/// in general register 2, which counts when measurements of it are switched on.
fn monitor(modes: u64, area: u64) -> Result<()> {
    const RESERVED: u64 = 0x0fff_fffc;
    const UPDATE: u64 = 2;
    let misplaced = modes & UPDATE != 0 && area & 31 != 0;
    match modes & RESERVED != 0 || misplaced {
        true => Err(Stop::Program(program::OPERAND)),
        false => Ok(()),
    }
}

/// PERFORM TOPOLOGY FUNCTION: the CPUs are polarised horizontally, stay so, and
/// never move.
fn topology(cpu: &mut Cpu<'_>, r1: u8) -> Result<u8> {
    const HORIZONTAL: u64 = 0;
    const VERTICAL: u64 = 1;
    const CHECK: u64 = 2;
    /// Reason: it is so already.
    const DONE: u64 = 0x100;
    let request = cpu.general(r1);
    if request & !0xff != 0 {
        return Err(Stop::Program(program::SPECIFICATION));
    }
    match request {
        HORIZONTAL => {
            cpu.set_general(r1, request | DONE);
            Ok(2)
        }
        VERTICAL => Ok(2),
        CHECK => Ok(0),
        _ => Err(Stop::Program(program::SPECIFICATION)),
    }
}

/// A wait that no interruption ends: how a program ends the machine.
fn waits_for_ever(cpu: &Cpu<'_>) -> End {
    match cpu.psw_address() {
        QUIESCED => End::PowerOff,
        0 => End::Crash(format!(
            "vCPU {} waits with interruptions disabled: the guest has halted",
            cpu.address
        )),
        code @ 1..CODES => End::Crash(format!(
            "vCPU {} waits with interruptions disabled, with code {code:#x}",
            cpu.address
        )),
        // Linux stops so after a panic (arch/s390/include/asm/processor.h,
        // disabled_wait): the address is that of the place in its code.
        _ => End::Panic,
    }
}

fn loops(cpu: &Cpu<'_>, what: &str) -> Action {
    let why = format!(
        "the new PSW for {what} is invalid or leads to another one at once; it was at {:#x}",
        cpu.psw_address()
    );
    crash(cpu.address, &why)
}

#[cfg(test)]
#[path = "handler_tests.rs"]
mod tests;
