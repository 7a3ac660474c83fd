//! What people get wrong on the command line: one line that names the cause and what to do, and an exit code that is
//! not 0: 2 where the command was not understood, 1 where it could not be done. Nothing running is the worse for it.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{DUNLIN, Machine, PATIENCE, check_error, dunlin, fails, turn, until};
use dunlin::{GuestPlace, Status};
use serde_json::json;

const WORKLOAD: &str = "pattern=uniform,rate=50M/s,working-set=16M,content=random";

fn at(machine: &Machine) -> String {
    format!("unix:{}", machine.qmp.display())
}

#[test]
fn not_understood() {
    let _turn = turn();
    let run = ["run", "--qmp", "unix:/nowhere/a", "--memory"];
    for (arguments, words) in [
        (&[&run[..], &["1X"]].concat()[..], &["1X", "a size in bytes, such as", "--help"][..]),
        (&[&run[..], &["64M", "--workload", "walking"]].concat(), &["walking", "idle"]),
        (&[&run[..], &["64M", "--fill", "zero:70,text:20"]].concat(), &["fill", "100"]),
        (&[&run[..], &["64M", "--incoming", "tcp:localhost"]].concat(), &["the port is missing"]),
        (&["run", "--memory", "64M"], &["--qmp"]),
        (&["demo", "--set", "max-bandwidht=1M"], &["max-bandwidht", "`dunlin parameters` lists them"]),
        (&["demo", "--set", "max-bandwidth"], &["NAME=VALUE", "max-bandwidth=300M/s"]),
        (&["demo", "--set", "max-bandwidth=10parsecs"], &["10parsecs", "50M/s"]),
        (&["demo", "--set", "multifd-channels=256"], &["multifd-channels", "1 to 255"]),
        (&["demo", "--set", "multifd-channels=0"], &["multifd-channels", "1 to 255"]),
        (&["demo", "--vcpus", "0"], &["--vcpus", "0"]),
        (&["demo", "--transport", "pigeon"], &["pigeon", "tcp", "unix"]),
        (&["migrate", "--qmp", "unix:/nowhere/a", "localhost:4444"], &["localhost:4444", "tcp:HOST:PORT"]),
        (&["migrate", "--qmp", "unix:/nowhere/a"], &["URI"]),
        (&["status"], &["--qmp"]),
        (&["migrat"], &["migrat", "migrate"]),
    ] {
        fails(arguments, 2, words);
    }
    assert!(dunlin(&["--help"]).status.success());
    assert!(dunlin(&["--version"]).status.success());
}

#[test]
fn nobody_at_the_socket() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let nowhere = format!("unix:{}/nowhere", directory.path().display());
    for command in ["status", "cancel", "verify", "stop", "cont", "quit"] {
        fails(&[command, "--qmp", &nowhere], 1, &["no machine answers", "dunlin run"]);
    }
    fails(&["migrate", "--qmp", &nowhere, "tcp:localhost:1"], 1, &["no machine answers", "dunlin run"]);
    let machine = Machine::source(directory.path(), "64M", "idle", &[]);
    machine.execute("query-status", json!({}));
    machine.kill();
    fails(&["status", "--qmp", &at(&machine)], 1, &["no machine answers", "its process has ended"]);
}

#[test]
fn nobody_to_migrate_to() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "64M", WORKLOAD, &[]);
    source.execute("query-status", json!({}));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let here = "the guest is running at the source";
    for (uri, cause) in [
        (format!("tcp:127.0.0.1:{port}"), "Connection refused"),
        (format!("unix:{}/nobody", directory.path().display()), "No such file"),
        ("tcp:no-such-host.invalid:1".to_owned(), "no-such-host.invalid"),
    ] {
        fails(&["migrate", "--qmp", &at(&source), &uri], 1, &[cause, here, "migrate again"]);
        let report = source.ended();
        assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::RunningAtSource));
        check_error(&report).unwrap();
        assert!(source.is_running());
    }
    source.verified();
}

#[test]
fn an_address_that_is_taken() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let incoming = format!("tcp:{}", taken.local_addr().unwrap());
    let qmp = format!("unix:{}/a", directory.path().display());
    let run = ["run", "--memory", "64M", "--qmp"];
    fails(&[&run[..], &[&qmp, "--incoming", &incoming]].concat(), 1, &[&incoming, "in use", "choose an address"]);

    // The socket of a machine that runs stays that machine's.
    let machine = Machine::source(directory.path(), "64M", "idle", &[]);
    machine.execute("query-status", json!({}));
    fails(&[&run[..], &[&at(&machine)]].concat(), 1, &[&machine.qmp.display().to_string(), "another"]);
    assert!(dunlin(&["status", "--qmp", &at(&machine)]).status.success());
    // That of one that was killed is taken over.
    machine.kill();
    let again = Machine::source(directory.path(), "64M", "idle", &[]);
    assert!(again.is_running());

    let missing = format!("unix:{}/no/such/directory", directory.path().display());
    fails(&[&run[..], &[&missing]].concat(), 1, &["no/such/directory"]);
}

#[test]
fn memory_that_cannot_be() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let qmp = format!("unix:{}/a", directory.path().display());
    for (memory, words) in [("0", &["memory"][..]), ("5000", &["4096"]), ("900T", &["900.00 TiB", "could not"])] {
        fails(&["run", "--memory", memory, "--qmp", &qmp], 1, words);
    }
}

#[test]
fn what_cannot_be_done_now() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "64M", WORKLOAD, &[]);
    let destination = Machine::destination(directory.path(), "64M");
    let (here, there) = (at(&source), at(&destination));
    let uri = destination.address();
    source.execute("query-status", json!({}));

    fails(&["cont", "--qmp", &there], 1, &["the guest is not here yet"]);
    fails(&["stop", "--qmp", &there], 1, &["the guest is not here yet"]);
    fails(&["verify", "--qmp", &there], 1, &["not here to be verified"]);
    let said = fails(&["migrate", "--qmp", &there, &uri], 1, &["the guest is not here yet"]);
    assert!(!said.contains("dunlin cancel"), "there is nothing to cancel: {said}");
    for side in [&here, &there] {
        fails(&["cont", "--take-back", "--qmp", side], 1, &["nothing is undecided"]);
    }
    // Nor is there anything to cancel, and that is said at once.
    for side in [&here, &there] {
        let begun = Instant::now();
        let cancelled = dunlin(&["cancel", "--qmp", side]);
        assert!(cancelled.status.success(), "{cancelled:?}");
        assert_eq!(String::from_utf8(cancelled.stdout).unwrap(), "no migration is running\n");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }

    source.set(json!({"max-bandwidth": 10_000_000}));
    assert!(dunlin(&["migrate", "--qmp", &here, &uri, "--detach"]).status.success());
    fails(&["migrate", "--qmp", &here, &uri], 1, &["running already", "dunlin cancel"]);
    // What was to be set for a migration that is refused does not change the one that runs.
    fails(&["migrate", "--qmp", &here, &uri, "--set", "max-bandwidth=1M/s"], 1, &["running already"]);
    assert_eq!(source.execute("query-migrate-parameters", json!({}))["max-bandwidth"], 10_000_000);
    fails(&["cont", "--take-back", "--qmp", &here], 1, &["nothing is undecided"]);
    source.set(json!({"max-bandwidth": 0}));
    source.completed();
    destination.completed();

    fails(&["cont", "--qmp", &here], 1, &["migrated away"]);
    fails(&["verify", "--qmp", &here], 1, &["migrated away", "destination"]);
    fails(&["migrate", "--qmp", &here, &uri], 1, &["migrated away"]);
    fails(&["cont", "--take-back", "--qmp", &here], 1, &["nothing is undecided"]);
    assert!(dunlin(&["verify", "--qmp", &there]).status.success());
}

#[test]
fn another_memory_size() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let destination = Machine::destination(directory.path(), "96M");
    let wrong = Machine::source(directory.path(), "64M", WORKLOAD, &[]);
    let uri = destination.address();
    wrong.execute("query-status", json!({}));
    let words = ["destination refused", "64.00 MiB", "96.00 MiB", "the guest is running at the source"];
    fails(&["migrate", "--qmp", &at(&wrong), &uri], 1, &words);
    let report = destination.ended();
    check_error(&report).unwrap();
    let message = report.error.unwrap().message;
    println!("{message}");
    assert!(message.contains("64.00 MiB") && message.contains("96.00 MiB"), "{message}");
    assert!(wrong.is_running());
    wrong.verified();
    wrong.kill();
    // More vCPUs are another machine too.
    let wrong = Machine::source(directory.path(), "96M", WORKLOAD, &["--vcpus", "2"]);
    wrong.execute("query-status", json!({}));
    fails(&["migrate", "--qmp", &at(&wrong), &uri], 1, &["destination refused", "vCPU"]);
    wrong.kill();

    let right = Machine::source(directory.path(), "96M", WORKLOAD, &[]);
    right.migrate(&uri);
    right.completed();
    destination.completed();
    println!("{}", destination.verified());
}

#[test]
fn a_destination_that_is_busy() {
    let _turn = turn();
    let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let destination = Machine::destination(directory.path(), "64M");
    let first = Machine::source(directory.path(), "64M", WORKLOAD, &[]);
    let second = Machine::source(other.path(), "64M", WORKLOAD, &["--seed", "2"]);
    let uri = destination.address();
    first.set(json!({"max-bandwidth": 5_000_000}));
    first.migrate(&uri);
    until("the first is under way", PATIENCE, || {
        (destination.report().unwrap().status == Status::Active).then_some(())
    });
    second.execute("query-status", json!({}));
    let words = ["busy with another migration", "the guest is running at the source"];
    fails(&["migrate", "--qmp", &at(&second), &uri], 1, &words);
    check_error(&second.ended()).unwrap();
    let refused = destination.report().unwrap().refused_connections;
    assert_eq!(refused.count, 1);
    assert!(refused.latest.unwrap().contains("busy"));

    first.set(json!({"max-bandwidth": 0}));
    first.completed();
    destination.completed();
    println!("{}", destination.verified());
    assert!(second.is_running());
    println!("{}", second.verified());
}

/// What is refused for its recording has set nothing.
#[test]
fn a_recording_that_exists() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "16M", "idle", &[]);
    let limit = || source.execute("query-migrate-parameters", json!({}))["downtime-limit"].clone();
    let before = limit();
    let record = directory.path().join("a.jsonl");
    std::fs::write(&record, "mine").unwrap();
    let record = record.to_str().unwrap();
    let migrate = ["migrate", "--qmp", &at(&source), "unix:/nowhere/b", "--set", "downtime-limit=77ms", "--record"];
    fails(&[&migrate[..], &[record]].concat(), 1, &[record, "exists already"]);
    assert_eq!((limit(), std::fs::read_to_string(record).unwrap().as_str()), (before, "mine"));
    // And what is set stays, as --help says.
    let fresh = directory.path().join("b.jsonl");
    fails(&[&migrate[..], &[fresh.to_str().unwrap()]].concat(), 1, &["/nowhere/b"]);
    assert_eq!(limit(), 77);
    assert!(dunlin(&["migrate", "--help"]).stdout.windows(9).any(|words| words == b"stays set"));
}

/// A command in a file system where /dev/kvm is a file that nobody can use; nothing where that cannot be arranged.
fn without_kvm(arguments: &[&str]) -> Option<Output> {
    let script = "mount --bind /dev/null /dev/kvm && exec \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    if std::path::Path::new("/dev/kvm").exists() {
        command.args(["--mount", "sh", "-c", script, DUNLIN]);
    } else {
        command = Command::new(DUNLIN);
    }
    let probe = Command::new("unshare").args(["--mount", "sh", "-c", "mount --bind /dev/null /dev/kvm"]).output();
    if std::path::Path::new("/dev/kvm").exists() && !probe.is_ok_and(|probe| probe.status.success()) {
        println!("skipped: /dev/kvm cannot be hidden from a process here");
        return None;
    }
    Some(command.args(arguments).stdin(Stdio::null()).output().unwrap())
}

#[test]
fn without_kvm_one_line_and_the_rest_works() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let qmp = format!("unix:{}/qmp", directory.path().display());
    for more in [&[][..], &["--incoming", "tcp:127.0.0.1:0"]] {
        let arguments = [&["run", "--machine", "kvm", "--memory", "64M", "--qmp", &qmp], more].concat();
        let Some(output) = without_kvm(&arguments) else { return };
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains("/dev/kvm") && said.contains("the synthetic one does not"), "{said}");
    }
    let output = without_kvm(&["demo", "--memory", "64M", "--json"]).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("machine synthetic: could not use /dev/kvm"), "{said}");
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&object["machine"], &object["verified"]), (&json!("synthetic"), &json!(true)));
}
