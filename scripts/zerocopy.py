#!/usr/bin/env python3
"""Whether MSG_ZEROCOPY saves the kernel's copy on this machine: sends the same memory over loopback TCP with it and
without, and counts how many of its completions say that the kernel copied all the same.

    scripts/zerocopy.py [--mib 1024] [--runs 5]
"""
import argparse
import mmap
import multiprocessing
import os
import socket
import statistics
import struct
import time

SO_ZEROCOPY, MSG_ZEROCOPY, MSG_ERRQUEUE = 60, 0x4000000, 0x2000
SO_EE_CODE_ZEROCOPY_COPIED = 1
BLOCK = 1 << 20


def receive(listener, mib):
    connection, _ = listener.accept()
    memory = memoryview(bytearray(BLOCK))
    for _ in range(mib):
        got = 0
        while got < BLOCK:
            got += connection.recv_into(memory[got:])
    connection.sendall(b"1")


def completions(connection):
    """How many sends have completed, and how many of these were copied."""
    done = copied = 0
    while True:
        try:
            _, ancillary, _, _ = connection.recvmsg(0, 512, MSG_ERRQUEUE)
        except BlockingIOError:
            return done, copied
        for _, _, data in ancillary:
            # struct sock_extended_err: errno, origin, type, code, pad, info, data
            _, _, _, code, _, first, last = struct.unpack("=IBBBBII", data[:16])
            count = last - first + 1
            done += count
            copied += count if code & SO_EE_CODE_ZEROCOPY_COPIED else 0


def send(memory, mib, zerocopy):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = multiprocessing.Process(target=receive, args=(listener, mib))
        peer.start()
        connection = socket.create_connection(listener.getsockname())
        if zerocopy:
            connection.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        began, cpu = time.monotonic(), time.process_time()
        done = copied = 0
        for block in range(mib):
            rest = memory[block * BLOCK : (block + 1) * BLOCK]
            while rest:
                try:
                    rest = rest[connection.send(rest, MSG_ZEROCOPY if zerocopy else 0) :]
                except OSError as error:
                    # ENOBUFS: too many completions have not been fetched.
                    if error.errno != 105:
                        raise
                if zerocopy:
                    more, also = completions(connection)
                    done, copied = done + more, copied + also
        connection.recv(1)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        if zerocopy:
            more, also = completions(connection)
            done, copied = done + more, copied + also
        peer.join()
        connection.close()
        return seconds, cpu, done, copied


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mib", type=int, default=1024)
parser.add_argument("--runs", type=int, default=5)
arguments = parser.parse_args()
memory = mmap.mmap(-1, arguments.mib * BLOCK)
for block in range(arguments.mib):
    memory[block * BLOCK : (block + 1) * BLOCK] = os.urandom(BLOCK)
view = memoryview(memory)
results = {False: [], True: []}
for _ in range(arguments.runs):
    for zerocopy in results:
        results[zerocopy].append(send(view, arguments.mib, zerocopy))
for zerocopy, runs in results.items():
    rates = [arguments.mib * BLOCK / seconds / 1e9 for seconds, *_ in runs]
    cpus = [cpu * 1024 / arguments.mib for _, cpu, *_ in runs]
    done, copied = sum(run[2] for run in runs), sum(run[3] for run in runs)
    print(
        f"{'MSG_ZEROCOPY' if zerocopy else 'send':12}  {statistics.median(rates):.2f} GB/s ({min(rates):.2f}-{max(rates):.2f}),"
        f" {statistics.median(cpus):.2f} CPU s/GiB at the sender"
        + (f"; {copied} of {done} completions say that the kernel copied" if zerocopy else "")
    )
