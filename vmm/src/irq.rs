//! Interrupts that devices raise, on KVM.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossvisor_devices::irq::{AdapterIndicator, AdapterVectors, IrqLine, MsiMessage, MsiVectors};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::Machine;
use crate::hv::{Route, Vm};

/// A level-triggered wire, driven by KVM_IRQ_LINE.
pub struct LevelLine {
    vm: Arc<dyn Vm>,
    line: u32,
}

impl LevelLine {
    /// The wire with KVM's number `line`.
    pub fn new(vm: Arc<dyn Vm>, line: u32) -> Self {
        Self { vm, line }
    }
}

impl IrqLine for LevelLine {
    fn set(&self, asserted: bool) -> io::Result<()> {
        self.vm.set_irq_line(self.line, asserted)
    }
}

/// An edge-triggered wire: an irqfd.
pub struct EdgeLine {
    vm: Arc<dyn Vm>,
    gsi: u32,
    event: EventFd,
}

impl EdgeLine {
    /// The wire `gsi`.
    ///
    /// # Errors
    /// KVM refused the irqfd.
    pub fn new(vm: Arc<dyn Vm>, gsi: u32) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        vm.attach_irqfd(&event, gsi)?;
        Ok(Self { vm, gsi, event })
    }
}

impl IrqLine for EdgeLine {
    fn set(&self, asserted: bool) -> io::Result<()> {
        match asserted {
            true => self.event.write(1),
            false => Ok(()),
        }
    }
}

impl Drop for EdgeLine {
    fn drop(&mut self) {
        // On failure the VM is going away, and the wire with it.
        let _ = self.vm.detach_irqfd(&self.event, self.gsi);
    }
}

/// The VM's interrupt routes (KVM_SET_GSI_ROUTING), shared by all devices.
pub struct Routes {
    vm: Arc<dyn Vm>,
    machine: Arc<dyn Machine>,
    table: Mutex<Table>,
}

struct Table {
    wires: Vec<(u32, Route)>,
    /// Message routes by GSI above `first_gsi`; a GSI that is handed out and
    /// not bound has none.
    messages: Vec<Option<Route>>,
    first_gsi: u32,
}

impl Routes {
    /// The routes of `vm`, with only the wires of `machine` for a start.
    pub fn new(vm: Arc<dyn Vm>, machine: Arc<dyn Machine>) -> Arc<Self> {
        let table = Mutex::new(Table {
            wires: machine.routes(),
            messages: Vec::new(),
            first_gsi: machine.plan().first_free_gsi,
        });
        Arc::new(Self { vm, machine, table })
    }

    /// Vectors for a device.
    ///
    /// # Errors
    /// No event file descriptor could be made.
    pub fn vectors(self: &Arc<Self>, count: u16) -> io::Result<Arc<dyn MsiVectors>> {
        Ok(Arc::new(self.make(count)?))
    }

    /// Vectors for a device with adapter interruptions.
    ///
    /// # Errors
    /// No event file descriptor could be made.
    pub fn adapter_vectors(self: &Arc<Self>, count: u16) -> io::Result<Arc<dyn AdapterVectors>> {
        Ok(Arc::new(self.make(count)?))
    }

    fn make(self: &Arc<Self>, count: u16) -> io::Result<Vectors> {
        let mut table = self.lock();
        let first = table.first_gsi + table.messages.len() as u32;
        let vectors: Vec<_> = (0..u32::from(count))
            .map(|number| {
                Ok(Vector {
                    gsi: first + number,
                    event: EventFd::new(EFD_NONBLOCK)?,
                    attached: Mutex::new(None),
                })
            })
            .collect::<io::Result<_>>()?;
        table
            .messages
            .extend(std::iter::repeat_n(None, vectors.len()));
        let routes = self.clone();
        Ok(Vectors { routes, vectors })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is whole at each step: a panic elsewhere does not break it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets or clears the message behind `gsi` and installs the table if that
    /// changed it. A message that KVM refuses is not kept: with it in the table
    /// no other could be installed.
    fn bind(&self, gsi: u32, route: Option<Route>) -> io::Result<()> {
        let mut table = self.lock();
        let first = table.first_gsi;
        let Some(entry) = gsi
            .checked_sub(first)
            .and_then(|index| table.messages.get_mut(index as usize))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if *entry == route {
            return Ok(());
        }
        let before = std::mem::replace(entry, route);
        let messages = table.messages.iter().enumerate();
        let messages =
            messages.filter_map(|(index, route)| Some((first + index as u32, (*route)?)));
        let all: Vec<_> = table.wires.iter().copied().chain(messages).collect();
        self.vm.set_routes(&all).inspect_err(|_| {
            if let Some(entry) = table.messages.get_mut((gsi - first) as usize) {
                *entry = before;
            }
        })
    }
}

struct Vector {
    gsi: u32,
    event: EventFd,
    /// The GSI that the irqfd raises: made when the driver first binds the
    /// vector, so that unused vectors cost nothing in the kernel.
    attached: Mutex<Option<u32>>,
}

impl Vector {
    fn attached(&self) -> MutexGuard<'_, Option<u32>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Vectors {
    routes: Arc<Routes>,
    vectors: Vec<Vector>,
}

impl Vectors {
    fn get(&self, vector: u16) -> io::Result<&Vector> {
        let found = self.vectors.get(usize::from(vector));
        found.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Vectors {
    /// Gives `vector` a route and an irqfd, or takes them away.
    fn bind(&self, vector: u16, route: Option<Route>) -> io::Result<()> {
        let vector = self.get(vector)?;
        // A source of the controller's own goes by its own number and past the
        // table.
        let (gsi, entry) = match route {
            Some(Route::Source(gsi)) => (Some(gsi), None),
            Some(route) => (Some(vector.gsi), Some(route)),
            None => (None, None),
        };
        let mut attached = vector.attached();
        if let Some(old) = attached.filter(|old| gsi != Some(*old)) {
            self.routes.vm.detach_irqfd(&vector.event, old)?;
            *attached = None;
        }
        self.routes.bind(vector.gsi, entry)?;
        if let (Some(gsi), None) = (gsi, *attached) {
            self.routes.vm.attach_irqfd(&vector.event, gsi)?;
            *attached = Some(gsi);
        }
        Ok(())
    }

    fn signal(&self, vector: u16) -> io::Result<()> {
        let vector = self.get(vector)?;
        let attached = vector.attached();
        match *attached {
            Some(_) => vector.event.write(1),
            None => Ok(()),
        }
    }
}

impl MsiVectors for Vectors {
    fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        let route = message.and_then(|message| self.routes.machine.route_msi(message));
        self.bind(vector, route)
    }

    fn raise(&self, vector: u16) -> io::Result<()> {
        self.signal(vector)
    }
}

impl AdapterVectors for Vectors {
    fn route(&self, vector: u16, indicator: Option<AdapterIndicator>) -> io::Result<()> {
        let machine = &self.routes.machine;
        let route = indicator
            .map(|indicator| {
                let route = machine.route_adapter(indicator);
                route.ok_or(io::ErrorKind::Unsupported)
            })
            .transpose()?;
        self.bind(vector, route)
    }

    fn raise(&self, vector: u16) -> io::Result<()> {
        self.signal(vector)
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        for vector in 0..self.vectors.len() {
            // On failure the VM is going away, and its routes with it.
            let _ = self.bind(vector as u16, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::double::ScriptedVm;
    use crate::testing::PlainMachine;

    fn message(data: u32) -> MsiMessage {
        MsiMessage {
            address: 0xfee0_0000,
            data,
            device_id: 8,
        }
    }

    fn route(data: u32) -> Route {
        Route::Msi {
            address: 0xfee0_0000,
            data,
            device_id: Some(8),
        }
    }

    fn routes() -> (ScriptedVm, Arc<Routes>) {
        let vm = ScriptedVm::default();
        let machine = Arc::new(PlainMachine::new(1));
        let routes = Routes::new(Arc::new(vm.clone()), machine);
        (vm, routes)
    }

    #[test]
    fn a_vector_has_a_route_and_an_irqfd_while_it_is_bound() {
        let (vm, routes) = routes();
        let first = routes.vectors(2).unwrap();
        let second = routes.vectors(1).unwrap();
        assert_eq!((first.count(), second.count()), (2, 1));
        assert!(vm.record().irqfds.is_empty());

        first.route(1, Some(message(7))).unwrap();
        second.route(0, Some(message(9))).unwrap();
        assert_eq!(vm.record().irqfds, [17, 18]);
        let wires = [0, 1].map(|gsi| (gsi, Route::Irqchip { chip: 0, pin: gsi }));
        assert_eq!(vm.record().routes[..2], wires);
        assert_eq!(vm.record().routes[2..], [(17, route(7)), (18, route(9))]);

        first.route(1, None).unwrap();
        assert_eq!(vm.record().irqfds, [18]);
        assert_eq!(vm.record().routes[2..], [(18, route(9))]);
        drop(second);
        assert!(vm.record().irqfds.is_empty());
        assert_eq!(vm.record().routes, wires);
    }

    #[test]
    fn a_message_that_leads_nowhere_is_not_bound() {
        let (vm, routes) = routes();
        let vectors = routes.vectors(1).unwrap();
        let nowhere = MsiMessage {
            address: 0,
            ..message(1)
        };
        vectors.route(0, Some(nowhere)).unwrap();
        assert!(vm.record().irqfds.is_empty());
        vectors.raise(0).unwrap();
    }

    #[test]
    fn a_source_of_the_controller_has_an_irqfd_and_no_route() {
        let (vm, routes) = routes();
        let vectors = routes.vectors(1).unwrap();
        let to = |source| MsiMessage {
            address: PlainMachine::SOURCES,
            ..message(source)
        };
        vectors.route(0, Some(to(0x1400))).unwrap();
        assert_eq!(vm.record().irqfds, [0x1400]);
        assert!(vm.record().routes.is_empty());
        vectors.route(0, Some(to(0x1401))).unwrap();
        assert_eq!(vm.record().irqfds, [0x1401]);
        vectors.raise(0).unwrap();
        vectors.route(0, None).unwrap();
        assert!(vm.record().irqfds.is_empty());
    }

    #[test]
    fn a_message_that_kvm_refuses_is_not_in_the_way_of_others() {
        let (vm, routes) = routes();
        let vectors = routes.vectors(2).unwrap();
        vectors.route(0, Some(message(1))).unwrap();
        vm.refuse(route(2));
        assert!(vectors.route(0, Some(message(2))).is_err());
        vectors.route(1, Some(message(3))).unwrap();
        assert_eq!(vm.record().routes[2..], [(16, route(1)), (17, route(3))]);
        // It is refused each time, not taken for what is installed.
        assert!(vectors.route(0, Some(message(2))).is_err());
    }

    #[test]
    fn there_is_no_vector_beyond_the_last() {
        let (_, routes) = routes();
        let vectors = routes.vectors(1).unwrap();
        assert!(vectors.route(1, Some(message(1))).is_err());
        assert!(vectors.raise(1).is_err());
    }

    #[test]
    fn a_level_line_follows_the_device() {
        let vm = ScriptedVm::default();
        let line = LevelLine::new(Arc::new(vm.clone()), 5);
        line.set(true).unwrap();
        line.set(false).unwrap();
        assert_eq!(vm.record().lines, [(5, true), (5, false)]);
    }

    #[test]
    fn an_edge_line_counts_rising_edges_only() {
        let vm = ScriptedVm::default();
        let line = EdgeLine::new(Arc::new(vm.clone()), 4).unwrap();
        assert_eq!(vm.record().irqfds, [4]);
        line.set(true).unwrap();
        line.set(false).unwrap();
        line.set(true).unwrap();
        assert_eq!(line.event.read().unwrap(), 2);
        drop(line);
        assert!(vm.record().irqfds.is_empty());
    }
}
