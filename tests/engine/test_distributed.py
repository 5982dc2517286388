"""Which device a process takes, and how a group of processes is joined and left."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from toy_worker import ToyRecipe, ToyTask

from engine import distributed
from engine.distributed import World, join, leave, pick_device, stay
from engine.errors import UserError
from engine.optimizer import _share_group
from engine.recipe import EngineConfig
from engine.train import train
from engine.verdict import read_verdict


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device(EngineConfig()) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(EngineConfig()) == torch.device("cuda", 1)
    assert pick_device(EngineConfig(device="cpu")) == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("rank", ["2", "3"])
def test_more_processes_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 processes on this host with 2 GPUs.*--processes 2"):
        pick_device(EngineConfig())
    assert pick_device(EngineConfig(device="cpu")) == torch.device("cpu")


@pytest.mark.parametrize(("minutes", "expected"), [(15.0, 25.0), (60.0, 70.0), (0.0, 1440.0)])
def test_no_collective_gives_up_before_the_watchdog(
    monkeypatch: pytest.MonkeyPatch, minutes: float, expected: float
) -> None:
    """Neither NCCL's collectives, nor its monitor of the driver, nor the group that DeepSpeed works with."""
    config, given = EngineConfig(hang_minutes=minutes), []

    def record(*_: Any, timeout: timedelta, **__: Any) -> None:
        given.append(timeout.total_seconds() / 60)

    monkeypatch.setattr(distributed, "pick_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(distributed, "seed_process", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(atexit, "register", lambda _: None)
    for name, value in (("is_initialized", False), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "init_process_group", record)
    monkeypatch.setattr(dist, "new_group", record)
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    world = join(config)
    _share_group(SimpleNamespace(_WORLD_GROUP=None), config, world)
    assert given == [expected, expected]
    assert float(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) == 60 * expected


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", [leave]), ("cpu", [])])
def test_a_rank_that_fails_alone_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: list[Any]
) -> None:
    gone: list[Any] = []
    monkeypatch.setattr(atexit, "unregister", gone.append)
    stay(World(1, 2, 1, torch.device(device)))
    assert gone == expected


@pytest.mark.parametrize("error", [ValueError("broken"), UserError("wrong")])
def test_training_that_fails_stays_in_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config, stayed = EngineConfig(device="cpu", updates=1), list[World]()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("engine.train._train", fail)
    monkeypatch.setattr("engine.train.stay", stayed.append)
    with pytest.raises(type(error)):
        train(ToyTask(ToyRecipe(engine=config), tmp_path), config, tmp_path)
    assert [world.rank for world in stayed] == [0]


def test_a_gpu_that_does_not_even_say_what_it_has_hides_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(device="cpu", updates=1)

    def fail(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    def gone(*_: Any) -> str:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("engine.train._train", fail)
    monkeypatch.setattr("engine.memory.explain", gone)
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        train(ToyTask(ToyRecipe(engine=config), tmp_path), config, tmp_path)
    verdict = read_verdict(tmp_path)
    assert verdict is not None
    assert verdict.state == "out_of_memory"


def test_traced_activations_are_asked_for_on_a_cpu_when_memory_has_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = EngineConfig(device="cpu", updates=1), list[str]()

    class Traced(ToyTask):
        traces_activations = True

        def activation_bytes(self, checkpointing: bool) -> int:
            asked.append("trace")
            return 3 << 30

    def fail(*_: Any) -> None:
        asked.append("update")
        raise MemoryError("out of memory")

    monkeypatch.setattr("engine.train._train", fail)
    with pytest.raises(MemoryError):
        train(Traced(ToyRecipe(engine=config), tmp_path), config, tmp_path)
    assert asked.index("update") == 0 < asked.index("trace")
    verdict = read_verdict(tmp_path)
    assert verdict is not None
    assert verdict.state == "out_of_memory"
    assert "activations 3.00 GiB" in verdict.message
