//! The serial port and its outside end.

use dunlin::StartPermit;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::device_config::SerialTarget;
use crate::gate::{Gate, Passage};
use crate::kvm::devices::bus::Bus;
use crate::kvm::devices::serial::SerialPort;

fn port(target: &SerialTarget) -> (SerialPort, Arc<Pulses>) {
    let pulses = Arc::new(Pulses::default());
    (SerialPort::new(target, Interrupt::new(pulses.clone(), 4)).unwrap(), pulses)
}

fn byte(number: usize) -> u8 {
    (number % 251) as u8
}

#[test]
fn a_file_gets_every_byte_at_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    std::fs::write(&path, b"before").unwrap();
    let target = SerialTarget::File(path.clone());
    let (one, _) = port(&target);
    // Another process of the same machine, after a migration.
    let (two, _) = port(&target);
    one.write(0, b'1');
    assert_eq!(std::fs::read(&path).unwrap(), b"before1", "it is there when the write has returned");
    two.write(0, b'2');
    one.write(0, b'3');
    drop((one, two));
    assert_eq!(std::fs::read(&path).unwrap(), b"before123");
}

/// A guest that writes more than a stalled reader and the buffer take waits, and leaves when the machine pauses; then all
/// comes out, in order and once.
#[test]
fn a_stalled_reader_loses_nothing() {
    const BYTES: usize = 600_000;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let (port, _) = port(&SerialTarget::Unix(path.clone()));
    let bus = Arc::new(Bus::new(port, Vec::new()));
    let mut reader = UnixStream::connect(&path).unwrap();
    bus.write_port(0x3f8, b"!", &Gate::default());
    let mut first = [0];
    reader.read_exact(&mut first).unwrap();
    let gate = Arc::new(Gate::default());
    let guest = {
        let (bus, gate) = (bus.clone(), gate.clone());
        std::thread::spawn(move || {
            let mut number = 0;
            while number < BYTES && gate.enter() == Passage::Run {
                while gate.is_open() && number < BYTES {
                    bus.write_port(0x3f8, &[byte(number)], &gate);
                    number += 1;
                }
                gate.leave();
            }
            number
        })
    };
    let mut received = Vec::new();
    for _ in 0..20 {
        gate.open(&StartPermit::unlimited());
        std::thread::sleep(Duration::from_millis(20));
        let began = Instant::now();
        gate.close();
        assert!(began.elapsed() < Duration::from_millis(50), "{:?}", began.elapsed());
        let mut some = [0; 10_000];
        let count = reader.read(&mut some).unwrap();
        received.extend_from_slice(&some[..count]);
    }
    assert!(!guest.is_finished(), "it was held up");
    gate.open(&StartPermit::unlimited());
    while received.len() < BYTES {
        let mut some = [0; 10_000];
        let count = reader.read(&mut some).unwrap();
        assert!(count > 0);
        received.extend_from_slice(&some[..count]);
    }
    assert_eq!(guest.join().unwrap(), BYTES);
    assert!(received.iter().copied().eq((0..BYTES).map(byte)));
    drop(bus);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert!(!path.exists());
}

/// What a stalled reader has not taken when the machine's process ends is still written, for a while.
#[test]
fn the_end_waits_for_a_slow_reader() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let (port, _) = port(&SerialTarget::Unix(path.clone()));
    let mut reader = UnixStream::connect(&path).unwrap();
    port.write(0, 255);
    reader.read_exact(&mut [0]).unwrap();
    let mut bytes = 0;
    while !port.is_full() {
        port.write(0, byte(bytes));
        bytes += 1;
    }
    let ending = std::thread::spawn(move || drop(port));
    std::thread::sleep(Duration::from_millis(100));
    let mut received = Vec::new();
    reader.read_to_end(&mut received).unwrap();
    ending.join().unwrap();
    assert!(received.len() == bytes && received.iter().copied().eq((0..bytes).map(byte)));
}

#[test]
fn clients_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let (port, _) = port(&SerialTarget::Unix(path.clone()));
    port.resume();
    // Nobody holds up a guest that nobody listens to, and who comes gets the latest.
    for number in 0..200_000 {
        assert!(!port.is_full());
        port.write(0, byte(number));
    }
    let mut client = UnixStream::connect(&path).unwrap();
    let mut received = vec![0; 64 << 10];
    client.read_exact(&mut received).unwrap();
    assert!(received.iter().copied().eq((200_000 - (64 << 10)..200_000).map(byte)));
    for turn in 0..10 {
        client.write_all(&[turn]).unwrap();
        until("input", || port.read(5) & 1 == 1);
        assert_eq!(port.read(0), turn);
        drop(client);
        client = UnixStream::connect(&path).unwrap();
        // The port tells whether it knows of the new one by what reaches it.
        client.write_all(&[100]).unwrap();
        until("input", || port.read(5) & 1 == 1);
        assert_eq!(port.read(0), 100);
        port.write(0, turn);
        let mut echo = [0];
        client.read_exact(&mut echo).unwrap();
        assert_eq!(echo, [turn]);
    }
}

/// Input that the guest has not taken goes with it, and what comes while it is paused waits outside.
#[test]
fn input_is_part_of_the_state() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let (from, pulses) = port(&SerialTarget::Unix(path.clone()));
    let (to, more_pulses) = port(&SerialTarget::Null);
    from.write(1, 1);
    from.write(7, 0x5a);
    from.write(3, 0x83);
    from.write(0, 12);
    from.write(3, 0x03);
    let mut client = UnixStream::connect(&path).unwrap();
    let sent: Vec<u8> = (0..100).collect();
    client.write_all(&sent).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(from.read(5) & 1, 0, "not before it runs");
    from.resume();
    until("input", || from.save().input.len() == 64);
    assert!(pulses.count() > 0);
    from.pause();
    to.load(from.save()).unwrap();
    assert_eq!(more_pulses.count(), 0, "what was raised is in the interrupt controllers' state");
    to.write(1, 2);
    to.write(0, b'x');
    assert!(more_pulses.count() > 0, "what comes later is raised");
    from.resume();
    assert_eq!((from.read(0), from.read(0)), (0, 1));
    from.pause();
    let state = from.save();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(from.save(), state);
    to.load(state.clone()).unwrap();
    assert_eq!(to.save(), state);
    let held = state.input.len() as u8;
    assert!((2..2 + held).all(|expected| to.read(5) & 1 == 1 && to.read(0) == expected));
    assert_eq!((to.read(5) & 1, to.read(7), to.read(3)), (0, 0x5a, 3));
    // The guest goes on here after all: the rest comes in order.
    from.resume();
    for expected in 2..100 {
        until("input", || from.read(5) & 1 == 1);
        assert_eq!(from.read(0), expected);
    }
    let mut too_much = state;
    too_much.input = vec![0; 1000];
    assert!(to.load(too_much).is_err());
}
