//! Ten clients that send what they like, while a guest moves to and fro between the two processes that they send it to.
//! Four more have a second pair to themselves, and also stop, start, migrate and cancel there as they like.
//!
//! `DUNLIN_TEST_SEED` repeats a run's commands, `DUNLIN_TEST_COMMANDS` says how many each client sends.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, PATIENCE, Random, number, turn, until};
use dunlin::{Side, Status};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

const CLIENTS: u64 = 10;
const COMMANDS: u64 = 20_000;
/// Of those who change things.
const CHANGING_CLIENTS: u64 = 4;
/// What a process may take of memory beside its guest's.
const MEMORY_BYTES: u64 = 64 << 20;
/// With an arena for each of several threads the C library keeps memory that nobody uses, and for long more and more of it.
const ONE_ARENA: [(&str, &str); 1] = [("MALLOC_ARENA_MAX", "1")];
/// By how much that may grow in the second half of the commands: a leak of a hundred bytes a command is more.
const GROWTH_BYTES: u64 = 3 << 20;

fn below(random: &mut Random, bound: u64) -> u64 {
    random.next() % bound
}

fn one_of<'a, T>(random: &mut Random, of: &'a [T]) -> &'a T {
    &of[below(random, of.len() as u64) as usize]
}

/// Commands that leave the migrations alone, with arguments that may or may not be right.
fn command(random: &mut Random) -> Value {
    let value = any_value(random, 3);
    let n = below(random, 120) as i64 - 10;
    let (name, arguments) = match below(random, 28) {
        0 => ("query-status", json!({})),
        1 => ("query-migrate", json!({})),
        2 => ("query-migration-report", json!({})),
        3 => ("query-migrate-parameters", json!({})),
        4 => ("query-migrate-capabilities", json!({})),
        5 => ("query-commands", json!({})),
        6 => ("query-events", json!({"x": value})),
        7 => ("query-vcpu-throttle", json!({})),
        8 => ("migrate-set-parameters", json!({"downtime-limit": 300 + n, "cpu-throttle-initial": value})),
        9 => ("migrate-set-parameters", json!({"downtime-limit": 300 + n, "events": n % 2 == 0})),
        10 => ("migrate-set-parameters", json!({"max-bandwidth": format!("{value}")})),
        11 => ("migrate-set-capabilities", json!({"capabilities": [{"capability": "events", "state": value}]})),
        12 => ("migrate-set-capabilities", json!({"capabilities": [value, {"capability": value}]})),
        13 => ("set-vcpu-throttle", json!({"percentage": n, "cpu-index": n % 3})),
        14 => ("cancel-vcpu-throttle", json!({})),
        15 => ("migrate", json!({"uri": value})),
        16 => ("migrate", json!({"channels": [{"channel-type": "main", "addr": value}], "detach": true})),
        17 => ("migrate-continue", json!({"state": one_of(random, &["active", "none", "postcopy-active", "x"])})),
        18 => ("human-monitor-command", json!({"command-line": format!("info {value}"), "cpu-index": n})),
        19 => ("getfd", json!({"fdname": format!("fd{}", below(random, 5))})),
        21 => ("query-dirty-rate", json!({"calc-time-unit": one_of(random, &["second", "millisecond", "x"])})),
        22 => ("calc-dirty-rate", json!({"calc-time": n, "sample-pages": value, "mode": "page-sampling"})),
        23 => ("calc-dirty-rate", json!({"calc-time": 50, "calc-time-unit": "millisecond", "sample-pages": 300 + n})),
        20 => ("closefd", json!({"fdname": format!("fd{}", below(random, 5))})),
        24 => ("calc-dirty-rate", json!({"calc-time": 50, "calc-time-unit": "millisecond", "mode": "dirty-bitmap"})),
        // Takes long.
        25 if below(random, 30) == 0 => ("x-verify", json!({})),
        _ => ("no-such-command", json!({"a": value})),
    };
    request(random, name, arguments)
}

fn request(random: &mut Random, name: &str, arguments: Value) -> Value {
    let how = if below(random, 10) == 0 { "exec-oob" } else { "execute" };
    let mut request = json!({how: name, "arguments": arguments});
    if below(random, 2) == 0 {
        request["id"] = any_value(random, 2);
    }
    request
}

/// Commands that are right and change things, among the others, for a machine that a guest comes into at `here` and leaves
/// for `there`.
fn changing_command(random: &mut Random, here: &str, there: &str) -> Value {
    let descriptor = format!("fd{}", below(random, 5));
    let by_descriptor = json!({"uri": format!("fd:{descriptor}")});
    let (name, arguments) = match below(random, 30) {
        0 => ("migrate", json!({"uri": "tcp:127.0.0.1:1"})),
        1 | 2 => ("migrate", json!({"uri": there})),
        3 => ("migrate", by_descriptor),
        4 if below(random, 30) == 0 => ("migrate_cancel", json!({})),
        5 => ("stop", json!({})),
        6..=9 => ("cont", json!({"x-take-back": below(random, 10) == 0})),
        10..=12 => ("migrate-incoming", json!({"uri": here})),
        13 if below(random, 4) == 0 => ("migrate-incoming", by_descriptor),
        14..=16 => ("getfd", json!({"fdname": descriptor})),
        17 => ("closefd", json!({"fdname": descriptor})),
        18 => ("calc-dirty-rate", json!({"calc-time": 50, "calc-time-unit": "millisecond", "mode": "dirty-bitmap"})),
        19 if below(random, 4) == 0 => ("x-verify", json!({})),
        20 => ("migrate-set-parameters", json!({"pause-before-switchover": below(random, 2) == 0})),
        21 => ("migrate-continue", json!({"state": "pre-switchover"})),
        22 => ("human-monitor-command", json!({"command-line": "info migrate"})),
        _ => return command(random),
    };
    request(random, name, arguments)
}

fn any_value(random: &mut Random, depth: u32) -> Value {
    match below(random, if depth == 0 { 6 } else { 8 }) {
        0 => Value::Null,
        1 => json!(below(random, 2) == 0),
        2 => json!(random.next() as i64),
        3 => json!(random.next()),
        4 => json!(random.fraction() * 1e300),
        5 => json!(one_of(random, &["", "on", "xbzrle", "64M", "ü\u{0}\u{1f600}", "socket", "%s%n", "'\";"])),
        6 => (0..below(random, 4)).map(|_| any_value(random, depth - 1)).collect(),
        _ => {
            let names = ["transport", "type", "path", "uri", "state", "x", ""];
            let member = |random: &mut Random| (one_of(random, &names).to_string(), any_value(random, depth - 1));
            Value::Object((0..below(random, 4)).map(|_| member(random)).collect())
        }
    }
}

/// Bytes that are the command, were one, or never were.
fn bytes(random: &mut Random, command: Value) -> Vec<u8> {
    let mut text = command.to_string().into_bytes();
    match below(random, 10) {
        // A little of it is changed.
        0 | 1 => {
            for _ in 0..=below(random, 4) {
                let place = below(random, text.len() as u64) as usize;
                match below(random, 3) {
                    0 => text[place] = random.next() as u8,
                    1 => text.insert(place, *one_of(random, b"{}[]\":,\\\x00\xff\n '1")),
                    _ => drop(text.remove(place)),
                }
            }
        }
        2 => text.truncate(below(random, text.len() as u64) as usize),
        3 => text = (0..below(random, 200)).map(|_| random.next() as u8).collect(),
        4 => {
            let deep = 1 << below(random, 12);
            text = [b"{\"execute\":".as_slice(), &vec![*one_of(random, b"[{"); deep]].concat();
        }
        5 => {
            text = format!("{{\"execute\":\"query-name\",\"id\":{}}}", "9".repeat(1 << below(random, 12))).into_bytes()
        }
        _ => {}
    }
    text.extend(one_of(random, &["\n", "\r\n", "", " "]).bytes());
    text
}

/// Where a client takes its commands from.
type Commands<'a> = &'a (dyn Fn(&mut Random) -> Value + Sync);

struct Client<'a> {
    path: &'a Path,
    commands: Commands<'a>,
    stream: BufReader<UnixStream>,
    /// The other end of the descriptor that was sent last.
    far: Option<UnixStream>,
    sent: u64,
    answers: u64,
}

impl<'a> Client<'a> {
    fn connect(path: &'a Path, commands: Commands<'a>, random: &mut Random) -> Self {
        // All at once, there may be more than there is room for.
        let stream = until("a client connects", PATIENCE, || {
            let mut stream = BufReader::new(UnixStream::connect(path).ok()?);
            stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
            stream.get_ref().set_write_timeout(Some(PATIENCE)).unwrap();
            let mut greeting = String::new();
            stream.read_line(&mut greeting).ok()?;
            greeting.contains("QMP").then_some(stream)
        });
        let client = Self { path, commands, stream, far: None, sent: 0, answers: 0 };
        let enable = if below(random, 2) == 0 { json!(["oob"]) } else { json!([]) };
        client
            .write(format!("{}\n", json!({"execute": "qmp_capabilities", "arguments": {"enable": enable}})).as_bytes());
        client
    }

    fn again(&mut self, random: &mut Random) {
        let (sent, answers) = (self.sent, self.answers);
        *self = Self { sent, answers, ..Self::connect(self.path, self.commands, random) };
    }

    fn bytes(&self, random: &mut Random) -> Vec<u8> {
        let command = (self.commands)(random);
        bytes(random, command)
    }

    /// A client that is cut off, since it did not read, finds that out when it reads.
    fn write(&self, bytes: &[u8]) {
        let _ = self.stream.get_ref().write_all(bytes);
    }

    /// The descriptor is a stream at whose other end nobody says anything, if there is anybody.
    fn write_with_descriptor(&mut self, bytes: &[u8], random: &mut Random) {
        let (near, far) = UnixStream::pair().unwrap();
        self.far = (below(random, 4) == 0).then_some(far);
        let descriptors = [near.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let parts = [IoSlice::new(bytes)];
        let _ = rustix::net::sendmsg(self.stream.get_ref(), &parts, &mut control, SendFlags::NOSIGNAL);
    }

    /// Whatever was sent before, a command behind a byte 0xFF is answered.
    fn synchronise(&mut self) {
        let id = format!("sync-{}", self.sent);
        self.write(&[0xff]);
        self.write(format!("{}\n", json!({"execute": "query-name", "id": id})).as_bytes());
        loop {
            let mut line = Vec::new();
            self.stream.read_until(b'\n', &mut line).expect("an answer in time");
            assert!(!line.is_empty(), "the connection was closed");
            let answer: Value = serde_json::from_slice(&line).expect("an answer is JSON");
            self.answers += 1;
            if answer["id"] == json!(id) {
                return;
            }
        }
    }

    fn send_some(&mut self, random: &mut Random) {
        match below(random, 60) {
            // Gone in the middle of something.
            0 => {
                self.write(&self.bytes(random));
                self.write(b"{\"execute\": \"query-");
                self.sent += 1;
                self.again(random);
            }
            // Nothing more comes, and the answers are not waited for.
            1 => {
                self.write(b"{\"execute\": \"query-commands\"}");
                let _ = self.stream.get_ref().shutdown(Shutdown::Write);
                self.sent += 1;
                self.again(random);
            }
            // More commands than anybody reads the answers to.
            2 if below(random, 4) == 0 => {
                let stream = self.stream.get_ref();
                stream.set_nonblocking(true).unwrap();
                let line = b"{\"execute\": \"query-qmp-schema\"}\n";
                let refused = |written: &io::Result<usize>| written.as_ref().is_err();
                let all = (0..200).map(|_| (&*stream).write(line)).take_while(|written| !refused(written));
                self.sent += all.count() as u64;
                self.again(random);
            }
            // A line that is too long.
            3 if below(random, 10) == 0 => {
                self.synchronise();
                self.write(b"{\"execute\": \"");
                self.write(&vec![b'x'; 4 << 20]);
                self.write(b"\n");
                self.sent += 1;
            }
            4..=6 => {
                let bytes = self.bytes(random);
                self.write_with_descriptor(&bytes, random);
                self.sent += 1;
            }
            _ => {
                for _ in 0..=below(random, 20) {
                    self.write(&self.bytes(random));
                    self.sent += 1;
                }
            }
        }
        self.synchronise();
    }
}

/// What a process holds open.
fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
}

/// Memory of a process that is not its guest's.
fn memory_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
}

/// Moves the guest to and fro until it is told to end; gives how often.
fn move_about(machines: &[Machine; 2], end: &AtomicBool) -> u64 {
    let mut moves = 0;
    while !end.load(Ordering::Acquire) || moves == 0 {
        let [from, to] = if moves % 2 == 0 { [&machines[0], &machines[1]] } else { [&machines[1], &machines[0]] };
        if moves > 0 {
            to.execute("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}));
        }
        // Others may have asked for another throttle.
        from.execute("cancel-vcpu-throttle", json!({}));
        from.migrate(&to.address());
        until("the guest moves", PATIENCE, || to.is_running().then_some(()));
        from.completed();
        moves += 1;
    }
    moves
}

/// Sends so many commands, and adds them to `sent` as it goes; gives how many answers came.
fn be_hostile(machine: &Machine, of: Commands<'_>, commands: u64, mut random: Random, sent: &AtomicU64) -> u64 {
    let mut client = Client::connect(&machine.qmp, of, &mut random);
    while client.sent < commands {
        let before = client.sent;
        client.send_some(&mut random);
        sent.fetch_add(client.sent - before, Ordering::Relaxed);
    }
    client.answers
}

/// How many migrations between two machines are seen to complete until it is told to end.
fn count_moves(machines: &[Machine; 2], end: &AtomicBool) -> usize {
    let mut seen = BTreeSet::new();
    while !end.load(Ordering::Acquire) {
        for machine in machines {
            let completed = machine.report().filter(|report| report.status == Status::Completed);
            seen.extend(completed.and_then(|report| report.session));
        }
        thread::sleep(Duration::from_millis(20));
    }
    seen.len()
}

/// What two processes take of memory, as it goes.
struct Memory {
    pids: [u32; 2],
    /// How many commands were sent by then, and bytes.
    samples: Vec<(u64, [u64; 2])>,
}

impl Memory {
    /// Looks until it is told to end; `sent` counts the commands.
    fn watch(pids: [u32; 2], sent: &AtomicU64, end: &AtomicBool) -> Self {
        let mut samples = Vec::new();
        while !end.load(Ordering::Acquire) {
            samples.push((sent.load(Ordering::Relaxed), pids.map(memory_bytes)));
            thread::sleep(Duration::from_millis(20));
        }
        Self { pids, samples }
    }

    /// Neither has more than it may, nor more and more: half-way through, things are as they will be.
    fn check(&self, what: &str) {
        let (all, _) = *self.samples.last().unwrap();
        for n in 0..self.pids.len() {
            let most = self.samples.iter().map(|(_, bytes)| bytes[n]).max().unwrap();
            // The middle one of a quarter, since what is being carried out comes and goes.
            let usual = |quarter: u64| {
                let of_quarter = |(sent, _): &&(u64, _)| *sent * 4 > all * quarter && *sent * 4 <= all * (quarter + 1);
                let mut bytes: Vec<u64> = self.samples.iter().filter(of_quarter).map(|(_, bytes)| bytes[n]).collect();
                bytes.sort_unstable();
                bytes.get(bytes.len() / 2).copied()
            };
            let (second, last) = (usual(1), usual(3));
            let kib = |bytes: Option<u64>| bytes.map_or("?".to_owned(), |bytes| format!("{} KiB", bytes >> 10));
            println!(
                "{what} {n}: {} in the second quarter, {} in the last, at most {}",
                kib(second),
                kib(last),
                kib(Some(most))
            );
            assert!(most < MEMORY_BYTES, "{what} {n}: {most} bytes");
            // With few commands there may be a quarter that nobody has looked at.
            if let (Some(second), Some(last)) = (second, last) {
                assert!(last < second + GROWTH_BYTES, "{what} {n}: {second} bytes half-way, {last} in the end");
            }
        }
    }
}

/// Whatever was begun at either of two machines comes to an end, and one of them, which is given, has the guest.
fn settled_pair(machines: &[Machine; 2]) -> &Machine {
    until("everything has ended", PATIENCE, || {
        let is_over = |machine: &Machine| {
            // Refused where the guest is released already: then the migration ends by itself.
            let _ = machine.try_execute("migrate_cancel", json!({}));
            machine.report().is_none_or(|report| {
                let waits = report.side == Side::Destination && report.status == Status::Setup;
                report.status.is_final() || waits
            })
        };
        machines.iter().all(is_over).then_some(())
    });
    let here: Vec<&Machine> =
        machines.iter().filter(|machine| ["running", "paused"].contains(&machine.state().as_str())).collect();
    assert_eq!(here.len(), 1, "{:?}", machines.each_ref().map(Machine::state));
    here[0].execute("cont", json!({}));
    here[0]
}

/// Nothing is left of what clients have had done: `before` are descriptors and threads, before the first came.
fn check_leftovers(machine: &Machine, before: (usize, usize)) {
    for n in 0..5 {
        let _ = machine.try_execute("closefd", json!({"fdname": format!("fd{n}")}));
    }
    let pid = machine.pid();
    // What a migration holds is as before: one side waits, the guest's side has none or had one.
    let settled = until_settled(|| (descriptors(pid), threads(pid)));
    assert!(
        settled.0 <= before.0 + 8 && settled.1 <= before.1 + 4,
        "{}: {before:?} before, {settled:?} after",
        machine.name
    );
}

/// Two machines, the first with a guest, and what each holds before anybody does anything.
fn pair(directory: &Path, memory: &str, incoming: &str) -> ([Machine; 2], [(usize, usize); 2]) {
    let workload = "pattern=uniform,rate=20M/s,working-set=16M";
    let start = |name, role: [&str; 2]| {
        Machine::start_in(name, directory, &[&["--memory", memory], &role[..]].concat(), &ONE_ARENA)
    };
    let machines = [start("source", ["--workload", workload]), start("destination", ["--incoming", incoming])];
    let held = machines.each_ref().map(|machine| {
        machine.execute("query-status", json!({}));
        (descriptors(machine.pid()), threads(machine.pid()))
    });
    (machines, held)
}

#[test]
fn clients_of_whom_nothing_good_comes() {
    let _turn = turn();
    let begun = Instant::now();
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (machines, held) = pair(directories[0].path(), "64M", "tcp:127.0.0.1:0");
    let (others, others_held) = pair(directories[1].path(), "32M", "defer");
    let incoming = ["a", "b"].map(|name| format!("unix:{}", directories[1].path().join(name).display()));
    let commands = number("DUNLIN_TEST_COMMANDS").unwrap_or(COMMANDS);
    let mut random = Random::new("hostile clients");
    let changing = [0, 1].map(|side| {
        let incoming = &incoming;
        move |random: &mut Random| changing_command(random, &incoming[side], &incoming[1 - side])
    });
    // Of each pair.
    let sent = [AtomicU64::new(0), AtomicU64::new(0)];
    let end = AtomicBool::new(false);
    let (answers, moves, moves_of_others, memories) = thread::scope(|threads| {
        let mut clients = Vec::new();
        for n in 0..CLIENTS + CHANGING_CLIENTS {
            let random = Random::seeded(random.next());
            let side = n as usize % 2;
            let (machine, commands_of, commands, sent): (_, Commands<'_>, _, _) = if n < CLIENTS {
                (&machines[side], &command, commands, &sent[0])
            } else {
                (&others[side], &changing[side], commands, &sent[1])
            };
            clients.push(threads.spawn(move || be_hostile(machine, commands_of, commands, random, sent)));
        }
        let moving = threads.spawn(|| move_about(&machines, &end));
        let counting = threads.spawn(|| count_moves(&others, &end));
        let watching = [(&machines, &sent[0]), (&others, &sent[1])].map(|(pair, sent)| {
            let (pids, end) = (pair.each_ref().map(Machine::pid), &end);
            threads.spawn(move || Memory::watch(pids, sent, end))
        });
        let answers: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
        end.store(true, Ordering::Release);
        let answers: u64 = answers.into_iter().map(|answers| answers.unwrap()).sum();
        let memories = watching.map(|memory| memory.join().unwrap());
        (answers, moving.join().unwrap(), counting.join().unwrap(), memories)
    });
    let sent: u64 = sent.iter().map(|sent| sent.load(Ordering::Relaxed)).sum();
    println!(
        "{sent} commands, {answers} answers, {moves} moves and {moves_of_others} of the second pair, {:?}",
        begun.elapsed()
    );
    machines[(moves % 2) as usize].verified();
    println!("the second pair's guest: {}", settled_pair(&others).verified());
    for (memory, what) in memories.iter().zip(["first pair", "second pair"]) {
        memory.check(what);
    }
    for (machine, before) in machines.iter().zip(held).chain(others.iter().zip(others_held)) {
        check_leftovers(machine, before);
    }
}

/// It is refused once, without being kept, and the next command is answered.
#[test]
fn a_line_of_a_hundred_megabytes() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::source(directory.path(), "16M", "idle", &[]);
    machine.execute("query-status", json!({}));
    let before = memory_bytes(machine.pid());
    let mut client = Client::connect(&machine.qmp, &command, &mut Random::seeded(0));
    client.synchronise();
    let answers = client.answers;
    client.write(b"{\"execute\": \"");
    for _ in 0..100 {
        client.write(&vec![b'x'; 1 << 20]);
    }
    let most = memory_bytes(machine.pid());
    client.write(b"\"}\n");
    client.synchronise();
    // Of the line, of the byte 0xFF, and of the command.
    assert_eq!(client.answers - answers, 3);
    assert!(most < before + (8 << 20), "{before} before, {most} then");
}

/// Looks until nothing changes for a while.
fn until_settled<T: PartialEq>(look: impl Fn() -> T) -> T {
    let mut last = look();
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(500) {
        thread::sleep(Duration::from_millis(20));
        let now = look();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}
