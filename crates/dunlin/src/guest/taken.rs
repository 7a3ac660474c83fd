//! How long starts and stops of this machine have taken.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::error::MachineStep;
use crate::machine::SwitchoverCost;

/// How many calls of each step are remembered.
const REMEMBERED: usize = 4;
/// How long a call is remembered.
const KNOWN: Duration = Duration::from_secs(300);
/// How long a single slow call counts. One slow call may be an accident, for instance of a host that stood still, and
/// must not keep guests from being moved.
const FRESH: Duration = Duration::from_secs(10);

/// The latest calls of each step that a switchover is made of.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pause: VecDeque<(Instant, Duration)>,
    save: VecDeque<(Instant, Duration)>,
    load: VecDeque<(Instant, Duration)>,
    resume: VecDeque<(Instant, Duration)>,
    claim: VecDeque<(Instant, Duration)>,
    state_bytes: VecDeque<(Instant, u64)>,
}

/// Puts in what is new, in the place of the oldest if there are enough.
fn push<T>(recent: &mut VecDeque<(Instant, T)>, now: Instant, value: T) {
    if recent.len() >= REMEMBERED {
        recent.pop_front();
    }
    recent.push_back((now, value));
}

/// The most within [`KNOWN`].
fn most(recent: &VecDeque<(Instant, u64)>, now: Instant) -> Option<u64> {
    recent.iter().filter(|(at, _)| now.saturating_duration_since(*at) <= KNOWN).map(|(_, bytes)| *bytes).max()
}

/// The time to expect for the next call: the second longest of the remembered ones, as the longest may be an accident.
/// If only one is remembered, it counts from once to four times `declared`; if none is, `declared` does. A longer one within
/// [`FRESH`] wins.
fn expected(recent: &VecDeque<(Instant, Duration)>, declared: Duration, now: Instant) -> Duration {
    let within = |age| recent.iter().filter(move |(at, _)| now.saturating_duration_since(*at) <= age);
    let fresh = within(FRESH).map(|(_, value)| *value).max();
    let mut known: Vec<Duration> = within(KNOWN).map(|(_, value)| *value).collect();
    known.sort_unstable();
    let known = match known.as_slice() {
        [] => declared,
        [one] => declared.max((*one).min(declared.saturating_mul(4))),
        [.., but_one, _] => *but_one,
    };
    fresh.map_or(known, |fresh| fresh.max(known))
}

impl Taken {
    /// A call has taken `duration` and ended at `now`.
    pub(super) fn note(&mut self, step: MachineStep, now: Instant, duration: Duration) {
        let recent = match step {
            MachineStep::Pause => &mut self.pause,
            MachineStep::Save => &mut self.save,
            MachineStep::Load => &mut self.load,
            MachineStep::Resume => &mut self.resume,
            MachineStep::Claim => &mut self.claim,
            _ => return,
        };
        push(recent, now, duration);
    }

    /// So much device state was saved or loaded.
    pub(super) fn note_state(&mut self, now: Instant, bytes: u64) {
        push(&mut self.state_bytes, now, bytes);
    }

    /// What a switchover will cost this machine: as it did lately, and as `declared` where that is not known.
    pub(super) fn expect(&self, declared: SwitchoverCost, now: Instant) -> Expected {
        let of = |recent, declared| expected(recent, declared, now);
        Expected {
            pause: of(&self.pause, declared.pause),
            save: of(&self.save, declared.save),
            load: of(&self.load, declared.load),
            resume: of(&self.resume, declared.resume),
            claim: of(&self.claim, Duration::ZERO),
            // No accident makes these more than they are.
            state_bytes: most(&self.state_bytes, now).unwrap_or(declared.state_bytes),
        }
    }
}

/// What a switchover is expected to cost one side's machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) pause: Duration,
    pub(crate) save: Duration,
    pub(crate) load: Duration,
    pub(crate) resume: Duration,
    /// Taking or giving up what only one machine may use.
    pub(crate) claim: Duration,
    pub(crate) state_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_took_counts_more_than_what_was_said() {
        let (now, ms) = (Instant::now(), Duration::from_millis);
        let declared = SwitchoverCost { pause: ms(1), save: ms(2), load: ms(3), resume: ms(4), state_bytes: 5 };
        let mut taken = Taken::default();
        let expected = taken.expect(declared, now);
        assert_eq!((expected.pause, expected.load, expected.claim, expected.state_bytes), (ms(1), ms(3), ms(0), 5));
        for (step, millis) in
            [(MachineStep::Pause, 30), (MachineStep::Pause, 20), (MachineStep::Claim, 7), (MachineStep::Profile, 99)]
        {
            taken.note(step, now, ms(millis));
        }
        taken.note_state(now, 1000);
        let expected = taken.expect(declared, now);
        assert_eq!((expected.pause, expected.save, expected.claim), (ms(30), ms(2), ms(7)), "the longest of each");
        assert_eq!(expected.state_bytes, 1000);
        let later = now + FRESH + ms(1);
        assert_eq!(taken.expect(declared, later).pause, ms(20), "later what is confirmed");
        assert_eq!(taken.expect(declared, later).claim, ms(0), "and nothing that was seen once");
        assert_eq!(taken.expect(declared, later).state_bytes, 1000);
        taken.note(MachineStep::Save, now, ms(7));
        assert_eq!(taken.expect(declared, later).save, ms(7), "but for what was said, four times as much");
        assert_eq!(taken.expect(declared, now + KNOWN + ms(1)).pause, ms(1), "until it is forgotten");
        for _ in 0..REMEMBERED {
            taken.note(MachineStep::Pause, now, ms(10));
        }
        assert_eq!(taken.expect(declared, now).pause, ms(10), "and of the latest");
    }
}
