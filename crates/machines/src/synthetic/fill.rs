//! What RAM holds before the first step: a mix of kinds, decided for each 64 KiB by the seed.

use std::fmt;
use std::str::FromStr;

use dunlin::memory::{MemoryError, RamBlock};
use serde::{Deserialize, Serialize};

use super::content::{self, Page};
use super::program::mix;
use super::{Backing, PAGE_BYTES, SyntheticError, system};

/// Pages that are of the same kind together, as memory in real machines is.
const GROUP_PAGES: u64 = 16;

/// What RAM holds at the start, in percent of it. The rest up to 100 is text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    zero: u8,
    random: u8,
}

/// A fill that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("fill {text:?}: {problem}; write for instance zero:50,random:30,text:20, adding up to 100")]
pub struct FillError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

/// The kind of a group of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Random,
    Text,
}

impl Default for Fill {
    fn default() -> Self {
        Self { zero: 50, random: 30 }
    }
}

impl FromStr for Fill {
    type Err = FillError;

    fn from_str(text: &str) -> Result<Self, FillError> {
        let error = |problem: String| FillError { text: text.to_owned(), problem };
        let (mut zero, mut random, mut words) = (None, None, None);
        for part in text.split(',') {
            let (kind, percent) = part.split_once(':').ok_or_else(|| error(format!("{part:?} is not KIND:PERCENT")))?;
            let percent: u8 = percent
                .trim()
                .parse()
                .ok()
                .filter(|percent| *percent <= 100)
                .ok_or_else(|| error(format!("{percent:?} is not a percentage")))?;
            let slot = match kind.trim() {
                "zero" => &mut zero,
                "random" => &mut random,
                "text" => &mut words,
                _ => return Err(error(format!("there is no kind {kind:?}: zero, random and text are"))),
            };
            if slot.replace(percent).is_some() {
                return Err(error(format!("{kind} stands twice")));
            }
        }
        let (zero, random, words) = (zero.unwrap_or(0), random.unwrap_or(0), words.unwrap_or(0));
        match u16::from(zero) + u16::from(random) + u16::from(words) {
            100 => Ok(Self { zero, random }),
            sum => Err(error(format!("it adds up to {sum}"))),
        }
    }
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = 100u8.saturating_sub(self.zero).saturating_sub(self.random);
        write!(f, "zero:{},random:{},text:{text}", self.zero, self.random)
    }
}

impl Fill {
    fn kind(&self, seed: u64, page: u64) -> Kind {
        let percent = (mix(seed ^ mix(page / GROUP_PAGES + 0x5eed)) % 100) as u8;
        if percent < self.zero {
            Kind::Zero
        } else if percent < self.zero.saturating_add(self.random) {
            Kind::Random
        } else {
            Kind::Text
        }
    }

    /// How much memory of the host `bytes` of RAM take at the start, on pages of `backing`: a page with anything but zeros in
    /// it. An estimate, since chance decides what each 64 KiB hold: on huge pages, most of which have something, it is nearly
    /// all of RAM.
    pub fn filled_bytes(&self, bytes: u64, backing: Backing) -> u64 {
        let groups = backing.taken_at_once() / (GROUP_PAGES * PAGE_BYTES as u64);
        let empty = (f64::from(self.zero) / 100.0).powi(i32::try_from(groups.max(1)).unwrap_or(i32::MAX));
        bytes.saturating_sub((bytes as f64 * empty) as u64)
    }

    /// What page number `number` holds at the start.
    pub(crate) fn page(&self, seed: u64, number: u64, page: &mut Page) {
        let key = mix(seed ^ mix(number) ^ 0xF111);
        match self.kind(seed, number) {
            Kind::Zero => page.fill(0),
            Kind::Random => content::random(key, page),
            Kind::Text => content::text(key, page),
        }
    }
}

/// Fills a block. Pages of zeros are not touched: they cost no memory.
pub(super) fn fill(block: &RamBlock, fill: &Fill, seed: u64) -> Result<(), SyntheticError> {
    fill_pages(block, 0, fill, seed, 0..block.size_bytes() / PAGE_BYTES as u64)
}

/// Fills pages of a block whose own first page is number `base` of all RAM.
pub(crate) fn fill_pages(
    block: &RamBlock,
    base: u64,
    fill: &Fill,
    seed: u64,
    pages: std::ops::Range<u64>,
) -> Result<(), SyntheticError> {
    let (first, end) = (pages.start, pages.end);
    let pages = end.saturating_sub(first);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4) as u64;
    let part = pages.div_ceil(threads).next_multiple_of(GROUP_PAGES);
    std::thread::scope(|scope| {
        let parts: Vec<_> = (0..threads)
            .map(|n| first + (n * part).min(pages)..first + ((n + 1) * part).min(pages))
            .map(|range| scope.spawn(move || fill_range(block, base, fill, seed, range)))
            .collect();
        for part in parts {
            part.join().map_err(|_| system("fill the memory")(std::io::Error::other("a thread panicked")))??;
        }
        Ok(())
    })
}

fn fill_range(
    block: &RamBlock,
    base: u64,
    fill: &Fill,
    seed: u64,
    range: std::ops::Range<u64>,
) -> Result<(), MemoryError> {
    let mut page = [0; PAGE_BYTES];
    for group in range.clone().step_by(GROUP_PAGES as usize) {
        if fill.kind(seed, base + group) == Kind::Zero {
            continue;
        }
        let end = (group + GROUP_PAGES).min(range.end);
        // Only quicker: where the kernel cannot do it, the pages come one by one.
        let _ = block.populate(group * PAGE_BYTES as u64..end * PAGE_BYTES as u64);
        for number in group..end {
            fill.page(seed, base + number, &mut page);
            block.write(number * PAGE_BYTES as u64, &page)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints() {
        for text in ["zero:50,random:30,text:20", "zero:100,random:0,text:0", "zero:0,random:0,text:100"] {
            assert_eq!(text.parse::<Fill>().unwrap().to_string(), text);
        }
        assert_eq!("text:20,zero:80".parse::<Fill>().unwrap().to_string(), "zero:80,random:0,text:20");
        for (text, problem) in [
            ("", "not KIND:PERCENT"),
            ("zero:50", "adds up to 50"),
            ("zero:50,zero:50", "twice"),
            ("zero:101", "not a percentage"),
            ("ones:100", "no kind"),
        ] {
            let error = text.parse::<Fill>().unwrap_err().to_string();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn what_takes_memory() {
        for (text, base, huge) in [
            ("zero:100", 0, 0),
            ("zero:0,text:100", 1000, 1000),
            ("zero:75,random:25", 250, 999),
            ("zero:99,random:1", 10, 275),
        ] {
            let fill: Fill = text.parse().unwrap();
            let per_mille =
                |backing| (fill.filled_bytes(1 << 40, backing) as f64 / (1u64 << 40) as f64 * 1000.0) as u64;
            // By what decides on each 64 KiB.
            let seen = (0..20_000)
                .filter(|unit| (0..32).any(|group| fill.kind(3, (unit * 32 + group) * GROUP_PAGES) != Kind::Zero));
            assert_eq!(per_mille(Backing::Base), base, "{text}");
            assert_eq!(per_mille(Backing::Transparent), huge, "{text}");
            assert!((seen.count() as f64 / 20.0 - huge as f64).abs() < 15.0, "{text}");
        }
        let full: Fill = "text:100".parse().unwrap();
        assert_eq!(full.filled_bytes(u64::MAX, Backing::Base), u64::MAX);
    }

    #[test]
    fn the_mix_is_what_was_asked_for() {
        let fill: Fill = "zero:50,random:30,text:20".parse().unwrap();
        let groups = 20_000u64;
        let count = |kind| (0..groups).filter(|g| fill.kind(3, g * GROUP_PAGES) == kind).count() as f64 / groups as f64;
        assert!((count(Kind::Zero) - 0.5).abs() < 0.02);
        assert!((count(Kind::Random) - 0.3).abs() < 0.02);
        assert!((count(Kind::Text) - 0.2).abs() < 0.02);
    }
}
