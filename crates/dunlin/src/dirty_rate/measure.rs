//! The two ways of measuring: pages compared with themselves a while later, and a tracker that sees every write.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::{DirtyRateError, DirtyRateMode, DirtyRateRequest};
use crate::error::{Cause, GuestError, MachineStep};
use crate::guest::Calls;
use crate::machine::{Machine, Vcpus};
use crate::memory::{DirtyBitmap, DirtyTracker, PAGE_SIZE, Ram, RamBlock};
use crate::wire::data_checksum;

/// How long the machine may take to make a tracker.
const TRACKER_LIMIT: Duration = Duration::from_secs(10);
const GIB: u64 = 1 << 30;

/// What came out.
#[derive(Debug, PartialEq)]
pub(super) struct Measured {
    pub(super) bytes_per_second: u64,
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

fn a_second(bytes: u64, took: Duration) -> u64 {
    (bytes as f64 / took.as_secs_f64().max(1e-9)) as u64
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
    if !wait(calc_time, gone) {
        return Ok(None);
    }
    let looked = Instant::now();
    for (index, bitmap) in after.iter().enumerate() {
        tracker.sync(index, bitmap)?;
    }
    let took = (looked + looked.elapsed() / 2).saturating_duration_since(began);
    let bytes = after.iter().map(DirtyBitmap::count).fold(0, u64::saturating_add).saturating_mul(PAGE_SIZE);
    let bytes_per_second = a_second(bytes, took);
    let vcpus = dirtied_before.zip(dirtied()).map(|(before, after)| {
        let each: Vec<u64> = after.iter().zip(before).map(|(after, before)| after.saturating_sub(before)).collect();
        let all = each.iter().fold(0, |all: u64, one| all.saturating_add(*one)).max(1);
        each.iter().map(|one| (bytes_per_second as f64 * *one as f64 / all as f64) as u64).collect()
    });
    Ok(Some(Measured { bytes_per_second, vcpus: vcpus.unwrap_or_default() }))
}

/// Pages of a block, and what they held.
struct Samples<'a> {
    block: &'a RamBlock,
    pages: Vec<u64>,
    sums: Vec<u64>,
}

impl<'a> Samples<'a> {
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
        let mut parts = Vec::new();
        let sum = |number: &u64| -> Result<u64, Cause> {
            let offset = number.saturating_mul(PAGE_SIZE);
            // A hole is not read, which would make the host allocate it.
            self.block.data_in(offset..offset.saturating_add(PAGE_SIZE), &mut parts);
            page.fill(0);
            if !parts.is_empty() {
                self.block.read(offset, &mut page)?;
            }
            Ok(data_checksum(&page))
        };
        self.pages.iter().map(sum).collect()
    }

    /// Bytes of the block that have changed since, judging by the samples.
    fn changed_bytes(&self) -> Result<f64, Cause> {
        let changed = self.look()?.iter().zip(&self.sums).filter(|(now, before)| now != before).count();
        Ok(self.block.size_bytes() as f64 * changed as f64 / self.pages.len().max(1) as f64)
    }
}

fn sample(ram: &Ram, pages_of_gib: u64, calc_time: Duration, gone: &Receiver<()>) -> Result<Option<Measured>, Cause> {
    let mut random = Random::new();
    let choose = |block| Samples::choose(block, pages_of_gib, &mut random);
    let mut samples: Vec<Samples<'_>> = ram.blocks().iter().map(choose).collect();
    // From look to look of the same page, which are as far apart as their beginnings.
    let began = Instant::now();
    for samples in &mut samples {
        samples.sums = samples.look()?;
    }
    if !wait(calc_time.saturating_sub(began.elapsed()), gone) {
        return Ok(None);
    }
    let took = began.elapsed();
    let mut bytes = 0.0;
    for samples in &samples {
        bytes += samples.changed_bytes()?;
    }
    Ok(Some(Measured { bytes_per_second: a_second(bytes as u64, took), vcpus: Vec::new() }))
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
                let samples = Samples::choose(block, pages_of_gib, &mut random);
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
                measuring.join().unwrap().unwrap().unwrap().bytes_per_second as f64 * 0.2
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
