//! The kinds a page can travel as: one file each, and the one table.
//!
//! [`KINDS`] is in the order in which kinds are tried, cheapest first: `zero`, `delta` against the version last sent,
//! `lz4` or `zstd` where one is asked for, `plain`, which takes every page. `encoder` chooses by it. A new kind is a
//! file and a row. What must stay true: a decoder given what its encoder made gives back the pages, byte for byte; a
//! decoder given anything else gives an error and touches nothing outside the run.

pub(crate) mod delta;
mod lz4;
mod plain;
mod zero;
mod zstd;

mod decoder;
mod encoder;
mod trials;

pub(crate) use decoder::{Decoder, PlaceError};
pub(crate) use encoder::{Compression, Encoder, Encodings, Link, Out, survey};

/// The most guest RAM that is compressed as one, which bounds a decoder's buffer.
pub(crate) const MAX_UNIT_BYTES: usize = 64 << 10;

/// The kind a page travels as. Its number is what the wire carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum PageKind {
    /// All zeros.
    Zero = 0,
    /// As it is.
    Plain = 1,
    /// What changed since the version last sent.
    Delta = 2,
    /// Compressed, an LZ4 block.
    Lz4 = 3,
    /// Compressed, a Zstandard frame.
    Zstd = 4,
}

/// Bytes that no encoder makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Of a delta.
    #[error("not a delta of a page")]
    Delta,
    /// Of an LZ4 block.
    #[error("not an LZ4 block of the length announced")]
    Lz4,
    /// Of a Zstandard frame.
    #[error("not a Zstandard frame of the length announced")]
    Zstd,
}

/// One row of the table.
struct Kind {
    kind: PageKind,
    /// The feature's name in the negotiation.
    feature: &'static str,
    /// Whether two runs next to each other are the same as one.
    joins: Joins,
    /// Whether a run of `length` bytes of RAM can be encoded in `encoded_length` bytes.
    accepts: fn(length: u32, encoded_length: u32) -> bool,
}

#[derive(PartialEq, Eq)]
enum Joins {
    Yes,
    No,
}

/// All kinds, in the order in which they are tried.
static KINDS: &[Kind] = &[
    Kind { kind: PageKind::Zero, feature: "page-zero", joins: Joins::Yes, accepts: zero::accepts },
    Kind { kind: PageKind::Delta, feature: "page-delta", joins: Joins::No, accepts: delta::accepts },
    Kind { kind: PageKind::Lz4, feature: "page-lz4", joins: Joins::No, accepts: lz4::accepts },
    Kind { kind: PageKind::Zstd, feature: "page-zstd", joins: Joins::No, accepts: zstd::accepts },
    Kind { kind: PageKind::Plain, feature: "page-plain", joins: Joins::Yes, accepts: plain::accepts },
];

impl PageKind {
    /// How many there are; their numbers are below.
    pub(crate) const COUNT: usize = 5;

    /// The wire's number.
    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    fn row(self) -> Option<&'static Kind> {
        KINDS.iter().find(|row| row.kind == self)
    }

    /// The kind of that number.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        KINDS.iter().map(|row| row.kind).find(|kind| kind.number() == number)
    }

    /// Whether a run of `length` bytes of RAM can be encoded in `encoded_length` bytes.
    pub(crate) fn accepts(self, length: u32, encoded_length: u32) -> bool {
        self.row().is_some_and(|row| (row.accepts)(length, encoded_length))
    }

    /// Whether two runs of it that are next to each other may travel as one.
    pub(crate) fn joins(self) -> bool {
        self.row().is_some_and(|row| row.joins == Joins::Yes)
    }

    /// The feature's name in the negotiation.
    pub(crate) fn feature(self) -> &'static str {
        self.row().map_or("", |row| row.feature)
    }
}

/// The features that stand for page kinds.
pub(crate) fn features() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|row| row.feature)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;
    use std::time::Duration;

    use proptest::prelude::*;
    use vm_memory::MmapRegion;

    use super::*;
    use crate::memory::{PAGE_SIZE, RamBlock};

    const PAGE: usize = PAGE_SIZE as usize;
    const PAGES: usize = 16;

    #[test]
    fn numbers_are_the_wire_s() {
        for row in KINDS {
            assert_eq!(PageKind::from_number(row.kind.number()), Some(row.kind));
        }
        let mut numbers: Vec<u8> = KINDS.iter().map(|row| row.kind.number()).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..PageKind::COUNT as u8).collect::<Vec<_>>());
        assert_eq!(PageKind::from_number(PageKind::COUNT as u8), None);
    }

    /// What the encoder says of each run, and the versions it may use.
    #[derive(Default)]
    struct Collected {
        runs: Vec<(PageKind, u64, usize, usize)>,
        versions: HashMap<u64, Vec<u8>>,
    }

    impl Out for Collected {
        fn push(&mut self, kind: PageKind, offset: u64, pages: &[u8], encoded: usize) {
            self.runs.push((kind, offset, pages.len(), encoded));
        }

        fn sent_before(&mut self, offset: u64) -> Option<&[u8]> {
            self.versions.get(&offset).map(Vec::as_slice)
        }
    }

    /// Encodes pages from offset 0 on.
    fn encode(encoder: &mut Encoder, pages: &[u8], link: &Link, out: &mut Collected) -> Vec<u8> {
        let mut encodings = Encodings::default();
        encodings.room(pages.len()).copy_from_slice(pages);
        // Sending it takes what it takes.
        encoder.worked(link.of(pages.len()).max(Duration::from_micros(10)));
        encoder.encode(&mut encodings, pages.len(), 0, link, out);
        encodings.as_slice().to_vec()
    }

    fn block() -> RamBlock {
        let region = MmapRegion::<()>::new(PAGES * PAGE).unwrap();
        RamBlock::new("ram", Arc::new(region)).unwrap()
    }

    fn slow_link() -> Link {
        let mut link = Link::default();
        let minute = Duration::from_secs(60);
        link.sent(64 << 20, minute, minute, false);
        link
    }

    /// Zero, random, text, or the same as before but for some bytes.
    fn page() -> impl Strategy<Value = (u8, Vec<u8>)> {
        (0u8..4, any::<u64>()).prop_map(|(kind, seed)| {
            let random = |n: usize| (seed ^ n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
            let bytes = match kind {
                0 => vec![0; PAGE],
                1 => (0..PAGE).map(|n| random(n) as u8).collect(),
                _ => b"the page of a guest ".iter().copied().cycle().skip(random(1) as usize % 20).take(PAGE).collect(),
            };
            (kind, bytes)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the pages and whatever is asked for, decoding gives the pages, and every run is one the wire takes.
        #[test]
        fn round_trip(
            pages in proptest::collection::vec(page(), PAGES),
            compression in prop::sample::select(vec![
                Compression::None,
                Compression::Lz4,
                Compression::Zstd { level: 1 },
                Compression::Zstd { level: -5 },
                Compression::Zstd { level: 19 },
            ]),
            known in proptest::collection::vec(any::<bool>(), PAGES),
        ) {
            let block = block();
            let mut out = Collected::default();
            for (n, ((kind, bytes), known)) in pages.iter().zip(known).enumerate() {
                if known {
                    let mut old = bytes.clone();
                    old[n * 7] ^= 1;
                    if *kind == 1 {
                        old.reverse();
                    }
                    block.write((n * PAGE) as u64, &old).unwrap();
                    out.versions.insert((n * PAGE) as u64, old);
                }
            }
            let all: Vec<u8> = pages.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
            let data = encode(&mut Encoder::new(compression).unwrap(), &all, &slow_link(), &mut out);

            let (mut at, mut done) = (0, 0);
            let mut decoder = Decoder::default();
            for (kind, offset, length, encoded) in out.runs {
                prop_assert_eq!(offset as usize, done, "runs are in order and without gaps");
                prop_assert!(kind.accepts(length as u32, encoded as u32), "{:?} {} {}", kind, length, encoded);
                decoder.decode(kind, &data[at..at + encoded], &block, offset, length).unwrap();
                at += encoded;
                done += length;
            }
            prop_assert_eq!((at, done), (data.len(), PAGES * PAGE));
            let mut ram = vec![0; PAGES * PAGE];
            block.read(0, &mut ram).unwrap();
            prop_assert!(ram == all, "RAM is not what was encoded");
        }

        /// Any bytes as any kind: an error, or pages; nothing outside the run changes.
        #[test]
        fn anything_decodes_or_is_refused(
            kind in prop::sample::select(vec![PageKind::Delta, PageKind::Lz4, PageKind::Zstd]),
            encoded in proptest::collection::vec(any::<u8>(), 0..300),
            pages in 1..4usize,
        ) {
            let block = block();
            block.write(0, &[7; PAGES * PAGE]).unwrap();
            let length = if kind == PageKind::Delta { PAGE } else { pages * PAGE };
            let _ = Decoder::default().decode(kind, &encoded, &block, PAGE_SIZE, length);
            let mut ram = vec![0; PAGES * PAGE];
            block.read(0, &mut ram).unwrap();
            prop_assert!(ram[..PAGE].iter().chain(&ram[PAGE + length..]).all(|byte| *byte == 7));
        }
    }

    /// Looking at pages where they are finds the kinds that copying and encoding them finds.
    #[test]
    fn surveys() {
        let block = block();
        let mut random = 1u64;
        for number in 0..PAGES as u64 {
            random = random.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17);
            match random % 4 {
                0 | 1 => {}
                2 => block.write(number * PAGE_SIZE, &[1]).unwrap(),
                _ => block.write(number * PAGE_SIZE + PAGE_SIZE - 1, &[1]).unwrap(),
            }
        }
        let mut pages = vec![0; PAGES * PAGE];
        block.read(0, &mut pages).unwrap();
        let mut out = Collected::default();
        encode(&mut Encoder::new(Compression::None).unwrap(), &pages, &slow_link(), &mut out);
        let by_page = |runs: &[(PageKind, u64, usize)]| -> Vec<(PageKind, u64)> {
            let pages = |run: &(PageKind, u64, usize)| (run.0, run.1..run.1 + run.2 as u64);
            runs.iter().map(pages).flat_map(|(kind, run)| run.step_by(PAGE).map(move |at| (kind, at))).collect()
        };
        let mut found = Vec::new();
        survey(&block, 0..(PAGES * PAGE) as u64, |kind, run| {
            found.push((kind, run.start, (run.end - run.start) as usize))
        })
        .unwrap();
        let encoded: Vec<_> = out.runs.iter().map(|(kind, offset, length, _)| (*kind, *offset, *length)).collect();
        assert_eq!(by_page(&found), by_page(&encoded));
        assert!(found.windows(2).all(|pair| pair[0].0 != pair[1].0), "in runs as long as they can be: {found:?}");
        assert!(survey(&block, 0..(PAGES as u64 + 1) * PAGE_SIZE, |_, _| {}).is_err());
    }

    #[test]
    fn the_cheapest_that_is_enough() {
        let text: Vec<u8> = b"a guest writes words ".iter().copied().cycle().take(2 * PAGE).collect();
        let random: Vec<u8> = (0..PAGE as u64).map(|n| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8).collect();
        let all = [vec![0; PAGE], text.clone(), random.clone(), random, text].concat();
        let mut out = Collected::default();
        let mut old = all[3 * PAGE..4 * PAGE].to_vec();
        old[9] ^= 1;
        out.versions.insert(3 * PAGE_SIZE, old);
        encode(&mut Encoder::new(Compression::Lz4).unwrap(), &all, &slow_link(), &mut out);
        let kinds: Vec<_> = out.runs.iter().map(|(kind, _, length, _)| (*kind, length / PAGE)).collect();
        use PageKind::{Delta, Lz4, Zero};
        assert_eq!(kinds, [(Zero, 1), (Lz4, 2), (Delta, 1), (Lz4, 3)], "{kinds:?}");
    }

    fn text() -> Vec<u8> {
        b"a guest writes words ".iter().copied().cycle().take(MAX_UNIT_BYTES).collect()
    }

    fn random() -> Vec<u8> {
        let mut state = 1u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        (0..MAX_UNIT_BYTES).map(|_| next()).collect()
    }

    const ALL: [Compression; 5] = [
        Compression::Lz4,
        Compression::Zstd { level: -5 },
        Compression::Zstd { level: 1 },
        Compression::Zstd { level: 9 },
        Compression::Zstd { level: 22 },
    ];

    /// On a slow link everything that shrinks is compressed, at the level that was asked for.
    #[test]
    fn compresses_on_a_slow_link() {
        for compression in ALL {
            let mut encoder = Encoder::new(compression).unwrap();
            let mut out = Collected::default();
            (0..100).for_each(|_| drop(encode(&mut encoder, &text(), &slow_link(), &mut out)));
            let compressed = out.runs.iter().filter(|(kind, ..)| *kind != PageKind::Plain).count();
            assert_eq!(compressed, 100, "{compression:?}");
            let wanted = if let Compression::Zstd { level } = compression { level } else { 1 };
            assert_eq!(encoder.counts().unwrap().level, Some(wanted));
            (0..1000).for_each(|_| drop(encode(&mut encoder, &random(), &slow_link(), &mut out)));
            assert_eq!(encoder.counts().unwrap().level, None);
        }
    }

    /// On a link with room real compressors waste next to nothing, whatever the level and the pages.
    #[test]
    fn wastes_little_on_a_link_with_room() {
        for compression in ALL {
            for pages in [text(), random()] {
                let mut encoder = Encoder::new(compression).unwrap();
                let mut out = Collected::default();
                let units = 20_000u32;
                (0..units).for_each(|_| drop(encode(&mut encoder, &pages, &Link::default(), &mut out)));
                // The worker takes 10 us a unit besides.
                let (counts, others) = (encoder.counts().unwrap(), 1e-5 * f64::from(units));
                assert!(counts.wasted_seconds > 0.0, "{compression:?} was never tried");
                assert_eq!((counts.wasted_seconds, counts.level), (counts.busy_seconds, None), "{compression:?}");
                let part = counts.busy_seconds / (others + counts.busy_seconds);
                assert!(part < 0.05, "{compression:?}: {:.1} % of the time", part * 100.0);
            }
        }
    }
}
