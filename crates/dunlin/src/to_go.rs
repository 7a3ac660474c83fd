//! How much RAM is still to go, at any moment of a migration, as both sides tell it.
//!
//! It is what of the present round is not known to have arrived, and an estimate of what the guest has dirtied again of the
//! rest. It is 0 only when nothing was dirty at the last look.

use crate::memory::CHUNK_SIZE;

/// A round on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ToGo {
    /// Bytes that were dirty when the round began.
    total_bytes: u64,
    /// Of these, the bytes that are done.
    done_bytes: u64,
    /// Bytes that are expected to be dirty again at its end.
    again_bytes: u64,
}

impl ToGo {
    /// Before a round of `total_bytes`, of which nothing is known yet: the first, or one with the guest stopped.
    pub(crate) fn round(total_bytes: u64) -> Self {
        Self { total_bytes, done_bytes: 0, again_bytes: 0 }
    }

    /// Before a round of `total_bytes` while the guest dirties `dirty_rate` bytes a second. RAM goes at `ram_rate` bytes a
    /// second. No more is expected to be dirty at its end than at its beginning: a guest writes to the same pages again.
    pub(crate) fn round_beside(total_bytes: u64, dirty_rate: u64, ram_rate: u64) -> Self {
        let again = u128::from(total_bytes) * u128::from(dirty_rate) / u128::from(ram_rate.max(1));
        let again_bytes = u64::try_from(again).unwrap_or(u64::MAX).min(total_bytes);
        Self { total_bytes, done_bytes: 0, again_bytes }
    }

    /// The round is of `total_bytes`, as another look has found.
    pub(crate) fn looked_again(self, total_bytes: u64) -> Self {
        Self { total_bytes, done_bytes: 0, again_bytes: self.again_bytes.min(total_bytes) }
    }

    /// `bytes` more of the round are done.
    pub(crate) fn done(&mut self, bytes: u64) {
        self.done_bytes = self.done_bytes.saturating_add(bytes).min(self.total_bytes);
    }

    /// The same when `bytes` of it are done at most. Until the round is known to have ended, a chunk of it at least is not.
    pub(crate) fn with_done(self, bytes: u64) -> Self {
        let most = self.total_bytes.saturating_sub(CHUNK_SIZE);
        Self { done_bytes: bytes.min(most), ..self }
    }

    /// Of the round.
    pub(crate) fn of_round(self) -> u64 {
        self.total_bytes.saturating_sub(self.done_bytes)
    }

    /// Everything.
    pub(crate) fn bytes(self) -> u64 {
        let again = u128::from(self.again_bytes) * u128::from(self.done_bytes) / u128::from(self.total_bytes.max(1));
        self.of_round().saturating_add(u64::try_from(again).unwrap_or(u64::MAX))
    }
}

/// Bytes of RAM that go a second, where a round covered `ram_bytes` in `transferred_bytes` and bytes on all channels go at
/// `bandwidth`. The first round, of all of RAM, does not tell how far RAM shrinks.
pub(crate) fn ram_rate(number: u32, ram_bytes: u64, transferred_bytes: u64, bandwidth: u64) -> u64 {
    if number <= 1 || transferred_bytes == 0 || transferred_bytes >= ram_bytes {
        return bandwidth;
    }
    let rate = u128::from(bandwidth) * u128::from(ram_bytes) / u128::from(transferred_bytes);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A hot set that is dirty again as soon as it was sent is to go all the while; of an idle guest less and less is.
    #[test]
    fn at_every_moment() {
        let mut hot = ToGo::round_beside(64 * MIB, 1000 * MIB, 100 * MIB);
        let mut slow = ToGo::round_beside(64 * MIB, 25 * MIB, 100 * MIB);
        for done in 0..=64 {
            assert_eq!(hot.bytes(), 64 * MIB);
            assert_eq!((slow.of_round(), slow.bytes()), ((64 - done) * MIB, (64 - done) * MIB + done * MIB / 4));
            hot.done(MIB);
            slow.done(MIB);
        }
        assert_eq!(hot.of_round(), 0);
        assert_eq!(ToGo::round_beside(u64::MAX, u64::MAX, 0).with_done(u64::MAX).bytes(), u64::MAX);
    }

    #[test]
    fn something_is_to_go_until_the_end_is_known() {
        let round = ToGo::round(64 * MIB);
        assert_eq!(round.with_done(10 * MIB).bytes(), 54 * MIB);
        assert_eq!(round.with_done(64 * MIB).bytes(), CHUNK_SIZE);
        assert_eq!(ToGo::round(4096).with_done(4096).bytes(), 4096);
        assert_eq!(ToGo::round(0).with_done(0).bytes(), 0);
        assert_eq!(ToGo::round_beside(8 * MIB, 8 * MIB, MIB).looked_again(4 * MIB).with_done(2 * MIB).bytes(), 4 * MIB);
    }

    #[test]
    fn what_shrinks_goes_faster() {
        assert_eq!(ram_rate(2, 100, 10, 7), 70);
        assert_eq!(ram_rate(1, 100, 10, 7), 7);
        assert_eq!(ram_rate(2, 0, 0, 7), 7);
        assert_eq!(ram_rate(2, 100, 110, 7), 7);
    }
}
