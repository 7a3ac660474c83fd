//! A bare copy of memory from one process to another: what a migration is measured against.
//!
//! Each connection has an even part of the memory. It says which, sends it, and is answered with one byte when all of
//! it is in its place.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use dunlin::Uri;
use dunlin::memory::RamBlock;
use rustix::pipe::{SpliceFlags, fcntl_setpipe_size, pipe, splice};
use vm_memory::{ReadVolatile, WriteVolatile};

use super::machine::Idle;
use crate::args::Way;

/// Bytes that a system call is given.
const BLOCK: u64 = 2 << 20;

/// Sends all of `memory` over `connections` connections, and waits until it has arrived.
pub fn send(memory: &Idle, to: &Uri, connections: u8, way: Way) -> Result<()> {
    in_parallel(connections, |number| {
        let socket = connect(to)?;
        let mut file = std::fs::File::from(socket.try_clone()?);
        let part = part(memory.block()?, connections, number);
        file.write_all(&[part.start.to_le_bytes(), part.end.to_le_bytes()].concat())?;
        let mut pipes = Pipes::new(way)?;
        for block in blocks(part) {
            send_block(memory, &socket, block, way, &mut pipes)?;
        }
        file.read_exact(&mut [0]).context("the receiving process did not get all of it")
    })
}

fn send_block(memory: &Idle, mut socket: &OwnedFd, block: Range<u64>, way: Way, pipes: &mut Pipes) -> Result<()> {
    let mut at = block.start;
    while at < block.end {
        let length = block.end - at;
        let sent = match way {
            Way::Populate | Way::Straight | Way::Pwrite | Way::PwriteMap => {
                socket.write_volatile(&memory.slice(at, length)?)?
            }
            Way::Sendfile | Way::SendfilePwrite => {
                rustix::fs::sendfile(socket, memory.file()?, Some(&mut at.clone()), usize::try_from(length)?)?
            }
            Way::Splice => pipes.carry(memory.file()?, Some(at), socket, None, length)?,
        };
        if sent == 0 {
            bail!("nothing more could be sent");
        }
        at += sent as u64;
    }
    Ok(())
}

/// Where bare copies come in.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub fn bind(at: &Uri) -> Result<Self> {
        Ok(match at {
            Uri::Tcp { host, port } => Self::Tcp(TcpListener::bind((host.as_str(), *port))?),
            Uri::Unix(path) => Self::Unix(UnixListener::bind(path)?),
            other => bail!("a bare copy does not go over {other}"),
        })
    }

    pub fn local_uri(&self, at: &Uri) -> Result<Uri> {
        Ok(match (self, at) {
            (Self::Tcp(listener), Uri::Tcp { host, .. }) => {
                Uri::Tcp { host: host.clone(), port: listener.local_addr()?.port() }
            }
            _ => at.clone(),
        })
    }

    fn accept(&self) -> Result<OwnedFd> {
        Ok(match self {
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                stream.into()
            }
            Self::Unix(listener) => listener.accept()?.0.into(),
        })
    }

    /// Receives a bare copy.
    pub fn receive(&self, memory: &Idle, connections: u8, way: Way) -> Result<()> {
        in_parallel(connections, |_| {
            let socket = self.accept()?;
            let mut file = std::fs::File::from(socket.try_clone()?);
            let [mut start, mut end] = [[0; 8]; 2];
            file.read_exact(&mut start)?;
            file.read_exact(&mut end)?;
            let mut buffer = vec![0; usize::try_from(BLOCK)?];
            let mut pipes = Pipes::new(way)?;
            for block in blocks(u64::from_le_bytes(start)..u64::from_le_bytes(end)) {
                receive_block(memory, &mut file, &socket, block, way, &mut buffer, &mut pipes)?;
            }
            Ok(file.write_all(&[1])?)
        })
    }
}

fn receive_block(
    memory: &Idle,
    file: &mut std::fs::File,
    mut socket: &OwnedFd,
    block: Range<u64>,
    way: Way,
    buffer: &mut [u8],
    pipes: &mut Pipes,
) -> Result<()> {
    match way {
        Way::Pwrite | Way::PwriteMap | Way::SendfilePwrite => {
            let buffer = buffer.get_mut(..usize::try_from(block.end - block.start)?).context("a block too large")?;
            file.read_exact(buffer)?;
            let mut at = block.start;
            while at < block.end {
                let rest = buffer.get(usize::try_from(at - block.start)?..).unwrap_or_default();
                at += rustix::io::pwrite(memory.file()?, rest, at)? as u64;
            }
            if way == Way::PwriteMap {
                memory.block()?.populate(block)?;
            }
            return Ok(());
        }
        Way::Populate | Way::Sendfile => memory.block()?.populate(block.clone())?,
        Way::Straight | Way::Splice => {}
    }
    let mut at = block.start;
    while at < block.end {
        let length = block.end - at;
        let got = match way {
            Way::Splice => pipes.carry(socket, None, memory.file()?, Some(at), length)?,
            _ => socket.read_volatile(&mut memory.slice(at, length)?)?,
        };
        if got == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        at += got as u64;
    }
    Ok(())
}

fn connect(to: &Uri) -> Result<OwnedFd> {
    Ok(match to {
        Uri::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port))?;
            stream.set_nodelay(true)?;
            stream.into()
        }
        Uri::Unix(path) => UnixStream::connect(path)?.into(),
        other => bail!("a bare copy does not go over {other}"),
    })
}

/// The part of a block that a connection has; parts are whole huge pages.
fn part(block: &RamBlock, connections: u8, number: u8) -> Range<u64> {
    let size = block.size_bytes();
    let bound = |number: u64| match number {
        n if n == u64::from(connections) => size,
        n => size / u64::from(connections) * n / (2 << 20) * (2 << 20),
    };
    bound(number.into())..bound(u64::from(number) + 1)
}

fn blocks(part: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    part.clone().step_by(BLOCK as usize).map(move |start| start..(start + BLOCK).min(part.end))
}

/// Copies between two mappings, a thread for each part.
pub fn between(from: &Idle, to: &Idle, parts: u8) -> Result<()> {
    in_parallel(parts, |number| {
        let part = part(from.block()?, parts, number);
        let length = part.end - part.start;
        from.slice(part.start, length)?.copy_to_volatile_slice(to.slice(part.start, length)?);
        Ok(())
    })
}

/// A thread for each connection; the first error of any.
fn in_parallel(connections: u8, work: impl Fn(u8) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..connections).map(|number| scope.spawn(move || work(number))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    })
}

/// A pipe for [`Way::Splice`].
#[derive(Debug)]
struct Pipes(Option<(OwnedFd, OwnedFd)>);

impl Pipes {
    fn new(way: Way) -> Result<Self> {
        if way != Way::Splice {
            return Ok(Self(None));
        }
        let (out, into) = pipe()?;
        fcntl_setpipe_size(&out, 1 << 20)?;
        Ok(Self(Some((out, into))))
    }

    /// Moves up to `length` bytes from one file to another; how many were moved.
    fn carry(
        &mut self,
        from: impl AsFd,
        from_offset: Option<u64>,
        to: impl AsFd,
        to_offset: Option<u64>,
        length: u64,
    ) -> Result<usize> {
        let (out, into) = self.0.as_ref().context("no pipe")?;
        let mut offset = from_offset;
        let got = splice(&from, offset.as_mut(), into, None, usize::try_from(length)?, SpliceFlags::MOVE)?;
        let mut offset = to_offset;
        let mut moved = 0;
        while moved < got {
            moved += splice(out, None, &to, offset.as_mut(), got - moved, SpliceFlags::MOVE)?;
        }
        Ok(got)
    }
}
