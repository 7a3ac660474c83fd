//! `dunlin bench bitmap`: what a dirty bitmap of a large machine costs, by how many pages are dirty, and what asking the
//! kernel does.
//!
//! The bitmap is a whole machine's. The kernel is asked about memory that is really there, of a machine that fits here:
//! it walks page tables, so that its cost follows RAM, at a small part of a nanosecond a byte.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, anyhow};
use dunlin::Machine;
use dunlin::memory::{DirtyBitmap, PAGE_SIZE};
use dunlin::units::format_size;
use dunlin_machines::Backing;

use super::machine::{Idle, Random};
use super::{Column, Measured, check_memory};
use crate::args::BenchBitmap;

const COLUMNS: &[Column] = &[Column { heading: "ms", key: "seconds", scale: 1e3, decimals: 3 }];
/// Repeats, of which the median counts.
const RUNS: usize = 11;

pub fn measure(args: &BenchBitmap) -> Result<Measured> {
    let pages = (args.memory / PAGE_SIZE).max(1);
    // Two bitmaps and an array as large.
    check_memory((pages / 8).saturating_mul(3).saturating_add(ASKED), Backing::Base, args.force)?;
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
        let other = DirtyBitmap::new(args.memory);
        measured.add(
            format!("{name} pages dirty: merge into another"),
            time(
                || {
                    set();
                    other.drain(|_| {});
                },
                || bitmap.drain(|run| other.set(run)),
            ),
        );
        measured.add(
            format!("{name} pages dirty: walk and take"),
            time(set, || {
                let mut taken = 0;
                bitmap.drain(|run| taken += run.len());
                black_box(taken);
            }),
        );
    }
    harvest(&mut measured)?;
    Ok(measured)
}

/// Memory that the kernel is asked about.
const ASKED: u64 = 1 << 30;

/// What it costs to learn from the kernel which pages of memory were written.
fn harvest(measured: &mut Measured) -> Result<()> {
    let memory = Idle::new(ASKED, Backing::Base)?;
    let block = memory.block()?;
    block.populate(0..ASKED)?;
    let tracker = memory.dirty_tracker().map_err(|error| anyhow!("{error}"))?;
    tracker.start()?;
    let bitmap = DirtyBitmap::new(ASKED);
    let rearm = || {
        for start in (0..ASKED).step_by(2 << 20) {
            tracker.rearm(0, start..start + (2 << 20), &bitmap)?;
        }
        bitmap.drain(|_| {});
        Ok::<_, anyhow::Error>(())
    };
    for (name, every) in
        [("no", None), ("1000", Some(ASKED / 4096 / 1000)), ("1 % of all", Some(100)), ("all", Some(1))]
    {
        let mut samples = Vec::new();
        for _ in 0..RUNS {
            rearm()?;
            if let Some(every) = every {
                for page in (0..ASKED / 4096).step_by(usize::try_from(every)?) {
                    block.write(page * 4096, &[1])?;
                }
            }
            let began = Instant::now();
            tracker.sync(0, &bitmap)?;
            samples.push(began.elapsed().as_secs_f64());
        }
        measured.add(format!("harvest of {}, {name} pages written", format_size(ASKED)), vec![samples]);
    }
    Ok(())
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
