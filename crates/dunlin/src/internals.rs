//! Page kinds and parsers on their own, and ways of migrating to compare with, for this project's benches and fuzz targets.
//! Nothing here is a promise: it is there only with the feature `internals`.

use std::sync::Arc;
use std::time::Duration;

use crate::error::MigrationError;
use crate::source::ThrottlePolicy;
use crate::{Guest, Parameters, Source, Uri};

use crate::memory::{MemoryError, RamBlock};
use crate::page::{self, Compression, Decoder, Encoder, Encodings, Link, Out, PageKind};
use crate::wire::{
    DataDigest, FrameHeader, FrameType, HEADER_BYTES, HELLO_BYTES, Hello, HelloReply, Message, REPLY_BYTES,
    check_beginning, decode_runs,
};

/// The most pages in bytes that are encoded as one.
pub const MAX_UNIT_BYTES: usize = page::MAX_UNIT_BYTES;

/// What pages may be compressed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compressor {
    /// Nothing.
    None,
    /// LZ4.
    Lz4,
    /// Zstandard of this level.
    Zstd(i32),
}

/// An encoder and a decoder of pages, on a link so slow that every byte saved is worth it.
#[derive(Debug)]
pub struct Codec {
    encoder: Encoder,
    decoder: Decoder,
    link: Link,
    encodings: Encodings,
    runs: Vec<(PageKind, u64, usize, usize)>,
}

struct Collecting<'a> {
    runs: &'a mut Vec<(PageKind, u64, usize, usize)>,
    old: Option<&'a [u8]>,
}

impl Out for Collecting<'_> {
    fn push(&mut self, kind: PageKind, offset: u64, pages: &[u8], encoded: usize) {
        self.runs.push((kind, offset, pages.len(), encoded));
    }

    fn sent_before(&mut self, offset: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.old?.get(start..start.checked_add(crate::memory::PAGE_SIZE as usize)?)
    }
}

impl Codec {
    /// # Errors
    /// When a compressor's library has no memory.
    pub fn new(compressor: Compressor) -> std::io::Result<Self> {
        let encoder = Encoder::new(match compressor {
            Compressor::None => Compression::None,
            Compressor::Lz4 => Compression::Lz4,
            Compressor::Zstd(level) => Compression::Zstd { level },
        })?;
        let mut link = Link::default();
        let hour = Duration::from_secs(3600);
        link.sent(1 << 30, hour, hour, false);
        Ok(Self { encoder, decoder: Decoder::default(), link, encodings: Encodings::default(), runs: Vec::new() })
    }

    /// Encodes `pages`, whole ones and at most [`MAX_UNIT_BYTES`]; with `old`, the pages as they were sent before, as deltas
    /// where these are short. Gives the bytes it takes.
    pub fn encode(&mut self, pages: &[u8], old: Option<&[u8]>) -> usize {
        self.encodings.clear();
        self.runs.clear();
        self.encodings.room(pages.len()).copy_from_slice(pages);
        let mut out = Collecting { runs: &mut self.runs, old };
        self.encoder.worked(Duration::from_secs(1));
        self.encoder.encode(&mut self.encodings, pages.len(), 0, &self.link, &mut out);
        self.encodings.as_slice().len()
    }

    /// What was encoded last.
    pub fn encoded(&self) -> &[u8] {
        self.encodings.as_slice()
    }

    /// Decodes what was encoded last into `block`, from `offset` on; whether all of it could be decoded.
    pub fn decode(&mut self, block: &RamBlock, offset: u64) -> bool {
        let mut rest = self.encodings.as_slice();
        self.runs.iter().all(|(kind, at, length, encoded)| {
            let Some((own, behind)) = rest.split_at_checked(*encoded) else { return false };
            rest = behind;
            self.decoder.decode(*kind, own, block, offset.saturating_add(*at), *length).is_ok()
        })
    }
}

/// Whether a page of `block` is all zeros.
///
/// # Errors
/// When it reaches outside the block.
pub fn is_zero(block: &RamBlock, offset: u64, length: u64) -> Result<bool, MemoryError> {
    block.is_zero(offset..offset.saturating_add(length))
}

/// The checksum of pages.
pub fn checksum(pages: &[u8]) -> u64 {
    let mut digest = DataDigest::default();
    digest.update(pages);
    digest.value()
}

/// Appends what turns one page into another to `encoded`, if it takes at most `limit` bytes.
pub fn encode_delta(old: &[u8; 4096], new: &[u8; 4096], limit: usize, encoded: &mut Vec<u8>) -> bool {
    page::delta::encode(old, new, limit, encoded)
}

/// Decodes any bytes as a page of the kind of that number into `block`, as the wire would let them through: whether they
/// were taken for a page.
pub fn decode_as(number: u8, encoded: &[u8], block: &RamBlock, offset: u64, length: u32) -> bool {
    let Some(kind) = PageKind::from_number(number) else { return false };
    let accepted = u32::try_from(encoded.len()).is_ok_and(|encoded| kind.accepts(length, encoded));
    accepted && Decoder::default().decode(kind, encoded, block, offset, length as usize).is_ok()
}

/// Parses any bytes as the beginning of a connection, whose checksum is made right first; whether they are one.
pub fn parse_greeting(bytes: &[u8]) -> bool {
    let _ = check_beginning(bytes);
    let hello = bytes.first_chunk::<HELLO_BYTES>().is_some_and(|bytes| Hello::decode(&sealed(*bytes)).is_ok());
    hello || bytes.first_chunk::<REPLY_BYTES>().is_some_and(|bytes| HelloReply::decode(&sealed(*bytes)).is_ok())
}

/// With the checksum of what is before them in the last four bytes.
fn sealed<const N: usize>(mut bytes: [u8; N]) -> [u8; N] {
    if let Some((body, sum)) = bytes.split_last_chunk_mut::<4>() {
        *sum = crate::wire::table_checksum(body).to_le_bytes();
    }
    bytes
}

/// Parses any bytes as a frame: a header, whose checksum is made right first, and what follows it as its table and body.
/// Whether it would be taken. What is taken and encoded again is the same bytes.
pub fn parse_frame(bytes: &[u8], block_bytes: &[u64]) -> bool {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return false };
    let header = sealed(*header);
    let sequence =
        header.get(8..16).and_then(|bytes| bytes.first_chunk::<8>()).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let Ok(header) = FrameHeader::decode(&header, sequence) else { return false };
    if header.frame_type == FrameType::Pages {
        let table = rest.get(..header.table_length as usize).unwrap_or(rest);
        return decode_runs(table, header.data_length, block_bytes, &mut Vec::new()).is_ok();
    }
    match Message::decode(header.frame_type, rest) {
        Ok(message) => {
            assert_eq!(message.encode(), rest, "what decodes, encodes back");
            true
        }
        Err(_) => false,
    }
}

/// As [`Source::start`], but `auto-converge` slows all vCPUs alike and step by step, as QEMU 10 does: when two rounds have left
/// more than `throttle-trigger-threshold` percent of what they sent dirty, by `cpu-throttle-initial`, and then by
/// `cpu-throttle-increment` more each time, up to `max-cpu-throttle`.
///
/// # Errors
/// As [`Source::start`].
pub fn start_with_fixed_steps(
    guest: &Arc<Guest>,
    uri: &Uri,
    parameters: &Parameters,
) -> Result<Source, MigrationError> {
    Source::start_with(guest, uri, parameters, ThrottlePolicy::FixedSteps)
}
