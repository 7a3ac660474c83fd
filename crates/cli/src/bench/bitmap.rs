//! `dunlin bench bitmap`: what a dirty bitmap of a large machine costs, by how many pages are dirty.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use dunlin::memory::{DirtyBitmap, PAGE_SIZE};
use dunlin::units::format_size;

use super::machine::Random;
use super::{Column, Measured};
use crate::args::BenchBitmap;

const COLUMNS: &[Column] = &[Column { heading: "ms", key: "seconds", scale: 1e3, decimals: 3 }];
/// Repeats, of which the median counts.
const RUNS: usize = 11;

pub fn measure(args: &BenchBitmap) -> Result<Measured> {
    let pages = (args.memory / PAGE_SIZE).max(1);
    let size = format_size(args.memory);
    let bitmap = DirtyBitmap::new(args.memory);
    // Every word of it is memory of its own before anything is timed.
    bitmap.set_all();
    bitmap.drain(|_| {});

    let mut measured = Measured::new(COLUMNS);
    let words = vec![1u64; usize::try_from(pages.div_ceil(64)).unwrap_or(0)];
    measured.add(
        format!("limit: every word of {size} read once"),
        time(
            || (),
            || {
                black_box(black_box(&words).iter().fold(0, |all, word| all | word));
            },
        ),
    );
    for (name, dirty) in [("no", 0), ("1000", 1000.min(pages)), ("1 % of all", pages / 100)] {
        let (mut random, limit) = (Random::default(), usize::try_from(pages)?);
        let scattered: Vec<usize> =
            std::iter::repeat_with(|| random.below(limit)).take(usize::try_from(dirty)?).collect();
        let set = || scattered.iter().for_each(|page| bitmap.set(*page..*page + 1));
        let clear = || bitmap.drain(|_| {});
        measured.add(format!("{name} pages dirty: set"), time(clear, set));
        set();
        measured.add(
            format!("{name} pages dirty: count"),
            time(
                || (),
                || {
                    black_box(bitmap.count());
                },
            ),
        );
        clear();
        measured.add(
            format!("{name} pages dirty: walk and take"),
            time(set, || {
                let mut taken = 0;
                bitmap.drain(|run| taken += run.len());
                black_box(taken);
            }),
        );
    }
    Ok(measured)
}

/// Seconds of each run, without what has to be done before.
fn time(mut before: impl FnMut(), mut run: impl FnMut()) -> Vec<Vec<f64>> {
    let once = |_| {
        before();
        let began = Instant::now();
        run();
        began.elapsed().as_secs_f64()
    };
    vec![(0..RUNS).map(once).collect()]
}
