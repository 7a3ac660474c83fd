//! How much faster the migration will be when the guest is stopped.
//!
//! On a host whose processors are all busy, the vCPUs take from the migration what they use, and give it back when they
//! are stopped. A bandwidth measured beside a busy guest is then too low for the switchover, by a factor that follows
//! from two measurements: what the guest uses, and whether any processor was idle. On a host with idle processors the
//! factor is 1.

use std::time::{Duration, Instant};

/// Weight of what was measured before, after half a second.
const MEMORY: Duration = Duration::from_millis(500);
/// Below this part of busy processors there is no contention,
const RELAXED: f64 = 0.6;
/// and from this part on there is nothing but contention.
const SATURATED: f64 = 0.9;
/// However the measurements come out, no more than this.
const LARGEST: f64 = 3.0;

/// Processor time up to a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    at: Instant,
    /// Seconds used by the guest: what the process used, without the engine.
    guest: f64,
    /// Seconds of all processors, and how many of these they were idle.
    all: f64,
    idle: f64,
}

/// Watches the processors over the rounds of a migration.
#[derive(Debug)]
pub(super) struct Contention {
    last: Option<Sample>,
    wall: f64,
    guest: f64,
    all: f64,
    idle: f64,
}

impl Contention {
    pub(super) fn new() -> Self {
        Self { last: sample(Duration::ZERO), wall: 0.0, guest: 0.0, all: 0.0, idle: 0.0 }
    }

    /// At the end of a round, with the engine's own processor time so far: the factor.
    pub(super) fn factor(&mut self, engine: Duration) -> f64 {
        let now = sample(engine);
        if let (Some(last), Some(now)) = (self.last, now) {
            let wall = now.at.saturating_duration_since(last.at).as_secs_f64();
            let keep = 0.5f64.powf(wall / MEMORY.as_secs_f64());
            self.wall = self.wall * keep + wall;
            self.guest = self.guest * keep + (now.guest - last.guest).max(0.0);
            self.all = self.all * keep + (now.all - last.all).max(0.0);
            self.idle = self.idle * keep + (now.idle - last.idle).max(0.0);
        }
        self.last = now;
        if self.wall <= 0.0 || self.all <= 0.0 {
            return 1.0;
        }
        factor(self.guest / self.wall, self.all / self.wall, 1.0 - self.idle / self.all)
    }
}

/// The factor, from the processors that the guest uses, how many there are, and the part of them that is busy.
fn factor(guest: f64, processors: f64, busy: f64) -> f64 {
    let used = processors * busy;
    let others = (used - guest).max(used / LARGEST);
    let saturation = ((busy - RELAXED) / (SATURATED - RELAXED)).clamp(0.0, 1.0);
    1.0 + saturation * (used / others.max(1e-9) - 1.0).clamp(0.0, LARGEST - 1.0)
}

fn sample(engine: Duration) -> Option<Sample> {
    let process = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let process = Duration::try_from(process).ok()?.as_secs_f64();
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    // "cpu" and ticks of: user, nice, system, idle, iowait, irq, softirq, steal, …; see proc(5).
    let ticks: Vec<f64> =
        stat.lines().next()?.split_whitespace().skip(1).take(8).filter_map(|n| n.parse().ok()).collect();
    let rate = rustix::param::clock_ticks_per_second() as f64;
    let idle = ticks.get(3)? + ticks.get(4)?;
    Some(Sample {
        at: Instant::now(),
        guest: process - engine.as_secs_f64(),
        all: ticks.iter().sum::<f64>() / rate,
        idle: idle / rate,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_from_what_is_busy() {
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(factor(0.0, 2.0, 1.0), 1.0), "an idle guest has nothing to give back");
        assert!(near(factor(1.0, 2.0, 1.0), 2.0), "half of a saturated host");
        assert!(near(factor(1.0, 64.0, 0.3), 1.0), "a host with room");
        assert!(factor(2.0, 2.0, 1.0) <= LARGEST, "measurements that cannot be");
        assert!(factor(0.5, 2.0, 0.75) > 1.0 && factor(0.5, 2.0, 0.75) < factor(0.5, 2.0, 0.95));
    }

    #[test]
    fn samples_this_host() {
        let mut contention = Contention::new();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(30) {
            std::hint::spin_loop();
        }
        let factor = contention.factor(Duration::ZERO);
        assert!((1.0..=LARGEST).contains(&factor), "{factor}");
    }
}
