//! What several architectures have in common and none of them owns.

pub mod choice;
pub mod fdt;
pub mod host;
pub mod image;
pub mod initrd;
pub mod layout;
pub mod random;
#[cfg(test)]
pub mod testing;
