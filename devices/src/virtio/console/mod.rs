//! The console device (virtio 1.2, section 5.3): a terminal, and any number of
//! named streams beside it.

mod control;
mod handler;
mod port;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use self::handler::PortsHandler;
use self::port::{Drain, HostInput, HostPort};
pub use self::port::{OpenCallback, Outputs, Port};
use super::worker::Worker;
use super::{ActivateError, Activation, ActiveQueue, Interface, VirtioDevice, config};
use crate::chardev::ConsoleInput;
use crate::output::Output;

/// The configuration space has the terminal's size (section 5.3.3).
const F_SIZE: u32 = 0;
/// There are ports, and control queues to talk about them.
const F_MULTIPORT: u32 = 1;

const QUEUE_SIZE: u16 = 64;

/// How a console is made.
pub struct ConsoleOptions {
    /// Where the console (port 0) prints.
    pub output: Arc<Output>,
    /// Columns and rows of the terminal, if known.
    pub size: Option<(u16, u16)>,
    /// More ports, from number 1 on.
    pub ports: Vec<Port>,
}

/// A virtio console device.
pub struct Console {
    name: String,
    ports: Arc<[HostPort]>,
    drain: Arc<Drain>,
    input: Arc<dyn ConsoleInput>,
    size: Option<(u16, u16)>,
    queue_sizes: Vec<u16>,
    features: u64,
    worker: Option<Worker<PortsHandler>>,
    /// What a worker that was stopped knew, in case it goes on.
    paused: Option<PortsHandler>,
}

impl Console {
    /// A device named `name` (such as `console0`).
    ///
    /// # Errors
    /// An event could not be made.
    pub fn new(name: &str, options: ConsoleOptions) -> io::Result<Self> {
        let mut ports = vec![HostPort::console(options.output)?];
        for port in options.ports {
            ports.push(HostPort::named(port));
        }
        let Some(HostInput::Console(input)) = ports.first().map(|port| &port.input) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let input: Arc<dyn ConsoleInput> = Arc::clone(input) as _;
        let mut features = 0;
        if options.size.is_some() {
            features |= 1 << F_SIZE;
        }
        let queues = if ports.len() > 1 {
            features |= 1 << F_MULTIPORT;
            // Two for each port and two for control.
            2 * ports.len() + 2
        } else {
            2
        };
        Ok(Self {
            name: name.to_owned(),
            ports: ports.into(),
            drain: Arc::new(Drain::new()?),
            input,
            size: options.size,
            queue_sizes: vec![QUEUE_SIZE; queues],
            features,
            worker: None,
            paused: None,
        })
    }

    /// Where what the user types goes.
    pub fn input(&self) -> Arc<dyn ConsoleInput> {
        Arc::clone(&self.input)
    }

    /// The ports' outputs, to be waited for at the end.
    pub fn outputs(&self) -> Outputs {
        let outputs = self.ports.iter().filter_map(|port| port.output.clone());
        Outputs {
            outputs: outputs.collect(),
            drain: Arc::clone(&self.drain),
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn has_legacy_interface(&self) -> bool {
        true
    }

    fn read_config(&self, interface: Interface, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.size.unwrap_or_default();
        let config = config::Layout::new(interface.order())
            .number(columns)
            .number(rows)
            .number(self.ports.len() as u32)
            .gap(4) // emerg_wr
            .done();
        config::read(&config, offset, data);
    }

    fn write_config(&mut self, _: Interface, _: u64, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for needed in 0..2 {
            if !activation.queues.iter().any(|queue| queue.index == needed) {
                return Err(ActivateError::MissingQueue(needed));
            }
        }
        let multiport = activation.features & self.features & 1 << F_MULTIPORT != 0;
        let resumed = activation
            .queues
            .iter()
            .any(|queue| queue.queue.next_avail() != 0);
        let handler = match self.paused.take() {
            Some(handler) if resumed => handler,
            stale => {
                if let Some(mut stale) = stale {
                    stale.close_all();
                }
                PortsHandler::new(
                    Arc::clone(&self.ports),
                    Arc::clone(&self.drain),
                    multiport,
                    activation.interface.order(),
                )
            }
        };
        self.drain.set_working(true);
        self.worker = Some(Worker::spawn(
            &self.name,
            activation.mem,
            &activation.link,
            activation.queues,
            handler,
        )?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let Some((handler, queues)) = self.worker.take().and_then(Worker::stop) else {
            return Vec::new();
        };
        self.paused = Some(handler);
        queues
    }
}
