//! How late a thread of this process runs: what a host short of processors, or a limit on them, costs whoever waits for it.

use std::time::{Duration, Instant};

/// Half of the time that is looked back on.
const HALF: Duration = Duration::from_secs(1);

/// The longest delays of the last one to two seconds.
#[derive(Debug)]
pub(super) struct Lateness {
    since: Instant,
    now: Duration,
    before: Duration,
}

impl Lateness {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), now: Duration::ZERO, before: Duration::ZERO }
    }

    /// Who was to run at `due` runs at `at`.
    pub(super) fn note(&mut self, due: Instant, at: Instant) {
        self.forget(at);
        self.now = self.now.max(at.saturating_duration_since(due));
    }

    /// The longest delay, as of `at`.
    pub(super) fn longest(&mut self, at: Instant) -> Duration {
        self.forget(at);
        self.now.max(self.before)
    }

    fn forget(&mut self, at: Instant) {
        let age = at.saturating_duration_since(self.since);
        if age < HALF {
            return;
        }
        self.before = if age < HALF * 2 { self.now } else { Duration::ZERO };
        (self.now, self.since) = (Duration::ZERO, at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_known_for_a_second_and_forgotten_after_two() {
        let began = Instant::now();
        let ms = |millis| began + Duration::from_millis(millis);
        let mut lateness = Lateness { since: began, now: Duration::ZERO, before: Duration::ZERO };
        lateness.note(ms(100), ms(190));
        lateness.note(ms(200), ms(203));
        lateness.note(ms(300), ms(250));
        assert_eq!(lateness.longest(ms(1150)), Duration::from_millis(90));
        lateness.note(ms(1200), ms(1210));
        assert_eq!(lateness.longest(ms(1900)), Duration::from_millis(90));
        assert_eq!(lateness.longest(ms(2250)), Duration::from_millis(10));
        assert_eq!(lateness.longest(ms(9000)), Duration::ZERO);
    }
}
