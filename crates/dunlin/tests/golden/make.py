#!/usr/bin/env python3
"""A second implementation of docs/wire-format.md, written from that page alone: makes the golden bytes.

Run it in this directory: ./make.py > v1.txt. Nothing here is shared with the Rust code, the checksums included.
"""
import struct


def crc(data, poly, bits):
    """Bit by bit, reflected, all ones in and out."""
    mask = (1 << bits) - 1
    value = mask
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (poly if value & 1 else 0)
    return value ^ mask


def crc32c(data):
    return crc(data, 0x82F63B78, 32)


def crc64nvme(data):
    return crc(data, 0x9A6C9329AC4BC9B5, 64)


assert crc32c(b"123456789") == 0xE3069283
assert crc64nvme(b"123456789") == 0xAE8B14860A799888

SESSION = bytes(range(16))


def name(text):
    return struct.pack("<B", len(text)) + text.encode()


def hello(role, index):
    body = b"DUNLIN\r\n" + struct.pack("<HBBI", 1, role, index, 0) + SESSION + bytes(28)
    return body + struct.pack("<I", crc32c(body))


def answer(status, reason):
    body = b"DUNLIN\r\n" + struct.pack("<HBB", 1, status, 0) + reason.encode().ljust(304, b"\0")
    return body + struct.pack("<I", crc32c(body))


def frame(kind, sequence, data=b"", table=b"", pages=None):
    """`pages` is what the data stands for, in a frame of pages."""
    check = crc64nvme(data) if pages is None else 0
    trailer = b"" if pages is None else struct.pack("<Q", crc64nvme(pages))
    head = b"DLF1" + struct.pack("<HHQIIIQ", kind, 0, sequence, len(table), len(data), crc32c(table), check)
    return head + struct.pack("<I", crc32c(head)) + table + data + trailer


def entry(offset, length, encoded, block, kind):
    return struct.pack("<QIIHBB", offset, length, encoded, block, kind, 0)


def leb128(value):
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80, high]) if high else bytes([low])


def change(unchanged, new):
    return leb128(unchanged) + leb128(len(new)) + new


page = bytes((i * 7) & 0xFF for i in range(4096))
start = (
    struct.pack("<BH", 2, 2)
    + struct.pack("<B", 1) + name("page-zero")
    + struct.pack("<B", 0) + name("page-plain")
    + struct.pack("<H", 1) + struct.pack("<QQ", 1 << 30, 4096) + name("ram")
    + struct.pack("<I", 3) + b"abc"
    + struct.pack("<Q", 300_000_000)
)
# A page of zeros, with three bytes of it changed.
changed = bytes(3) + b"\x07" + bytes(296) + b"\x08\x09" + bytes(4096 - 302)
CASES = {
    "hello-control": hello(0, 0),
    "hello-data-7": hello(1, 7),
    "hello-single": hello(2, 0),
    "hello-reconnect": hello(3, 0),
    "answer-welcome": answer(0, ""),
    "answer-refused": answer(1, "busy"),
    "start": frame(1, 0, start),
    "accepted": frame(2, 1, struct.pack("<H", 2) + name("page-zero") + name("page-plain")),
    "round-done": frame(
        3, 2, struct.pack("<IQQQQQQQQQQQQQQQQQ", *range(1, 19)) + struct.pack("<BBBBB", 2, 0, 0, 40, 70) + struct.pack("<H", 4) + b"slow" + b"\1"
    ),
    "mark": frame(4, 3, struct.pack("<I", 9)),
    "mark-ack": frame(5, 4, struct.pack("<IB", 9, 3)),
    "section": frame(6, 5, struct.pack("<IIBQQ", 1, 2, 1, 7, 6) + name("vcpu") + b"sta"),
    "offer": frame(7, 6, struct.pack("<IIQQQQQBQQQQQQ", 4, 3, 100, 200, 300, 400, 500, 1, 1, 2, 3, 4, 0, 0)),
    "ready": frame(8, 7, struct.pack("<QQ", 1, 42)),
    "release": frame(9, 8, struct.pack("<QQQ", 1, 42, 7_500_000_000)),
    "running": frame(10, 9, struct.pack("<QQQQ", 1000, 2000, 3000, 2)),
    "done": frame(11, 10, struct.pack("<QQQQQQQQ", 5_000_000, *range(1, 7), 7)),
    "abort": frame(12, 11, struct.pack("<BBQH", 1, 5, 2, 9) + b"cancelled"),
    "abort-ended": frame(12, 15, struct.pack("<BBQH", 6, 6, 1, 5) + b"reset"),
    "query": frame(13, 12, struct.pack("<Q", 3)),
    "heartbeat": frame(14, 13, struct.pack("<QQ", 1 << 40, 3)),
    "stopped": frame(15, 14, struct.pack("<QQB", 8, 4096, 1)),
    "probe": frame(16, 15, struct.pack("<IBQ", 3, 1, 7) + b"any"),
    "probed": frame(17, 16, struct.pack("<IQQQ", 3, 1000, 2000, 3000)),
    "pages": frame(32, 1 << 40, page, entry(1 << 21, 8192, 0, 0, 0) + entry(4096, 4096, 4096, 1, 1), page),
    "pages-delta": frame(32, 5, change(3, b"\x07") + change(296, b"\x08\x09"), entry(0, 4096, 8, 0, 2), changed),
}
for label, data in CASES.items():
    print(label, data.hex())
