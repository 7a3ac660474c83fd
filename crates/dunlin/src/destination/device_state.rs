//! Device state while it is being received: sections, put together from their pieces.

use std::cmp::Ordering;

use crate::error::Cause;
use crate::machine::StateSection;
use crate::wire::{MAX_DEVICE_STATE_BYTES, Section};

/// As many empty sections as there can be messages would have no bound otherwise.
const MAX_SECTIONS: usize = 65_536;

/// What has come so far.
#[derive(Debug, Default)]
pub(super) struct DeviceState {
    whole: Vec<StateSection>,
    incomplete: Option<StateSection>,
    bytes: u64,
}

impl DeviceState {
    /// Bytes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes the next piece.
    ///
    /// # Errors
    /// When there is more than a migration may carry, or the piece belongs to another section than the last.
    pub(super) fn add(&mut self, piece: Section) -> Result<(), Cause> {
        let too_large = Cause::DeviceStateTooLarge { limit_bytes: MAX_DEVICE_STATE_BYTES };
        self.bytes = self.bytes.saturating_add(piece.piece.len() as u64);
        if piece.total_bytes > MAX_DEVICE_STATE_BYTES || self.bytes > MAX_DEVICE_STATE_BYTES {
            return Err(too_large);
        }
        let mut section = match self.incomplete.take() {
            None => {
                let Section { name, instance, version, .. } = piece;
                StateSection { name, instance, version, data: Vec::new() }
            }
            Some(begun) if (&begun.name, begun.instance) == (&piece.name, piece.instance) => begun,
            Some(_) => return Err(Cause::Unexpected { message: "Section", expected: "the rest of another section" }),
        };
        section.data.extend_from_slice(&piece.piece);
        match (section.data.len() as u64).cmp(&piece.total_bytes) {
            Ordering::Less => self.incomplete = Some(section),
            Ordering::Equal if self.whole.len() < MAX_SECTIONS => self.whole.push(section),
            Ordering::Equal | Ordering::Greater => return Err(too_large),
        }
        Ok(())
    }

    /// All of it, which must be `expected` sections.
    ///
    /// # Errors
    /// When it is not.
    pub(super) fn take(&mut self, expected: u32) -> Result<Vec<StateSection>, Cause> {
        let sections = std::mem::take(&mut self.whole);
        if sections.len() as u64 == u64::from(expected) && self.incomplete.is_none() {
            return Ok(sections);
        }
        let arrived = sections.len();
        let reason = format!("the source sent {expected} sections of device state, {arrived} arrived");
        Err(Cause::Incompatible { reason })
    }
}
