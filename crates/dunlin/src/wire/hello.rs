//! The hello that opens every connection, and its answer. Both have a fixed size, so that no flipped bit can make a
//! reader wait for bytes that will not come.

use std::fmt;

use super::codec::{Reader, Writer, cut};
use super::{VERSION, WireError};
use crate::error::one_line;

/// First bytes of a hello and of its answer.
pub(crate) const MAGIC: [u8; 8] = *b"DUNLIN\r\n";
/// Size of a hello.
pub(crate) const HELLO_BYTES: usize = 64;
/// Size of the answer.
pub(crate) const REPLY_BYTES: usize = 320;
const REPLY_TEXT_BYTES: usize = REPLY_BYTES - 16;

/// Names a migration: all its connections carry it. Chosen at random by the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SessionId(pub(crate) [u8; 16]);

impl SessionId {
    /// A new one, from the kernel's random numbers.
    pub(crate) fn random() -> std::io::Result<Self> {
        let mut id = [0; 16];
        let filled = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        if filled == id.len() { Ok(Self(id)) } else { Err(std::io::Error::other("too few random bytes")) }
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Control messages of a new migration; pages come on data channels.
    Control,
    /// Pages, as data channel `index` of the migration.
    Data {
        /// Which.
        index: u8,
    },
    /// Control messages and pages of a new migration.
    Single,
    /// The handover of a migration whose connection was lost.
    Reconnect,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("the control connection"),
            Self::Data { index } => write!(f, "data channel {index}"),
            Self::Single => f.write_str("the connection"),
            Self::Reconnect => f.write_str("the new control connection"),
        }
    }
}

/// The first bytes on every connection, from the side that connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) role: Role,
    pub(crate) session: SessionId,
}

fn checksum(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Splits off the checksum at the end of a fixed-size record and checks it.
fn checked<'a, const N: usize>(bytes: &'a [u8; N], what: &'static str) -> Result<&'a [u8], WireError> {
    let (body, stored) = bytes.split_last_chunk::<4>().ok_or(WireError::Length { what })?;
    if checksum(body) == u32::from_le_bytes(*stored) { Ok(body) } else { Err(WireError::Checksum { what }) }
}

/// Whether what has come so far can still become a hello.
pub(crate) fn check_beginning(bytes: &[u8]) -> Result<(), WireError> {
    let known = bytes.len().min(MAGIC.len());
    if bytes.get(..known) == MAGIC.get(..known) {
        return Ok(());
    }
    let beginning = bytes.iter().take(24).flat_map(|b| std::ascii::escape_default(*b)).map(char::from).collect();
    Err(WireError::NotDunlin { beginning })
}

fn read_version(reader: &mut Reader<'_>) -> Result<(), WireError> {
    match reader.u16()? {
        VERSION => Ok(()),
        theirs => Err(WireError::Version { theirs, ours: VERSION }),
    }
}

impl Hello {
    pub(crate) fn encode(&self) -> [u8; HELLO_BYTES] {
        let (role, index) = match self.role {
            Role::Control => (0, 0),
            Role::Data { index } => (1, index),
            Role::Single => (2, 0),
            Role::Reconnect => (3, 0),
        };
        let mut writer = Writer::default();
        writer.0.extend(MAGIC);
        writer.u16(VERSION);
        writer.u8(role);
        writer.u8(index);
        writer.u32(0);
        writer.0.extend(self.session.0);
        sealed(writer)
    }

    pub(crate) fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, WireError> {
        check_beginning(bytes)?;
        // The version comes before the checksum: another version may place its checksum elsewhere.
        let mut reader = Reader::new(bytes, "the hello");
        reader.take(MAGIC.len())?;
        let version = read_version(&mut reader);
        let body = match (checked(bytes, "the hello"), version) {
            (Ok(body), Ok(())) => body,
            (_, Err(error)) | (Err(error), _) => return Err(error),
        };
        let mut reader = Reader::new(body, "the hello");
        reader.take(MAGIC.len() + 2)?;
        let (role, index) = (reader.u8()?, reader.u8()?);
        let role = match (role, index) {
            (0, 0) => Role::Control,
            (1, index) => Role::Data { index },
            (2, 0) => Role::Single,
            (3, 0) => Role::Reconnect,
            (value, _) => return Err(WireError::Value { what: "the hello's role", value: u64::from(value) }),
        };
        let reserved = reader.u32()?;
        reader.reserved(u64::from(reserved))?;
        let session = SessionId(reader.array()?);
        if reader.rest().iter().any(|byte| *byte != 0) {
            return Err(WireError::Value { what: "a reserved field", value: 1 });
        }
        Ok(Self { role, session })
    }
}

/// The answer to a hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HelloReply {
    /// Go on.
    Welcome,
    /// No, and why. The connection is closed after it.
    Refused {
        /// In words.
        reason: String,
    },
}

/// Pads to the record's size and appends the checksum.
fn sealed<const N: usize>(mut writer: Writer) -> [u8; N] {
    writer.0.resize(N - 4, 0);
    let sum = checksum(&writer.0);
    writer.u32(sum);
    let mut record = [0; N];
    for (to, from) in record.iter_mut().zip(writer.0) {
        *to = from;
    }
    record
}

impl HelloReply {
    pub(crate) fn encode(&self) -> [u8; REPLY_BYTES] {
        let (status, text) = match self {
            Self::Welcome => (0, ""),
            Self::Refused { reason } => (1, cut(reason, REPLY_TEXT_BYTES)),
        };
        let mut writer = Writer::default();
        writer.0.extend(MAGIC);
        writer.u16(VERSION);
        writer.u8(status);
        writer.u8(0);
        writer.0.extend(text.as_bytes());
        sealed(writer)
    }

    pub(crate) fn decode(bytes: &[u8; REPLY_BYTES]) -> Result<Self, WireError> {
        check_beginning(bytes)?;
        let mut reader = Reader::new(bytes, "the answer to the hello");
        reader.take(MAGIC.len())?;
        read_version(&mut reader)?;
        let body = checked(bytes, "the answer to the hello")?;
        let mut reader = Reader::new(body, "the answer to the hello");
        reader.take(MAGIC.len() + 2)?;
        let (status, reserved) = (reader.u8()?, reader.u8()?);
        reader.reserved(u64::from(reserved))?;
        let text = reader.rest();
        let end = text.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        match status {
            0 if end == 0 => Ok(Self::Welcome),
            1 => Ok(Self::Refused { reason: one_line(&String::from_utf8_lossy(text.get(..end).unwrap_or_default())) }),
            value => Err(WireError::Value { what: "the answer to the hello", value: u64::from(value) }),
        }
    }
}
