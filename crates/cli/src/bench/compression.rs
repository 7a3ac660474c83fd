//! `dunlin bench compression`: idle machines with each compressor, beside the same without one.
//!
//! Everything is measured by turns, several times. Each run is set beside the run without a compressor of its own turn.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use dunlin::Uri;

use super::kinds::write_text;
use super::machine::{Idle, Random};
use super::peer::{Peer, Task, cpu_seconds};
use super::throughput::migrate;
use super::{Column, Measured};
use crate::args::{BenchCompression, Transport};

const COLUMNS: &[Column] = &[
    Column { heading: "times as long as none", key: "of_none", scale: 1.0, decimals: 2 },
    Column { heading: "s", key: "seconds", scale: 1.0, decimals: 2 },
    Column { heading: "MiB sent", key: "transferred_bytes", scale: 1.0 / (1 << 20) as f64, decimals: 0 },
    Column { heading: "CPU s/GiB source", key: "source_cpu_seconds_per_gib", scale: 1.0, decimals: 2 },
    Column { heading: "destination", key: "destination_cpu_seconds_per_gib", scale: 1.0, decimals: 2 },
    Column { heading: "CPU of none's", key: "cpu_of_none", scale: 1.0, decimals: 2 },
];

#[derive(Debug, Clone, Copy)]
enum Content {
    Text,
    Random,
    /// Nine pages of ten.
    Zero,
}

const CONTENTS: &[(&str, Content)] =
    &[("text", Content::Text), ("random", Content::Random), ("90 % zero, 10 % text", Content::Zero)];

const WAYS: &[(&str, &[&str])] = &[
    ("none", &[]),
    ("lz4", &["multifd-compression=lz4"]),
    ("zstd 1", &["multifd-compression=zstd", "multifd-zstd-level=1"]),
    ("zstd 9", &["multifd-compression=zstd", "multifd-zstd-level=9"]),
    ("zstd 22", &["multifd-compression=zstd", "multifd-zstd-level=22"]),
];

/// One migration.
struct Run {
    seconds: f64,
    source_cpu: f64,
    destination_cpu: f64,
    transferred_bytes: u64,
}

pub fn measure(args: &BenchCompression) -> Result<Measured> {
    let gib = args.memory as f64 / (1u64 << 30) as f64;
    let mut measured = Measured::new(COLUMNS);
    for (what, content) in CONTENTS {
        let memory = Idle::new(args.memory, args.hugepages)?;
        let mut random = Random::default();
        memory.fill(|number, page| match content {
            Content::Random => {
                page.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
            }
            Content::Zero if number % 10 != 0 => page.fill(0),
            Content::Text | Content::Zero => write_text(page, &mut random),
        })?;
        let digest = memory.digest()?;
        let mut runs: Vec<Vec<Run>> = WAYS.iter().map(|_| Vec::new()).collect();
        for turn in 0..args.runs as usize {
            // Nobody is always the first after a pause.
            for number in 0..WAYS.len() {
                let index = (number + turn) % WAYS.len();
                if let (Some((how, set)), Some(runs)) = (WAYS.get(index), runs.get_mut(index)) {
                    runs.push(run(args, &memory, digest, set).with_context(|| format!("{what}, {how}"))?);
                }
            }
        }
        let none = runs.first().context("nothing was measured")?;
        for ((how, _), own) in WAYS.iter().zip(&runs) {
            let column = |value: &dyn Fn(&Run) -> f64| -> Vec<f64> { own.iter().map(value).collect() };
            let beside = |value: &dyn Fn(&Run) -> f64| -> Vec<f64> {
                own.iter().zip(none).map(|(run, none)| value(run) / value(none)).collect()
            };
            measured.add(
                format!("{what}: {how}"),
                vec![
                    beside(&|run| run.seconds),
                    column(&|run| run.seconds),
                    column(&|run| run.transferred_bytes as f64),
                    column(&|run| run.source_cpu / gib),
                    column(&|run| run.destination_cpu / gib),
                    beside(&|run| run.source_cpu + run.destination_cpu),
                ],
            );
        }
    }
    Ok(measured)
}

fn run(args: &BenchCompression, memory: &Arc<Idle>, digest: u64, set: &[&str]) -> Result<Run> {
    let warm = Idle::new(args.memory, args.hugepages)?;
    warm.block()?.populate(0..args.memory)?;
    drop(warm);
    let directory = tempfile::Builder::new().prefix("dunlin-bench-").tempdir()?;
    let listen = match args.transport {
        Transport::Tcp => Uri::Tcp { host: "127.0.0.1".to_owned(), port: 0 },
        Transport::Unix => Uri::Unix(directory.path().join("socket")),
    };
    let set: Vec<&str> = args.set.iter().map(String::as_str).chain(set.iter().copied()).collect();
    let task = Task::Migration(set.iter().map(|&set| set.to_owned()).collect());
    let peer = Peer::start(args.memory, args.hugepages, &listen, &task)?;
    let (began, cpu) = (Instant::now(), cpu_seconds());
    let report = migrate(memory, &peer.address, args.channels, &set)?;
    let (seconds, source_cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let received = peer.finish()?;
    if received.digest != digest {
        bail!("what arrived is not what was sent");
    }
    Ok(Run {
        seconds,
        source_cpu,
        destination_cpu: received.cpu_seconds,
        transferred_bytes: report.ram.transferred_bytes,
    })
}
