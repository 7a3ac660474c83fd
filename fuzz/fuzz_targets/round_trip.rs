//! Any pages, with or without a version before, and any compressor: decoding gives the pages.
#![no_main]

use dunlin::internals::{Codec, Compressor};
use dunlin_fuzz::{PAGE, contents, ram};

const COMPRESSORS: [Compressor; 5] =
    [Compressor::None, Compressor::Lz4, Compressor::Zstd(1), Compressor::Zstd(-5), Compressor::Zstd(9)];

libfuzzer_sys::fuzz_target!(|input: (u8, bool, Vec<(u16, u16, u8)>, Vec<(u16, &[u8])>)| {
    let (compressor, again, changed, parts) = input;
    // Each part is repeated over so much of a page, or hashed to look like chance; what is left is zeros.
    let mut new = Vec::new();
    for (length, pattern) in parts.iter().take(16) {
        let mut page = vec![0; PAGE];
        let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(*length);
        let chance = pattern.first().is_some_and(|first| first % 4 == 0);
        for (byte, from) in page.iter_mut().take(usize::from(*length) % (PAGE + 1)).zip(pattern.iter().cycle()) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(u64::from(*from) | 1);
            *byte = if chance { (state >> 56) as u8 } else { *from };
        }
        new.extend(page);
    }
    let mut old = new.clone();
    for (at, count, value) in changed {
        let at = usize::from(at) % old.len().max(1);
        old.iter_mut()
            .skip(at)
            .step_by(usize::from(value) % 9 + 1)
            .take(usize::from(count))
            .for_each(|byte| *byte ^= value);
    }
    // A new one each time: an encoder remembers what did not shrink.
    let mut codec = Codec::new(COMPRESSORS[usize::from(compressor) % COMPRESSORS.len()]).expect("memory");
    let ram = ram();
    ram.write(0, &old).expect("all of it");
    codec.encode(&new, again.then_some(&old[..]));
    assert!(codec.decode(&ram, 0));
    assert_eq!(&contents(&ram)[..new.len()], &new);
});
