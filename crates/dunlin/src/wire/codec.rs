//! Little-endian numbers, byte strings and names, with every read checked.

use super::{MAX_NAME_BYTES, WireError};
use crate::error::one_line;

/// Appends values to a byte vector.
#[derive(Debug, Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }
    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }
    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }
    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }
    /// A name: a length byte and at most 255 bytes; a longer one is cut at a character.
    pub(super) fn name(&mut self, name: &str) {
        let name = cut(name, MAX_NAME_BYTES);
        self.u8(name.len() as u8);
        self.0.extend(name.as_bytes());
    }
    /// Text: a 16-bit length and the bytes, cut at `limit`.
    pub(super) fn text(&mut self, text: &str, limit: u16) {
        let text = cut(text, usize::from(limit));
        self.u16(text.len() as u16);
        self.0.extend(text.as_bytes());
    }
    /// Bytes: a 32-bit length and the bytes.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.0.extend(bytes);
    }
}

/// The longest beginning of `text` of at most `limit` bytes that ends at a character.
pub(super) fn cut(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

/// Reads values off a byte slice. `what` names it in errors.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or(WireError::Length { what: self.what })?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or(WireError::Length { what: self.what })?;
        self.bytes = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }
    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }
    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }
    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn name(&mut self) -> Result<String, WireError> {
        let (length, what) = (self.u8()?, self.what);
        let name = self.string(usize::from(length))?;
        if name.chars().any(char::is_control) { Err(WireError::Text { what }) } else { Ok(name) }
    }

    pub(super) fn text(&mut self) -> Result<String, WireError> {
        let length = self.u16()?;
        self.string(usize::from(length)).map(|text| one_line(&text))
    }

    fn string(&mut self, length: usize) -> Result<String, WireError> {
        let what = self.what;
        std::str::from_utf8(self.take(length)?).map(str::to_owned).map_err(|_| WireError::Text { what })
    }

    pub(super) fn bytes(&mut self, limit: u64) -> Result<&'a [u8], WireError> {
        let length = self.u32()?;
        if u64::from(length) > limit {
            return Err(WireError::TooLong { what: self.what, length: u64::from(length), limit });
        }
        self.take(length as usize)
    }

    /// Everything that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    /// `value` must be zero: it is reserved.
    pub(super) fn reserved(&self, value: u64) -> Result<(), WireError> {
        if value == 0 { Ok(()) } else { Err(WireError::Value { what: "a reserved field", value }) }
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), WireError> {
        if self.bytes.is_empty() { Ok(()) } else { Err(WireError::Length { what: self.what }) }
    }
}
