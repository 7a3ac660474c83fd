//! Any bytes as pages of any kind: pages or an error, and nothing outside the run changes. A delta that is taken gives what
//! the obvious decoder makes of it.
#![no_main]

use dunlin::internals::decode_as;
use dunlin_fuzz::{PAGE, PAGES, apply_slowly, contents, ram};

const DELTA: u8 = 2;

libfuzzer_sys::fuzz_target!(|input: (u8, u8, &[u8])| {
    let (kind, pages, encoded) = input;
    let kind = kind % 6;
    let length = if kind == DELTA { PAGE } else { (usize::from(pages) % (PAGES - 2) + 1) * PAGE };
    let ram = ram();
    let before = vec![7; PAGES * PAGE];
    ram.write(0, &before).expect("all of it");
    let taken = decode_as(kind, encoded, &ram, PAGE as u64, length as u32);
    let after = contents(&ram);
    let (start, end) = (PAGE, PAGE + length);
    assert!(after[..start].iter().chain(&after[end..]).all(|byte| *byte == 7), "outside the run");
    if kind == DELTA && encoded.len() < PAGE {
        assert_eq!(taken.then(|| after[start..end].to_vec()), apply_slowly(&before[start..end], encoded));
    }
});
