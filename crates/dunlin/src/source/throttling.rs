//! `auto-converge`'s decision: which vCPUs to slow, and by how much. Pure functions of what was measured.
//!
//! What is wanted is a dirty rate of `throttle-trigger-threshold` percent of the bandwidth: each round is then that part of
//! the one before. What each vCPU would dirty at full speed follows from what it dirties now and the share of its time that
//! it has. Those that would dirty more than a common cap are slowed to the cap, the others not at all, and the cap is such
//! that all together dirty what is wanted (as water fills a vessel with an uneven bottom).
//!
//! The rate has to be measured over a time that is short against a round. A guest that writes the same pages again and
//! again is underestimated by a whole round, which counts each page once, by as many times as it writes it.

use std::time::Duration;

use super::convergence::RoundFigures;

/// How long is measured. Machines throttle by turns of no more than a few of these in it.
pub(super) const WINDOW: Duration = Duration::from_millis(50);
/// Measuring takes no more than this part of a round, since nothing is sent meanwhile; one window is always made where it is
/// needed.
const WINDOWS_PART: u32 = 4;
/// However long a round takes, no more windows after it.
const MOST_WINDOWS: u32 = 6;
/// A throttle is raised for no less than this part of the share that a vCPU has,
const RAISE_PART: f64 = 0.9;
/// and lowered for no less than that: measurements are not exact, and a guest should not notice.
const LOWER_PART: f64 = 1.25;
/// One measurement gives a vCPU back no more than this many times the share it had: of one that hardly runs little is known.
const MOST_LOWERED: f64 = 4.0;

/// What somebody has set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settings {
    /// Percent of what a round sent that may be dirty again after it.
    pub(super) threshold: u8,
    /// Percent of a vCPU's time: the least that is taken, if any is.
    pub(super) initial: u8,
    /// The same: by how much more at most after a round than before.
    pub(super) increment: u8,
    /// The same: the most.
    pub(super) max: u8,
}

/// What was dirtied over a window.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    /// Bytes of RAM that became dirty, each page once, a second.
    pub(super) bytes_per_second: f64,
    /// What each vCPU has of it, in any unit; `None` if nobody knows.
    pub(super) weights: Option<Vec<u64>>,
    /// What each vCPU was slowed by meanwhile, in percent, whoever asked for it.
    pub(super) throttled: Vec<u8>,
}

/// Whether a round has left more dirty than it may, in bytes on the wire. RAM takes `encoded_part` of its bytes there.
pub(super) fn leaves_too_much(round: &RoundFigures, encoded_part: f64, threshold: u8) -> bool {
    round.dirty_bytes as f64 * encoded_part * 100.0 > round.transferred_bytes as f64 * f64::from(threshold)
}

/// How many windows may be made after a round: none, if nothing is to be decided. To be asked only while the guest cannot be
/// stopped yet.
pub(super) fn windows(round: &RoundFigures, encoded_part: f64, threshold: u8, in_force: &[u8]) -> u32 {
    let affordable = |windows: u32| WINDOW * WINDOWS_PART * windows <= round.duration;
    let most = (1..=MOST_WINDOWS).take_while(|windows| affordable(*windows)).last().unwrap_or(0);
    if leaves_too_much(round, encoded_part, threshold) {
        most.max(1)
    } else if in_force.iter().any(|percent| *percent > 0) {
        // It may be that less would do.
        most.min(1)
    } else {
        0
    }
}

/// The cap such that `demands`, none of them more than the cap, come to `target`; `None` if they do by themselves.
pub(super) fn cap(demands: &[f64], target: f64) -> Option<f64> {
    if demands.iter().sum::<f64>() <= target {
        return None;
    }
    let mut ascending = demands.to_vec();
    ascending.sort_by(f64::total_cmp);
    let mut left = target;
    for (number, demand) in ascending.iter().enumerate() {
        // What each of those that are left could have.
        let part = left / demands.len().saturating_sub(number).max(1) as f64;
        if *demand > part {
            return Some(part.max(0.0));
        }
        left -= demand;
    }
    None
}

/// The part of its time that a vCPU has.
fn share(percent: u8) -> f64 {
    (100.0 - f64::from(percent)) / 100.0
}

/// What each vCPU would dirty at full speed, in bytes a second.
fn demands(sample: &Sample) -> Vec<f64> {
    let throttled = &sample.throttled;
    let weights = sample.weights.as_ref().filter(|weights| weights.len() == throttled.len());
    let total = weights.map_or(0.0, |weights| weights.iter().map(|weight| *weight as f64).sum::<f64>());
    let alike = 1.0 / throttled.len().max(1) as f64;
    let part = |vcpu: usize| match weights.and_then(|weights| weights.get(vcpu)) {
        Some(weight) if total > 0.0 => *weight as f64 / total,
        _ => alike,
    };
    let demand = |(vcpu, percent): (usize, &u8)| sample.bytes_per_second * part(vcpu) / share(*percent).max(0.01);
    throttled.iter().enumerate().map(demand).collect()
}

/// What is asked for each vCPU from here on, in percent, so that all together dirty `target` bytes a second: where `in_force`
/// is asked for now, and `before` was in the round.
pub(super) fn adjust(in_force: &[u8], before: &[u8], sample: &Sample, target: f64, settings: &Settings) -> Vec<u8> {
    let demands = demands(sample);
    let cap = cap(&demands, target);
    let wanted = |demand: f64| match cap {
        Some(cap) if demand > cap => {
            let percent = (100.0 * (1.0 - cap / demand) - 1e-9).ceil();
            (percent as u8).max(settings.initial).min(settings.max)
        }
        _ => 0,
    };
    let all = in_force.iter().zip(before.iter().chain(std::iter::repeat(&0))).zip(&demands);
    all.map(|((now, before), demand)| {
        let wanted = wanted(*demand);
        let (has, would_have) = (share(*now), share(wanted));
        if wanted > *now && (*now == 0 || would_have <= has * RAISE_PART) {
            let most = before.saturating_add(settings.increment);
            wanted.min(most.max(settings.initial)).max(*now)
        } else if wanted == 0 || would_have >= has * LOWER_PART {
            let given_back = (100.0 * (1.0 - has * MOST_LOWERED)).max(0.0).ceil();
            wanted.max(given_back as u8).min(settings.max)
        } else {
            // What somebody has lowered meanwhile counts.
            (*now).min(settings.max)
        }
    })
    .collect()
}

/// QEMU 10's way, for comparison: when two rounds have left too much, all vCPUs alike are slowed by the first step, and then
/// by another each time, and never less.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FixedSteps {
    too_much: u32,
}

impl FixedSteps {
    /// After a round that has left too much, or not: what all are to be slowed by.
    pub(super) fn after(&mut self, too_much: bool, in_force: u8, settings: &Settings) -> u8 {
        if !too_much {
            return in_force;
        }
        self.too_much += 1;
        if self.too_much < 2 {
            return in_force;
        }
        self.too_much = 0;
        match in_force {
            0 => settings.initial,
            percent => percent.saturating_add(settings.increment).min(settings.max),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::convergence::{Costs, Decision, bandwidth, decide, encoded_part};
    use super::*;

    const MIB: f64 = (1 << 20) as f64;
    const SETTINGS: Settings = Settings { threshold: 50, initial: 1, increment: 99, max: 99 };

    fn sample(bytes_per_second: f64, weights: &[u64], throttled: &[u8]) -> Sample {
        Sample { bytes_per_second, weights: Some(weights.to_vec()), throttled: throttled.to_vec() }
    }

    #[test]
    fn caps() {
        assert_eq!(cap(&[], 1.0), None);
        assert_eq!(cap(&[1.0, 2.0], 3.0), None, "all can have what they want");
        assert_eq!(cap(&[100.0], 25.0), Some(25.0));
        assert_eq!(cap(&[100.0, 2.0, 3.0], 25.0), Some(20.0), "the small ones have theirs");
        assert_eq!(cap(&[100.0, 100.0, 10.0], 60.0), Some(25.0));
        assert_eq!(cap(&[8.0, 8.0], 0.0), Some(0.0));
    }

    proptest! {
        /// All together have what is wanted, unless the most that can be taken is not enough; who dirties less than the cap
        /// is left alone; and nobody dirties more than one that is slowed.
        #[test]
        fn water_is_level(demands in prop::collection::vec(0.0..1000.0f64, 1..16), target in 0.1..2000.0f64) {
            let total: f64 = demands.iter().sum();
            let Some(cap) = cap(&demands, target) else {
                prop_assert!(total <= target);
                return Ok(());
            };
            let filled: f64 = demands.iter().map(|demand| demand.min(cap)).sum();
            prop_assert!((filled - target).abs() < 1e-6 * target.max(1.0), "{filled} of {target}");
            let weights: Vec<u64> = demands.iter().map(|demand| (demand * 1e6) as u64).collect();
            let none = vec![0; demands.len()];
            let percent = adjust(&none, &none, &sample(total, &weights, &none), target, &SETTINGS);
            let slowed: Vec<f64> = demands.iter().zip(&percent).map(|(demand, p)| demand * share(*p)).collect();
            let at_most = percent.contains(&99);
            prop_assert!(at_most || slowed.iter().sum::<f64>() <= target * 1.001 + 1e-3, "{slowed:?} of {target}");
            for (demand, percent) in demands.iter().zip(&percent) {
                prop_assert!(*demand > cap * 0.999 || *percent == 0, "{demand} is below {cap} and slowed by {percent}");
            }
        }
    }

    #[test]
    fn by_how_much() {
        let adjust = |now: &[u8], sample: &Sample, target, settings| adjust(now, now, sample, target, settings);
        // One vCPU dirties four times what may be.
        assert_eq!(adjust(&[0], &sample(100.0, &[1], &[0]), 25.0, &SETTINGS), [75]);
        // It still does, throttled by half, so it takes as much more.
        assert_eq!(adjust(&[50], &sample(100.0, &[1], &[50]), 25.0, &SETTINGS), [88]);
        // The hard one alone pays.
        assert_eq!(adjust(&[0; 3], &sample(103.0, &[100, 1, 2], &[0; 3]), 28.0, &SETTINGS), [75, 0, 0]);
        // Nobody knows who it is.
        let unknown = Sample { weights: None, ..sample(100.0, &[], &[0; 4]) };
        assert_eq!(adjust(&[0; 4], &unknown, 25.0, &SETTINGS), [75; 4]);
        let nothing_counted = sample(100.0, &[0; 4], &[0; 4]);
        assert_eq!(adjust(&[0; 4], &nothing_counted, 25.0, &SETTINGS), [75; 4], "devices write, too");
        // Bounds: at least, by no more at a time, at most.
        let bounded = Settings { initial: 20, increment: 10, max: 60, ..SETTINGS };
        assert_eq!(adjust(&[0], &sample(100.0, &[1], &[0]), 95.0, &bounded), [20]);
        assert_eq!(adjust(&[0], &sample(100.0, &[1], &[0]), 25.0, &bounded), [20]);
        assert_eq!(adjust(&[20], &sample(80.0, &[1], &[20]), 25.0, &bounded), [30]);
        assert_eq!(adjust(&[55], &sample(80.0, &[1], &[55]), 25.0, &bounded), [60]);
        assert_eq!(adjust(&[80], &sample(80.0, &[1], &[80]), 25.0, &bounded), [60], "the most was lowered meanwhile");
        assert_eq!(super::adjust(&[30], &[20], &sample(80.0, &[1], &[30]), 25.0, &bounded), [30], "once a round");
        // What is nearly right is left as it is; what is far too much is given back.
        assert_eq!(adjust(&[75], &sample(27.0, &[1], &[75]), 25.0, &SETTINGS), [75]);
        assert_eq!(adjust(&[75], &sample(22.0, &[1], &[75]), 25.0, &SETTINGS), [75]);
        assert_eq!(adjust(&[75], &sample(12.5, &[1], &[75]), 25.0, &SETTINGS), [50]);
        assert_eq!(adjust(&[75], &sample(5.0, &[1], &[75]), 25.0, &SETTINGS), [0]);
        assert_eq!(
            adjust(&[99], &sample(0.0, &[0], &[99]), 25.0, &SETTINGS),
            [96],
            "of what hardly runs little is known"
        );
        // The operator's throttle slows it already: what it would do without is what counts.
        assert_eq!(adjust(&[0], &sample(50.0, &[1], &[50]), 25.0, &SETTINGS), [75]);
    }

    #[test]
    fn when_to_measure() {
        let round = |sent: u64, dirty_bytes: u64, millis: u64| RoundFigures {
            duration: Duration::from_millis(millis),
            ram_bytes: sent,
            transferred_bytes: sent,
            dirty_bytes,
            dirty_rate: 0,
        };
        for (round, in_force, expected) in [
            (round(100, 50, 10_000), 0, 0),
            (round(100, 51, 10_000), 0, MOST_WINDOWS),
            (round(100, 51, 450), 0, 2),
            (round(100, 51, 10), 0, 1),
            (round(100, 10, 10_000), 40, 1),
            (round(100, 10, 100), 40, 0),
        ] {
            assert_eq!(windows(&round, 1.0, 50, &[in_force]), expected, "{round:?}, {in_force} %");
        }
        assert_eq!(windows(&round(10, 51, 10_000), 0.1, 50, &[0]), MOST_WINDOWS, "as much as it takes on the way");
        assert_eq!(windows(&round(100, 51, 10_000), 0.1, 50, &[0]), 0);
    }

    #[test]
    fn fixed_steps() {
        let settings = Settings { initial: 20, increment: 10, ..SETTINGS };
        let (mut steps, mut percent, mut all) = (FixedSteps::default(), 0, Vec::new());
        for too_much in [true, true, false, true, false, true, true, true].into_iter().chain([true; 16]) {
            percent = steps.after(too_much, percent, &settings);
            all.push(percent);
        }
        assert_eq!(all[..8], [0, 20, 20, 20, 20, 30, 30, 40]);
        assert_eq!(percent, 99);
    }

    /// A vCPU that writes pages of a working set of its own, evenly.
    #[derive(Clone, Copy)]
    struct Writer {
        rate: f64,
        working_set: f64,
    }

    struct Simulated {
        writers: Vec<Writer>,
        throttled: Vec<u8>,
    }

    impl Simulated {
        fn new(writers: &[(f64, f64)]) -> Self {
            let writer = |(rate, working_set): &(f64, f64)| Writer { rate: rate * MIB, working_set: working_set * MIB };
            Self { writers: writers.iter().map(writer).collect(), throttled: vec![0; writers.len()] }
        }

        /// Bytes that become dirty within so long, of each vCPU.
        fn dirty(&self, seconds: f64) -> Vec<f64> {
            let each = self.writers.iter().zip(&self.throttled);
            each.map(|(writer, percent)| {
                let touched = writer.rate * share(*percent) * seconds;
                writer.working_set * (1.0 - (-touched / writer.working_set).exp())
            })
            .collect()
        }

        fn measure(&self) -> Sample {
            let dirty = self.dirty(WINDOW.as_secs_f64());
            let each = self.writers.iter().zip(&self.throttled);
            Sample {
                bytes_per_second: dirty.iter().sum::<f64>() / WINDOW.as_secs_f64(),
                weights: Some(each.map(|(writer, percent)| (writer.rate * share(*percent)) as u64).collect()),
                throttled: self.throttled.clone(),
            }
        }

        /// Rounds until the guest can be stopped, or none after so many; and how long they take.
        fn converge(&mut self, link: f64, most_rounds: usize) -> Option<(usize, f64)> {
            let costs = Costs {
                fixed: Duration::from_millis(2),
                max_bandwidth: 0,
                avail_switchover_bandwidth: 0,
                speedup_when_stopped: 1.0,
            };
            let limit = Duration::from_millis(300);
            let (mut rounds, mut to_send, mut took) = (Vec::new(), 1024.0 * MIB, 0.0);
            for number in 1..=most_rounds {
                let seconds = to_send / (link * MIB) + 0.001;
                took += seconds;
                let dirty: f64 = self.dirty(seconds).iter().sum();
                rounds.push(RoundFigures {
                    duration: Duration::from_secs_f64(seconds),
                    ram_bytes: to_send as u64,
                    transferred_bytes: to_send as u64,
                    dirty_bytes: dirty as u64,
                    dirty_rate: (dirty / seconds) as u64,
                });
                to_send = dirty;
                let verdict = decide(&rounds, &costs, limit);
                if verdict.decision == Decision::SwitchOver {
                    return Some((number, took));
                }
                if verdict.predicted <= limit {
                    continue;
                }
                let (last, part) = (rounds.last().copied().unwrap(), encoded_part(&rounds));
                let target = bandwidth(&rounds, 0) as f64 / part * 0.5;
                let before = self.throttled.clone();
                for _ in 0..windows(&last, part, 50, &before) {
                    took += WINDOW.as_secs_f64();
                    let next = adjust(&self.throttled, &before, &self.measure(), target, &SETTINGS);
                    let raised = next.iter().zip(&self.throttled).any(|(next, now)| next > now);
                    self.throttled = next;
                    if !raised {
                        break;
                    }
                }
            }
            None
        }
    }

    /// Every guest converges, by a throttle that is no larger than it takes.
    #[test]
    fn hot_guests_converge() {
        for working_set in [32.0, 128.0, 512.0] {
            for times in [0.5, 1.0, 2.0, 4.0, 8.0] {
                let mut guest = Simulated::new(&[(50.0 * times, working_set)]);
                let (rounds, _) =
                    guest.converge(50.0, 30).unwrap_or_else(|| panic!("{times} times, {working_set} MiB"));
                assert!(rounds <= 16, "{times} times, {working_set} MiB: {rounds} rounds");
                let percent = guest.throttled[0];
                let most = 100.0 * (1.0 - 0.5 / times) + 2.0;
                assert!(f64::from(percent) <= most, "{times} times, {working_set} MiB: {percent} %");
            }
        }
        // One that is underestimated even by a window: 64 times the bandwidth into 32 MiB.
        let mut guest = Simulated::new(&[(3200.0, 32.0)]);
        assert!(guest.converge(50.0, 20).is_some());
    }

    /// The vCPUs that dirty little run on as they did.
    #[test]
    fn one_hard_vcpu_of_four() {
        let mut guest = Simulated::new(&[(2.0, 8.0), (400.0, 128.0), (2.0, 8.0), (0.0, 8.0)]);
        assert!(guest.converge(50.0, 20).is_some());
        let [a, hard, b, c] = guest.throttled[..] else { panic!("four vCPUs") };
        assert_eq!((a, b, c), (0, 0, 0));
        assert!((93..=97).contains(&hard), "{hard} %");
    }

    /// A load that ends is not paid for on and on, and one that moves to another vCPU is paid for by that one.
    #[test]
    fn what_changes_is_followed() {
        let mut guest = Simulated::new(&[(400.0, 128.0), (1.0, 128.0)]);
        let round = RoundFigures {
            duration: Duration::from_secs(2),
            ram_bytes: 100 << 20,
            transferred_bytes: 100 << 20,
            dirty_bytes: 60 << 20,
            dirty_rate: 0,
        };
        let decide = |guest: &mut Simulated| {
            let before = guest.throttled.clone();
            for _ in 0..windows(&round, 1.0, 50, &before) {
                guest.throttled = adjust(&guest.throttled, &before, &guest.measure(), 25.0 * MIB, &SETTINGS);
            }
        };
        decide(&mut guest);
        assert!(guest.throttled[0] > 90 && guest.throttled[1] == 0, "{:?}", guest.throttled);
        let steady = guest.throttled.clone();
        for _ in 0..10 {
            decide(&mut guest);
            assert_eq!(guest.throttled, steady, "nothing has changed");
        }
        guest.writers.swap(0, 1);
        decide(&mut guest);
        assert!(guest.throttled[0] == 0 && guest.throttled[1] > 90, "{:?}", guest.throttled);
        guest.writers[1].rate = MIB;
        decide(&mut guest);
        assert_eq!(guest.throttled, [0, 0]);
    }
}
