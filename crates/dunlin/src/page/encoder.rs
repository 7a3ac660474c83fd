//! Choosing the kind of each page, by the table's order.
//!
//! A compressor is used where it pays: its time and the time its output takes on the link must be less than the time
//! the pages take as they are. So it never holds up a link that has room, and memory that does not shrink costs a
//! look now and then.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::{MAX_UNIT_BYTES, PageKind, delta, lz4, zero, zstd};
use crate::memory::{MemoryError, PAGE_SIZE, RamBlock};

const PAGE: usize = PAGE_SIZE as usize;
/// A unit is worth compressing if it then takes at most this part of its bytes.
const WORTH: f64 = 0.9;
/// After this many units in a row that were not worth it, the next look is this many units away. 64 units are 4 MiB.
const LONGEST_PAUSE: u32 = 64;
/// A delta longer than this part of a page is not better than what comes after it in the table.
const LONGEST_DELTA: usize = PAGE / 2;

/// What a page is compressed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Compression {
    /// Nothing.
    #[default]
    None,
    /// LZ4.
    Lz4,
    /// Zstandard of this level.
    Zstd {
        /// -131072 to 22; the higher the shorter and the slower.
        level: i32,
    },
}

/// What becomes of the pages that are encoded.
pub(crate) trait Out {
    /// `pages`, which are at `offset` of the block, are encoded next, in `encoded` bytes.
    fn push(&mut self, kind: PageKind, offset: u64, pages: &[u8], encoded: usize);
    /// The version of the page at `offset` that the destination has, if it is known.
    fn sent_before(&mut self, offset: u64) -> Option<&[u8]>;
}

/// Encodings, one behind the other. Pages are copied into the room behind them and encoded there, so that what
/// travels as it is, is copied once.
#[derive(Debug, Default)]
pub(crate) struct Encodings {
    bytes: Vec<u8>,
    used: usize,
}

impl Encodings {
    /// Room for `length` bytes of pages behind what there is.
    pub(crate) fn room(&mut self, length: usize) -> &mut [u8] {
        let end = self.used.saturating_add(length);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes.get_mut(self.used..end).unwrap_or_default()
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.used).unwrap_or_default()
    }

    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }

    /// Appends an encoding of pages that are in the room, and as many bytes at least as it is long.
    fn put(&mut self, encoding: &[u8]) {
        self.room(encoding.len()).copy_from_slice(encoding);
        self.used += encoding.len();
    }

    /// Appends pages that are in the room.
    fn keep(&mut self, pages: Range<usize>) {
        let length = pages.len();
        if pages.start != self.used {
            self.bytes.copy_within(pages, self.used);
        }
        self.used += length;
    }
}

/// Chooses the kinds of pages that are to be sent from where they are, in runs: zero or plain.
///
/// # Errors
/// When `bytes` reaches outside the block.
pub(crate) fn survey(
    block: &RamBlock,
    bytes: Range<u64>,
    mut found: impl FnMut(PageKind, Range<u64>),
) -> Result<(), MemoryError> {
    let mut run = (PageKind::Plain, bytes.start..bytes.start);
    for at in bytes.step_by(PAGE) {
        // Most pages that are not zero show it in their first word: a loop so short has many of them on their way from
        // memory at once.
        let mut beginning = [0; 8];
        block.read(at, &mut beginning)?;
        let zero = beginning == [0; 8] && block.is_zero(at..at.saturating_add(PAGE_SIZE))?;
        let kind = if zero { PageKind::Zero } else { PageKind::Plain };
        if kind != run.0 && !run.1.is_empty() {
            found(run.0, run.1.clone());
            run.1.start = at;
        }
        run = (kind, run.1.start..at.saturating_add(PAGE_SIZE));
    }
    if !run.1.is_empty() {
        found(run.0, run.1);
    }
    Ok(())
}

/// How long a byte takes on the link, as measured by who sends.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Link {
    nanoseconds_a_byte: f64,
    /// Bytes sent so far.
    sent_bytes: u64,
}

impl Link {
    /// `bytes` took `time` to send.
    pub(crate) fn sent(&mut self, bytes: u64, time: Duration) {
        /// The measurement follows the link within about this much.
        const MEMORY_BYTES: f64 = (4u32 << 20) as f64;
        let weight = (bytes as f64 / MEMORY_BYTES).min(1.0);
        let now = time.as_nanos() as f64 / (bytes as f64).max(1.0);
        self.nanoseconds_a_byte += (now - self.nanoseconds_a_byte) * weight;
        self.sent_bytes = self.sent_bytes.saturating_add(bytes);
    }

    /// The most bytes that are to be sent at once: what the link carries in about `time`, and no more than `unknown` as long
    /// as that is not known.
    pub(crate) fn bytes_within(&self, time: Duration, unknown: u64) -> u64 {
        if self.sent_bytes < unknown.saturating_mul(4) {
            return unknown;
        }
        (time.as_nanos() as f64 / self.nanoseconds_a_byte.max(1e-6)) as u64
    }
}

/// A channel's encoders.
pub(crate) struct Encoder {
    compressor: Compressor,
    /// Units to send as they are before the next look, and how many it was the last time.
    pause: u32,
    last_pause: u32,
    /// Encodings being made.
    delta: Vec<u8>,
    compressed: Vec<u8>,
}

enum Compressor {
    None,
    Lz4,
    Zstd(zstd::Encoder),
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("pause", &self.pause).finish_non_exhaustive()
    }
}

impl Encoder {
    /// # Errors
    /// When a compressor's library has no memory.
    pub(crate) fn new(compression: Compression) -> std::io::Result<Self> {
        let compressor = match compression {
            Compression::None => Compressor::None,
            Compression::Lz4 => Compressor::Lz4,
            Compression::Zstd { level } => Compressor::Zstd(zstd::Encoder::new(level)?),
        };
        Ok(Self { compressor, pause: 0, last_pause: 0, delta: Vec::new(), compressed: Vec::new() })
    }

    /// Whether there is a compressor.
    pub(crate) fn compresses(&self) -> bool {
        !matches!(self.compressor, Compressor::None)
    }

    /// Encodes the `length` bytes of pages, at most [`MAX_UNIT_BYTES`], that have been copied into the room of
    /// `encodings`. They are at `offset` of their block.
    pub(crate) fn encode(
        &mut self,
        encodings: &mut Encodings,
        length: usize,
        offset: u64,
        link: &Link,
        out: &mut impl Out,
    ) {
        debug_assert!(length <= MAX_UNIT_BYTES);
        let begin = encodings.used;
        let offset_of = |at: usize| offset.saturating_add((at - begin) as u64);
        // Pages that nothing cheaper took, up to the one at hand.
        let mut unit = begin..begin;
        for at in (begin..begin.saturating_add(length)).step_by(PAGE) {
            let page = encodings.bytes.get(at..at + PAGE).unwrap_or_default();
            let kind = if zero::is(page) {
                PageKind::Zero
            } else if let Some(old) = out.sent_before(offset_of(at)) {
                self.delta.clear();
                let fits = delta::encode(old, page, LONGEST_DELTA, &mut self.delta);
                if fits { PageKind::Delta } else { PageKind::Plain }
            } else {
                PageKind::Plain
            };
            if kind == PageKind::Plain {
                unit.end = at + PAGE;
                continue;
            }
            self.unit(encodings, unit.clone(), offset_of(unit.start), link, out);
            unit = at + PAGE..at + PAGE;
            let page = encodings.bytes.get(at..at + PAGE).unwrap_or_default();
            if kind == PageKind::Zero {
                out.push(kind, offset_of(at), page, 0);
            } else {
                out.push(kind, offset_of(at), page, self.delta.len());
                encodings.put(&self.delta);
            }
        }
        self.unit(encodings, unit.clone(), offset_of(unit.start), link, out);
    }

    /// Compresses pages as one unit, or leaves them as they are.
    fn unit(&mut self, encodings: &mut Encodings, unit: Range<usize>, offset: u64, link: &Link, out: &mut impl Out) {
        let pages = encodings.bytes.get(unit.clone()).unwrap_or_default();
        if pages.is_empty() {
            return;
        }
        match self.compress(pages, link) {
            Some(kind) => {
                out.push(kind, offset, pages, self.compressed.len());
                encodings.put(&self.compressed);
            }
            None => {
                out.push(PageKind::Plain, offset, pages, pages.len());
                encodings.keep(unit);
            }
        }
    }

    fn compress(&mut self, pages: &[u8], link: &Link) -> Option<PageKind> {
        if !self.compresses() {
            return None;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return None;
        }
        let began = Instant::now();
        self.compressed.clear();
        let limit = (pages.len() as f64 * WORTH) as usize;
        let (kind, fits) = match &mut self.compressor {
            Compressor::Zstd(encoder) => (PageKind::Zstd, encoder.encode(pages, limit, &mut self.compressed)),
            _ => (PageKind::Lz4, lz4::encode(pages, limit, &mut self.compressed)),
        };
        let saved = (pages.len() - self.compressed.len()) as f64 * link.nanoseconds_a_byte;
        if fits && saved > began.elapsed().as_nanos() as f64 {
            self.last_pause = 0;
        } else {
            self.last_pause = (self.last_pause * 2).clamp(1, LONGEST_PAUSE);
            self.pause = self.last_pause;
        }
        fits.then_some(kind)
    }
}
