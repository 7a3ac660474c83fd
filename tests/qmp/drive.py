#!/usr/bin/env python3
"""PyPI's qemu.qmp drives two machines: `drive.py DUNLIN DIRECTORY`.

Its client class moves a guest there and back, with events, cancel, parameters, capabilities, errors, out-of-band
execution and descriptors; then its qmp-shell does it. Whatever is not as expected raises.
"""

import asyncio
import os
import socket
import subprocess
import sys

from qemu.qmp import ExecuteError, QMPClient

PATIENCE = 60


class Schema:
    """What `query-qmp-schema` says, and whether values are as it says."""

    JSON_TYPES = {"string": str, "boolean": bool, "int": int, "number": (int, float)}

    def __init__(self, entities):
        self.commands, self.events, self.types = {}, {}, {}
        kinds = {"command": self.commands, "event": self.events}
        for entity in entities:
            table = kinds.get(entity["meta-type"], self.types)
            assert entity["name"] not in table, entity
            table[entity["name"]] = entity
        for entity in entities:
            for name in self.named(entity):
                assert name in self.types, (entity, name)

    @staticmethod
    def named(entity):
        """The types that an entity names."""
        yield from (entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity)
        if entity["meta-type"] != "enum":
            yield from (member["type"] for member in entity.get("members", []))
        yield from (variant["type"] for variant in entity.get("variants", []))

    def check(self, name, value, where):
        entity = self.types[name]
        kind = entity["meta-type"]
        if kind == "builtin":
            if entity["json-type"] != "value":
                wanted = self.JSON_TYPES[entity["json-type"]]
                assert isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)), (where, value)
        elif kind == "array":
            for element in value:
                self.check(entity["element-type"], element, where + "[]")
        elif kind == "enum":
            assert value in entity["values"], (where, value)
        elif kind == "object":
            members = dict(self.members(entity, value))
            assert set(value) <= set(members), (where, set(value) - set(members))
            for name, member in members.items():
                if name in value:
                    self.check(member["type"], value[name], f"{where}.{name}")
                else:
                    assert "default" in member, (where, name)
        else:
            raise AssertionError((where, entity))

    def members(self, entity, value):
        yield from ((member["name"], member) for member in entity["members"])
        for variant in entity.get("variants", []):
            if variant["case"] == value.get(entity["tag"]):
                yield from self.members(self.types[variant["type"]], value)


class Machine:
    """A `dunlin run` and a client of it, which keeps every event."""

    def __init__(self, dunlin, directory, name, *arguments):
        self.name = name
        self.path = os.path.join(directory, f"{name}.qmp")
        self.process = subprocess.Popen(
            [dunlin, "run", "--memory", "128M", "--qmp", f"unix:{self.path}", "--qmp", "tcp:127.0.0.1:0",
             "--exit-with-parent", str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        said = self.process.stdout.readline()
        assert "QMP at unix:" in said, said
        self.port = int(said.strip().rsplit(":", 1)[1])
        self.qmp = QMPClient(name)
        self.events = []
        self.new = asyncio.Event()

    async def connect(self):
        await self.qmp.connect(self.path)
        assert "oob" in self.qmp.greeting.QMP.capabilities
        self.schema = Schema(await self.qmp.execute("query-qmp-schema"))
        names = {row["name"] for row in await self.qmp.execute("query-commands")}
        same(names, set(self.schema.commands))
        self.watching = asyncio.create_task(self.watch())

    async def watch(self):
        async for event in self.qmp.events:
            assert set(event) <= {"event", "data", "timestamp"} and set(event["timestamp"]) == {
                "seconds", "microseconds"}, event
            data = event.get("data", {})
            self.schema.check(self.schema.events[event["event"]]["arg-type"], data, event["event"])
            self.events.append((event["event"], data.get("status", data.get("pass"))))
            self.new.set()

    async def do(self, command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        result = await self.qmp.execute(command, arguments or None)
        self.schema.check(self.schema.commands[command]["ret-type"], result, command)
        return result

    async def refused(self, error_class, wanted, command, **arguments):
        try:
            await self.do(command, **arguments)
        except ExecuteError as error:
            assert error.error_class == error_class, error.error_class
            assert wanted in str(error), error
        else:
            raise AssertionError(f"{command} {arguments} was accepted")

    async def capabilities(self, **states):
        wanted = [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]
        await self.do("migrate-set-capabilities", capabilities=wanted)

    async def until(self, event):
        async def look():
            while event not in self.events:
                self.new.clear()
                await self.new.wait()
        try:
            await asyncio.wait_for(look(), PATIENCE)
        except asyncio.TimeoutError:
            raise AssertionError(f"{self.name}: no {event} among {self.events}") from None

    def take_events(self):
        """The events since the last time, with the passes checked and left out."""
        passes = [number for name, number in self.events if name == "MIGRATION_PASS"]
        assert passes == list(range(1, len(passes) + 1)), passes
        events = [status or name for name, status in self.events if name != "MIGRATION_PASS"]
        self.events.clear()
        return events, len(passes)


def same(got, wanted):
    assert got == wanted, f"got {got}, wanted {wanted}"


async def errors_and_parameters(a):
    await a.refused("CommandNotFound", "The command nonsense has not been found", "nonsense")
    await a.refused("CommandNotFound", "there is no postcopy yet", "migrate-start-postcopy")
    await a.refused("GenericError", "need either 'uri' or 'channels' argument", "migrate")
    await a.refused("GenericError", "Parameter 'x' is unexpected", "query-status", x=1)
    await a.refused("GenericError", "Invalid parameter type for 'uri', expected: string", "migrate", uri=1)
    before = await a.do("query-migrate-parameters")
    await a.refused("GenericError", "0 to 2000000", "migrate-set-parameters", max_bandwidth=1, downtime_limit=2000001)
    same(await a.do("query-migrate-parameters"), before)
    await a.do("migrate-set-parameters", max_bandwidth="20M", downtime_limit=200)
    after = await a.do("query-migrate-parameters")
    same((after["max-bandwidth"], after["downtime-limit"]), (20 << 20, 200))
    await a.capabilities(events=True, xbzrle=True)
    listed = {row["capability"]: row["state"] for row in await a.do("query-migrate-capabilities")}
    assert listed["events"] and listed["xbzrle"] and not listed["auto-converge"], listed
    same(await a.do("query-status"), {"status": "running", "running": True})
    same([name for name, command in a.schema.commands.items() if command.get("allow-oob")], ["migrate-pause"])
    for query in a.schema.commands:
        if query.startswith("query-"):
            await a.do(query)


async def stop_and_cont(a):
    await a.do("stop")
    await a.do("cont")
    same(a.take_events(), (["STOP", "RESUME"], 0))


async def cancelled(a, b, uri):
    await a.do("migrate", uri=uri)
    await a.until(("MIGRATION_PASS", 1))
    await a.until(("MIGRATION", "active"))
    info = await a.do("query-migrate")
    assert info["ram"]["total"] > 0 and info["status"] in ("setup", "active"), info
    await a.do("migrate_cancel")
    await a.until(("MIGRATION", "cancelled"))
    same(a.take_events()[0], ["setup", "active", "cancelling", "cancelled"])
    same((await a.do("query-migrate"))["status"], "cancelled")
    same((await a.do("query-status"))["running"], True)
    await b.until(("MIGRATION", "cancelled"))


async def moved_with_a_pause(a, b, uri):
    await a.capabilities(pause_before_switchover=True)
    await a.do("migrate-set-parameters", max_bandwidth=0, downtime_limit=300)
    await a.do("migrate", channels=[{"channel-type": "main", "addr": {
        "transport": "socket", "type": "inet", "host": "127.0.0.1", "port": uri.rsplit(":", 1)[1]}}])
    await a.until(("MIGRATION", "pre-switchover"))
    same(await a.do("query-status"), {"status": "finish-migrate", "running": False})
    await a.refused("GenericError", "Migration not in expected state: pre-switchover", "migrate-continue",
                    state="active")
    await a.do("migrate-continue", state="pre-switchover")
    await a.until(("MIGRATION", "completed"))
    await b.until(("MIGRATION", "completed"))
    events, passes = a.take_events()
    assert passes >= 1, passes
    same([event for event in events if event != "STOP"], ["setup", "active", "pre-switchover", "device", "completed"])
    same(events.count("STOP"), 1)
    assert events.index("STOP") < events.index("device"), events
    events = b.take_events()[0]
    assert events[-1] == "completed" and events[-2] == "RESUME", events
    # Twice: the one that was cancelled, and this one.
    same([event for event in events if event == "active"], ["active", "active"])
    same((await a.do("query-status"))["status"], "postmigrate")
    same((await b.do("query-status"))["status"], "running")
    info = await a.do("query-migrate")
    assert info["status"] == "completed" and info["downtime"] >= 0 and info["ram"]["remaining"] == 0, info
    await a.capabilities(pause_before_switchover=False)


async def verified(machine):
    found = await machine.do("x-verify")
    assert found["verified"], found


async def out_of_band(b):
    """While one command takes its time, another is answered."""
    long = asyncio.create_task(b.do("x-verify"))
    await asyncio.sleep(0)
    try:
        await b.qmp.execute("migrate-pause", oob=True)
    except ExecuteError as error:
        assert "postcopy" in str(error), error
    assert not long.done(), "x-verify was quicker than a command out of band"
    try:
        await b.qmp.execute("query-status", oob=True)
    except ExecuteError as error:
        assert "The command query-status does not support OOB" in str(error), error
    assert (await long)["verified"]


async def back_over_descriptors(a, b):
    """The guest goes back to where it came from, over a pair of sockets that this process has made."""
    ours, theirs = socket.socketpair()
    for machine, end in (a, ours), (b, theirs):
        await machine.refused("GenericError", "No file descriptor supplied via SCM_RIGHTS", "getfd", fdname="link")
        machine.qmp.send_fd_scm(end.fileno())
        await machine.do("getfd", fdname="link")
        end.close()
    await a.do("migrate-incoming", uri="fd:link")
    await b.do("migrate", uri="fd:link")
    await a.until(("MIGRATION", "completed"))
    await b.until(("MIGRATION", "completed"))
    # Both ends are used up.
    for machine in a, b:
        await machine.refused("GenericError", "File descriptor named 'link' not found", "closefd", fdname="link")
    same((await a.do("query-status"))["status"], "running")
    a.take_events(), b.take_events()


def shell(directory, machine, *lines):
    program = "from qemu.qmp.qmp_shell import main; main()"
    outcome = subprocess.run([sys.executable, "-c", program, machine.path], input="".join(f"{line}\n" for line in lines),
                             capture_output=True, text=True, timeout=PATIENCE,
                             env={**os.environ, "HOME": directory})
    assert outcome.returncode == 0, outcome
    return outcome.stdout


async def with_the_shell(directory, a, b):
    """qmp-shell moves the guest again."""
    said = shell(directory, b, "migrate-incoming uri=tcp:127.0.0.1:0", "query-migrate", "nonsense")
    assert '"socket-address"' in said and '"CommandNotFound"' in said, said
    port = (await b.do("query-migrate"))["socket-address"][0]["port"]
    said = shell(directory, a, "migrate-set-parameters max-bandwidth=0 downtime-limit=300",
                 f"migrate uri=tcp:127.0.0.1:{port}", "query-status")
    assert '"running"' in said or '"status"' in said, said
    await b.until(("MIGRATION", "completed"))
    await verified(b)


async def measured(machine):
    """The service that works without a migration: what is dirtied, and slowing it down."""
    await machine.refused("GenericError", "50 ms to 60 s", "calc-dirty-rate", calc_time=61)
    await machine.refused("GenericError", "Parameter 'mode' does not accept value 'x'", "calc-dirty-rate", calc_time=1,
                          mode="x")
    await machine.do("calc-dirty-rate", calc_time=200, calc_time_unit="millisecond", mode="dirty-bitmap")
    await machine.refused("GenericError", "is being measured", "calc-dirty-rate", calc_time=1)
    while (found := await machine.do("query-dirty-rate", calc_time_unit="millisecond"))["status"] != "measured":
        same((found["status"], found["calc-time"]), ("measuring", 200))
        await asyncio.sleep(0.05)
    same(-(-found["dirty-bytes-per-second"] >> 20), found["dirty-rate"])
    assert found["dirty-rate"] > 0, found
    await machine.refused("GenericError", "Parameter 'percentage' expects a value from 0 to 99", "set-vcpu-throttle",
                          percentage=100)
    await machine.refused("GenericError", "there is no vCPU 7", "set-vcpu-throttle", percentage=1, cpu_index=7)
    await machine.do("set-vcpu-throttle", percentage=60)
    same(await machine.do("query-vcpu-throttle"),
         [{"cpu-index": 0, "percentage": 60, "set-percentage": 60, "migration-percentage": 0}])
    await machine.do("cancel-vcpu-throttle", cpu_index=0)
    same((await machine.do("query-vcpu-throttle"))[0]["percentage"], 0)


async def over_tcp(b):
    client = QMPClient("tcp")
    await client.connect(("127.0.0.1", b.port))
    same((await client.execute("query-status"))["status"], "running")
    await client.disconnect()


async def ended(machine):
    await machine.do("quit")
    await machine.until(("SHUTDOWN", None))
    assert not machine.watching.done(), "an event was not as it must be"
    same(machine.process.wait(PATIENCE), 0)
    try:
        await machine.qmp.disconnect()
    except EOFError:
        pass


async def main(dunlin, directory):
    a = Machine(dunlin, directory, "a", "--workload", "pattern=uniform,rate=20M/s,working-set=16M")
    b = Machine(dunlin, directory, "b", "--incoming", "defer")
    try:
        for machine in a, b:
            await machine.connect()
        same((await b.do("query-status"))["status"], "inmigrate")
        await errors_and_parameters(a)
        await stop_and_cont(a)
        await measured(a)
        await b.capabilities(events=True)
        await b.do("migrate-incoming", uri="tcp:127.0.0.1:0", exit_on_error=False)
        await b.until(("MIGRATION", "setup"))
        uri = "tcp:127.0.0.1:" + (await b.do("query-migrate"))["socket-address"][0]["port"]
        await cancelled(a, b, uri)
        await moved_with_a_pause(a, b, uri)
        await out_of_band(b)
        await back_over_descriptors(a, b)
        await with_the_shell(directory, a, b)
        await over_tcp(b)
        for machine in a, b:
            await ended(machine)
    finally:
        for machine in a, b:
            machine.process.kill()
            machine.process.wait()


asyncio.run(main(*sys.argv[1:]))
print("driven")
