//! The wire format against golden bytes made by a second implementation, and decoders against hostile bytes.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::error::GuestPlace;
use crate::guest::GuestEnd;
use crate::machine::Need;
use crate::page::PageKind;
use crate::report::{DeltaCounts, PageCounts};

const GOLDEN: &str = include_str!("../../tests/golden/v1.txt");
const SESSION: SessionId = SessionId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
const BLOCKS: [u64; 2] = [1 << 30, 1 << 20];

fn golden() -> BTreeMap<&'static str, Vec<u8>> {
    let bytes =
        |hex: &str| (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
    GOLDEN.lines().map(|line| line.split_once(' ').unwrap()).map(|(name, hex)| (name, bytes(hex))).collect()
}

fn messages() -> Vec<(&'static str, u64, Message)> {
    let nanos = Duration::from_nanos;
    vec![
        (
            "start",
            0,
            Message::Start(Start {
                features: vec![
                    Feature { name: "page-zero".into(), required: true },
                    Feature { name: "page-plain".into(), required: false },
                ],
                channels: 2,
                blocks: vec![message::BlockLayout { name: "ram".into(), size_bytes: 1 << 30, host_page_size: 4096 }],
                profile: b"abc".to_vec(),
                downtime_limit: Duration::from_millis(300),
            }),
        ),
        ("accepted", 1, Message::Accepted { features: vec!["page-zero".into(), "page-plain".into()] }),
        (
            "round-done",
            2,
            Message::RoundDone(Box::new(RoundDone {
                number: 1,
                duration: nanos(2),
                ram_bytes: 3,
                transferred_bytes: 4,
                pages: PageCounts { zero: 5, plain: 6, delta: 7, lz4: 8, zstd: 9 },
                dirty_bytes: 10,
                bandwidth: 11,
                dirty_rate: 12,
                predicted_downtime: nanos(13),
                downtime_limit: nanos(14),
                delta: DeltaCounts { hits: 15, misses: 16, overflows: 17, saved_bytes: 18 },
                throttle: vec![Throttled { now: 0, most: 0 }, Throttled { now: 40, most: 70 }],
                not_converging: "slow".into(),
                then_stopped: true,
            })),
        ),
        ("mark", 3, Message::Mark(Mark { round: 9 })),
        ("mark-ack", 4, Message::MarkAck(MarkAck { channel: 3, round: 9 })),
        (
            "section",
            5,
            Message::Section(Section {
                name: "vcpu".into(),
                instance: 1,
                version: 2,
                need: Need::Optional,
                checksum: 7,
                total_bytes: 6,
                piece: b"sta".to_vec(),
            }),
        ),
        (
            "offer",
            6,
            Message::Offer(Offer {
                last_round: 4,
                sections: 3,
                pages: PageCounts { zero: 100, plain: 200, delta: 300, lz4: 400, zstd: 500 },
                run: true,
                parts: [1, 2, 3, 4, 0, 0],
            }),
        ),
        ("ready", 7, Message::Ready(Ready { epoch: 1, question: 42 })),
        ("release", 8, Message::Release(Release { epoch: 1, question: 42, lease: nanos(7_500_000_000) })),
        (
            "running",
            9,
            Message::Running(Running { load: nanos(1000), resume: nanos(2000), cpu: nanos(3000), epoch: 2 }),
        ),
        (
            "done",
            10,
            Message::Done(Done { downtime: Duration::from_millis(5), parts: [1, 2, 3, 4, 5, 6], cpu: nanos(7) }),
        ),
        (
            "abort",
            11,
            Message::Abort(Abort {
                reason: AbortReason::Cancelled,
                guest: GuestPlace::Undecided,
                epoch: 2,
                text: "cancelled".into(),
            }),
        ),
        (
            "abort-ended",
            15,
            Message::Abort(Abort {
                reason: AbortReason::Ended(GuestEnd::Reset),
                guest: GuestPlace::Ended,
                epoch: 1,
                text: "reset".into(),
            }),
        ),
        ("query", 12, Message::Query { epoch: 3 }),
        ("heartbeat", 13, Message::Heartbeat(Heartbeat { received: 1 << 40, unread: 3 })),
        ("stopped", 14, Message::Stopped(Stopped { stopped: nanos(8), dirty_bytes: 4096, waits: true })),
        ("probe", 15, Message::Probe(Probe { number: 3, last: true, checksum: 7, piece: b"any".to_vec() })),
        (
            "probed",
            16,
            Message::Probed(Probed { number: 3, load: nanos(1000), resume: nanos(2000), late: nanos(3000) }),
        ),
    ]
}

fn frame(frame_type: FrameType, sequence: u64, data: &[u8]) -> Vec<u8> {
    let header = FrameHeader {
        frame_type,
        sequence,
        table_length: 0,
        data_length: data.len() as u32,
        table_checksum: table_checksum(&[]),
        data_checksum: data_checksum(data),
    };
    [&header.encode(), data].concat()
}

/// A frame of `runs`, encoded as `data`, that stand for `pages`.
fn pages_frame(sequence: u64, runs: &[PageRun], data: &[u8], pages: &[u8]) -> Vec<u8> {
    let mut table = Vec::new();
    runs.iter().for_each(|run| encode_run(&mut table, run));
    let header = FrameHeader {
        frame_type: FrameType::Pages,
        sequence,
        table_length: table.len() as u32,
        data_length: data.len() as u32,
        table_checksum: table_checksum(&table),
        data_checksum: 0,
    };
    [&header.encode(), table.as_slice(), data, &data_checksum(pages).to_le_bytes()].concat()
}

#[test]
fn hellos_are_golden() {
    let golden = golden();
    for (name, role) in [
        ("hello-control", Role::Control),
        ("hello-data-7", Role::Data { index: 7 }),
        ("hello-single", Role::Single),
        ("hello-reconnect", Role::Reconnect),
    ] {
        let hello = Hello { role, session: SESSION };
        assert_eq!(hello.encode().as_slice(), golden[name], "{name}");
        assert_eq!(Hello::decode(golden[name].as_slice().try_into().unwrap()), Ok(hello), "{name}");
    }
    for (name, reply) in
        [("answer-welcome", HelloReply::Welcome), ("answer-refused", HelloReply::Refused { reason: "busy".into() })]
    {
        assert_eq!(reply.encode().as_slice(), golden[name], "{name}");
        assert_eq!(HelloReply::decode(golden[name].as_slice().try_into().unwrap()), Ok(reply), "{name}");
    }
}

#[test]
fn frames_are_golden() {
    let golden = golden();
    for (name, sequence, message) in messages() {
        let bytes = frame(message.frame_type(), sequence, &message.encode());
        assert_eq!(bytes, golden[name], "{name}");
        let header = FrameHeader::decode(bytes[..HEADER_BYTES].try_into().unwrap(), sequence).unwrap();
        assert_eq!(Message::decode(header.frame_type, &bytes[HEADER_BYTES..]), Ok(message), "{name}");
    }
    let runs = [
        PageRun { block: 0, kind: PageKind::Zero, offset: 1 << 21, length: 8192, encoded_length: 0 },
        PageRun { block: 1, kind: PageKind::Plain, offset: 4096, length: 4096, encoded_length: 4096 },
    ];
    let mut table = Vec::new();
    runs.iter().for_each(|run| encode_run(&mut table, run));
    let page: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
    assert_eq!(pages_frame(1 << 40, &runs, &page, &page), golden["pages"]);
    let mut decoded = Vec::new();
    decode_runs(&table, 4096, &BLOCKS, &mut decoded).unwrap();
    assert_eq!(decoded, runs);
    a_delta_is_golden(&golden["pages-delta"]);
    assert_eq!(golden.len(), 6 + messages().len() + 2, "every golden case is looked at");
}

fn a_delta_is_golden(bytes: &[u8]) {
    let old = [0; 4096];
    let mut page = old;
    page[3] = 7;
    page[300..302].copy_from_slice(&[8, 9]);
    let mut data = Vec::new();
    assert!(crate::page::delta::encode(&old, &page, 4096, &mut data));
    let run = PageRun { block: 0, kind: PageKind::Delta, offset: 0, length: 4096, encoded_length: data.len() as u32 };
    assert_eq!(pages_frame(5, &[run], &data, &page), bytes);
}

/// Every single flipped bit of every hello, answer and header is found.
#[test]
fn flipped_bits_are_found() {
    for (name, bytes) in golden() {
        let checked = match name {
            _ if name.starts_with("hello") => HELLO_BYTES,
            _ if name.starts_with("answer") => REPLY_BYTES,
            _ => HEADER_BYTES,
        };
        let sequence = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
        for bit in 0..checked * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let found = match checked {
                HELLO_BYTES => Hello::decode(flipped.as_slice().try_into().unwrap()).is_err(),
                REPLY_BYTES => HelloReply::decode(flipped.as_slice().try_into().unwrap()).is_err(),
                _ => FrameHeader::decode(flipped[..HEADER_BYTES].try_into().unwrap(), sequence).is_err(),
            };
            assert!(found, "{name}: bit {bit}");
        }
    }
}

/// What a person would want to read when something else connects.
#[test]
fn strangers_are_named() {
    let mut old = Hello { role: Role::Control, session: SESSION }.encode();
    old[8] = 0;
    let error = Hello::decode(&old).unwrap_err();
    assert_eq!(error, WireError::Version { theirs: 0, ours: 1 });
    let error = check_beginning(b"GET / HTTP/1.1\r\nHost:").unwrap_err().to_string();
    assert!(error.contains("GET / HTTP/1.1"), "{error}");
    assert!(check_beginning(b"DUNL").is_ok() && check_beginning(b"").is_ok());
}

/// What a peer says comes to a person's terminal: it cannot steer that, nor look like lines of its own.
#[test]
fn texts_are_tame() {
    let hostile = "x\x1b]0;owned\x07\x1b[2J\ndunlin: completed\r\u{9b}1m";
    let tame = |text: &str| !text.is_empty() && !text.chars().any(char::is_control);
    let abort =
        Abort { reason: AbortReason::Failed, guest: GuestPlace::RunningAtSource, epoch: 1, text: hostile.into() };
    let body = Message::Abort(abort).encode();
    let Ok(Message::Abort(abort)) = Message::decode(FrameType::Abort, &body) else { panic!("it is one") };
    assert!(tame(&abort.text) && abort.text.ends_with("1m"), "{:?}", abort.text);
    let reply = HelloReply::Refused { reason: hostile.into() }.encode();
    let Ok(HelloReply::Refused { reason }) = HelloReply::decode(&reply) else { panic!("it is one") };
    assert!(tame(&reason), "{reason:?}");
    // Names are compared, so that they are not changed but refused.
    let body = Message::Accepted { features: vec!["page\x1b[2J".into()] }.encode();
    assert!(matches!(Message::decode(FrameType::Accepted, &body), Err(WireError::Text { .. })));
}

#[test]
fn runs_stay_inside_ram() {
    let good = PageRun { block: 1, kind: PageKind::Plain, offset: 0, length: 1 << 20, encoded_length: 1 << 20 };
    let check = |run: PageRun| {
        let mut table = Vec::new();
        encode_run(&mut table, &run);
        decode_runs(&table, run.encoded_length, &BLOCKS, &mut Vec::new())
    };
    assert_eq!(check(good), Ok(()));
    for bad in [
        PageRun { offset: 4096, ..good },
        PageRun { offset: u64::MAX - 4095, ..good },
        PageRun { offset: 1, length: 4096, encoded_length: 4096, ..good },
        PageRun { length: 4095, encoded_length: 4095, ..good },
        PageRun { length: 0, encoded_length: 0, ..good },
        PageRun { block: 2, ..good },
        PageRun { encoded_length: 5, ..good },
        PageRun { kind: PageKind::Zero, ..good },
    ] {
        assert!(check(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn runs_are_in_order() {
    let run = |block, offset| PageRun { block, kind: PageKind::Zero, offset, length: 8192, encoded_length: 0 };
    let check = |runs: &[PageRun]| {
        let mut table = Vec::new();
        runs.iter().for_each(|run| encode_run(&mut table, run));
        decode_runs(&table, 0, &BLOCKS, &mut Vec::new())
    };
    assert_eq!(check(&[run(0, 0), run(0, 8192), run(1, 0)]), Ok(()));
    for bad in [[run(0, 0), run(0, 4096)], [run(0, 0), run(0, 0)], [run(0, 8192), run(0, 0)], [run(1, 0), run(0, 8192)]]
    {
        assert!(matches!(check(&bad), Err(WireError::Order { .. })), "{bad:?}");
    }
}

proptest! {
    /// Hostile bodies give errors, never panics or allocations beyond their own size; what decodes, encodes back.
    #[test]
    fn any_body(number in 0usize..FrameType::ALL.len(), body in prop::collection::vec(any::<u8>(), 0..300)) {
        let frame_type = FrameType::ALL[number];
        if let Ok(message) = Message::decode(frame_type, &body) {
            prop_assert_eq!(message.encode(), body);
        }
    }

    #[test]
    fn any_header_and_table(bytes in any::<[u8; HEADER_BYTES - 4]>(), table in prop::collection::vec(any::<u8>(), 0..100)) {
        let sealed: [u8; HEADER_BYTES] = [&bytes[..], &table_checksum(&bytes).to_le_bytes()].concat().try_into().unwrap();
        let _ = FrameHeader::decode(&sealed, u64::from_le_bytes(bytes[8..16].try_into().unwrap()));
        let mut runs = Vec::new();
        if decode_runs(&table, 0, &BLOCKS, &mut runs).is_ok() {
            for run in runs {
                prop_assert!(run.offset + u64::from(run.length) <= BLOCKS[usize::from(run.block)]);
            }
        }
    }
}
