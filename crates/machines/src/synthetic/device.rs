//! A small device: a counter with a log of 64 KiB. Every tick writes an entry that follows from its number.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::program::mix;

/// Bytes of the log.
pub(super) const LOG_BYTES: usize = 64 << 10;
const ENTRY_BYTES: usize = 16;
const ENTRIES: u64 = (LOG_BYTES / ENTRY_BYTES) as u64;

#[derive(Debug)]
struct State {
    ticks: u64,
    log: Vec<u8>,
}

/// The device. Its clock is the machine's: it ticks only while the machine runs.
#[derive(Debug)]
pub(super) struct Device {
    state: Mutex<State>,
}

impl Default for Device {
    fn default() -> Self {
        Self { state: Mutex::new(State { ticks: 0, log: vec![0; LOG_BYTES] }) }
    }
}

/// The entry of a tick: its number and a mix of it.
fn entry(tick: u64) -> [u8; ENTRY_BYTES] {
    (u128::from(mix(tick)) << 64 | u128::from(tick)).to_le_bytes()
}

impl Device {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One tick.
    pub(super) fn tick(&self) {
        let mut state = self.state();
        state.ticks += 1;
        let tick = state.ticks;
        let at = (tick % ENTRIES) as usize * ENTRY_BYTES;
        if let Some(place) = state.log.get_mut(at..at + ENTRY_BYTES) {
            place.copy_from_slice(&entry(tick));
        }
    }

    /// Ticks and log.
    pub(super) fn get(&self) -> (u64, Vec<u8>) {
        let state = self.state();
        (state.ticks, state.log.clone())
    }

    /// Takes over ticks and log.
    pub(super) fn set(&self, ticks: u64, log: Vec<u8>) {
        *self.state() = State { ticks, log };
    }

    /// The first entry of the log that is not what the ticks say, and the ticks.
    pub(super) fn verify(&self) -> (u64, Option<u64>) {
        let state = self.state();
        let ticks = state.ticks;
        let wrong = (0..ENTRIES).find(|slot| {
            // The latest tick that went to this slot.
            let back = (ticks % ENTRIES + ENTRIES - slot) % ENTRIES;
            let expected = match ticks.checked_sub(back) {
                None | Some(0) => [0; ENTRY_BYTES],
                Some(tick) => entry(tick),
            };
            let at = *slot as usize * ENTRY_BYTES;
            state.log.get(at..at + ENTRY_BYTES) != Some(&expected)
        });
        (ticks, wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_follows_from_the_ticks() {
        let device = Device::default();
        for tick in 0..3 * ENTRIES + 5 {
            if tick % 997 == 0 || tick > 3 * ENTRIES {
                assert_eq!(device.verify(), (tick, None));
            }
            device.tick();
        }
        let (ticks, log) = device.get();
        device.set(ticks - 1, log.clone());
        assert!(device.verify().1.is_some(), "an entry from the future");
        let mut flipped = log;
        flipped[40] ^= 1;
        device.set(ticks, flipped);
        assert_eq!(device.verify(), (ticks, Some(2)));
    }
}
