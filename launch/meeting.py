"""Where the launchers of several hosts meet: who takes part in a launch, and what becomes of it.

Host 0's launcher listens at the rendezvous; it outlives every launch and alone decides. torchrun's own
elastic rendezvous is not used: its store dies with the workers of one host, an old one that is still up
admits hosts to a round that is over, and a cut link ends the agents of healthy hosts. Here torchrun is told
who takes part (static rendezvous), and a host counts as lost when it has been silent for a while.

A host that has lost the rendezvous ends its part and waits: it cannot tell a dead host 0 from a cut link,
and two parts must never train one run. So the run goes on without other hosts (`min_nodes`), but not
without host 0.

Messages are lines of JSON: join, start, alive, ended, over.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import psutil

from engine.errors import UserError
from engine.verdict import Verdict
from launch.plan import Place, Plan
from launch.policy import Said
from launch.workers import said_from

ALIVE_SECONDS = 1.0
REPORT_SECONDS = 60.0
"""How long the other hosts may take to end their parts once one has ended."""
SAY_SECONDS = 60.0
FAREWELL_SECONDS = 3.0


class Lost(Exception):
    """The meeting has broken up; says how."""


class Line:
    """A connection to another launcher, with a thread that reads and one that says `alive`.

    Args:
        connection: an open TCP connection.
        lost_seconds: silence after which the other side counts as lost.
    """

    def __init__(self, connection: socket.socket, lost_seconds: float) -> None:
        self.lost_seconds = lost_seconds
        connection.settimeout(ALIVE_SECONDS)
        self._socket = connection
        self._sending = threading.Lock()
        self._heard = time.monotonic()
        self._closed = False
        self.here: str = connection.getsockname()[0]
        self.messages: list[dict[str, Any]] = []
        for work in (self._read, self._keep_alive):
            threading.Thread(target=work, daemon=True).start()

    @property
    def lost(self) -> bool:
        """Closed, or silent for too long."""
        return self._closed or time.monotonic() - self._heard > self.lost_seconds

    def say(self, kind: str, **values: Any) -> None:
        """Send a message; one that cannot be sent closes the line."""
        try:
            with self._sending:
                self._socket.sendall(json.dumps({"kind": kind, **values}).encode() + b"\n")
        except OSError:
            self.close()

    def take(self, kind: str) -> dict[str, Any] | None:
        """The oldest message of a kind, once."""
        for message in self.messages:
            if message["kind"] == kind:
                self.messages.remove(message)
                return message
        return None

    def close(self) -> None:
        self._closed = True
        self._socket.close()

    def _read(self) -> None:
        rest = b""
        while not self._closed:
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                return self.close()
            self._heard = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            try:
                messages = [json.loads(line) for line in lines]
                self.messages += [m for m in messages if m["kind"] != "alive"]
            except (ValueError, TypeError, KeyError):
                return self.close()  # somebody else's words

    def _keep_alive(self) -> None:
        while not self.lost:
            self.say("alive")
            time.sleep(ALIVE_SECONDS)


class Meeting:
    """What host 0 needs of the others; with one host, nothing. A context manager."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lines: dict[int, Line] = {}
        self._taking_part: dict[int, Line] = {}
        self._told: list[Line] = []  # that it is over
        self._listener: socket.socket | None = None

    def __enter__(self) -> Meeting:
        if self._plan.nodes > 1:
            host, port = self._plan.meeting_point
            try:
                self._listener = socket.create_server(("", port), family=_family(host))
            except OSError as error:
                raise UserError(f"--rendezvous: cannot listen on port {port} here ({error})") from None
            threading.Thread(target=self._welcome, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        end = time.monotonic() + FAREWELL_SECONDS
        while any(not line.lost for line in self._told) and time.monotonic() < end:
            time.sleep(0.02)  # closed too early, a line may lose its last words
        for line in self._lines.values():
            line.close()
        if self._listener is not None:
            self._listener.close()

    def gather(self, stop: Callable[[], bool]) -> Place | None:
        """Wait for the hosts of a launch; None where `stop` says so meanwhile.

        Raises:
            Lost: too few have come for too long.
        """
        plan, began = self._plan, time.monotonic()
        said = began
        while not stop():
            here = {node: line for node, line in sorted(self._lines.items()) if not line.lost}
            waited = time.monotonic() - began
            enough = plan.min_nodes and len(here) + 1 >= plan.min_nodes and waited > plan.go_on_seconds
            if len(here) + 1 == plan.nodes or enough:
                return self._start(here)
            text = f"{len(here) + 1} of {plan.nodes} hosts are here"
            if waited > plan.meet_seconds:
                raise Lost(f"{text} after {waited / 60:.0f} minutes; see why the others do not start")
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                _say(f"{text}; waiting for the others")
            time.sleep(0.1)
        return None

    def _start(self, here: dict[int, Line]) -> Place:
        self._taking_part = here
        address = next((line.here for line in here.values()), "127.0.0.1")
        place = Place(0, len(here) + 1, address, _free_port(address) if here else 0)
        for rank, line in enumerate(here.values(), start=1):
            line.messages.clear()
            line.say("start", place={**asdict(place), "rank": rank})
        return place

    def trouble(self) -> str:
        """Why this host's part should end, too: another's has ended, or another host was lost."""
        for node, line in self._taking_part.items():
            if line.lost:
                return f"host {node} was lost: its launcher has ended, or cannot be heard"
            if any(message["kind"] == "ended" for message in line.messages):
                return f"the part of host {node} has ended"
        return ""

    def reports(self) -> tuple[list[Said], bool, str]:
        """End the launch on all hosts: what the other hosts' workers have said, whether a kernel there ended
        one for lack of memory, and which host was lost."""
        said: list[Said] = []
        oom_killed, lost = False, ""
        end = time.monotonic() + REPORT_SECONDS
        for line in self._taking_part.values():
            line.say("end")
        for node, line in self._taking_part.items():
            while (message := line.take("ended")) is None and not line.lost and time.monotonic() < end:
                time.sleep(0.05)
            if message is None:
                lost = lost or f"host {node} was lost"
                line.close()
            else:
                said += [said_from(one) for one in message["said"]]
                oom_killed |= message["oom_killed"]
        return said, oom_killed, lost

    def tell(self, verdict: Verdict, again: bool) -> None:
        """Tell the other hosts what has been decided."""
        for line in self._taking_part.values():
            line.say("over", verdict=asdict(verdict), again=again)
        self._told = [] if again else list(self._taking_part.values())
        self._taking_part = {}

    def _welcome(self) -> None:
        while self._listener is not None:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._admit, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        line = Line(connection, self._plan.lost_seconds)
        end = time.monotonic() + self._plan.lost_seconds
        while (message := line.take("join")) is None:
            if line.lost or time.monotonic() > end:
                return line.close()
            time.sleep(0.05)
        try:
            node, theirs = int(message["node"]), message["run"]
        except (KeyError, ValueError, TypeError):
            return line.close()  # somebody else's words
        if theirs != self._plan.identity() or not 0 < node < self._plan.nodes:
            line.say("refused", why=f"host 0 has {self._plan.identity()}, host {node} {theirs}")
            return None
        if (old := self._lines.get(node)) is not None:
            old.close()
        self._lines[node] = line
        return None


class Guest:
    """What another host needs of host 0. A context manager."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._line: Line | None = None

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.close()

    def gather(self, stop: Callable[[], bool]) -> Place | None:
        """Wait for the next launch; None where `stop` says so meanwhile.

        Raises:
            Lost: host 0 cannot be reached for too long.
            UserError: host 0 trains another run.
        """
        began = said = time.monotonic()
        while not stop():
            if self._line is None or self._line.lost:
                self._join()
            if self._line is not None:
                if refused := self._line.take("refused"):
                    raise UserError(f"this is another run than that of host 0: {refused['why']}")
                if message := self._line.take("start"):
                    self._line.messages.clear()
                    return Place(**message["place"])
            if self._line is not None and not self._line.lost:
                began = time.monotonic()  # host 0 knows what it waits for
            if time.monotonic() - began > self._plan.meet_seconds:
                raise Lost(f"host 0 cannot be reached at {self._plan.rendezvous}; see why")
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                _say(f"waiting for host 0 at {self._plan.rendezvous}")
            time.sleep(0.1)
        return None

    def trouble(self) -> str:
        """Why this host's part should end."""
        if self._line is None or self._line.lost:
            return "host 0 was lost: its launcher has ended, or cannot be heard"
        if any(message["kind"] == "end" for message in self._line.messages):
            return "the part of another host has ended"
        return ""

    def report(self, said: Sequence[Said], oom_killed: bool) -> tuple[Verdict, bool]:
        """Say how this part ended; returns the verdict of the whole launch and whether another follows.

        Raises:
            Lost: host 0 cannot be heard.
        """
        line = self._line
        if line is not None:
            line.say("ended", said=[asdict(one) for one in said], oom_killed=oom_killed)
            while not line.lost:
                if message := line.take("over"):
                    return Verdict(**message["verdict"]), bool(message["again"])
                time.sleep(0.05)
        raise Lost(f"host 0 at {self._plan.rendezvous} was lost")

    def _join(self) -> None:
        try:
            connection = socket.create_connection(self._plan.meeting_point, timeout=ALIVE_SECONDS)
        except OSError:
            time.sleep(0.5)
            return
        if self._line is not None:
            self._line.close()
        self._line = Line(connection, self._plan.lost_seconds)
        self._line.say("join", node=self._plan.node_rank, run=self._plan.identity())


def interface(address: str) -> str:
    """Name of this host's network interface that leads to an address; "" where there is none."""
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing, but takes the route
            here = probe.getsockname()[0]
    except OSError:
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == here for one in addresses):
            return name
    return ""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _free_port(address: str) -> int:
    """Below the ports that kernels give to connections: none takes it in the seconds until torchrun does."""
    for port in (*random.SystemRandom().sample(range(20_000, 32_000), 100), 0):
        with suppress(OSError), socket.create_server((address, port), family=_family(address)) as server:
            return int(server.getsockname()[1])
    raise Lost(f"no port is free at {address}")


def _say(text: str) -> None:
    print(f"medfm: {text}", flush=True)
