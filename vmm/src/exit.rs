//! Why a vCPU left the guest, in terms that need no architecture.

/// Size in bytes of the union in `struct kvm_run` that describes an exit
/// (`char padding[256]` in the KVM API).
pub const RUN_UNION_SIZE: usize = 256;

/// Size in bytes of the synchronised registers in `struct kvm_run`
/// (`char padding[SYNC_REGS_SIZE_BYTES]`).
pub const SYNC_REGS_SIZE: usize = 2048;

/// A vCPU exit (KVM API, section 5). The data that an access reads is filled in
/// before the vCPU runs again.
#[derive(Debug)]
pub enum Exit<'a> {
    /// KVM_EXIT_IO, in.
    IoIn {
        /// Port number.
        port: u16,
        /// Bytes to fill.
        data: &'a mut [u8],
    },
    /// KVM_EXIT_IO, out.
    IoOut {
        /// Port number.
        port: u16,
        /// Bytes written.
        data: &'a [u8],
    },
    /// KVM_EXIT_MMIO, a load.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// Bytes to fill.
        data: &'a mut [u8],
    },
    /// KVM_EXIT_MMIO, a store.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// Bytes written.
        data: &'a [u8],
    },
    /// KVM_EXIT_HLT: the vCPU waits and no controller in the kernel wakes it.
    Halt,
    /// KVM_EXIT_SHUTDOWN: on x86 a triple fault.
    Shutdown,
    /// KVM_EXIT_SYSTEM_EVENT.
    SystemEvent {
        /// KVM_SYSTEM_EVENT_*.
        kind: u32,
        /// What the architecture adds to it, and then the registers of
        /// [`system_event_registers`](crate::arch::KvmMachine::system_event_registers).
        data: &'a [u64],
    },
    /// KVM_EXIT_FAIL_ENTRY: the hardware would not enter the guest.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError {
        /// KVM_INTERNAL_ERROR_*; 1 is a failed emulation.
        suberror: u32,
    },
    /// The run was interrupted by a signal, or ended at once as asked.
    Interrupted,
    /// Anything else: the architecture's to read.
    Arch(ArchExit<'a>),
}

/// An exit that one architecture knows: the raw words of `struct kvm_run`, so
/// that its decoding is pure code, tested on every host.
#[derive(Debug)]
pub struct ArchExit<'a> {
    /// KVM_EXIT_*.
    pub reason: u32,
    /// The exit's union, in the host's byte order; what the handler writes
    /// (return values) is there when the vCPU runs again.
    pub data: &'a mut [u8; RUN_UNION_SIZE],
    /// The synchronised registers (KVM_CAP_SYNC_REGS), where KVM keeps them.
    pub sync_regs: &'a mut [u8; SYNC_REGS_SIZE],
    /// What `struct kvm_run` has between its head and the union: on s390x the
    /// program-status word, mask and address; elsewhere two words that lead
    /// nowhere.
    pub psw: &'a mut [u64; 2],
    /// Memory as the vCPU addresses it.
    pub logical: &'a dyn LogicalMemory,
}

/// Memory by a vCPU's logical addresses, which its own translation tables and
/// storage keys stand before (KVM_S390_MEM_OP). Only for s390x.
pub trait LogicalMemory: std::fmt::Debug {
    /// Reads `data` from `address` of the space that access register `space`
    /// names in access-register mode.
    ///
    /// # Errors
    /// See [`AccessError`].
    fn read(&self, address: u64, space: u8, data: &mut [u8]) -> Result<(), AccessError>;

    /// Writes `data`; as [`read`](Self::read).
    ///
    /// # Errors
    /// See [`AccessError`].
    fn write(&self, address: u64, space: u8, data: &[u8]) -> Result<(), AccessError>;
}

/// Why memory could not be reached by a logical address.
#[derive(Debug)]
pub enum AccessError {
    /// The guest may not: the program interruption that says so is pending on
    /// the vCPU already.
    Injected,
    /// The hypervisor cannot.
    Failed(std::io::Error),
}

/// For vCPUs whose handlers need no logical memory.
#[derive(Debug)]
pub struct NoLogicalMemory;

impl LogicalMemory for NoLogicalMemory {
    fn read(&self, _address: u64, _space: u8, _data: &mut [u8]) -> Result<(), AccessError> {
        Err(AccessError::Failed(std::io::ErrorKind::Unsupported.into()))
    }

    fn write(&self, _address: u64, _space: u8, _data: &[u8]) -> Result<(), AccessError> {
        Err(AccessError::Failed(std::io::ErrorKind::Unsupported.into()))
    }
}

/// What a vCPU does after an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Run on.
    Continue,
    /// Wait until another vCPU starts this one (RTAS stop-self, SIGP STOP).
    Park,
    /// Start another vCPU, which is parked (RTAS start-cpu, SIGP RESTART), or
    /// this one anew.
    Start {
        /// Index of the vCPU to start.
        vcpu: u32,
        /// The registers that it starts from.
        registers: crate::arch::RegisterState,
    },
    /// Set these registers of this vCPU, and run on.
    Set(crate::arch::RegisterState),
    /// End the VM's life, or this part of it.
    End(End),
}

/// How a guest's run ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset: it is started again in place.
    Reset,
    /// The guest's kernel panicked or reported a crash.
    Panic,
    /// The guest is beyond help: a triple fault, an exit that KVM or the VMM
    /// cannot handle. The text says which.
    Crash(String),
    /// The user ended it from the terminal.
    Quit,
    /// A signal ended it, and the guest did not power off.
    Killed,
}
