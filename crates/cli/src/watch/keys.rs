//! Keys of a terminal in raw mode, out of the bytes that it sends.

const ESCAPE: u8 = 0x1b;
const CTRL_C: u8 = 0x03;

/// Whether one of the keys in `bytes`, which were read in one go, is `q`, Escape or Ctrl-C. An arrow or another key that a
/// terminal spells as a sequence is none of these, whatever letters it is spelt with.
pub fn leaves(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some((first, after)) = rest.split_first() {
        rest = match *first {
            b'q' | b'Q' | CTRL_C => return true,
            ESCAPE => match after.split_first() {
                // Nothing is behind it: the key itself.
                None => return true,
                // A sequence: parameters, up to a letter or a tilde.
                Some((b'[', sequence)) => {
                    let end = sequence.iter().position(|byte| matches!(byte, 0x40..=0x7e));
                    end.and_then(|end| sequence.get(end.saturating_add(1)..)).unwrap_or(&[])
                }
                // A function key, or a key together with Alt.
                Some((b'O', sequence)) => sequence.get(1..).unwrap_or(&[]),
                Some((_, sequence)) => sequence,
            },
            _ => after,
        };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_keys_leave() {
        for bytes in [&b"q"[..], b"Q", b"\x03", b"\x1b", b"xq", b"\x1b[Aq", b"\x1b[1;5C\x03", b"\x1bOPq", b"\x1b[A\x1b"]
        {
            assert!(leaves(bytes), "{bytes:?}");
        }
        for bytes in [&b""[..], b"x", b"\x1b[A", b"\x1b[1;5C", b"\x1bOQ", b"\x1bq", b"\x1b[", b"\x1b[15~", b"\x1bO"] {
            assert!(!leaves(bytes), "{bytes:?}");
        }
    }
}
