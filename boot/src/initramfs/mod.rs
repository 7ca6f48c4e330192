//! The built-in initramfs: an archive made on the fly, and the `/init` in it.

mod builder;
mod config;
pub mod cpio;
mod elf;
pub mod init;
mod modules;

pub use builder::{Builder, Error};
pub use config::{
    AtEnd, IO_PORT, InitConfig, Io, Mount, PATH as CONFIG_PATH, STATUS_PORT, STDERR_PORT,
    STDIN_PORT,
};
pub use elf::{Error as ExecutableError, Executable};
pub use modules::{Error as ModulesError, Module, ModuleTree};
