//! The convergence decision: what to do after a round. A pure function of the latest rounds.
//!
//! `downtime-limit` is a ceiling and not a target: the guest is not stopped while its downtime is predicted to be
//! longer, and below the limit another round is made for as long as it pays.

use std::time::Duration;

/// A round that pays saves at least this much downtime,
const WORTH: Duration = Duration::from_millis(1);
/// and at least this part of it.
const WORTH_PART: f64 = 0.1;
/// Rounds below the limit after which the guest is stopped in any case.
const PATIENCE: usize = 30;
/// Bandwidth is measured over the latest rounds that together moved this much.
const SAMPLE_BYTES: u64 = 32 << 20;
/// Rounds without progress after which a migration is said not to converge.
const STUCK_ROUNDS: usize = 3;

/// Rounds that a decision looks back on.
pub(super) const MEMORY: usize = 64;

/// What a round tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RoundFigures {
    /// How long it took, until the destination had everything in its place.
    pub(super) duration: Duration,
    /// RAM covered.
    pub(super) ram_bytes: u64,
    /// Bytes on all channels.
    pub(super) transferred_bytes: u64,
    /// RAM that was dirty at its end.
    pub(super) dirty_bytes: u64,
    /// Bytes of RAM the guest dirties a second.
    pub(super) dirty_rate: u64,
}

/// What a switchover costs besides RAM.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Costs {
    /// Pausing, looking for the last dirty pages, device state, load, resume and round trips.
    pub(super) fixed: Duration,
    /// The bandwidth limit; 0 for none.
    pub(super) max_bandwidth: u64,
    /// Bytes a second that a person says the link will carry with the guest stopped; 0 where nobody does.
    pub(super) avail_switchover_bandwidth: u64,
    /// How much faster than measured RAM travels once the guest is stopped; see `contention`.
    pub(super) speedup_when_stopped: f64,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    AnotherRound,
    SwitchOver,
}

/// The decision and what it rests on.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Verdict {
    pub(super) decision: Decision,
    /// The downtime if the guest were stopped now.
    pub(super) predicted: Duration,
    /// Bytes a second, measured.
    pub(super) bandwidth: u64,
    /// Set while rounds bring nothing: the two rates tell why,
    pub(super) not_converging: bool,
    /// unless the guest's RAM is not the reason: the switchover alone takes longer than the guest may be stopped.
    pub(super) fixed_too_long: bool,
}

fn seconds(bytes: u64, rate: u64) -> f64 {
    bytes as f64 / rate.max(1) as f64
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// Bytes a second over the latest rounds that moved enough to tell.
pub(super) fn bandwidth(rounds: &[RoundFigures], max_bandwidth: u64) -> u64 {
    let (mut bytes, mut time) = (0u64, Duration::ZERO);
    for round in rounds.iter().rev() {
        bytes = bytes.saturating_add(round.transferred_bytes);
        time = time.saturating_add(round.duration);
        if bytes >= SAMPLE_BYTES {
            break;
        }
    }
    let measured = (bytes as f64 / time.as_secs_f64().max(1e-9)) as u64;
    if max_bandwidth == 0 { measured } else { measured.min(max_bandwidth) }
}

/// Bytes that RAM dirtied again takes on the way, for each of its own: below 1 where pages travel as deltas or
/// compressed. The first round, of all of RAM, does not tell.
pub(super) fn encoded_part(rounds: &[RoundFigures]) -> f64 {
    match rounds {
        [_, .., last] if last.ram_bytes > 0 => (last.transferred_bytes as f64 / last.ram_bytes as f64).min(1.0),
        _ => 1.0,
    }
}

fn predict(rounds: &[RoundFigures], costs: &Costs) -> Duration {
    let dirty = rounds.last().map_or(0, |round| round.dirty_bytes);
    let dirty = (dirty as f64 * encoded_part(rounds)) as u64;
    costs.fixed.saturating_add(duration(seconds(dirty, bandwidth_when_stopped(rounds, costs))))
}

/// Bytes a second with the guest stopped: as measured, unless a person knows better.
fn bandwidth_when_stopped(rounds: &[RoundFigures], costs: &Costs) -> u64 {
    if costs.avail_switchover_bandwidth > 0 {
        return costs.avail_switchover_bandwidth;
    }
    let measured = bandwidth(rounds, costs.max_bandwidth);
    let stopped = (measured as f64 * costs.speedup_when_stopped.max(1.0)) as u64;
    if costs.max_bandwidth == 0 { stopped } else { stopped.min(costs.max_bandwidth) }
}

/// The bandwidth limit with the guest stopped: what a person says the link will carry then may be used.
pub(super) fn limit_when_stopped(max_bandwidth: u64, avail_switchover_bandwidth: u64) -> u64 {
    if max_bandwidth == 0 { 0 } else { max_bandwidth.max(avail_switchover_bandwidth) }
}

/// What to do after the last of `rounds`, of which [`MEMORY`] are enough.
pub(super) fn decide(rounds: &[RoundFigures], costs: &Costs, downtime_limit: Duration) -> Verdict {
    let bandwidth = bandwidth(rounds, costs.max_bandwidth);
    let predicted = predict(rounds, costs);
    let last = rounds.last().copied().unwrap_or(RoundFigures {
        duration: Duration::ZERO,
        ram_bytes: 0,
        transferred_bytes: 0,
        dirty_bytes: 0,
        dirty_rate: 0,
    });
    let history: Vec<Duration> =
        (1..=rounds.len()).filter_map(|n| rounds.get(..n)).map(|r| predict(r, costs)).collect();

    if predicted > downtime_limit {
        let fixed_too_long = costs.fixed > downtime_limit;
        let not_converging = fixed_too_long || stuck(&history);
        return Verdict { decision: Decision::AnotherRound, predicted, bandwidth, not_converging, fixed_too_long };
    }
    let pays = {
        let part = encoded_part(rounds);
        let time = |dirty_bytes: u64, bandwidth| seconds((dirty_bytes as f64 * part) as u64, bandwidth);
        let next = (last.dirty_rate as f64 * time(last.dirty_bytes, bandwidth)) as u64;
        let stopped = bandwidth_when_stopped(rounds, costs);
        let gain = duration(time(last.dirty_bytes, stopped) - time(last.dirty_bytes.min(next), stopped));
        gain > WORTH.max(predicted.mul_f64(WORTH_PART))
    };
    let below = history.iter().rev().take_while(|p| **p <= downtime_limit).count();
    // A guest that dirties the same pages in every round makes the estimate of the gain too good for ever.
    let improving = match history.as_slice() {
        [.., before, last, now] => *now < before.max(last).mul_f64(1.0 - WORTH_PART),
        _ => true,
    };
    let decision = if pays && improving && below < PATIENCE { Decision::AnotherRound } else { Decision::SwitchOver };
    Verdict { decision, predicted, bandwidth, not_converging: false, fixed_too_long: false }
}

/// Whether the latest rounds brought the predicted downtime down by less than is worth a round.
fn stuck(history: &[Duration]) -> bool {
    let Some(now) = history.last() else { return false };
    let Some(before) = history.len().checked_sub(STUCK_ROUNDS + 1).and_then(|index| history.get(index)) else {
        return false;
    };
    *now > before.mul_f64(1.0 - WORTH_PART)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const LIMIT: Duration = Duration::from_millis(300);
    const COSTS: Costs = Costs {
        fixed: Duration::from_millis(2),
        max_bandwidth: 0,
        avail_switchover_bandwidth: 0,
        speedup_when_stopped: 1.0,
    };

    /// A guest of `ram` with a working set of which it dirties `rate` bytes a second, uniformly, over a link of
    /// `bandwidth`: rounds until the decision, or `None` after 100.
    fn simulate(ram: u64, working_set: u64, rate: u64, bandwidth: u64) -> (Option<usize>, Verdict) {
        let mut rounds = Vec::new();
        let mut to_send = ram;
        loop {
            let time = seconds(to_send, bandwidth) + 0.001;
            let touched = rate as f64 * time;
            let dirty = working_set as f64 * (1.0 - (-touched / working_set.max(1) as f64).exp());
            rounds.push(RoundFigures {
                duration: duration(time),
                ram_bytes: to_send,
                transferred_bytes: to_send,
                dirty_bytes: dirty as u64,
                dirty_rate: rate,
            });
            to_send = dirty as u64;
            let verdict = decide(&rounds, &COSTS, LIMIT);
            if verdict.decision == Decision::SwitchOver {
                return (Some(rounds.len()), verdict);
            }
            if rounds.len() == 100 {
                return (None, verdict);
            }
        }
    }

    #[test]
    fn idle_takes_one_round() {
        let (rounds, verdict) = simulate(2048 * MIB, 0, 0, 1000 * MIB);
        assert_eq!(rounds, Some(1));
        assert_eq!(verdict.predicted, COSTS.fixed);
    }

    /// Below the bandwidth it converges, and goes on below the limit while that pays.
    #[test]
    fn goes_below_the_limit() {
        for percent in [25, 50, 75] {
            let (rounds, verdict) = simulate(2048 * MIB, 512 * MIB, 10 * MIB * percent, 1000 * MIB);
            assert!(rounds.is_some_and(|r| r < 40), "{percent} %: {rounds:?}");
            assert!(verdict.predicted < Duration::from_millis(20), "{percent} %: {verdict:?}");
        }
    }

    /// A working set that is dirty again in every round: too large for the limit, it goes on and says so; small
    /// enough, it stops at once and does not hope.
    #[test]
    fn a_hot_working_set() {
        let (rounds, verdict) = simulate(2048 * MIB, 600 * MIB, 20_000 * MIB, 1000 * MIB);
        assert_eq!(rounds, None);
        assert!(verdict.not_converging);
        let (rounds, verdict) = simulate(2048 * MIB, 200 * MIB, 20_000 * MIB, 1000 * MIB);
        assert!(rounds.is_some_and(|r| r <= 4), "{rounds:?}");
        assert!(!verdict.not_converging);
    }

    #[test]
    fn the_limit_is_a_ceiling() {
        let round = |dirty_bytes| RoundFigures {
            duration: Duration::from_secs(1),
            ram_bytes: 1000 * MIB,
            transferred_bytes: 1000 * MIB,
            dirty_bytes,
            dirty_rate: 0,
        };
        assert_eq!(decide(&[round(299 * MIB)], &COSTS, LIMIT).decision, Decision::AnotherRound, "a round pays");
        assert_eq!(decide(&[round(0)], &COSTS, LIMIT).decision, Decision::SwitchOver);
        let slow = Costs { fixed: Duration::from_millis(301), ..COSTS };
        let verdict = decide(&[round(0)], &slow, LIMIT);
        assert_eq!(verdict.decision, Decision::AnotherRound);
        assert!(verdict.not_converging && verdict.fixed_too_long);
    }

    /// Pages that travel as deltas stop the guest for as long as the deltas take.
    #[test]
    fn what_shrinks_counts_as_it_travels() {
        let round = |ram_bytes, transferred_bytes| RoundFigures {
            duration: Duration::from_secs(1),
            ram_bytes,
            transferred_bytes,
            dirty_bytes: 100 * MIB,
            dirty_rate: 0,
        };
        let costs = Costs { fixed: Duration::ZERO, ..COSTS };
        let first = round(4000 * MIB, 1000 * MIB);
        let predicted = |rounds: &[RoundFigures]| decide(rounds, &costs, LIMIT).predicted.as_secs_f64();
        assert!((predicted(&[first]) - 0.1).abs() < 0.001, "zero pages of the first round tell nothing");
        assert!(
            (predicted(&[first, round(1000 * MIB, 100 * MIB)]) - 0.1).abs() < 0.001,
            "a tenth of the bytes at a tenth of the rate"
        );
        let last = RoundFigures { duration: Duration::from_millis(100), ..round(1000 * MIB, 100 * MIB) };
        assert!((predicted(&[first, last]) - 0.01).abs() < 0.001);
    }

    /// A limit set below what was measured counts at once.
    #[test]
    fn a_new_bandwidth_limit_counts() {
        let round = RoundFigures {
            duration: Duration::from_secs(1),
            ram_bytes: 1000 * MIB,
            transferred_bytes: 1000 * MIB,
            dirty_bytes: 10 * MIB,
            dirty_rate: 0,
        };
        let costs = Costs { fixed: Duration::ZERO, max_bandwidth: 10 * MIB, ..COSTS };
        assert_eq!(decide(&[round], &costs, LIMIT).predicted, Duration::from_secs(1));
    }

    /// As QEMU has it: what a person says of the link counts for the prediction, in either direction, and nothing that was
    /// measured or limits the rounds.
    #[test]
    fn a_link_that_a_person_knows() {
        let round = RoundFigures {
            duration: Duration::from_secs(1),
            ram_bytes: 1000 * MIB,
            transferred_bytes: 1000 * MIB,
            dirty_bytes: 100 * MIB,
            dirty_rate: 20_000 * MIB,
        };
        let decided = |max_bandwidth, avail_switchover_bandwidth| {
            let costs = Costs { fixed: Duration::ZERO, max_bandwidth, avail_switchover_bandwidth, ..COSTS };
            let verdict = decide(&[round], &costs, LIMIT);
            (verdict.predicted, verdict.decision)
        };
        let milliseconds = Duration::from_millis;
        assert_eq!(decided(0, 0), (milliseconds(100), Decision::SwitchOver));
        assert_eq!(decided(0, 200 * MIB), (milliseconds(500), Decision::AnotherRound));
        assert_eq!(decided(100 * MIB, 0), (milliseconds(1000), Decision::AnotherRound));
        assert_eq!(decided(100 * MIB, 500 * MIB), (milliseconds(200), Decision::SwitchOver));
        assert_eq!([limit_when_stopped(0, 5), limit_when_stopped(3, 5), limit_when_stopped(5, 0)], [0, 5, 5]);
    }
}
