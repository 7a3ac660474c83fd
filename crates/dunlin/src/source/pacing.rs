//! The bandwidth limit: one pacer for all channels of a migration.
//!
//! A sender pays for its bytes before it sends them. Payment is a place on a common time line that moves forward by
//! bytes divided by rate, and the sender waits until that time has come. A little lateness may be caught up, so that
//! a sleep that lasts too long does not cost bandwidth.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::link::lock;

/// How much lateness may be caught up.
const CATCH_UP: Duration = Duration::from_millis(20);
/// Longest sleep between looks at the rate and the stop flag.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes of pages in a frame at full speed.
const FRAME_BYTES: u64 = 2 << 20;
/// A frame takes at most this part of a second: the smaller the frames, the evener a slow stream.
const FRAMES_PER_SECOND: u64 = 100;
const SMALLEST_FRAME: u64 = 4096;

/// Spreads the bytes of all channels over time.
#[derive(Debug)]
pub(super) struct Pacer {
    /// Bytes a second; 0 is unlimited.
    rate: AtomicU64,
    /// When the next byte may go.
    next: Mutex<Instant>,
}

impl Pacer {
    pub(super) fn new(rate: u64) -> Self {
        Self { rate: AtomicU64::new(rate), next: Mutex::new(Instant::now()) }
    }

    /// Changes the rate; 0 is unlimited. Takes effect with the next frame.
    pub(super) fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
    }

    pub(super) fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    /// Bytes of pages to put into one frame at the present rate.
    pub(super) fn frame_bytes(&self) -> u64 {
        match self.rate() {
            0 => FRAME_BYTES,
            rate => (rate / FRAMES_PER_SECOND).clamp(SMALLEST_FRAME, FRAME_BYTES),
        }
    }

    /// Waits until the time of all that was paid for is over, or `stop` is set: who sends next then sends at once.
    pub(super) fn settle(&self, stop: &AtomicBool) {
        let due = *lock(&self.next);
        self.wait(due, stop);
    }

    /// Waits until `bytes` more may be sent, or `stop` is set.
    pub(super) fn pay(&self, bytes: u64, stop: &AtomicBool) {
        let rate = self.rate();
        if rate == 0 {
            return;
        }
        let cost = Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate)) as u64);
        let due = {
            let mut next = lock(&self.next);
            let now = Instant::now();
            let due = (*next).max(now.checked_sub(CATCH_UP).unwrap_or(now));
            *next = due + cost;
            due
        };
        self.wait(due, stop);
    }

    fn wait(&self, due: Instant, stop: &AtomicBool) {
        loop {
            let wait = due.saturating_duration_since(Instant::now());
            // A limit lifted meanwhile lets everybody go.
            if wait.is_zero() || stop.load(Ordering::Relaxed) || self.rate() == 0 {
                return;
            }
            std::thread::sleep(wait.min(LOOK));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the clock: bytes paid for over a second or so are within 5 % of the rate, whatever the number of
    /// senders. Lateness on a busy machine is caught up, but not endlessly, so the best of three counts.
    #[test]
    fn keeps_the_rate() {
        for (rate, senders) in [(1_000_000u64, 1u64), (1_000_000, 8), (50_000_000, 2), (2_000_000_000, 2)] {
            let worst = |_| {
                let pacer = Pacer::new(rate);
                let stop = AtomicBool::new(false);
                let sent = AtomicU64::new(0);
                let began = Instant::now();
                std::thread::scope(|scope| {
                    for _ in 0..senders {
                        scope.spawn(|| {
                            while began.elapsed() < Duration::from_millis(1000) {
                                let bytes = pacer.frame_bytes();
                                pacer.pay(bytes, &stop);
                                sent.fetch_add(bytes, Ordering::Relaxed);
                            }
                        });
                    }
                });
                let got = sent.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64();
                (got / rate as f64 - 1.0).abs()
            };
            let error = (0..3).map(worst).fold(f64::INFINITY, f64::min);
            assert!(error < 0.05, "{rate} B/s with {senders} senders: off by {:.1} %", error * 100.0);
        }
    }
}
