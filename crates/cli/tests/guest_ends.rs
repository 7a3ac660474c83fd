//! A guest that ends, by itself or with its process, alone and while it is being migrated: what clients hear, in which order,
//! and what the other side hears. Guests on KVM are skipped where there is none.

// Clippy's exception for tests does not reach the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(dead_code, reason = "each test binary uses a part of the harness")]

mod common;

use std::path::Path;

use common::{Machine, PATIENCE, check_error, turn, until};
use dunlin::{GuestPlace, Report, Status};
use dunlin_monitor::Client;
use serde_json::{Value, json};

/// Names and data of what `client` hears until its connection ends.
fn events(client: &mut Client) -> Vec<(String, Value)> {
    let mut heard = Vec::new();
    while let Ok(Some(event)) = client.next_event(PATIENCE) {
        heard.push((event["event"].as_str().unwrap().to_owned(), event["data"].clone()));
    }
    heard
}

fn exit_code(machine: &Machine) -> i32 {
    until(&format!("the {} ends", machine.name), PATIENCE, || machine.exit_code())
}

/// The destination has heard that the guest ended, and how; it can take another guest.
fn check_destination(destination: &Machine, end: &str) {
    let report = destination.ended();
    check_error(&report).unwrap();
    let error = report.error.as_ref().unwrap().message.clone();
    println!("{error}");
    assert_eq!((report.status, report.guest), (Status::Failed, GuestPlace::Ended), "{error}");
    let words = format!("the guest ended ({end}) while it was being migrated; there is no guest to run");
    assert!(error.contains(&words), "{error}");
    let info = destination.execute("query-migrate", json!({}));
    assert_eq!((&info["status"], &info["error-desc"]), (&json!("failed"), &json!(error)));
    assert_eq!(destination.state(), "inmigrate");
}

/// Waits until RAM is on its way.
fn under_way(destination: &Machine) {
    let moves = |report: Report| report.status == Status::Active && report.ram.pages.total() > 0;
    until("RAM is on its way", PATIENCE, || destination.report().filter(|report| moves(report.clone())));
}

#[cfg(target_arch = "x86_64")]
mod on_kvm {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use dunlin_machines::KvmMachine;

    use super::*;

    const MEMORY: &str = "32M";
    /// How a guest ends when it reads this byte on its serial port; what QEMU calls that, what a migration, and the status that
    /// its process then ends with.
    const ENDS: [(u8, &str, &str, i32); 4] = [
        (b'p', "guest-shutdown", "powered off", 0),
        (b'e', "guest-shutdown", "exited", 3),
        (b'r', "guest-reset", "reset itself", 0),
        (b'f', "guest-reset", "triple fault", 1),
    ];

    /// Waits for a byte on the serial port: `p` switches off by ACPI, `e` writes 3 to the exit port, `r` resets by the keyboard
    /// controller, `f` does what no processor knows, without anybody to ask about it.
    const CODE: &[u8] = &[
        0x66, 0xba, 0xfd, 0x03, // 0: mov dx, 0x3fd
        0xec, 0xa8, 0x01, // in al, dx; test al, 1
        0x74, 0xf7, // jz 0
        0x66, 0xba, 0xf8, 0x03, 0xec, // mov dx, 0x3f8; in al, dx
        0x3c, b'p', 0x74, 0x10, // cmp al, 'p'; je off
        0x3c, b'e', 0x74, 0x18, // cmp al, 'e'; je exit
        0x3c, b'r', 0x74, 0x1a, // cmp al, 'r'; je reset
        0x3c, b'f', 0x74, 0x1c, // cmp al, 'f'; je fault
        0xeb, 0xe0, // jmp 0
        0x90, 0x90, //
        0x66, 0xba, 0x04, 0x06, // off: mov dx, 0x604
        0x66, 0xb8, 0x00, 0x34, // mov ax, 5 << 10 | 1 << 13
        0x66, 0xef, // out dx, ax
        0xeb, 0xd2, // jmp 0
        0xb0, 0x03, 0xe6, 0xf4, // exit: mov al, 3; out 0xf4, al
        0xeb, 0xcc, // jmp 0
        0xb0, 0xfe, 0xe6, 0x64, // reset: mov al, 0xfe; out 0x64, al
        0xeb, 0xc6, // jmp 0
        0x0f, 0x0b, // fault: ud2
    ];

    fn kvm() -> bool {
        KvmMachine::available().inspect_err(|error| println!("skipped: {error}")).is_ok()
    }

    /// An ELF file with one segment, which is loaded at and entered at 1 MiB.
    fn kernel(path: &Path) {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        let half = |value: u16| value.to_le_bytes().to_vec();
        let word = |value: u64| value.to_le_bytes().to_vec();
        let long = |value: u32| value.to_le_bytes().to_vec();
        // An executable for x86-64; its entry, where its one program header is, no sections.
        elf.extend([half(2), half(62), long(1), word(0x10_0000), word(64), word(0), long(0)].concat());
        elf.extend([64, 56, 1, 64, 0, 0].map(half).concat());
        let size = CODE.len() as u64;
        elf.extend([long(1), long(5), word(120), word(0x10_0000), word(0x10_0000)].concat());
        elf.extend([word(size), word(size), word(4096)].concat());
        elf.extend(CODE);
        std::fs::write(path, elf).unwrap();
    }

    /// A guest with 8 MiB that do not shrink, and its serial port.
    fn source(directory: &Path) -> (Machine, UnixStream) {
        let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
        kernel(Path::new(&path("kernel")));
        let mut random = common::Random::seeded(7);
        let noise: Vec<u8> = (0..1 << 20).flat_map(|_| random.next().to_le_bytes()).collect();
        std::fs::write(path("initrd"), noise).unwrap();
        let serial = format!("unix:{}", path("serial"));
        let (kernel, initrd) = (path("kernel"), path("initrd"));
        let arguments =
            ["--machine", "kvm", "--memory", MEMORY, "--kernel", &kernel, "--initrd", &initrd, "--serial", &serial];
        let machine = Machine::start("source", directory, &arguments);
        assert_eq!(machine.state(), "running");
        (machine, UnixStream::connect(path("serial")).unwrap())
    }

    fn shutdown(reason: &str) -> Vec<(String, Value)> {
        let data = json!({"guest": true, "reason": reason});
        vec![("STOP".to_owned(), Value::Null), ("SHUTDOWN".to_owned(), data)]
    }

    /// Clients hear that the guest stopped, then why the process ends, and nothing after that.
    #[test]
    fn alone() {
        let _turn = turn();
        if !kvm() {
            return;
        }
        for (byte, reason, end, status) in ENDS {
            let directory = tempfile::tempdir().unwrap();
            let (machine, mut serial) = source(directory.path());
            let mut client = machine.connect();
            serial.write_all(&[byte]).unwrap();
            assert_eq!(events(&mut client), shutdown(reason), "{end}");
            assert_eq!(exit_code(&machine), status, "{end}: {}", machine.said());
        }
    }

    #[test]
    fn while_it_is_being_migrated() {
        let _turn = turn();
        if !kvm() {
            return;
        }
        for (byte, reason, end, status) in ENDS {
            let directory = tempfile::tempdir().unwrap();
            let (source, mut serial) = source(directory.path());
            let incoming = ["--machine", "kvm", "--memory", MEMORY, "--incoming", "tcp:127.0.0.1:0"];
            let destination = Machine::start("destination", directory.path(), &incoming);
            let mut client = source.connect();
            source.set(json!({"max-bandwidth": 1_000_000}));
            source.migrate(&destination.address());
            under_way(&destination);
            serial.write_all(&[byte]).unwrap();
            assert_eq!(events(&mut client), shutdown(reason), "{end}");
            assert_eq!(exit_code(&source), status, "{end}: {}", source.said());
            let said = source.said();
            let failed =
                format!("migration failed: source, precopy: the guest ended ({end}) while it was being migrated");
            assert!(said.contains(&failed), "{said}");
            check_destination(&destination, end);
        }
    }
}

/// The guest ends with its process: its destination is not told that the guest goes on at the source.
#[test]
fn with_its_process() {
    let _turn = turn();
    for (reason, ask) in [
        ("host-qmp-quit", (|machine| drop(machine.execute("quit", json!({})))) as fn(&Machine)),
        ("host-signal", |machine| machine.killer().terminate()),
    ] {
        for paused in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let workload = "pattern=uniform,rate=50M/s,working-set=16M,content=random";
            let source = Machine::source(directory.path(), "64M", workload, &[]);
            let destination = Machine::destination(directory.path(), "64M");
            let uri = destination.address();
            source.set(match paused {
                false => json!({"max-bandwidth": 1_000_000}),
                true => json!({"pause-before-switchover": true}),
            });
            source.migrate(&uri);
            if paused {
                let waits = |report: &Report| report.status == Status::PreSwitchover;
                until("it waits", PATIENCE, || source.report().filter(waits));
            } else {
                under_way(&destination);
            }
            let mut client = source.connect();
            ask(&source);
            let data = json!({"guest": false, "reason": reason});
            assert_eq!(events(&mut client), [("SHUTDOWN".to_owned(), data)], "paused: {paused}");
            let said = source.said();
            assert_eq!(exit_code(&source), 0, "{said}");
            let failed =
                "the guest ended (its process was told to end) while it was being migrated; there is no guest to run";
            assert!(said.contains(failed), "{said}");
            check_destination(&destination, "its process was told to end");
        }
    }
}

/// What a signal's process says, without a migration.
#[test]
fn nothing_comes_after_the_end() {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::source(directory.path(), "16M", "idle", &[]);
    // What came of the start has been told then.
    assert_eq!(machine.state(), "running");
    let mut client = machine.connect();
    machine.killer().terminate();
    let data = json!({"guest": false, "reason": "host-signal"});
    assert_eq!(events(&mut client), [("SHUTDOWN".to_owned(), data)]);
}
