//! The core of crossvisor, which knows no architecture.
//!
//! A [`VmConfig`](config::VmConfig) (what the user asked for) becomes a
//! [`Plan`](plan::Plan) (where everything is), which becomes a running
//! [`Vm`](vm::Vm). What differs between architectures is asked for through the
//! traits in [`arch`]; what KVM does is behind the traits in [`hv`], which the
//! scripted double in [`double`] implements too.

pub mod arch;
pub mod bus;
pub mod config;
pub mod double;
pub mod error;
pub mod exit;
pub mod hv;
pub mod irq;
pub mod kvm;
pub mod memory;
pub mod plan;
pub mod power;
pub mod resources;
pub mod selftest;
pub mod terminal;
#[cfg(test)]
mod testing;
pub mod vcpu;
pub mod vm;
pub mod wiring;

pub use error::{Error, Result};
