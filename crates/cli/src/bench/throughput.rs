//! `dunlin bench throughput`: an idle machine from one process to another, beside bare copies of the same memory.
//!
//! A bare copy has the same memory, connections and kinds of pages as the migration, and receives into fresh memory as
//! it does. Everything is measured by turns, several times, and what arrived is compared with what was sent. Before each
//! run as much memory is made present and freed again: what a host of virtual machines has taken back from this one costs
//! several times as much to touch, and would be had by whoever comes first.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use dunlin::{Guest, Parameters, Report, Source, Status, Uri};
use dunlin_machines::Backing;

use super::machine::{Idle, Random};
use super::peer::{OwnMemory, Peer, Task, cpu_seconds};
use super::{Column, Measured, check_memory};
use crate::args::{BenchThroughput, Transport, Way};

const COLUMNS: &[Column] = &[
    Column { heading: "GB/s", key: "bytes_per_second", scale: 1e-9, decimals: 2 },
    Column { heading: "of the bare copy", key: "of_bare_copy", scale: 1.0, decimals: 2 },
    Column { heading: "CPU s/GiB source", key: "source_cpu_seconds_per_gib", scale: 1.0, decimals: 2 },
    Column { heading: "destination", key: "destination_cpu_seconds_per_gib", scale: 1.0, decimals: 2 },
    Column { heading: "CPU of the bare copy's", key: "cpu_of_bare_copy", scale: 1.0, decimals: 2 },
    Column { heading: "own MiB source", key: "source_own_bytes", scale: 1.0 / (1 << 20) as f64, decimals: 0 },
    Column { heading: "destination", key: "destination_own_bytes", scale: 1.0 / (1 << 20) as f64, decimals: 0 },
    Column { heading: "present MiB", key: "present_bytes", scale: 1.0 / (1 << 20) as f64, decimals: 0 },
];

/// The bare copy that a migration is compared with.
const BARE: Way = Way::Populate;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Random,
    Zero,
}

/// A row: what is measured.
struct Subject {
    what: &'static str,
    content: Content,
    how: How,
}

enum How {
    Memcpy,
    Bare(Way),
    Migration(&'static [&'static str]),
}

const fn bare(what: &'static str, way: Way) -> Subject {
    Subject { what, content: Content::Random, how: How::Bare(way) }
}

const fn migration(what: &'static str, content: Content, set: &'static [&'static str]) -> Subject {
    Subject { what, content, how: How::Migration(set) }
}

const SUBJECTS: &[Subject] = &[
    Subject { what: "limit: memcpy, a thread a channel", content: Content::Random, how: How::Memcpy },
    bare("limit: bare copy, populate ahead", BARE),
    migration("migration, integrity=none", Content::Random, &["integrity=none"]),
    migration("migration, integrity=none, zero-copy-send", Content::Random, &["integrity=none", "zero-copy-send=on"]),
    migration("migration, integrity=checksum", Content::Random, &[]),
    migration("migration of zeros", Content::Zero, &[]),
];

const WAYS: &[Subject] = &[
    bare("bare: write, read as pages come", Way::Straight),
    bare("bare: write, read and pwrite", Way::Pwrite),
    bare("bare: write, read and pwrite, map", Way::PwriteMap),
    bare("bare: sendfile, populate ahead", Way::Sendfile),
    bare("bare: sendfile, read and pwrite", Way::SendfilePwrite),
    bare("bare: splice both sides", Way::Splice),
];

/// A file of huge pages is read and written by way of mappings only.
fn possible(subject: &Subject, from: Backing, into: Backing) -> bool {
    match subject.how {
        How::Bare(Way::Pwrite | Way::PwriteMap) => into == Backing::Base,
        How::Bare(Way::Sendfile) => from == Backing::Base,
        How::Bare(Way::SendfilePwrite | Way::Splice) => (from, into) == (Backing::Base, Backing::Base),
        _ => true,
    }
}

/// One run of one subject.
struct Run {
    seconds: f64,
    source_cpu: f64,
    destination_cpu: f64,
    source_own: u64,
    destination_own: Option<u64>,
    present: Option<u64>,
}

pub fn measure(args: &BenchThroughput) -> Result<Measured> {
    let into = args.into.unwrap_or(args.hugepages);
    // One to send, and one to receive or to warm up; each is filled.
    if into == args.hugepages {
        check_memory(args.memory.saturating_mul(2), into, args.force)?;
    } else {
        check_memory(args.memory, args.hugepages, args.force)?;
        check_memory(args.memory, into, args.force)?;
    }
    let subjects: Vec<&Subject> =
        SUBJECTS.iter().chain(WAYS.iter().filter(|way| args.ways && possible(way, args.hugepages, into))).collect();
    let mut runs: Vec<Vec<Run>> = subjects.iter().map(|_| Vec::new()).collect();
    for content in [Content::Random, Content::Zero] {
        let memory = Idle::new(args.memory, args.hugepages)?;
        let mut random = Random::default();
        memory.fill(|_, page| match content {
            Content::Zero => page.fill(0),
            Content::Random => {
                page.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
            }
        })?;
        let digest = memory.digest()?;
        for _ in 0..args.runs {
            for (subject, runs) in subjects.iter().zip(&mut runs) {
                if subject.content == content {
                    let warm = Idle::new(args.memory, into)?;
                    warm.block()?.populate(0..args.memory)?;
                    drop(warm);
                    runs.push(run(args, into, subject, &memory, digest).with_context(|| subject.what)?);
                }
            }
        }
    }
    let gib = args.memory as f64 / (1u64 << 30) as f64;
    let mut measured = Measured::new(COLUMNS);
    let bare = subjects.iter().position(|subject| matches!(subject.how, How::Bare(BARE)));
    let bare_runs = bare.and_then(|bare| runs.get(bare)).context("no bare copy")?;
    for (subject, runs) in subjects.iter().zip(&runs) {
        let column = |value: &dyn Fn(&Run) -> f64| -> Vec<f64> { runs.iter().map(value).collect() };
        // Each run beside the bare copy of the same turn.
        let beside = |value: &dyn Fn(&Run, &Run) -> f64| -> Vec<f64> {
            if subject.content == Content::Zero || matches!(subject.how, How::Memcpy) {
                return Vec::new();
            }
            runs.iter().zip(bare_runs).map(|(run, bare)| value(run, bare)).collect()
        };
        let cpu = |run: &Run| run.source_cpu + run.destination_cpu;
        measured.add(
            subject.what,
            vec![
                column(&|run| args.memory as f64 / run.seconds),
                beside(&|run, bare| bare.seconds / run.seconds),
                column(&|run| run.source_cpu / gib),
                column(&|run| run.destination_cpu / gib),
                beside(&|run, bare| cpu(run) / cpu(bare)),
                column(&|run| run.source_own as f64),
                runs.iter().filter_map(|run| run.destination_own).map(|bytes| bytes as f64).collect(),
                runs.iter().filter_map(|run| run.present).map(|bytes| bytes as f64).collect(),
            ],
        );
    }
    Ok(measured)
}

fn run(
    args: &BenchThroughput,
    into: Backing,
    subject: &Subject,
    memory: &std::sync::Arc<Idle>,
    digest: u64,
) -> Result<Run> {
    let directory = tempfile::Builder::new().prefix("dunlin-bench-").tempdir()?;
    let listen = match args.transport {
        Transport::Tcp => Uri::Tcp { host: "127.0.0.1".to_owned(), port: 0 },
        Transport::Unix => Uri::Unix(directory.path().join("socket")),
    };
    let task = match subject.how {
        How::Memcpy => return memcpy(args, memory),
        How::Bare(way) => Task::Bare(args.channels, way),
        How::Migration(set) => Task::Migration(set.iter().map(|&set| set.to_owned()).collect()),
    };
    let peer = Peer::start(args.memory, into, &listen, &task)?;
    let own = OwnMemory::watch()?;
    let (began, cpu) = (Instant::now(), cpu_seconds());
    match subject.how {
        How::Bare(way) => super::copy::send(memory, &peer.address, args.channels, way)?,
        How::Migration(set) => drop(migrate(memory, &peer.address, args.channels, set)?),
        How::Memcpy => {}
    }
    let (seconds, source_cpu, source_own) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu, own.most());
    drop(own);
    let received = peer.finish()?;
    if received.digest != digest {
        bail!("what arrived is not what was sent");
    }
    Ok(Run {
        seconds,
        source_cpu,
        destination_cpu: received.cpu_seconds,
        source_own,
        destination_own: received.own_bytes,
        present: received.present_bytes,
    })
}

/// Migrates an idle machine, with these parameters (`NAME=VALUE`).
pub(super) fn migrate(memory: &std::sync::Arc<Idle>, to: &Uri, channels: u8, set: &[&str]) -> Result<Report> {
    let guest = Guest::new(memory.clone());
    guest.cont()?;
    let mut parameters = Parameters::default();
    parameters.set("multifd-channels", channels.into())?;
    for setting in set {
        let (name, value) = setting.split_once('=').context("not NAME=VALUE")?;
        parameters.set_text(name, value)?;
    }
    let report = Source::start(&guest, to, &parameters)?.wait();
    if report.status != Status::Completed {
        bail!("{}", report.error.map_or("the migration did not complete".to_owned(), |error| error.message));
    }
    Ok(report)
}

/// Between two mappings of this process, both present, a thread for each channel.
fn memcpy(args: &BenchThroughput, from: &Idle) -> Result<Run> {
    let to = Idle::new(args.memory, args.hugepages)?;
    to.block()?.populate(0..args.memory)?;
    let (began, cpu) = (Instant::now(), cpu_seconds());
    super::copy::between(from, &to, args.channels)?;
    Ok(Run {
        seconds: began.elapsed().as_secs_f64(),
        source_cpu: cpu_seconds() - cpu,
        destination_cpu: 0.0,
        source_own: 0,
        destination_own: Some(0),
        present: to.present_bytes()?,
    })
}
