//! Any pages, with or without a version before, and any compressor: decoding gives the pages.
#![no_main]

use std::cell::RefCell;

use dunlin::internals::{Codec, Compressor};
use dunlin_fuzz::{PAGE, contents, ram};

const COMPRESSORS: [Compressor; 5] =
    [Compressor::None, Compressor::Lz4, Compressor::Zstd(1), Compressor::Zstd(-5), Compressor::Zstd(9)];

thread_local! {
    static CODECS: RefCell<Vec<Codec>> =
        RefCell::new(COMPRESSORS.iter().map(|compressor| Codec::new(*compressor).expect("memory")).collect());
}

libfuzzer_sys::fuzz_target!(|input: (u8, bool, Vec<(u16, &[u8])>)| {
    let (compressor, again, parts) = input;
    // Each part is repeated over so much of a page; what is left is zeros.
    let make = |change: u8| {
        let mut pages = Vec::new();
        for (length, pattern) in parts.iter().take(16) {
            let mut page = vec![0; PAGE];
            let length = usize::from(*length) % (PAGE + 1);
            page.iter_mut().take(length).zip(pattern.iter().cycle()).for_each(|(byte, from)| *byte = *from);
            if let Some(first) = page.first_mut() {
                *first ^= change;
            }
            pages.extend(page);
        }
        pages
    };
    let (old, new) = (make(1), make(0));
    CODECS.with_borrow_mut(|codecs| {
        let codec = &mut codecs[usize::from(compressor) % COMPRESSORS.len()];
        let ram = ram();
        ram.write(0, &old).expect("all of it");
        codec.encode(&new, again.then_some(&old[..]));
        assert!(codec.decode(&ram, 0));
        assert_eq!(&contents(&ram)[..new.len()], &new);
    });
});
