//! `dunlin bench downtime`: how long guests are stopped, beside what was predicted and the least it could take.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use dunlin::Report;

use super::demos::demo;
use super::{Column, Measured};
use crate::args::BenchDowntime;

const COLUMNS: &[Column] = &[
    Column { heading: "downtime ms", key: "downtime_seconds", scale: 1e3, decimals: 2 },
    Column { heading: "predicted", key: "predicted_downtime_seconds", scale: 1e3, decimals: 1 },
    Column { heading: "off by", key: "prediction_error_seconds", scale: 1e3, decimals: 1 },
    Column { heading: "within the limit", key: "within_limit", scale: 1.0, decimals: 0 },
    Column { heading: "pause", key: "pause_seconds", scale: 1e3, decimals: 2 },
    Column { heading: "last pages", key: "ram_seconds", scale: 1e3, decimals: 2 },
    Column { heading: "device state", key: "device_state_seconds", scale: 1e3, decimals: 2 },
    Column { heading: "load", key: "load_seconds", scale: 1e3, decimals: 2 },
    Column { heading: "handover", key: "handover_seconds", scale: 1e3, decimals: 2 },
    Column { heading: "rounds", key: "rounds", scale: 1.0, decimals: 0 },
    Column { heading: "total s", key: "total_seconds", scale: 1.0, decimals: 2 },
];

/// Messages that wait for each other while the guest is stopped: last pages and their mark's acknowledgement, Offer and
/// Ready, Release and Running.
const ROUND_TRIPS: u32 = 3;
/// A migration takes no longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Parts of the idle machine's bandwidth at which the others dirty their memory.
const PERCENTS: [u64; 3] = [25, 50, 75];

pub fn measure(args: &BenchDowntime) -> Result<Measured> {
    let mut measured = Measured::new(COLUMNS);
    let mut least = vec![Vec::new(); COLUMNS.len()];
    if let Some(downtimes) = least.first_mut() {
        *downtimes = round_trips(args.runs)?;
    }
    measured.add(format!("limit: {ROUND_TRIPS} round trips"), least);

    let run = |workload: &str| {
        let (memory, limit) =
            (format!("--memory={}", args.memory), format!("--set=downtime-limit={}", args.downtime_limit));
        let force = args.force.then_some("--force");
        demo([memory.as_str(), limit.as_str(), "--workload", workload].into_iter().chain(force), PATIENCE)
    };
    let mut idle = Vec::new();
    for _ in 0..args.runs {
        idle.push(run("idle")?);
    }
    let mut bandwidths: Vec<u64> = idle.iter().map(|report| report.bandwidth_bytes_per_second).collect();
    bandwidths.sort_unstable();
    let bandwidth = bandwidths.get(bandwidths.len() / 2).copied().unwrap_or(0);
    measured.add("idle", samples(&idle));
    let mut dirtying: Vec<Vec<Report>> = PERCENTS.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.runs {
        for (percent, reports) in PERCENTS.iter().zip(&mut dirtying) {
            let rate = bandwidth / 100 * percent;
            let workload = format!("pattern=uniform,rate={rate}/s,working-set={},content=random", args.working_set);
            reports.push(run(&workload)?);
        }
    }
    for (percent, reports) in PERCENTS.iter().zip(&dirtying) {
        measured.add(
            format!("dirtying at {percent} % of {:.0} MiB/s", bandwidth as f64 / (1 << 20) as f64),
            samples(reports),
        );
    }
    Ok(measured)
}

fn samples(reports: &[Report]) -> Vec<Vec<f64>> {
    let column = |value: &dyn Fn(&Report) -> Option<f64>| reports.iter().filter_map(value).collect::<Vec<f64>>();
    let parts = |report: &Report| report.downtime_parts.unwrap_or_default();
    vec![
        column(&|report| Some(report.downtime_seconds)),
        column(&|report| report.predicted_downtime_seconds),
        column(&|report| Some((report.predicted_downtime_seconds? - report.downtime_seconds).abs())),
        column(&|report| Some(f64::from(u8::from(report.downtime_seconds <= report.downtime_limit_seconds)))),
        column(&|report| Some(parts(report).pause_seconds)),
        column(&|report| Some(parts(report).ram_seconds)),
        column(&|report| Some(parts(report).device_state_seconds)),
        column(&|report| Some(parts(report).load_seconds)),
        column(&|report| Some(parts(report).handover_seconds)),
        column(&|report| Some(f64::from(report.rounds_ended()))),
        column(&|report| Some(report.total_seconds)),
    ]
}

/// Seconds that bare round trips over the same transport take, between two threads.
fn round_trips(runs: u32) -> Result<Vec<f64>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut here = TcpStream::connect(listener.local_addr()?)?;
    here.set_nodelay(true)?;
    let mut there = listener.accept()?.0;
    there.set_nodelay(true)?;
    thread::scope(|scope| {
        let echo = scope.spawn(move || -> std::io::Result<()> {
            let mut byte = [0];
            while there.read(&mut byte)? == 1 {
                there.write_all(&byte)?;
            }
            Ok(())
        });
        let mut seconds = Vec::new();
        for _ in 0..runs {
            let began = Instant::now();
            for _ in 0..ROUND_TRIPS {
                here.write_all(&[1])?;
                here.read_exact(&mut [0])?;
            }
            seconds.push(began.elapsed().as_secs_f64());
        }
        drop(here);
        echo.join().map_err(|_| anyhow!("a thread panicked"))??;
        Ok(seconds)
    })
}
