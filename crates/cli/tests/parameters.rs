//! Every parameter has an effect: of each, two values are set, and what comes of them differs as its help says. A parameter
//! that is added to the table without an effect here makes the test fail.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, PATIENCE, turn, until};
use dunlin::parameters::{PARAMETERS, ParameterInfo};
use dunlin::{Report, Status};
use serde_json::{Value, json};

const IDLE: &str = "idle";
/// Writes to 8 MiB again and again, faster than a slow link can follow.
const HOT: &str = "pattern=uniform,rate=600M/s,working-set=8M,content=random";
/// Writes a little to the same pages again and again.
const SPARSE: &str = "pattern=uniform,rate=40M/s,working-set=4M,content=sparse";

/// What a parameter does.
enum Effect {
    /// This function shows it.
    Seen(fn()),
    /// Nothing, and its help says so.
    None,
}

/// Bytes a second of a link that is slow.
const LINK: u64 = 32 << 20;

use Effect::{None as Nothing, Seen};

static EFFECTS: &[(&str, Effect)] = &[
    ("max-bandwidth", Seen(max_bandwidth)),
    ("avail-switchover-bandwidth", Seen(avail_switchover_bandwidth)),
    ("downtime-limit", Seen(downtime_limit)),
    ("multifd", Seen(multifd)),
    ("multifd-channels", Seen(multifd_channels)),
    ("multifd-compression", Seen(multifd_compression)),
    ("multifd-zstd-level", Seen(multifd_zstd_level)),
    ("xbzrle", Seen(xbzrle)),
    ("xbzrle-cache-size", Seen(xbzrle_cache_size)),
    ("integrity", Seen(integrity)),
    ("zero-copy-send", Seen(zero_copy_send)),
    ("auto-converge", Seen(auto_converge)),
    ("throttle-trigger-threshold", Seen(throttle_trigger_threshold)),
    ("cpu-throttle-initial", Seen(cpu_throttle_initial)),
    ("cpu-throttle-increment", Seen(cpu_throttle_increment)),
    ("max-cpu-throttle", Seen(max_cpu_throttle)),
    ("pause-before-switchover", Seen(pause_before_switchover)),
    ("switchover-timeout", Seen(switchover_timeout)),
    ("handover-timeout", Seen(handover_timeout)),
    ("link-timeout", Seen(link_timeout)),
    ("events", Seen(events)),
    ("return-path", Nothing),
    ("late-block-activate", Nothing),
];

#[test]
fn every_parameter_has_an_effect() {
    let _turn = turn();
    let named: BTreeSet<&str> = EFFECTS.iter().map(|(name, _)| *name).collect();
    let all: BTreeSet<&str> = PARAMETERS.iter().map(|info| info.name).collect();
    assert_eq!(named, all, "each parameter has a row, and each row is a parameter's");
    assert_eq!(EFFECTS.len(), all.len());
    for (name, effect) in EFFECTS {
        match effect {
            Seen(shown) => {
                let began = Instant::now();
                shown();
                println!("{name}: seen in {:.1} s", began.elapsed().as_secs_f64());
            }
            Nothing => {
                let help = ParameterInfo::find(name).unwrap().help;
                assert!(help.contains("whatever this says"), "{name} has no effect, and does not say so: {help}");
            }
        }
    }
}

/// Two machines, and a migration that was started.
struct Run {
    source: Machine,
    destination: Machine,
    directory: tempfile::TempDir,
}

fn run(workload: &str, settings: Value) -> Run {
    run_by(workload, settings, str::to_owned)
}

fn run_by(workload: &str, settings: Value, way: impl FnOnce(&str) -> String) -> Run {
    let directory = tempfile::tempdir().unwrap();
    let fill = ["--fill", "text:50,random:50"];
    let source = Machine::source(directory.path(), "16M", workload, &fill);
    let destination = Machine::destination(directory.path(), "16M");
    source.set(settings);
    source.execute("migrate", json!({"uri": way(&destination.address())}));
    Run { source, destination, directory }
}

fn moved(workload: &str, settings: Value) -> Report {
    run(workload, settings).source.completed()
}

/// The report once `wanted` of it; the migration is given up then.
fn seen(workload: &str, settings: Value, wanted: impl Fn(&Report) -> bool) -> Report {
    let run = run(workload, settings);
    until("it is seen", PATIENCE, || run.source.report().filter(&wanted))
}

fn max_bandwidth() {
    let rate = |limit: u64| {
        let report = moved(IDLE, json!({ "max-bandwidth": limit }));
        report.ram.transferred_bytes as f64 / (report.total_seconds - report.setup_seconds)
    };
    let (slow, quick) = (rate(8_388_608), rate(0));
    assert!(slow < 1.1 * 8_388_608.0 && quick > 2.0 * slow, "{slow} and {quick} bytes/s");
}

/// With a round of RAM to go: what the downtime is predicted to be.
fn avail_switchover_bandwidth() {
    let predicted = |available: u64| {
        let settings = json!({"max-bandwidth": LINK, "downtime-limit": 1, "avail-switchover-bandwidth": available});
        let report = seen(HOT, settings, |report| report.rounds_ended() > 2);
        let round = report.rounds.last().unwrap();
        (round.predicted_downtime_seconds, round.dirty_bytes as f64)
    };
    let (measured, dirty) = predicted(0);
    assert!((measured / (dirty / LINK as f64) - 1.0).abs() < 0.3, "{measured} s for {dirty} bytes");
    for available in [4 << 20, 64 << 20] {
        let (said, dirty) = predicted(available);
        assert!((said / (dirty / available as f64) - 1.0).abs() < 0.3, "{said} s for {dirty} bytes at {available}");
    }
    // And max-bandwidth does not hold up what was promised.
    let settings = |available: u64| json!({"max-bandwidth": LINK, "downtime-limit": 20_000, "avail-switchover-bandwidth": available});
    let (held, let_go) = (moved(HOT, settings(0)), moved(HOT, settings(1 << 30)));
    let at =
        |report: &Report| report.rounds.last().unwrap().ram_bytes as f64 / report.downtime_parts.unwrap().ram_seconds;
    assert!(at(&held) < 1.2 * LINK as f64 && at(&let_go) > 2.0 * at(&held), "{} and {}", at(&held), at(&let_go));
}

fn downtime_limit() {
    let settings = |limit: u64| json!({"max-bandwidth": LINK, "downtime-limit": limit});
    assert_eq!(seen(HOT, settings(50), |report| report.not_converging.is_some()).status, Status::Active);
    moved(HOT, settings(20_000));
}

fn channels(settings: Value) -> usize {
    moved(IDLE, settings).channels.len()
}

fn multifd() {
    let channels = |on: bool| channels(json!({"multifd": on, "multifd-channels": 3}));
    assert_eq!([channels(false), channels(true)], [1, 3]);
}

fn multifd_channels() {
    assert_eq!([1, 5].map(|count| channels(json!({ "multifd-channels": count }))), [1, 5]);
}

/// Over a link that is slow enough for it to pay.
fn compressed(settings: &[(&str, Value)]) -> Report {
    let mut all = json!({"max-bandwidth": LINK / 4, "multifd-channels": 1});
    settings.iter().for_each(|(name, value)| all[*name] = value.clone());
    moved(IDLE, all)
}

fn multifd_compression() {
    let pages = |name: &str| compressed(&[("multifd-compression", json!(name))]).ram.pages;
    let (none, lz4, zstd) = (pages("none"), pages("lz4"), pages("zstd"));
    assert_eq!([none.lz4, none.zstd, lz4.zstd, zstd.lz4], [0; 4]);
    assert!(lz4.lz4 > 500 && zstd.zstd > 500, "{lz4} and {zstd}");
}

fn multifd_zstd_level() {
    let bytes = |level: i64| {
        compressed(&[("multifd-compression", json!("zstd")), ("multifd-zstd-level", json!(level))])
            .ram
            .transferred_bytes
    };
    let (quick, short) = (bytes(-1000), bytes(9));
    assert!(short < quick - quick / 20, "{quick} and {short} bytes");
}

fn deltas(settings: &[(&str, Value)]) -> Report {
    let mut all = json!({"max-bandwidth": LINK, "downtime-limit": 1, "multifd-channels": 1});
    settings.iter().for_each(|(name, value)| all[*name] = value.clone());
    seen(SPARSE, all, |report| report.rounds_ended() > 2)
}

fn xbzrle() {
    let pages = |on: bool| deltas(&[("xbzrle", json!(on))]).ram.pages;
    let (off, on) = (pages(false), pages(true));
    assert!(off.delta == 0 && on.delta > 100, "{off} and {on}");
}

fn xbzrle_cache_size() {
    let counts = |bytes: u64| deltas(&[("xbzrle", json!(true)), ("xbzrle-cache-size", json!(bytes))]).delta;
    let (small, large) = (counts(65_536), counts(64 << 20));
    assert!(small.misses > large.misses && small.hits < large.hits / 4, "{small:?} and {large:?}");
}

/// A way to the destination that looks on.
#[derive(Clone)]
struct Wire {
    port: u16,
    /// What the control connection began with.
    said: Arc<Mutex<Vec<u8>>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    closed: Arc<AtomicBool>,
}

impl Wire {
    /// One that ends everything when `cut` comes by from the source.
    fn to(address: &str, cut: Option<&'static [u8]>) -> Self {
        let target = address.strip_prefix("tcp:").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Self {
            port: listener.local_addr().unwrap().port(),
            said: Arc::default(),
            open: Arc::default(),
            closed: Arc::default(),
        };
        let accepting = wire.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), false) = (client, accepting.closed.load(Ordering::SeqCst)) else { return };
                let server = TcpStream::connect(&target).unwrap();
                accepting.open.lock().unwrap().extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                let (mut back, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = std::io::copy(&mut back, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
                let wire = accepting.clone();
                thread::spawn(move || wire.pump(client, server, cut));
            }
        });
        wire
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, cut: Option<&[u8]>) {
        let mut bytes = [0; 65_536];
        while let Ok(read @ 1..) = from.read(&mut bytes) {
            let read = &bytes[..read];
            {
                let mut said = self.said.lock().unwrap();
                if said.len() < 4096 {
                    said.extend(read);
                }
            }
            if cut.is_some_and(|cut| read.windows(cut.len()).any(|bytes| bytes == cut)) {
                self.closed.store(true, Ordering::SeqCst);
                self.open.lock().unwrap().iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
                let _ = TcpStream::connect(("127.0.0.1", self.port));
                return;
            }
            if to.write_all(read).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    fn uri(&self) -> String {
        format!("tcp:127.0.0.1:{}", self.port)
    }
}

/// What is agreed on at the start, by the feature's name in docs/wire-format.md.
fn integrity() {
    let unchecked = |how: &str| {
        let mut wire = None;
        let run = run_by(IDLE, json!({ "integrity": how }), |address| wire.insert(Wire::to(address, None)).uri());
        run.source.completed();
        let said = wire.unwrap().said.lock().unwrap().clone();
        said.windows(15).any(|bytes| bytes == b"unchecked-pages")
    };
    assert_eq!([unchecked("checksum"), unchecked("none")], [false, true]);
}

/// What goes from file to file is counted by the kernel as read and written; what a socket is sent from memory is not.
fn zero_copy_send() {
    let copied = |on: bool| {
        let settings = json!({"integrity": "none", "zero-copy-send": on, "pause-before-switchover": true});
        let run = run(IDLE, settings);
        until("all has gone", PATIENCE, || run.source.report().filter(|report| report.status == Status::PreSwitchover));
        let io = fs::read_to_string(format!("/proc/{}/io", run.source.pid())).unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap();
        line.parse::<u64>().unwrap()
    };
    let (off, on) = (copied(false), copied(true));
    assert!(on > off + (12 << 20), "{off} and {on} bytes");
}

/// The most that was taken of a vCPU's time in the first rounds in which any was.
fn throttled(settings: &[(&str, Value)]) -> u8 {
    let mut all = json!({"max-bandwidth": LINK, "downtime-limit": 20, "auto-converge": true});
    settings.iter().for_each(|(name, value)| all[*name] = value.clone());
    let report = seen(HOT, all, |report| !report.max_vcpu_throttle_percent.is_empty() || report.rounds_ended() > 3);
    report.max_vcpu_throttle_percent.iter().copied().max().unwrap_or(0)
}

fn auto_converge() {
    let percent = |on: bool| throttled(&[("auto-converge", json!(on))]);
    let (off, on) = (percent(false), percent(true));
    assert!(off == 0 && on > 20, "{off} and {on} %");
}

fn throttle_trigger_threshold() {
    let percent = |threshold: u64| throttled(&[("throttle-trigger-threshold", json!(threshold))]);
    let (much, little) = (percent(5), percent(100));
    assert!(much > little, "{much} and {little} %");
}

fn cpu_throttle_initial() {
    // Once more than it asks for by itself.
    let percent = throttled(&[("cpu-throttle-initial", json!(99)), ("max-cpu-throttle", json!(99))]);
    let by_itself = throttled(&[("throttle-trigger-threshold", json!(100))]);
    assert!(percent == 99 && by_itself < 99, "{percent} and {by_itself} %");
}

fn cpu_throttle_increment() {
    let percent = throttled(&[("cpu-throttle-increment", json!(3)), ("throttle-trigger-threshold", json!(1))]);
    let by_itself = throttled(&[("throttle-trigger-threshold", json!(1))]);
    assert!((1..=12).contains(&percent) && by_itself > 20, "{percent} and {by_itself} %");
}

fn max_cpu_throttle() {
    let percent = throttled(&[("max-cpu-throttle", json!(7))]);
    assert!((1..=7).contains(&percent), "{percent} %");
}

fn pause_before_switchover() {
    moved(IDLE, json!({"pause-before-switchover": false}));
    seen(IDLE, json!({"pause-before-switchover": true}), |report| report.status == Status::PreSwitchover);
}

/// From the cut that lets no Release through to the end of all attempts to ask again.
fn handover_timeout() {
    let waited = |timeout: u64| {
        let mut wire = None;
        let run = run_by(IDLE, json!({ "handover-timeout": timeout }), |address| {
            wire.insert(Wire::to(address, Some(b"DLF1\x09\x00"))).uri()
        });
        let wire = wire.unwrap();
        let cut = until("Release comes by", PATIENCE, || wire.closed.load(Ordering::SeqCst).then(Instant::now));
        let report = run.source.ended();
        assert_eq!(report.status, Status::Failed);
        assert_eq!(report.guest, dunlin::GuestPlace::Undecided);
        cut.elapsed()
    };
    let (short, long) = (waited(0), waited(3000));
    assert!(short < Duration::from_millis(2000) && long > Duration::from_millis(2000), "{short:?} and {long:?}");
}

/// Stopping a guest that writes, and sending the rest, takes longer than a millisecond.
fn switchover_timeout() {
    let (mut tries, slow) =
        (0, json!({ "switchover-timeout": 1, "max-bandwidth": 32_000_000, "downtime-limit": 2000 }));
    loop {
        let run = run(SPARSE, slow.clone());
        let report = run.source.ended();
        if let Some(error) = &report.error {
            assert_eq!(report.guest, dunlin::GuestPlace::RunningAtSource);
            let named = ["switchover-timeout", "has not answered within", "has been asked to"];
            assert!(named.iter().any(|name| error.message.contains(name)), "{}", error.message);
            break;
        }
        tries += 1;
        assert!(tries < 20, "it is never too slow");
    }
    moved(SPARSE, json!({ "max-bandwidth": 32_000_000, "downtime-limit": 2000 }));
}

/// A destination that says nothing.
fn link_timeout() {
    let waited = |timeout: u64| {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:127.0.0.1:{}", silent.local_addr().unwrap().port());
        let began = Instant::now();
        let run = run_by(IDLE, json!({ "link-timeout": timeout }), |_| address);
        assert_eq!(run.source.ended().status, Status::Failed);
        began.elapsed()
    };
    // Not as long as any silence may last at the beginning.
    let (short, long) = (waited(500), waited(2500));
    assert!(long > Duration::from_millis(2500) && short < long - Duration::from_secs(1), "{short:?} and {long:?}");
}

fn events() {
    let told = |on: bool| {
        let directory = tempfile::tempdir().unwrap();
        let source = Machine::source(directory.path(), "16M", IDLE, &[]);
        let destination = Machine::destination(directory.path(), "16M");
        let mut client = source.connect();
        source.set(json!({ "events": on }));
        source.execute("migrate", json!({"uri": destination.address()}));
        source.completed();
        let mut told = 0;
        while let Some(event) = client.next_event(Duration::from_millis(100)).unwrap() {
            told += u64::from(event["event"] == "MIGRATION");
        }
        told
    };
    let (off, on) = (told(false), told(true));
    assert!(off == 0 && on > 2, "{off} and {on} events");
}
