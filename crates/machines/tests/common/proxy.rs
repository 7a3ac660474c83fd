//! A TCP proxy between source and destination that can do harm at a chosen byte.
//!
//! It reads frames by the published format and not with the crate's code, so that it can also act at a chosen
//! message: a second, small implementation.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;

use dunlin::Uri;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToDestination,
    ToSource,
}

/// What to do, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// Nothing.
    None,
    /// Flip this bit of the byte.
    Flip(u8),
    /// End that direction of that connection, quietly.
    Truncate,
    /// Close every connection.
    Cut,
    /// Close every connection, and accept no more.
    CutForGood,
}

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// At the so-many-th byte of all connections that way.
    Byte(Way, u64),
    /// When a frame of this type comes on a control connection, before it is forwarded or after.
    Before(u16),
    After(u16),
    /// At this byte of the first such frame on a control connection, or its last byte if it is shorter.
    Inside(u16, usize),
}

struct Shared {
    moment: Moment,
    harm: Harm,
    done: AtomicBool,
    closed: AtomicBool,
    to_destination: AtomicU64,
    to_source: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
    /// Held to write while a frame is forwarded after which there is to be harm.
    forwarding: RwLock<()>,
}

pub struct Proxy {
    pub uri: Uri,
    shared: Arc<Shared>,
    port: u16,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// A proxy to `target`, which must be a TCP address.
    pub fn start(target: &Uri, moment: Moment, harm: Harm) -> Self {
        let Uri::Tcp { host, port } = target.clone() else { panic!("{target} is not TCP") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own_port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            moment,
            harm,
            done: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            to_destination: AtomicU64::new(0),
            to_source: AtomicU64::new(0),
            open: Mutex::default(),
            forwarding: RwLock::default(),
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
                let (client2, server2) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let (a, b) = (accepting.clone(), accepting.clone());
                pumps.push(std::thread::spawn(move || pump(&a, Way::ToDestination, client, server)));
                pumps.push(std::thread::spawn(move || pump(&b, Way::ToSource, server2, client2)));
            }
            drop(listener);
            pumps.into_iter().for_each(|pump| drop(pump.join()));
        });
        Self {
            uri: Uri::Tcp { host: "127.0.0.1".into(), port: own_port },
            shared,
            port: own_port,
            thread: Some(thread),
        }
    }

    /// Bytes forwarded so far, that way.
    pub fn bytes(&self, way: Way) -> u64 {
        self.shared.count(way).load(Ordering::SeqCst)
    }

    /// Whether the harm has been done.
    pub fn harmed(&self) -> bool {
        self.shared.done.load(Ordering::SeqCst)
    }

    /// Cuts everything now.
    pub fn cut(&self) {
        self.shared.cut();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.cut();
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Shared {
    fn count(&self, way: Way) -> &AtomicU64 {
        match way {
            Way::ToDestination => &self.to_destination,
            Way::ToSource => &self.to_source,
        }
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Does the harm to a piece of `bytes` of which the byte at `at` is the chosen one. Whether to go on.
    fn harm(&self, bytes: &mut [u8], at: usize) -> bool {
        if self.done.swap(true, Ordering::SeqCst) {
            return true;
        }
        match self.harm {
            Harm::None => true,
            Harm::Flip(bit) => {
                bytes[at] ^= 1 << (bit % 8);
                true
            }
            Harm::Truncate => false,
            Harm::Cut => {
                self.cut();
                false
            }
            Harm::CutForGood => {
                self.closed.store(true, Ordering::SeqCst);
                self.cut();
                false
            }
        }
    }
}

/// Forwards one direction of one connection, unit by unit: hello or answer, then frame headers and their rest.
fn pump(shared: &Shared, way: Way, mut from: TcpStream, mut to: TcpStream) {
    let mut role = 0;
    let mut forward = |bytes: &mut [u8]| -> bool {
        let before = shared.count(way).fetch_add(bytes.len() as u64, Ordering::SeqCst);
        if let Moment::Byte(wanted, at) = shared.moment
            && wanted == way
            && (before..before + bytes.len() as u64).contains(&at)
            && !shared.harm(bytes, (at - before) as usize)
        {
            // What came before the chosen byte still goes.
            drop(to.write_all(&bytes[..(at - before) as usize]));
            return false;
        }
        to.write_all(bytes).is_ok()
    };
    let mut greeting = vec![0; if way == Way::ToDestination { 64 } else { 320 }];
    if from.read_exact(&mut greeting).is_ok() {
        role = greeting[10];
        let mut going = forward(&mut greeting);
        let control = way == Way::ToSource || role != 1;
        let mut header = [0; 40];
        while going && from.read_exact(&mut header).is_ok() {
            let frame_type = u16::from_le_bytes([header[4], header[5]]);
            let length = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()) as usize;
            // The checksum of pages comes behind them.
            let trailer = if frame_type == 32 { 8 } else { 0 };
            let mut rest = vec![0; length(16) + length(20) + trailer];
            if from.read_exact(&mut rest).is_err() {
                break;
            }
            if control && shared.moment == Moment::Before(frame_type) && !shared.harm(&mut [], 0) {
                break;
            }
            let mut whole = [&header[..], &rest].concat();
            if let Moment::Inside(wanted, at) = shared.moment
                && control
                && wanted == frame_type
            {
                let at = at.min(whole.len() - 1);
                shared.harm(&mut whole, at);
            }
            let after = control && shared.moment == Moment::After(frame_type);
            // What answers it does not get through before the harm.
            let alone = after.then(|| shared.forwarding.write().unwrap());
            let beside = (!after).then(|| shared.forwarding.read().unwrap());
            going = forward(&mut whole);
            if after && !shared.harm(&mut [], 0) {
                break;
            }
            drop((alone, beside));
        }
    }
    let _ = role;
    drop(to.shutdown(Shutdown::Write));
    drop(from.shutdown(Shutdown::Read));
}
