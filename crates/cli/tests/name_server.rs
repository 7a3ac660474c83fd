//! A name server that answers nothing: what waits for it can be given up, and nothing else waits.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{DUNLIN, PATIENCE, until};
use dunlin_monitor::Client;
use serde_json::json;

/// A process of its own with a name server of ours: `None` where that cannot be arranged.
fn with_name_server(script: &str, directory: &std::path::Path, arguments: &[&str]) -> Command {
    std::fs::write(directory.join("resolv.conf"), "nameserver 127.77.77.77\noptions timeout:20 attempts:3\n").unwrap();
    std::fs::write(directory.join("nsswitch.conf"), "hosts: dns\n").unwrap();
    let mount = format!(
        "mount --bind {0}/resolv.conf /etc/resolv.conf && {{ [ ! -e /etc/nsswitch.conf ] || mount --bind {0}/nsswitch.conf \
         /etc/nsswitch.conf; }} && {script}",
        directory.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &mount, DUNLIN]).args(arguments).stdin(Stdio::null());
    command
}

#[test]
fn a_name_server_that_answers_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let server = match UdpSocket::bind("127.77.77.77:53") {
        Ok(server) => server,
        Err(error) => {
            println!("skipped: no name server can be played here: {error}");
            return;
        }
    };
    let probe = with_name_server("true", directory.path(), &[]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        println!("skipped: a process cannot be given a name server of its own here");
        return;
    }
    let qmp = directory.path().join("qmp");
    let uri = format!("unix:{}", qmp.display());
    let parent = std::process::id().to_string();
    let run = ["run", "--memory", "16M", "--workload", "idle", "--qmp", &uri, "--exit-with-parent", &parent];
    let mut child = with_name_server("exec \"$0\" \"$@\"", directory.path(), &run).spawn().unwrap();
    let mut client = until("it answers", PATIENCE, || Client::connect(&qmp).ok());
    let mut execute = |command: &str, arguments| client.execute(command, arguments).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let status = |info: &serde_json::Value| info["status"].as_str().unwrap_or_default().to_owned();
    for round in 0..2 {
        execute("migrate", json!({"uri": "tcp:a-name-that-nobody-knows.example:4444"}));
        // It is being asked for, and will not be told.
        server.recv(&mut [0; 512]).unwrap();
        assert_eq!(status(&execute("query-migrate", json!({}))), "setup");
        let began = Instant::now();
        execute("migrate_cancel", json!({}));
        until("it is cancelled", PATIENCE, || {
            (status(&execute("query-migrate", json!({}))) == "cancelled").then_some(())
        });
        println!("cancelled after {:.2?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(1), "round {round}: {:?}", began.elapsed());
    }
    // One that is left alone ends by itself, at the latest when the link may not be silent any longer.
    execute("migrate-set-parameters", json!({"link-timeout": 700}));
    let began = Instant::now();
    execute("migrate", json!({"uri": "tcp:a-name-that-nobody-knows.example:4444"}));
    let info = until("it fails", PATIENCE, || {
        let info = execute("query-migrate", json!({}));
        (status(&info) == "failed").then_some(info)
    });
    let message = info["error-desc"].as_str().unwrap();
    println!("{:.2?}: {message}", began.elapsed());
    assert!(message.contains("no name server answered within 700ms"), "{message}");
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    // And the process ends with one under way.
    execute("migrate-set-parameters", json!({"link-timeout": 60_000}));
    execute("migrate", json!({"uri": "tcp:a-name-that-nobody-knows.example:4444"}));
    std::thread::sleep(Duration::from_millis(200));
    let began = Instant::now();
    execute("quit", json!({}));
    until("the process ends", PATIENCE, || child.try_wait().unwrap());
    println!("ended after {:.2?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}
