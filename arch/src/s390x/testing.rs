//! A machine without a hypervisor for tests: guest memory, a record of what was
//! injected, and vCPUs that leave as a test says.

use std::sync::Arc;

use crossvisor_devices::GuestMem;
use crossvisor_devices::css::ChannelSubsystem;
use crossvisor_vmm::arch::ExitHandler;
use crossvisor_vmm::double::ScriptedVm;
use crossvisor_vmm::exit::{
    AccessError, Action, ArchExit, LogicalMemory, RUN_UNION_SIZE, SYNC_REGS_SIZE,
};
use crossvisor_vmm::power::{Power, Requests};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::cpu;
use super::handler::Handler;
use super::interrupt::{self, Floating, program};
use super::ipl::IplParameters;
use super::registers::{self, offset};
use super::sclp::{Facts, Sclp};
use super::sigp::{Cpus, Features};
use super::stsi::Identity;
use super::watchdog::Watchdog;

pub const MEMORY: usize = 4 << 20;

/// Addresses below this are protected.
const LOW: u64 = 512;
/// Program interruption: protection.
const PROTECTION: u16 = 4;

/// A machine with some CPUs.
pub struct Bench {
    pub handler: Handler,
    pub vm: ScriptedVm,
    pub memory: GuestMemoryMmap,
}

/// A vCPU's state between two exits.
#[derive(Clone)]
pub struct Regs {
    pub sync: [u8; SYNC_REGS_SIZE],
    pub psw: [u64; 2],
    pub union: [u8; RUN_UNION_SIZE],
}

impl Default for Regs {
    fn default() -> Self {
        Self {
            sync: [0; SYNC_REGS_SIZE],
            // 64-bit addressing.
            psw: [0x1_8000_0000, 0x1_0000],
            union: [0; RUN_UNION_SIZE],
        }
    }
}

impl Regs {
    pub fn with(general: &[(u8, u64)]) -> Self {
        let mut regs = Self::default();
        for (number, value) in general {
            regs.set(*number, *value);
        }
        regs
    }

    pub fn set(&mut self, number: u8, value: u64) {
        let at = offset::GPRS + usize::from(number) * 8;
        registers::set(&mut self.sync, (at, 8), value);
    }

    pub fn get(&self, number: u8) -> u64 {
        registers::get(&self.sync, (offset::GPRS + usize::from(number) * 8, 8))
    }

    pub fn condition(&self) -> u64 {
        self.psw[0] >> 44 & 3
    }
}

/// A vCPU's memory as KVM reaches it with DAT off and low addresses protected:
/// it makes exceptions pending by itself.
struct Logical<'a> {
    bench: &'a Bench,
    vcpu: u32,
    prefix: u64,
}

impl std::fmt::Debug for Logical<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "memory of vCPU {}", self.vcpu)
    }
}

impl Logical<'_> {
    fn absolute(&self, address: u64) -> GuestAddress {
        GuestAddress(cpu::absolute(address, self.prefix))
    }

    fn exception(&self, code: u16) -> AccessError {
        let interrupt = interrupt::program(code);
        let injected = self.bench.handler.vm.inject(Some(self.vcpu), &interrupt);
        injected.map_or_else(AccessError::Failed, |()| AccessError::Injected)
    }
}

impl LogicalMemory for Logical<'_> {
    fn read(&self, address: u64, _space: u8, data: &mut [u8]) -> Result<(), AccessError> {
        let read = self.bench.memory.read_slice(data, self.absolute(address));
        read.map_err(|_| self.exception(program::ADDRESSING))
    }

    fn write(&self, address: u64, _space: u8, data: &[u8]) -> Result<(), AccessError> {
        if address < LOW {
            return Err(self.exception(PROTECTION));
        }
        let written = self.bench.memory.write_slice(data, self.absolute(address));
        written.map_err(|_| self.exception(program::ADDRESSING))
    }
}

impl Bench {
    pub fn new(cpus: u32) -> Self {
        Self::with(cpus, Features::default())
    }

    /// One whose CPUs have more.
    pub fn with(cpus: u32, features: Features) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let guest = GuestMem::new(memory.clone());
        let vm = ScriptedVm::default();
        let hv: Arc<dyn crossvisor_vmm::hv::Vm> = Arc::new(vm.clone());
        let facts = Facts {
            memory: MEMORY as u64,
            cpus,
            consoles: true,
            control_program: features.control_program,
        };
        let floating = Floating {
            vm: hv.clone(),
            vector: features.vector,
        };
        let (requests, _events) = Requests::new();
        let handler = Handler {
            cpus: Cpus::new(hv.clone(), guest.clone(), cpus, features),
            css: ChannelSubsystem::new(Arc::new(floating), guest.clone()),
            sclp: Sclp::new(
                facts,
                hv.clone(),
                Arc::new(crossvisor_devices::output::Output::nowhere().unwrap()),
            )
            .unwrap(),
            vm: hv,
            memory: guest,
            ipl: IplParameters::new(Some(7)),
            watchdog: Watchdog::new(Power::new(&requests)),
            power: Power::new(&requests),
            identity: Identity::new("bench"),
            count: cpus,
        };
        Self {
            handler,
            vm,
            memory,
        }
    }

    /// An exit with what is in the registers' union.
    pub fn exit(&self, vcpu: u32, reason: u32, regs: &mut Regs) -> Action {
        let prefix = registers::get(&regs.sync, (offset::PREFIX, 8));
        let exit = ArchExit {
            reason,
            data: &mut regs.union,
            sync_regs: &mut regs.sync,
            psw: &mut regs.psw,
            logical: &Logical {
                bench: self,
                vcpu,
                prefix,
            },
        };
        self.handler.handle(vcpu, exit)
    }

    /// An interception.
    pub fn intercept(&self, vcpu: u32, code: u8, ipa: u16, ipb: u32, regs: &mut Regs) -> Action {
        regs.union[0] = code;
        regs.union[2..4].copy_from_slice(&ipa.to_ne_bytes());
        regs.union[4..8].copy_from_slice(&ipb.to_ne_bytes());
        self.exit(vcpu, 13, regs)
    }

    /// An instruction that vCPU 0 executes.
    pub fn instruction(&self, ipa: u16, ipb: u32, regs: &mut Regs) -> Action {
        self.intercept(0, 4, ipa, ipb, regs)
    }

    /// The code of the one program interruption that has been injected since
    /// this was last asked.
    pub fn program(&self) -> Option<u16> {
        let injected = std::mem::take(&mut self.vm.record().injected);
        let programs = injected.iter().filter(|(_, i)| i.kind == 0xfffe_0001);
        let codes: Vec<_> = programs
            .map(|(_, i)| u16::from_be_bytes([i.data[28], i.data[29]]))
            .collect();
        assert!(codes.len() < 2);
        codes.first().copied()
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let memory = self.handler.memory.memory();
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}
