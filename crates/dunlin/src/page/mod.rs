//! The kinds a page can travel as: one file each, and the one table that chooses.
//!
//! [`KINDS`] is in the order in which kinds are tried: the first whose encoder takes the page wins, `plain` takes
//! every page. A new kind is a file and a row. What must stay true: a decoder given what its encoder made gives back
//! the page, byte for byte; a decoder given anything else gives an error and touches nothing outside the page.

mod plain;
mod zero;

/// The kind a page travels as. Its number is what the wire carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum PageKind {
    /// All zeros.
    Zero = 0,
    /// As it is.
    Plain = 1,
}

/// One row of the table.
struct Kind {
    kind: PageKind,
    /// The feature's name in the negotiation.
    feature: &'static str,
    /// Whether the encoder takes this page, and how many bytes it gave to `encoded`.
    encode: fn(page: &[u8], encoded: &mut Vec<u8>) -> bool,
    /// Whether a run of `length` bytes of RAM can be encoded in `encoded_length` bytes.
    accepts: fn(length: u32, encoded_length: u32) -> bool,
}

/// All kinds, in the order in which they are tried.
static KINDS: &[Kind] = &[
    Kind { kind: PageKind::Zero, feature: "page-zero", encode: zero::encode, accepts: zero::accepts },
    Kind { kind: PageKind::Plain, feature: "page-plain", encode: plain::encode, accepts: plain::accepts },
];

impl PageKind {
    /// The wire's number.
    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    /// The kind of that number.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        KINDS.iter().map(|row| row.kind).find(|kind| kind.number() == number)
    }

    /// Whether a run of `length` bytes of RAM can be encoded in `encoded_length` bytes.
    pub(crate) fn accepts(self, length: u32, encoded_length: u32) -> bool {
        KINDS.iter().any(|row| row.kind == self && (row.accepts)(length, encoded_length))
    }
}

/// The features that stand for page kinds; every one is needed at the destination, as the source may use it.
pub(crate) fn features() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|row| row.feature)
}

/// Chooses the kind of `page` and appends its encoding to `encoded`.
pub(crate) fn encode(page: &[u8], encoded: &mut Vec<u8>) -> PageKind {
    KINDS.iter().find(|row| (row.encode)(page, encoded)).map_or(PageKind::Plain, |row| row.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_chooses() {
        let mut page = vec![0u8; 4096];
        let mut encoded = Vec::new();
        assert_eq!(encode(&page, &mut encoded), PageKind::Zero);
        assert!(encoded.is_empty());
        for position in [0, 1, 7, 8, 63, 64, 2048, 4095] {
            page[position] = 1;
            encoded.clear();
            assert_eq!(encode(&page, &mut encoded), PageKind::Plain, "byte {position}");
            assert_eq!(encoded, page);
            page[position] = 0;
        }
    }

    #[test]
    fn numbers_are_the_wire_s() {
        for row in KINDS {
            assert_eq!(PageKind::from_number(row.kind.number()), Some(row.kind));
        }
        assert_eq!((PageKind::Zero.number(), PageKind::Plain.number()), (0, 1));
        assert_eq!(PageKind::from_number(2), None);
    }
}
