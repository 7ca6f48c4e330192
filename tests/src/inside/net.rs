//! Bulk transfers between guest and host: TCP streams that carry a pattern
//! both ways, checked at both ends.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::check::{At, Result, ensure, fail};
use crate::pattern;

/// Bytes sent or received at once.
const CHUNK: usize = 64 << 10;
/// How long a connection may stay silent: the limits of the test itself end
/// earlier what hangs.
const PATIENCE: Duration = Duration::from_secs(600);

/// The guest's end: `streams` connections to `address` at once, each from a
/// CPU of its own, each with `mebibytes` there and as many back.
pub fn bulk(address: &str, streams: u64, mebibytes: u64) -> Result<String> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let workers: Vec<_> = (0..streams)
        .map(|stream| {
            let address = address.to_string();
            thread::spawn(move || {
                let mut set = CpuSet::new();
                set.set(usize::try_from(stream).unwrap_or_default() % cpus);
                sched_setaffinity(None, &set).at("choosing a CPU")?;
                let mut socket = TcpStream::connect(&address).at(&address)?;
                socket.write_all(&stream.to_le_bytes()).at("sending")?;
                send(&mut socket, stream, mebibytes << 20)?;
                receive(&mut socket, reply(stream), mebibytes << 20)
            })
        })
        .collect();
    for worker in workers {
        worker
            .join()
            .unwrap_or_else(|_| fail("a thread panicked"))?;
    }
    let total = streams * mebibytes;
    Ok(format!("bulk: {total} MiB there and {total} MiB back\n"))
}

/// The host's end: serves `streams` connections on `listener`.
pub fn serve(listener: &TcpListener, streams: u64, mebibytes: u64) -> Result {
    let mut workers = Vec::new();
    for _ in 0..streams {
        let mut socket = accept(listener)?;
        workers.push(thread::spawn(move || {
            let mut seed = [0; 8];
            socket.set_read_timeout(Some(PATIENCE)).at("a socket")?;
            socket.read_exact(&mut seed).at("receiving")?;
            let seed = u64::from_le_bytes(seed);
            receive(&mut socket, seed, mebibytes << 20)?;
            send(&mut socket, reply(seed), mebibytes << 20)
        }));
    }
    for worker in workers {
        worker
            .join()
            .unwrap_or_else(|_| fail("a thread panicked"))?;
    }
    Ok(())
}

/// Waits for a connection, but not for ever.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true).at("a socket")?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false).at("a socket")?;
                return Ok(socket);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let waited = Instant::now() >= deadline;
                ensure(!waited, || "nobody connected".into())?;
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return fail(format!("accepting a connection: {error}")),
        }
    }
}

/// The seed of what comes back on stream `seed`.
fn reply(seed: u64) -> u64 {
    seed + (1 << 32)
}

fn send(socket: &mut TcpStream, seed: u64, len: u64) -> Result {
    socket.set_write_timeout(Some(PATIENCE)).at("a socket")?;
    let mut chunk = vec![0; CHUNK];
    for at in (0..len).step_by(CHUNK) {
        pattern::fill(seed, at, &mut chunk);
        socket.write_all(&chunk).at("sending")?;
    }
    socket.flush().at("sending")
}

fn receive(socket: &mut TcpStream, seed: u64, len: u64) -> Result {
    socket.set_read_timeout(Some(PATIENCE)).at("a socket")?;
    let mut chunk = vec![0; CHUNK];
    for at in (0..len).step_by(CHUNK) {
        socket.read_exact(&mut chunk).at("receiving")?;
        let wrong = pattern::difference(seed, at, &chunk);
        ensure(wrong.is_none(), || {
            format!("stream {seed}: byte {} is wrong", wrong.unwrap_or_default())
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_agree() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let host = thread::spawn(move || serve(&listener, 3, 1));
        let said = bulk(&address, 3, 1).unwrap();
        host.join().unwrap().unwrap();
        assert_eq!(said, "bulk: 3 MiB there and 3 MiB back\n");
    }

    #[test]
    fn a_wrong_byte_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let host = thread::spawn(move || serve(&listener, 1, 1));
        let mut socket = TcpStream::connect(address).unwrap();
        socket.write_all(&9u64.to_le_bytes()).unwrap();
        // The host may hang up as soon as it sees the damage.
        let mut wrong = pattern::bytes(9, 1 << 20);
        wrong[70_000] ^= 0x80;
        let _ = socket.write_all(&wrong);
        let error = host.join().unwrap().unwrap_err().to_string();
        assert_eq!(error, "stream 9: byte 70000 is wrong");
    }
}
