//! `dunlin bench convergence`: what deltas and compression do where a link is too slow for its guest.
//!
//! *Fast guest*: 128 MiB rewritten at 300 MB/s over a link of 100 MB/s, 1 % of the bytes new each time. *Slow link*: 512
//! MiB of text over 50 MB/s, idle. *Fast link*: 2 GiB of random bytes without a limit, idle.

use std::time::Duration;

use anyhow::Result;
use dunlin::Status;

use super::demos::demo;
use super::{Column, Measured};
use crate::args::BenchConvergence;

const COLUMNS: &[Column] = &[
    Column { heading: "converged", key: "converged", scale: 1.0, decimals: 0 },
    Column { heading: "total s", key: "total_seconds", scale: 1.0, decimals: 2 },
    Column { heading: "rounds", key: "rounds", scale: 1.0, decimals: 0 },
    Column { heading: "downtime ms", key: "downtime_seconds", scale: 1e3, decimals: 1 },
    Column { heading: "predicted", key: "predicted_downtime_seconds", scale: 1e3, decimals: 1 },
    Column { heading: "MiB sent", key: "transferred_bytes", scale: 1.0 / (1 << 20) as f64, decimals: 0 },
    Column { heading: "CPU s/GiB", key: "cpu_seconds_per_gib", scale: 1.0, decimals: 2 },
];

/// What is common to some rows: its name, the guest, and the time that its RAM takes once over the link as it is.
struct Scene {
    what: &'static str,
    demo: &'static [&'static str],
    limit: Option<(u64, u64)>,
    ways: &'static [(&'static str, &'static [&'static str])],
}

const NOTHING: (&str, &[&str]) = ("as pages are", &[]);
const LZ4: (&str, &[&str]) = ("lz4", &["multifd-compression=lz4"]);
const ZSTD: (&str, &[&str]) = ("zstd", &["multifd-compression=zstd"]);

const SCENES: &[Scene] = &[
    Scene {
        what: "fast guest",
        demo: &[
            "--memory=1G",
            "--fill=zero:90,random:10",
            "--workload=pattern=uniform,rate=300M/s,working-set=128M,content=counter",
            "--set=max-bandwidth=100M/s",
        ],
        // A tenth of a GiB, and the working set.
        limit: None,
        ways: &[
            NOTHING,
            ("delta, 1 channel", &["xbzrle=on", "xbzrle-cache-size=256M", "multifd-channels=1"]),
            ("delta, 4 channels", &["xbzrle=on", "xbzrle-cache-size=256M", "multifd-channels=4"]),
            (
                "delta, 4 channels, zstd",
                &["xbzrle=on", "xbzrle-cache-size=256M", "multifd-channels=4", "multifd-compression=zstd"],
            ),
            ("delta, half the cache", &["xbzrle=on", "xbzrle-cache-size=64M"]),
        ],
    },
    Scene {
        what: "slow link",
        demo: &["--memory=512M", "--fill=text:100", "--workload=idle", "--set=max-bandwidth=50M/s"],
        limit: Some((512 << 20, 50 << 20)),
        ways: &[NOTHING, LZ4, ZSTD],
    },
    Scene {
        what: "fast link",
        demo: &["--memory=2G", "--fill=random:100", "--workload=idle"],
        limit: None,
        ways: &[NOTHING, LZ4, ZSTD],
    },
];

pub fn measure(args: &BenchConvergence) -> Result<Measured> {
    let mut measured = Measured::new(COLUMNS);
    for scene in SCENES {
        if let Some((bytes, rate)) = scene.limit {
            let mut samples = vec![Vec::new(); COLUMNS.len()];
            if let Some(total) = samples.get_mut(1) {
                total.push(bytes as f64 / rate as f64);
            }
            measured.add(format!("{}: limit as pages are", scene.what), samples);
        }
        let mut rows: Vec<Vec<Vec<f64>>> = scene.ways.iter().map(|_| vec![Vec::new(); COLUMNS.len()]).collect();
        for _ in 0..args.runs {
            for ((_, set), samples) in scene.ways.iter().zip(&mut rows) {
                let settings = set.iter().flat_map(|&set| ["--set", set]).chain(args.force.then_some("--force"));
                let report = demo(scene.demo.iter().copied().chain(settings), Duration::from_secs(args.patience))?;
                let converged = report.status == Status::Completed;
                let cpu = report.cpu_seconds.source.unwrap_or(0.0) + report.cpu_seconds.destination.unwrap_or(0.0);
                let gib = report.ram.total_bytes as f64 / (1u64 << 30) as f64;
                let values = [
                    Some(f64::from(u8::from(converged))),
                    Some(report.total_seconds),
                    Some(f64::from(report.rounds_ended())),
                    converged.then_some(report.downtime_seconds),
                    report.predicted_downtime_seconds.filter(|_| converged),
                    Some(report.ram.transferred_bytes as f64),
                    converged.then_some(cpu / gib),
                ];
                for (samples, value) in samples.iter_mut().zip(values) {
                    samples.extend(value);
                }
            }
        }
        for ((how, _), samples) in scene.ways.iter().zip(rows) {
            measured.add(format!("{}: {how}", scene.what), samples);
        }
    }
    Ok(measured)
}
