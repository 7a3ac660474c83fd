//! Bytes of a client to JSON texts, by JSON's own syntax: several may stand on a line, one may span lines.
//!
//! Nothing here understands JSON beyond brackets and strings. What must stay true: at most [`MAX_BYTES`] are held, and
//! whatever comes, reading goes on at the next line, or behind the next byte 0xFF, by which clients start afresh.

/// The longest command.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// The deepest nesting; serde_json's own limit, which is lower, gives the nicer message.
const MAX_DEPTH: usize = 1024;

/// Bytes that cannot become a JSON text. The rest of their line is skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FramingError {
    #[error("it is longer than {MAX_BYTES} bytes; the rest of the line is skipped")]
    TooLong,
    #[error("it is nested deeper than {MAX_DEPTH} levels; the rest of the line is skipped")]
    TooDeep,
    #[error("a bracket does not match; the rest of the line is skipped")]
    Bracket,
    #[error("a string is not closed on its line; what it began is skipped")]
    OpenString,
    #[error("stray byte 0xFF; what came before it is skipped")]
    Reset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before a text.
    Between,
    /// In an object or array, outside its strings.
    Structure,
    /// In a string of one.
    Text { escaped: bool },
    /// In something else, which ends with its line.
    Line,
    /// In the rest of a line that is lost.
    Skipping,
}

/// In no JSON text and no UTF-8: a client sends it so that what it sends next is not the middle of something.
const RESET: u8 = 0xff;

/// Finds where JSON texts begin and end.
#[derive(Debug)]
pub(crate) struct Splitter {
    place: Place,
    held: Vec<u8>,
    /// The brackets that are to come.
    closing: Vec<u8>,
}

impl Splitter {
    pub(crate) fn new() -> Self {
        Self { place: Place::Between, held: Vec::new(), closing: Vec::new() }
    }

    /// Takes one byte; gives a text when it is the last of one.
    pub(crate) fn push(&mut self, byte: u8) -> Option<Result<Vec<u8>, FramingError>> {
        if byte == RESET {
            drop(self.finish());
            return Some(Err(FramingError::Reset));
        }
        match self.place {
            Place::Skipping => {
                if byte == b'\n' {
                    self.place = Place::Between;
                }
                return None;
            }
            Place::Between if byte.is_ascii_whitespace() => return None,
            Place::Line if byte == b'\n' => return Some(Ok(self.finish())),
            _ if self.held.len() >= MAX_BYTES => return Some(Err(self.give_up(byte, FramingError::TooLong))),
            _ => self.held.push(byte),
        }
        match (self.place, byte) {
            (Place::Between | Place::Structure, b'{') => self.open(b'}', byte),
            (Place::Between | Place::Structure, b'[') => self.open(b']', byte),
            (Place::Between, _) => {
                self.place = Place::Line;
                None
            }
            (Place::Structure, b'}' | b']') if self.closing.pop() != Some(byte) => {
                Some(Err(self.give_up(byte, FramingError::Bracket)))
            }
            (Place::Structure, b'}' | b']') if self.closing.is_empty() => Some(Ok(self.finish())),
            (Place::Structure, b'"') | (Place::Text { escaped: true }, b' '..) => {
                self.place = Place::Text { escaped: false };
                None
            }
            (Place::Text { .. }, b'\n') => Some(Err(self.give_up(byte, FramingError::OpenString))),
            (Place::Text { .. }, b'"') => {
                self.place = Place::Structure;
                None
            }
            (Place::Text { .. }, b'\\') => {
                self.place = Place::Text { escaped: true };
                None
            }
            _ => None,
        }
    }

    fn open(&mut self, closing: u8, byte: u8) -> Option<Result<Vec<u8>, FramingError>> {
        if self.closing.len() >= MAX_DEPTH {
            return Some(Err(self.give_up(byte, FramingError::TooDeep)));
        }
        self.closing.push(closing);
        self.place = Place::Structure;
        None
    }

    fn finish(&mut self) -> Vec<u8> {
        self.place = Place::Between;
        self.closing.clear();
        std::mem::take(&mut self.held)
    }

    fn give_up(&mut self, byte: u8, error: FramingError) -> FramingError {
        drop(self.finish());
        self.place = if byte == b'\n' { Place::Between } else { Place::Skipping };
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(bytes: &[u8]) -> Vec<Result<String, FramingError>> {
        let mut splitter = Splitter::new();
        let texts = bytes.iter().filter_map(|byte| splitter.push(*byte));
        texts.map(|text| text.map(|bytes| String::from_utf8(bytes).unwrap())).collect()
    }

    #[test]
    fn texts_by_syntax() {
        assert_eq!(split(b"{}{\"a\":1} [2]\n"), [Ok("{}".into()), Ok("{\"a\":1}".into()), Ok("[2]".into())]);
        assert_eq!(split(b"{\n \"a\":\n {}}\r\n"), [Ok("{\n \"a\":\n {}}".into())]);
        assert_eq!(split(br#"{"}\"{":"\\"}{}"#), [Ok(r#"{"}\"{":"\\"}"#.into()), Ok("{}".into())]);
        assert_eq!(split(b"garbage\n{}"), [Ok("garbage".into()), Ok("{}".into())]);
        assert_eq!(split(b"{\"a\":"), []);
    }

    #[test]
    fn going_on_after_errors() {
        assert_eq!(split(b"{]{}\n{}"), [Err(FramingError::Bracket), Ok("{}".into())]);
        assert_eq!(split(b"{\"a\n{}"), [Err(FramingError::OpenString), Ok("{}".into())]);
        assert_eq!(split(b"}}\n{}"), [Ok("}}".into()), Ok("{}".into())]);
        let long = [vec![b'['; 1], vec![b' '; 2 * MAX_BYTES], b"]\n{}".to_vec()].concat();
        assert_eq!(split(&long), [Err(FramingError::TooLong), Ok("{}".into())]);
        let reset = b"{\"a\": \"\xff{}\xff[\xff\xff{}";
        let error = || Err(FramingError::Reset);
        assert_eq!(split(reset), [error(), Ok("{}".into()), error(), error(), error(), Ok("{}".into())]);
        let deep = [vec![b'['; 10_000], b"\n{}".to_vec()].concat();
        assert_eq!(split(&deep), [Err(FramingError::TooDeep), Ok("{}".into())]);
    }
}
