"""Two hosts for real: network namespaces joined by a veth pair, a launcher in each, real training on gloo.

The link is cut in the middle of the run and mended; later one host is killed and comes back. The weights and
moments at the end are those of a run left alone, bit for bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from stand_in import alive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HERE = Path(__file__).parents[1] / "engine"
ENV = {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
UPDATES = 45
WORDS = [
    "--engine.updates", str(UPDATES), "--engine.checkpoint_every", "5", "--engine.lr", "0.01",
    "--engine.device", "cpu", "--engine.hang_minutes", "3", "--engine.log_every", "5",
]  # fmt: skip
ADDRESSES = ("10.203.77.1", "10.203.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces and the link between them."""

    def __init__(self) -> None:
        self.names = [f"medfm-{os.getpid()}-{n}" for n in range(2)]
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        for name in self.names:
            ip("netns", "add", name)
        ends = [f"v{os.getpid()}a", f"v{os.getpid()}b"]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "cluster0")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cluster0")
            ip("-n", name, "link", "set", "cluster0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", "cluster0", state)

    def start(self, node_rank: int, run: Path) -> subprocess.Popen[bytes]:
        """A host's launcher; nothing tells it which interface to take."""
        words = [*WORDS, "--sleep", "0.1"]
        code = f"""
import sys
from dataclasses import replace
from launch import local
from launch.plan import plan_run
local.FAILED_SECONDS = 6.0
plan = plan_run("toy_worker", None, {words!r}, 1, run={str(run)!r}, nodes=2, node_rank={node_rank},
                rendezvous="{ADDRESSES[0]}:29400")
sys.exit(local.launch(replace(plan, lost_seconds=6)).exit_code)
"""
        command = ["ip", "netns", "exec", self.names[node_rank], sys.executable, "-c", code]
        self.started.append(subprocess.Popen(command, env={**os.environ, **ENV}))
        return self.started[-1]

    def start_alone(self, run: Path) -> subprocess.Popen[bytes]:
        """The same run on two ranks of one host, whose network stays as it is, without a launcher."""
        launches = json.dumps([[2, [["--run", str(run), *WORDS]]]])
        command = [sys.executable, str(HERE / "forked_ranks.py"), launches]
        self.started.append(subprocess.Popen(command, env={**os.environ, **ENV}))
        return self.started[-1]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts() as hosts:
            yield hosts
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here ({getattr(error, 'stderr', error)})")


def wait_for(what: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
    return found


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    file = run / "launches.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["event"] == event]


def saved(run: Path) -> int:
    """Updates done at the newest checkpoint."""
    return max((int(f.parent.name[7:]) for f in run.glob("checkpoints/update-*/complete.json")), default=0)


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"update-{UPDATES:08d}"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) >= 3  # one of each rank and the weights for use
    return {f"{f.name}/{key}": tensor for f in files for key, tensor in load_file(f).items()}


def test_a_cut_link_and_a_killed_host_change_no_bit(hosts: Hosts, tmp_path: Path) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    first, second = hosts.start(0, run), hosts.start(1, run)
    undisturbed = hosts.start_alone(alone)
    wait_for(lambda: saved(run) >= 10)
    hosts.link("down")
    wait_for(lambda: rows(run, "end"))
    assert "host 1 was lost" in rows(run, "end")[0]["verdict"]["message"]
    reached = saved(run)
    hosts.link("up")
    wait_for(lambda: saved(run) >= reached + 10)
    family = psutil.Process(second.pid).children(recursive=True)
    second.kill()
    second.wait()
    wait_for(lambda: len(rows(run, "end")) == 2)
    wait_for(lambda: not any(alive(process.pid) for process in family))
    second = hosts.start(1, run)
    assert first.wait(timeout=300) == second.wait(timeout=300) == 0
    assert [end["verdict"]["state"] for end in rows(run, "end")] == ["failed", "failed", "finished"]
    for rank in range(2):  # what each was in when the other was lost
        stacks = (run / "logs" / f"rank-{rank:03d}.stacks.txt").read_text()
        assert "all_reduce" in stacks
    assert {start["nodes"] for start in rows(run, "launch")} == {2}

    assert undisturbed.wait(timeout=300) == 0
    truth, found = final_tensors(alone), final_tensors(run)
    assert truth.keys() == found.keys()
    assert all(torch.equal(truth[key], found[key]) for key in truth)
