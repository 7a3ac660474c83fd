//! Bytes: hello, frames, control messages; the only place that parses input.
//!
//! `docs/wire-format.md` describes version 1 to the byte, and the golden tests in `golden.rs` hold both to it.
//! Everything here turns bytes into types and types into bytes and knows nothing else. Input is hostile: every
//! length is checked against a bound before anything is allocated, every checksum before its bytes count.

use crate::page::DecodeError;

mod codec;
mod frame;
mod hello;
mod message;
mod pages;

#[cfg(test)]
mod golden;

pub(crate) use frame::{
    DataDigest, FrameHeader, FrameType, HEADER_BYTES, PAGES_TRAILER_BYTES, data_checksum, table_checksum,
};
pub(crate) use hello::{HELLO_BYTES, Hello, HelloReply, REPLY_BYTES, Role, SessionId, check_beginning};
pub(crate) use message::{
    Abort, AbortReason, Done, Feature, HEARTBEAT_BYTES, Heartbeat, Mark, MarkAck, Message, Offer, Probe, Probed, Ready,
    Release, RoundDone, Running, Section, Start, Stopped, Throttled,
};
pub(crate) use pages::{ENTRY_BYTES, MAX_ENTRIES, MAX_PAGES_BYTES, PageRun, decode_runs, encode_run};

/// The most device state that a migration may carry.
pub(crate) const MAX_DEVICE_STATE_BYTES: u64 = 256 << 20;

/// The longest name of a section, block or feature.
pub(crate) const MAX_NAME_BYTES: usize = u8::MAX as usize;

/// The feature of a migration whose Pages frames have no checksum of their data.
pub(crate) const UNCHECKED_PAGES: &str = "unchecked-pages";

/// The version this crate speaks.
pub(crate) const VERSION: u16 = 1;

/// Bytes that are not what the wire format says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// What connected does not speak this protocol.
    #[error("not a Dunlin migration: {}it began with \"{beginning}\"", stranger(beginning))]
    NotDunlin {
        /// The first bytes, made printable.
        beginning: String,
    },
    /// The peer speaks another version.
    #[error("the peer speaks version {theirs} of the wire format, this side version {ours}")]
    Version {
        /// The peer's version.
        theirs: u16,
        /// This side's version.
        ours: u16,
    },
    /// A checksum does not match: the bytes changed on the way.
    #[error("the checksum of {what} does not match: the bytes changed on the way")]
    Checksum {
        /// Of what.
        what: &'static str,
    },
    /// A length beyond its bound.
    #[error("{what} has a length of {length}, more than {limit}")]
    TooLong {
        /// What.
        what: &'static str,
        /// The length given.
        length: u64,
        /// The bound.
        limit: u64,
    },
    /// A value that has no meaning.
    #[error("{what} is {value}, which has no meaning here")]
    Value {
        /// What.
        what: &'static str,
        /// The value.
        value: u64,
    },
    /// A frame out of order.
    #[error("frame {got} came where frame {expected} was due")]
    Sequence {
        /// The number due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// A body that ends too early or too late.
    #[error("{what} is not as long as its contents say")]
    Length {
        /// What.
        what: &'static str,
    },
    /// A name that is not UTF-8.
    #[error("{what} is not valid text")]
    Text {
        /// What.
        what: &'static str,
    },
    /// An encoded page that no encoder makes.
    #[error("a page: {source}")]
    Page {
        /// What is wrong with it.
        source: DecodeError,
    },
    /// Runs of a frame that are not in the order of RAM, each behind the one before.
    #[error("a run at offset {offset} of RAM block number {block} does not lie behind the run before it")]
    Order {
        /// The block's number.
        block: u16,
        /// First byte.
        offset: u64,
    },
    /// A run on a channel that its chunk does not travel on.
    #[error("a run of {length} bytes at offset {offset} of RAM block number {block} does not belong to this channel")]
    Channel {
        /// The block's number.
        block: u16,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// A run of pages outside the machine's RAM.
    #[error("a run of {length} bytes at offset {offset} of RAM block number {block} lies outside this machine's RAM")]
    OutsideRam {
        /// The block's number.
        block: u16,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
}

/// Who it is that begins so, as far as that is known: a sentence's beginning, or nothing.
fn stranger(beginning: &str) -> &'static str {
    const KNOWN: [(&str, &str); 15] = [
        ("SSH-", "this is SSH; "),
        ("HTTP/", "this is an HTTP server; "),
        ("GET ", "this is an HTTP client; "),
        ("POST ", "this is an HTTP client; "),
        ("HEAD ", "this is an HTTP client; "),
        ("PRI * HTTP", "this is an HTTP client; "),
        ("\\x15\\x03", "this is TLS, which refuses what it was sent; "),
        ("\\x16\\x03", "this is TLS; "),
        ("QEVM", "this is a migration of QEMU; "),
        ("{\\\"QMP\\\"", "this is a QMP monitor; "),
        ("RFB ", "this is a VNC server; "),
        ("220 ", "this is a mail or FTP server; "),
        ("* OK", "this is a mail server; "),
        ("+OK", "this is a mail server; "),
        ("-ERR", "this is a Redis or mail server; "),
    ];
    KNOWN.iter().find(|(known, _)| beginning.starts_with(known)).map_or("", |(_, who)| who)
}
