//! Any changes to any page: what is encoded turns the old page into the new one, for both decoders, in no more bytes than
//! were allowed.
#![no_main]

use dunlin::internals::{decode_as, encode_delta};
use dunlin_fuzz::{PAGE, apply_slowly, contents, ram};

const DELTA: u8 = 2;

libfuzzer_sys::fuzz_target!(|input: (u16, Vec<u8>, Vec<(u16, u8, u8)>)| {
    let (limit, pattern, changes) = input;
    let limit = usize::from(limit) % (2 * PAGE);
    let mut old = [0; PAGE];
    old.iter_mut().zip(pattern.iter().cycle()).for_each(|(byte, from)| *byte = *from);
    let mut new = old;
    for (at, length, value) in changes {
        let start = usize::from(at) % PAGE;
        new.iter_mut().skip(start).take(usize::from(length)).for_each(|byte| *byte = value);
    }
    let mut encoded = vec![9; 3];
    let fits = encode_delta(&old, &new, limit, &mut encoded);
    assert_eq!(encoded.drain(..3).collect::<Vec<_>>(), [9; 3], "what was there stays");
    if !fits {
        assert!(encoded.is_empty());
        assert!(limit < PAGE + 4, "there was room for the whole page");
        return;
    }
    assert!(encoded.len() <= limit);
    assert_eq!(apply_slowly(&old, &encoded).as_deref(), Some(&new[..]));
    if encoded.len() < PAGE {
        let ram = ram();
        ram.write(PAGE as u64, &old).expect("a page");
        assert!(decode_as(DELTA, &encoded, &ram, PAGE as u64, PAGE as u32));
        assert_eq!(&contents(&ram)[PAGE..2 * PAGE], &new);
    }
});
