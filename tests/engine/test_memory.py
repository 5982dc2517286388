"""Predicted memory beside what tensors take, and the line that says why it was not enough."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import memory
from engine.distributed import World
from engine.memory import Limit, Prediction
from engine.recipe import EngineConfig

TESTS = Path(__file__).parents[1]
CPU = torch.device("cpu")
GIB = 2**30


@pytest.mark.slow
def test_predicted_parts_make_the_peak_of_an_update(tmp_path: Path) -> None:
    """Two ranks: every ZeRO stage, both precisions, recomputed blocks, several micro-steps; within 8 %."""
    paths = [TESTS / "engine", TESTS / "pretrain", TESTS.parent]
    done = subprocess.run(
        [sys.executable, str(TESTS / "pretrain" / "memory_worker.py"), "2", str(tmp_path / "found.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    ratios = {case: sum(each["parts"].values()) / each["peak"] for case, each in found.items()}
    assert len(ratios) == 12
    assert not {case: round(ratio, 3) for case, ratio in ratios.items() if not 0.92 < ratio < 1.08}


def toy(**changes: Any) -> Any:
    """A task of 1,000 weights of which 10 are no matrix's, with activations that halve when recomputed."""
    model = torch.nn.Sequential(torch.nn.Linear(99, 10))
    model.set_checkpointing = lambda on: None  # type: ignore[assignment]
    fields = {
        "model": model, "micro_steps": lambda world: 1, "batch_fields": "rows",
        "activation_bytes": lambda checkpointing: 20_000 if checkpointing else 40_000,
    }  # fmt: skip
    return SimpleNamespace(**(fields | changes))


def test_parts_by_stage_world_and_precision() -> None:
    def parts(**fields: Any) -> dict[str, int]:
        world = World(0, fields.pop("ranks", 4), 0, CPU)
        return memory.predict(toy(), EngineConfig(**({"precision": "fp32"} | fields)), world).parts

    dense = parts(zero_stage=0)
    assert (dense["weights"], dense["moments"], dense["activations"]) == (4000, 8000, 40_000)
    assert parts(zero_stage=1)["masters and moments"] == 3000
    assert parts(zero_stage=3)["weights"] == 1000
    assert parts(zero_stage=1, precision="bf16")["bf16 copies of weights"] == 2 * 990
    assert parts(zero_stage=1, activation_checkpointing=True)["activations"] == 20_000


def test_settings_are_what_the_prediction_says_under_them() -> None:
    world = World(0, 4, 0, CPU)
    here = memory.predict(toy(), EngineConfig(zero_stage=1), world)
    assert list(here.settings) == [
        "engine.activation_checkpointing true", "engine.zero_stage 2", "engine.zero_stage 3",
    ]  # fmt: skip
    for name, fields in (
        ("engine.activation_checkpointing true", {"zero_stage": 1, "activation_checkpointing": True}),
        ("engine.zero_stage 3", {"zero_stage": 3}),
    ):
        other = memory.predict(toy(), EngineConfig(**fields), world)
        assert here.settings[name] - here.total == sum(other.parts.values()) - sum(here.parts.values())
    alone = memory.predict(toy(), EngineConfig(zero_stage=1), World(0, 1, 0, CPU))
    assert list(alone.settings) == ["engine.activation_checkpointing true"]
    assert (
        "does not say what its activations take"
        in memory.predict(toy(activation_bytes=None), EngineConfig(), world).text()
    )


def example(device: str = "cuda") -> Prediction:
    parts = {"weights": 2 * GIB, "activations": 20 * GIB, "gradients": 2 * GIB}
    settings = {"engine.activation_checkpointing true": 10 * GIB, "engine.zero_stage 2": 23 * GIB}
    return Prediction(device, parts, {"copy for the saver": GIB}, 1, settings, "rows_per_group")


def test_advice_names_the_settings_that_suffice_and_what_they_save() -> None:
    said = memory.advice(example(), Limit("x", 20 * GIB, 19 * GIB), asked=2 * GIB)
    assert said == "set engine.activation_checkpointing true (saves 14.00 GiB); 4.00 GiB are missing"
    said = memory.advice(example(), Limit("x", 4 * GIB, 3 * GIB))
    assert "engine.activation_checkpointing true saves 14.00 GiB of the 20.00 GiB that are missing" in said
    assert "rows_per_group" in said
    assert "this rank alone stays below it" in memory.advice(example(), Limit("x", 40 * GIB, 3 * GIB))


def test_a_prediction_survives_json() -> None:
    """The launcher reads it from the log of a worker that the kernel killed."""
    again = Prediction(**json.loads(json.dumps(dataclasses.asdict(example("cpu")))))
    assert again == example("cpu")
    assert again.total == 25 * GIB
    assert "peak" not in memory.explain(again, None)
    assert memory.explain(again, None).startswith(
        "out of memory: predicted 25.00 GiB a rank (activations 20.00"
    )


@pytest.fixture
def bounded() -> Iterator[int]:
    """This process's address space ends half a GiB above what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + GIB // 2
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    yield bound
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_failed_allocation_is_explained_by_the_limit_that_was_met(bounded: int) -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory") as failed:
        torch.empty(3 * GIB, dtype=torch.uint8)
    line = memory.explain(example("cpu"), CPU, failed.value)
    assert "\n" not in line
    assert "and 3.00 GiB more were asked for" in line
    assert f"limit {memory.size(bounded)} (RLIMIT_AS (ulimit -v))" in line
    assert "set engine.activation_checkpointing true" in line or "are missing" in line
    assert memory.explain(None, CPU, failed.value).startswith("out of memory: peak ")


def test_limits_and_use_of_this_process() -> None:
    found = {limit.name: limit for limit in memory.limits(CPU, ranks=2)}
    assert found["memory of this host"].bytes * 2 == pytest.approx(
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=0.01
    )
    before = memory.host_now()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.host_now() - before > 50 << 20
    assert memory.peak(CPU) > 0.98 * memory.now(CPU) > block.numel()  # the kernel's counters lag a little


def test_a_hook_that_fails_does_not_end_the_run_and_is_said() -> None:
    def fails(checkpointing: bool) -> int:
        raise RuntimeError("no such\noperator")

    found = memory.predict(toy(activation_bytes=fails), EngineConfig(), World(0, 1, 0, CPU))
    assert "activations" not in found.parts
    assert "could not be found (RuntimeError: no such operator)" in found.text()
