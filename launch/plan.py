"""What is to be launched, as one frozen object that every launcher renders in its own words."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from engine.errors import UserError
from engine.recipe import EngineConfig, load_recipe

STAGES = ("pretrain", "finetune")


class _Settings(BaseModel):
    """What a launcher needs of a recipe, whatever its stage."""

    run: str = ""
    engine: EngineConfig = EngineConfig()


@dataclass(frozen=True)
class Place:
    """One launch's processes among those of the other hosts.

    Attributes:
        rank: of this host among those that take part.
        nodes: how many take part.
        address: IP address at which the first of them is reached.
        port: free there.
    """

    rank: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True)
class Plan:
    """A run and the processes that train it. Make it with `plan_run`.

    Attributes:
        stage: module that a worker runs: pretrain or finetune.
        recipe: YAML file, or None for the defaults.
        run: run folder, on a file system that all hosts see.
        overrides: recipe fields as command-line words.
        segment: name of a new segment, or None.
        processes: workers on each host.
        nodes: hosts.
        node_rank: which of them this is, from 0.
        rendezvous: HOST:PORT of host 0, at which the launchers meet; "" for one host.
        min_nodes: fewest hosts to go on with; 0: none may be missing.
        restarts: how often in a row a failed launch is followed by another without a new checkpoint between.
        patience: seconds that a saved end may take once it is asked for.
        lost_seconds: silence after which another host counts as lost.
        go_on_seconds: how long a launch waits for a missing host where `min_nodes` lets it go on without.
        meet_seconds: how long it waits where it may not.
        environment: added to that of the workers.
    """

    stage: str
    recipe: Path | None
    run: Path
    overrides: tuple[str, ...] = ()
    segment: str | None = None
    processes: int = 1
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str = ""
    min_nodes: int = 0
    restarts: int = 3
    patience: float = 3600.0
    lost_seconds: float = 30.0
    go_on_seconds: float = 60.0
    meet_seconds: float = 1800.0
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def meeting_point(self) -> tuple[str, int]:
        """Host and port of the rendezvous."""
        host, _, port = self.rendezvous.rpartition(":")
        return host.strip("[]"), int(port)

    def identity(self) -> list[str]:
        """What must be the same on every host."""
        return [self.stage, *self.overrides, self.segment or "", f"{self.nodes} hosts"]

    def worker_words(self) -> list[str]:
        """What follows `python -m STAGE`."""
        words = [str(self.recipe)] if self.recipe is not None else []
        words += ["--run", str(self.run), *self.overrides]
        return words + (["--continue-as", self.segment] if self.segment is not None else [])

    def torchrun_words(self, place: Place) -> list[str]:
        """What follows `torchrun` (here `python -m launch.elastic`) on one host."""
        words = ["--nproc-per-node", str(self.processes)]
        if place.nodes == 1:
            words += ["--standalone", "--local-addr", place.address]
        else:
            words += ["--nnodes", str(place.nodes), "--node-rank", str(place.rank)]
            words += ["--master-addr", place.address, "--master-port", str(place.port)]
        return [*words, "-m", self.stage, *self.worker_words()]

    def command(self, place: Place) -> list[str]:
        """The process that trains on one host: the worker itself, or torchrun with its workers."""
        if self.processes == place.nodes == 1:
            return [sys.executable, "-m", self.stage, *self.worker_words()]
        return [sys.executable, "-m", "launch.elastic", *self.torchrun_words(place)]

    def host_words(self, node_rank: int) -> list[str]:
        """What follows `medfm` to start the part of one host."""
        words = ["launch", "local", *self.worker_words(), "--stage", self.stage]
        words += ["--processes", str(self.processes)]
        if self.nodes > 1:
            words += ["--nodes", str(self.nodes), "--node-rank", str(node_rank)]
            words += ["--rendezvous", self.rendezvous]
        return words

    def command_line(self) -> str:
        """What a person would type on this host."""
        return shlex.join(["medfm", *self.host_words(self.node_rank)])

    def host_environment(self) -> dict[str, str]:
        """This process's environment for the workers, with the host's threads shared out among them."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        set_by_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
        inherited = {k: v for k, v in os.environ.items() if k not in set_by_torchrun}
        # torchrun's own lines are off.
        defaults = {"OMP_NUM_THREADS": str(max(1, cores // self.processes)), "LOGLEVEL": "CRITICAL"}
        return {**defaults, **inherited, **self.environment}


def plan_run(
    stage: str,
    recipe: Path | str | None,
    overrides: Sequence[str] = (),
    processes: int = 1,
    *,
    run: Path | str | None = None,
    segment: str | None = None,
    nodes: int = 1,
    node_rank: int = 0,
    rendezvous: str = "",
    restarts: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Plan:
    """Check what was asked for and fill in what the recipe says: run folder, restarts, fewest hosts.

    Raises:
        UserError: a wrong number, no run folder, no place to meet, or an engine field that is wrong.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: at least one process is needed")
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: at least one host is needed")
    if nodes == 1 and (node_rank or rendezvous):
        raise UserError("--node-rank, --rendezvous: give --nodes N, too; without it this host trains alone")
    if not 0 <= node_rank < nodes:
        raise UserError(f"--node-rank {node_rank}: with --nodes {nodes} it is a number from 0 to {nodes - 1}")
    host, colon, port = rendezvous.rpartition(":")
    if nodes > 1 and not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--rendezvous {rendezvous!r}: give HOST:PORT of host 0, the same on every host")
    settings = load_recipe(recipe, overrides, _Settings)
    engine = settings.engine
    folder = run if run is not None else settings.run
    if not str(folder):
        raise UserError(f"{recipe}: no run folder; set `run` in the recipe or give --run DIR")
    if 1 < nodes < engine.min_nodes:
        raise UserError(f"engine.min_nodes: {engine.min_nodes} of {nodes} hosts cannot be had")
    return Plan(
        stage=stage,
        recipe=Path(recipe) if recipe is not None else None,
        run=Path(folder),
        overrides=tuple(overrides),
        segment=segment,
        processes=processes,
        nodes=nodes,
        node_rank=node_rank,
        rendezvous=rendezvous,
        min_nodes=engine.min_nodes,
        restarts=engine.restarts if restarts is None else restarts,
        patience=60 * (engine.save_minutes + engine.hang_minutes) + 60,
        environment=dict(environment or {}),
    )
