"""Which device a process takes, and how a group of processes is joined and left."""

from __future__ import annotations

import pytest
import torch

from engine.distributed import pick_device
from engine.errors import UserError
from engine.recipe import EngineConfig


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
