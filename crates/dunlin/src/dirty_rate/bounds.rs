//! What a measurement of the dirty rate can tell, and what it cannot.
//!
//! A page counts once, however often it is written. So over a longer time a guest that writes the same pages again and again
//! seems slower, and nothing says how often it writes them: the rate over the whole time is the least that it dirties, that
//! over the shortest window that was looked at the most that was seen. Where only samples are looked at, both have the error
//! of a sample besides.

use std::time::Duration;

/// Standard deviations of 95 %.
const Z: f64 = 1.96;

/// Of `all` samples, those that had changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Samples {
    pub(super) all: u64,
    pub(super) changed: u64,
}

impl Samples {
    /// The part that had changed.
    pub(super) fn part(self) -> f64 {
        self.changed as f64 / self.all.max(1) as f64
    }

    /// Between which parts that of all pages is, in 95 of 100 cases: Wilson's interval.
    pub(super) fn interval(self) -> (f64, f64) {
        if self.all == 0 {
            return (0.0, 1.0);
        }
        let (n, part) = (self.all as f64, self.part());
        let middle = part + Z * Z / (2.0 * n);
        let half = Z * (part * (1.0 - part) / n + Z * Z / (4.0 * n * n)).sqrt();
        let bound = |value: f64| (value / (1.0 + Z * Z / n)).clamp(0.0, 1.0);
        // Of nothing it is known exactly that it is nothing, and of everything.
        let low = if self.changed == 0 { 0.0 } else { bound(middle - half) };
        let high = if self.changed == self.all { 1.0 } else { bound(middle + half) };
        (low, high)
    }

    /// These and `others`.
    pub(super) fn and(self, others: Self) -> Self {
        Self { all: self.all.saturating_add(others.all), changed: self.changed.saturating_add(others.changed) }
    }
}

/// Bytes dirtied, each page once: as estimated, and between which the truth is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Dirtied {
    pub(super) bytes: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Dirtied {
    /// What was counted.
    pub(super) fn counted(bytes: u64) -> Self {
        let bytes = bytes as f64;
        Self { bytes, least: bytes, most: bytes }
    }

    /// By samples of `ram_bytes`.
    pub(super) fn sampled(ram_bytes: u64, samples: Samples) -> Self {
        let (low, high) = samples.interval();
        let ram_bytes = ram_bytes as f64;
        Self { bytes: ram_bytes * samples.part(), least: ram_bytes * low, most: ram_bytes * high }
    }

    /// Of two parts of RAM together.
    pub(super) fn and(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, least: self.least + other.least, most: self.most + other.most }
    }
}

/// Rates in bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Rates {
    pub(super) estimate: u64,
    pub(super) at_least: u64,
    pub(super) at_most: u64,
}

/// From what was dirtied over the whole time, and in a window of it on the average.
pub(super) fn rates((whole, took): (Dirtied, Duration), window: Option<(Dirtied, Duration)>) -> Rates {
    let a_second = |bytes: f64, time: Duration| (bytes / time.as_secs_f64().max(1e-9)) as u64;
    // Whatever is dirtied in a part of the time is dirtied in all of it.
    let (least, bytes, most) = window.map_or((0.0, 0.0, 0.0), |(seen, _)| (seen.least, seen.bytes, seen.most));
    let estimate = a_second(whole.bytes.max(bytes), took);
    let at_least = a_second(whole.least.max(least), took).min(estimate);
    let at_most = match window {
        Some((_, time)) => a_second(most, time),
        None => a_second(whole.most, took),
    };
    Rates { estimate, at_least, at_most: at_most.max(estimate) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against exact intervals (Clopper-Pearson) from tables: Wilson's is within a few percent of a point of them.
    #[test]
    fn intervals() {
        for (changed, all, low, high) in
            [(0, 100, 0.0, 0.036), (5, 100, 0.016, 0.113), (50, 100, 0.398, 0.602), (100, 100, 0.964, 1.0)]
        {
            let (found_low, found_high) = Samples { all, changed }.interval();
            assert!(
                (found_low - low).abs() < 0.012 && (found_high - high).abs() < 0.012,
                "{changed} of {all}: {found_low} to {found_high}"
            );
        }
        assert_eq!(Samples::default().interval(), (0.0, 1.0), "nothing was looked at");
    }

    /// A hot set that no sample of the whole time hit is in the windows' samples; one that nothing hit is below a bound.
    #[test]
    fn never_a_bare_nothing() {
        const GIB: u64 = 1 << 30;
        let seconds = Duration::from_secs;
        let none = Dirtied::sampled(4 * GIB, Samples { all: 2048, changed: 0 });
        let few = Dirtied::sampled(4 * GIB, Samples { all: 16384, changed: 8 });
        let found = rates((none, seconds(4)), Some((few, seconds(1))));
        assert_eq!(found.estimate, 512 << 10, "2 MiB in four seconds");
        assert!(found.at_least > 0 && found.at_least < 512 << 10 && found.at_most > 2 << 20, "{found:?}");
        let found = rates((none, seconds(4)), None);
        assert!(found.estimate == 0 && found.at_most > 1 << 20 && found.at_most < 3 << 20, "{found:?}");
        let found = rates((Dirtied::counted(8000), seconds(4)), Some((Dirtied::counted(6000), seconds(1))));
        assert_eq!(found, Rates { estimate: 2000, at_least: 2000, at_most: 6000 });
    }
}
