//! s390 `bzImage`: an image of memory from address 0 on
//! (arch/s390/boot/head.S, arch/s390/include/asm/setup.h).

/// Where "S390EP" is, which marks the entry point of the kernel.
const MAGIC: usize = 0x10008;

/// An s390 kernel. Its parameter area is at fixed addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct S390Image {}

impl S390Image {
    /// The address of its entry point (`STARTUP_NORMAL_OFFSET`).
    pub const ENTRY: u64 = 0x10000;
    /// The address of the parameter area (`PARMAREA`).
    pub const PARMAREA: u64 = 0x10400;
    /// The address of the command line (`COMMAND_LINE`).
    pub const COMMAND_LINE: u64 = 0x10480;
}

pub(super) fn is_s390(start: &[u8]) -> bool {
    start.get(MAGIC..MAGIC + 6) == Some(b"S390EP")
}
