//! What goes wrong between two processes: a cancel, a killed source, a killed destination, a cut connection, at random
//! moments and at every step of the handover, with either kind of machine. Never do two guests run, and where a guest lives
//! it is right; with one on KVM, so are its disk and what it has printed.
//!
//! * `DUNLIN_TEST_RUNS`: random moments for each fault, 8 by default and 3 on KVM; 50 make a thorough run. Every step of
//!   the handover comes once besides.
//! * `DUNLIN_TEST_SEED`: of the random moments; printed.
//!
//! The tables are printed: `cargo test -p dunlin-cli --test faults -- --nocapture`.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::proxy::{Action, Fate, Frame, Proxy, When};
use common::{Machine, PATIENCE, Random, Watch, check_error, number, turn, until};
use dunlin::{GuestPlace, Report, Status};
use dunlin_monitor::Client;
use serde_json::json;

const MEMORY: &str = "64M";
const WORKLOAD: &str = "pattern=uniform,rate=100M/s,working-set=16M,content=random";
/// A disk, the serial port and timer interrupts besides.
const PAYLOAD: &str = "dirty:working-set=4M+io+timer";
const DISK_BYTES: u64 = 1 << 17;
/// How long both sides are watched after everything has settled.
const WATCHED: Duration = Duration::from_millis(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    CancelAtSource,
    CancelAtDestination,
    KillSource,
    KillDestination,
    /// The link comes back.
    Cut,
    /// It does not.
    CutForGood,
    /// The process stands still for a while (SIGSTOP), which may be longer than `link-timeout`.
    FreezeSource,
    FreezeDestination,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::CancelAtSource => "cancel at the source",
            Self::CancelAtDestination => "cancel at the destination",
            Self::KillSource => "kill the source",
            Self::KillDestination => "kill the destination",
            Self::Cut => "cut",
            Self::CutForGood => "cut for good",
            Self::FreezeSource => "freeze the source",
            Self::FreezeDestination => "freeze the destination",
        }
    }
}

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Synthetic,
    Kvm,
}

impl Kind {
    /// Whether it can be had; says so if not.
    fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if let (Self::Kvm, Err(error)) = (self, dunlin_machines::KvmMachine::available()) {
            println!("skipped: {error}");
            return false;
        }
        true
    }
}

#[derive(Debug, Clone, Copy)]
enum Moment {
    Random(Duration),
    Step(Frame, When),
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random(time) => write!(f, "after {:.1} ms", time.as_secs_f64() * 1e3),
            Self::Step(frame, When::Before) => write!(f, "before {frame:?}"),
            Self::Step(frame, When::After) => write!(f, "after {frame:?}"),
        }
    }
}

/// Where the guest is when nothing happens any more by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    SourceRuns,
    DestinationRuns,
    /// The source was killed before everything had arrived.
    DiedWithSource,
    /// The destination was killed when it had the guest, and the source knew it.
    DiedWithDestination,
    /// The other side is dead or out of reach, and only the source cannot tell.
    SourceUndecided,
    /// The source is dead, and the destination has everything but the source's word.
    DestinationUndecided,
    /// Both are alive, the link is not, and neither runs.
    BothUndecided,
    /// The destination runs, which the source cannot know.
    DestinationRunsSourceUndecided,
}

/// What may be found. Where the fault races with the next message more than one thing may be.
fn allowed(fault: Fault, moment: Moment) -> &'static [Found] {
    use Fault::*;
    use Found::*;
    use Frame::*;
    use When::*;
    let Moment::Step(frame, when) = moment else {
        return match fault {
            // Whoever stood still for longer than link-timeout is asked again by the other, and answers.
            CancelAtSource | CancelAtDestination | Cut | FreezeSource | FreezeDestination => {
                &[SourceRuns, DestinationRuns]
            }
            KillSource => &[DiedWithSource, DestinationUndecided, DestinationRuns],
            KillDestination => &[SourceRuns, SourceUndecided, DiedWithDestination],
            CutForGood => &[SourceRuns, BothUndecided, DestinationRunsSourceUndecided, DestinationRuns],
        };
    };
    match (fault, frame, when) {
        (CancelAtSource, Offer | Ready, Before) => &[SourceRuns],
        (CancelAtSource, Offer | Ready, After) => &[SourceRuns, DestinationRuns],
        (CancelAtSource, ..) => &[DestinationRuns],

        (CancelAtDestination, Offer, Before) => &[SourceRuns],
        (CancelAtDestination, Offer, After) => &[SourceRuns, DestinationRuns],
        (CancelAtDestination, Ready, Before) => &[SourceRuns],
        (CancelAtDestination, Ready, After) => &[SourceRuns, DestinationRuns],
        (CancelAtDestination, Release, Before) => &[SourceRuns],
        (CancelAtDestination, Release, After) => &[SourceRuns, DestinationRuns],
        (CancelAtDestination, ..) => &[DestinationRuns],

        (KillSource, Offer, Before) => &[DiedWithSource],
        (KillSource, Offer, After) => &[DiedWithSource, DestinationUndecided, DestinationRuns],
        (KillSource, Ready, Before) | (KillSource, Release, Before) => &[DestinationUndecided],
        (KillSource, Ready, After) => &[DestinationUndecided, DestinationRuns],
        (KillSource, ..) => &[DestinationRuns],

        (KillDestination, Offer, Before) | (KillDestination, Ready, Before) => &[SourceRuns],
        (KillDestination, Offer, After) => &[SourceRuns, SourceUndecided, DiedWithDestination],
        (KillDestination, Ready, After) => &[SourceUndecided, DiedWithDestination],
        (KillDestination, Release, Before) | (KillDestination, Running, Before) => &[SourceUndecided],
        (KillDestination, Release, After) => &[SourceUndecided, DiedWithDestination],
        (KillDestination, Running, After) | (KillDestination, Done, _) => &[DiedWithDestination],

        (Cut, Offer, Before) | (Cut, Ready, Before) => &[SourceRuns],
        (Cut, Offer, After) => &[SourceRuns, DestinationRuns],
        (Cut, ..) => &[DestinationRuns],

        (CutForGood, Offer, Before) | (CutForGood, Ready, Before) => &[SourceRuns],
        (CutForGood, Offer, After) => &[SourceRuns, BothUndecided, DestinationRunsSourceUndecided, DestinationRuns],
        (CutForGood, Ready, After) => &[BothUndecided, DestinationRunsSourceUndecided, DestinationRuns],
        (CutForGood, Release, Before) => &[BothUndecided],
        (CutForGood, Release, After) => &[DestinationRunsSourceUndecided, DestinationRuns],
        (CutForGood, Running, Before) => &[DestinationRunsSourceUndecided],
        (CutForGood, Running, After) | (CutForGood, Done, _) => &[DestinationRuns],
        (FreezeSource | FreezeDestination, ..) => &[SourceRuns, DestinationRuns],
    }
}

/// A side when nothing happens any more.
struct End {
    state: String,
    running: bool,
    report: Report,
}

impl End {
    fn of(machine: &Machine) -> Option<Self> {
        machine.is_alive().then(|| {
            let report = machine.report().unwrap();
            Self { state: machine.state(), running: machine.is_running(), report }
        })
    }
}

fn shown(end: Option<&End>) -> String {
    match end {
        None => "dead".to_owned(),
        Some(end) => format!("{} ({}, {})", end.report.status, end.state, end.report.guest),
    }
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

/// By turns guests on KVM have either tracker.
static TRIALS: AtomicUsize = AtomicUsize::new(0);

/// Whether KVM has dirty rings.
fn has_rings() -> bool {
    #[cfg(target_arch = "x86_64")]
    return {
        let (backing, dirty_tracking) = (dunlin_machines::Backing::Base, "ring".parse().unwrap());
        let devices = dunlin_machines::DeviceConfig::default();
        let config = dunlin_machines::KvmConfig { memory_bytes: 2 << 20, vcpus: 1, backing, dirty_tracking, devices };
        dunlin_machines::KvmMachine::empty(&config).is_ok()
    };
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Two processes, the link between them, and a fault to come.
struct Trial {
    // Dropped in this order: the directory last.
    proxy: Proxy,
    source: Machine,
    destination: Machine,
    kind: Kind,
    directory: tempfile::TempDir,
}

impl Trial {
    fn start(kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let disk = path("disk");
        let serial = format!("file:{}", path("serial"));
        let common = match kind {
            Kind::Synthetic => vec!["--memory", MEMORY],
            Kind::Kvm => {
                std::fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
                let tracker = ["log", "ring"][TRIALS.fetch_add(1, Ordering::Relaxed) % 2];
                let tracker = if has_rings() { tracker } else { "log" };
                let machine = ["--machine", "kvm", "--memory", MEMORY, "--vcpus", "2", "--dirty-tracker", tracker];
                [&machine[..], &["--disk", &disk, "--serial", &serial]].concat()
            }
        };
        let does = match kind {
            Kind::Synthetic => ["--workload", WORKLOAD],
            Kind::Kvm => ["--payload", PAYLOAD],
        };
        let incoming = ["--incoming", "tcp:127.0.0.1:0"];
        let destination = Machine::start("destination", directory.path(), &[&common[..], &incoming].concat());
        let source = Machine::start("source", directory.path(), &[&common[..], &does].concat());
        let proxy = Proxy::start(&destination.address());
        source.execute("query-status", json!({}));
        Self { proxy, source, destination, kind, directory }
    }

    /// Has the machine that runs the guest check it, and what the guest has printed; it goes on if it is right.
    fn verify(&self, machine: &Machine) -> Result<(), String> {
        if self.kind == Kind::Synthetic {
            return machine.verify().map(drop);
        }
        machine.execute("stop", json!({}));
        let found = machine.execute("x-verify", json!({}));
        ensure(found["verified"] == true, || found["summary"].to_string())?;
        let units = found["units"].as_u64().unwrap();
        let printed = self.printed()?;
        ensure((units..=units + 1).contains(&printed), || format!("{printed} lines were printed in {units} units"))?;
        machine.execute("cont", json!({}));
        Ok(())
    }

    /// The whole lines that the guest has printed, wherever it was: the numbers of its units, each once and in order.
    fn printed(&self) -> Result<u64, String> {
        let text = std::fs::read_to_string(self.directory.path().join("serial")).unwrap_or_default();
        let lines = text.matches('\n').count() as u64;
        let expected: String = (1..=lines + 1).map(|unit| format!("{unit:016x}\n")).collect();
        ensure(expected.starts_with(&text), || format!("after {lines} lines: {:?}", text.lines().next_back()))?;
        Ok(lines)
    }

    /// What brings the fault about. What a frame was waiting for is lost with whom or what it hits.
    fn action(&self, fault: Fault, down: Duration) -> Action {
        let cancel = |machine: &Machine| -> Action {
            let path = machine.qmp.clone();
            Box::new(move |_| {
                // That it is refused, being too late, is right too: what is found decides.
                let _ = Client::connect(&path).unwrap().execute("migrate_cancel", json!({}));
                Fate::Forward
            })
        };
        let kill = |machine: &Machine| -> Action {
            let killer = machine.killer();
            Box::new(move |_| {
                killer.kill();
                Fate::Lose
            })
        };
        let cut = |time: Option<Duration>| -> Action {
            Box::new(move |link| {
                link.cut(time);
                Fate::Lose
            })
        };
        match fault {
            Fault::CancelAtSource => cancel(&self.source),
            Fault::CancelAtDestination => cancel(&self.destination),
            Fault::KillSource => kill(&self.source),
            Fault::KillDestination => kill(&self.destination),
            Fault::Cut => cut(Some(down)),
            Fault::CutForGood => cut(None),
            Fault::FreezeSource => freeze(&self.source, down),
            Fault::FreezeDestination => freeze(&self.destination, down),
        }
    }

    /// Waits until nothing happens any more by itself.
    fn settle(&self) {
        if self.source.is_alive() {
            self.source.ended();
        }
        until("the destination settles", PATIENCE, || {
            let Some(end) = End::of(&self.destination) else { return Some(()) };
            let orphaned = end.report.guest == GuestPlace::Undecided && end.report.error.is_some();
            (end.report.status.is_final() || end.report.session.is_none() || orphaned).then_some(())
        });
    }

    /// What both sides say fits together, is said in full, and is true: a running guest is verified, and no side
    /// runs a guest that is not its own.
    fn find(&self, fault: Fault, source: Option<&End>, destination: Option<&End>) -> Result<Found, String> {
        let told = |end: &End| match end.report.status {
            Status::Completed => {
                ensure(end.report.error.is_none(), || format!("completed, and an error: {:?}", end.report.error))
            }
            // It has heard of no migration.
            Status::Setup if end.report.session.is_none() => Ok(()),
            _ => check_error(&end.report),
        };
        source.map_or(Ok(()), told)?;
        destination.map_or(Ok(()), told)?;
        for (machine, end) in [(&self.source, source), (&self.destination, destination)] {
            match end {
                Some(end) if end.running => self.verify(machine)?,
                Some(_) => {
                    let refused = machine.try_execute("cont", json!({}));
                    ensure(refused.is_err(), || format!("the {} runs a guest that is not its own", machine.name))?;
                }
                None => {}
            }
        }
        let undecided = |end: &End| end.report.guest == GuestPlace::Undecided;
        let completed = |end: &End| end.state == "postmigrate" && end.report.status == Status::Completed;
        let took_back = |end: &End| {
            end.running
                && end.report.guest == GuestPlace::RunningAtSource
                && matches!(end.report.status, Status::Failed | Status::Cancelled)
        };
        let arrived = |end: &End| {
            end.running
                && end.report.guest == GuestPlace::RunningAtDestination
                && end.report.status == Status::Completed
        };
        match (source, destination) {
            // A link that came back has told the destination.
            (Some(s), Some(d)) if took_back(s) && fault == Fault::Cut && undecided(d) => {
                Err("the destination was not told that the source has taken the guest back".to_owned())
            }
            (Some(s), Some(d)) if took_back(s) && !d.running => Ok(Found::SourceRuns),
            (Some(s), Some(d)) if completed(s) && arrived(d) => Ok(Found::DestinationRuns),
            (Some(s), Some(d)) if undecided(s) && arrived(d) => Ok(Found::DestinationRunsSourceUndecided),
            (Some(s), Some(d)) if undecided(s) && undecided(d) => Ok(Found::BothUndecided),
            (Some(s), None) if took_back(s) => Ok(Found::SourceRuns),
            (Some(s), None) if completed(s) => Ok(Found::DiedWithDestination),
            (Some(s), None) if undecided(s) => Ok(Found::SourceUndecided),
            (None, Some(d)) if arrived(d) => Ok(Found::DestinationRuns),
            (None, Some(d)) if undecided(d) => Ok(Found::DestinationUndecided),
            (None, Some(d)) if d.state == "inmigrate" => Ok(Found::DiedWithSource),
            _ => Err("the two sides do not fit together".to_owned()),
        }
    }

    /// What a person can do about what was found: decide, or mend the link and ask or migrate again.
    fn resolve(&self, found: Found, choice: u64) -> Result<&'static str, String> {
        let take_back = |machine: &Machine| -> Result<(), String> {
            machine.execute("cont", json!({"x-take-back": true, "x-force": true}));
            ensure(machine.is_running(), || format!("taken back, the guest does not run at the {}", machine.name))?;
            self.verify(machine)
        };
        let at_destination = || -> Result<(), String> {
            self.source.completed();
            self.destination.completed();
            ensure(self.source.state() == "postmigrate", || format!("the source is {}", self.source.state()))?;
            ensure(self.destination.is_running(), || "it does not run at the destination".to_owned())?;
            self.verify(&self.destination)
        };
        let both_alive = self.source.is_alive() && self.destination.is_alive();
        self.proxy.link().mend();
        match found {
            Found::BothUndecided if choice.is_multiple_of(3) => {
                take_back(&self.source)?;
                Ok("taken back")
            }
            Found::BothUndecided if choice % 3 == 1 => {
                take_back(&self.destination)?;
                Ok("taken over")
            }
            Found::BothUndecided | Found::DestinationRunsSourceUndecided => {
                self.source.execute("migrate", json!({"resume": true}));
                at_destination()?;
                Ok("asked again: it runs at the destination")
            }
            // The destination may have run the guest before it died, which has left traces on the disk that a person who
            // takes the guest back has to live with.
            Found::SourceUndecided if self.kind == Kind::Kvm => {
                self.source.execute("cont", json!({"x-take-back": true, "x-force": true}));
                ensure(self.source.is_running(), || "taken back, the guest does not run at the source".to_owned())?;
                Ok("taken back")
            }
            Found::SourceUndecided => {
                take_back(&self.source)?;
                Ok("taken back")
            }
            Found::DestinationUndecided => {
                take_back(&self.destination)?;
                Ok("taken over")
            }
            Found::SourceRuns if both_alive => {
                // The destination may still wait for the source of the first.
                until("the destination takes another migration", PATIENCE, || {
                    self.source.migrate(&self.proxy.uri());
                    (self.source.ended().status == Status::Completed).then_some(())
                });
                at_destination()?;
                Ok("migrated again")
            }
            Found::SourceRuns | Found::DestinationRuns | Found::DiedWithSource | Found::DiedWithDestination => Ok(""),
        }
    }

    /// The whole of it; the line of the table.
    fn run(&self, fault: Fault, moment: Moment, random: &mut Random) -> Result<(Found, String), (String, String)> {
        // The source's time to ask again is up where nobody will answer.
        let gone = matches!(fault, Fault::KillDestination | Fault::CutForGood);
        self.source.set(json!({"handover-timeout": if gone { 300 } else { 20_000 }, "link-timeout": 2000}));
        self.destination.set(json!({"handover-timeout": 300, "link-timeout": 2000}));
        let watch = Watch::start(&self.source, &self.destination);
        let down = match fault {
            Fault::FreezeSource | Fault::FreezeDestination => frozen_for(random),
            _ => Duration::from_millis(20 + random.next() % 400),
        };
        let action = self.action(fault, down);
        match moment {
            Moment::Random(time) => {
                self.source.migrate(&self.proxy.uri());
                thread::sleep(time);
                action(self.proxy.link());
            }
            Moment::Step(frame, when) => {
                self.proxy.at(frame, when, action);
                self.source.migrate(&self.proxy.uri());
                until(&format!("{frame:?} passes"), PATIENCE, || self.proxy.has_sprung().then_some(()));
            }
        }
        self.settle();
        thread::sleep(WATCHED);
        let (source, destination) = (End::of(&self.source), End::of(&self.destination));
        let ends = format!("{:<42} | {:<54}", shown(source.as_ref()), shown(destination.as_ref()));
        let outcome = self.find(fault, source.as_ref(), destination.as_ref()).and_then(|found| {
            ensure(allowed(fault, moment).contains(&found), || {
                format!("{found:?}, where {:?} are allowed", allowed(fault, moment))
            })?;
            Ok((found, self.resolve(found, random.next())?))
        });
        let (looks, doubles) = watch.finish();
        let outcome = outcome.and_then(|(found, resolved)| {
            ensure(doubles == 0, || format!("two guests ran in {doubles} of {looks} looks"))?;
            ensure(self.proxy.problems().is_empty(), || format!("on the wire: {:?}", self.proxy.problems()))?;
            Ok((found, format!("{ends} | {found:?}{}{resolved}", if resolved.is_empty() { "" } else { ", " })))
        });
        outcome.map_err(|why| {
            let errors: Vec<_> =
                [source, destination].into_iter().flatten().filter_map(|end| end.report.error).collect();
            (ends, format!("{why}; errors: {errors:?}"))
        })
    }
}

/// Has a process stand still for `time`; a thread of its own lets it go on.
fn freeze(machine: &Machine, time: Duration) -> Action {
    let freezer = machine.killer();
    Box::new(move |_| {
        freezer.freeze();
        let freezer = freezer.clone();
        thread::spawn(move || {
            thread::sleep(time);
            freezer.thaw();
        });
        Fate::Forward
    })
}

/// Mostly shorter than `link-timeout`, which is 2 s here; up to half a minute where a thorough run is asked for.
fn frozen_for(random: &mut Random) -> Duration {
    let longest = if number("DUNLIN_TEST_RUNS").is_some_and(|runs| runs >= 25) { 30.0 } else { 3.0 };
    Duration::from_secs_f64(0.1 + random.fraction().powi(2) * longest)
}

/// How long a migration takes that nothing disturbs.
fn usual_time(kind: Kind) -> Duration {
    static TIMES: [OnceLock<Duration>; 2] = [const { OnceLock::new() }; 2];
    *TIMES[kind as usize].get_or_init(|| {
        let trial = Trial::start(kind);
        let began = Instant::now();
        trial.source.migrate(&trial.proxy.uri());
        let report = trial.source.completed();
        let took = began.elapsed();
        trial.destination.verified();
        assert_eq!(trial.proxy.problems(), Vec::<String>::new());
        println!(
            "undisturbed, {kind:?}: {:.1} ms, {} rounds, {:.1} ms downtime",
            took.as_secs_f64() * 1e3,
            report.rounds.len(),
            report.downtime_seconds * 1e3
        );
        took
    })
}

/// A fault at random moments and at every step, with a guest on KVM.
fn kvm_table(fault: Fault) {
    if Kind::Kvm.is_available() {
        table_of(Kind::Kvm, fault, 3);
    }
}

/// The same with one that is synthetic.
fn table(fault: Fault) {
    table_of(Kind::Synthetic, fault, 8);
}

fn table_of(kind: Kind, fault: Fault, usual_runs: u64) {
    let _turn = turn();
    let mut random = Random::new(fault.name());
    let usual = usual_time(kind);
    let runs = number("DUNLIN_TEST_RUNS").unwrap_or(usual_runs);
    let mut moments: Vec<Moment> = (0..runs).map(|_| Moment::Random(usual.mul_f64(random.fraction() * 1.05))).collect();
    for frame in Frame::ALL {
        moments.extend([When::Before, When::After].map(|when| Moment::Step(frame, when)));
    }
    let began = Instant::now();
    let mut counts: BTreeMap<Found, u64> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (number, moment) in moments.iter().enumerate() {
        let place = format!("{:<25} | {:<15}", fault.name(), moment.to_string());
        let outcome = catch_unwind(AssertUnwindSafe(|| Trial::start(kind).run(fault, *moment, &mut random)));
        let line = match outcome {
            Ok(Ok((found, line))) => {
                *counts.entry(found).or_default() += 1;
                format!("{place} | {line}")
            }
            Ok(Err((ends, why))) => {
                wrong.push(format!("{place}: {why}"));
                format!("{place} | {ends} | WRONG: {why}")
            }
            Err(panic) => {
                let why = panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned());
                wrong.push(format!("{place}: {why}"));
                format!("{place} | WRONG: {why}")
            }
        };
        println!("{:>3} | {line}", number + 1);
    }
    println!(
        "{kind:?}, {}: {} runs ({runs} random moments, {} steps) in {:.0} s: {counts:?}, {} wrong",
        fault.name(),
        moments.len(),
        Frame::ALL.len() * 2,
        began.elapsed().as_secs_f64(),
        wrong.len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn cancel_at_the_source() {
    table(Fault::CancelAtSource);
}

#[test]
fn cancel_at_the_destination() {
    table(Fault::CancelAtDestination);
}

#[test]
fn kill_the_source() {
    table(Fault::KillSource);
}

#[test]
fn kill_the_destination() {
    table(Fault::KillDestination);
}

#[test]
fn cut_with_the_link_back() {
    table(Fault::Cut);
}

#[test]
fn cut_for_good() {
    table(Fault::CutForGood);
}

#[test]
fn freeze_the_source() {
    table(Fault::FreezeSource);
}

#[test]
fn freeze_the_destination() {
    table(Fault::FreezeDestination);
}

#[test]
fn kvm_freeze_the_destination() {
    kvm_table(Fault::FreezeDestination);
}

/// A destination that may have the only copy of the guest does not end because somebody has not looked: it says why, and ends
/// when it is asked once more, with a status of its own.
#[test]
fn an_undecided_destination_does_not_just_end() {
    let _turn = turn();
    let trial = Trial::start(Kind::Synthetic);
    trial.proxy.at(Frame::Release, When::Before, trial.action(Fault::KillSource, Duration::ZERO));
    trial.source.migrate(&trial.proxy.uri());
    let destination = &trial.destination;
    until("it is said to be undecided", PATIENCE, || {
        destination.said().contains("the guest is undecided: destination, handover").then_some(())
    });
    destination.killer().terminate();
    until("it says why it does not end", PATIENCE, || destination.said().contains("not ended").then_some(()));
    assert_eq!(destination.report().unwrap().guest, GuestPlace::Undecided, "{}", destination.said());
    destination.killer().terminate();
    let code = until("it ends", PATIENCE, || destination.exit_code());
    assert_eq!(code, 4, "{}", destination.said());
    assert!(destination.said().contains("what was here of it is lost"), "{}", destination.said());
}

/// The destination stands still anywhere between Ready and its first instruction, somebody takes the guest back at the source
/// meanwhile, and it goes on: what it has heard is too old by then. Where it had begun to run the guest before, it hears of
/// the decision, stops, and keeps it.
#[test]
fn frozen_while_the_guest_is_taken_back() {
    let _turn = turn();
    let mut random = Random::new("frozen");
    let (mut kept, mut never) = (0, 0);
    let runs = number("DUNLIN_TEST_RUNS").unwrap_or(10);
    for run in 0..runs {
        let trial = Trial::start(Kind::Synthetic);
        // The destination is asked once more after the decision, for the first of these times.
        trial.source.set(json!({"handover-timeout": 1500, "link-timeout": 600}));
        trial.destination.set(json!({"handover-timeout": 300, "link-timeout": 600}));
        let watch = Watch::start(&trial.source, &trial.destination);
        let freezer = trial.destination.killer();
        let after = Duration::from_micros(random.next() % 300);
        let wait = run % 2 == 1;
        trial.proxy.at(
            Frame::Release,
            if wait { When::After } else { When::Before },
            Box::new(move |_| {
                if wait {
                    thread::sleep(after);
                }
                freezer.freeze();
                Fate::Forward
            }),
        );
        trial.source.migrate(&trial.proxy.uri());
        // Either it ran before it froze, and the source knows, or nobody does.
        if trial.source.ended().status == Status::Completed {
            trial.destination.killer().thaw();
            trial.destination.completed();
            continue;
        }
        let taken = until("it may be taken back", PATIENCE, || {
            trial.source.try_execute("cont", json!({"x-take-back": true})).ok()
        });
        drop(taken);
        assert!(trial.source.is_running());
        trial.destination.killer().thaw();
        thread::sleep(Duration::from_millis(1500));
        let end = End::of(&trial.destination).unwrap();
        assert!(!end.running && trial.source.is_running(), "run {run}: {}", shown(Some(&end)));
        let conflict = end.report.error.as_ref().is_some_and(|error| error.message.contains("conflict"));
        let (looks, doubles) = watch.finish();
        assert!(conflict || doubles == 0, "run {run}: two guests ran in {doubles} of {looks} looks");
        // Only where Release had arrived before it froze can it have begun.
        assert!(wait || !conflict, "run {run}: it began on a Release that was too old");
        *(if conflict { &mut kept } else { &mut never }) += 1;
        trial.verify(&trial.source).unwrap();
    }
    println!("{runs} times: {never} times it never ran, {kept} times it had run, stopped, and kept its guest");
}

#[test]
fn kvm_cancel_at_the_source() {
    kvm_table(Fault::CancelAtSource);
}

#[test]
fn kvm_cancel_at_the_destination() {
    kvm_table(Fault::CancelAtDestination);
}

#[test]
fn kvm_kill_the_source() {
    kvm_table(Fault::KillSource);
}

#[test]
fn kvm_kill_the_destination() {
    kvm_table(Fault::KillDestination);
}

#[test]
fn kvm_cut_with_the_link_back() {
    kvm_table(Fault::Cut);
}

#[test]
fn kvm_cut_for_good() {
    kvm_table(Fault::CutForGood);
}

/// With all parameters at their defaults, a link that is gone for two seconds between Release and Running.
#[test]
fn reconnect_with_the_defaults() {
    let _turn = turn();
    let trial = Trial::start(Kind::Synthetic);
    let watch = Watch::start(&trial.source, &trial.destination);
    trial.proxy.at(
        Frame::Release,
        When::Before,
        Box::new(|link| {
            link.cut(Some(Duration::from_secs(2)));
            Fate::Lose
        }),
    );
    trial.source.migrate(&trial.proxy.uri());
    let report = trial.source.completed();
    assert!(report.downtime_seconds > 1.9, "{report:?}");
    trial.destination.completed();
    assert_eq!(trial.source.state(), "postmigrate");
    println!("reconnected after {:.2} s; {}", report.downtime_seconds, trial.destination.verified());
    let (looks, doubles) = watch.finish();
    assert_eq!(doubles, 0, "two guests ran in {doubles} of {looks} looks");
}
