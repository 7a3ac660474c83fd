//! Whether the next unit of pages is compressed, and at which level.
//!
//! Compressing pays where the link would take longer for the bytes saved than compressing takes. Nobody knows that of a
//! unit before it was tried. A trial that did not pay is paid for out of an allowance, which is a small part of the
//! worker's time. So memory that does not shrink, a link with room and a level that is too dear cost next to nothing.
//!
//! The levels are steps from the cheapest to the one that the user named, which is the most. The cheapest is tried
//! first. A dearer one is tried while those before it pay.
//!
//! What must stay true: trials that did not pay take at most [`PART`] of the worker's time, and one trial more whose
//! cost was not known. Nothing here reads a clock.

use std::time::Duration;

/// The part of a worker's time that may be spent on trials that do not pay.
const PART: f64 = 0.03;
/// Nanoseconds of trials that may be saved up. A link that changes does not make a worker spend all at once what it has not
/// spent in hours.
const MOST_ALLOWED: f64 = 100e6;
/// What the cheapest step is taken to cost before it was tried, in nanoseconds a byte.
const FIRST_COST: f64 = 4.0;
/// A step that was never tried may take this many times as long as the one before it.
const DEARER: f64 = 4.0;
/// A step is taken to cost this much more than it did, where a trial must be affordable.
const MARGIN: f64 = 1.5;
/// While a cheaper step is used, a dearer one is taken to cost less and less, until it is tried again.
const HOPE: f64 = 0.99;
/// After this many units in a row that were not worth it, the next look is this many units away. 64 units are 4 MiB.
const LONGEST_PAUSE: u32 = 64;
/// A step that costs this many times the cheapest is used only for pages that the cheapest has shrunk.
const LOOK_FIRST: f64 = 8.0;

/// What is done with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    /// The step to compress with.
    pub(super) step: usize,
    /// The cheapest step is run before it, to see whether the pages shrink at all.
    pub(super) looks_first: bool,
}

/// What came of an attempt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outcome {
    /// The unit's bytes.
    pub(super) bytes: usize,
    /// Bytes that do not have to travel; 0 if the pages travel as they are.
    pub(super) saved_bytes: usize,
    /// CPU time of the attempt.
    pub(super) cpu: Duration,
    /// Time from its beginning to its end, more than `cpu` where others had the processor.
    pub(super) elapsed: Duration,
}

/// One level of a compressor.
#[derive(Debug, Clone, Copy, Default)]
struct Step {
    /// What it takes for pages that shrink, in nanoseconds a byte, once it is known.
    cost: Option<f64>,
    /// The same, less the longer the step was not used.
    hoped: f64,
    /// CPU time for pages of any kind, in nanoseconds a byte.
    spent: f64,
}

/// Follows `value`, starting from the first one.
fn follow(average: f64, value: f64) -> f64 {
    if average == 0.0 { value } else { average + (value - average) / 4.0 }
}

/// The decisions of one worker.
#[derive(Debug)]
pub(super) struct Trials {
    steps: Vec<Step>,
    /// The step in use; `None` while pages travel as they are.
    in_use: Option<usize>,
    /// Nanoseconds that may go into trials that do not pay. Negative after one that took longer than expected.
    allowance: f64,
    /// Units to send as they are before the next trial, and how many it was the last time.
    pause: u32,
    last_pause: u32,
    /// CPU time of attempts that did not pay.
    wasted: Duration,
}

impl Trials {
    /// Of a compressor that has so many levels to choose from.
    pub(super) fn new(steps: usize) -> Self {
        Self {
            steps: vec![Step::default(); steps],
            in_use: None,
            allowance: 0.0,
            pause: 0,
            last_pause: 0,
            wasted: Duration::ZERO,
        }
    }

    /// The worker has spent more time: on a processor, and waiting for the link.
    pub(super) fn worked(&mut self, time: Duration) {
        self.allowance = (self.allowance + time.as_nanos() as f64 * PART).min(MOST_ALLOWED);
    }

    /// CPU time of all attempts that did not pay.
    pub(super) fn wasted(&self) -> Duration {
        self.wasted
    }

    /// The step in use.
    pub(super) fn in_use(&self) -> Option<usize> {
        self.in_use
    }

    /// Whether a unit of `bytes` would be compressed now, or tried.
    pub(super) fn is_due(&self, bytes: usize) -> bool {
        self.in_use.is_some() || (self.pause == 0 && self.affords(0, bytes))
    }

    /// A unit travels as it is that was not tried.
    pub(super) fn pass(&mut self) {
        self.pause = self.pause.saturating_sub(1);
    }

    /// What to do with a unit of `bytes`.
    pub(super) fn next(&mut self, bytes: usize) -> Option<Attempt> {
        if !self.is_due(bytes) {
            self.pass();
            return None;
        }
        let step = self.in_use.unwrap_or(0);
        let cheapest = self.steps.first().and_then(|step| step.cost);
        let expected = self.expected(step);
        let looks_first = step > 0 && cheapest.is_some_and(|cheapest| expected > cheapest * LOOK_FIRST);
        Some(Attempt { step, looks_first })
    }

    /// What a byte of a step may cost, known or not.
    fn expected(&self, step: usize) -> f64 {
        let known = |step: usize| self.steps.get(step).map(|step| step.spent).filter(|spent| *spent > 0.0);
        match (known(step), step.checked_sub(1)) {
            (Some(spent), _) => spent * MARGIN,
            (None, Some(before)) => self.expected(before) / MARGIN * DEARER,
            (None, None) => FIRST_COST,
        }
    }

    fn affords(&self, step: usize, bytes: usize) -> bool {
        step < self.steps.len() && self.expected(step) * bytes as f64 <= self.allowance
    }

    /// An attempt is over, on a link that takes `link` nanoseconds a byte.
    pub(super) fn tried(&mut self, attempt: Attempt, outcome: Outcome, link: f64) {
        let bytes = (outcome.bytes as f64).max(1.0);
        let cpu = outcome.cpu.as_nanos() as f64 / bytes;
        // Who shares a processor takes longer, as sending does then. One long absence says nothing.
        let cost = (outcome.elapsed.as_nanos() as f64 / bytes).clamp(cpu, cpu * 4.0);
        let shrunk = outcome.saved_bytes > 0;
        // Pages that a first look has found not to shrink say nothing of the step itself.
        let Some(step) = self.steps.get_mut(if shrunk || !attempt.looks_first { attempt.step } else { 0 }) else {
            return;
        };
        step.spent = if cpu > step.spent { cpu } else { follow(step.spent, cpu) };
        if shrunk {
            step.cost = Some(follow(step.cost.unwrap_or(0.0), cost));
            step.hoped = step.cost.unwrap_or(cost);
        }
        let cost = if shrunk { step.cost.unwrap_or(cost) } else { cost };
        let gain = self.gain(outcome.saved_bytes as f64 / bytes * link);
        if shrunk && gain > cost {
            (self.pause, self.last_pause) = (0, 0);
            self.in_use = Some(self.climb(attempt.step, gain, outcome.bytes));
            return;
        }
        self.allowance -= outcome.cpu.as_nanos() as f64;
        self.wasted = self.wasted.saturating_add(outcome.cpu);
        self.in_use = if shrunk { self.best(attempt.step, gain) } else { None };
        if self.in_use.is_none() {
            self.last_pause = (self.last_pause * 2).clamp(1, LONGEST_PAUSE);
            self.pause = self.last_pause;
        }
    }

    /// What is gained when the link is spared `saved` nanoseconds a byte. Decompression at the destination is taken
    /// off: half of what the cheapest step costs.
    fn gain(&self, saved: f64) -> f64 {
        saved - self.steps.first().and_then(|step| step.cost).unwrap_or(0.0) / 2.0
    }

    /// The dearest step below `limit` that pays.
    fn best(&self, limit: usize, gain: f64) -> Option<usize> {
        let mut below = self.steps.iter().take(limit);
        below.rposition(|step| step.cost.is_some() && step.hoped < gain)
    }

    /// A step pays: the one to use next, which may be dearer.
    fn climb(&mut self, step: usize, gain: f64, bytes: usize) -> usize {
        let mut to = step;
        for dearer in step.saturating_add(1)..self.steps.len() {
            let Some(&Step { cost, hoped, .. }) = self.steps.get(dearer) else { break };
            match cost {
                Some(cost) if cost < gain => to = dearer,
                // It did not pay the last time.
                Some(_) if hoped < gain && self.affords(dearer, bytes) => return dearer,
                Some(_) => {}
                None => {
                    let expected = self.expected(dearer);
                    if expected < gain || (expected / DEARER * 2.0 < gain && self.affords(dearer, bytes)) {
                        return dearer;
                    }
                    break;
                }
            }
        }
        self.steps.iter_mut().skip(to.saturating_add(1)).for_each(|step| step.hoped *= HOPE);
        to
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNIT: usize = 64 << 10;

    /// A worker with its compressor and its link, whose clock is simulated. Times are in nanoseconds a byte.
    #[derive(Debug, Clone)]
    struct Worker {
        /// What each level costs, cheapest first, and which part of the bytes of pages that shrink it saves.
        levels: Vec<(f64, f64)>,
        /// CPU time to send a byte.
        sending: f64,
        /// What the link takes for a byte.
        link: f64,
        /// What sharing the processor makes a level take longer.
        stretch: f64,
    }

    #[derive(Debug, Default)]
    struct Sum {
        /// Nanoseconds.
        cpu: f64,
        time: f64,
        wasted: f64,
        /// Bytes on the link.
        sent: f64,
        units: Vec<Option<usize>>,
    }

    impl Worker {
        /// Zstandard as measured on text, with all levels up to the one asked for.
        fn zstd(levels: usize, link: f64) -> Self {
            let all = [(1.9, 0.78), (1.8, 0.79), (6.0, 0.8), (9.0, 0.81), (20.0, 0.81), (60.0, 0.82), (150.0, 0.82)];
            let levels = all.into_iter().chain([(250.0, 0.83), (300.0, 0.83), (400.0, 0.83)]).take(levels).collect();
            Self { levels, sending: 0.15, link, stretch: 1.0 }
        }

        fn lz4(link: f64) -> Self {
            Self { levels: vec![(0.95, 0.6)], sending: 0.15, link, stretch: 1.0 }
        }

        /// Sends units, each of which does or does not shrink, by `decide`; `check` sees the sums after each.
        fn run(
            &self,
            trials: &mut Trials,
            sum: &mut Sum,
            units: impl IntoIterator<Item = bool>,
            mut check: impl FnMut(&Sum),
        ) {
            let bytes = UNIT as f64;
            for shrinks in units {
                let attempt = trials.next(UNIT);
                let (mut cpu, mut saved) = (0.0, 0.0);
                if let Some(attempt) = attempt {
                    let level = |step: usize| self.levels[step];
                    if attempt.looks_first {
                        cpu += level(0).0 * bytes;
                    }
                    if shrinks || !attempt.looks_first {
                        cpu += level(attempt.step).0 * bytes;
                    }
                    saved = if shrinks { level(attempt.step).1 * bytes } else { 0.0 };
                    let outcome = Outcome {
                        bytes: UNIT,
                        saved_bytes: saved as usize,
                        cpu: Duration::from_nanos(cpu as u64),
                        elapsed: Duration::from_nanos((cpu * self.stretch) as u64),
                    };
                    trials.tried(attempt, outcome, self.link);
                    // Not by its own account: what the link takes for what was saved is less than what it cost.
                    if saved * self.link < cpu {
                        sum.wasted += cpu;
                    }
                }
                let sent = bytes - saved;
                let used = cpu + sent * self.sending;
                sum.cpu += used;
                sum.time += used.max(cpu + sent * self.link);
                sum.sent += sent;
                sum.units.push(attempt.map(|attempt| attempt.step).filter(|_| saved > 0.0));
                trials.worked(Duration::from_nanos((used + sent * (self.link - self.sending).max(0.0)) as u64));
                check(sum);
            }
        }
    }

    fn none(units: usize, worker: &Worker) -> f64 {
        (units * UNIT) as f64 * worker.link.max(worker.sending)
    }

    /// 4 GiB on a link with room, of text, of random bytes and of both by turns: at any moment, the trials have taken at most 5
    /// % of the worker's CPU time.
    #[test]
    fn a_link_with_room_is_not_held_up() {
        for levels in 0..=10 {
            for (every, run) in [(1, 1), (0, 1), (2, 1), (2, 100), (3, 10_000)] {
                let worker = if levels == 0 { Worker::lz4(0.15) } else { Worker::zstd(levels, 0.15) };
                let units = (0..65_536usize).map(|n| every != 0 && n / run % every == 0);
                let (mut trials, mut sum) = (Trials::new(worker.levels.len()), Sum::default());
                worker.run(&mut trials, &mut sum, units, |sum| {
                    assert!(sum.wasted <= sum.cpu * 0.05, "{levels} levels: {} of {}", sum.wasted, sum.cpu);
                });
                assert!(sum.wasted > 0.0, "never tried");
                let took = sum.time / none(65_536, &worker);
                assert!(took < 1.05, "{levels} levels: {took:.3} times as long as without");
            }
        }
    }

    /// On a slow link all that shrinks goes at the level that was asked for, after a beginning of a few units.
    #[test]
    fn a_slow_link_is_used_to_the_full() {
        for (levels, rate) in [(1, 20.0), (2, 20.0), (4, 20.0), (5, 20.0), (10, 1.0)] {
            let worker = Worker::zstd(levels, 1e3 / rate);
            let (mut trials, mut sum) = (Trials::new(levels), Sum::default());
            worker.run(&mut trials, &mut sum, std::iter::repeat_n(true, 4096), |_| {});
            let late = sum.units.iter().position(|step| *step == Some(levels - 1)).unwrap();
            assert!(late < 100, "{levels} levels: {late} units");
            assert!(sum.units[100..].iter().all(|step| *step == Some(levels - 1)), "{levels} levels");
            // As if it had been so from the first unit on.
            let always = (4096 * UNIT) as f64 * (1.0 - worker.levels[levels - 1].1);
            assert!(sum.sent < always * 1.02, "{levels} levels: {} of {always}", sum.sent);
        }
    }

    /// The level that is used is the dearest that pays.
    #[test]
    fn the_level_follows_the_link() {
        let (mut trials, mut sum) = (Trials::new(10), Sum::default());
        let mut most_used = |link: f64| {
            let from = sum.units.len();
            Worker::zstd(10, link).run(&mut trials, &mut sum, std::iter::repeat_n(true, 20_000), |_| {});
            let later = &sum.units[from + 2000..];
            (0..11usize)
                .map(|step| step.checked_sub(1))
                .max_by_key(|step| later.iter().filter(|other| *other == step).count())
                .unwrap()
        };
        assert_eq!(most_used(0.15), None);
        assert_eq!(most_used(1000.0), Some(9));
        assert_eq!(most_used(15.0), Some(3));
        assert_eq!(most_used(5.0), Some(1));
        assert_eq!(most_used(0.15), None);
        assert_eq!(most_used(30.0), Some(4));
    }

    /// Pages that shrink among others that do not: on a slow link what shrinks is mostly found.
    #[test]
    fn finds_what_shrinks() {
        for levels in [1, 5, 10] {
            let worker = Worker::zstd(levels, 1000.0);
            let (mut trials, mut sum) = (Trials::new(levels), Sum::default());
            let units: Vec<bool> = (0..20_000).map(|n| n / 128 % 2 == 0).collect();
            worker.run(&mut trials, &mut sum, units.iter().copied(), |_| {});
            let found = sum.units.iter().filter(|step| step.is_some()).count();
            assert!(found > 7_000, "{levels} levels: {found} of 10000");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Any levels, pages, links and processors, and links that change: trials that do not pay stay within 5 % of the worker's
        /// time and the dearest attempt; and where the link did not change, nothing takes 5 % longer than without.
        #[test]
        fn any_sequence(
            costs in proptest::collection::vec(1.0..3.5f64, 1..10),
            cheapest in 0.3..4.0f64,
            saves in 0.15..0.9f64,
            stretch in 1.0..4.0f64,
            phases in proptest::collection::vec((0.1..200.0f64, 0..=4usize, 1..3000usize), 1..8),
            seed in any::<u64>(),
        ) {
            let mut cost = cheapest;
            let mut levels = vec![(cost, saves)];
            for factor in costs {
                cost *= factor;
                levels.push((cost, saves));
            }
            let one_link = phases.len() == 1;
            let dearest = cost * UNIT as f64;
            let (mut trials, mut sum) = (Trials::new(levels.len()), Sum::default());
            let (mut state, mut without) = (seed | 1, 0.0);
            for (link, shrinking, count) in phases {
                let worker = Worker { levels: levels.clone(), sending: 0.15, link, stretch };
                let units: Vec<bool> = (0..count)
                    .map(|_| {
                        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
                        ((state >> 33) % 4) < shrinking as u64
                    })
                    .collect();
                without += none(count, &worker);
                worker.run(&mut trials, &mut sum, units, |sum| {
                    assert!(sum.wasted <= sum.time * 0.05 + dearest * 2.0, "{} of {}", sum.wasted, sum.time);
                });
            }
            if one_link {
                prop_assert!(sum.time <= without * 1.05 + dearest * 2.0, "{} instead of {without}", sum.time);
            }
        }
    }
}
