//! Initial RAM disks, wherever they come from.

use crossvisor_boot::Initrd;
use crossvisor_vmm::config;
use crossvisor_vmm::error::{Error, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The bytes of an initrd.
pub enum InitrdBytes<'a> {
    /// A file.
    File(Initrd),
    /// Made on the fly.
    Built(&'a [u8]),
}

impl<'a> InitrdBytes<'a> {
    /// Opens an initrd.
    ///
    /// # Errors
    /// The file cannot be read; names it.
    pub fn open(initrd: &'a config::Initrd) -> Result<Self> {
        match initrd {
            config::Initrd::File(path) => Initrd::open(path)
                .map(InitrdBytes::File)
                .map_err(|error| Error::Boot(error.to_string())),
            config::Initrd::Built(bytes) => Ok(InitrdBytes::Built(bytes)),
        }
    }

    /// How many bytes there are.
    pub fn len(&self) -> u64 {
        match self {
            InitrdBytes::File(initrd) => initrd.len(),
            InitrdBytes::Built(bytes) => bytes.len() as u64,
        }
    }

    /// Copies them to `address`.
    ///
    /// # Errors
    /// They cannot be read or do not fit.
    pub fn load(&self, memory: &GuestMemoryMmap, address: GuestAddress) -> Result<()> {
        match self {
            InitrdBytes::File(initrd) => initrd
                .load(memory, address)
                .map_err(|error| Error::Boot(error.to_string())),
            InitrdBytes::Built(bytes) => memory
                .write_slice(bytes, address)
                .map_err(|error| Error::Boot(format!("the initrd does not fit: {error}"))),
        }
    }
}
