//! The locks on a disk's image follow the guest through real processes on KVM: nobody else gets the image while a paused guest
//! moves from one to the next, and a guest does not go on with an image that somebody has changed meanwhile.
//!
//! Skipped where there is no KVM.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{DUNLIN, Machine, PATIENCE, turn, until};
use dunlin::GuestPlace;
use serde_json::json;

const DISK_BYTES: u64 = 1 << 17;

fn is_available() -> bool {
    match dunlin_machines::KvmMachine::available() {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

fn machine(disk: &str) -> [&str; 6] {
    ["--machine", "kvm", "--memory", "16M", "--disk", disk]
}

/// Tries to start a machine of its own with that image; gives what it said when it could not, and nothing when it could.
fn intrude(directory: &Path, disk: &str) -> Option<String> {
    let (log, qmp) = (directory.join("intruder.log"), directory.join("intruder.qmp"));
    let mut child = Command::new(DUNLIN)
        .arg("run")
        .args(machine(disk))
        .args(["--payload", "io", "--qmp", &format!("unix:{}", qmp.display())])
        .args(["--exit-with-parent", &std::process::id().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            // It serves QMP only once its guest has started.
            None if qmp.exists() || Instant::now() > deadline => break None,
            None => thread::sleep(Duration::from_millis(2)),
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    let said = std::fs::read_to_string(&log).unwrap();
    status.filter(|status| !status.success()).map(|_| said)
}

#[test]
fn nobody_gets_the_image_while_a_paused_guest_moves() {
    let _turn = turn();
    if !is_available() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    let disk = path.display().to_string();
    let incoming = [&machine(&disk)[..], &["--incoming", "tcp:127.0.0.1:0"]].concat();
    let start = [&machine(&disk)[..], &["--payload", "io"]].concat();
    let (over, tries) = (AtomicBool::new(false), AtomicUsize::new(0));
    let first = Machine::start("A", directory.path(), &start);
    until("the guest works", PATIENCE, || first.is_running().then_some(()));
    first.execute("stop", json!({}));
    thread::scope(|threads| {
        let (over, tries, disk) = (&over, &tries, &disk);
        let intruder = threads.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let said = intrude(directory.path(), disk);
                let said = said.ok_or_else(|| format!("try {} got the image", tries.load(Ordering::Relaxed)))?;
                if !said.contains("another machine has it") {
                    return Err(format!("it was refused for something else: {said}"));
                }
                tries.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let more_tries = |than: usize| {
            until("it has tried", PATIENCE, || {
                (intruder.is_finished() || tries.load(Ordering::Relaxed) > than).then_some(())
            });
        };
        let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut here = first;
            for name in ["B", "C", "D"] {
                more_tries(tries.load(Ordering::Relaxed) + 1);
                let next = Machine::start(name, directory.path(), &incoming);
                here.migrate(&next.address());
                here.completed();
                assert_eq!(next.completed().guest, GuestPlace::PausedAtDestination);
                assert_eq!(next.state(), "paused");
                more_tries(tries.load(Ordering::Relaxed) + 1);
                // The one before ends here, and its locks with it.
                here = next;
                more_tries(tries.load(Ordering::Relaxed) + 1);
            }
            here.execute("cont", json!({}));
            assert!(here.is_running());
            more_tries(tries.load(Ordering::Relaxed) + 1);
            here.verified();
            here
        }));
        // Before the last machine ends, and its locks with it.
        over.store(true, Ordering::Release);
        let refused = intruder.join().unwrap();
        println!("refused {} times", tries.load(Ordering::Relaxed));
        let _here = moved.unwrap_or_else(|panic| {
            println!("the intruder: {refused:?}");
            std::panic::resume_unwind(panic);
        });
        refused.unwrap();
    });
}

#[test]
fn a_guest_does_not_go_on_with_a_changed_image() {
    let _turn = turn();
    if !is_available() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    let disk = path.display().to_string();
    let machine = Machine::start("A", directory.path(), &[&machine(&disk)[..], &["--payload", "io"]].concat());
    let byte = || {
        let mut byte = [0];
        File::open(&path).unwrap().read_exact_at(&mut byte, DISK_BYTES - 1).unwrap();
        byte
    };
    for round in 0..2 {
        machine.execute("stop", json!({}));
        machine.execute("cont", json!({}));
        assert!(machine.is_running(), "round {round}: nobody has changed the image");
    }
    machine.execute("stop", json!({}));
    // Even a write that changes nothing counts: nothing tells it from one that does.
    File::options().write(true).open(&path).unwrap().write_all_at(&byte(), DISK_BYTES - 1).unwrap();
    for _ in 0..2 {
        let error = machine.try_execute("cont", json!({})).unwrap_err().to_string();
        println!("{error}");
        for word in [disk.as_str(), "was changed while the guest was paused"] {
            assert!(error.contains(word), "{word:?} is missing: {error}");
        }
        assert_eq!(machine.state(), "paused");
    }
}
