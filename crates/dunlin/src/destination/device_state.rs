//! Device state while it is being received: sections, put together from their pieces.

use std::cmp::Ordering;

use crate::error::Cause;
use crate::machine::StateSection;
use crate::wire::{MAX_DEVICE_STATE_BYTES, Section, data_checksum};

/// As many empty sections as there can be messages would have no bound otherwise.
const MAX_SECTIONS: usize = 65_536;

/// A section of which more is to come.
#[derive(Debug)]
struct Begun {
    section: StateSection,
    checksum: u64,
}

/// What has come so far.
#[derive(Debug, Default)]
pub(super) struct DeviceState {
    whole: Vec<StateSection>,
    incomplete: Option<Begun>,
    bytes: u64,
}

impl Begun {
    fn finish(self) -> Result<StateSection, Cause> {
        let Self { section, checksum } = self;
        if data_checksum(&section.data) == checksum {
            return Ok(section);
        }
        let StateSection { name, instance, .. } = section;
        let reason =
            format!("the section {name:?} ({instance}) of device state has not the checksum that came with it");
        Err(Cause::Incompatible { reason })
    }
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
        let Section { name, instance, version, need, checksum, total_bytes, piece } = piece;
        let mut begun = match self.incomplete.take() {
            None => Begun { section: StateSection { name, instance, version, need, data: Vec::new() }, checksum },
            Some(begun) if (&begun.section.name, begun.section.instance) == (&name, instance) => begun,
            Some(_) => return Err(Cause::Unexpected { message: "Section", expected: "the rest of another section" }),
        };
        begun.section.data.extend_from_slice(&piece);
        match (begun.section.data.len() as u64).cmp(&total_bytes) {
            Ordering::Less => self.incomplete = Some(begun),
            Ordering::Equal if self.whole.len() < MAX_SECTIONS => self.whole.push(begun.finish()?),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Need;

    fn piece(piece: &[u8], checksum: u64) -> Section {
        let (name, need) = ("vcpu".to_owned(), Need::Required);
        Section { name, instance: 1, version: 2, need, checksum, total_bytes: 6, piece: piece.to_vec() }
    }

    #[test]
    fn a_section_that_was_changed_is_found() {
        let checksum = data_checksum(b"abcdef");
        let mut good = DeviceState::default();
        good.add(piece(b"abc", checksum)).unwrap();
        good.add(piece(b"def", checksum)).unwrap();
        assert_eq!(good.take(1).unwrap()[0].data, b"abcdef");
        let mut bad = DeviceState::default();
        bad.add(piece(b"abc", checksum)).unwrap();
        let error = bad.add(piece(b"deg", checksum)).unwrap_err().to_string();
        assert!(error.contains("\"vcpu\" (1)") && error.contains("checksum"), "{error}");
    }
}
