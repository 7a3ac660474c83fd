#!/usr/bin/env python3
"""Shows that the table of parameters is the only place: in a copy of the sources, changes one default and adds one row
there, builds, and looks for both in everything that is made from the table. Takes about a minute after a release build, of
which it takes the other crates, and leaves nothing changed.

Usage: scripts/one-table.py [--keep]      (--keep leaves the copy in target/one-table)
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "one-table"
SOURCES = WORK / "sources"
TABLE = "crates/dunlin/src/parameters.rs"

# A default that is changed: what the row says, and what it is to say.
CHANGED, FIELD = "downtime-limit", "downtime_limit"
OLD, NEW = '"downtime-limit", Unit::Milliseconds, 300,', '"downtime-limit", Unit::Milliseconds, 345,'
# A row that is added.
ADDED = "one-table-probe"
HELP = "A parameter that is there to see where it appears."
ROW = f'''    one_table_probe: u64 = "{ADDED}", Unit::Bytes, 12_288, 4_096..=1_048_576, Both, Live,
        "{HELP}";
'''
END_OF_TABLE = '''}

impl ParameterInfo {'''

# The struct, from outside.
PROBE = '''//! The struct, from outside.
fn main() {
    let parameters = dunlin::Parameters::default();
    println!("{} {}", parameters.downtime_limit.as_millis(), parameters.one_table_probe);
}
'''


def run(*command, **more):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, **more).stdout


def replace(path, old, new):
    text = path.read_text()
    if text.count(old) != 1:
        sys.exit(f"one-table: {path.relative_to(SOURCES)} does not have {old!r} once: mend this script")
    path.write_text(text.replace(old, new))


def copy():
    shutil.rmtree(WORK, ignore_errors=True)
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, SOURCES / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def built_here():
    """What builds of the workspace's own crates have left in the real target directory."""
    left = ROOT / "target" / "release"
    return {path for part in ("deps", "examples", "build", ".fingerprint") if (left / part).is_dir()
            for path in (left / part).iterdir() if "dunlin" in path.name or "one_table" in path.name}


def build():
    # With a version of their own, its crates' files get names of their own beside those of the real ones.
    manifest = SOURCES / "Cargo.toml"
    manifest.write_text(manifest.read_text().replace('version = "0.1.0"', 'version = "0.1.0-one-table"'))
    example = SOURCES / "crates/cli/examples/one_table.rs"
    example.parent.mkdir(exist_ok=True)
    example.write_text(PROBE)
    environment = dict(os.environ, CARGO_TARGET_DIR=str(WORK / "target"), CARGO_BUILD_BUILD_DIR=str(ROOT / "target"))
    command = ["cargo", "build", "--release", "--offline", "--message-format=json-render-diagnostics"]
    command += ["-p", "dunlin-cli", "--bin", "dunlin", "--example", "one_table"]
    # Only texts are looked at. Crates of others are there already, as they are.
    for crate in ("dunlin", "dunlin-machines", "dunlin-monitor", "dunlin-cli"):
        command += ["--config", f"profile.release.package.{crate}.opt-level=0"]
    before = built_here()
    built = subprocess.run(command, cwd=SOURCES, env=environment, stdout=subprocess.PIPE, text=True)
    left = built_here() - before
    if built.returncode != 0:
        sys.exit("one-table: the copy does not build: is a new row all that a parameter takes?")
    messages = [json.loads(line) for line in built.stdout.splitlines() if line.startswith("{")]
    programs = {message["target"]["name"]: message["executable"] for message in messages if message.get("executable")}
    return programs["dunlin"], programs["one_table"], left


class Machine:
    """A machine of the copy, and its QMP."""

    def __init__(self, dunlin):
        self.dunlin = dunlin
        self.path = WORK / "qmp"
        # A socket's name must be short: it is given from where it is.
        self.process = subprocess.Popen([dunlin, "run", "--memory", "16M", "--qmp", "unix:qmp"], cwd=WORK,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        self.stream = None

    def __enter__(self):
        deadline = time.monotonic() + 20
        while self.stream is None:
            try:
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(20)
                here = os.getcwd()
                os.chdir(WORK)
                try:
                    client.connect("qmp")
                finally:
                    os.chdir(here)
                self.stream = client.makefile("rw")
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.stream.readline()
        self.execute("qmp_capabilities")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def execute(self, command, **arguments):
        request = {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        while True:
            reply = json.loads(self.stream.readline())
            if "error" in reply:
                raise AssertionError(f"{command}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]

    def monitor(self, *commands):
        flags = [word for command in commands for word in ("-c", command)]
        return run(self.dunlin, "monitor", "--qmp", "unix:qmp", *flags, cwd=WORK)


def same(found, wanted):
    if found != wanted:
        raise AssertionError(f"{found!r} and not {wanted!r}")


def holds(text, *wanted):
    for one in wanted:
        if one not in text:
            raise AssertionError(f"{one!r} is not in:\n{text}")


def fresh(dunlin, look):
    """A check on a machine of its own, whose parameters nobody has set."""
    with Machine(dunlin) as machine:
        look(machine)


def struct(probe):
    same(run(probe).split(), ["345", "12288"])


def qmp(machine):
    parameters = machine.execute("query-migrate-parameters")
    same([parameters.get(CHANGED), parameters.get(ADDED)], [345, 12288])
    machine.execute("migrate-set-parameters", **{ADDED: 8192})
    same(machine.execute("query-migrate-parameters")[ADDED], 8192)


def hmp(machine):
    holds(machine.monitor("info migrate_parameters"), f"{CHANGED}: 345ms\n", f"{ADDED}: 12K\n")
    same(machine.monitor(f"migrate_set_parameter {ADDED} 64K", f"info migrate_parameters"
                         ).splitlines()[0], f"{ADDED}: 64K")
    holds(machine.monitor("info migrate_parameters"), f"{ADDED}: 64K\n")
    holds(machine.monitor("help migrate_set_parameter"), f"  {ADDED} (4096 to 1048576) -- {HELP}")
    holds(machine.monitor(f"info migrate_parameters {CHANGED}"), "default: 345ms")


def command_line(machine):
    # There is nobody to migrate to, and the parameter is set for the next attempt.
    migrate = [machine.dunlin, "migrate", "--qmp", "unix:qmp", "unix:nobody", "--set", f"{ADDED}=20K"]
    failed = subprocess.run(migrate, cwd=WORK, capture_output=True, text=True, timeout=60)
    holds(failed.stderr, "the guest is running at the source")
    same(machine.execute("query-migrate-parameters")[ADDED], 20480)
    refused = subprocess.run([machine.dunlin, "demo", "--set", f"{ADDED}=1"], capture_output=True, text=True, timeout=60)
    same(refused.returncode, 2)
    holds(refused.stderr, f"{ADDED}: 1 is out of range: 4096 to 1048576 bytes")


def completion(dunlin):
    def offered(word):
        environment = dict(os.environ, _DUNLIN_COMPLETE="bash")
        return run(dunlin, "--", f"dunlin migrate --set {word}", word, env=environment).split()
    same(offered(ADDED[:7]), [f"{ADDED}="])
    same(offered(f"{ADDED}="), [f"{ADDED}=12K"])
    same(offered(f"{CHANGED}="), [f"{CHANGED}=345ms"])


def listing(dunlin):
    lines = {line.split()[0]: line for line in run(dunlin, "parameters").splitlines() if line}
    holds(lines[CHANGED], " 345ms ")
    holds(lines[ADDED], " 12K ", "4096 to 1048576", HELP)
    rows = {row["name"]: row for row in json.loads(run(dunlin, "parameters", "--json"))}
    same([rows[CHANGED]["default"], rows[ADDED]["default"]], [345, 12288])


def documentation(dunlin):
    text = run(dunlin, "parameters", "--markdown")
    holds(text, f"| [`{CHANGED}`](#{CHANGED}) | duration | ms | `345ms` |", f"| [`{ADDED}`](#{ADDED}) | size | bytes | `12K` |",
          f"## {ADDED}\n\n{HELP}\n")
    if text == (SOURCES / "docs/parameters.md").read_text():
        raise AssertionError("docs/parameters.md would not be found stale")


def introspection(machine):
    rows = {row["name"]: row for row in machine.execute("query-migrate-parameters-info")}
    same(rows[CHANGED]["default"], 345)
    wanted = {"type": "size", "unit": "bytes", "default": 12288, "minimum": 4096, "maximum": 1048576, "side": "both",
              "live": True, "help": HELP}
    same({name: rows[ADDED].get(name) for name in wanted}, wanted)
    holds(json.dumps(machine.execute("query-qmp-schema")), f'"{ADDED}"')


def main():
    copy()
    replace(SOURCES / TABLE, OLD, NEW)
    replace(SOURCES / TABLE, END_OF_TABLE, ROW + END_OF_TABLE)
    dunlin, probe, left = build()
    checks = [
        ("the struct's default", lambda: struct(probe)),
        ("QMP query and set", lambda: fresh(dunlin, qmp)),
        ("HMP show and set", lambda: fresh(dunlin, hmp)),
        ("--set", lambda: fresh(dunlin, command_line)),
        ("shell completion", lambda: completion(dunlin)),
        ("dunlin parameters", lambda: listing(dunlin)),
        ("docs/parameters.md", lambda: documentation(dunlin)),
        ("introspection", lambda: fresh(dunlin, introspection)),
    ]
    missing = 0
    for name, check in checks:
        try:
            check()
            print(f"{name}: both are there")
        except (AssertionError, KeyError, OSError, subprocess.SubprocessError) as error:
            missing += 1
            print(f"{name}: MISSING: {type(error).__name__}: {error}")
    if "--keep" not in sys.argv:
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(WORK)
    if missing:
        sys.exit(f"one-table: in {missing} of {len(checks)} places the table is not all there is")
    print(f"one edit of {TABLE} changes all {len(checks)}")


if __name__ == "__main__":
    main()
