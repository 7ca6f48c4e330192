//! DIAGNOSE, the functions that KVM leaves to user space
//! (Documentation/virt/kvm/s390/s390-diag.rst).

use crossvisor_vmm::arch::RegisterState;
use crossvisor_vmm::exit::{Action, End};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::cpu::{Cpu, Result, Stop, short_psw};
use super::handler::Handler;
use super::interrupt::program;
use super::ipl;
use super::registers::CONTROL_PROGRAM;

/// Function codes.
mod function {
    pub const WATCHDOG: u16 = 0x288;
    pub const IPL: u16 = 0x308;
    pub const CONTROL_PROGRAM: u16 = 0x318;
    pub const VIRTIO: u16 = 0x500;
}

/// KVM_DEV_FLIC_CLEAR_IRQS: takes back every interruption that no CPU has taken
/// (Documentation/virt/kvm/devices/s390_flic.rst).
const FLIC_CLEAR_IRQS: u32 = 3;

/// Return codes of DIAGNOSE 0x308.
mod ipl_code {
    pub const DONE: u64 = 0x0001;
    pub const NONE: u64 = 0x0102;
    pub const INVALID: u64 = 0x0402;
}

/// DIAGNOSE 0x500: notify (KVM_S390_VIRTIO_CCW_NOTIFY).
const VIRTIO_NOTIFY: u64 = 3;
/// -EINVAL, as that function returns it.
const EINVAL: u64 = -22_i64 as u64;

const SPECIFICATION: Stop = Stop::Program(program::SPECIFICATION);

/// DIAGNOSE with function `code` and register numbers `r1` and `r3`. A function
/// that is not there, and so 0x501, which stands for a breakpoint of a debugger
/// that is not there, is a specification exception.
///
/// # Errors
/// A program interruption.
pub fn diagnose(handler: &Handler, cpu: &mut Cpu<'_>, r1: u8, r3: u8, code: u16) -> Result<Action> {
    cpu.require_supervisor()?;
    match code {
        function::WATCHDOG => watchdog(handler, cpu, r1, r3),
        function::IPL => ipl(handler, cpu, r1, r3),
        function::CONTROL_PROGRAM => control_program(handler, cpu, r1),
        function::VIRTIO => {
            virtio(handler, cpu);
            Ok(Action::Continue)
        }
        _ => Err(SPECIFICATION),
    }
}

fn virtio(handler: &Handler, cpu: &mut Cpu<'_>) {
    let [function, subchannel, queue, cookie] = [1, 2, 3, 4].map(|number| cpu.general(number));
    let queue = u32::try_from(queue).ok();
    let rung = function == VIRTIO_NOTIFY
        && queue.is_some_and(|queue| handler.css.notify(subchannel, queue));
    // What is returned comes back as a hint the next time.
    let cookie = if (cookie as i64) < 0 { 0 } else { cookie };
    cpu.set_general(2, if rung { cookie } else { EINVAL });
}

/// The control program says its name and version in `r1`, for whoever looks for
/// the cause of an error of the host's hardware. CPUs that operate already keep
/// what they have: Linux says it before it starts a second one.
fn control_program(handler: &Handler, cpu: &Cpu<'_>, r1: u8) -> Result<Action> {
    let codes = cpu.general(r1);
    match handler.cpus.set_control_program(codes) {
        true => Ok(Action::Set(RegisterState(vec![(CONTROL_PROGRAM, codes)]))),
        false => Err(SPECIFICATION),
    }
}

/// Function in `r1`, seconds in the next register, action in `r3`. Nothing is
/// returned.
fn watchdog(handler: &Handler, cpu: &Cpu<'_>, r1: u8, r3: u8) -> Result<Action> {
    const INIT: u64 = 0;
    const CHANGE: u64 = 1;
    const CANCEL: u64 = 2;
    const RESET: u64 = 0;
    let (code, seconds, action) = (cpu.general(r1), cpu.general(r1 + 1), cpu.general(r3));
    if !r1.is_multiple_of(2) || action != RESET {
        return Err(SPECIFICATION);
    }
    let failed = |error| Stop::Failed(format!("the watchdog: {error}"));
    let done = match code {
        INIT => handler.watchdog.set(seconds, true).map_err(failed)?,
        CHANGE => handler.watchdog.set(seconds, false).map_err(failed)?,
        CANCEL => handler.watchdog.cancel(),
        _ => false,
    };
    match done {
        true => Ok(Action::Continue),
        false => Err(SPECIFICATION),
    }
}

/// An address in `r1`, the subcode in `r3`, the return code in the register
/// after `r1`. KVM itself takes the subcodes that load again.
fn ipl(handler: &Handler, cpu: &mut Cpu<'_>, r1: u8, r3: u8) -> Result<Action> {
    const RESET_CLEAR: u64 = 0;
    const RESET_LOAD_NORMAL: u64 = 1;
    const LOAD_CLEAR: u64 = 3;
    const LOAD_NORMAL_DUMP: u64 = 4;
    const SET: u64 = 5;
    const STORE: u64 = 6;
    const LOAD_NORMAL: u64 = 7;
    let (address, subcode) = (cpu.general(r1), cpu.general(r3));
    if subcode & !0xffff != 0 {
        return Err(SPECIFICATION);
    }
    let code = match subcode {
        RESET_CLEAR => return load_normal(handler, cpu, true),
        RESET_LOAD_NORMAL => return load_normal(handler, cpu, false),
        LOAD_CLEAR | LOAD_NORMAL_DUMP | LOAD_NORMAL => return Ok(Action::End(End::Reset)),
        SET | STORE if !r1.is_multiple_of(2) || address & 0xfff != 0 => return Err(SPECIFICATION),
        SET => set_parameters(handler, cpu, address)?,
        STORE => match handler.ipl.get() {
            None => ipl_code::NONE,
            Some(block) => {
                write_real(cpu, address, &block)?;
                ipl_code::DONE
            }
        },
        _ => return Err(SPECIFICATION),
    };
    cpu.set_general(r1 + 1, code);
    Ok(Action::Continue)
}

fn set_parameters(handler: &Handler, cpu: &Cpu<'_>, address: u64) -> Result<u64> {
    let mut length = [0; 4];
    read_real(cpu, address, &mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > ipl::MAX {
        return Ok(ipl_code::INVALID);
    }
    let mut block = vec![0; length];
    read_real(cpu, address, &mut block)?;
    Ok(match handler.ipl.set(block) {
        true => ipl_code::DONE,
        false => ipl_code::INVALID,
    })
}

// The block's address is a real one, on a page of its own.

fn read_real(cpu: &Cpu<'_>, address: u64, data: &mut [u8]) -> Result<()> {
    let memory = cpu.memory.memory();
    memory
        .read_slice(data, GuestAddress(cpu.absolute(address)))
        .map_err(|_| Stop::Program(program::ADDRESSING))
}

fn write_real(cpu: &Cpu<'_>, address: u64, data: &[u8]) -> Result<()> {
    let memory = cpu.memory.memory();
    memory
        .write_slice(data, GuestAddress(cpu.absolute(address)))
        .map_err(|_| Stop::Program(program::ADDRESSING))
}

/// Resets everything but memory, and goes on with the PSW at absolute address
/// 0: how a kernel starts another one by itself. The other CPUs have stopped
/// before what they may be using is reset. Without `clear` they keep their
/// registers.
fn load_normal(handler: &Handler, cpu: &Cpu<'_>, clear: bool) -> Result<Action> {
    let over = || handler.power.ended();
    let stopped = handler.cpus.reset_others(cpu.address, clear, over);
    if !stopped.map_err(|error| Stop::Failed(format!("stopping the other CPUs: {error}")))? {
        return Ok(Action::Continue);
    }
    handler.watchdog.cancel();
    handler.css.reset();
    handler.sclp.reset();
    // Last: until a device is reset, it may still make an interruption pending.
    let cleared = handler.vm.set_controller(FLIC_CLEAR_IRQS, 0, &[]);
    cleared.map_err(|error| Stop::Failed(format!("KVM_DEV_FLIC_CLEAR_IRQS: {error}")))?;
    let memory = cpu.memory.memory();
    let psw: [u8; 8] = memory
        .read_obj(GuestAddress(0))
        .map_err(|_| Stop::Program(program::ADDRESSING))?;
    let [mask, address] = short_psw(u64::from_be_bytes(psw));
    Ok(Action::Start {
        vcpu: cpu.address,
        registers: handler.cpus.told(super::load::start(mask, address)),
    })
}

#[cfg(test)]
#[path = "diag_tests.rs"]
mod tests;
