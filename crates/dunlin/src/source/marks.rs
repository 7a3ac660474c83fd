//! Which channels' marks the destination has acknowledged.
//!
//! What must stay true: a round is placed when every channel has been acknowledged, however often one of them is.

use crate::error::Cause;
use crate::wire::MarkAck;

/// The acknowledgements of the present round.
#[derive(Debug)]
pub(super) struct Marks {
    round: u32,
    acknowledged: Vec<bool>,
}

impl Marks {
    pub(super) fn new(channels: usize) -> Self {
        Self { round: 0, acknowledged: vec![false; channels] }
    }

    /// A round begins: none of its marks is acknowledged.
    pub(super) fn begin(&mut self, round: u32) {
        self.round = round;
        self.acknowledged.fill(false);
    }

    /// Notes an acknowledgement. One that is repeated, or of an earlier round, says nothing new.
    ///
    /// # Errors
    /// When the destination acknowledges what it was not sent.
    pub(super) fn acknowledge(&mut self, ack: MarkAck) -> Result<(), Cause> {
        let unknown =
            Cause::Unexpected { message: "MarkAck", expected: "the mark of a channel and round that there are" };
        if ack.round > self.round || ack.round == 0 {
            return Err(unknown);
        }
        let channel = self.acknowledged.get_mut(usize::from(ack.channel)).ok_or(unknown)?;
        *channel |= ack.round == self.round;
        Ok(())
    }

    /// Whether the destination has everything of the round.
    pub(super) fn are_all_acknowledged(&self) -> bool {
        self.acknowledged.iter().all(|acknowledged| *acknowledged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_channel_counts_once() {
        let mut marks = Marks::new(3);
        for round in 1..4 {
            marks.begin(round);
            for channel in [0, 0, 2, 0, 2] {
                marks.acknowledge(MarkAck { round, channel }).unwrap();
                assert!(!marks.are_all_acknowledged());
            }
            // What comes late says nothing of this round.
            if round > 1 {
                marks.acknowledge(MarkAck { round: round - 1, channel: 1 }).unwrap();
                assert!(!marks.are_all_acknowledged());
            }
            marks.acknowledge(MarkAck { round, channel: 1 }).unwrap();
            assert!(marks.are_all_acknowledged());
        }
        for (round, channel) in [(3, 3), (3, 255), (4, 0), (0, 0)] {
            assert!(marks.acknowledge(MarkAck { round, channel }).is_err(), "round {round}, channel {channel}");
        }
    }
}
