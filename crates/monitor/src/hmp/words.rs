//! A line to its words. What has blanks in it goes into quotation marks.

/// A quotation mark that is not closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpenQuote;

/// The words of a line, and where the last one begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Words {
    /// What they say, without quotation marks.
    pub(super) said: Vec<String>,
    /// Where in the line the last one begins, if the line ends in one and not in a blank.
    pub(super) last: Option<usize>,
}

/// Splits `line` at its blanks. In `"..."` a backslash takes what follows as it is.
pub(super) fn split(line: &str) -> Result<Words, OpenQuote> {
    let mut words = Words { said: Vec::new(), last: None };
    let mut quoted = false;
    let mut characters = line.char_indices();
    while let Some((place, character)) = characters.next() {
        if character.is_whitespace() && !quoted {
            words.last = None;
            continue;
        }
        if words.last.is_none() {
            words.said.push(String::new());
            words.last = Some(place);
        }
        let taken = match character {
            '"' => {
                quoted = !quoted;
                continue;
            }
            '\\' if quoted => characters.next().ok_or(OpenQuote)?.1,
            other => other,
        };
        if let Some(word) = words.said.last_mut() {
            word.push(taken);
        }
    }
    if quoted { Err(OpenQuote) } else { Ok(words) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_and_quotation_marks() {
        for (line, said, last) in [
            ("", &[][..], None),
            ("  ", &[], None),
            ("info status", &["info", "status"], Some(5)),
            (" info  migrate\t", &["info", "migrate"], None),
            (r#"migrate "exec:nc -U \"/a b\"""#, &["migrate", r#"exec:nc -U "/a b""#], Some(8)),
            (r#"a "" b"c d"e"#, &["a", "", "bc de"], Some(5)),
        ] {
            let words = split(line).unwrap();
            assert_eq!((words.said, words.last), (said.iter().map(ToString::to_string).collect(), last), "{line}");
        }
        assert_eq!(split(r#"migrate "exec:"#), Err(OpenQuote));
        assert_eq!(split(r#"migrate "exec:\"#), Err(OpenQuote));
    }
}
