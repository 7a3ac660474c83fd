//! Migrations that go well: 200 random ones, back and forth, every transport, pacing, and nothing left behind.
//!
//! `DUNLIN_TEST_RUNS` changes the number of random migrations.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::proxy::{Harm, Moment, Proxy, Way};
use common::{MIB, Random, empty, move_guest, parameters, runs, source, splice, until};
use dunlin::{Destination, Source, Status, Uri};

#[test]
fn random_migrations() {
    let count = runs(200);
    let mut random = Random(2026);
    let directory = tempfile::tempdir().unwrap();
    for run in 0..count {
        let memory = (1 + random.below(48)) * MIB + random.below(256) * 4096;
        let vcpus = 1 + random.below(4) as u32;
        let workload = match random.below(8) {
            0 => "idle".to_owned(),
            _ => format!(
                "pattern={},content={},rate={}M/s,working-set={}",
                random.pick(&["uniform", "sequential", "zipf", "hotcold"]),
                random.pick(&["random", "text", "sparse", "counter"]),
                1 + random.below(400),
                4096 + random.below(memory.min(16 * MIB)),
            ),
        };
        let channels = *random.pick(&["1", "2", "3", "4", "8", "16"]);
        let uri = match random.below(2) {
            0 => "tcp:127.0.0.1:0".to_owned(),
            _ => format!("unix:{}/{run}.sock", directory.path().display()),
        };
        let seed = random.next();
        let set = [
            ("multifd-channels", channels),
            ("multifd-compression", *random.pick(&["none", "lz4", "zstd"])),
            ("xbzrle", *random.pick(&["off", "on"])),
            ("integrity", *random.pick(&["none", "checksum"])),
        ];
        let what = format!("run {run}: {memory} bytes, {vcpus} vCPUs, {workload}, {set:?}, {uri}, seed {seed}");
        let (from, to) = (source(memory, vcpus, &workload, seed), empty(memory, vcpus));
        std::thread::sleep(Duration::from_millis(random.below(15)));
        let (here, there) = move_guest(&from, &to, &uri, &parameters(&set));
        assert!(to.guest.is_running(), "{what}");
        to.assert_good(&what);
        assert_eq!(here.ram.pages, there.ram.pages, "{what}: both sides count the same pages");
        assert_eq!(here.rounds, there.rounds, "{what}: both sides report the same rounds");
        assert_eq!(here.ram.remaining_bytes, 0);
        let pages = here.ram.pages.total();
        assert!(pages * 4096 >= memory, "{what}: every page travelled");
    }
    println!("{count} random migrations, all verified");
}

/// A → B → A → B …: content and counters are kept, and a guest that has gone may come back.
#[test]
fn back_and_forth() {
    let workload = "pattern=uniform,content=random,rate=100M/s,working-set=8M";
    let (a, b) = (source(32 * MIB, 2, workload, 5), empty(32 * MIB, 2));
    let mut before = a.machine.verify().unwrap();
    for turn in 0..10 {
        let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
        move_guest(from, to, "tcp:127.0.0.1:0", &parameters(&[]));
        assert!(to.guest.is_running() && !from.guest.is_running() && from.guest.cont().is_err());
        std::thread::sleep(Duration::from_millis(20));
        let now = to.machine.verify().unwrap();
        assert!(now.is_good(), "turn {turn}: {now}");
        assert!(now.steps > before.steps && now.device_ticks > before.device_ticks, "turn {turn}: counters go on");
        before = now;
    }
}

/// A guest that was paused arrives paused.
#[test]
fn a_paused_guest_stays_paused() {
    let (from, to) = (source(8 * MIB, 1, "rate=50M/s", 1), empty(8 * MIB, 1));
    std::thread::sleep(Duration::from_millis(10));
    from.guest.stop().unwrap();
    let steps = from.machine.steps();
    let (report, _) = move_guest(&from, &to, "tcp:127.0.0.1:0", &parameters(&[]));
    assert_eq!(report.guest, dunlin::GuestPlace::PausedAtDestination);
    assert!(!to.guest.is_running());
    assert_eq!(to.machine.steps(), steps);
    to.assert_good("paused");
    to.guest.cont().unwrap();
    until("it runs on", || to.machine.steps() > steps);
}

#[test]
fn over_ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        println!("skipped: no IPv6 here");
        return;
    }
    for uri in ["tcp:[::1]:0", "tcp:localhost:0", "tcp::0"] {
        let (from, to) = (source(4 * MIB, 1, "idle", 1), empty(4 * MIB, 1));
        move_guest(&from, &to, uri, &parameters(&[]));
        to.assert_good(uri);
    }
}

/// One connection, handed over as a descriptor, carries control and pages.
#[test]
fn over_a_descriptor() {
    let (here, there) = UnixStream::pair().unwrap();
    let (from, to) = (source(16 * MIB, 2, "rate=100M/s,working-set=4M", 3), empty(16 * MIB, 2));
    let destination = to.listen(&format!("fd:{}", there.as_raw_fd()), &parameters(&[]));
    let migration = from.migrate(&format!("fd:{}", here.as_raw_fd()).parse().unwrap(), &parameters(&[]));
    let report = migration.wait();
    assert_eq!(report.status, Status::Completed, "{:?} {:?}", report.error, destination.report());
    assert_eq!(report.channels.len(), 1);
    assert_eq!(destination.wait().status, Status::Completed);
    to.assert_good("fd");

    let file = tempfile::tempfile().unwrap();
    let other = source(4 * MIB, 1, "idle", 1);
    for (uri, reason) in [
        (format!("fd:{}", file.as_raw_fd()), "not a connected stream socket"),
        ("fd:987654".to_owned(), "Bad file descriptor"),
    ] {
        // At once, and what is refused is not in the way of another.
        let message = Source::start(&other.guest, &uri.parse().unwrap(), &parameters(&[])).unwrap_err().to_string();
        assert!(message.contains(reason) && message.ends_with("running at the source"), "{message}");
        assert!(Destination::listen(&empty(4 * MIB, 1).guest, &uri.parse().unwrap(), &parameters(&[])).is_err());
    }
}

/// A command on each side, both of which connect to a meeting point: neither side listens or dials itself.
#[test]
fn over_commands() {
    if std::process::Command::new("bash").arg("-c").arg("exit 0").status().is_err() {
        println!("skipped: no bash, which the commands of this test are written for");
        return;
    }
    let meeting = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = meeting.local_addr().unwrap().port();
    let uri = format!("exec:exec bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; cat <&3 & cat >&3'");
    let relay = std::thread::spawn(move || {
        let (first, _) = meeting.accept().unwrap();
        let (second, _) = meeting.accept().unwrap();
        splice(first, second);
    });
    let (from, to) = (source(16 * MIB, 1, "rate=50M/s,working-set=4M", 3), empty(16 * MIB, 1));
    let destination = to.listen(&uri, &parameters(&[]));
    let migration = from.migrate(&uri.parse().unwrap(), &parameters(&[]));
    let report = migration.wait();
    assert_eq!(report.status, Status::Completed, "{:?} {:?}", report.error, destination.report());
    to.assert_good("exec");
    drop((migration, destination));
    relay.join().unwrap();

    let other = source(4 * MIB, 1, "idle", 1);
    let report = other.migrate(&"exec:exit 3".parse().unwrap(), &parameters(&[])).wait();
    let message = report.error.unwrap().message;
    assert!(message.contains("exec:exit 3") && message.ends_with("running at the source"), "{message}");
}

/// Within 5 % of what is asked for, over a second, from 1 MB/s up; counted outside, by a proxy; changed under way.
#[test]
fn keeps_the_bandwidth_limit() {
    let (from, to) = (source(64 * MIB, 1, "idle", 9), empty(64 * MIB, 1));
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let proxy = Proxy::start(destination.local_uri(), Moment::Before(0), Harm::None);
    let mut wanted = parameters(&[("max-bandwidth", "1MB/s"), ("multifd-channels", "4")]);
    let migration = from.migrate(&proxy.uri, &wanted);
    until("pages flow", || proxy.bytes(Way::ToDestination) > 100_000);
    for rate in [1_000_000u64, 3_000_000, 10_000_000] {
        wanted.max_bandwidth = rate;
        migration.set_parameters(&wanted).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        // The best of three seconds: what runs beside this test takes the processor away, and gives it back.
        let error = (0..3)
            .map(|_| {
                let (before, began) = (proxy.bytes(Way::ToDestination), Instant::now());
                std::thread::sleep(Duration::from_secs(1));
                let sent = proxy.bytes(Way::ToDestination) - before;
                (sent as f64 / began.elapsed().as_secs_f64() / rate as f64 - 1.0).abs()
            })
            .fold(f64::INFINITY, f64::min);
        println!("max-bandwidth {rate}: off by {:.2} %", error * 100.0);
        assert!(error < 0.05, "{rate} bytes/s: off by {:.1} %", error * 100.0);
    }
    wanted.multifd_channels = 9;
    assert!(migration.set_parameters(&wanted).is_err(), "not live");
    wanted.multifd_channels = 4;
    wanted.max_bandwidth = 0;
    migration.set_parameters(&wanted).unwrap();
    assert_eq!(migration.wait().status, Status::Completed);
    to.assert_good("after pacing");
}

fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// Descriptors, threads and mappings of this process. Mappings that the allocator keeps are not counted.
fn resources() -> [usize; 3] {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let own = maps.lines().filter(|line| line.contains("memfd:") || line.contains("userfaultfd")).count();
    [count("/proc/self/fd"), count("/proc/self/task"), own]
}

/// Run in a process of its own, where nothing else opens or closes anything.
#[test]
fn nothing_is_left_behind() {
    const MARK: &str = "DUNLIN_TEST_LEAK";
    if std::env::var_os(MARK).is_none() {
        let me = std::env::current_exe().unwrap();
        let status = std::process::Command::new(me)
            .args(["--exact", "nothing_is_left_behind", "--nocapture"])
            .env(MARK, "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let once = |run: u64| {
        let (from, to) = (source(4 * MIB, 2, "rate=100M/s,working-set=2M", run), empty(4 * MIB, 2));
        let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
        if run % 4 == 3 {
            // A migration that fails leaves nothing either.
            let proxy = Proxy::start(destination.local_uri(), Moment::Byte(Way::ToDestination, 100_000), Harm::Cut);
            assert_eq!(from.migrate(&proxy.uri, &parameters(&[])).wait().status, Status::Failed);
            from.assert_good("after a cut");
        } else {
            let migration = from.migrate(destination.local_uri(), &parameters(&[]));
            assert_eq!(migration.wait().status, Status::Completed);
            to.assert_good("leak");
        }
    };
    once(0);
    once(3);
    let before = resources();
    (0..100).for_each(once);
    let after = resources();
    println!("descriptors, threads, mappings: {before:?} before 100 migrations, {after:?} after");
    assert_eq!(before, after);
}

/// Two migrations in one process do not know of each other.
#[test]
fn side_by_side() {
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                let (from, to) = (source(16 * MIB, 1, "rate=50M/s,working-set=4M", seed), empty(16 * MIB, 1));
                move_guest(&from, &to, "tcp:127.0.0.1:0", &parameters(&[]));
                to.assert_good("side by side");
            });
        }
    });
}

#[test]
fn one_guest_one_migration() {
    let (from, to) = (source(32 * MIB, 1, "idle", 1), empty(32 * MIB, 1));
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let slow = parameters(&[("max-bandwidth", "1M/s")]);
    let first = from.migrate(destination.local_uri(), &slow);
    let uri: Uri = "tcp:127.0.0.1:1".parse().unwrap();
    let error = dunlin::Source::start(&from.guest, &uri, &slow).unwrap_err().to_string();
    assert!(error.contains("running already") && error.ends_with("running at the source"), "{error}");
    let error = dunlin::Destination::listen(&from.guest, &uri, &slow).unwrap_err().to_string();
    assert!(error.contains("is here already"), "{error}");
    let error = dunlin::Source::start(&to.guest, &uri, &slow).unwrap_err().to_string();
    assert!(error.contains("not here yet"), "{error}");
    first.cancel().unwrap();
    assert_eq!(first.wait().status, Status::Cancelled);
    assert!(from.guest.is_running());
    let mut nobody = TcpStream::connect(("127.0.0.1", port(destination.local_uri()))).unwrap();
    drop(nobody.write_all(b"x"));
    drop(nobody.read(&mut [0]));
}

fn port(uri: &Uri) -> u16 {
    match uri {
        Uri::Tcp { port, .. } => *port,
        other => panic!("{other}"),
    }
}
