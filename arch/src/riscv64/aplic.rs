//! Wires into the APLIC that KVM emulates.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crossvisor_devices::irq::IrqLine;
use crossvisor_vmm::hv::Vm;
use crossvisor_vmm::irq::LevelLine;
use crossvisor_vmm::wiring::LineSource;

/// An edge-triggered wire, raised and lowered by KVM_IRQ_LINE.
///
/// An irqfd would raise it and never lower it: kvm_arch_set_irq_inatomic of
/// arch/riscv/kvm/vm.c sets the pin of an interrupt controller to 1 and says
/// that all is done, upon which irqfd_wakeup leaves out what would set it to 0.
/// The APLIC then sees one edge and no more.
struct Edge {
    vm: Arc<dyn Vm>,
    source: u32,
    /// Held from one edge to the other, or two threads' could be one.
    turn: Mutex<()>,
}

impl IrqLine for Edge {
    fn set(&self, asserted: bool) -> io::Result<()> {
        if !asserted {
            return Ok(());
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.vm.set_irq_line(self.source, true)?;
        self.vm.set_irq_line(self.source, false)
    }
}

/// The wires of the APLIC.
pub struct Wires(pub Arc<dyn Vm>);

impl LineSource for Wires {
    fn level_line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(LevelLine::new(self.0.clone(), gsi))
    }

    fn edge_line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(Edge {
            vm: self.0.clone(),
            source: gsi,
            turn: Mutex::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossvisor_vmm::double::ScriptedVm;

    #[test]
    fn every_edge_goes_up_and_down() {
        let vm = ScriptedVm::default();
        let line = Wires(Arc::new(vm.clone())).edge_line(5);
        for _ in 0..2 {
            line.set(true).unwrap();
            line.set(false).unwrap();
        }
        let pulse = [(5, true), (5, false)];
        assert_eq!(vm.record().lines, [pulse, pulse].concat());
        assert!(vm.record().irqfds.is_empty());
    }

    #[test]
    fn a_level_is_what_the_device_says() {
        let vm = ScriptedVm::default();
        let line = Wires(Arc::new(vm.clone())).level_line(1);
        line.set(true).unwrap();
        assert_eq!(vm.record().lines, [(1, true)]);
    }
}
