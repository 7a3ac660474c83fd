//! Migrations over addresses that the other tests of processes do not use: IPv6 and Unix sockets.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::net::TcpListener;
use std::path::Path;

use common::{Machine, PATIENCE, turn, until};
use serde_json::json;

const WORKLOAD: &str = "pattern=zipf,rate=100M/s,working-set=16M,content=text";

/// Migrates over `incoming`, and has `check` look while both processes still live.
fn migrates(directory: &Path, incoming: &str, check: impl FnOnce()) -> String {
    let destination = Machine::start("destination", directory, &["--memory", "64M", "--incoming", incoming]);
    let source = Machine::source(directory, "64M", WORKLOAD, &["--vcpus", "1"]);
    let uri = destination.address();
    source.migrate(&uri);
    source.completed();
    destination.completed();
    assert_eq!(source.state(), "postmigrate");
    assert!(destination.is_running());
    println!("{uri}: {}", destination.verified());
    check();
    uri
}

#[test]
fn over_ipv6() {
    let _turn = turn();
    if let Err(error) = TcpListener::bind("[::1]:0") {
        println!("skipped: no IPv6: {error}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let uri = migrates(directory.path(), "tcp:[::1]:0", || ());
    assert!(uri.starts_with("tcp:[::1]:") && !uri.ends_with(":0"), "{uri}");
}

/// A name that stands for both families.
#[test]
fn over_a_name() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    migrates(directory.path(), "tcp:localhost:0", || ());
}

#[test]
fn over_a_unix_socket_with_a_space_in_its_name() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("to be migrated");
    // The destination listens until the source has said that it knows.
    let gone = || until("the socket's file is gone", PATIENCE, || (!path.exists()).then_some(()));
    migrates(directory.path(), &format!("unix:{}", path.display()), gone);
}

/// `--incoming defer`, and the address over QMP.
#[test]
fn told_later_where_to_listen() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let destination = Machine::start("destination", directory.path(), &["--memory", "64M", "--incoming", "defer"]);
    assert_eq!(destination.state(), "inmigrate");
    destination.execute("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}));
    let source = Machine::source(directory.path(), "64M", "idle", &[]);
    source.migrate(&destination.address());
    source.completed();
    destination.completed();
    destination.verified();
}
