//! A proxy between a source and a destination that understands the wire format well enough to know what passes.
//!
//! It is written from docs/wire-format.md and shares no code with the engine, so that it also holds the page and the
//! engine to each other. At a chosen frame it runs an action, before or after the frame is forwarded.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const HELLO_BYTES: usize = 64;
const ANSWER_BYTES: usize = 320;
const HEADER_BYTES: usize = 40;
/// The most a control frame can hold: Start's 4 MiB.
const MOST_BYTES: usize = 4 << 20;

/// The frames of the handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    Offer = 7,
    Ready = 8,
    Release = 9,
    Running = 10,
    Done = 11,
}

impl Frame {
    pub const ALL: [Self; 5] = [Self::Offer, Self::Ready, Self::Release, Self::Running, Self::Done];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

/// What becomes of the frame that an action was run before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Forward,
    Lose,
}

pub type Action = Box<dyn FnOnce(&Link) -> Fate + Send>;

struct Trap {
    frame: Frame,
    when: When,
    action: Action,
}

/// Whether the link carries anything.
#[derive(Debug, Clone, Copy)]
enum Carries {
    All,
    NothingUntil(Instant),
    NothingEver,
}

struct State {
    carries: Carries,
    /// Both ends of every pair.
    connections: Vec<(TcpStream, TcpStream)>,
}

struct Inner {
    upstream: SocketAddr,
    state: Mutex<State>,
    trap: Mutex<Option<Trap>>,
    sprung: AtomicBool,
    closed: AtomicBool,
    /// Where what passed was not what the page says.
    problems: Mutex<Vec<String>>,
}

/// The link itself, as actions see it.
#[derive(Clone)]
pub struct Link(Arc<Inner>);

impl Link {
    /// Cuts every connection and takes no new one for `time`; for ever if there is none.
    pub fn cut(&self, time: Option<Duration>) {
        let mut state = self.0.state.lock().unwrap();
        state.carries = time.map_or(Carries::NothingEver, |time| Carries::NothingUntil(Instant::now() + time));
        for (near, far) in state.connections.drain(..) {
            let _ = near.shutdown(Shutdown::Both);
            let _ = far.shutdown(Shutdown::Both);
        }
    }

    /// From now on it carries again.
    pub fn mend(&self) {
        self.0.state.lock().unwrap().carries = Carries::All;
    }

    /// Takes in a connection, if the link is up.
    fn admit(&self, near: TcpStream) {
        let Ok(far) = TcpStream::connect(self.0.upstream) else { return };
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        {
            let mut state = self.0.state.lock().unwrap();
            let up = match state.carries {
                Carries::All => true,
                Carries::NothingUntil(then) => Instant::now() >= then,
                Carries::NothingEver => false,
            };
            if !up {
                return;
            }
            state.connections.push((near.try_clone().unwrap(), far.try_clone().unwrap()));
        }
        let link = self.clone();
        thread::spawn(move || {
            if let Err(problem) = link.carry(near, far) {
                link.0.problems.lock().unwrap().push(problem);
            }
        });
    }

    /// Carries one connection to its end.
    fn carry(&self, mut near: TcpStream, mut far: TcpStream) -> Result<(), String> {
        let mut hello = [0; HELLO_BYTES];
        if near.read_exact(&mut hello).and_then(|()| far.write_all(&hello)).is_err() {
            close(&near, &far);
            return Ok(());
        }
        if !hello.starts_with(b"DUNLIN\r\n") || hello[8..10] != [1, 0] {
            return Err(format!("a hello begins with {:02x?}", &hello[..10]));
        }
        let mut answer = [0; ANSWER_BYTES];
        if far.read_exact(&mut answer).and_then(|()| near.write_all(&answer)).is_err() {
            close(&near, &far);
            return Ok(());
        }
        if !answer.starts_with(b"DUNLIN\r\n") || answer[10] > 1 {
            return Err(format!("an answer begins with {:02x?}", &answer[..12]));
        }
        let is_data = hello[10] == 1;
        let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
        let link = self.clone();
        let backwards = thread::spawn(move || link.carry_one_way(back.0, back.1, is_data));
        let there = self.carry_one_way(near, far, is_data);
        there.and(backwards.join().unwrap())
    }

    fn carry_one_way(&self, mut from: TcpStream, mut to: TcpStream, is_data: bool) -> Result<(), String> {
        let outcome = if is_data {
            let _ = io::copy(&mut from, &mut to);
            Ok(())
        } else {
            self.carry_frames(&mut from, &mut to)
        };
        let _ = to.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Read);
        outcome
    }

    fn carry_frames(&self, from: &mut TcpStream, to: &mut TcpStream) -> Result<(), String> {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        for sequence in 0.. {
            let mut bytes = vec![0; HEADER_BYTES];
            if from.read_exact(&mut bytes).is_err() {
                return Ok(());
            }
            // The checksum of pages comes behind them.
            let trailer = if number(&bytes[4..6]) == 32 { 8 } else { 0 };
            let length = (number(&bytes[16..20]) + number(&bytes[20..24]) + trailer) as usize;
            if !bytes.starts_with(b"DLF1") || number(&bytes[8..16]) != sequence || length > MOST_BYTES {
                return Err(format!("frame {sequence} begins with {bytes:02x?}"));
            }
            bytes.resize(HEADER_BYTES + length, 0);
            if from.read_exact(&mut bytes[HEADER_BYTES..]).is_err() {
                return Ok(());
            }
            let kind = number(&bytes[4..6]);
            if self.spring(kind, When::Before) == Fate::Lose {
                continue;
            }
            if to.write_all(&bytes).is_err() {
                return Ok(());
            }
            self.spring(kind, When::After);
        }
        Ok(())
    }

    /// Runs the action if its moment has come.
    fn spring(&self, kind: u64, when: When) -> Fate {
        let trap = self.0.trap.lock().unwrap().take_if(|trap| trap.frame as u64 == kind && trap.when == when);
        let Some(trap) = trap else { return Fate::Forward };
        let fate = (trap.action)(self);
        self.0.sprung.store(true, Ordering::Release);
        fate
    }
}

fn close(near: &TcpStream, far: &TcpStream) {
    let _ = near.shutdown(Shutdown::Both);
    let _ = far.shutdown(Shutdown::Both);
}

/// A proxy. Dropping it cuts everything.
pub struct Proxy {
    link: Link,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Forwards to `upstream`, a `tcp:HOST:PORT`.
    pub fn start(upstream: &str) -> Self {
        let upstream = upstream.strip_prefix("tcp:").unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let link = Link(Arc::new(Inner {
            upstream,
            state: Mutex::new(State { carries: Carries::All, connections: Vec::new() }),
            trap: Mutex::default(),
            sprung: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            problems: Mutex::default(),
        }));
        let accepting = link.clone();
        let thread = thread::spawn(move || {
            for connection in listener.incoming() {
                if accepting.0.closed.load(Ordering::Acquire) {
                    return;
                }
                if let Ok(connection) = connection {
                    accepting.admit(connection);
                }
            }
        });
        Self { link, address, thread: Some(thread) }
    }

    /// Where to migrate to.
    pub fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// The link.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Runs `action` at the next `frame`.
    pub fn at(&self, frame: Frame, when: When, action: Action) {
        *self.link.0.trap.lock().unwrap() = Some(Trap { frame, when, action });
    }

    /// Whether the moment has come.
    pub fn has_sprung(&self) -> bool {
        self.link.0.sprung.load(Ordering::Acquire)
    }

    /// Where what passed was not what docs/wire-format.md says.
    pub fn problems(&self) -> Vec<String> {
        self.link.0.problems.lock().unwrap().clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.link.cut(None);
        self.link.0.closed.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
