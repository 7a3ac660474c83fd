//! The other end of the socket: what the `dunlin` command and the tests talk to a machine with.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::session;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("no machine answers at unix:{}: {source}", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection broke.
    #[error("lost the connection to the machine at unix:{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The machine closed the connection.
    #[error("the machine at unix:{} closed the connection", path.display())]
    Closed {
        /// Where.
        path: PathBuf,
    },
    /// No answer came in time.
    #[error("the machine at unix:{} did not answer within {after:?}", path.display())]
    Silent {
        /// Where.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
    },
    /// The answer is not QMP.
    #[error("what answers at unix:{} does not speak QMP: {problem}", path.display())]
    NotQmp {
        /// Where.
        path: PathBuf,
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
    path: PathBuf,
    reader: BufReader<UnixStream>,
    next_id: u64,
}

impl Client {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// When no machine answers there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connected = UnixStream::connect(path);
        let stream = connected.map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let mut client = Self { path: path.to_owned(), reader: BufReader::new(stream), next_id: 0 };
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
        let stream = self.reader.get_ref();
        stream.set_write_timeout(Some(timeout)).map_err(|source| self.io(source))?;
        session::send(stream, &json!({"execute": command, "arguments": arguments, "id": id}))
            .map_err(|source| self.failed(source, timeout))?;
        loop {
            let mut answer = self.read(timeout, begun)?;
            // Events and answers to commands that were given up on.
            if answer.get("id") != Some(&id) {
                continue;
            }
            if let Some(refused) = refusal(&answer) {
                return Err(refused);
            }
            let result = answer.as_object_mut().and_then(|members| members.remove("return"));
            return result.ok_or_else(|| self.not_qmp("an answer has neither result nor error"));
        }
    }

    /// Waits until the machine closes the connection, as its process does when it ends; tells whether it did.
    pub fn wait_until_closed(&mut self, timeout: Duration) -> bool {
        let begun = Instant::now();
        loop {
            match self.read(timeout, begun) {
                Ok(_) => {}
                Err(error) => return !matches!(error, ClientError::Silent { .. }),
            }
        }
    }

    fn read(&mut self, timeout: Duration, begun: Instant) -> Result<Value, ClientError> {
        let left = timeout.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
        self.reader.get_ref().set_read_timeout(Some(left)).map_err(|source| self.io(source))?;
        let mut line = Vec::new();
        let read = (&mut self.reader).take(MAX_ANSWER_BYTES).read_until(b'\n', &mut line);
        read.map_err(|source| self.failed(source, timeout))?;
        if line.is_empty() {
            return Err(ClientError::Closed { path: self.path.clone() });
        }
        serde_json::from_slice(&line).map_err(|error| self.not_qmp(&error.to_string()))
    }

    fn io(&self, source: io::Error) -> ClientError {
        ClientError::Io { path: self.path.clone(), source }
    }

    fn failed(&self, source: io::Error, after: Duration) -> ClientError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                ClientError::Silent { path: self.path.clone(), after }
            }
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                ClientError::Closed { path: self.path.clone() }
            }
            _ => self.io(source),
        }
    }

    fn not_qmp(&self, problem: &str) -> ClientError {
        ClientError::NotQmp { path: self.path.clone(), problem: problem.to_owned() }
    }
}

fn refusal(answer: &Value) -> Option<ClientError> {
    let error = answer.get("error")?;
    let text = |name| error.get(name).and_then(Value::as_str).unwrap_or("unknown").to_owned();
    Some(ClientError::Refused { class: text("class"), desc: text("desc") })
}
