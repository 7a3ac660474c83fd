//! The other end of the socket: what the `dunlin` command and the tests talk to a machine with.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::retry_on_intr;
use rustix::net::{SendFlags, sockopt};
use serde_json::{Value, json};

use crate::address::Address;
use crate::protocol;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
/// Events that are kept until somebody asks for them; older ones make room.
const MAX_EVENTS: usize = 10_000;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("no machine answers at {address}: {source}")]
    Connect {
        /// Where.
        address: Address,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection broke.
    #[error("lost the connection to the machine at {address}: {source}")]
    Io {
        /// Where.
        address: Address,
        /// The system's answer.
        source: io::Error,
    },
    /// The machine closed the connection.
    #[error("the machine at {address} closed the connection")]
    Closed {
        /// Where.
        address: Address,
    },
    /// No answer came in time.
    #[error("the machine at {address} did not answer within {after:?}")]
    Silent {
        /// Where.
        address: Address,
        /// How long was waited.
        after: Duration,
    },
    /// The answer is not QMP.
    #[error("what answers at {address} does not speak QMP: {problem}")]
    NotQmp {
        /// Where.
        address: Address,
        /// What came instead.
        problem: String,
    },
    /// The machine refused the command.
    #[error("{desc}")]
    Refused {
        /// QEMU's class of the error.
        class: String,
        /// Why, in its words.
        desc: String,
    },
}

/// A connection to a machine's QMP socket, ready for commands.
#[derive(Debug)]
pub struct Client {
    address: Address,
    reader: BufReader<Socket>,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
    next_id: u64,
    events: VecDeque<Value>,
}

/// A connected stream socket of either kind.
#[derive(Debug)]
struct Socket(OwnedFd);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, buffer)?)
    }
}

/// Connects to the first of the host's addresses that answers.
fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

impl Client {
    /// Connects to `address`, which may be a path, and negotiates.
    ///
    /// # Errors
    /// When no machine answers there.
    pub fn connect(address: impl Into<Address>) -> Result<Self, ClientError> {
        let address = address.into();
        let connected = match &address {
            Address::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
            Address::Tcp { host, port } => connect_tcp(host, *port).map(OwnedFd::from),
        };
        let socket = connected.map_err(|source| ClientError::Connect { address: address.clone(), source })?;
        let mut client = Self {
            address,
            reader: BufReader::new(Socket(socket)),
            partial: Vec::new(),
            next_id: 0,
            events: VecDeque::new(),
        };
        let greeting = client.read(TIMEOUT, Instant::now())?;
        if let Some(refused) = refusal(&greeting) {
            return Err(refused);
        }
        if greeting.get("QMP").is_none() {
            return Err(client.not_qmp("it sends no greeting"));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Carries out a command and gives its result.
    ///
    /// # Errors
    /// When it is refused, or the machine does not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.execute_within(TIMEOUT, command, arguments)
    }

    /// Carries out a command that may take `timeout`.
    ///
    /// # Errors
    /// As for [`execute`](Self::execute).
    pub fn execute_within(&mut self, timeout: Duration, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let begun = Instant::now();
        self.next_id += 1;
        let id = Value::from(self.next_id);
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        self.write(timeout, &protocol::line(&request)).map_err(|source| self.failed(source, timeout))?;
        loop {
            let mut answer = self.read(timeout, begun)?;
            if answer.get("id") != Some(&id) {
                // An event, or the answer to a command that was given up on.
                self.keep_event(answer);
                continue;
            }
            if let Some(refused) = refusal(&answer) {
                return Err(refused);
            }
            let result = answer.as_object_mut().and_then(|members| members.remove("return"));
            return result.ok_or_else(|| self.not_qmp("an answer has neither result nor error"));
        }
    }

    /// The next event that has come, or comes within `timeout`; none if none does.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Value>, ClientError> {
        let begun = Instant::now();
        while self.events.is_empty() {
            match self.read(timeout, begun) {
                Ok(line) => self.keep_event(line),
                Err(ClientError::Silent { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(self.events.pop_front())
    }

    /// Waits until the machine closes the connection, as its process does when it ends; tells whether it did.
    pub fn wait_until_closed(&mut self, timeout: Duration) -> bool {
        let begun = Instant::now();
        loop {
            match self.read(timeout, begun) {
                Ok(line) => self.keep_event(line),
                Err(error) => return !matches!(error, ClientError::Silent { .. }),
            }
        }
    }

    fn keep_event(&mut self, line: Value) {
        if line.get("event").is_some() {
            if self.events.len() >= MAX_EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(line);
        }
    }

    fn write(&self, timeout: Duration, mut bytes: &[u8]) -> io::Result<()> {
        let socket = &self.reader.get_ref().0;
        sockopt::set_socket_timeout(socket, sockopt::Timeout::Send, Some(timeout))?;
        while !bytes.is_empty() {
            let sent = retry_on_intr(|| rustix::net::send(socket, bytes, SendFlags::NOSIGNAL))?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    fn read(&mut self, timeout: Duration, begun: Instant) -> Result<Value, ClientError> {
        let read = self.read_line(timeout, begun);
        let ended = read.map_err(|source| self.failed(source, timeout))?;
        let line = std::mem::take(&mut self.partial);
        if line.is_empty() || ended == 0 {
            return Err(ClientError::Closed { address: self.address.clone() });
        }
        serde_json::from_slice(&line).map_err(|error| self.not_qmp(&error.to_string()))
    }

    /// Reads up to the end of a line. What was read when time runs out is the beginning of the next.
    fn read_line(&mut self, timeout: Duration, begun: Instant) -> io::Result<usize> {
        loop {
            let left = timeout.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
            sockopt::set_socket_timeout(&self.reader.get_ref().0, sockopt::Timeout::Recv, Some(left))?;
            let room = MAX_ANSWER_BYTES.saturating_sub(self.partial.len() as u64);
            let read = (&mut self.reader).take(room).read_until(b'\n', &mut self.partial)?;
            if read == 0 || self.partial.ends_with(b"\n") {
                return Ok(read);
            }
        }
    }

    fn failed(&self, source: io::Error, after: Duration) -> ClientError {
        let address = self.address.clone();
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent { address, after },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed { address },
            _ => ClientError::Io { address, source },
        }
    }

    fn not_qmp(&self, problem: &str) -> ClientError {
        ClientError::NotQmp { address: self.address.clone(), problem: problem.to_owned() }
    }
}

fn refusal(answer: &Value) -> Option<ClientError> {
    let error = answer.get("error")?;
    let text = |name| error.get(name).and_then(Value::as_str).unwrap_or("unknown").to_owned();
    Some(ClientError::Refused { class: text("class"), desc: text("desc") })
}
