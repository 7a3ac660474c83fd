//! A destination that is not ours: speaks docs/wire-format.md by itself, and can say what ours never would.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;

use dunlin::Uri;

fn crc(bytes: &[u8], polynomial: u64, mask: u64) -> u64 {
    let value = bytes.iter().fold(mask, |value, byte| {
        (0..8).fold(value ^ u64::from(*byte), |value, _| (value >> 1) ^ (if value & 1 == 1 { polynomial } else { 0 }))
    });
    value ^ mask
}

pub fn crc32c(bytes: &[u8]) -> u32 {
    crc(bytes, 0x82F6_3B78, u64::from(u32::MAX)) as u32
}

fn crc64nvme(bytes: &[u8]) -> u64 {
    crc(bytes, 0x9A6C_9329_AC4B_C9B5, u64::MAX)
}

/// A frame without a table.
pub fn frame(kind: u16, sequence: u64, data: &[u8]) -> Vec<u8> {
    let mut head = b"DLF1".to_vec();
    head.extend(kind.to_le_bytes());
    head.extend([0; 2]);
    head.extend(sequence.to_le_bytes());
    head.extend(0u32.to_le_bytes());
    head.extend((data.len() as u32).to_le_bytes());
    head.extend(crc32c(&[]).to_le_bytes());
    head.extend(crc64nvme(data).to_le_bytes());
    let checksum = crc32c(&head);
    head.extend(checksum.to_le_bytes());
    [head, data.to_vec()].concat()
}

/// A welcome.
fn welcome() -> Vec<u8> {
    let mut bytes = b"DUNLIN\r\n".to_vec();
    bytes.extend([1, 0, 0, 0]);
    bytes.resize(316, 0);
    let checksum = crc32c(&bytes);
    bytes.extend(checksum.to_le_bytes());
    bytes
}

/// The type and the data of the next frame.
fn read_frame(stream: &mut TcpStream) -> std::io::Result<(u16, Vec<u8>)> {
    let mut head = [0; 40];
    stream.read_exact(&mut head)?;
    let length = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap()) as usize;
    let kind = u16::from_le_bytes([head[4], head[5]]);
    let mut rest = vec![0; length(16) + length(20) + if kind == 32 { 8 } else { 0 }];
    stream.read_exact(&mut rest)?;
    Ok((kind, rest))
}

/// Takes a migration over one data channel without looking at it, and answers the Offer with `words`, frames' types and
/// bodies. Ends when the source closes; gives the types of what it said after the Offer.
pub fn destination(words: Vec<(u16, Vec<u8>)>) -> (Uri, JoinHandle<Vec<u16>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = Uri::Tcp { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
    let thread = std::thread::spawn(move || {
        let (mut control, _) = listener.accept().unwrap();
        control.read_exact(&mut [0; 64]).unwrap();
        control.write_all(&welcome()).unwrap();
        let (kind, start) = read_frame(&mut control).unwrap();
        assert_eq!(kind, 1, "Start");
        // What is asked for is accepted: the names, without whether they are required.
        let count = u16::from_le_bytes([start[1], start[2]]);
        let (mut at, mut accepted) = (3, count.to_le_bytes().to_vec());
        for _ in 0..count {
            let length = usize::from(start[at + 1]) + 1;
            accepted.extend(&start[at + 1..at + 1 + length]);
            at += 1 + length;
        }
        let mut sequence = 0;
        let mut say = |control: &mut TcpStream, kind: u16, body: &[u8]| {
            control.write_all(&frame(kind, sequence, body)).unwrap();
            sequence += 1;
        };
        say(&mut control, 2, &accepted);
        let (mut data, _) = listener.accept().unwrap();
        data.read_exact(&mut [0; 64]).unwrap();
        data.write_all(&welcome()).unwrap();
        let (marks, marked) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            while let Ok((kind, body)) = read_frame(&mut data) {
                if kind == 4 {
                    drop(marks.send(body));
                }
            }
        });
        let soon = Some(std::time::Duration::from_millis(5));
        control.set_read_timeout(soon).unwrap();
        let (mut offered, mut heard) = (false, Vec::new());
        loop {
            for mark in marked.try_iter() {
                say(&mut control, 5, &[mark, vec![0]].concat());
            }
            // The rest of a frame is on its way.
            match control.peek(&mut [0; 40]) {
                Ok(0) => break,
                Ok(40..) => {}
                _ => continue,
            }
            control.set_read_timeout(None).unwrap();
            let Ok((kind, body)) = read_frame(&mut control) else { break };
            control.set_read_timeout(soon).unwrap();
            if kind == 16 {
                // The last piece of a probe: it will take no time at all.
                if body[4] == 1 {
                    say(&mut control, 17, &[&body[..4], &[0; 24]].concat());
                }
            } else if kind == 7 && !offered {
                offered = true;
                for (kind, body) in &words {
                    say(&mut control, *kind, body);
                }
            } else if offered && kind != 14 {
                heard.push(kind);
            }
        }
        drop(control);
        drop(listener);
        drop(reader.join());
        heard
    });
    (uri, thread)
}
