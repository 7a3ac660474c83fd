//! A disk's storage hangs under a real `dunlin run` on KVM: a stop and a switchover fail in time and name the disk, the guest
//! runs on, the machine answers meanwhile, and it can be ended.
//!
//! Skipped where there is no KVM, and for users who may not mount.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;
#[path = "common/fuse.rs"]
mod fuse;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, PATIENCE, turn, until};
use dunlin::{GuestPlace, Status};
use dunlin_monitor::Client;
use fuse::{Hang, HangingStorage, Patience, Request};
use serde_json::{Value, json};

const DISK_BYTES: usize = 1 << 17;
const EVERYTHING: [Request; 3] = [Request::Write, Request::Flush, Request::Fsync];
/// A stop may take so long to fail: the devices' limit and the vCPUs', and some for a loaded machine.
const STOP_LIMIT: Duration = Duration::from_secs(6);
/// An answer that takes longer than this waits for storage.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// A machine with a disk that can hang.
struct Trial {
    // Dropped in this order: the process, which may wait for its storage, before that.
    machine: Machine,
    storage: HangingStorage,
    directory: tempfile::TempDir,
}

impl Trial {
    /// `None` if there can be none here; says why.
    fn start() -> Option<Self> {
        if let Err(error) = dunlin_machines::KvmMachine::available() {
            println!("skipped: {error}");
            return None;
        }
        let storage = match HangingStorage::mount(DISK_BYTES) {
            Ok(storage) => storage,
            Err(why) => {
                println!("skipped: {why}");
                return None;
            }
        };
        let directory = tempfile::tempdir().unwrap();
        let disk = storage.file().display().to_string();
        let arguments = [&machine(&disk)[..], &["--payload", "io"]].concat();
        let machine = Machine::start("source", directory.path(), &arguments);
        machine.execute("query-status", json!({}));
        Some(Self { machine, storage, directory })
    }

    fn disk(&self) -> String {
        self.storage.file().display().to_string()
    }

    /// Has storage hang; comes back when the guest waits for it.
    fn hang(&self, patience: Patience) -> Hang<'_> {
        let hang = self.storage.hang(&EVERYTHING, patience);
        until("a request hangs", PATIENCE, || (hang.held() > 0).then_some(()));
        hang
    }
}

fn machine(disk: &str) -> [&str; 6] {
    ["--machine", "kvm", "--memory", "64M", "--disk", disk]
}

/// How long answers took while something else went on.
#[derive(Debug)]
struct Answers {
    count: usize,
    /// How many said that the guest runs.
    running: usize,
    p99: Duration,
    longest: Duration,
}

/// Asks for the machine's status all the time that `meanwhile` takes, over a connection that is there already and over new
/// ones; gives what both found.
fn answers_during<T>(machine: &Machine, meanwhile: impl FnOnce() -> T) -> (T, [Answers; 2]) {
    let over = AtomicBool::new(false);
    let mut old = machine.connect();
    let ask = |client: &mut Client| client.execute("query-status", json!({})).unwrap();
    let watch = |look: &mut dyn FnMut() -> Value| {
        let (mut took, mut running) = (Vec::new(), 0);
        while !over.load(Ordering::Acquire) {
            let began = Instant::now();
            running += usize::from(look()["running"] == true);
            took.push(began.elapsed());
            thread::sleep(Duration::from_millis(2));
        }
        took.sort();
        let (count, longest) = (took.len(), *took.last().unwrap());
        Answers { count, running, p99: took[(count * 99 / 100).min(count - 1)], longest }
    };
    thread::scope(|threads| {
        let on_old = threads.spawn(|| watch(&mut || ask(&mut old)));
        let on_new = threads.spawn(|| watch(&mut || ask(&mut Client::connect(&machine.qmp).unwrap())));
        let done = meanwhile();
        over.store(true, Ordering::Release);
        (done, [on_old.join().unwrap(), on_new.join().unwrap()])
    })
}

fn check_answers(answers: &[Answers; 2]) {
    println!("query-status meanwhile: old connection {:?}, new ones {:?}", answers[0], answers[1]);
    for answers in answers {
        assert!(answers.longest < ANSWER_LIMIT, "the machine waits for storage: {answers:?}");
    }
}

#[test]
fn a_stop_fails_in_time_and_names_the_disk() {
    let _turn = turn();
    let Some(trial) = Trial::start() else { return };
    for round in 0..2 {
        let hang = trial.hang(Patience::ForEver);
        let began = Instant::now();
        let (outcome, answers) = answers_during(&trial.machine, || trial.machine.try_execute("stop", json!({})));
        let took = began.elapsed();
        let error = outcome.unwrap_err().to_string();
        println!("round {round}: the stop failed after {took:?}: {error}");
        assert!(error.contains(&trial.disk()), "{error}");
        assert!(took < STOP_LIMIT, "{took:?}");
        check_answers(&answers);
        assert!(answers.iter().all(|answers| answers.running == answers.count), "{answers:?}");
        assert!(trial.machine.is_running());
        hang.release();
        trial.machine.execute("stop", json!({}));
        assert_eq!(trial.machine.state(), "paused");
        trial.machine.verified();
        trial.machine.execute("cont", json!({}));
    }
}

#[test]
fn a_switchover_fails_and_names_the_disk() {
    let _turn = turn();
    let Some(trial) = Trial::start() else { return };
    let disk = trial.disk();
    let incoming = [&machine(&disk)[..], &["--incoming", "tcp:127.0.0.1:0"]].concat();
    let destination = Machine::start("destination", trial.directory.path(), &incoming);
    let address = destination.address();
    let hang = trial.hang(Patience::ForEver);
    trial.machine.migrate(&address);
    let (report, answers) = answers_during(&trial.machine, || trial.machine.ended());
    check_answers(&answers);
    assert_eq!(report.status, Status::Failed, "{report:?}");
    assert_eq!(report.guest, GuestPlace::RunningAtSource);
    let error = report.error.unwrap().message;
    println!("the migration failed: {error}");
    assert!(error.contains(&disk), "{error}");
    assert!(trial.machine.is_running() && !destination.is_running());
    hang.release();
    trial.machine.verified();
    trial.machine.migrate(&address);
    trial.machine.completed();
    destination.completed();
    assert!(destination.is_running());
    destination.verified();
}

/// The letter of a process's state; `None` when it is gone.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// Asks it to end; gives how long the answer took and then its main thread.
fn quit(machine: &Machine) -> (Duration, Duration) {
    let began = Instant::now();
    machine.execute("quit", json!({}));
    let answered = began.elapsed();
    // A process whose last thread the kernel cannot end stays a zombie until storage answers.
    let ended = || matches!(state(machine.pid()), None | Some('Z')).then_some(());
    until("the process ends", PATIENCE, ended);
    let took = (answered, began.elapsed());
    println!("quit: answered after {:?}, ended after {:?}", took.0, took.1);
    println!("{}", machine.said());
    took
}

#[test]
fn a_quit_waits_for_no_storage() {
    let _turn = turn();
    for (patience, beside) in [
        (Patience::UntilKilled, None),
        (Patience::ForEver, None),
        (Patience::ForEver, Some("stop")),
        (Patience::ForEver, Some("x-verify")),
    ] {
        let Some(trial) = Trial::start() else { return };
        let requests = match patience {
            // The kernel closes a process's files when nothing can end that any more.
            Patience::UntilKilled => &[Request::Write, Request::Fsync][..],
            Patience::ForEver => &EVERYTHING[..],
        };
        let hang = trial.storage.hang(requests, patience);
        until("a request hangs", PATIENCE, || (hang.held() > 0).then_some(()));
        println!("{patience:?}, with {beside:?} on another connection");
        let (answered, ended) = thread::scope(|threads| {
            if let Some(command) = beside {
                let mut other = trial.machine.connect();
                threads.spawn(move || drop(other.execute(command, json!({}))));
                // That it has begun shows nowhere; the order of the two does not change what must come of them.
                thread::sleep(Duration::from_millis(100));
            }
            quit(&trial.machine)
        });
        assert!(answered < Duration::from_millis(1500), "{answered:?}");
        assert!(ended < Duration::from_secs(3), "{ended:?}");
        assert!(trial.machine.said().contains(&trial.disk()), "the disk is not named: {}", trial.machine.said());
        assert!(!trial.machine.qmp.exists(), "its socket is left behind");
        if patience == Patience::ForEver {
            hang.release();
        }
        until("it is gone", PATIENCE, || trial.machine.exit_code().map(|code| assert_eq!(code, 0)));
    }
}
