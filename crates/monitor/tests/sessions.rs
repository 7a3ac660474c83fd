//! What clients have beside each other and beside their commands: events, out-of-band commands, descriptors, TCP, and
//! what becomes of those that do not read.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![allow(dead_code, reason = "each test binary uses a part of what is common")]

mod common;

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::{Raw, Served, serve, serve_tiny, tiny};
use dunlin::{Guest, GuestEnd};
use dunlin_monitor::{Address, Client, Server, ShutdownCause, Verification, Vm};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

fn event(mut line: Value) -> Value {
    let timestamp = line.as_object_mut().unwrap().remove("timestamp").unwrap();
    assert!(
        timestamp["seconds"].as_u64().unwrap() > 1_600_000_000
            && timestamp["microseconds"].as_u64().unwrap() < 1_000_000
    );
    line
}

/// A machine whose check of itself lasts until it is told to end.
fn serve_slow() -> (Served, mpsc::Sender<()>) {
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let verify = move || {
        released.lock().unwrap().recv()?;
        Ok(Verification { good: true, report: json!({}), summary: String::new() })
    };
    (serve(Vm::new(Guest::new(tiny()), Some(Box::new(verify)))), release)
}

fn with_oob(served: &Served) -> Raw {
    let mut raw = Raw::connect(served);
    raw.line();
    let negotiate = r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#;
    assert_eq!(raw.ask(negotiate), json!({"return": {}}));
    raw
}

#[test]
fn events_reach_every_client_before_the_reply() {
    let served = serve_tiny();
    let mut waiting = Raw::connect(&served);
    let mut others: Vec<_> = (0..3).map(|_| Raw::negotiated(&served)).collect();
    let mut raw = with_oob(&served);
    for (command, name) in [("cont", "RESUME"), ("stop", "STOP")] {
        raw.write(&json!({"execute": command, "id": command}).to_string());
        assert_eq!(event(raw.line()), json!({"event": name}));
        assert_eq!(raw.line(), json!({"return": {}, "id": command}));
        for other in &mut others {
            assert_eq!(event(other.line()), json!({"event": name}));
        }
    }
    // Started by the VMM itself.
    served.vm.cont().unwrap();
    assert_eq!(event(raw.line()), json!({"event": "RESUME"}));
    // One that has not negotiated hears nothing of all that.
    waiting.line();
    assert_eq!(waiting.ask(r#"{"execute": "qmp_capabilities"}"#), json!({"return": {}}));

    let mut client = Client::connect(&served.path).unwrap();
    client.execute("stop", json!({})).unwrap();
    assert_eq!(event(client.next_event(Duration::ZERO).unwrap().unwrap()), json!({"event": "STOP"}));
    assert_eq!(client.next_event(Duration::from_millis(20)).unwrap(), None);
    client.execute("query-status", json!({})).unwrap();
}

/// The process's end comes behind all that happened before, once, and no stop of the guest comes behind it.
#[test]
fn the_end_is_told_last() {
    for (cause, guest, reason) in [
        (ShutdownCause::HostSignal, false, "host-signal"),
        (ShutdownCause::GuestShutdown, true, "guest-shutdown"),
        (ShutdownCause::GuestReset, true, "guest-reset"),
        (ShutdownCause::GuestPanic, true, "guest-panic"),
    ] {
        let served = serve_tiny();
        let mut raw = with_oob(&served);
        // Whatever the guest itself tells, nobody has delivered.
        served.vm.guest().cont().unwrap();
        served.vm.guest().stop().unwrap();
        served.vm.guest().cont().unwrap();
        served.vm.announce_shutdown(cause);
        served.vm.announce_shutdown(ShutdownCause::HostSignal);
        assert_eq!(served.vm.shut_down(Duration::from_secs(1)).map(|report| report.status), None);
        let told: Vec<_> = (0..4).map(|_| event(raw.line())).collect();
        let ended = json!({"event": "SHUTDOWN", "data": {"guest": guest, "reason": reason}});
        assert_eq!(told, [json!({"event": "RESUME"}), json!({"event": "STOP"}), json!({"event": "RESUME"}), ended]);
        // Nothing came behind that.
        raw.write(r#"{"execute": "query-name", "id": "last"}"#);
        assert_eq!(raw.line(), json!({"return": {}, "id": "last"}));
    }
}

/// A guest that has ended by itself, before its process does.
#[test]
fn a_guest_that_has_ended() {
    let served = serve_tiny();
    let mut raw = with_oob(&served);
    served.vm.cont().unwrap();
    assert_eq!(event(raw.line()), json!({"event": "RESUME"}));
    served.vm.guest().ended(GuestEnd::PoweredOff).unwrap();
    assert_eq!(event(raw.line()), json!({"event": "STOP"}));
    let status = json!({"return": {"running": false, "status": "shutdown"}});
    assert_eq!(raw.ask(r#"{"execute": "query-status"}"#), status);
    let refused = raw.ask(r#"{"execute": "cont"}"#);
    let why = refused["error"]["desc"].as_str().unwrap();
    assert_eq!(why, "the guest has ended (powered off) and cannot be started or migrated any more: run it anew");
    // It can be stopped, which is no news.
    assert_eq!(raw.ask(r#"{"execute": "stop"}"#), json!({"return": {}}));
    assert_eq!(raw.ask(r#"{"execute": "query-status"}"#), status);
    let command = r#"{"execute": "human-monitor-command", "arguments": {"command-line": "info status"}}"#;
    assert_eq!(raw.ask(command), json!({"return": "VM status: paused (shutdown)\r\n"}));
}

#[test]
fn out_of_band_while_others_wait() {
    let (served, release) = serve_slow();
    let mut raw = with_oob(&served);
    raw.write(r#"{"execute": "x-verify", "id": 0}"#);
    for id in 1..=8 {
        raw.write(&json!({"execute": "query-name", "id": id}).to_string());
    }
    // Answered at once, before anything that waits.
    let answer = raw.ask(r#"{"exec-oob": "migrate-pause", "id": "oob"}"#);
    assert_eq!(answer["id"], "oob");
    assert_eq!(answer["error"]["class"], "GenericError");
    let refused = raw.ask(r#"{"exec-oob": "query-name", "id": "no"}"#);
    assert_eq!(refused["error"]["desc"], "The command query-name does not support OOB");
    // No more may wait: nothing is read until one is done, and then all of it.
    raw.write(r#"{"execute": "query-name", "id": 9} {"exec-oob": "migrate-pause", "id": "late"}"#);
    thread::sleep(Duration::from_millis(50));
    release.send(()).unwrap();
    let ids: Vec<Value> = (0..11).map(|_| raw.line()["id"].clone()).collect();
    let in_band: Vec<&Value> = ids.iter().filter(|id| id.is_number()).collect();
    assert_eq!(in_band, (0..10).map(Value::from).collect::<Vec<_>>().iter().collect::<Vec<_>>());
    assert_eq!(ids[0], 0, "{ids:?}");
    assert!(ids.contains(&json!("late")));
    // Without the capability it is not even known.
    let mut plain = Raw::negotiated(&served);
    let answer = plain.ask(r#"{"exec-oob": "migrate-pause"}"#);
    assert_eq!(answer["error"]["desc"], "QMP input member 'exec-oob' is unexpected");
}

fn send_with_descriptor(raw: &Raw, text: &str, descriptor: impl AsFd) {
    let descriptors = [descriptor.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    rustix::net::sendmsg(raw.0.get_ref(), &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL).unwrap();
}

/// Whether the other end of a pair is closed.
fn is_closed(mut end: &UnixStream) -> bool {
    end.set_nonblocking(true).unwrap();
    matches!(end.read(&mut [0]), Ok(0))
}

#[test]
fn descriptors_are_kept_used_and_closed() {
    let served = serve_tiny();
    let mut raw = Raw::negotiated(&served);
    let getfd = r#"{"execute": "getfd", "arguments": {"fdname": "a"}}"#;
    // Together with its command, ahead of it, and behind another command in one write.
    let ahead =
        [(getfd.to_owned(), ""), (" ".to_owned(), getfd), (format!(r#"{{"execute": "query-name"}}{getfd}"#), "")];
    for (with, then) in ahead {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_with_descriptor(&raw, &with, &theirs);
        drop(theirs);
        raw.write(then);
        for _ in with.matches("execute").chain(then.matches("execute")) {
            assert_eq!(raw.line(), json!({"return": {}}), "{with}");
        }
        assert!(!is_closed(&ours), "{with}");
        // Another client may use it.
        let mut other = Raw::negotiated(&served);
        assert_eq!(other.ask(&getfd.replace("getfd", "closefd")), json!({"return": {}}));
        assert!(is_closed(&ours));
    }
    // With a command that takes none: closed when the next comes.
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_with_descriptor(&raw, r#"{"execute": "query-name"}"#, &theirs);
    drop(theirs);
    raw.line();
    raw.ask(r#"{"execute": "query-name"}"#);
    assert!(is_closed(&ours));
    assert_eq!(raw.ask(getfd)["error"]["class"], "GenericError");
    // A client that goes takes those with it that it has not given a name.
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_with_descriptor(&raw, " ", &theirs);
    drop((raw, theirs));
    let begun = Instant::now();
    while !is_closed(&ours) {
        assert!(begun.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_named_descriptor_is_used_up_unless_the_command_is_refused() {
    let served = serve_tiny();
    let mut raw = Raw::negotiated(&served);
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_with_descriptor(&raw, r#"{"execute": "getfd", "arguments": {"fdname": "a"}}"#, &theirs);
    drop(theirs);
    raw.line();
    let ask =
        |raw: &mut Raw, command: &str| raw.ask(&json!({"execute": command, "arguments": {"uri": "fd:a"}}).to_string());
    // The guest is here: it cannot come in.
    assert_eq!(ask(&mut raw, "migrate-incoming")["error"]["class"], "GenericError");
    assert!(!is_closed(&ours));
    assert_eq!(ask(&mut raw, "migrate"), json!({"return": {}}));
    assert_eq!(ask(&mut raw, "migrate")["error"]["class"], "GenericError");
    // This machine's memory cannot be tracked, so it comes to nothing, and nothing is left of the descriptor.
    drop(raw);
    let mut client = Client::connect(&served.path).unwrap();
    client.execute("migrate_cancel", json!({})).unwrap();
    let begun = Instant::now();
    while !is_closed(&ours) {
        assert!(begun.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(5));
    }
}

/// An `fd:` has one connection. When that has come to nothing nobody is told to wait any more, and another may be tried.
#[test]
fn a_destination_whose_only_connection_came_to_nothing() {
    let served = serve(Vm::new(Guest::awaited(tiny()), None));
    let mut raw = Raw::negotiated(&served);
    let wait_at = |raw: &mut Raw, theirs: UnixStream| {
        send_with_descriptor(raw, r#"{"execute": "getfd", "arguments": {"fdname": "a"}}"#, &theirs);
        assert_eq!(raw.line(), json!({"return": {}}));
        raw.write("{\"execute\": \"migrate-incoming\", \"arguments\": {\"uri\": \"fd:a\"}}\n");
        assert_eq!(event(raw.line()), json!({"event": "MIGRATION", "data": {"status": "setup"}}));
        assert_eq!(raw.line(), json!({"return": {}}));
    };
    let events = json!({"capabilities": [{"capability": "events", "state": true}]});
    let set = json!({"execute": "migrate-set-capabilities", "arguments": events}).to_string();
    assert_eq!(raw.ask(&set), json!({"return": {}}));
    let info = r#"{"execute": "human-monitor-command", "arguments": {"command-line": "info migrate"}}"#;
    let (ours, theirs) = UnixStream::pair().unwrap();
    wait_at(&mut raw, theirs);
    assert_eq!(raw.ask(r#"{"execute": "query-migrate"}"#)["return"]["status"], "setup");
    let said = raw.ask(info)["return"].as_str().unwrap().to_owned();
    assert!(said.starts_with("waiting for a migration on fd:"), "{said}");

    drop(ours);
    assert_eq!(event(raw.line()), json!({"event": "MIGRATION", "data": {"status": "failed"}}));
    let ended = raw.ask(r#"{"execute": "query-migrate"}"#)["return"].clone();
    assert_eq!(ended["status"], "failed");
    let why = ended["error-desc"].as_str().unwrap();
    assert!(why.contains("no migration can come in on fd:") && why.contains("the guest is at the source"), "{why}");
    assert_eq!(ended.get("downtime"), None);
    let said = raw.ask(info)["return"].as_str().unwrap().to_owned();
    assert!(said.contains("failed: ") && said.contains(why) && !said.contains("waiting for"), "{said}");
    let report = raw.ask(r#"{"execute": "query-migration-report"}"#)["return"].clone();
    assert_eq!((&report["status"], &report["error"]["phase"]), (&json!("failed"), &json!("setup")));
    assert_eq!(raw.ask(r#"{"execute": "migrate_cancel"}"#), json!({"return": {}}));

    let (_ours, theirs) = UnixStream::pair().unwrap();
    wait_at(&mut raw, theirs);
    assert_eq!(raw.ask(r#"{"execute": "query-migrate"}"#)["return"]["status"], "setup");
}

#[test]
fn a_client_that_reads_late_gets_everything() {
    let served = serve_tiny();
    for mut raw in [Raw::negotiated(&served), with_oob(&served)] {
        let writer = raw.0.get_ref().try_clone().unwrap();
        let writing = thread::spawn(move || {
            for id in 0..20_000 {
                writeln!(&writer, "{}", json!({"execute": "query-migrate-parameters", "id": id})).unwrap();
            }
        });
        thread::sleep(Duration::from_millis(100));
        for id in 0..20_000 {
            assert_eq!(raw.line()["id"], id);
        }
        writing.join().unwrap();
    }
}

/// A client that never reads neither holds up another nor the machine's own events, and is cut off in the end.
#[test]
fn a_client_that_never_reads() {
    let served = serve_tiny();
    let deaf = Raw::negotiated(&served);
    let mut client = Client::connect(&served.path).unwrap();
    let begun = Instant::now();
    let mut rounds = 0;
    while !is_hung_up(&deaf) {
        for command in ["cont", "stop"] {
            client.execute(command, json!({})).unwrap();
        }
        rounds += 1;
        assert!(rounds < 100_000 && begun.elapsed() < Duration::from_secs(60), "{rounds} rounds");
    }
    client.execute("query-status", json!({})).unwrap();
}

fn is_hung_up(raw: &Raw) -> bool {
    let mut poll = [rustix::event::PollFd::new(raw.0.get_ref(), rustix::event::PollFlags::RDHUP)];
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut poll, Some(&none)).unwrap() == 1
}

#[test]
fn several_addresses_of_both_kinds() {
    let served = serve_tiny();
    let tcp = Server::start("tcp::0".parse::<Address>().unwrap(), &served.vm).unwrap();
    let six = Server::start("tcp:[::1]:0".parse::<Address>().unwrap(), &served.vm);
    let mut clients = vec![Client::connect(&served.path).unwrap(), Client::connect(tcp.address()).unwrap()];
    if let Ok(six) = &six {
        clients.push(Client::connect(six.address()).unwrap());
    }
    for client in &mut clients {
        assert_eq!(client.execute("query-status", json!({})).unwrap()["status"], "paused");
    }
    clients[1].execute("cont", json!({})).unwrap();
    for client in &mut clients {
        let resumed = client.next_event(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(event(resumed), json!({"event": "RESUME"}));
    }
    let taken = Server::start(tcp.address(), &served.vm).unwrap_err().to_string();
    assert!(taken.contains("could not listen on tcp:127.0.0.1:"), "{taken}");
    // A descriptor cannot come that way.
    let refused = clients[1].execute("getfd", json!({"fdname": "a"})).unwrap_err().to_string();
    assert!(refused.contains("SCM_RIGHTS"), "{refused}");
    let address = tcp.address().clone();
    drop(tcp);
    assert!(clients[1].wait_until_closed(Duration::from_secs(5)));
    let error = Client::connect(&address).unwrap_err().to_string();
    assert!(error.starts_with(&format!("no machine answers at {address}")), "{error}");
}

/// Half a command and a hang-up, and a machine that ends with its clients connected: its threads let go of it.
#[test]
fn nothing_is_left() {
    let served = serve_tiny();
    let vm = Arc::downgrade(&served.vm);
    for _ in 0..50 {
        let raw = with_oob(&served);
        raw.write(r#"{"execute": "query-"#);
    }
    let _clients: Vec<_> = (0..10).map(|_| with_oob(&served)).collect();
    drop(served);
    let begun = Instant::now();
    while vm.upgrade().is_some() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(5));
    }
}
