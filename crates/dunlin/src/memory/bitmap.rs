//! The two-level dirty bitmap of one RAM block.
//!
//! Level one has a bit a page, level two a bit for each word of level one that may be non-zero. Walking follows
//! the upper level, so that its cost follows the dirty pages and not the size of RAM.
//!
//! What must stay true: a set page bit always has its summary bit set, or is about to get it from the thread that
//! set it. A reader therefore sees every page that was set before it was told to look (the caller orders the two,
//! as the end of a round does).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{CHUNK_PAGES, PAGE_SIZE};

const WORD_BITS: usize = u64::BITS as usize;
const CHUNK_WORDS: usize = CHUNK_PAGES / WORD_BITS;

/// Which pages of one RAM block are dirty.
#[derive(Debug)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
    pages: usize,
}

/// The dirty pages of one chunk, taken out of the bitmap: a bit a page, lowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkPages([u64; CHUNK_WORDS]);

fn zeroed(words: usize) -> Box<[AtomicU64]> {
    std::iter::repeat_with(AtomicU64::default).take(words).collect()
}

impl DirtyBitmap {
    /// A clean bitmap for a block of `block_bytes`, which is rounded up to whole pages.
    pub fn new(block_bytes: u64) -> Self {
        let pages = usize::try_from(block_bytes.div_ceil(PAGE_SIZE)).unwrap_or(usize::MAX);
        let words = pages.div_ceil(CHUNK_PAGES).saturating_mul(CHUNK_WORDS);
        Self { words: zeroed(words), summary: zeroed(words.div_ceil(WORD_BITS)), pages }
    }

    /// Pages in the block.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Chunks in the block; the last one may be short.
    pub fn chunks(&self) -> usize {
        self.pages.div_ceil(CHUNK_PAGES)
    }

    /// Marks the pages of `range` (page numbers, cut to the block's end) dirty.
    pub fn set(&self, range: Range<usize>) {
        let end = range.end.min(self.pages);
        let mut page = range.start;
        while page < end {
            let word = page / WORD_BITS;
            let first = page % WORD_BITS;
            let last = (end - word * WORD_BITS).min(WORD_BITS);
            let mask = (u64::MAX << first) & (u64::MAX >> (WORD_BITS - last));
            self.set_word(word, mask);
            page = (word + 1) * WORD_BITS;
        }
    }

    /// Marks the pages of `range` (page numbers) clean. The summary keeps its bits: it says what may be dirty.
    pub(crate) fn clear(&self, range: Range<usize>) {
        let mut page = range.start;
        while page < range.end {
            let word = page / WORD_BITS;
            let first = page % WORD_BITS;
            let last = (range.end - word * WORD_BITS).min(WORD_BITS);
            let mask = (u64::MAX << first) & (u64::MAX >> (WORD_BITS - last));
            match self.words.get(word) {
                // A look costs less than an exchange.
                Some(word) if word.load(Ordering::SeqCst) & mask != 0 => drop(word.fetch_and(!mask, Ordering::SeqCst)),
                Some(_) => {}
                None => return,
            }
            page = (word + 1) * WORD_BITS;
        }
    }

    fn set_word(&self, index: usize, mask: u64) {
        let (Some(word), Some(summary)) = (self.words.get(index), self.summary.get(index / WORD_BITS)) else {
            return;
        };
        // Sequentially consistent against `take_chunk`: the look at the summary must not overtake the write before it.
        word.fetch_or(mask, Ordering::SeqCst);
        let bit = 1 << (index % WORD_BITS);
        if summary.load(Ordering::SeqCst) & bit == 0 {
            summary.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Marks the pages dirty that `mask` has bits for, from page `index` times 64 on; what lies beyond the end is cut.
    pub(super) fn add_word(&self, index: usize, mask: u64) {
        let beyond = index.saturating_add(1).saturating_mul(WORD_BITS).saturating_sub(self.pages);
        let kept = u32::try_from(beyond).ok().and_then(|beyond| u64::MAX.checked_shr(beyond)).unwrap_or(0);
        if mask & kept != 0 {
            self.set_word(index, mask & kept);
        }
    }

    /// Marks in `other` what is dirty here.
    pub(crate) fn add_to(&self, other: &Self) {
        for (index, summary) in self.summary.iter().enumerate() {
            for bit in bits(summary.load(Ordering::SeqCst)) {
                let number = index * WORD_BITS + bit;
                other.add_word(number, self.words.get(number).map_or(0, |word| word.load(Ordering::SeqCst)));
            }
        }
    }

    /// Takes what is dirty in `chunk` and marks it in `other`.
    pub(super) fn move_chunk(&self, chunk: usize, other: &Self) {
        let ChunkPages(words) = self.take_chunk(chunk);
        for (number, word) in words.iter().enumerate() {
            other.add_word(chunk * CHUNK_WORDS + number, *word);
        }
    }

    /// Marks every page dirty.
    pub fn set_all(&self) {
        self.set(0..self.pages);
    }

    /// Number of dirty pages.
    pub fn count(&self) -> u64 {
        let mut total = 0;
        for (index, summary) in self.summary.iter().enumerate() {
            for bit in bits(summary.load(Ordering::Acquire)) {
                if let Some(word) = self.words.get(index * WORD_BITS + bit) {
                    total += u64::from(word.load(Ordering::Acquire).count_ones());
                }
            }
        }
        total
    }

    /// The chunks that have dirty pages, in ascending order, as the walk reaches them.
    pub fn dirty_chunks(&self) -> impl Iterator<Item = usize> + '_ {
        const CHUNKS: usize = WORD_BITS / CHUNK_WORDS;
        let words = self.summary.iter().enumerate().map(|(index, summary)| (index, summary.load(Ordering::Acquire)));
        words.filter(|(_, word)| *word != 0).flat_map(|(index, word)| {
            let dirty = (0..CHUNKS).filter(move |chunk| (word >> (chunk * CHUNK_WORDS)) & 0xff != 0);
            dirty.map(move |chunk| index * CHUNKS + chunk)
        })
    }

    /// Number of dirty pages in `chunk`.
    pub(crate) fn count_chunk(&self, chunk: usize) -> u64 {
        let first = chunk * CHUNK_WORDS;
        let words = self.words.get(first..first + CHUNK_WORDS).unwrap_or_default();
        words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Takes the dirty pages of `chunk` out of the bitmap.
    pub(crate) fn take_chunk(&self, chunk: usize) -> ChunkPages {
        let mut pages = [0; CHUNK_WORDS];
        let first = chunk * CHUNK_WORDS;
        if let Some(summary) = self.summary.get(first / WORD_BITS) {
            // The summary goes first: a page set in between has its summary bit set again and is not forgotten.
            summary.fetch_and(!(0xff << (first % WORD_BITS)), Ordering::SeqCst);
        }
        let words = self.words.get(first..first + CHUNK_WORDS).unwrap_or_default();
        for (taken, word) in pages.iter_mut().zip(words) {
            // A look costs less than an exchange, and most words have nothing.
            if word.load(Ordering::SeqCst) != 0 {
                *taken = word.swap(0, Ordering::SeqCst);
            }
        }
        ChunkPages(pages)
    }

    /// Takes all dirty pages out of the bitmap and gives them to `each`, as runs of page numbers that do not reach
    /// from one chunk into another, in ascending order.
    pub fn drain(&self, mut each: impl FnMut(Range<usize>)) {
        for chunk in self.dirty_chunks() {
            let first = chunk * CHUNK_PAGES;
            self.take_chunk(chunk).runs().for_each(|run| each(first + run.start..first + run.end));
        }
    }

    /// Whether any page of `range` is set.
    pub(crate) fn any(&self, range: Range<usize>) -> bool {
        range.into_iter().any(|page| self.contains(page..page + 1))
    }

    /// Whether every page of `range` is set. Pages beyond the end count as not set.
    pub fn contains(&self, range: Range<usize>) -> bool {
        range.into_iter().all(|page| {
            self.words
                .get(page / WORD_BITS)
                .is_some_and(|word| word.load(Ordering::Acquire) >> (page % WORD_BITS) & 1 == 1)
        })
    }
}

impl ChunkPages {
    /// Runs of contiguous dirty pages, as page numbers within the chunk.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.find(next, true)?;
            let end = self.find(start, false).unwrap_or(CHUNK_PAGES);
            next = end;
            Some(start..end)
        })
    }

    fn find(&self, from: usize, wanted: bool) -> Option<usize> {
        let first = from / WORD_BITS;
        for (index, &word) in self.0.iter().enumerate().skip(first) {
            let mut candidates = if wanted { word } else { !word };
            if index == first {
                candidates &= u64::MAX << (from % WORD_BITS);
            }
            if candidates != 0 {
                return Some(index * WORD_BITS + candidates.trailing_zeros() as usize);
            }
        }
        None
    }
}

fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let bit = word.trailing_zeros() as usize;
        word &= word - 1;
        Some(bit)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the plainest second implementation: a set of page numbers.
        #[test]
        fn agrees_with_a_set(
            pages in 1usize..3000,
            ranges in prop::collection::vec((0usize..3000, 0usize..700), 0..20),
            taken in prop::collection::vec(0usize..6, 0..4),
        ) {
            let bitmap = DirtyBitmap::new(pages as u64 * PAGE_SIZE);
            let mut model = BTreeSet::new();
            for (start, length) in ranges {
                bitmap.set(start..start + length);
                model.extend((start..start + length).filter(|p| *p < pages));
            }
            for chunk in taken {
                let base = chunk * CHUNK_PAGES;
                let got: Vec<usize> = bitmap.take_chunk(chunk).runs().flatten().map(|p| p + base).collect();
                let expected: Vec<usize> = model.range(base..base + CHUNK_PAGES).copied().collect();
                prop_assert_eq!(got, expected);
                model.retain(|p| p / CHUNK_PAGES != chunk);
            }
            prop_assert_eq!(bitmap.count(), model.len() as u64);
            let chunks: Vec<usize> = bitmap.dirty_chunks().collect();
            let expected: BTreeSet<usize> = model.iter().map(|p| p / CHUNK_PAGES).collect();
            prop_assert_eq!(chunks, expected.into_iter().collect::<Vec<_>>());
            let mut drained = Vec::new();
            bitmap.drain(|run| drained.extend(run));
            prop_assert_eq!(drained, model.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(bitmap.count(), 0);
        }
    }

    #[test]
    fn runs_do_not_touch() {
        let bitmap = DirtyBitmap::new(4 << 20);
        bitmap.set(3..70);
        bitmap.set(70..130);
        bitmap.set(131..512);
        let runs: Vec<_> = bitmap.take_chunk(0).runs().collect();
        assert_eq!(runs, [3..130, 131..512]);
        assert_eq!(bitmap.count(), 0);
    }

    /// Setters and a taker at work together lose no page and invent none.
    #[test]
    fn concurrent_setters_and_taker() {
        let bitmap = DirtyBitmap::new(64 << 20);
        let seen = std::thread::scope(|scope| {
            for thread in 0..2 {
                let bitmap = &bitmap;
                scope.spawn(move || {
                    for page in (thread..bitmap.pages()).step_by(2) {
                        bitmap.set(page..page + 1);
                    }
                });
            }
            let mut seen = vec![0u32; bitmap.pages()];
            let mut idle = 0;
            while idle < 2000 {
                let mut any = false;
                for chunk in bitmap.dirty_chunks().collect::<Vec<_>>() {
                    for page in bitmap.take_chunk(chunk).runs().flatten() {
                        seen[chunk * CHUNK_PAGES + page] += 1;
                        any = true;
                    }
                }
                idle = if any { 0 } else { idle + 1 };
                std::thread::yield_now();
            }
            seen
        });
        let rest: Vec<usize> = (0..bitmap.chunks())
            .flat_map(|c| bitmap.take_chunk(c).runs().flatten().map(move |p| c * CHUNK_PAGES + p).collect::<Vec<_>>())
            .collect();
        for (page, times) in seen.iter().enumerate() {
            assert_eq!(*times + u32::from(rest.contains(&page)), 1, "page {page}");
        }
    }
}
