//! `delta`: what changed in a page since the version that was last sent, which is the one the destination has.
//!
//! The field calls it XBZRLE. The encoding is a list of changes, each an unchanged length, a changed length (both
//! LEB128) and the changed bytes; what follows the last is unchanged, so a page that is the same again takes no
//! bytes. What must stay true: both sides hold the same old version; a page travels on one channel for the whole
//! migration, so the order on that channel sees to it.

use super::DecodeError;

/// Bytes of a page.
const PAGE: usize = crate::memory::PAGE_SIZE as usize;
/// Bytes compared at once.
const BLOCK: usize = 64;
const WORD: usize = 8;
/// What a change costs besides its bytes, at most.
const OVERHEAD: usize = 4;

/// Appends what turns `old` into `new` to `encoded`, if that takes at most `limit` bytes; otherwise leaves `encoded`
/// as it was and says so.
pub(crate) fn encode(old: &[u8], new: &[u8], limit: usize, encoded: &mut Vec<u8>) -> bool {
    let begin = encoded.len();
    let fits = encode_changes(old, new, limit, encoded);
    if !fits {
        encoded.truncate(begin);
    }
    fits
}

fn encode_changes(old: &[u8], new: &[u8], limit: usize, encoded: &mut Vec<u8>) -> bool {
    let (Some(end), (old_blocks, _), (new_blocks, _)) =
        (encoded.len().checked_add(limit), old.as_chunks::<BLOCK>(), new.as_chunks::<BLOCK>())
    else {
        return false;
    };
    // The change that is being looked at: from its first byte to behind its last. Words next to each other are one.
    let mut change = 0..0;
    // Up to here everything is encoded.
    let mut done = 0;
    for (index, (old_block, new_block)) in old_blocks.iter().zip(new_blocks).enumerate() {
        if old_block == new_block {
            continue;
        }
        // A change that goes on and on does not wait for its end to be too long.
        if encoded.len() + change.len() > end {
            return false;
        }
        let (old_words, new_words) = (old_block.as_chunks::<WORD>().0, new_block.as_chunks::<WORD>().0);
        let mut changes = [0; BLOCK / WORD];
        let mut changed_words = 0u32;
        for (word, (change, (old, new))) in changes.iter_mut().zip(old_words.iter().zip(new_words)).enumerate() {
            *change = u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new);
            changed_words |= u32::from(*change != 0) << word;
        }
        while changed_words != 0 {
            let word = changed_words.trailing_zeros() as usize;
            changed_words &= changed_words - 1;
            let changed = changes.get(word).copied().unwrap_or_default();
            let at = index * BLOCK + word * WORD;
            let first = at + changed.trailing_zeros() as usize / 8;
            let behind = at + WORD - changed.leading_zeros() as usize / 8;
            // Bytes that are the same but cost less than another change would are taken along.
            if first - change.end <= OVERHEAD && !change.is_empty() {
                change.end = behind;
                continue;
            }
            if !change.is_empty() {
                if encoded.len() + change.len() + OVERHEAD > end {
                    return false;
                }
                push(new, &change, done, encoded);
                done = change.end;
            }
            change = first..behind;
        }
    }
    if !change.is_empty() {
        if encoded.len() + change.len() + OVERHEAD > end {
            return false;
        }
        push(new, &change, done, encoded);
    }
    true
}

fn push(new: &[u8], change: &std::ops::Range<usize>, done: usize, encoded: &mut Vec<u8>) {
    let (unchanged, length) = (change.start - done, change.len());
    // Most are short, and then a copy of a length that the compiler knows is quicker than one of their own length.
    let short = new.get(change.start..).and_then(<[u8]>::first_chunk::<WORD>);
    if let (0..0x80, 0..=WORD, Some(bytes)) = (unchanged, length, short) {
        let [a, b, c, d, e, f, g, h] = *bytes;
        encoded.extend_from_slice(&[unchanged as u8, length as u8, a, b, c, d, e, f, g, h]);
        encoded.truncate(encoded.len() - (WORD - length));
        return;
    }
    push_length(unchanged, encoded);
    push_length(length, encoded);
    encoded.extend_from_slice(new.get(change.clone()).unwrap_or_default());
}

/// LEB128 of at most 4096, which takes two bytes.
fn push_length(length: usize, encoded: &mut Vec<u8>) {
    if length < 0x80 {
        encoded.push(length as u8);
    } else {
        encoded.push(length as u8 | 0x80);
        encoded.push((length >> 7) as u8);
    }
}

/// Gives every change that `encoded` holds to `change`, as an offset in the page and the bytes to put there.
///
/// # Errors
/// [`DecodeError::Delta`] for what no encoder makes, [`DecodeError`]s of `change`.
pub(crate) fn decode<E: From<DecodeError>>(
    encoded: &[u8],
    mut change: impl FnMut(usize, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = encoded;
    let mut at = 0;
    while !rest.is_empty() {
        let skip = take_length(&mut rest)?;
        let length = take_length(&mut rest)?;
        let (bytes, behind) = rest.split_at_checked(length).ok_or(DecodeError::Delta)?;
        at += skip;
        if length == 0 || at + length > PAGE {
            return Err(DecodeError::Delta.into());
        }
        change(at, bytes)?;
        at += length;
        rest = behind;
    }
    Ok(())
}

fn take_length(rest: &mut &[u8]) -> Result<usize, DecodeError> {
    match **rest {
        [low, ref behind @ ..] if low < 0x80 => {
            *rest = behind;
            Ok(usize::from(low))
        }
        [low, high, ref behind @ ..] if high < 0x80 => {
            *rest = behind;
            Ok(usize::from(low & 0x7f) | usize::from(high) << 7)
        }
        _ => Err(DecodeError::Delta),
    }
}

/// One page; less than it takes to send it plain.
pub(super) fn accepts(length: u32, encoded_length: u32) -> bool {
    length as usize == PAGE && encoded_length < length
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The obvious way: byte by byte, from the description in `docs/wire-format.md`.
    fn apply_slowly(old: &[u8], encoded: &[u8]) -> Option<Vec<u8>> {
        let mut page = old.to_vec();
        let mut input = encoded.iter().copied();
        let mut at = 0;
        let length = |first: u8, input: &mut dyn Iterator<Item = u8>| -> Option<usize> {
            let mut value = usize::from(first & 0x7f);
            if first & 0x80 != 0 {
                value += 128 * usize::from(input.next()?);
            }
            Some(value)
        };
        while let Some(first) = input.next() {
            at += length(first, &mut input)?;
            let second = input.next()?;
            for _ in 0..length(second, &mut input)? {
                *page.get_mut(at)? = input.next()?;
                at += 1;
            }
        }
        Some(page)
    }

    fn apply(old: &[u8], encoded: &[u8]) -> Result<Vec<u8>, DecodeError> {
        let mut page = old.to_vec();
        decode(encoded, |at, bytes| {
            page[at..at + bytes.len()].copy_from_slice(bytes);
            Ok::<(), DecodeError>(())
        })?;
        Ok(page)
    }

    fn page() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), PAGE)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Any changes to any page: both decoders give the new page, in no more bytes than were allowed.
        #[test]
        fn round_trip(
            old in page(),
            changes in proptest::collection::vec((0..PAGE, proptest::collection::vec(any::<u8>(), 1..60)), 0..60),
            limit in 0..2 * PAGE,
        ) {
            let mut new = old.clone();
            for (at, bytes) in changes {
                let end = (at + bytes.len()).min(PAGE);
                new[at..end].copy_from_slice(&bytes[..end - at]);
            }
            let mut encoded = vec![1, 2, 3];
            let fits = encode(&old, &new, limit, &mut encoded);
            prop_assert_eq!(&encoded[..3], [1, 2, 3]);
            if fits {
                prop_assert!(encoded.len() - 3 <= limit);
                prop_assert_eq!(&apply(&old, &encoded[3..]).unwrap(), &new);
                prop_assert_eq!(&apply_slowly(&old, &encoded[3..]).unwrap(), &new);
            } else {
                prop_assert_eq!(encoded.len(), 3);
                prop_assert!(limit < PAGE + OVERHEAD);
            }
        }

        /// Any bytes: an error, or what the slow decoder makes of them; never outside the page.
        #[test]
        fn anything_decodes_or_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let old = vec![0x55; PAGE];
            if let Ok(page) = apply(&old, &bytes) {
                prop_assert_eq!(apply_slowly(&old, &bytes), Some(page));
            }
        }
    }

    #[test]
    fn golden() {
        let old = vec![0; PAGE];
        let mut new = old.clone();
        let mut encoded = Vec::new();
        assert!(encode(&old, &new, 0, &mut encoded), "the same page takes nothing");
        assert!(encoded.is_empty());
        new[3] = 7;
        new[300..302].copy_from_slice(&[8, 9]);
        assert!(encode(&old, &new, PAGE, &mut encoded));
        assert_eq!(encoded, [3, 1, 7, 0x80 | 40, 2, 2, 8, 9]);
        encoded.clear();
        new.fill(1);
        assert!(!encode(&old, &new, PAGE, &mut encoded), "no shorter than plain");
        assert!(encode(&old, &new, PAGE + OVERHEAD, &mut encoded));
        assert_eq!(encoded[..4], [0, 0x80, 0x20, 1]);
    }
}
