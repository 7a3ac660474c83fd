//! The bandwidth limit: one pacer for all channels of a migration.
//!
//! A sender pays for its bytes before it sends them. It takes the next place on one common line, whose length is what
//! was paid for and whose time has not passed yet, and waits until that place is reached. A little lateness may be
//! caught up, so that a sleep that lasts too long does not cost bandwidth.
//!
//! What must stay true: a changed rate holds from the next frame. The line is kept in bytes and not in time, so a rate
//! that was raised also shortens what is left of it. A rate that was lowered does not make what was sent before it cost
//! more time than it would have: 2 MiB that were paid for at 1 GB/s would silence a link of 4 KiB/s for minutes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::link::lock;

/// How much lateness may be caught up.
const CATCH_UP: Duration = Duration::from_millis(20);
/// Longest sleep between looks at the stop flag.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes of pages in a frame at full speed.
const FRAME_BYTES: u64 = 2 << 20;
/// A frame takes at most this part of a second: the smaller the frames, the evener a slow stream.
const FRAMES_PER_SECOND: u64 = 100;
const SMALLEST_FRAME: u64 = 4096;
/// Beyond this weight the line begins anew: only a rate that is raised and lowered again and again gets there.
const HEAVIEST: f64 = 1e100;

/// Spreads the bytes of all channels over time.
#[derive(Debug)]
pub(super) struct Pacer {
    /// Bytes a second; 0 is unlimited. As in `line`, for those who only want to know.
    rate: AtomicU64,
    line: Mutex<Line>,
    changed: Condvar,
}

/// What was paid for. Places on it are counted in bytes times [`weight`](Self::weight).
#[derive(Debug)]
struct Line {
    rate: u64,
    /// What a byte counts. It is 1 until a rate is lowered: then bytes that are paid for from now on count more, and those
    /// before them take as long as they would have.
    weight: f64,
    /// Where the line ends: the next place.
    end: f64,
    /// How far it has been worked off, as of `at`.
    done: f64,
    at: Instant,
    /// Counts how often the line began anew. Nobody waits for a place on an earlier one.
    number: u64,
}

impl Line {
    /// Works off what the time since the last look allows.
    fn advance(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(std::mem::replace(&mut self.at, now));
        let speed = self.rate as f64 * self.weight;
        self.done = (self.done + elapsed.as_secs_f64() * speed).min(self.end + CATCH_UP.as_secs_f64() * speed);
    }

    fn begin_anew(&mut self) {
        (self.weight, self.end, self.done) = (1.0, 0.0, 0.0);
        self.number = self.number.wrapping_add(1);
    }

    /// How long it takes until `place` of line `number` is reached.
    fn wait_for(&self, place: f64, number: u64) -> Duration {
        if self.rate == 0 || number != self.number || self.done >= place {
            return Duration::ZERO;
        }
        let seconds = (place - self.done) / (self.rate as f64 * self.weight);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

impl Pacer {
    pub(super) fn new(rate: u64) -> Self {
        let line = Line { rate, weight: 1.0, end: 0.0, done: 0.0, at: Instant::now(), number: 0 };
        Self { rate: AtomicU64::new(rate), line: Mutex::new(line), changed: Condvar::new() }
    }

    /// Changes the rate; 0 is unlimited. It holds from the next frame.
    pub(super) fn set_rate(&self, rate: u64) {
        let mut line = lock(&self.line);
        line.advance(Instant::now());
        let before = std::mem::replace(&mut line.rate, rate);
        if rate == 0 || line.weight > HEAVIEST {
            line.begin_anew();
        } else if rate < before {
            line.weight *= before as f64 / rate as f64;
        }
        // Lateness at one rate is not caught up at another.
        line.done = line.done.min(line.end);
        self.rate.store(rate, Ordering::Relaxed);
        drop(line);
        self.changed.notify_all();
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
        let (end, number) = {
            let line = lock(&self.line);
            (line.end, line.number)
        };
        self.wait(end, number, stop);
    }

    /// Waits until `bytes` more may be sent, or `stop` is set.
    pub(super) fn pay(&self, bytes: u64, stop: &AtomicBool) {
        self.pay_for(bytes, self.rate(), stop);
    }

    /// As [`pay`](Self::pay), for a frame whose size was chosen when the rate was `begun_at`. Where the rate is lower by
    /// now, the frame takes the time that it would have taken then.
    pub(super) fn pay_for(&self, bytes: u64, begun_at: u64, stop: &AtomicBool) {
        let (place, number) = {
            let mut line = lock(&self.line);
            line.advance(Instant::now());
            let rate = line.rate;
            if rate == 0 {
                return;
            }
            let place = line.end;
            let part = match begun_at {
                0 => 0.0,
                faster if faster > rate => rate as f64 / faster as f64,
                _ => 1.0,
            };
            line.end += bytes as f64 * line.weight * part;
            (place, line.number)
        };
        self.wait(place, number, stop);
    }

    fn wait(&self, place: f64, number: u64, stop: &AtomicBool) {
        let mut line = lock(&self.line);
        loop {
            line.advance(Instant::now());
            let wait = line.wait_for(place, number);
            if wait.is_zero() || stop.load(Ordering::Relaxed) {
                return;
            }
            line = self.changed.wait_timeout(line, wait.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    static NEVER: AtomicBool = AtomicBool::new(false);

    /// Pays as a channel does, for as long as asked; bytes that were let go since `from` are counted.
    struct Senders {
        pacer: Arc<Pacer>,
        over: Arc<AtomicBool>,
        sent: Arc<AtomicU64>,
        threads: Vec<std::thread::JoinHandle<()>>,
    }

    impl Senders {
        fn start(rate: u64, senders: usize) -> Self {
            let (pacer, over, sent) =
                (Arc::new(Pacer::new(rate)), Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
            let threads = (0..senders).map(|_| {
                let (pacer, over, sent) = (pacer.clone(), over.clone(), sent.clone());
                std::thread::spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        let (begun_at, bytes) = (pacer.rate(), pacer.frame_bytes());
                        if begun_at == 0 {
                            // An unlimited link is not endlessly fast.
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        pacer.pay_for(bytes, begun_at, &over);
                        sent.fetch_add(bytes, Ordering::Relaxed);
                    }
                })
            });
            Self { threads: threads.collect(), pacer, over, sent }
        }

        fn during(&self, time: Duration) -> (u64, f64) {
            let (before, began) = (self.sent.load(Ordering::Relaxed), Instant::now());
            std::thread::sleep(time);
            (self.sent.load(Ordering::Relaxed) - before, began.elapsed().as_secs_f64())
        }

        /// Waits until `bytes` more have been let go; how long that took.
        fn send(&self, bytes: u64) -> Duration {
            let (before, began) = (self.sent.load(Ordering::Relaxed), Instant::now());
            while self.sent.load(Ordering::Relaxed) - before < bytes && began.elapsed() < Duration::from_secs(30) {
                std::thread::sleep(Duration::from_millis(1));
            }
            began.elapsed()
        }
    }

    impl Drop for Senders {
        fn drop(&mut self) {
            self.over.store(true, Ordering::Relaxed);
            self.threads.drain(..).for_each(|thread| drop(thread.join()));
        }
    }

    /// From 4 KiB/s, where a frame is worth a second, to 1 GB/s: at once, and not when the old rate's debt is over.
    #[test]
    fn a_raised_rate_holds_at_once() {
        for senders in [1, 8] {
            let senders = Senders::start(4096, senders);
            // Each has paid for a frame at the slow rate, and waits.
            std::thread::sleep(Duration::from_millis(100));
            senders.pacer.set_rate(1_000_000_000);
            let took = senders.send(100_000_000);
            assert!(took < Duration::from_secs(3), "100 MB at 1 GB/s took {took:?}");
        }
        // Nor does who settles wait for the old rate.
        let pacer = Arc::new(Pacer::new(4096));
        pacer.pay(1 << 30, &NEVER);
        let settling = pacer.clone();
        let thread = std::thread::spawn(move || settling.settle(&NEVER));
        std::thread::sleep(Duration::from_millis(50));
        let began = Instant::now();
        pacer.set_rate(100_000_000_000);
        thread.join().unwrap();
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    }

    /// From 1 GB/s, or no limit, to 1 MB/s: no more than that, and no silence for what was sent before.
    #[test]
    fn a_lowered_rate_holds_at_once() {
        for before in [1_000_000_000, 0] {
            let senders = Senders::start(before, 4);
            std::thread::sleep(Duration::from_millis(100));
            senders.pacer.set_rate(1_000_000);
            // The frame that each sender has under way, at the old size, still goes.
            std::thread::sleep(Duration::from_millis(50));
            let (sent, seconds) = senders.during(Duration::from_millis(500));
            let most = 1e6 * (seconds + CATCH_UP.as_secs_f64()) + 4.0 * 10_000.0;
            assert!((sent as f64) < most, "{sent} bytes in {seconds:.3} s");
            let took = senders.send(500_000);
            assert!(took < Duration::from_secs(3), "500 KB at 1 MB/s took {took:?}");
        }
    }

    /// Rates that change all the time, between extremes, leave nothing behind.
    #[test]
    fn rates_that_change_all_the_time() {
        let senders = Senders::start(4096, 3);
        for _ in 0..300 {
            for rate in [4096, 1_000_000_000_000, 1, 50_000_000] {
                senders.pacer.set_rate(rate);
            }
        }
        let took = senders.send(5_000_000);
        assert!(took < Duration::from_secs(3), "5 MB at 50 MB/s took {took:?}");
        senders.pacer.set_rate(0);
        assert!(senders.send(5_000_000) < Duration::from_secs(3));
    }

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
