"""Launchers of several hosts that meet: here on one machine, with workers that load no library."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from stand_in import alive

from engine.errors import UserError
from launch.meeting import Guest, Meeting, interface
from launch.plan import Plan, plan_run

HERE = Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """Below the ports that the kernel gives to connections, so that none takes it."""
    for port in random.SystemRandom().sample(range(12_000, 20_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no free port")


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
    return found


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    file = run / "launches.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["event"] == event]


class Hosts:
    """Starts the launchers; ends what is left of them."""

    def __init__(self, run: Path) -> None:
        self.run, self.port = run, free_port()
        self.on = run / "on"  # training has no end while it exists
        run.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, node_rank: int, min_nodes: int = 0, *words: str) -> subprocess.Popen[bytes]:
        overrides = ["--engine.min_nodes", str(min_nodes), *words]
        code = f"""
import sys
from dataclasses import replace
from launch.local import launch
from launch.plan import plan_run
plan = plan_run("stand_in", None, {overrides!r}, 1, run={str(self.run)!r}, nodes=2, node_rank={node_rank},
                rendezvous="localhost:{self.port}")
sys.exit(launch(replace(plan, go_on_seconds=2)).exit_code)
"""
        self.started.append(subprocess.Popen([sys.executable, "-c", code], env=ENV))
        return self.started[-1]

    def training(self, launch: int) -> None:
        """Wait until both ranks of a launch train."""
        wait_for(lambda: len(rows(self.run, "launch")) >= launch)
        wait_for(
            lambda: len(list(self.run.glob(f"training-{launch}-*"))) == rows(self.run, "launch")[-1]["nodes"]
        )


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path / "run")
    yield hosts
    for process in hosts.started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_two_hosts_train_one_run_and_a_killed_one_comes_back(hosts: Hosts) -> None:
    hosts.on.touch()
    first, second = hosts.start(0), hosts.start(1)
    hosts.training(1)
    second.kill()
    hosts.on.unlink()
    wait_for(lambda: rows(hosts.run, "end"))
    hosts.on.touch()
    second = hosts.start(1)
    hosts.training(2)
    first.kill()  # and with it the rendezvous
    hosts.on.unlink()
    first = hosts.start(0)
    assert first.wait(timeout=120) == second.wait(timeout=120) == 0
    ends = rows(hosts.run, "end")
    assert "host 1 was lost" in ends[0]["verdict"]["message"]
    assert [end["verdict"]["state"] for end in ends] == ["failed", "finished"]
    assert [start["attempt"] for start in rows(hosts.run, "launch")] == [1, 2, 3]
    assert {start["nodes"] for start in rows(hosts.run, "launch")} == {2}


@pytest.mark.slow
def test_a_surviving_host_goes_on_alone_where_the_recipe_allows_it(hosts: Hosts) -> None:
    hosts.on.touch()
    second = hosts.start(1, 1)
    time.sleep(0.5)  # it looks for host 0 by then, or almost: that one does not wait for long
    first = hosts.start(0, 1)
    hosts.training(1)
    family = psutil.Process(second.pid).children(recursive=True)
    second.kill()
    hosts.on.unlink()
    assert first.wait(timeout=120) == 0
    assert next(start["nodes"] for start in rows(hosts.run, "launch")) == 2
    assert [start["nodes"] for start in rows(hosts.run, "launch")][-1] == 1
    wait_for(lambda: not any(alive(process.pid) for process in family), seconds=20)


def test_a_signal_to_one_launcher_ends_the_run_on_both_hosts(hosts: Hosts) -> None:
    hosts.on.touch()
    first, second = hosts.start(0), hosts.start(1)
    hosts.training(1)
    second.send_signal(signal.SIGUSR1)
    assert first.wait(timeout=120) == second.wait(timeout=120) == 75
    assert [end["verdict"]["state"] for end in rows(hosts.run, "end")] == ["preempted"]


def test_another_run_is_refused(tmp_path: Path) -> None:
    def plan(node_rank: int, *words: str) -> Plan:
        place = {"nodes": 2, "node_rank": node_rank, "rendezvous": f"localhost:{port}"}
        return plan_run("stand_in", None, words, run=tmp_path, **place)  # type: ignore[arg-type]

    port = free_port()
    with Meeting(plan(0)), Guest(plan(1, "--updates", "9")) as guest:
        with pytest.raises(UserError, match="another run than that of host 0"):
            guest.gather(lambda: False)
        with pytest.raises(UserError, match="cannot listen"), Meeting(plan(0)):
            pass


def test_strangers_at_the_rendezvous_do_not_matter(tmp_path: Path) -> None:
    place = {"nodes": 2, "rendezvous": f"localhost:{free_port()}"}
    host = plan_run("stand_in", None, run=tmp_path, **place)  # type: ignore[arg-type]
    with Meeting(host) as meeting:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"kind": "join"}\n'):
            with socket.create_connection(host.meeting_point) as stranger:
                stranger.sendall(words)
                while stranger.recv(4096):
                    pass
        ended = time.monotonic() + 0.3
        assert meeting.gather(lambda: time.monotonic() > ended) is None


def test_the_interface_is_the_one_on_the_route() -> None:
    assert interface("127.0.0.1") == "lo"
    assert interface("not an address") == ""
