//! Interrupts in KVM's encoding (Linux `struct kvm_s390_irq`), and those of the
//! channel subsystem.

use std::io;
use std::sync::Arc;

use crossvisor_devices::css::ChannelInterrupts;
use crossvisor_vmm::hv::{Interrupt, Vm};

/// Program-interruption codes (Principles of Operation, chapter 6).
pub mod program {
    /// Operation exception.
    pub const OPERATION: u16 = 0x0001;
    /// Privileged-operation exception.
    pub const PRIVILEGED_OPERATION: u16 = 0x0002;
    /// Addressing exception.
    pub const ADDRESSING: u16 = 0x0005;
    /// Specification exception.
    pub const SPECIFICATION: u16 = 0x0006;
    /// Operand exception.
    pub const OPERAND: u16 = 0x0015;
}

/// KVM_S390_SIGP_STOP.
const STOP: u64 = 0xfffe_0000;
/// KVM_S390_PROGRAM_INT.
const PROGRAM: u64 = 0xfffe_0001;
/// KVM_S390_RESTART.
const RESTART: u64 = 0xfffe_0003;
/// KVM_S390_MCHK.
const MACHINE_CHECK: u64 = 0xfffe_1000;
/// KVM_S390_INT_SERVICE.
const SERVICE: u64 = 0xffff_2401;
/// KVM_S390_INT_IO_AI_MASK.
const ADAPTER: u64 = 1 << 26;

/// The bit of an I/O-interruption identification word that says adapter.
const IDENTIFICATION_ADAPTER: u32 = 0x8000_0000;

/// Channel report pending, in control register 14 and in the machine-check
/// code; the latter with everything that was stored valid.
const CR14_CHANNEL_REPORT: u64 = 1 << 28;
const MCIC_CHANNEL_REPORT: u64 = 0x0040_0f1d_4033_0000;
/// In the machine-check code: vector registers were stored.
const MCIC_VECTOR_VALID: u64 = 0x0000_0040_0000_0000;

fn encode(kind: u64, fields: &[(usize, &[u8])]) -> Interrupt {
    let mut data = [0; 64];
    for (at, bytes) in fields {
        if let Some(place) = data.get_mut(*at..*at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    Interrupt { kind, data }
}

/// A program interruption.
pub fn program(code: u16) -> Interrupt {
    // struct kvm_s390_pgm_info: the code follows three doublewords and a word.
    encode(PROGRAM, &[(28, &code.to_be_bytes())])
}

/// The order to stop, of a SIGNAL PROCESSOR.
pub fn stop() -> Interrupt {
    encode(STOP, &[])
}

/// A restart interruption.
pub fn restart() -> Interrupt {
    encode(RESTART, &[])
}

/// A service signal with this parameter: an SCCB's address, and in the last
/// bit that events are pending.
pub fn service(parameter: u32) -> Interrupt {
    encode(SERVICE, &[(0, &parameter.to_be_bytes())])
}

/// An I/O interruption of a subchannel.
pub fn subchannel(id: u32, parameter: u32, subclass: u8) -> Interrupt {
    let word = u32::from(subclass & 7) << 27;
    let fields: &[(usize, &[u8])] = &[
        (0, &id.to_be_bytes()),
        (4, &parameter.to_be_bytes()),
        (8, &word.to_be_bytes()),
    ];
    // KVM_S390_INT_IO with channel subsystem image and set 0.
    encode(u64::from(id & 0xffff), fields)
}

/// An adapter interruption.
pub fn adapter(subclass: u8) -> Interrupt {
    let word = IDENTIFICATION_ADAPTER | u32::from(subclass & 7) << 27;
    encode(ADAPTER, &[(8, &word.to_be_bytes())])
}

/// A machine check: channel report pending. `vector` says that CPUs have vector
/// registers: Linux lets a program die whose registers are not valid
/// (`arch/s390/kernel/nmi.c`).
pub fn channel_report(vector: bool) -> Interrupt {
    let vectors = if vector { MCIC_VECTOR_VALID } else { 0 };
    let code = MCIC_CHANNEL_REPORT | vectors;
    let fields: &[(usize, &[u8])] = &[
        (0, &CR14_CHANNEL_REPORT.to_be_bytes()),
        (8, &code.to_be_bytes()),
    ];
    encode(MACHINE_CHECK, fields)
}

/// The channel subsystem's interrupts, for whichever vCPU takes them.
pub struct Floating {
    /// The machine.
    pub vm: Arc<dyn Vm>,
    /// Whether its vCPUs have vector registers.
    pub vector: bool,
}

impl ChannelInterrupts for Floating {
    fn subchannel(&self, id: u32, parameter: u32, subclass: u8) -> io::Result<()> {
        self.vm.inject(None, &subchannel(id, parameter, subclass))
    }

    fn withdraw(&self, id: u32) {
        if let Err(error) = self.vm.withdraw(id) {
            log::debug!("cannot withdraw an I/O interruption: {error}");
        }
    }

    fn adapter(&self, subclass: u8) -> io::Result<()> {
        self.vm.inject(None, &adapter(subclass))
    }

    fn channel_report(&self) -> io::Result<()> {
        self.vm.inject(None, &channel_report(self.vector))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_interruptions_have_their_words_in_place() {
        let io = subchannel(0x0001_0203, 0x1122_3344, 5);
        assert_eq!(io.kind, 0x203);
        assert_eq!(
            io.data[..12],
            [0, 1, 2, 3, 0x11, 0x22, 0x33, 0x44, 0x28, 0, 0, 0]
        );
        let adapter = adapter(3);
        assert_eq!(adapter.kind, 0x0400_0000);
        assert_eq!(adapter.data[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0x98, 0, 0, 0]);
    }

    #[test]
    fn others_too() {
        let program = program(program::OPERAND);
        assert_eq!(program.kind, 0xfffe_0001);
        assert_eq!(program.data[28..30], [0, 0x15]);
        assert_eq!(service(0x1001).data[..4], [0, 0, 0x10, 1]);
        for (vector, registers) in [(false, 0x1d), (true, 0x5d)] {
            let report = channel_report(vector);
            assert_eq!(report.data[..8], [0, 0, 0, 0, 0x10, 0, 0, 0]);
            assert_eq!(report.data[8..12], [0, 0x40, 0x0f, registers]);
        }
    }
}
