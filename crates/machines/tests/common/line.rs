//! A relay between source and destination, each connection of which can be made silent, slow, or repeat itself.
//!
//! It knows a connection's purpose from its hello. Like [`proxy`](super::proxy) it reads frames by the published format.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin::Uri;

use super::proxy::Way;

/// Which connection, by its purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Control,
    Data(u8),
    Other,
}

/// How a direction of a connection behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Forwards all.
    Free,
    /// Takes everything and forwards nothing, as a host does that has forgotten the connection.
    Swallowed,
    /// Takes nothing and forwards nothing, for the time being.
    Held,
    /// Forwards so many bytes a second.
    Slow(u64),
}

struct Shared {
    /// What was asked for last counts.
    flows: Mutex<Vec<(Which, Way, Flow)>>,
    repeat_acks_of: Option<u8>,
    closed: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl Shared {
    fn flow(&self, which: Which, way: Way) -> Flow {
        let flows = self.flows.lock().unwrap();
        flows.iter().rev().find(|(w, y, _)| (*w, *y) == (which, way)).map_or(Flow::Free, |(_, _, flow)| *flow)
    }
}

pub struct Line {
    pub uri: Uri,
    shared: Arc<Shared>,
    port: u16,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    /// A relay to `target`, which must be a TCP address.
    pub fn start(target: &Uri) -> Self {
        Self::with(target, None)
    }

    /// One that sends each acknowledgement of a mark of that channel as many times as there are channels.
    pub fn repeating_acks(target: &Uri, channel: u8) -> Self {
        Self::with(target, Some(channel))
    }

    fn with(target: &Uri, repeat_acks_of: Option<u8>) -> Self {
        let Uri::Tcp { host, port } = target.clone() else { panic!("{target} is not TCP") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own_port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            flows: Mutex::default(),
            repeat_acks_of,
            closed: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let accepting = shared.clone();
        let thread = std::thread::spawn(move || {
            let mut pumps = Vec::new();
            for client in listener.incoming() {
                let Ok(client) = client else { break };
                if accepting.closed.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(server) = TcpStream::connect((host.as_str(), port)) else { continue };
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let copies = [client.try_clone().unwrap(), server.try_clone().unwrap()];
                accepting.open.lock().unwrap().extend(copies);
                let relaying = accepting.clone();
                pumps.push(std::thread::spawn(move || relay(&relaying, client, server)));
            }
            drop(listener);
            pumps.into_iter().for_each(|pump| drop(pump.join()));
        });
        let uri = Uri::Tcp { host: "127.0.0.1".into(), port: own_port };
        Self { uri, shared, port: own_port, thread: Some(thread) }
    }

    /// From now on that direction of that connection behaves so.
    pub fn set(&self, which: Which, way: Way, flow: Flow) {
        self.shared.flows.lock().unwrap().push((which, way, flow));
    }

    /// From now on both directions of that connection behave so.
    pub fn set_both(&self, which: Which, flow: Flow) {
        self.set(which, Way::ToDestination, flow);
        self.set(which, Way::ToSource, flow);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.open.lock().unwrap().drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn relay(shared: &Arc<Shared>, mut client: TcpStream, mut server: TcpStream) {
    let mut hello = [0; 64];
    if client.read_exact(&mut hello).is_err() || server.write_all(&hello).is_err() {
        return;
    }
    let which = match hello[10] {
        0 => Which::Control,
        1 => Which::Data(hello[11]),
        _ => Which::Other,
    };
    let mut answer = [0; 320];
    if server.read_exact(&mut answer).is_err() || client.write_all(&answer).is_err() {
        return;
    }
    let back = (shared.clone(), server.try_clone().unwrap(), client.try_clone().unwrap());
    let back = std::thread::spawn(move || match back.0.repeat_acks_of {
        Some(channel) if which == Which::Control => repeat_acks(channel, back.1, back.2),
        _ => pump(&back.0, which, Way::ToSource, back.1, back.2),
    });
    pump(shared, which, Way::ToDestination, client, server);
    drop(back.join());
}

fn pump(shared: &Shared, which: Which, way: Way, mut from: TcpStream, mut to: TcpStream) {
    const LOOK: Duration = Duration::from_millis(5);
    let mut buffer = vec![0; 64 << 10];
    from.set_read_timeout(Some(LOOK)).unwrap();
    let mut due = Instant::now();
    while !shared.closed.load(Ordering::SeqCst) {
        let flow = shared.flow(which, way);
        let room = match flow {
            Flow::Held => {
                std::thread::sleep(LOOK);
                continue;
            }
            Flow::Slow(rate) => {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                (rate as usize / 20).clamp(1, buffer.len())
            }
            Flow::Free | Flow::Swallowed => buffer.len(),
        };
        match from.read(&mut buffer[..room]) {
            Ok(0) => break,
            Ok(got) => {
                // As of now: what is swallowed is swallowed from the moment that was asked for.
                let flow = shared.flow(which, way);
                if let Flow::Slow(rate) = flow {
                    due = Instant::now() + Duration::from_secs_f64(got as f64 / rate as f64);
                }
                if flow != Flow::Swallowed && to.write_all(&buffer[..got]).is_err() {
                    break;
                }
            }
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    // A host that has forgotten a connection does not pass its end on either.
    if shared.flow(which, way) != Flow::Swallowed {
        drop(to.shutdown(Shutdown::Write));
    }
    drop(from.shutdown(Shutdown::Read));
}

/// CRC-32C, bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 };
        }
    }
    !crc
}

/// Forwards the destination's messages, and those that acknowledge a mark of `channel` three times over.
fn repeat_acks(channel: u8, mut from: TcpStream, mut to: TcpStream) {
    let mut sequence = 0u64;
    let mut header = [0; 40];
    while from.read_exact(&mut header).is_ok() {
        let length = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()) as usize;
        let mut rest = vec![0; length(16) + length(20)];
        if from.read_exact(&mut rest).is_err() {
            break;
        }
        let repeated = header[4] == 5 && rest.get(4) == Some(&channel);
        for _ in 0..if repeated { 3 } else { 1 } {
            header[8..16].copy_from_slice(&sequence.to_le_bytes());
            sequence += 1;
            let checksum = crc32c(&header[..36]);
            header[36..].copy_from_slice(&checksum.to_le_bytes());
            if to.write_all(&[&header[..], &rest].concat()).is_err() {
                return;
            }
        }
    }
    drop(to.shutdown(Shutdown::Write));
}
