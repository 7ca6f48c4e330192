//! What a crossvisor guest is started from: kernel images, command lines,
//! initial RAM disks and the built-in initramfs with its `/init`.
//!
//! Nothing here depends on the architecture of the host: every format of every
//! guest architecture is parsed, loaded and unit-tested everywhere. Where in
//! guest memory things go is the architecture's decision; this crate copies
//! them there with bounds checks.

pub mod cmdline;
mod compress;
pub mod host;
pub mod initramfs;
pub mod initrd;
pub mod kernel;
mod machine;
pub mod source;

pub use compress::Compression;
pub use initrd::Initrd;
pub use kernel::KernelImage;
pub use machine::Machine;
