#!/usr/bin/env python3
"""Downtime of an idle machine, and convergence under uniform dirtying at parts of the measured bandwidth.

Runs `dunlin demo --json` again and again and prints what must hold beside what was measured:

    scripts/convergence.py [--binary target/release/dunlin] [--memory 2G] [--idle 10] [--runs 20] [-- DEMO OPTIONS]
"""
import argparse
import json
import statistics
import subprocess
import sys


def demo(arguments, workload):
    command = [arguments.binary, "demo", "--json", "--memory", arguments.memory, "--workload", workload]
    done = subprocess.run(command + arguments.rest, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    result = json.loads(done.stdout)
    if not result["verified"]:
        sys.exit(f"{' '.join(command)}: not verified")
    return result["report"]


def spread(values, scale=1e3):
    values = sorted(v * scale for v in values)
    return f"median {statistics.median(values):7.1f}  min {values[0]:7.1f}  max {values[-1]:7.1f}"


def errors(reports):
    """Each prediction's error, and whether it is within the larger of 30 % and 5 ms."""
    return [abs(r["predicted_downtime_seconds"] - r["downtime_seconds"]) for r in reports]


parser = argparse.ArgumentParser()
parser.add_argument("--binary", default="target/release/dunlin")
parser.add_argument("--memory", default="2G")
parser.add_argument("--working-set", default="512M")
parser.add_argument("--idle", type=int, default=10)
parser.add_argument("--runs", type=int, default=20)
parser.add_argument("rest", nargs="*")
arguments = parser.parse_args()
good = True


def verdict(text, holds):
    global good
    good &= holds
    print(f"  {'holds' if holds else 'DOES NOT HOLD':14} {text}")


idle = [demo(arguments, "idle") for _ in range(arguments.idle)]
downtimes = [r["downtime_seconds"] for r in idle]
bandwidth = statistics.median(r["bandwidth_bytes_per_second"] for r in idle)
print(f"idle, {arguments.memory}, {arguments.idle} runs: downtime ms {spread(downtimes)}")
print(f"  bandwidth {bandwidth / 2**20:.0f} MiB/s; predicted ms {spread([r['predicted_downtime_seconds'] for r in idle])}")
verdict("median downtime at most 15 ms", statistics.median(downtimes) <= 0.015)

for percent in (25, 50, 75):
    rate = int(bandwidth * percent / 100)
    workload = f"pattern=uniform,rate={rate}/s,working-set={arguments.working_set},content=random"
    reports = [demo(arguments, workload) for _ in range(arguments.runs)]
    downtimes = [r["downtime_seconds"] for r in reports]
    limit = reports[0]["downtime_limit_seconds"]
    within = sum(d <= limit for d in downtimes)
    wrong = statistics.median(errors(reports))
    allowed = max(0.005, 0.3 * statistics.median(downtimes))
    rounds = statistics.median(len(r["rounds"]) for r in reports)
    total = statistics.median(r["total_seconds"] for r in reports)
    print(f"uniform at {percent} % ({rate / 2**20:.0f} MiB/s), {len(reports)} runs: downtime ms {spread(downtimes)}")
    print(f"  predicted ms {spread([r['predicted_downtime_seconds'] for r in reports])}; rounds {rounds}, total {total:.2f} s")
    verdict(f"within the limit in at least 19 of 20: {within} of {len(reports)}", within * 20 >= 19 * len(reports))
    verdict(f"median error of the prediction {wrong * 1e3:.1f} ms, at most {allowed * 1e3:.1f} ms", wrong <= allowed)

sys.exit(0 if good else 1)
