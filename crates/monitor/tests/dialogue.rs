//! Dialogues over a real socket with a machine that has no RAM.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "each test binary uses a part of what is common")]

mod common;

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Raw, serve, serve_tiny, tiny};
use dunlin::{Guest, PARAMETERS};
use dunlin_monitor::{Client, ClientError, Server, ServerError, Verification, Vm};
use serde_json::{Value, json};

fn error(class: &str, desc: &str) -> Value {
    json!({"error": {"class": class, "desc": desc}})
}

#[test]
fn greeting_and_negotiation() {
    let served = serve_tiny();
    let mut raw = Raw::connect(&served);
    let greeting = raw.line();
    assert_eq!(greeting["QMP"]["version"]["qemu"], json!({"micro": 2, "minor": 0, "major": 10}));
    assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    assert_eq!(
        raw.ask(r#"{"execute": "query-status"}"#),
        error("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
    );
    for (wanted, desc) in [
        ("\"oob\"", "Invalid parameter type for 'enable', expected: array"),
        ("[\"rdma\"]", "Parameter 'enable[0]' does not accept value 'rdma'"),
    ] {
        let request = format!(r#"{{"execute": "qmp_capabilities", "arguments": {{"enable": {wanted}}}}}"#);
        assert_eq!(raw.ask(&request), error("GenericError", desc));
    }
    assert_eq!(raw.ask(r#"{"execute": "qmp_capabilities", "id": [1, "x"]}"#), json!({"return": {}, "id": [1, "x"]}));
    assert_eq!(
        raw.ask(r#"{"execute": "qmp_capabilities"}"#),
        error("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
    );
}

#[test]
fn errors_name_what_is_wrong() {
    let served = serve_tiny();
    let mut raw = Raw::negotiated(&served);
    for (request, class, desc) in [
        (r#"{"execute": "system_reset"}"#, "CommandNotFound", "The command system_reset has not been found"),
        (
            r#"{"execute": "snapshot-save", "arguments": {"tag": 1}}"#,
            "CommandNotFound",
            "The command snapshot-save has not been found: there are no snapshots yet",
        ),
        (r#"{"execute": "migrate"}"#, "GenericError", "need either 'uri' or 'channels' argument"),
        (
            r#"{"execute": "migrate", "arguments": {"channels": [{"channel-type": "main", "addr": {"transport": "file"}}]}}"#,
            "GenericError",
            "Parameter 'transport' does not accept value 'file': migrating to a file is not there yet",
        ),
        (
            r#"{"execute": "migrate", "arguments": {"uri": 3}}"#,
            "GenericError",
            "Invalid parameter type for 'uri', expected: string",
        ),
        (r#"{"execute": "stop", "arguments": {"x": 1}}"#, "GenericError", "Parameter 'x' is unexpected"),
        (
            r#"{"execute": "migrate-set-parameters", "arguments": {"x": 1}}"#,
            "GenericError",
            "Parameter 'x' is unexpected",
        ),
        (
            r#"{"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 1.5}}"#,
            "GenericError",
            "Invalid parameter type for 'downtime-limit', expected: integer or string",
        ),
        (
            r#"{"execute": "migrate-set-parameters", "arguments": {"tls-creds": ""}}"#,
            "GenericError",
            "Parameter 'tls-creds' is unexpected: there is no TLS yet",
        ),
        (
            r#"{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "xbzrle", "state": "on"}]}}"#,
            "GenericError",
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
        (
            r#"{"execute": "migrate-continue", "arguments": {"state": "pre-switchover"}}"#,
            "GenericError",
            "Migration not in expected state: none",
        ),
        (
            r#"{"execute": "getfd", "arguments": {"fdname": "a"}}"#,
            "GenericError",
            "No file descriptor supplied via SCM_RIGHTS",
        ),
        (r#"{"execute": 1}"#, "GenericError", "QMP input member 'execute' must be a string"),
        (r#"{"exec": "stop"}"#, "GenericError", "QMP input member 'exec' is unexpected"),
        (r#"{}"#, "GenericError", "QMP input lacks member 'execute'"),
        (r#"[]"#, "GenericError", "QMP input must be a JSON object"),
        (r#"{"execute": "x-verify"}"#, "GenericError", "this machine cannot verify itself"),
        (
            r#"{"execute": "migrate", "arguments": {"uri": "tcp:a:1", "resume": true}}"#,
            "GenericError",
            "there is no outgoing migration to resume; start one without 'resume'",
        ),
    ] {
        assert_eq!(raw.ask(request), error(class, desc), "{request}");
    }
    let bad = raw.ask(r#"{"execute": "migrate", "id": 7, "arguments": {"uri": "tcp:localhost"}}"#);
    assert_eq!(bad["id"], 7);
    assert!(bad["error"]["desc"].as_str().unwrap().contains("the port is missing"), "{bad}");
}

#[test]
fn framing_by_syntax_and_resync() {
    let served = serve_tiny();
    let mut raw = Raw::negotiated(&served);
    raw.write(
        "{\"execute\":\"stop\",\"id\":1}{\"execute\":\"query-name\",\n\n \"id\":2}\n\n {\"execute\":\"stop\", \"id\":3}",
    );
    for id in 1..=3 {
        assert_eq!(raw.line(), json!({"return": {}, "id": id}));
    }
    let stop = r#"{"execute": "stop"}"#;
    for garbage in ["GET / HTTP/1.1", r#"{"execute": }"#, "{]", "\u{1}\u{2}ü", r#"{"a": "b"#, "'", "]"] {
        let answer = raw.ask(garbage);
        assert_eq!(answer["error"]["class"], "GenericError", "{garbage}: {answer}");
        assert!(answer["error"]["desc"].as_str().unwrap().starts_with("JSON parse error"), "{answer}");
        assert_eq!(raw.ask(stop), json!({"return": {}}), "after {garbage}");
    }
    let long = format!(r#"{{"execute": "{}"}}"#, "x".repeat(2 << 20));
    assert!(raw.ask(&long)["error"]["desc"].as_str().unwrap().contains("longer than"));
    assert_eq!(raw.ask(stop), json!({"return": {}}));
    // The id is one level below the command.
    let nested =
        |depth: usize| format!(r#"{{"execute": "query-name", "id": {}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    assert_eq!(raw.ask(&nested(126))["return"], json!({}));
    assert_eq!(raw.ask(&nested(127))["error"]["class"], "GenericError");
    for depth in [200, 10_000] {
        let deep = format!("{{\"execute\": {}{}}}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(raw.ask(&deep)["error"]["class"], "GenericError");
        assert_eq!(raw.ask(stop), json!({"return": {}}));
    }
}

#[test]
fn status_stop_and_cont() {
    let served = serve_tiny();
    let mut client = Client::connect(&served.path).unwrap();
    let mut status = || client.execute("query-status", json!({})).unwrap();
    assert_eq!(status(), json!({"status": "paused", "running": false}));
    served.vm.cont().unwrap();
    assert_eq!(status(), json!({"status": "running", "running": true}));
    let error = client.execute("cont", json!({"x-take-back": true})).unwrap_err().to_string();
    assert!(error.contains("nothing is undecided"), "{error}");
    client.execute("migrate_cancel", json!({})).unwrap();
    assert_eq!(client.execute("query-migrate", json!({})).unwrap(), json!({}));
    assert_eq!(client.execute("query-migration-report", json!({})).unwrap(), Value::Null);
    let commands = client.execute("query-commands", json!({})).unwrap();
    assert!(commands.as_array().unwrap().contains(&json!({"name": "migrate-incoming"})));

    let awaited = serve(Vm::new(Guest::awaited(tiny()), Some(Box::new(|| Err("never".into())))));
    let mut client = Client::connect(&awaited.path).unwrap();
    assert_eq!(client.execute("query-status", json!({})).unwrap()["status"], "inmigrate");
    for command in ["cont", "stop", "x-verify"] {
        let error = client.execute(command, json!({})).unwrap_err();
        assert!(matches!(error, ClientError::Refused { .. }), "{command}: {error}");
    }
}

#[test]
fn parameters_all_or_none() {
    let served = serve_tiny();
    let mut client = Client::connect(&served.path).unwrap();
    let before = client.execute("query-migrate-parameters", json!({})).unwrap();
    let capabilities = client.execute("query-migrate-capabilities", json!({})).unwrap();
    let rows = before.as_object().unwrap().len() + capabilities.as_array().unwrap().len();
    assert_eq!(rows, PARAMETERS.len());
    assert_eq!(before["downtime-limit"], 300);
    let wanted = json!({"downtime-limit": 17, "multifd-channels": 0});
    let error = client.execute("migrate-set-parameters", wanted).unwrap_err().to_string();
    assert!(error.contains("multifd-channels") && error.contains("1 to 255"), "{error}");
    assert_eq!(client.execute("query-migrate-parameters", json!({})).unwrap(), before);
    client.execute("migrate-set-parameters", json!({"downtime-limit": 17, "max-bandwidth": i64::MAX})).unwrap();
    let after = client.execute("query-migrate-parameters", json!({})).unwrap();
    assert_eq!((&after["downtime-limit"], &after["max-bandwidth"]), (&json!(17), &json!(i64::MAX)));
    for (name, value, wanted) in [
        ("max-bandwidth", json!(u64::MAX), "0 to 9223372036854775807"),
        ("max-bandwidth", json!("5 parsecs"), "not a rate"),
        ("multifd-compression", json!("gzip"), "does not accept value 'gzip'"),
        ("multifd-compression", json!(1), "expected: string"),
        ("xbzrle", json!(1), "expected: boolean"),
        ("multifd-zstd-level", json!(23), "-131072 to 22"),
    ] {
        let error = client.execute("migrate-set-parameters", json!({ name: value })).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let kinds = json!({"multifd-compression": "zstd", "multifd-zstd-level": -5, "xbzrle": true, "integrity": "none"});
    client.execute("migrate-set-parameters", kinds.clone()).unwrap();
    let after = client.execute("query-migrate-parameters", json!({})).unwrap();
    for name in ["multifd-compression", "multifd-zstd-level", "integrity"] {
        assert_eq!(after[name], kinds[name], "{after}");
    }
    let set = client.execute("query-migrate-capabilities", json!({})).unwrap();
    assert!(set.as_array().unwrap().contains(&json!({"capability": "xbzrle", "state": true})), "{set}");
    // What was read can be set back, as libvirt does.
    client.execute("migrate-set-parameters", before.clone()).unwrap();
    client.execute("migrate-set-capabilities", json!({"capabilities": capabilities})).unwrap();
    assert_eq!(client.execute("query-migrate-parameters", json!({})).unwrap(), before);
    assert_eq!(client.execute("query-migrate-capabilities", json!({})).unwrap(), capabilities);
    // Text with a unit is the same number.
    client.execute("migrate-set-parameters", json!({"downtime-limit": "1.5s", "max-bandwidth": "64M"})).unwrap();
    let after = client.execute("query-migrate-parameters", json!({})).unwrap();
    assert_eq!((&after["downtime-limit"], &after["max-bandwidth"]), (&json!(1500), &json!(64 << 20)));
    // Conflicts are of the values as they would be, and name both.
    let [initial, max] = ["cpu-throttle-initial", "max-cpu-throttle"];
    let conflict = client.execute("migrate-set-parameters", json!({initial: 60, max: 50})).unwrap_err().to_string();
    assert!(conflict.contains(initial) && conflict.contains(max), "{conflict}");
}

#[test]
fn verifying_does_not_keep_others_waiting() {
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let verify = move || {
        released.lock().unwrap().recv()?;
        Ok(Verification { good: true, report: json!({"pages": 3}), summary: "3 pages".to_owned() })
    };
    let served = serve(Vm::new(Guest::new(tiny()), Some(Box::new(verify))));
    let path = served.path.clone();
    let verifying = std::thread::spawn(move || Client::connect(&path).unwrap().execute("x-verify", json!({})).unwrap());
    std::thread::sleep(Duration::from_millis(50));
    let mut client = Client::connect(&served.path).unwrap();
    let begun = Instant::now();
    for _ in 0..100 {
        client.execute("query-status", json!({})).unwrap();
    }
    assert!(begun.elapsed() < Duration::from_secs(1));
    release.send(()).unwrap();
    assert_eq!(verifying.join().unwrap(), json!({"pages": 3, "verified": true, "summary": "3 pages"}));
}

#[test]
fn quit_answers_first() {
    let mut served = serve_tiny();
    let mut client = Client::connect(&served.path).unwrap();
    assert!(!served.vm.wait_for_quit(Duration::ZERO));
    assert_eq!(client.execute("quit", json!({})).unwrap(), json!({}));
    assert!(served.vm.wait_for_quit(Duration::from_secs(10)));
    drop(served.server.take());
    assert!(client.wait_until_closed(Duration::from_secs(10)));
    assert!(!served.path.exists());
}

#[test]
fn sockets_in_the_way() {
    let served = serve_tiny();
    let refused = Server::start(&served.path, &served.vm).unwrap_err();
    assert!(matches!(refused, ServerError::InUse { .. }), "{refused}");
    // The live one still answers, and the attempt left nothing behind.
    Client::connect(&served.path).unwrap();

    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    drop(Server::start(&stale, &served.vm).unwrap());
    assert!(!stale.exists());

    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let refused = Server::start(&file, &served.vm).unwrap_err();
    assert!(matches!(refused, ServerError::NotASocket { .. }), "{refused}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    let nowhere = Server::start(directory.path().join("no/such"), &served.vm).unwrap_err().to_string();
    assert!(nowhere.contains("No such file"), "{nowhere}");
    let long = Server::start(directory.path().join("x".repeat(200)), &served.vm).unwrap_err().to_string();
    assert!(long.contains("too long"), "{long}");
}

#[test]
fn many_clients() {
    let mut served = serve_tiny();
    let mut clients: Vec<_> = (0..32).map(|_| Client::connect(&served.path).unwrap()).collect();
    for client in &mut clients {
        client.execute("query-status", json!({})).unwrap();
    }
    let refused = Client::connect(&served.path).unwrap_err().to_string();
    assert!(refused.contains("32 clients"), "{refused}");
    clients.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    while Client::connect(&served.path).is_err() {
        assert!(Instant::now() < deadline);
    }
    // The end does not wait for clients that stay.
    drop(served.server.take());
    assert!(clients.iter_mut().all(|client| client.wait_until_closed(Duration::from_secs(5))));
}

/// A page in a browser can have it send lines to any port of its host: what does not speak QMP from its first line on is
/// not listened to on the network.
#[test]
fn another_protocol_over_the_network() {
    let vm = Vm::new(Guest::new(tiny()), None);
    let server = Server::start(dunlin_monitor::parse_address("tcp:127.0.0.1:0").unwrap(), &vm).unwrap();
    let address = server.address().to_string();
    let mut stream = std::net::TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let commands = r#"{"execute": "qmp_capabilities"} {"execute": "cont"}"#;
    let request = format!("POST / HTTP/1.1\r\nContent-Length: {}\r\n\r\n{commands}", commands.len());
    stream.write_all(request.as_bytes()).unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut stream, &mut said).unwrap();
    assert_eq!(said.matches("JSON parse error").count(), 1, "{said}");
    assert!(!said.contains("return"), "{said}");
    assert!(!vm.run_state().is_running());
}
