//! KVM behind the core's traits.

// Two KVM calls are unsafe: memory slots, for the kernel reads and writes the
// mapping for as long as the VM lives, and KVM_INTERRUPT, which kvm-ioctls does
// not have.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossvisor_devices::notify::Doorbell;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQ_ROUTING_S390_ADAPTER,
    KVM_MSI_VALID_DEVID, KvmIrqRouting, kvm_device_attr, kvm_irq_routing_entry,
    kvm_userspace_memory_region,
};
use super::channel;
use super::requests::Request;
use super::window::Window;
use super::{DeviceFd, IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use crate::arch::{KvmMachine, Machine, RegisterState};
use crate::error::{Error, Result};
use crate::exit::{ArchExit, Exit};
use crate::hv::{self, Route, Vcpu, Vm};
use crate::plan::Range;

/// `struct kvm_interrupt` (KVM API, section 4.16).
#[repr(C)]
struct Interrupt {
    irq: u32,
}

const KVM_INTERRUPT: Request<Interrupt> = Request::write(0x86);

// What KVM_INTERRUPT takes where a vCPU has one pin for external interrupts
// (KVM API, section 4.16: ppc and RISC-V).
const INTERRUPT_SET: u32 = -1_i32 as u32;
const INTERRUPT_UNSET: u32 = -2_i32 as u32;

/// Opens /dev/kvm.
///
/// # Errors
/// Says what is missing (the module, the permission) and what would help.
pub fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|errno| {
        let errno = io::Error::from(errno);
        let advice = match errno.kind() {
            io::ErrorKind::NotFound => {
                "this host has no KVM: load its module (modprobe kvm), enable virtualization in \
                 the firmware, or use `cargo lab run`, which needs none"
            }
            io::ErrorKind::PermissionDenied => {
                "no permission: add yourself to the group that owns it (usually `usermod -aG kvm \
                 $USER`, then log in again)"
            }
            _ => "cannot be opened",
        };
        Error::io(format!("/dev/kvm: {advice}"), errno)
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        version => Err(Error::Capability {
            capability: format!("API version 12 (it has {version})"),
            advice: "use a newer kernel".into(),
        }),
    }
}

/// What KVM reads an attribute of a controller from: as large as the largest.
#[repr(C, align(8))]
struct ControllerValue([u8; 64]);

impl Default for ControllerValue {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// A VM of KVM.
pub struct KvmVm {
    fd: VmFd,
    machine: Arc<dyn Machine>,
    /// Held so that the mappings outlive the memory slots.
    _memory: GuestMemoryMmap,
    /// The pages of the controller, some of which are in slots too.
    windows: Vec<Window>,
    /// Held so that in-kernel devices can be asked for their state later.
    devices: Mutex<Vec<DeviceFd>>,
    /// The vCPUs by index, for what is done to one from another thread.
    vcpus: Mutex<Vec<OwnedFd>>,
}

impl KvmVm {
    /// Makes the VM of `machine` with `memory` as its RAM.
    ///
    /// # Errors
    /// KVM refused; the text names what.
    pub fn new(kvm: &Kvm, machine: Arc<dyn Machine>, memory: &GuestMemoryMmap) -> Result<Self> {
        let side = kvm_side(machine.as_ref())?;
        let fd = kvm
            .create_vm_with_type(side.vm_type())
            .map_err(|errno| Error::io("KVM_CREATE_VM", errno))?;
        let mut slots = Vec::new();
        for region in memory.iter() {
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|error| Error::Boot(format!("guest memory: {error}")))?;
            let range = Range::new(region.start_addr().raw_value(), region.len());
            slots.push((range, host as u64));
        }
        let first = slots.len();
        set_slots(&fd, 0, &slots)?;
        let devices = side.create_controllers(&fd)?;
        let mut windows = Vec::new();
        for pages in machine.controller_pages() {
            let controller = devices
                .first()
                .ok_or_else(|| Error::Boot("internal error: there is no controller".into()))?;
            let window = Window::map(controller, pages.offset, pages.range)
                .map_err(|error| Error::io("the interrupt controller's pages", error))?;
            for part in pages.visible {
                let host = window.host_address(part).ok_or_else(|| {
                    Error::Boot(format!("internal error: {part} is not the controller's"))
                })?;
                slots.push((part, host));
            }
            windows.push(window);
        }
        set_slots(&fd, first, &slots)?;
        let devices = Mutex::new(devices);
        Ok(Self {
            fd,
            machine,
            _memory: memory.clone(),
            windows,
            devices,
            vcpus: Mutex::default(),
        })
    }
}

impl KvmVm {
    fn devices(&self) -> MutexGuard<'_, Vec<DeviceFd>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vcpus(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a descriptor of vCPU `index`, the next one.
    fn remember(&self, vcpu: &VcpuFd, index: u32) -> Result<()> {
        let failed = |source| Error::io(format!("descriptor of vCPU {index}"), source);
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let fd = fd.try_clone_to_owned().map_err(failed)?;
        let mut vcpus = self.vcpus();
        if vcpus.len() != index as usize {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        vcpus.push(fd);
        Ok(())
    }
}

/// Makes memory slots of `slots`, each a guest-physical range and where it is
/// mapped in this process, from the one numbered `first`.
///
/// The mappings are those of [`KvmVm`]'s own memory and windows, whole or parts.
fn set_slots(fd: &VmFd, first: usize, slots: &[(Range, u64)]) -> Result<()> {
    for (number, (range, host)) in slots.iter().enumerate().skip(first) {
        let slot = kvm_userspace_memory_region {
            slot: number as u32,
            flags: 0,
            guest_phys_addr: range.base,
            memory_size: range.size,
            userspace_addr: *host,
        };
        // SAFETY: the range is in a mapping that the object which is being made
        // holds until `fd` is closed, and that nothing refers to.
        unsafe { fd.set_user_memory_region(slot) }
            .map_err(|errno| Error::io("KVM_SET_USER_MEMORY_REGION", errno))?;
    }
    Ok(())
}

/// The machine's KVM side.
fn kvm_side(machine: &dyn Machine) -> Result<&dyn KvmMachine> {
    machine.kvm().ok_or_else(|| {
        Error::config(
            "--arch",
            format!(
                "this host's KVM cannot run {} guests; `crossvisor plan` can show one, and `cargo \
                 lab run --arch {0}` runs one by emulation",
                machine.plan().arch
            ),
        )
    })
}

impl Vm for KvmVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let side = kvm_side(self.machine.as_ref())?;
        let fd = self
            .fd
            .create_vcpu(side.vcpu_id(index))
            .map_err(|errno| Error::io(format!("KVM_CREATE_VCPU for vCPU {index}"), errno))?;
        side.init_vcpu(&self.fd, &self.devices(), &fd, index)?;
        self.remember(&fd, index)?;
        let machine = self.machine.clone();
        Ok(Box::new(KvmVcpu { fd, machine, index }))
    }

    fn finish(&self) -> Result<()> {
        let made = kvm_side(self.machine.as_ref())?.finish_controllers(&self.fd)?;
        self.devices().extend(made);
        Ok(())
    }

    fn set_irq_line(&self, line: u32, asserted: bool) -> io::Result<()> {
        Ok(self.fd.set_irq_line(line, asserted)?)
    }

    fn set_interrupt_pin(&self, vcpu: u32, asserted: bool) -> io::Result<()> {
        let vcpus = self.vcpus();
        let fd = vcpus.get(vcpu as usize);
        let fd = fd.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let interrupt = Interrupt {
            irq: match asserted {
                true => INTERRUPT_SET,
                false => INTERRUPT_UNSET,
            },
        };
        // SAFETY: the call reads the structure and nothing else; it may be made
        // while the vCPU runs in its thread (kvm_arch_vcpu_async_ioctl).
        match unsafe { ioctl_with_ref(fd, KVM_INTERRUPT.host_code(), &interrupt) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn attach_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.fd.register_irqfd(event, gsi)?)
    }

    fn detach_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.fd.unregister_irqfd(event, gsi)?)
    }

    fn set_routes(&self, routes: &[(u32, Route)]) -> io::Result<()> {
        let entries: Vec<_> = routes
            .iter()
            .filter_map(|(gsi, route)| routing_entry(*gsi, route))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.fd.set_gsi_routing(&table)?)
    }

    fn attach_doorbell(
        &self,
        bell: Doorbell,
        datamatch: Option<u32>,
        event: &EventFd,
    ) -> io::Result<()> {
        let address = doorbell_address(bell)?;
        match datamatch {
            Some(value) => self.fd.register_ioevent(event, &address, value)?,
            None => self.fd.register_ioevent(event, &address, NoDatamatch)?,
        }
        Ok(())
    }

    fn detach_doorbell(
        &self,
        bell: Doorbell,
        datamatch: Option<u32>,
        event: &EventFd,
    ) -> io::Result<()> {
        let address = doorbell_address(bell)?;
        match datamatch {
            Some(value) => self.fd.unregister_ioevent(event, &address, value)?,
            None => self.fd.unregister_ioevent(event, &address, NoDatamatch)?,
        }
        Ok(())
    }

    fn set_registers(&self, registers: &RegisterState) -> Result<()> {
        kvm_side(self.machine.as_ref())?.set_vm_registers(&self.fd, registers)
    }

    fn set_controller(&self, group: u32, attribute: u64, value: &[u8]) -> io::Result<()> {
        let mut bytes = ControllerValue::default();
        let place = bytes.0.get_mut(..value.len());
        place
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(value);
        let attribute = kvm_device_attr {
            flags: 0,
            group,
            attr: attribute,
            addr: &raw const bytes as u64,
        };
        let devices = self.devices();
        let controller = devices.first().ok_or(io::ErrorKind::NotFound)?;
        Ok(controller.set_device_attr(&attribute)?)
    }

    fn load_controller(&self, address: u64) -> io::Result<u64> {
        let mut loaded = self
            .windows
            .iter()
            .filter_map(|window| window.load(address));
        loaded.next().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn store_controller(&self, address: u64, value: u64) -> io::Result<()> {
        let mut stored = self
            .windows
            .iter()
            .filter_map(|window| window.store(address, value));
        stored.next().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn inject(&self, vcpu: Option<u32>, interrupt: &hv::Interrupt) -> io::Result<()> {
        let Some(index) = vcpu else {
            return channel::inject_floating(&self.devices(), interrupt);
        };
        let vcpus = self.vcpus();
        let fd = vcpus.get(index as usize);
        channel::inject(fd.ok_or(io::ErrorKind::InvalidInput)?, interrupt)
    }

    fn withdraw(&self, id: u32) -> io::Result<()> {
        channel::withdraw(&self.devices(), id)
    }
}

fn doorbell_address(bell: Doorbell) -> io::Result<IoEventAddress> {
    match bell {
        Doorbell::Mmio(address) => Ok(IoEventAddress::Mmio(address)),
        Doorbell::Pio(port) => Ok(IoEventAddress::Pio(port.into())),
        Doorbell::Ccw(subchannel) => {
            super::ccw_address(subchannel).ok_or_else(|| io::ErrorKind::Unsupported.into())
        }
    }
}

/// An entry of the table; none for what is no matter of the table's.
fn routing_entry(gsi: u32, route: &Route) -> Option<kvm_irq_routing_entry> {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        ..Default::default()
    };
    match *route {
        Route::Irqchip { chip, pin } => {
            entry.type_ = KVM_IRQ_ROUTING_IRQCHIP;
            entry.u.irqchip.irqchip = chip;
            entry.u.irqchip.pin = pin;
        }
        Route::Msi {
            address,
            data,
            device_id,
        } => {
            entry.type_ = KVM_IRQ_ROUTING_MSI;
            entry.u.msi.address_lo = address as u32;
            entry.u.msi.address_hi = (address >> 32) as u32;
            entry.u.msi.data = data;
            if let Some(device_id) = device_id {
                entry.flags = KVM_MSI_VALID_DEVID;
                entry.u.msi.__bindgen_anon_1.devid = device_id;
            }
        }
        Route::Source(_) => return None,
        Route::Adapter {
            adapter,
            address,
            bit,
            summary,
            summary_bit,
        } => {
            entry.type_ = KVM_IRQ_ROUTING_S390_ADAPTER;
            entry.u.adapter.adapter_id = adapter;
            entry.u.adapter.ind_addr = address;
            entry.u.adapter.ind_offset = bit;
            entry.u.adapter.summary_addr = summary;
            entry.u.adapter.summary_offset = summary_bit;
        }
    }
    Some(entry)
}

/// A vCPU of KVM.
struct KvmVcpu {
    fd: VcpuFd,
    machine: Arc<dyn Machine>,
    index: u32,
}

impl KvmVcpu {
    /// The size in bytes of each access of a KVM_EXIT_IO, of which a string
    /// instruction (`rep outsb`) makes several in one exit.
    fn port_access_size(&mut self) -> usize {
        // SAFETY: the caller has seen KVM_EXIT_IO, so this member of the union
        // is the one that KVM filled in; any bit pattern is a valid value of it.
        let size = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        usize::from(size).max(1)
    }
}

impl Vcpu for KvmVcpu {
    fn start(&mut self, registers: Option<&RegisterState>) -> Result<()> {
        kvm_side(self.machine.as_ref())?.start_vcpu(&mut self.fd, self.index, registers)
    }

    fn park(&mut self) -> Result<()> {
        kvm_side(self.machine.as_ref())?.park_vcpu(&mut self.fd)
    }

    fn run(&mut self, handle: &mut dyn FnMut(Exit<'_>)) -> Result<()> {
        let reason = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                let data = &raw mut *data;
                let size = self.port_access_size();
                // SAFETY: KVM's data for this exit, in the run page, which stays
                // mapped and to which nothing else refers until the next run.
                for data in unsafe { &mut *data }.chunks_mut(size) {
                    handle(Exit::IoIn { port, data });
                }
                return Ok(());
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data = &raw const *data;
                let size = self.port_access_size();
                // SAFETY: as for IoIn.
                for data in unsafe { &*data }.chunks(size) {
                    handle(Exit::IoOut { port, data });
                }
                return Ok(());
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                handle(Exit::MmioRead { address, data });
                return Ok(());
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                handle(Exit::MmioWrite { address, data });
                return Ok(());
            }
            Ok(VcpuExit::SystemEvent(kind, data)) => {
                let mut data = data.to_vec();
                let side = kvm_side(self.machine.as_ref())?;
                data.extend(side.system_event_registers(&self.fd)?);
                handle(Exit::SystemEvent { kind, data: &data });
                return Ok(());
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                handle(Exit::FailEntry { reason });
                return Ok(());
            }
            Ok(VcpuExit::Hlt) => {
                handle(Exit::Halt);
                return Ok(());
            }
            Ok(VcpuExit::Shutdown) => {
                handle(Exit::Shutdown);
                return Ok(());
            }
            Ok(VcpuExit::Intr) => {
                handle(Exit::Interrupted);
                return Ok(());
            }
            Ok(_) => self.fd.get_kvm_run().exit_reason,
            Err(errno) => match io::Error::from(errno).kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {
                    handle(Exit::Interrupted);
                    return Ok(());
                }
                _ => {
                    return Err(Error::io(format!("KVM_RUN of vCPU {}", self.index), errno));
                }
            },
        };
        let run = self.fd.get_kvm_run();
        if reason == super::bindings::KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: the exit reason says that this member of the union is the
            // one that KVM filled in; any bit pattern is a valid value of it.
            let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
            handle(Exit::InternalError { suberror });
            return Ok(());
        }
        let run = &raw mut *run;
        let mut none = [0; 2];
        // SAFETY: both unions are plain bytes padded to these sizes by the KVM
        // API, and the PSW lies outside of both; any bit pattern is valid, the
        // page is mapped for as long as the vCPU is open, and the borrows last
        // only for the call, during which nobody else looks at the page.
        let (data, sync_regs, psw) = unsafe {
            (
                &mut *(&raw mut (*run).__bindgen_anon_1)
                    .cast::<[u8; crate::exit::RUN_UNION_SIZE]>(),
                &mut *(&raw mut (*run).s).cast::<[u8; crate::exit::SYNC_REGS_SIZE]>(),
                channel::psw(run, &mut none),
            )
        };
        handle(Exit::Arch(ArchExit {
            reason,
            data,
            sync_regs,
            psw,
            logical: &channel::logical(&self.fd),
        }));
        Ok(())
    }

    fn set_registers(&mut self, registers: &RegisterState) -> Result<()> {
        kvm_side(self.machine.as_ref())?.set_vcpu_registers(&mut self.fd, registers)
    }

    fn dump(&self) -> String {
        match kvm_side(self.machine.as_ref()) {
            Ok(side) => side.dump_vcpu(&self.fd),
            Err(error) => error.to_string(),
        }
    }
}
