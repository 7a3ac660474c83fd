#!/usr/bin/env python3
"""`dunlin demo` over channels, transports, vCPUs, patterns and contents, and over sizes; prints the count.

    scripts/matrix.py [--binary target/release/dunlin] [--sizes 64M,512M,2G,8G]

Every combination runs at 64 MiB; then every size with 1, 2, 4 and 8 channels on both transports.
"""
import argparse
import itertools
import json
import subprocess
import sys
import time

CHANNELS = (1, 2, 4, 8)
TRANSPORTS = ("tcp", "unix")
VCPUS = (1, 4)
PATTERNS = ("uniform", "sequential", "zipf", "hotcold")
CONTENTS = ("random", "text", "sparse", "counter")

parser = argparse.ArgumentParser()
parser.add_argument("--binary", default="target/release/dunlin")
parser.add_argument("--sizes", default="64M,512M,2G,8G")
arguments = parser.parse_args()


def demo(memory, channels, transport, vcpus, workload):
    command = [arguments.binary, "demo", "--json", "--memory", memory, "--vcpus", str(vcpus), "--transport", transport,
               "--set", f"multifd-channels={channels}", "--workload", workload]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - began
    try:
        result = json.loads(done.stdout)
        good = done.returncode == 0 and result["verified"] is True and result["report"]["status"] == "completed"
    except (json.JSONDecodeError, KeyError):
        good = False
    if not good:
        sys.exit(f"FAILED: {' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return seconds


longest = []
for channels, transport, vcpus, pattern, content in itertools.product(CHANNELS, TRANSPORTS, VCPUS, PATTERNS, CONTENTS):
    longest.append(demo("64M", channels, transport, vcpus, f"pattern={pattern},content={content},rate=100M/s,working-set=16M"))
print(f"{len(longest)} combinations at 64M: all verified, longest {max(longest):.1f} s")
for memory in arguments.sizes.split(","):
    longest = [demo(memory, channels, transport, 4, "rate=100M/s,working-set=64M")
               for channels, transport in itertools.product(CHANNELS, TRANSPORTS)]
    print(f"{memory}: {len(longest)} demos, all verified, longest {max(longest):.1f} s")
