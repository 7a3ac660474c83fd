//! What pages hold: pure functions of a key, a page and a step.
//!
//! A written page begins with its step and its number, so that a wrong page can say where it comes from.

use super::PAGE_BYTES;
use super::program::mix;
use super::workload::Content;

/// One page.
pub(crate) type Page = [u8; PAGE_BYTES];

/// Bytes that a `counter` step writes.
pub(super) const RECORD_BYTES: usize = 40;

const WORDS: [&str; 64] = [
    "the ",
    "of ",
    "and ",
    "to ",
    "in ",
    "is ",
    "that ",
    "for ",
    "page ",
    "memory ",
    "guest ",
    "host ",
    "machine ",
    "source ",
    "round ",
    "dirty ",
    "write ",
    "read ",
    "state ",
    "device ",
    "channel ",
    "frame ",
    "block ",
    "when ",
    "which ",
    "what ",
    "there ",
    "their ",
    "other ",
    "about ",
    "first ",
    "after ",
    "thread ",
    "process ",
    "kernel ",
    "interrupt ",
    "virtual ",
    "network ",
    "transfer ",
    "migration ",
    "with ",
    "from ",
    "this ",
    "have ",
    "not ",
    "are ",
    "was ",
    "be ",
    "on ",
    "as ",
    "at ",
    "by ",
    "it ",
    "or ",
    "an ",
    "we ",
    "can ",
    "all ",
    "one ",
    "two ",
    "time ",
    "more ",
    "than ",
    "only.\n",
];

/// A quick stream of random words.
struct Stream(u64);

impl Stream {
    fn next(&mut self) -> u64 {
        // xorshift64*, which is quicker than a hash a word.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// Fills `bytes` with random ones.
pub(super) fn random(key: u64, bytes: &mut [u8]) {
    let mut stream = Stream(mix(key) | 1);
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = stream.next().to_le_bytes();
    }
    for byte in rest {
        *byte = stream.next() as u8;
    }
}

/// Fills `bytes` with words.
pub(super) fn text(key: u64, bytes: &mut [u8]) {
    let mut stream = Stream(mix(key) | 1);
    let mut rest = bytes;
    let mut random = 0;
    while !rest.is_empty() {
        if random < 64 {
            random = stream.next();
        }
        let word = WORDS.get((random % 64) as usize).map_or(&b" "[..], |word| word.as_bytes());
        random /= 64;
        let length = word.len().min(rest.len());
        let (to, after) = rest.split_at_mut(length);
        to.copy_from_slice(word.get(..length).unwrap_or_default());
        rest = after;
    }
}

/// Fills `bytes` with zeros and a random word here and there.
pub(super) fn sparse(key: u64, bytes: &mut [u8]) {
    let mut stream = Stream(mix(key) | 1);
    bytes.fill(0);
    let (words, _) = bytes.as_chunks_mut::<8>();
    for _ in 0..32 {
        let (place, value) = (stream.next() as usize % words.len().max(1), stream.next());
        if let Some(word) = words.get_mut(place) {
            *word = value.to_le_bytes();
        }
    }
}

/// What `step` of a vCPU makes of `page`, which is number `number` and held what it holds.
pub(super) fn write(content: Content, vcpu_seed: u64, number: u64, step: u64, page: &mut Page) {
    let key = mix(vcpu_seed ^ mix(number)) ^ step;
    let touched: &mut [u8] = match content {
        Content::Counter => page.get_mut(..RECORD_BYTES).unwrap_or_default(),
        _ => page,
    };
    match content {
        Content::Random | Content::Counter => random(key, touched),
        Content::Text => text(key, touched),
        Content::Sparse => sparse(key, touched),
    }
    let head = step.to_le_bytes().into_iter().chain(number.to_le_bytes());
    for (to, byte) in touched.iter_mut().zip(head) {
        *to = byte;
    }
}

/// Bytes of a page that a step writes.
pub(super) fn written_bytes(content: Content) -> usize {
    match content {
        Content::Counter => RECORD_BYTES,
        _ => PAGE_BYTES,
    }
}

/// The step and the page's number that a written page says it has.
pub(super) fn head(page: &Page) -> (u64, u64) {
    let word = |at: usize| page.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
    (word(0), word(8))
}
