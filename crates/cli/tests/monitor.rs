//! Dialogues of `dunlin monitor` with real machines: as a script has them, and as a person on a terminal has them.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use common::{DUNLIN, Machine, PATIENCE, fails, turn, until};
use dunlin::Status;
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::json;

const WORKLOAD: &str = "pattern=uniform,rate=20M/s,working-set=16M,content=random";

fn at(machine: &Machine) -> String {
    format!("unix:{}", machine.qmp.display())
}

/// `dunlin monitor` with `input` on its standard input and these commands: exit status, output, and what went wrong.
fn monitor(address: &str, input: &str, commands: &[&str]) -> (Option<i32>, String, String) {
    let mut child = Command::new(DUNLIN)
        .args(["monitor", "--qmp", address])
        .args(commands.iter().flat_map(|command| ["-c", command]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// What commands say that must succeed.
fn says(machine: &Machine, commands: &[&str]) -> String {
    let (code, said, error) = monitor(&at(machine), "", commands);
    assert_eq!((code, error.as_str()), (Some(0), ""), "{commands:?}: {said}");
    said
}

#[test]
fn a_dialogue_of_a_script() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "64M", WORKLOAD, &[]);
    let destination = Machine::start("destination", directory.path(), &["--memory", "64M", "--incoming", "defer"]);
    source.execute("query-status", json!({}));
    destination.execute("query-status", json!({}));

    let old = "migrate_set_speed is an old command: use `migrate_set_parameter max-bandwidth 32M/s`\n";
    assert_eq!(
        says(&source, &["info status", "migrate_set_speed 32", "migrate_set_speed 64", "info migrate"]),
        format!("VM status: running\n{old}max-bandwidth: 32M/s\nmax-bandwidth: 64M/s\nno migration yet\n")
    );
    // Another session is told again.
    assert!(says(&source, &["migrate_set_speed 32"]).starts_with(old));
    // One number means one thing.
    source.set(json!({"downtime-limit": 250, "max-bandwidth": 5_000_000}));
    let said = says(&source, &["info migrate_parameters"]);
    assert!(said.contains("downtime-limit: 250ms\n") && said.contains("max-bandwidth: 5000000B/s\n"), "{said}");
    says(&source, &["migrate_set_parameter max-bandwidth 0"]);

    let (code, said, error) = monitor(
        &at(&source),
        "# together or not at all\n\nmigrate_set_parameter multifd-channels 4 multifd-compression gzip\nstop\n",
        &[],
    );
    assert_eq!((code, said.as_str()), (Some(1), ""));
    let wanted = "dunlin: migrate_set_parameter multifd-channels 4 multifd-compression gzip: parameter \
                  multifd-compression: \"gzip\" is not one of none, lz4, zstd\n";
    assert_eq!(error, wanted);
    assert!(source.is_running(), "it went on after a failure");
    assert_eq!(source.execute("query-migrate-parameters", json!({}))["multifd-channels"], 2);

    assert_eq!(says(&source, &["set_vcpu_throttle 30%", "info vcpu_throttle"]), "vCPU 0: 30%\nvCPU 0: 30%\n");
    assert_eq!(says(&source, &["cancel_vcpu_throttle 0"]), "vCPU 0: 0%\n");
    assert!(says(&source, &["info dirty_rate", "calc_dirty_rate -b 200ms"]).starts_with("not measured yet"));
    let measured = until("the dirty rate is measured", PATIENCE, || {
        Some(says(&source, &["info dirty_rate"])).filter(|said| said.starts_with("dirty rate: "))
    });
    let rate: f64 = measured.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!(measured.contains(" MiB/s, by counting written pages, over 200.0 ms\n"), "{measured}");
    assert!(rate > 1.0 && rate < 40.0, "the guest writes 20 MiB/s: {measured}");

    let said = says(&destination, &["migrate_incoming tcp:127.0.0.1:0", "info migrate"]);
    let (first, second) = said.split_once('\n').unwrap();
    assert_eq!(format!("{first}\n"), second);
    let uri = first.strip_prefix("waiting for a migration on ").unwrap();

    // Waits for the end, and tells it.
    let said = says(&source, &[&format!("migrate {uri}"), "info status"]);
    assert!(said.contains("migration, seen by the source: ") && said.contains("downtime"), "{said}");
    assert!(said.ends_with("VM status: paused (postmigrate)\n"), "{said}");
    assert_eq!(source.report().unwrap().status, Status::Completed);
    assert_eq!(says(&destination, &["info status", "stop", "info status"]), "VM status: running\nVM status: paused\n");
    println!("{}", destination.verified());

    let error = fails(
        &["monitor", "--qmp", &at(&source), "-c", &format!("migrate {uri}"), "-c", "quit"],
        1,
        &["migrated away"],
    );
    assert!(source.is_alive(), "it went on after {error}");
    assert_eq!(says(&source, &["quit", "info status"]), "");
    until("the source ends", PATIENCE, || (!source.is_alive()).then_some(()));
    fails(&["monitor", "--qmp", &at(&source), "-c", "info status"], 1, &["no machine answers", "start one"]);
}

#[test]
fn a_migration_that_waits_and_one_that_fails() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "64M", WORKLOAD, &[]);
    let destination = Machine::destination(directory.path(), "64M");
    source.execute("query-status", json!({}));
    let nowhere = format!("migrate unix:{}/nobody", directory.path().display());
    let (code, said, error) = monitor(&at(&source), "", &[&nowhere]);
    assert_eq!(code, Some(1), "{error}");
    assert!(said.contains("failed") && error.contains("the guest is running at the source"), "{said}{error}");
    assert_eq!(error.lines().count(), 1, "{error}");

    let uri = destination.address();
    let said = says(&source, &["migrate_set_capability pause-before-switchover", &format!("migrate {uri}")]);
    assert!(said.ends_with("`migrate_continue pre-switchover` has it go on\n"), "{said}");
    fails(&["monitor", "--qmp", &at(&source), "-c", "migrate_continue device"], 1, &["'device'", "pre-switchover"]);
    assert_eq!(says(&source, &["migrate_continue pre-switchover"]), "");
    source.completed();
    println!("{}", destination.verified());
}

/// A person's terminal.
struct Terminal {
    child: Child,
    keys: File,
    shown: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    fn open(address: &str, state: &Path) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let theirs = || -> OwnedFd {
            rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap()
        };
        let child = Command::new(DUNLIN)
            .args(["monitor", "--qmp", address])
            .env("XDG_STATE_HOME", state)
            .env("TERM", "xterm")
            .stdin(theirs())
            .stdout(theirs())
            .stderr(theirs())
            .spawn()
            .unwrap();
        let keys = File::from(ours);
        let mut screen = keys.try_clone().unwrap();
        let (show, shown) = mpsc::channel();
        // Ends when the child does: reading fails then.
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = screen.read(&mut bytes) {
                if count == 0 || show.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keys, shown, seen: String::new() }
    }

    /// Waits until the screen has shown `wanted`; from there on is what is seen next.
    fn shows(&mut self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(place) = self.seen.find(wanted) {
                self.seen.drain(..place + wanted.len());
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.shown.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("the terminal does not show {wanted:?}, but {:?}", self.seen),
            }
        }
    }

    fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// The exit status.
    fn ended(&mut self) -> Option<i32> {
        until("the monitor ends", PATIENCE, || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_dialogue_of_a_person() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let source = Machine::source(directory.path(), "64M", WORKLOAD, &[]);
    let destination = Machine::destination(directory.path(), "64M");
    source.execute("query-status", json!({}));
    let uri = destination.address();

    let mut person = Terminal::open(&at(&source), &state);
    person.shows("`help` lists the commands, Ctrl-D leaves");
    person.shows("(dunlin) ");
    // A topic, a parameter's name and a choice are completed.
    person.types("info sta\t\r");
    person.shows("info status ");
    person.shows("VM status: running");
    person.types("migrate_set_p\tmultifd-co\tz\t\r");
    person.shows("migrate_set_parameter multifd-compression zstd ");
    person.shows("\nmultifd-compression: zstd");
    // Several are listed.
    person.types("migrate_set_parameter xbz\t\t");
    person.shows("xbzrle-cache-size");
    person.types("\x03");
    person.shows("Ctrl-D leaves");
    person.types("nonsense\r");
    person.shows("Error: unknown command: 'nonsense'");

    // Waits for the end of a migration; Ctrl-C ends the waiting, and not the migration.
    person.types("migrate_set_parameter max-bandwidth 2M\r");
    person.shows("\nmax-bandwidth: 2M/s");
    person.types(&format!("migrate {uri}\r"));
    until("the migration is under way", PATIENCE, || {
        source.report().filter(|report| report.status == Status::Active).map(|_| ())
    });
    rustix::process::kill_process(rustix::process::Pid::from_child(&person.child), rustix::process::Signal::INT)
        .unwrap();
    person.shows("the migration goes on");
    person.types("migrate_set_parameter max-bandwidth 0\r");
    source.completed();
    person.types("info status\r");
    person.shows("VM status: paused (postmigrate)");
    person.types("\x04");
    assert_eq!(person.ended(), Some(0));

    // The next session has the last one's lines.
    let mut person = Terminal::open(&at(&source), &state);
    person.shows("(dunlin) ");
    person.types("\x1b[A");
    person.shows("info status");
    person.types("\r");
    person.shows("VM status: paused (postmigrate)");
    // The machine goes away.
    source.kill();
    person.types("info status\r");
    person.shows("closed the connection");
    assert_eq!(person.ended(), Some(1));

    let mut person = Terminal::open(&at(&destination), &state);
    person.shows("(dunlin) ");
    person.types("quit\r");
    person.shows("the machine has ended");
    assert_eq!(person.ended(), Some(0));
}

#[test]
fn the_document_has_what_help_says() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::source(directory.path(), "16M", "idle", &[]);
    machine.execute("query-status", json!({}));
    let document = include_str!("../../../docs/monitor.md");
    for command in ["help", "info"] {
        let said = says(&machine, &[command]);
        assert!(document.contains(&said), "docs/monitor.md has not what {command} says:\n{said}");
    }
}

/// QEMU's own monitor, where there is a QEMU.
#[test]
fn a_qemu() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qemu");
    let address = format!("unix:{}", path.display());
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-machine", "none", "-display", "none", "-nodefaults"])
        .args(["-qmp", &format!("{address},server=on,wait=off")])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut qemu) = qemu else {
        println!("skipped: no qemu-system-x86_64");
        return;
    };
    until("QEMU listens", PATIENCE, || path.exists().then_some(()));
    let (code, said, error) = monitor(&address, "", &["info status", "migrate_set_parameter downtime-limit 100"]);
    assert_eq!((code, said.as_str(), error.as_str()), (Some(0), "VM status: running\n", ""));
    for (command, word) in [
        ("nonsense", "unknown command: 'nonsense'"),
        ("migrate_set_parameter", "string expected"),
        ("migrate_set_parameter nonsense 1", "nonsense"),
        ("migrate unix:/nowhere/at/all", "/nowhere/at/all"),
    ] {
        fails(&["monitor", "--qmp", &address, "-c", command, "-c", "quit"], 1, &[command, word]);
        assert!(qemu.try_wait().unwrap().is_none());
    }
    let (code, _, error) = monitor(&address, "info migrate\nquit\n", &[]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
    until("QEMU ends", Duration::from_secs(20), || qemu.try_wait().unwrap());
}
