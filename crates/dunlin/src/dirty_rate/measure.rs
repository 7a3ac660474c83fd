//! The two ways of measuring: pages compared with themselves a while later, and a tracker that sees every write.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::bounds::{self, Dirtied, Rates, Samples};
use super::{DirtyRateError, DirtyRateMode, DirtyRateRequest};
use crate::error::{Cause, GuestError, MachineStep};
use crate::guest::Calls;
use crate::machine::{Machine, Vcpus};
use crate::memory::{DirtyBitmap, DirtyTracker, PAGE_SIZE, Ram, RamBlock};
use crate::wire::data_checksum;

/// How long the machine may take to make a tracker.
const TRACKER_LIMIT: Duration = Duration::from_secs(10);
const GIB: u64 = 1 << 30;
/// Windows that a measurement is divided into, to tell a guest that writes the same pages again and again from one that
/// writes other ones.
const WINDOWS: u32 = 8;
/// At most this part of a window goes into looking.
const LOOKING_PART: u32 = 4;

/// What came out.
#[derive(Debug, PartialEq)]
pub(super) struct Measured {
    pub(super) rates: Rates,
    /// The shortest time that was looked at.
    pub(super) window: Duration,
    /// Where pages are sampled.
    pub(super) samples: Option<Samples>,
    /// Of each vCPU, if they can be told apart.
    pub(super) vcpus: Vec<u64>,
}

/// A measurement that can be made.
pub(super) struct Measurement {
    machine: Arc<dyn Machine>,
    calc_time: Duration,
    how: How,
}

enum How {
    Sampling { pages_of_gib: u64 },
    Tracking { tracker: Box<dyn DirtyTracker>, mode: DirtyRateMode },
}

impl Measurement {
    /// Settles whether it can be made; a tracker is started.
    pub(super) fn begin(
        machine: Arc<dyn Machine>,
        calls: &Calls,
        request: &DirtyRateRequest,
    ) -> Result<Self, DirtyRateError> {
        let how = match request.mode {
            DirtyRateMode::PageSampling => How::Sampling { pages_of_gib: request.sample_pages },
            mode => {
                if mode == DirtyRateMode::DirtyRing && machine.vcpus().and_then(Vcpus::dirtied).is_none() {
                    return Err(DirtyRateError::NoRing);
                }
                let track = |machine: &dyn Machine| machine.dirty_tracker();
                let tracker = match calls.call(MachineStep::Track, TRACKER_LIMIT, &Arc::default(), track) {
                    Ok(tracker) => tracker,
                    Err(GuestError::Machine { source, .. }) => return Err(DirtyRateError::Machine(source)),
                    Err(error) => return Err(DirtyRateError::Machine(error.into())),
                };
                tracker.start()?;
                How::Tracking { tracker, mode }
            }
        };
        Ok(Self { machine, calc_time: request.calc_time, how })
    }

    /// Makes it; nothing comes of it if the sender of `gone` goes first.
    pub(super) fn finish(self, gone: &Receiver<()>) -> Result<Option<Measured>, Cause> {
        let Self { machine, calc_time, how } = self;
        match how {
            How::Sampling { pages_of_gib } => sample(machine.ram(), pages_of_gib, calc_time, gone),
            How::Tracking { tracker, mode } => {
                let measured = track(&*machine, &*tracker, mode, calc_time, gone);
                tracker.stop();
                measured
            }
        }
    }
}

/// Whether so much time has passed, and not somebody gone.
fn wait(time: Duration, gone: &Receiver<()>) -> bool {
    gone.recv_timeout(time) == Err(RecvTimeoutError::Timeout)
}

/// Lets all that is written be seen, and counts it a while later.
fn track(
    machine: &dyn Machine,
    tracker: &dyn DirtyTracker,
    mode: DirtyRateMode,
    calc_time: Duration,
    gone: &Receiver<()>,
) -> Result<Option<Measured>, Cause> {
    let blocks = machine.ram().blocks();
    let clean = || -> Vec<DirtyBitmap> { blocks.iter().map(|block| DirtyBitmap::new(block.size_bytes())).collect() };
    let (before, after) = (clean(), clean());
    let began = Instant::now();
    for (index, (block, bitmap)) in blocks.iter().zip(&before).enumerate() {
        tracker.rearm(index, 0..block.size_bytes(), bitmap)?;
    }
    // Both take their time where there is much RAM: on the average a page is exposed from the middle of the re-arming to
    // that of the look.
    let began = began + began.elapsed() / 2;
    let dirtied = || machine.vcpus().and_then(Vcpus::dirtied).filter(|_| mode == DirtyRateMode::DirtyRing);
    let dirtied_before = dirtied();
    let look = || -> Result<(Dirtied, Duration), Cause> {
        let looked = Instant::now();
        for (index, bitmap) in after.iter().enumerate() {
            tracker.sync(index, bitmap)?;
        }
        let took = (looked + looked.elapsed() / 2).saturating_duration_since(began);
        let pages = after.iter().map(DirtyBitmap::count).fold(0, u64::saturating_add);
        Ok((Dirtied::counted(pages.saturating_mul(PAGE_SIZE)), took))
    };
    let since = Instant::now();
    if !wait(calc_time / WINDOWS, gone) {
        return Ok(None);
    }
    let window = look()?;
    if !wait(calc_time.saturating_sub(since.elapsed()), gone) {
        return Ok(None);
    }
    let rates = bounds::rates(look()?, Some(window));
    let vcpus = dirtied_before.zip(dirtied()).map(|(before, after)| {
        let each: Vec<u64> = after.iter().zip(before).map(|(after, before)| after.saturating_sub(before)).collect();
        let all = each.iter().fold(0, |all: u64, one| all.saturating_add(*one)).max(1);
        each.iter().map(|one| (rates.estimate as f64 * *one as f64 / all as f64) as u64).collect()
    });
    Ok(Some(Measured { rates, window: window.1, samples: None, vcpus: vcpus.unwrap_or_default() }))
}

/// Pages of a block, and what they held.
struct Sampled<'a> {
    block: &'a RamBlock,
    pages: Vec<u64>,
    sums: Vec<u64>,
}

impl<'a> Sampled<'a> {
    /// One page of each of as many equal parts of the block as pages are wanted: at least one, however small the block.
    fn choose(block: &'a RamBlock, pages_of_gib: u64, random: &mut Random) -> Self {
        let all = block.size_bytes() / PAGE_SIZE;
        let wanted = u128::from(pages_of_gib) * u128::from(block.size_bytes());
        let wanted = u64::try_from(wanted.div_ceil(u128::from(GIB))).unwrap_or(all).clamp(1, all.max(1));
        let edge = |part: u64| u64::try_from(u128::from(all) * u128::from(part) / u128::from(wanted)).unwrap_or(all);
        let page = |part: u64| {
            let (first, end) = (edge(part), edge(part.saturating_add(1)));
            first.saturating_add(random.below(end.saturating_sub(first)))
        };
        Self { block, pages: (0..wanted).map(page).collect(), sums: Vec::new() }
    }

    /// What each holds now.
    fn look(&self) -> Result<Vec<u64>, Cause> {
        let mut page = [0; PAGE_SIZE as usize];
        let sum = |number: &u64| -> Result<u64, Cause> {
            let offset = number.saturating_mul(PAGE_SIZE);
            self.block.peek(offset, &mut page)?;
            Ok(data_checksum(&page))
        };
        self.pages.iter().map(sum).collect()
    }

    /// How many have changed since.
    fn changed(&self) -> Result<Samples, Cause> {
        let changed = self.look()?.iter().zip(&self.sums).filter(|(now, before)| now != before).count();
        Ok(Samples { all: self.pages.len() as u64, changed: changed as u64 })
    }
}

/// Samples of every block, as they are now.
struct Look<'a> {
    blocks: Vec<Sampled<'a>>,
    /// When it began: from look to look of the same page is as long as from beginning to beginning.
    began: Instant,
}

impl<'a> Look<'a> {
    fn at(ram: &'a Ram, pages_of_gib: u64, random: &mut Random) -> Result<Self, Cause> {
        let mut blocks: Vec<_> =
            ram.blocks().iter().map(|block| Sampled::choose(block, pages_of_gib, random)).collect();
        let began = Instant::now();
        for sampled in &mut blocks {
            sampled.sums = sampled.look()?;
        }
        Ok(Self { blocks, began })
    }

    /// How many samples of each block have changed since, and how long ago that was.
    fn again(&self) -> Result<(Vec<Samples>, Duration), Cause> {
        let took = self.began.elapsed();
        Ok((self.blocks.iter().map(Sampled::changed).collect::<Result<_, _>>()?, took))
    }
}

/// What `samples` of each block say of all of `ram`.
fn dirtied(ram: &Ram, samples: &[Samples]) -> Dirtied {
    let of_blocks = ram.blocks().iter().zip(samples).map(|(block, of)| Dirtied::sampled(block.size_bytes(), *of));
    of_blocks.fold(Dirtied::default(), Dirtied::and)
}

/// Compares pages with themselves over the whole time, and others, each time anew, over short windows of it. A small part of
/// RAM that is written again and again is missed by all samples of a look easily, and by those of many looks hardly ever.
fn sample(ram: &Ram, pages_of_gib: u64, calc_time: Duration, gone: &Receiver<()>) -> Result<Option<Measured>, Cause> {
    let mut random = Random::new();
    let whole = Look::at(ram, pages_of_gib, &mut random)?;
    let looking = whole.began.elapsed();
    let window = calc_time / (WINDOWS + 1);
    let mut seen: Vec<Samples> = vec![Samples::default(); ram.blocks().len()];
    let (mut time, mut windows) = (Duration::ZERO, 0u32);
    // A look that takes long leaves no room for short windows.
    while looking.saturating_mul(2 * LOOKING_PART) <= window
        && windows < WINDOWS
        && whole.began.elapsed().saturating_add(window).saturating_add(looking) < calc_time
    {
        let look = Look::at(ram, pages_of_gib, &mut random)?;
        if !wait(window.saturating_sub(look.began.elapsed()), gone) {
            return Ok(None);
        }
        let (changed, took) = look.again()?;
        seen.iter_mut().zip(changed).for_each(|(all, these)| *all = all.and(these));
        (time, windows) = (time.saturating_add(took), windows.saturating_add(1));
    }
    if !wait(calc_time.saturating_sub(whole.began.elapsed()), gone) {
        return Ok(None);
    }
    let (changed, took) = whole.again()?;
    let short = (windows > 0).then(|| (dirtied(ram, &seen), time / windows));
    let rates = bounds::rates((dirtied(ram, &changed), took), short);
    let samples = changed.into_iter().chain(seen).fold(Samples::default(), Samples::and);
    Ok(Some(Measured {
        rates,
        window: short.map_or(took, |(_, time)| time),
        samples: Some(samples),
        vcpus: Vec::new(),
    }))
}

/// Numbers that nobody foresees (splitmix64 from a random start).
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        u64::try_from((u128::from(mixed) * u128::from(limit)) >> 64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vm_memory::MmapRegion;

    use super::*;

    fn ram(sizes: &[u64]) -> Ram {
        let block = |(number, bytes): (usize, &u64)| {
            let region: MmapRegion = MmapRegion::new(*bytes as usize).unwrap();
            RamBlock::new(format!("block {number}"), Arc::new(region)).unwrap()
        };
        Ram::new(sizes.iter().enumerate().map(block).collect()).unwrap()
    }

    /// As many as wanted, spread over the block, one at least.
    #[test]
    fn samples_cover_every_block() {
        let ram = ram(&[1 << 30, 4096, 64 << 10, 8 << 20]);
        for (pages_of_gib, expected) in [(128, [128, 1, 1, 1]), (512, [512, 1, 1, 4]), (16384, [16384, 1, 1, 128])] {
            let mut random = Random::new();
            for (block, expected) in ram.blocks().iter().zip(expected) {
                let samples = Sampled::choose(block, pages_of_gib, &mut random);
                assert_eq!(samples.pages.len(), expected);
                assert!(samples.pages.iter().all(|page| *page < block.size_bytes() / PAGE_SIZE));
                assert!(samples.pages.is_sorted_by(|a, b| a < b), "each once");
            }
        }
    }

    /// A block too small for a share of the samples counts, too; and a part of a block as the part that it is.
    #[test]
    fn small_blocks_count() {
        let ram = ram(&[1 << 20, 64 << 10, 1 << 20]);
        let [_, small, large] = ram.blocks() else { panic!("three blocks") };
        let changed = |write: &dyn Fn()| {
            let (_stay, gone) = mpsc::channel();
            let ram = &ram;
            std::thread::scope(|scope| {
                let measuring = scope.spawn(move || sample(ram, 1 << 20, Duration::from_millis(200), &gone));
                std::thread::sleep(Duration::from_millis(100));
                write();
                measuring.join().unwrap().unwrap().unwrap().rates.estimate as f64 * 0.2
            })
        };
        let near = |bytes: f64, expected: u64| {
            let expected = expected as f64;
            assert!((bytes - expected).abs() <= 0.2 * expected, "{bytes} of {expected}");
        };
        near(changed(&|| {}), 0);
        let all = |block: &RamBlock| {
            (0..block.size_bytes() / PAGE_SIZE).for_each(|page| block.write(page * PAGE_SIZE, &[1]).unwrap());
        };
        near(changed(&|| all(small)), 64 << 10);
        near(changed(&|| all(large)), 1 << 20);
    }

    #[test]
    fn who_goes_gets_nothing() {
        let (stay, gone) = mpsc::channel();
        drop(stay);
        let began = Instant::now();
        assert!(sample(&ram(&[1 << 20]), 512, Duration::from_secs(60), &gone).unwrap().is_none());
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
