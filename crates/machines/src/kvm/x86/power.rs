//! Power management as ACPI has it, as much as a guest must find: events that never come, and the register by which it
//! switches off.
//!
//! Relies on the tables in `acpi`, which name the ports.

use serde::{Deserialize, Serialize};

/// Where events are told of and enabled: two words.
pub(super) const EVENT_PORT: u16 = 0x600;
pub(super) const EVENT_BYTES: u8 = 4;
/// The control register: a word.
pub(super) const CONTROL_PORT: u16 = 0x604;
pub(super) const CONTROL_BYTES: u8 = 2;
/// The interrupt that events would raise.
pub(super) const IRQ: u16 = 9;
/// What a guest writes as the kind of sleep to switch off.
pub(super) const SLEEP_OFF: u8 = 5;
/// The keyboard controller's port, and what resets a guest that writes it there.
pub(in crate::kvm) const RESET_PORT: u16 = 0x64;
pub(in crate::kvm) const RESET_VALUE: u8 = 0xfe;

/// All ports.
const FIRST: u16 = EVENT_PORT;
const PORTS: usize = 6;
/// Bytes of the registers: which events there are, which are enabled, the control register.
const ENABLE: usize = 2;
const CONTROL: usize = 4;

/// ACPI is on, always.
const ENABLED: u16 = 1;
const SLEEP_KIND_SHIFT: u16 = 10;
const SLEEP_KIND_MASK: u16 = 7;
const SLEEP: u16 = 1 << 13;

/// The registers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::kvm) struct Power {
    enable: u16,
    control: u16,
}

/// What a guest did with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::kvm) enum Written {
    /// Nothing of note.
    Noted,
    /// It switched itself off.
    Off,
}

impl Power {
    /// Whether these are its ports.
    pub(in crate::kvm) fn has(port: u16, bytes: usize) -> bool {
        offset(port).is_some_and(|offset| offset.saturating_add(bytes) <= PORTS)
    }

    fn registers(&self) -> [u8; PORTS] {
        let [[e0, e1], [c0, c1]] = [self.enable, self.control | ENABLED].map(u16::to_le_bytes);
        [0, 0, e0, e1, c0, c1]
    }

    /// Reads ports.
    pub(in crate::kvm) fn read(&self, port: u16, data: &mut [u8]) {
        let registers = self.registers();
        let from = registers.iter().skip(offset(port).unwrap_or(PORTS)).chain(std::iter::repeat(&0xff));
        for (to, byte) in data.iter_mut().zip(from) {
            *to = *byte;
        }
    }

    /// Writes ports.
    pub(in crate::kvm) fn write(&mut self, port: u16, data: &[u8]) -> Written {
        let mut registers = self.registers();
        for (to, byte) in registers.iter_mut().skip(offset(port).unwrap_or(PORTS)).zip(data) {
            *to = *byte;
        }
        let word =
            |at: usize| registers.iter().skip(at).take(2).rev().fold(0, |word, byte| word << 8 | u16::from(*byte));
        let control = word(CONTROL);
        // The bit that starts a sleep reads as zero.
        (self.enable, self.control) = (word(ENABLE), control & !SLEEP);
        let kind = control >> SLEEP_KIND_SHIFT & SLEEP_KIND_MASK;
        if control & SLEEP != 0 && kind == u16::from(SLEEP_OFF) { Written::Off } else { Written::Noted }
    }
}

fn offset(port: u16) -> Option<usize> {
    port.checked_sub(FIRST).map(usize::from).filter(|offset| *offset < PORTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn off_is_a_sleep_of_its_kind() {
        let mut power = Power::default();
        assert!(Power::has(EVENT_PORT, 4) && Power::has(CONTROL_PORT, 2));
        assert!(!Power::has(CONTROL_PORT, 4) && !Power::has(EVENT_PORT - 1, 1));
        assert_eq!(power.write(EVENT_PORT + 2, &[0x20, 0]), Written::Noted);
        assert_eq!(power.write(CONTROL_PORT, &(5_u16 << 10).to_le_bytes()), Written::Noted);
        assert_eq!(power.write(CONTROL_PORT, &(3_u16 << 10 | SLEEP).to_le_bytes()), Written::Noted);
        assert_eq!(power.write(CONTROL_PORT, &(5_u16 << 10 | SLEEP).to_le_bytes()), Written::Off);
        let mut data = [9; 4];
        power.read(EVENT_PORT, &mut data);
        assert_eq!(data, [0, 0, 0x20, 0]);
        power.read(CONTROL_PORT, &mut data[..2]);
        assert_eq!(u16::from_le_bytes([data[0], data[1]]), 5 << 10 | ENABLED);
    }
}
