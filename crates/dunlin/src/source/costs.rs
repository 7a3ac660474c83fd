//! What a switchover costs besides RAM: the parts of it, and what is measured of them while the guest runs.
//!
//! The machines' own parts are as they say, or as they lately were. The way there and back, and what the destination needs to
//! take device state, are measured by probes: messages of the same size that are checked as device state is and dropped.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::error::Cause;
use crate::guest::Expected;
use crate::units::format_size;
use crate::wire::Probed;

/// The longest probe. More state is reckoned from one of this size.
const MAX_PROBE_BYTES: u64 = 16 << 20;
/// A probe should not take longer: no RAM is sent meanwhile.
const LONGEST: Duration = Duration::from_millis(250);
/// A probe of more state than this has at least so many bytes.
const SMALLEST: u64 = 64 << 10;
/// What a destination may say that a part of its takes.
const BELIEVABLE: Duration = Duration::from_secs(600);
/// How many probes are remembered. The slowest of them counts.
const REMEMBERED: usize = 8;
/// How long a probe is remembered. The next probe is also due after this time at the latest, so that a slow probe is
/// soon replaced.
const FRESH: Duration = Duration::from_secs(5);
/// The pause after a probe is this many times as long as the probe, but at most [`FRESH`].
const PART: u32 = 20;

/// What a probe has shown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Measured {
    /// One without bytes: there and back.
    pub(super) round_trip: Duration,
    /// One with bytes, until it was answered.
    pub(super) took: Duration,
    pub(super) bytes: u64,
    /// The bandwidth limit under which it went; 0 for none.
    pub(super) rate: u64,
}

impl Measured {
    /// How long `bytes` will take under a limit of `rate`, there and back included.
    fn scaled(&self, bytes: u64, rate: u64) -> Duration {
        let paced = |bytes: u64, rate: u64| match rate {
            0 => 0.0,
            rate => bytes as f64 / rate as f64,
        };
        // What the bytes took besides the limit grows with them; what the message took does not.
        let besides = self.took.saturating_sub(self.round_trip).as_secs_f64() - paced(self.bytes, self.rate);
        let grown = besides.max(0.0) * (bytes as f64 / self.bytes.max(1) as f64).max(1.0);
        let seconds = grown.max(paced(bytes, rate));
        self.round_trip.saturating_add(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }
}

/// The probes of a migration.
#[derive(Debug, Default)]
pub(super) struct Probes {
    recent: VecDeque<(Instant, Measured)>,
    /// When the latest ended, and how long it took in all.
    latest: Option<(Instant, Duration)>,
    number: u32,
    /// What the destination said with its last answer.
    there: Option<Probed>,
}

impl Probes {
    /// Whether it is time for another: they must not take what is to be measured. One under another limit than there is now
    /// says too little.
    pub(super) fn are_due(&self, now: Instant, rate: u64) -> bool {
        if self.recent.back().is_some_and(|(_, latest)| latest.rate != rate) {
            return true;
        }
        self.latest.is_none_or(|(at, took)| now.saturating_duration_since(at) >= took.saturating_mul(PART).min(FRESH))
    }

    /// The number of the next message to be answered.
    pub(super) fn next_number(&mut self) -> u32 {
        self.number = self.number.wrapping_add(1);
        self.number
    }

    /// Bytes to measure `state_bytes` with, on a link that carries about `bandwidth` bytes a second.
    pub(super) fn size(state_bytes: u64, bandwidth: u64) -> u64 {
        let soon = (bandwidth as f64 * LONGEST.as_secs_f64()) as u64;
        state_bytes.min(MAX_PROBE_BYTES).min(soon.max(SMALLEST))
    }

    /// A probe is over that began at `began`.
    pub(super) fn note(&mut self, began: Instant, now: Instant, measured: Measured, there: Probed) {
        self.recent.retain(|(at, _)| now.saturating_duration_since(*at) < FRESH);
        if self.recent.len() >= REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((now, measured));
        self.latest = Some((now, now.saturating_duration_since(began)));
        self.there = Some(there);
    }

    /// What a switchover will cost besides RAM. `here` is the cost of this side's machine, `look` the time to find the
    /// last dirty pages, and `rate` the bandwidth limit while the guest is stopped (0 for none).
    /// This side may have to stand still for `standstill`.
    pub(super) fn fixed(&self, here: &Expected, look: Duration, rate: u64, standstill: Duration) -> Fixed {
        let state = self.recent.iter().map(|(_, probe)| probe.scaled(here.state_bytes, rate)).max().unwrap_or_default();
        let round_trip = self.recent.iter().map(|(_, probe)| probe.round_trip).max().unwrap_or_default();
        let there =
            self.there.unwrap_or(Probed { number: 0, load: here.load, resume: here.resume, late: Duration::ZERO });
        Fixed {
            pause: here.pause,
            look,
            save: here.save,
            state_bytes: here.state_bytes,
            state,
            load: there.load,
            release: round_trip.saturating_add(here.claim),
            resume: there.resume,
            late: there.late,
            standstill,
        }
    }
}

/// A destination's word, unless it is beyond all reason.
pub(super) fn believable(there: Probed) -> Result<Probed, Cause> {
    match [there.load, there.resume, there.late].into_iter().max() {
        Some(longest) if longest > BELIEVABLE => Err(Cause::Incompatible {
            reason: format!("the destination says that it will need {} s to start the guest", longest.as_secs()),
        }),
        _ => Ok(there),
    }
}

/// Bytes that nothing on the way can compress.
pub(super) fn any_bytes(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// What a switchover costs besides RAM, part by part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Fixed {
    pub(super) pause: Duration,
    /// For the last dirty pages.
    pub(super) look: Duration,
    pub(super) save: Duration,
    pub(super) state_bytes: u64,
    /// Device state on its way, and the answer to it.
    pub(super) state: Duration,
    pub(super) load: Duration,
    /// Giving the guest away, and the answer to that.
    pub(super) release: Duration,
    pub(super) resume: Duration,
    /// The destination is short of processors.
    pub(super) late: Duration,
    /// So is this side.
    pub(super) standstill: Duration,
}

impl Fixed {
    fn parts(&self) -> [(Duration, String); 9] {
        let said = |text: &str| text.to_owned();
        [
            (self.pause, said("to pause it here")),
            (self.look, said("to look for the last dirty pages")),
            (self.save, said("to save the device state here")),
            (self.state, format!("for {} of device state on the way", format_size(self.state_bytes))),
            (self.load, said("to load the device state there")),
            (self.release, said("to hand it over, there and back")),
            (self.resume, said("to start it there")),
            (self.late, said("until the destination, which is short of processor time, gets to it")),
            (self.standstill, said("until this side, which is short of processor time, gets to it")),
        ]
    }

    /// All of it.
    pub(super) fn total(&self) -> Duration {
        self.parts().iter().fold(Duration::ZERO, |sum, (part, _)| sum.saturating_add(*part))
    }

    /// The longest part, in words.
    pub(super) fn longest(&self) -> String {
        let longest = self.parts().into_iter().max_by_key(|(part, _)| *part);
        longest.map(|(part, what)| format!("{:.0} ms {what}", part.as_secs_f64() * 1e3)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn the_limit_when_stopped_counts_and_not_that_of_the_probe() {
        let unlimited = Measured { round_trip: ms(2), took: ms(12), bytes: 10 * MIB, rate: 0 };
        assert_eq!(unlimited.scaled(10 * MIB, 0), ms(12));
        assert_eq!(unlimited.scaled(20 * MIB, 0), ms(22), "more bytes take more");
        assert_eq!(unlimited.scaled(MIB, 0), ms(12), "fewer are taken to take as much");
        assert_eq!(unlimited.scaled(20 * MIB, 10 * MIB), ms(2002));
        let limited = Measured { round_trip: ms(2), took: ms(1002), bytes: 10 * MIB, rate: 10 * MIB };
        assert_eq!(limited.scaled(10 * MIB, 10 * MIB), ms(1002));
        assert_eq!(limited.scaled(10 * MIB, 100 * MIB), ms(102));
        let slower_than_that = Measured { took: ms(3002), ..limited };
        assert_eq!(slower_than_that.scaled(10 * MIB, 10 * MIB), ms(2002), "the link carries 5 MiB/s beside the limit");
    }

    #[test]
    fn the_slowest_probe_counts_and_the_longest_part_is_named() {
        let began = Instant::now();
        let mut probes = Probes::default();
        let there = Probed { number: 1, load: ms(5), resume: ms(6), late: ms(7) };
        let here = Expected { pause: ms(1), save: ms(2), load: ms(90), resume: ms(90), claim: ms(3), state_bytes: 100 };
        for took in [4, 40, 4] {
            let measured = Measured { round_trip: ms(took / 4), took: ms(took), bytes: 100, rate: 0 };
            probes.note(began, began + ms(took), measured, there);
        }
        let fixed = probes.fixed(&here, ms(4), 0, ms(8));
        assert_eq!(fixed.total(), ms(1 + 4 + 2 + 40 + 5 + 10 + 3 + 6 + 7 + 8));
        assert_eq!(fixed.longest(), "40 ms for 100 B of device state on the way");
    }

    #[test]
    fn probes_take_a_twentieth_of_the_time() {
        let began = Instant::now();
        let mut probes = Probes::default();
        assert!(probes.are_due(began, 0));
        let there = Probed { number: 1, load: ms(0), resume: ms(0), late: ms(0) };
        probes.note(began, began + ms(10), Measured { round_trip: ms(1), took: ms(9), bytes: 1, rate: 0 }, there);
        assert!(!probes.are_due(began + ms(209), 0));
        assert!(probes.are_due(began + ms(210), 0));
        assert!(probes.are_due(began + ms(11), 5), "another limit is another link");
        let slow = Measured { round_trip: ms(3000), took: ms(3000), bytes: 1, rate: 0 };
        probes.note(began, began + ms(6000), slow, there);
        assert!(probes.are_due(began + ms(11_000), 0), "but are not given up after one that took long");
        let here = Expected { pause: ms(0), save: ms(0), load: ms(0), resume: ms(0), claim: ms(0), state_bytes: 1 };
        let usual = Measured { round_trip: ms(1), took: ms(1), bytes: 1, rate: 0 };
        probes.note(began + ms(11_000), began + ms(11_000), usual, there);
        assert_eq!(probes.fixed(&here, ms(0), 0, ms(0)).total(), ms(2), "which is forgotten");
    }
}
