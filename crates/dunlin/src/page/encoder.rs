//! Choosing the kind of each page, by the table's order.
//!
//! A compressor is used where it pays: its time and the time its output takes on the link must be less than the time
//! the pages take as they are. [`Trials`] decides that.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::trials::{Outcome, Trials};
use super::{MAX_UNIT_BYTES, PageKind, delta, lz4, zero, zstd};
use crate::link::thread_cpu_time;
use crate::memory::{MemoryError, PAGE_SIZE, RamBlock};
use crate::report::CompressionReport;

const PAGE: usize = PAGE_SIZE as usize;
/// A unit is worth compressing if it then takes at most this part of its bytes.
const WORTH: f64 = 0.9;
/// Levels of Zstandard to try before the one that was asked for. From each to the next it takes up to three times as long.
const ZSTD_LEVELS: &[i32] = &[1, 3, 5, 7, 9, 12, 15, 17, 19];
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
    /// Zstandard of this level, or of a lower one where that is quicker.
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
    /// Of these, those that the link takes, and not the destination.
    of_link: f64,
    /// Bytes sent so far.
    sent_bytes: u64,
}

impl Link {
    /// `bytes` took `time` to send, of which the link took `of_link`. They were `compressed`, or travelled as they are.
    pub(crate) fn sent(&mut self, bytes: u64, time: Duration, of_link: Duration, compressed: bool) {
        /// The measurement follows the link within about this much.
        const MEMORY_BYTES: f64 = (4u32 << 20) as f64;
        /// Compressed bytes that are sent at once say little: the link has had time to carry those before them. Only if it
        /// stays so has it become faster.
        const SAYS_LITTLE: f64 = 1.0 / 16.0;
        let weight = (bytes as f64 / MEMORY_BYTES).min(1.0);
        let a_byte = |time: Duration| time.as_nanos() as f64 / (bytes as f64).max(1.0);
        self.nanoseconds_a_byte += (a_byte(time) - self.nanoseconds_a_byte) * weight;
        let faster = a_byte(of_link) < self.of_link;
        let weight = if compressed && faster { weight * SAYS_LITTLE } else { weight };
        self.of_link += (a_byte(of_link) - self.of_link) * weight;
        self.sent_bytes = self.sent_bytes.saturating_add(bytes);
    }

    /// Whether the link, and not the destination's processors, is what the sender waits for, beyond doubt.
    pub(crate) fn is_slow(&self) -> bool {
        /// 50 MB/s, which a destination takes with a tenth of a processor.
        const SLOW: f64 = 20.0;
        self.of_link >= SLOW
    }

    /// What the link takes for `bytes`.
    #[cfg(test)]
    pub(crate) fn of(&self, bytes: usize) -> Duration {
        Duration::from_nanos((self.of_link * bytes as f64) as u64)
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
    trials: Trials,
    /// CPU time of the compressor.
    busy: Duration,
    /// Encodings being made.
    delta: Vec<u8>,
    compressed: Vec<u8>,
}

enum Compressor {
    None,
    Lz4,
    /// With the levels to choose from.
    Zstd(zstd::Encoder, Vec<i32>),
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("trials", &self.trials).finish_non_exhaustive()
    }
}

impl Encoder {
    /// # Errors
    /// When a compressor's library has no memory.
    pub(crate) fn new(compression: Compression) -> std::io::Result<Self> {
        let (compressor, steps) = match compression {
            Compression::None => (Compressor::None, 0),
            Compression::Lz4 => (Compressor::Lz4, 1),
            Compression::Zstd { level } => {
                let cheaper = ZSTD_LEVELS.iter().copied().filter(|cheaper| *cheaper < level);
                let levels: Vec<i32> = cheaper.chain([level]).collect();
                let steps = levels.len();
                (Compressor::Zstd(zstd::Encoder::new(levels.first().copied().unwrap_or(level))?, levels), steps)
            }
        };
        Ok(Self {
            compressor,
            trials: Trials::new(steps),
            busy: Duration::ZERO,
            delta: Vec::new(),
            compressed: Vec::new(),
        })
    }

    /// The worker has spent more time, on a processor and waiting for the link. Trials that do not pay take a small part of
    /// it.
    pub(crate) fn worked(&mut self, time: Duration) {
        self.trials.worked(time);
    }

    /// Whether the next pages would be compressed, or tried.
    pub(crate) fn is_due(&self) -> bool {
        self.trials.is_due(MAX_UNIT_BYTES)
    }

    /// Pages travel as they are that were not given to [`encode`](Self::encode).
    pub(crate) fn pass(&mut self) {
        self.trials.pass();
    }

    /// What the compressor did; `None` if there is none.
    pub(crate) fn counts(&self) -> Option<CompressionReport> {
        let level = match (&self.compressor, self.trials.in_use()) {
            (Compressor::None, _) => return None,
            (_, None) => None,
            (Compressor::Lz4, Some(_)) => Some(1),
            (Compressor::Zstd(_, levels), Some(step)) => levels.get(step).copied(),
        };
        Some(CompressionReport {
            busy_seconds: self.busy.as_secs_f64(),
            wasted_seconds: self.trials.wasted().as_secs_f64(),
            level,
        })
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
        let attempt = self.trials.next(pages.len())?;
        let (began, cpu) = (Instant::now(), thread_cpu_time());
        let limit = (pages.len() as f64 * WORTH) as usize;
        let mut fits = true;
        if attempt.looks_first {
            fits = self.compress_with(0, pages, limit);
        }
        fits = fits && self.compress_with(attempt.step, pages, limit);
        let cpu = thread_cpu_time().saturating_sub(cpu);
        let saved_bytes = if fits { pages.len().saturating_sub(self.compressed.len()) } else { 0 };
        self.busy = self.busy.saturating_add(cpu);
        let outcome = Outcome { bytes: pages.len(), saved_bytes, cpu, elapsed: began.elapsed() };
        self.trials.tried(attempt, outcome, link.of_link);
        let kind = if matches!(self.compressor, Compressor::Zstd(..)) { PageKind::Zstd } else { PageKind::Lz4 };
        fits.then_some(kind)
    }

    /// Compresses pages, if that takes at most `limit` bytes.
    fn compress_with(&mut self, step: usize, pages: &[u8], limit: usize) -> bool {
        self.compressed.clear();
        match &mut self.compressor {
            Compressor::None => false,
            Compressor::Lz4 => lz4::encode(pages, limit, &mut self.compressed),
            Compressor::Zstd(encoder, levels) => match levels.get(step) {
                Some(level) => encoder.encode(*level, pages, limit, &mut self.compressed),
                None => false,
            },
        }
    }
}
