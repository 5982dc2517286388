"""A run harmed again and again beside the same run left alone; benchmarks/chaos.py does it at length."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from saving import Part, begin_launch, saver, state

from benchmarks.chaos_driver import Chaos
from benchmarks.chaos_faults import FLIP, FULL, KINDS, NEWEST, Disk, Fault, draw
from benchmarks.chaos_run import Run, differences, finish
from engine.zero_state import MOMENTS

HERE = Path(__file__).parent
UPDATES = 36
LAUNCH = (
    "import sys; from launch.local import run_local; "
    "sys.exit(run_local('toy_worker', None, sys.argv[2:], 2, run=sys.argv[1]))"
)
RECIPE = {
    "engine.updates": UPDATES, "engine.checkpoint_every": 5, "engine.keep_last": 3, "engine.warmup": 5,
    "engine.threads": 1, "engine.device": "cpu", "engine.hang_minutes": 0.5, "engine.zero_stage": 2,
    "engine.log_every": 10, "sleep": 0.1,
}  # fmt: skip
FAULTS = (
    Fault("SIGKILL", "launcher", "start-up", wait=0.3),
    Fault("SIGTERM", "launcher", "start-up", wait=1.0),
    Fault("SIGKILL", "torchrun", "start-up", wait=1.5),
    Fault(FULL, "run folder", "save", update=7, hold=1.0),
    Fault(FLIP, NEWEST, "update", update=14),
    Fault("SIGUSR1", "every process", "start-up", wait=1.0, again=0.3),
    Fault("SIGKILL", "rank 1", "save", update=21),
)


@pytest.mark.slow
def test_a_harmed_run_ends_with_the_bits_of_the_run_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one left alone has no launcher either."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parents[1]}")
    disk = Disk(tmp_path / "disk", 32)
    words = [f"--{name}={value}" for name, value in RECIPE.items()]
    folders = disk.folder / "harmed", tmp_path / "alone"
    launches = json.dumps([[2, [["--run", str(folders[1]), *words]]]])
    commands = (
        [sys.executable, "-c", LAUNCH, str(folders[0]), *words],
        [sys.executable, str(HERE / "forked_ranks.py"), launches],
    )
    harmed, alone = (Run(f, c, tmp_path / f"{f.name}.txt") for f, c in zip(folders, commands, strict=True))
    try:
        alone.start()
        chaos = Chaos(harmed, disk, UPDATES, 0, tmp_path / "evidence")
        chaos.go([fault for fault in FAULTS if fault.kind != FULL or disk.mounted])
        finish(alone)
        assert [(fault.kind, fault.target, fault.trouble) for fault in chaos.done if fault.trouble] == []
        assert (chaos.hangs, chaos.surprises, harmed.processes()) == (0, [], [])
        assert differences(alone.folder, harmed.folder)[:3] == []
    finally:
        harmed.kill()
        alone.kill()
        disk.close()


@pytest.mark.parametrize("kind", ["master", *MOMENTS])
def test_a_difference_of_one_bit_is_found(kind: str, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "same", "other")]
    for run in runs:
        part = Part()
        if run.name == "other":
            value = next(one for one in part.slices() if one.name == "norm.bias")
            getattr(value, kind).view(torch.int32)[3] ^= 1
        begin_launch(run)
        assert saver(run, part).settle(state(10)) == ""
    assert differences(runs[0], runs[1]) == []
    assert differences(runs[0], runs[2]) == [f"norm.bias|{kind}: 1 of 28 bytes differ"]
    assert saver(runs[1]).settle(state(11)) == ""
    assert differences(runs[0], runs[1]) == ["update-00000010 and update-00000011"]
    (runs[1] / "checkpoints" / "update-00000011" / "plan.json").write_text("[]")
    assert "plan.json is not what was written" in differences(runs[1], runs[1])[0]


def test_faults_are_drawn_from_the_seed_and_every_kind_comes_up() -> None:
    faults = draw(100, 3, 840, 10.0)
    assert faults == draw(100, 3, 840, 10.0) != draw(100, 4, 840, 10.0)
    assert {(fault.kind, fault.target) for fault in faults} == set(KINDS)
    assert {fault.instant for fault in faults} == {"start-up", "update", "save", "end"}
    for before, fault in itertools.pairwise(faults):
        assert before.ends_launch or fault.instant != "start-up", "nothing starts there"
        assert before.update <= fault.update
