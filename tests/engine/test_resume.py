"""A run that changes its world size and its ZeRO stage at every launch follows the unbroken one.

Every run goes from 1 process to 2 to 4 and back to 1, 20 updates each; with 3 groups of samples the fourth
rank has none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from toy_worker import GROUPS, ToyRecipe, ToyTask

from engine.verdict import read_verdict

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
PART = 20  # updates of a launch
ENV = {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
RECIPE = ["--engine.updates", str(4 * PART), "--engine.lr", "0.003", "--engine.warmup", "5",
          "--engine.clip", "0.3", "--engine.log_every", "1", "--engine.checkpoint_every", "0",
          "--engine.evaluate_share", "0", "--engine.device", "cpu", "--engine.hang_minutes", "3",
          "--engine.trackers", "[]"]  # fmt: skip
# Stage of each launch. In fp32 every stage follows every stage, itself too.
STAGES = {
    "fp32": [(0, 0, 1, 1), (1, 2, 2, 3), (3, 3, 0, 2), (2, 0, 3, 1), (1, 3, 2, 1), (2, 3, 1, 0)],
    "bf16": [(0, 1, 2, 3), (3, 0, 2, 1)],
}
RUNS = [(precision, stages) for precision, all_of in STAGES.items() for stages in all_of]
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


def words(folder: Path, precision: str, stage: int, *more: str) -> list[str]:
    choice = ["--engine.precision", precision, "--engine.zero_stage", str(stage)]
    return ["--run", str(folder), *RECIPE, *choice, *more]


def name(precision: str, stages: tuple[int, ...]) -> str:
    return f"{precision}-{''.join(map(str, stages))}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run's four launches, and the unbroken runs."""
    root = tmp_path_factory.mktemp("runs")

    def batch(number: int, *more: str) -> list[list[str]]:
        return [words(root / name(p, s), p, s[number], *more) for p, s in RUNS]

    launches = [
        [processes, batch(number, "--die_with", "SIGTERM", "--die_at", str((number + 1) * PART - 1))]
        for number, processes in enumerate((1, 2, 4))
    ]
    launches += [[1, batch(3)], [1, [words(root / f"unbroken-{p}", p, 0) for p in STAGES]]]
    subprocess.run(
        [sys.executable, str(HERE / "forked_ranks.py"), json.dumps(launches)],
        env={**os.environ, **ENV}, timeout=400, cwd=HERE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return root


def rows_of(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_every_stage_follows_every_stage() -> None:
    """So that the list above cannot lose one."""
    pairs = {pair for stages in STAGES["fp32"] for pair in pairwise(stages)}
    assert pairs == {(a, b) for a in range(4) for b in range(4)}


@pytest.mark.parametrize(("precision", "stages"), RUNS)
def test_losses_after_each_change_are_those_of_the_unbroken_run(
    runs: Path, precision: str, stages: tuple[int, ...]
) -> None:
    unbroken = [row["loss"] for row in rows_of(runs / f"unbroken-{precision}")]
    broken = [row["loss"] for row in rows_of(runs / name(precision, stages))]
    assert len(broken) == len(unbroken) == 4 * PART
    for start in range(0, 4 * PART, PART):
        part = slice(start, start + PART)
        assert broken[part] == pytest.approx(unbroken[part], rel=TOLERANCE[precision]), f"from update {start}"
    assert unbroken[-1] != pytest.approx(unbroken[PART], rel=0.02)  # or agreeing would mean nothing


@pytest.mark.parametrize(("precision", "stages"), RUNS)
def test_each_launch_takes_the_samples_where_the_last_one_stopped(
    runs: Path, precision: str, stages: tuple[int, ...]
) -> None:
    """Position by position, and no group twice or left out, whatever the number of ranks."""
    run = runs / name(precision, stages)
    verdict = read_verdict(run)
    assert verdict is not None
    assert (verdict.state, verdict.attempt) == ("finished", 4)
    rows = rows_of(run)
    assert [row["data/position"] for row in rows] == list(range(1, 4 * PART + 1))
    assert [row["data/groups"] for row in rows] == [GROUPS * (n + 1) for n in range(PART)] * 4


def test_the_toy_draws_other_samples_at_every_position() -> None:
    """Else a run that repeats or skips some would give the same losses."""
    task = ToyTask(ToyRecipe(), Path())
    sums = [
        float(task.batch(u, g)[kind].sum()) for u in range(80) for g in range(GROUPS) for kind in ("ct", "mr")
    ]
    drawn = [value for value in sums if value]
    assert len(set(drawn)) == len(drawn) == 80 * GROUPS
