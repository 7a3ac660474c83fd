//! The versions of pages that the destination has, for `delta`: a channel's share of `xbzrle-cache-size`.
//!
//! A set-associative cache. A page is admitted from the second round on: the first round sends all of RAM once, and
//! what comes again is what is worth keeping. A page gives way only if neither the present round nor the one before
//! used it. So a working set that is larger than the cache keeps the part that has a place, and is not pushed through
//! it from one end to the other, as the least recently used would be: of a working set twice the cache's size half the
//! pages are hits instead of none.
//!
//! What must stay true: what is here is what was sent last on this channel, whatever kind it was sent as.

use crate::memory::PAGE_SIZE;
use crate::page::PageKind;
use crate::report::DeltaCounts;

const PAGE: usize = PAGE_SIZE as usize;
/// Places in which a page may be.
const WAYS: usize = 8;

#[derive(Debug, Default)]
struct Place {
    /// Block and page, plus one; zero is a free place.
    key: u64,
    /// The last round that sent it.
    used: u32,
    /// Empty until the place is first taken.
    page: Box<[u8]>,
}

/// The cache of one channel.
#[derive(Debug)]
pub(super) struct Versions {
    places: Vec<Place>,
    round: u32,
    pub(super) counts: DeltaCounts,
}

/// The page at `offset` of a block.
fn key(block: u16, offset: u64) -> u64 {
    ((u64::from(block) << 48) | ((offset / PAGE_SIZE) & 0xffff_ffff_ffff)).wrapping_add(1)
}

impl Versions {
    /// A cache of at most `bytes` of pages.
    pub(super) fn new(bytes: u64) -> Self {
        let sets = usize::try_from(bytes / PAGE_SIZE).unwrap_or(0) / WAYS;
        let places = std::iter::repeat_with(Place::default).take(sets * WAYS).collect();
        Self { places, round: 0, counts: DeltaCounts::default() }
    }

    /// A round begins.
    pub(super) fn begin(&mut self, round: u32) {
        self.round = round;
    }

    /// The places where a page may be.
    fn set(&self, key: u64) -> std::ops::Range<usize> {
        let sets = (self.places.len() / WAYS).max(1) as u64;
        // Neighbours go to different sets; a large stride does not go to the same one.
        let hash = key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
        let first = (hash % sets) as usize * WAYS;
        first..(first + WAYS).min(self.places.len())
    }

    fn find(&self, key: u64) -> Option<usize> {
        let set = self.set(key);
        let places = self.places.get(set.clone())?;
        places.iter().position(|place| place.key == key).map(|way| set.start + way)
    }

    /// The version that the destination has.
    pub(super) fn get(&self, block: u16, offset: u64) -> Option<&[u8]> {
        self.find(key(block, offset)).and_then(|place| self.places.get(place)).map(|place| &*place.page)
    }

    /// Whether pages sent in this round are kept.
    pub(super) fn admits(&self) -> bool {
        self.round >= 2
    }

    /// Pages of a block, from `offset` on, were sent as `kind` in `encoded` bytes.
    pub(super) fn sent(&mut self, kind: PageKind, block: u16, offset: u64, pages: &[u8], encoded: usize) {
        if !self.admits() {
            return;
        }
        if kind == PageKind::Delta {
            self.counts.saved_bytes += pages.len().saturating_sub(encoded) as u64;
        }
        for (page, offset) in pages.chunks_exact(PAGE).zip((offset..).step_by(PAGE)) {
            let key = key(block, offset);
            let known = self.find(key);
            match (kind, known) {
                (PageKind::Zero, None) => continue,
                (PageKind::Zero, _) => {}
                (PageKind::Delta, _) => self.counts.hits += 1,
                (_, Some(_)) => self.counts.overflows += 1,
                (_, None) => self.counts.misses += 1,
            }
            let Some(place) = known.or_else(|| self.admit(key)) else { continue };
            let Some(place) = self.places.get_mut(place) else { continue };
            place.used = self.round;
            if place.page.len() == page.len() {
                place.page.copy_from_slice(page);
            } else {
                place.page = page.into();
            }
        }
    }

    /// A place for a page that has none, if one is free or has not been used of late.
    fn admit(&mut self, key: u64) -> Option<usize> {
        let set = self.set(key);
        let round = self.round;
        let places = self.places.get_mut(set.clone())?;
        let (way, place) = places.iter_mut().enumerate().min_by_key(|(_, place)| (place.key != 0, place.used))?;
        if place.key != 0 && place.used.saturating_add(1) >= round {
            return None;
        }
        place.key = key;
        Some(set.start + way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(value: u8) -> Vec<u8> {
        vec![value; PAGE]
    }

    #[test]
    fn holds_what_was_sent_last() {
        let mut versions = Versions::new(1 << 20);
        versions.begin(1);
        versions.sent(PageKind::Plain, 0, 0, &page(1), PAGE);
        assert_eq!(versions.get(0, 0), None, "the first round passes by");
        versions.begin(2);
        versions.sent(PageKind::Plain, 0, 0, &page(2), PAGE);
        versions.sent(PageKind::Plain, 1, 0, &page(3), PAGE);
        assert_eq!(versions.get(0, 0), Some(&page(2)[..]));
        assert_eq!(versions.get(1, 0), Some(&page(3)[..]));
        versions.sent(PageKind::Plain, 0, 0, &page(4), PAGE);
        assert_eq!(versions.get(0, 0), Some(&page(4)[..]));
        assert_eq!(versions.get(0, PAGE_SIZE), None);
        // Zeros replace what is there, and take no place of their own.
        versions.sent(PageKind::Zero, 0, 0, &page(0), PAGE);
        versions.sent(PageKind::Zero, 0, PAGE_SIZE, &page(0), PAGE);
        assert_eq!((versions.get(0, 0), versions.get(0, PAGE_SIZE)), (Some(&page(0)[..]), None));
    }

    #[test]
    fn no_room_no_pages() {
        let mut versions = Versions::new(PAGE_SIZE * WAYS as u64 - 1);
        versions.begin(2);
        versions.sent(PageKind::Plain, 0, 0, &page(1), PAGE);
        assert_eq!(versions.get(0, 0), None);
    }

    /// A working set of twice the cache's size, swept in every round: the part that found a place keeps it. When the
    /// working set moves on, the new one takes over within three rounds.
    #[test]
    fn keeps_its_part_of_a_large_working_set() {
        const PAGES: u64 = 4096;
        let mut versions = Versions::new(PAGES / 2 * PAGE_SIZE);
        let mut sweep = |round: u32, from: u64| {
            versions.begin(round);
            let hits = (from..from + PAGES).filter(|n| versions.get(0, n * PAGE_SIZE).is_some()).count();
            (from..from + PAGES)
                .for_each(|n| versions.sent(PageKind::Plain, 0, n * PAGE_SIZE, &page(round as u8), PAGE));
            hits as f64 / PAGES as f64
        };
        assert!(sweep(2, 0) < 0.001);
        for round in 3..10 {
            let hits = sweep(round, 0);
            assert!(hits > 0.45, "round {round}: {hits}");
        }
        for round in 10..13 {
            sweep(round, 1 << 20);
        }
        assert!(sweep(13, 1 << 20) > 0.45);
    }
}
