//! `dunlin bench kinds`: what a processor makes of pages, and makes pages of again, by what they hold.
//!
//! Everything runs on one thread, with the engine's own table of kinds: pages are copied, 64 KiB at a time, and encoded;
//! what that gives is decoded into RAM that holds their old version, and compared. Keeping the versions and checking pages
//! come on top of it in a migration: whole ones are what `bench convergence` runs.

use std::time::Instant;

use anyhow::{Result, bail};
use dunlin::internals::{self, Codec, Compressor, MAX_UNIT_BYTES};
use dunlin_machines::Backing;

use super::machine::{Idle, Random};
use super::{Column, Measured, check_memory};
use crate::args::BenchKinds;

const PAGE: usize = 4096;
const COLUMNS: &[Column] = &[
    Column { heading: "encode GB/s", key: "encoded_bytes_per_second", scale: 1e-9, decimals: 2 },
    Column { heading: "decode GB/s", key: "decoded_bytes_per_second", scale: 1e-9, decimals: 2 },
    Column { heading: "% of the pages", key: "size", scale: 100.0, decimals: 1 },
];

/// What pages hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Zero,
    Random,
    Text,
}

/// How pages differ from their version before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// There is none.
    New,
    /// So many bytes in a row, at a place of its own in each page.
    OnePlace(usize),
    /// So many bytes, each at a place of its own.
    Scattered(usize),
}

const SUBJECTS: &[(&str, Content, Change, Compressor)] = &[
    ("zero", Content::Zero, Change::New, Compressor::None),
    ("random as plain", Content::Random, Change::New, Compressor::None),
    ("random, lz4 tried", Content::Random, Change::New, Compressor::Lz4),
    ("random, zstd 1 tried", Content::Random, Change::New, Compressor::Zstd(1)),
    ("text as lz4", Content::Text, Change::New, Compressor::Lz4),
    ("text as zstd -5", Content::Text, Change::New, Compressor::Zstd(-5)),
    ("text as zstd 1", Content::Text, Change::New, Compressor::Zstd(1)),
    ("text as zstd 3", Content::Text, Change::New, Compressor::Zstd(3)),
    ("delta, nothing changed", Content::Random, Change::OnePlace(0), Compressor::None),
    ("delta, 1 % changed in one place", Content::Random, Change::OnePlace(PAGE / 100), Compressor::None),
    ("delta, 1 % changed, scattered", Content::Random, Change::Scattered(PAGE / 100), Compressor::None),
    ("delta, 10 % changed in one place", Content::Random, Change::OnePlace(PAGE / 10), Compressor::None),
    ("delta, 10 % changed, scattered", Content::Random, Change::Scattered(PAGE / 10), Compressor::None),
    ("delta tried, all changed", Content::Random, Change::OnePlace(PAGE), Compressor::None),
];

pub fn measure(args: &BenchKinds) -> Result<Measured> {
    // The pages, their versions before, their copies, RAM, and what they are encoded as.
    check_memory(args.memory.saturating_mul(5), Backing::Base, args.force)?;
    let mut measured = Measured::new(COLUMNS);
    let bytes = usize::try_from(args.memory)? / MAX_UNIT_BYTES * MAX_UNIT_BYTES;
    let ram = Idle::new(bytes as u64, Backing::Base)?;
    ram.block()?.populate(0..bytes as u64)?;
    let speed = |began: Instant| bytes as f64 / began.elapsed().as_secs_f64();

    let pages = make(bytes, Content::Random, &mut Random::default());
    let once = |run: &mut dyn FnMut() -> Result<()>| -> Result<Vec<f64>> {
        (0..args.runs)
            .map(|_| {
                let began = Instant::now();
                run()?;
                Ok(speed(began))
            })
            .collect()
    };
    let mut copy = vec![1; bytes];
    let memcpy = once(&mut || {
        copy.copy_from_slice(std::hint::black_box(&pages));
        std::hint::black_box(&copy);
        Ok(())
    })?;
    measured.add("limit: memcpy", vec![memcpy, Vec::new(), Vec::new()]);
    let checksum = once(&mut || {
        pages.chunks(MAX_UNIT_BYTES).for_each(|unit| {
            std::hint::black_box(internals::checksum(unit));
        });
        Ok(())
    })?;
    measured.add("checksum", vec![checksum, Vec::new(), Vec::new()]);
    ram.fill(|_, page| page.fill(0))?;
    let looked = once(&mut || {
        let mut offsets = (0..bytes as u64).step_by(PAGE);
        if offsets.try_fold(true, |all, at| {
            Ok::<_, anyhow::Error>(all & internals::is_zero(ram.block()?, at, PAGE as u64)?)
        })? {
            return Ok(());
        }
        bail!("a page of zeros was not found to be one")
    })?;
    measured.add("zero, looked at in place", vec![looked, Vec::new(), Vec::new()]);

    for (what, change) in [
        ("the delta encoder alone, 1 % in one place", Change::OnePlace(PAGE / 100)),
        ("the delta encoder alone, 1 % scattered", Change::Scattered(PAGE / 100)),
    ] {
        let mut new = pages.clone();
        let mut random = Random::default();
        new.chunks_exact_mut(PAGE).for_each(|page| alter(page, change, &mut random));
        let mut encoded = Vec::new();
        let alone = once(&mut || {
            for (old, new) in pages.as_chunks::<PAGE>().0.iter().zip(new.as_chunks::<PAGE>().0) {
                encoded.clear();
                if !internals::encode_delta(old, new, PAGE / 2, &mut encoded) {
                    bail!("a delta of a page that has hardly changed does not fit");
                }
            }
            Ok(())
        })?;
        measured.add(what, vec![alone, Vec::new(), Vec::new()]);
    }
    for (what, content, change, compressor) in SUBJECTS {
        measured.add(*what, subject(args, &ram, bytes, *content, *change, *compressor)?);
    }
    Ok(measured)
}

/// Samples of one row.
fn subject(
    args: &BenchKinds,
    ram: &Idle,
    bytes: usize,
    content: Content,
    change: Change,
    compressor: Compressor,
) -> Result<Vec<Vec<f64>>> {
    let mut random = Random::default();
    // By turns each is the other's version before.
    let mut old = make(bytes, content, &mut random);
    let mut new = old.clone();
    new.chunks_exact_mut(PAGE).for_each(|page| alter(page, change, &mut random));
    let block = ram.block()?;
    block.write(0, &old)?;
    let mut codec = Codec::new(compressor)?;
    let mut samples = vec![Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..args.runs {
        let (mut encoding, mut decoding, mut size) = (0.0, 0.0, 0);
        for (number, (unit, before)) in new.chunks(MAX_UNIT_BYTES).zip(old.chunks(MAX_UNIT_BYTES)).enumerate() {
            let began = Instant::now();
            size += codec.encode(unit, (change != Change::New).then_some(before));
            let encoded = Instant::now();
            if !codec.decode(block, (number * MAX_UNIT_BYTES) as u64) {
                bail!("what was encoded could not be decoded");
            }
            encoding += (encoded - began).as_secs_f64();
            decoding += encoded.elapsed().as_secs_f64();
        }
        let mut there = vec![0; bytes];
        block.read(0, &mut there)?;
        if there != new {
            bail!("what was decoded is not what was encoded");
        }
        for (samples, value) in
            samples.iter_mut().zip([bytes as f64 / encoding, bytes as f64 / decoding, size as f64 / bytes as f64])
        {
            samples.push(value);
        }
        std::mem::swap(&mut old, &mut new);
    }
    Ok(samples)
}

fn make(bytes: usize, content: Content, random: &mut Random) -> Vec<u8> {
    let mut pages = vec![0; bytes];
    match content {
        Content::Zero => {}
        Content::Random => {
            pages.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
        }
        Content::Text => write_text(&mut pages, random),
    }
    pages
}

/// Fills pages with words.
pub(super) fn write_text(pages: &mut [u8], random: &mut Random) {
    const WORDS: &[&str] = &[
        "memory ",
        "guest ",
        "host ",
        "the ",
        "of ",
        "a ",
        "page ",
        "is ",
        "written ",
        "to ",
        "migration ",
        "and ",
        "in ",
        "kernel ",
        "process ",
        "which ",
    ];
    let mut at = 0;
    while at < pages.len() {
        let word = WORDS.get(random.below(WORDS.len())).copied().unwrap_or(" ").as_bytes();
        for (to, from) in pages.iter_mut().skip(at).zip(word) {
            *to = *from;
        }
        at += word.len();
    }
}

/// Changes a page where it is to change: every byte of it that does, to another.
fn alter(page: &mut [u8], change: Change, random: &mut Random) {
    let mut flip = |at: usize, random: &mut Random| {
        if let Some(byte) = page.get_mut(at) {
            *byte ^= (random.below(255) + 1) as u8;
        }
    };
    match change {
        Change::New => {}
        Change::OnePlace(length) => {
            let start = random.below(PAGE - length + 1);
            (start..start + length).for_each(|at| flip(at, random));
        }
        Change::Scattered(count) => {
            let mut places: Vec<usize> = (0..PAGE).collect();
            for number in 0..count.min(PAGE) {
                places.swap(number, number + random.below(PAGE - number));
            }
            places.iter().take(count).for_each(|at| flip(*at, random));
        }
    }
}
