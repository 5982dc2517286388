"""How often the host waits for the device in an update, and what an update's numbers are made of."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_worker import ToyRecipe, ToyTask

from engine import optimizer
from engine.distributed import World, import_deepspeed, join
from engine.hardware import matmul_rate
from engine.metrics import Sums
from engine.recipe import EngineConfig
from engine.train import train
from engine.update import Updates

aten = torch.ops.aten
READING_OPERATORS = {
    aten._local_scalar_dense.default,  # item(), bool(), float() of a tensor
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
}
READING_METHODS = {"tolist", "numpy", "cpu"}


class Reads:
    """Context that notes where values of tensors come to the host, in code of Python or of PyTorch, and where
    DeepSpeed waits for the device (which has no effect on the CPU)."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Reads:
        note = self._note

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func in READING_OPERATORS:
                    note()
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if getattr(func, "__name__", "") in READING_METHODS:
                    note()
                return func(*args, **(kwargs or {}))

        accelerator = import_deepspeed().accelerator.get_accelerator()
        self._patch.setattr(accelerator, "synchronize", lambda *_: note(), raising=False)
        self._modes = [Operators(), Methods()]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        self._patch.undo()

    def _note(self) -> None:
        frames = [
            f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__
        ]
        self.places.append(f"{Path(frames[-1].filename).name} {frames[-1].name}")


@pytest.fixture(scope="module")
def world() -> World:
    return join(EngineConfig(device="cpu"))


def train_toy(
    run: Path, stage: int, watch: Any, device: str = "cpu", flops: int = 0
) -> list[dict[str, float]]:
    """Four updates of the toy task, each inside `watch()`; returns what was logged. With one rank, too, the
    stage is that asked for."""
    inner = Updates.make

    def make(self: Any, progress: Any, *arguments: Any) -> Any:
        with watch(progress.position):
            return inner(self, progress, *arguments)

    config = EngineConfig(updates=4, zero_stage=stage, device=device, log_every=1, clip=0.1)  # type: ignore[arg-type]
    task = ToyTask(ToyRecipe(engine=config, nan_at=(2,)), run)
    if flops:
        task.flops_per_update = flops  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updates, "make", make)
        patch.setattr(optimizer, "stage_of", lambda config, world: config.zero_stage)
        assert train(task, config, run).state == "finished"
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", range(4))
def test_an_update_reads_from_the_device_once(tmp_path: Path, stage: int) -> None:
    watched: list[Reads] = []

    def watch(position: int) -> Reads:
        watched.append(Reads())
        return watched[-1]

    train_toy(tmp_path, stage, watch)
    assert len(watched) == 5
    ours = ["distributed.py sum"]
    # At ZeRO 3 DeepSpeed looks at a norm, which we put on the host for it, and compares the order of the
    # model's calls over ranks in the first updates.
    theirs, settled = (["utils.py is_invalid_grad_norm"], 2) if stage == 3 else ([], 1)
    assert len(watched[0].places) > len(ours)  # names of metrics came up
    for reads in watched[settled:]:
        assert reads.places == ours + theirs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stage", range(3))
def test_an_update_waits_for_the_gpu_once(tmp_path: Path, stage: int, recwarn: Any) -> None:
    waits: list[int] = []

    class Watch:
        def __enter__(self) -> None:
            recwarn.clear()
            torch.cuda.set_sync_debug_mode("warn")

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchroniz" in str(w.message) for w in recwarn.list))

    train_toy(tmp_path, stage, lambda position: Watch(), "cuda")
    assert waits[1:] == [1, 1, 1, 1]


def test_rates_follow_from_time_and_operations(tmp_path: Path) -> None:
    rows = train_toy(tmp_path, 1, lambda position: nullcontext(), flops=6_000_000)
    matmul = [row["rate/matmul_tflops"] for row in rows if "rate/matmul_tflops" in row]
    assert len(matmul) == 1
    for row in (row for row in rows if "loss" in row):
        assert row["rate/tflops"] == pytest.approx(row["rate/crops_per_s"] / 6 * 6e6 / 1e12)
        assert row["rate/mfu"] == pytest.approx(row["rate/tflops"] / matmul[0])


def test_the_rate_of_matrix_products_is_plausible_and_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    assert 1e9 < matmul_rate(torch.device("cpu"), torch.float32) < 1e13
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_sum_over_ranks_keeps_the_order_of_tensors_and_numbers(world: World) -> None:
    big = 2.0**40 + 1  # not a float32
    values = [1.5, torch.tensor(2.25), 3, torch.tensor(big, dtype=torch.float64), -big]
    assert world.sum(values) == [1.5, 2.25, 3.0, big, -big]


def micro_steps() -> Iterator[dict[str, tuple[Any, Any]]]:
    yield {"a": (torch.tensor(1.5), 2), "b": (0.5, torch.tensor(3))}
    yield {"a": (torch.tensor(2.5, requires_grad=True), 4)}
    yield {"c": (torch.tensor([7.0]), torch.tensor(1.0)), "b": (1.0, 1.0)}


def test_metrics_are_summed_over_micro_steps(world: World) -> None:
    sums = Sums(world.device)
    for metrics in micro_steps():
        sums.add(metrics)
    assert sorted(sums.totals) == ["a", "b", "c"]
    assert world.sum(sums.values(["c", "absent", "a", "b"])) == [7, 1, 0, 0, 4, 6, 1.5, 4]
