//! Choosing the kind of each page, by the table's order.
//!
//! A compressor is used where it pays: its time and the time its output takes on the link must be less than the time
//! the pages take as they are. So it never holds up a link that has room, and memory that does not shrink costs a
//! look now and then.

use std::time::{Duration, Instant};

use super::{MAX_UNIT_BYTES, PageKind, delta, lz4, plain, zero, zstd};
use crate::memory::PAGE_SIZE;

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

/// Where encoded pages go.
pub(crate) trait Out {
    /// The bytes of encodings so far; an encoder appends to them.
    fn data(&mut self) -> &mut Vec<u8>;
    /// The last `encoded` bytes of the data encode `pages`, which are at `offset` of the block.
    fn push(&mut self, kind: PageKind, offset: u64, pages: &[u8], encoded: usize);
    /// The version of the page at `offset` that the destination has, if it is known.
    fn sent_before(&mut self, offset: u64) -> Option<&[u8]>;
}

/// How long a byte takes on the link, as measured by who sends.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Link {
    nanoseconds_a_byte: f64,
}

impl Link {
    /// `bytes` took `time` to send.
    pub(crate) fn sent(&mut self, bytes: u64, time: Duration) {
        /// The measurement follows the link within about this much.
        const MEMORY_BYTES: f64 = (4u32 << 20) as f64;
        let weight = (bytes as f64 / MEMORY_BYTES).min(1.0);
        let now = time.as_nanos() as f64 / (bytes as f64).max(1.0);
        self.nanoseconds_a_byte += (now - self.nanoseconds_a_byte) * weight;
    }
}

/// A channel's encoders.
pub(crate) struct Encoder {
    compressor: Compressor,
    /// Units to send as they are before the next look, and how many it was the last time.
    pause: u32,
    last_pause: u32,
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
        Ok(Self { compressor, pause: 0, last_pause: 0 })
    }

    /// Encodes `pages`, which are at `offset` of their block and at most [`MAX_UNIT_BYTES`], into `out`.
    pub(crate) fn encode(&mut self, pages: &[u8], offset: u64, link: &Link, out: &mut impl Out) {
        debug_assert!(pages.len() <= MAX_UNIT_BYTES);
        // Pages that nothing cheaper took, up to the one at hand.
        let mut unit = 0..0;
        for (index, page) in pages.chunks_exact(PAGE).enumerate() {
            let at = index * PAGE;
            let page_offset = offset.saturating_add(at as u64);
            if zero::is(page) {
                self.unit(pages.get(unit.clone()).unwrap_or_default(), offset + unit.start as u64, link, out);
                out.push(PageKind::Zero, page_offset, page, 0);
                unit = at + PAGE..at + PAGE;
                continue;
            }
            let mut taken = None;
            if out.sent_before(page_offset).is_some() {
                self.unit(pages.get(unit.clone()).unwrap_or_default(), offset + unit.start as u64, link, out);
                unit = at..at;
                let mut data = std::mem::take(out.data());
                let before = data.len();
                if let Some(old) = out.sent_before(page_offset)
                    && delta::encode(old, page, LONGEST_DELTA, &mut data)
                {
                    taken = Some(data.len() - before);
                }
                *out.data() = data;
            }
            match taken {
                Some(encoded) => {
                    out.push(PageKind::Delta, page_offset, page, encoded);
                    unit = at + PAGE..at + PAGE;
                }
                None => unit.end = at + PAGE,
            }
        }
        self.unit(pages.get(unit.clone()).unwrap_or_default(), offset + unit.start as u64, link, out);
    }

    /// Compresses pages as one unit, or sends them as they are.
    fn unit(&mut self, pages: &[u8], offset: u64, link: &Link, out: &mut impl Out) {
        if pages.is_empty() {
            return;
        }
        if let Some((kind, encoded)) = self.compress(pages, link, out.data()) {
            return out.push(kind, offset, pages, encoded);
        }
        plain::encode(pages, out.data());
        out.push(PageKind::Plain, offset, pages, pages.len());
    }

    fn compress(&mut self, pages: &[u8], link: &Link, data: &mut Vec<u8>) -> Option<(PageKind, usize)> {
        if matches!(self.compressor, Compressor::None) {
            return None;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return None;
        }
        let began = Instant::now();
        let before = data.len();
        let limit = (pages.len() as f64 * WORTH) as usize;
        let (kind, fits) = match &mut self.compressor {
            Compressor::Zstd(encoder) => (PageKind::Zstd, encoder.encode(pages, limit, data)),
            _ => (PageKind::Lz4, lz4::encode(pages, limit, data)),
        };
        let encoded = data.len() - before;
        let saved = (pages.len() - encoded) as f64 * link.nanoseconds_a_byte;
        if fits && saved > began.elapsed().as_nanos() as f64 {
            self.last_pause = 0;
        } else {
            self.last_pause = (self.last_pause * 2).clamp(1, LONGEST_PAUSE);
            self.pause = self.last_pause;
        }
        fits.then_some((kind, encoded))
    }
}
