//! Encodings of real pages with some bytes of them changed or cut off: pages or an error, the same whatever was in RAM
//! before, and the right ones if nothing was changed.
#![no_main]

use dunlin::internals::{Codec, Compressor, decode_as};
use dunlin_fuzz::{PAGE, contents, ram};

libfuzzer_sys::fuzz_target!(|input: (bool, u8, Vec<(u8, u8)>, Vec<(u16, u8)>, u16)| {
    let (lz4, pages, pattern, damage, cut) = input;
    let (number, compressor) = if lz4 { (3, Compressor::Lz4) } else { (4, Compressor::Zstd(1)) };
    let length = (usize::from(pages) % 16 + 1) * PAGE;
    let runs = pattern.iter().flat_map(|(value, count)| std::iter::repeat_n(*value, usize::from(*count) + 1));
    let mut page: Vec<u8> = runs.take(length).collect();
    page.resize(length, 1);
    let mut codec = Codec::new(compressor).expect("memory");
    codec.encode(&page, None);
    let good = codec.encoded().to_vec();
    let mut bad = good.clone();
    for (at, value) in damage {
        let at = usize::from(at) % bad.len().max(1);
        bad.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= value);
    }
    bad.truncate(bad.len().saturating_sub(usize::from(cut) % 64));
    let decoded = [0, 0xff].map(|before| {
        let ram = ram();
        ram.write(0, &vec![before; length]).expect("memory");
        decode_as(number, &bad, &ram, 0, length as u32).then(|| contents(&ram)[..length].to_vec())
    });
    assert_eq!(decoded[0], decoded[1]);
    if bad == good
        && good.len() < length
        && page.iter().any(|byte| *byte != 0)
        && !page.chunks(PAGE).any(|page| page.iter().all(|byte| *byte == 0))
    {
        assert_eq!(decoded[0].as_deref(), Some(&page[..]));
    }
});
