//! Links that are slow, silent or changed under way: how much comes through, what is noticed and when, and what is said.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::line::{Flow, Line, Which};
use common::proxy::Way;
use common::{MIB, Side, empty, parameters, source, until};
use dunlin::{GuestPlace, Report, Source, Status};

/// A limit that is raised under way holds for the very next frame, and not when the time of what was paid for at the
/// old rate is over. One that is lowered holds as soon, and does not silence the link for what was sent before.
#[test]
fn a_changed_limit_holds_at_once() {
    let (from, to) = (source(64 * MIB, 1, "idle", 3), empty(64 * MIB, 1));
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    // Many channels: under a slow limit each of them waits behind all the others.
    let with = |rate: &str| parameters(&[("max-bandwidth", rate), ("multifd-channels", "32")]);
    let migration = from.migrate(destination.local_uri(), &with("50M/s"));
    let transferred = || migration.report().ram.transferred_bytes;
    let set = |rate: &str| migration.set_parameters(&with(rate)).unwrap();
    until("pages travel", || transferred() > MIB);
    set("4K/s");
    // A frame that each channel had paid for before still goes.
    std::thread::sleep(Duration::from_millis(500));
    let (before, began) = (transferred(), Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    let rate = (transferred() - before) as f64 / began.elapsed().as_secs_f64();
    println!("{rate:.0} bytes a second of 4096");
    assert!(rate < 32_768.0, "{rate:.0} bytes a second");
    let raised = Instant::now();
    set("1G/s");
    let report = migration.wait();
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert!(raised.elapsed() < Duration::from_secs(10), "{:?}", raised.elapsed());
    destination.wait();
    to.assert_good("after limits that changed");
}

/// A destination that acknowledges one channel's marks again and again has not acknowledged the other's.
#[test]
fn a_repeated_acknowledgement_ends_no_round() {
    let (from, to) = (source(4 * MIB, 1, "idle", 3), empty(4 * MIB, 1));
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let line = Line::repeating_acks(destination.local_uri(), 0);
    // What goes on channel 1 fits the sockets on the way, so that its worker has done its part.
    line.set(Which::Data(1), Way::ToDestination, Flow::Held);
    let migration = from.migrate(&line.uri, &parameters(&[("multifd-channels", "2")]));
    let arrived = || destination.report().channels.iter().map(|channel| channel.pages.total()).collect::<Vec<_>>();
    until("all of channel 0 has come", || arrived().first().is_some_and(|pages| *pages >= 512));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(migration.report().rounds_ended(), 0, "nothing has come on channel 1");
    line.set(Which::Data(1), Way::ToDestination, Flow::Free);
    let report = migration.wait();
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert!(report.rounds[0].seconds >= 0.5, "{:?}", report.rounds[0]);
    destination.wait();
    to.assert_good("after repeated acknowledgements");
}

/// Waits for a migration to fail, for no longer than `within`; what is said must name `channel`, and the guest runs on.
fn fails(from: &Side, migration: &Source, channel: &str, within: Duration, what: &str) -> Report {
    let began = Instant::now();
    until(&format!("{what}: it fails"), || migration.report().status.is_final());
    let (report, took) = (migration.report(), began.elapsed());
    let message = report.error.as_ref().map_or("", |error| error.message.as_str());
    println!("{what}: after {took:.2?}: {message}");
    assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::RunningAtSource), "{what}: {message}");
    assert!(message.contains(channel), "{what}: {channel} is not named: {message}");
    assert!(took < within, "{what}: {took:?}");
    assert!(from.guest.is_running(), "{what}");
    report
}

const BUSY: &str = "pattern=uniform,content=random,rate=20M/s,working-set=2M";
/// What a second may become on a machine that is busy with other things.
const SOON: Duration = Duration::from_secs(4);

/// A data channel through which nothing comes any more, either way or both, while all others live.
#[test]
fn a_dead_channel_is_found_while_the_guest_runs() {
    let ways = [&[Way::ToDestination][..], &[Way::ToSource], &[Way::ToDestination, Way::ToSource]];
    for ways in ways {
        let what = format!("swallowed {ways:?}");
        let (from, to) = (source(64 * MIB, 1, BUSY, 3), empty(64 * MIB, 1));
        let set = parameters(&[("link-timeout", "1s"), ("max-bandwidth", "10M/s")]);
        let destination = to.listen("tcp:127.0.0.1:0", &set);
        let line = Line::start(destination.local_uri());
        let migration = from.migrate(&line.uri, &set);
        until("it flows", || destination.report().channels.iter().filter(|c| c.pages.total() > 0).count() == 2);
        ways.iter().for_each(|way| line.set(Which::Data(1), *way, Flow::Swallowed));
        let report = fails(&from, &migration, "data channel 1", SOON, &what);
        assert_eq!(report.downtime_seconds, 0.0, "{what}");
        until("the destination knows", || destination.report().status.is_final());
        let message = destination.report().error.unwrap().message;
        assert!(message.contains("data channel 1"), "{what}: {message}");
    }
}

/// The same while the last pages travel, with everything at its defaults: the guest stands still for a second or so.
#[test]
fn a_dead_channel_is_found_while_the_guest_is_stopped() {
    for which in [Which::Data(1), Which::Control] {
        let what = format!("{which:?} swallowed in the last round");
        let (from, to) = (source(4 * MIB, 1, BUSY, 3), empty(4 * MIB, 1));
        let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
        let line = Line::start(destination.local_uri());
        // The last round has 2 MiB to send, which takes four seconds.
        let slow = parameters(&[("max-bandwidth", "500K/s"), ("downtime-limit", "20s")]);
        let migration = from.migrate(&line.uri, &slow);
        until("the guest is stopped", || migration.report().status == Status::Device);
        line.set_both(which, Flow::Swallowed);
        let name = if which == Which::Control { "the control connection" } else { "data channel 1" };
        let report = fails(&from, &migration, name, SOON, &what);
        assert!(report.downtime_seconds < 5.0, "{}", report.downtime_seconds);
        from.assert_good(&what);
    }
}

/// Connections that a firewall forgets while the migration waits to be continued. It is noticed while it waits; and by
/// who has it go on before that.
#[test]
fn forgotten_in_pre_switchover() {
    for (which, waits) in
        [(Which::Data(1), true), (Which::Data(0), false), (Which::Control, true), (Which::Control, false)]
    {
        let what = format!("{which:?} forgotten, {}", if waits { "waiting" } else { "continued" });
        let (from, to) = (source(4 * MIB, 1, BUSY, 3), empty(4 * MIB, 1));
        let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
        let line = Line::start(destination.local_uri());
        let migration = from.migrate(&line.uri, &parameters(&[("pause-before-switchover", "on")]));
        until("it waits", || migration.report().status == Status::PreSwitchover);
        // Idle for longer than any limit: its heartbeats keep it.
        std::thread::sleep(Duration::from_millis(2500));
        assert_eq!(migration.report().status, Status::PreSwitchover);
        line.set_both(which, Flow::Swallowed);
        if !waits {
            migration.resume_switchover(Status::PreSwitchover).unwrap();
        }
        let name = match which {
            Which::Data(index) => format!("data channel {index}"),
            _ => "the control connection".to_owned(),
        };
        let report = fails(&from, &migration, &name, SOON, &what);
        // Nothing of the last round was sent.
        assert_eq!(report.device_state_bytes, 0, "{what}");
        from.assert_good(&what);
    }
}

/// Many channels that have nothing to do while one is at work are kept alive; and where they are forgotten all the same,
/// that is noticed before the guest is stopped.
#[test]
fn forgotten_beside_a_busy_channel() {
    let (from, to) = (source(16 * MIB, 1, "idle", 3), empty(16 * MIB, 1));
    let set = parameters(&[("link-timeout", "1s"), ("multifd-channels", "64"), ("max-bandwidth", "2M/s")]);
    let destination = to.listen("tcp:127.0.0.1:0", &set);
    let line = Line::start(destination.local_uri());
    let migration = from.migrate(&line.uri, &set);
    // 8 chunks of 2 MiB: of 64 channels, 56 have nothing to send.
    until("it flows", || migration.report().ram.pages.total() > 256);
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(migration.report().status, Status::Active, "{:?}", migration.report().error);
    line.set_both(Which::Data(63), Flow::Swallowed);
    let report = fails(&from, &migration, "data channel 63", SOON, "an idle channel of 64");
    assert_eq!(report.downtime_seconds, 0.0);
}

/// A channel at 10 KB/s is slow and not dead: it is said how slow, and the migration goes on for longer than the limit of
/// silence. The same channel dead is dead.
#[test]
fn slow_is_not_dead() {
    let (from, to) = (source(16 * MIB, 1, "idle", 3), empty(16 * MIB, 1));
    let set = parameters(&[("link-timeout", "1s")]);
    for then in [Flow::Swallowed, Flow::Free] {
        let destination = to.listen("tcp:127.0.0.1:0", &set);
        let line = Line::start(destination.local_uri());
        line.set(Which::Data(0), Way::ToDestination, Flow::Slow(10_000));
        let migration = from.migrate(&line.uri, &set);
        let slow = || migration.report().summary.contains("data channel 0 is slow");
        until("it is said that the channel is slow", slow);
        for _ in 0..40 {
            std::thread::sleep(Duration::from_millis(100));
            let report = migration.report();
            assert_eq!(report.status, Status::Active, "{:?}", report.error);
        }
        let report = migration.report();
        let speed = report.channels[0].link_bytes_per_second.unwrap();
        println!("{}", report.summary);
        assert!((5_000..20_000).contains(&speed), "{speed} bytes a second");
        line.set(Which::Data(0), Way::ToDestination, then);
        if then == Flow::Swallowed {
            fails(&from, &migration, "data channel 0", SOON, "slow, then dead");
            continue;
        }
        let report = migration.wait();
        assert_eq!(report.status, Status::Completed, "{:?}", report.error);
        destination.wait();
        to.assert_good("after a slow channel");
        return;
    }
}

/// What listens at `answer`'s port, once: says `first`, reads, says `then`, and closes or stays.
fn stranger(first: &'static [u8], then: &'static [u8], stays: bool) -> (String, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(first).unwrap();
        if !then.is_empty() || !stays {
            drop(stream.read(&mut [0; 4096]));
            drop(stream.write_all(then));
        }
        if stays {
            drop(stream.read_to_end(&mut Vec::new()));
        }
    });
    (uri, thread)
}

/// Something else listens at the destination's address: it is named, as soon as it is known.
#[test]
fn something_else_answers() {
    let from = source(4 * MIB, 1, "idle", 3);
    let soon = Duration::from_millis(2500);
    for (first, then, stays, named, within) in [
        (
            &b"SSH-2.0-OpenSSH_9.6p1 Ubuntu-3ubuntu13\r\n"[..],
            &b""[..],
            true,
            "this is SSH; it began with \"SSH-2.0-OpenSSH",
            soon,
        ),
        (b"", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", true, "this is an HTTP server", soon),
        (b"", b"HTTP/1.0 400 Bad Request\r\n\r\n", false, "this is an HTTP server", soon),
        (b"", b"\x15\x03\x01\x00\x02\x02\x46", false, "this is TLS", soon),
        (b"{\"QMP\": {\"version\": {\"qemu\": {}}}}\r\n", b"", true, "this is a QMP monitor", soon),
        (b"QEVM\x00\x00\x00\x03", b"", true, "this is a migration of QEMU", soon),
        (b"hello there\n", b"", true, "it began with \"hello there", soon),
        // As QEMU's destination does with what is not its own.
        (b"", b"", false, "without an answer", soon),
        (b"", b"", true, "said nothing for 3s", Duration::from_secs(6)),
    ] {
        let (uri, thread) = stranger(first, then, stays);
        let began = Instant::now();
        let report = from.migrate(&uri.parse().unwrap(), &parameters(&[])).wait();
        let (message, took) = (report.error.unwrap().message, began.elapsed());
        println!("{took:.2?}: {message}");
        assert!(message.contains(named) && message.contains(&uri), "{named}: {message}");
        assert!(took < within, "{named}: {took:?}");
        assert!(from.guest.is_running());
        thread.join().unwrap();
    }
    // And where something else connects.
    let to = empty(4 * MIB, 1);
    let destination = to.listen("tcp:127.0.0.1:0", &parameters(&[]));
    let dunlin::Uri::Tcp { port, .. } = destination.local_uri() else { panic!() };
    std::net::TcpStream::connect(("127.0.0.1", *port)).unwrap().write_all(b"QEVM\0\0\0\x03").unwrap();
    until("it is refused", || destination.report().refused_connections.count > 0);
    let latest = destination.report().refused_connections.latest.unwrap();
    assert!(latest.contains("a migration of QEMU"), "{latest}");
}

/// A command that is no link: how it ended, what it said, and what came from it.
#[test]
fn commands_that_are_no_link() {
    let flood = "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 4";
    for (command, words) in [
        ("exit 3", &["exited with status 3"][..]),
        ("echo no route to it >&2; exit 3", &["exited with status 3", "no route to it"]),
        ("/no/such/command", &["exited with status 127", "not found"]),
        ("kill -9 $$", &["was ended by signal 9"]),
        (
            "echo Welcome to this host; exit 0",
            &["not a Dunlin migration", "Welcome to this host", "exited with status 0"],
        ),
        ("echo Welcome to this host; sleep 30", &["not a Dunlin migration", "Welcome to this host", "still runs"]),
        (flood, &["exited with status 4", "the end"]),
    ] {
        let uri = format!("exec:{command}").parse().unwrap();
        let from = source(4 * MIB, 1, "idle", 3);
        let began = Instant::now();
        let migration = from.migrate(&uri, &parameters(&[]));
        let report = migration.wait();
        let message = report.error.unwrap().message;
        println!("{:.2?}: {:.300}", began.elapsed(), message);
        assert!(words.iter().all(|word| message.contains(word)), "{command}: {message}");
        assert!(message.len() < 3000 && message.lines().count() == 1, "{command}: {message}");
        drop(migration);
        assert!(began.elapsed() < Duration::from_secs(8), "{command}: {:?}", began.elapsed());
        assert!(from.guest.is_running());
        let to = empty(4 * MIB, 1);
        let destination = to.listen(&uri.to_string(), &parameters(&[]));
        until("it has come to nothing", || destination.report().refused_connections.count > 0);
        let latest = destination.report().refused_connections.latest.unwrap();
        assert!(words.iter().all(|word| latest.contains(word)), "{command}: {latest}");
    }
}

/// A destination that was given its connection waits for its source for as long as that takes, and runs a command once.
#[test]
fn a_given_connection_may_take_its_time() {
    let directory = tempfile::tempdir().unwrap();
    let runs = directory.path().join("runs");
    let (here, there) = UnixStream::pair().unwrap();
    let (over_fd, over_exec) = (empty(4 * MIB, 1), empty(4 * MIB, 1));
    let by_fd = over_fd.listen(&format!("fd:{}", there.as_raw_fd()), &parameters(&[]));
    let command = format!("exec:echo run >> {}; exec sleep 60", runs.display());
    let by_exec = over_exec.listen(&command, &parameters(&[]));
    // Longer than a stranger may.
    std::thread::sleep(Duration::from_millis(7500));
    assert_eq!((by_fd.report().status, by_exec.report().status), (Status::Setup, Status::Setup));
    assert_eq!(std::fs::read_to_string(&runs).unwrap(), "run\n");
    assert_eq!(by_exec.report().refused_connections.count, 0);
    let from = source(4 * MIB, 1, "idle", 3);
    let report = from.migrate(&format!("fd:{}", here.as_raw_fd()).parse().unwrap(), &parameters(&[])).wait();
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    by_fd.wait();
    over_fd.assert_good("over a descriptor that waited");
    // Its end is not waited for.
    let began = Instant::now();
    drop(by_exec);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}
