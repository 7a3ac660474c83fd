//! Watching, recording and measuring migrations of real processes: what is seen is held to the migration's own report.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use common::{DUNLIN, Machine, PATIENCE, turn, until};
use dunlin::{Report, Status};
use serde_json::{Value, json};

const BUSY: &str = "pattern=uniform,rate=20M/s,working-set=32M";

fn dunlin(arguments: &[&str]) -> Output {
    Command::new(DUNLIN).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The samples of a recording, after its first line.
fn samples(path: &Path) -> Vec<Value> {
    let whole = fs::read_to_string(path).unwrap();
    let mut lines = whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let header = lines.next().unwrap();
    assert_eq!((&header["schema"], &header["version"]), (&json!("dunlin-recording"), &json!(1)), "{header}");
    lines.collect()
}

fn qmp(machine: &Machine) -> String {
    format!("unix:{}", machine.qmp.display())
}

#[test]
fn a_migration_is_recorded_on_both_sides_and_makes_a_page() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).display().to_string();
    let source = Machine::source(directory.path(), "256M", BUSY, &[]);
    let destination = Machine::destination(directory.path(), "256M");
    source.connect();
    destination.connect();
    // Before the migration begins there is nothing to record, only to wait for.
    let watcher = Command::new(DUNLIN)
        .args(["watch", "--qmp", &qmp(&destination), "--record", &file("b.jsonl")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("the watcher makes its file", PATIENCE, || fs::metadata(file("b.jsonl")).ok().filter(|file| file.len() > 0));
    let ran = dunlin(&[
        "migrate",
        "--qmp",
        &qmp(&source),
        &destination.address(),
        "--set",
        "max-bandwidth=150M/s",
        "--record",
        &file("a.jsonl"),
    ]);
    assert!(ran.status.success(), "{}", text(&ran.stderr));
    let watched = watcher.wait_with_output().unwrap();
    assert!(watched.status.success(), "{}", text(&watched.stderr));
    assert!(text(&watched.stdout).starts_with("completed in"), "{}", text(&watched.stdout));

    for (name, machine) in [("a", &source), ("b", &destination)] {
        let samples = samples(Path::new(&file(&format!("{name}.jsonl"))));
        let ended = machine.completed();
        // 150 MB/s: more than half a second; a look every 20 ms, or slower on a busy host.
        assert!(samples.len() > 8, "{} samples", samples.len());
        let last: Report = serde_json::from_value(samples.last().unwrap()["report"].clone()).unwrap();
        assert_eq!(last.status, Status::Completed);
        assert_eq!(last.ram.transferred_bytes, ended.ram.transferred_bytes);
        assert_eq!(last.total_seconds, ended.total_seconds);
        let rounds: Vec<&Value> =
            samples.iter().flat_map(|sample| sample["report"]["rounds"].as_array().unwrap()).collect();
        assert_eq!(json!(rounds), json!(ended.rounds), "each round once, in order");
        let bytes = |sample: &Value| sample["report"]["ram"]["transferred_bytes"].as_u64().unwrap();
        assert!(
            samples.is_sorted_by_key(bytes)
                && samples.is_sorted_by(|a, b| a["seconds"].as_f64() < b["seconds"].as_f64())
        );
        let made = dunlin(&["report", &file(&format!("{name}.jsonl")), "-o", &file("page.html")]);
        assert!(made.status.success(), "{}", text(&made.stderr));
        let page = fs::read_to_string(file("page.html")).unwrap();
        assert!(page.contains("Migration completed") && page.contains(ended.session.as_deref().unwrap()));
    }
    let printed = dunlin(&["report", &file("a.jsonl"), "-o", "-"]);
    assert!(text(&printed.stdout).starts_with("<!DOCTYPE html>"), "{}", text(&printed.stderr));
}

#[test]
fn a_recorder_that_is_killed_leaves_a_file_that_is_read() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.jsonl");
    let source = Machine::source(directory.path(), "256M", BUSY, &[]);
    let destination = Machine::destination(directory.path(), "256M");
    source.set(json!({"max-bandwidth": 20 << 20}));
    source.migrate(&destination.address());
    let mut watcher = Command::new(DUNLIN)
        .args(["watch", "--qmp", &qmp(&source), "--record", &path.display().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("there are some samples", PATIENCE, || {
        fs::read_to_string(&path).ok().filter(|text| text.lines().count() > 5)
    });
    watcher.kill().unwrap();
    watcher.wait().unwrap();
    assert_eq!(source.report().unwrap().status, Status::Active, "the migration goes on");
    assert!(samples(&path).len() >= 4);
    let page = dunlin(&["report", &path.display().to_string(), "-o", "-"]);
    assert!(text(&page.stdout).contains("The recording ends before the migration"), "{}", text(&page.stderr));
    source.execute("migrate_cancel", json!({}));
    source.ended();
}

#[test]
fn mistakes() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).display().to_string();
    fs::write(file("there"), "mine").unwrap();
    let source = Machine::source(directory.path(), "64M", "idle", &[]);
    source.connect();
    let refused = |arguments: &[&str], wanted: &str| {
        let output = dunlin(arguments);
        let said = text(&output.stderr);
        assert!(
            !output.status.success() && said.contains(wanted) && said.lines().count() == 1,
            "{arguments:?}: {said}"
        );
    };
    let nowhere = "tcp:127.0.0.1:1";
    refused(&["migrate", "--qmp", &qmp(&source), nowhere, "--record", &file("there")], "exists already");
    assert_eq!(fs::read_to_string(file("there")).unwrap(), "mine");
    assert!(source.report().is_none(), "nothing was started that could not be recorded");
    refused(&["watch", "--qmp", &qmp(&source), "--record", &file("no/such/place")], "could not record to");
    refused(&["watch", "--qmp", &file("nobody"), "--record", &file("new")], "no machine answers");
    assert!(fs::metadata(file("new")).is_err(), "nothing is left of what never began");
    refused(&["report", &file("there"), "-o", "-"], "it is not a recording");
    refused(&["report", &file("nothing"), "-o", "-"], "could not open");
    refused(&["report", &directory.path().display().to_string(), "-o", "-"], "could not");
    refused(
        &["run", "--memory", "16M", "--qmp", &qmp(&source).replace("source", "other"), "--metrics", "nowhere"],
        "metrics",
    );
    // A migration that fails is recorded to its end.
    refused(&["migrate", "--qmp", &qmp(&source), nowhere, "--record", &file("failed")], "the migration failed");
    let page = text(&dunlin(&["report", &file("failed"), "-o", "-"]).stdout);
    assert!(page.contains("Migration failed") && page.contains("Connection refused"), "{page}");
}

#[test]
fn metrics_of_a_running_migration() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address = free.to_string();
    let source = Machine::source(directory.path(), "256M", BUSY, &["--metrics", &address]);
    let destination = Machine::destination(directory.path(), "256M");
    source.connect();
    let scrape = || {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let value = |text: &str, name: &str| -> Option<f64> {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    };
    let bytes = "dunlin_migration_transferred_bytes_total{side=\"source\"}";
    let before = scrape();
    assert!(before.contains("dunlin_build_info") && value(&before, bytes).is_none(), "{before}");
    source.set(json!({"max-bandwidth": 100 << 20}));
    source.migrate(&destination.address());
    let mut seen = 0.0;
    let mut looks = 0;
    until("the migration ends", PATIENCE, || {
        let text = scrape();
        let now = value(&text, bytes).unwrap();
        assert!(now >= seen, "{now} after {seen}");
        seen = now;
        looks += 1;
        thread::sleep(Duration::from_millis(20));
        (value(&text, "dunlin_migration_status{side=\"source\",status=\"completed\"}") == Some(1.0)).then_some(())
    });
    let report = source.completed();
    assert!(looks > 5, "{looks}");
    assert_eq!(value(&scrape(), bytes), Some(report.ram.transferred_bytes as f64), "it stays after the end");
    source.execute("quit", json!({}));
    until("it no longer listens", PATIENCE, || TcpStream::connect(&address).is_err().then_some(()));
}

/// A terminal: its master side, and the slave side for a process.
fn terminal() -> (fs::File, fs::File, fs::File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let slave = fs::File::options().read(true).write(true).open(name).unwrap();
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&slave, size).unwrap();
    (master.into(), slave.try_clone().unwrap(), slave)
}

#[test]
fn the_screen_is_left_as_it_was() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "256M", BUSY, &[]);
    let destination = Machine::destination(directory.path(), "256M");
    source.set(json!({"max-bandwidth": 20 << 20}));
    source.migrate(&destination.address());
    // `q`, and Ctrl-C as a terminal in raw mode gives it.
    for key in [b"q", b"\x03"] {
        let (mut master, input, output) = terminal();
        let before = rustix::termios::tcgetattr(&master).unwrap();
        let mut watcher = Command::new(DUNLIN)
            .args(["watch", "--qmp", &qmp(&source)])
            .env("TERM", "xterm-256color")
            .stdin(input)
            .stdout(output)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut shown = String::new();
        until("the screen is drawn", PATIENCE, || {
            let mut buffer = [0; 4096];
            let read = master.read(&mut buffer).unwrap();
            shown.push_str(&text(&buffer[..read]));
            shown.contains("the migration goes on").then_some(())
        });
        assert!(shown.contains("\x1b[?1049h"), "it has a screen of its own");
        master.write_all(key).unwrap();
        let reader = thread::spawn(move || {
            let mut rest = Vec::new();
            let mut buffer = [0; 4096];
            // Its end is an error: nobody has the other side open.
            while let Ok(read @ 1..) = master.read(&mut buffer) {
                rest.extend_from_slice(&buffer[..read]);
            }
            (master, text(&rest))
        });
        assert!(watcher.wait().unwrap().success());
        let (master, rest) = reader.join().unwrap();
        assert!(rest.contains("\x1b[?1049l") && rest.contains("\x1b[?25h"), "{rest:?}");
        let after = rustix::termios::tcgetattr(&master).unwrap();
        assert_eq!(after.local_modes, before.local_modes, "the terminal is as it was");
        assert_eq!(source.report().unwrap().status, Status::Active, "the migration goes on");
    }
    source.execute("migrate_cancel", json!({}));
    source.ended();
}

/// Time on processors that a process has used, in ticks of a hundredth of a second.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// `dunlin` with `arguments` on a terminal of its own, which has shown `wanted`; with it the terminal's master side.
fn on_a_terminal(arguments: &[&str], wanted: &str) -> (std::process::Child, fs::File) {
    let (mut master, input, output) = terminal();
    let child = Command::new(DUNLIN)
        .args(arguments)
        .env("TERM", "xterm-256color")
        .stdin(input)
        .stderr(output.try_clone().unwrap())
        .stdout(output)
        .spawn()
        .unwrap();
    let mut shown = String::new();
    until("something is shown", PATIENCE, || {
        let mut buffer = [0; 4096];
        let read = master.read(&mut buffer).unwrap();
        shown.push_str(&text(&buffer[..read]));
        shown.contains(wanted).then_some(())
    });
    (child, master)
}

/// The terminal of ssh or tmux closes, and no signal comes of it, as for a process that has another terminal or none to be
/// controlled by. Also with a key half spelt.
#[test]
fn a_terminal_that_goes_away_ends_what_is_on_it() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "16M", "idle", &[]);
    source.connect();
    for (arguments, wanted) in
        [(["watch", "--qmp", &qmp(&source)], "q leaves"), (["monitor", "--qmp", &qmp(&source)], "(dunlin) ")]
    {
        for before in [&b""[..], b"\x1b[", b"x"] {
            let (mut child, mut master) = on_a_terminal(&arguments, wanted);
            master.write_all(before).unwrap();
            drop(master);
            let ended = until(&format!("{arguments:?} ends"), Duration::from_secs(20), || {
                let ended = child.try_wait().unwrap();
                if ended.is_none() && ticks(child.id()) > 500 {
                    child.kill().unwrap();
                    panic!("{arguments:?} has used five seconds of a processor on a terminal that is not there");
                }
                ended
            });
            assert!(!ended.success(), "{arguments:?}: {ended}");
        }
    }
}

/// A migration goes on without its terminal, and can still be ended.
#[test]
fn a_migration_whose_terminal_goes_away() {
    use rustix::process::{Pid, Signal, kill_process};
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "64M", "idle", &[]);
    let destination = Machine::destination(directory.path(), "64M");
    let arguments = ["migrate", "--qmp", &qmp(&source), &destination.address(), "--set", "max-bandwidth=1M/s"];
    source.connect();
    let (mut child, master) = on_a_terminal(&arguments, "round 1");
    drop(master);
    let before = ticks(child.id());
    thread::sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none(), "it goes on");
    assert!(ticks(child.id()) - before < 50, "and waits for the migration, not for the terminal");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let ended = until("it ends", PATIENCE, || child.try_wait().unwrap());
    assert!(!ended.success());
    assert_eq!(source.ended().status, Status::Cancelled);
}

/// SIGHUP and SIGTERM end it, on a terminal that shows everything and on one that takes nothing any more.
#[test]
fn what_is_on_a_terminal_ends_when_it_is_told_to() {
    use rustix::process::{Pid, Signal, kill_process};
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let source = Machine::source(directory.path(), "256M", BUSY, &[]);
    let destination = Machine::destination(directory.path(), "256M");
    source.set(json!({"max-bandwidth": 1 << 20}));
    source.migrate(&destination.address());
    for signal in [Signal::HUP, Signal::TERM] {
        for reads_on in [true, false] {
            for (arguments, wanted) in [
                (["watch", "--qmp", &qmp(&source)], "the migration goes on"),
                (["monitor", "--qmp", &qmp(&source)], "(dunlin) "),
            ] {
                let (mut child, master) = on_a_terminal(&arguments, wanted);
                let reader = reads_on.then(|| {
                    let mut master = master.try_clone().unwrap();
                    thread::spawn(move || {
                        let mut buffer = [0; 4096];
                        while let Ok(1..) = master.read(&mut buffer) {}
                    })
                });
                if !reads_on {
                    // As Ctrl-S does: from here on what is written is not taken.
                    let name = rustix::pty::ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
                    let slave = fs::File::options().read(true).write(true).open(name).unwrap();
                    rustix::termios::tcflow(&slave, rustix::termios::Action::OOff).unwrap();
                    // Something to write comes soon.
                    thread::sleep(Duration::from_millis(500));
                }
                kill_process(Pid::from_child(&child), signal).unwrap();
                until(&format!("{arguments:?} ends by {signal:?}"), Duration::from_secs(20), || {
                    child.try_wait().unwrap()
                });
                drop(master);
                if let Some(reader) = reader {
                    reader.join().unwrap();
                }
            }
        }
    }
    source.execute("migrate_cancel", json!({}));
    source.ended();
}
