"""When a run evaluates: within its share of the time, and always at the end."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import evaluation
from engine.compilation import Compilation
from engine.distributed import World, join, seed_process
from engine.evaluation import Evaluation
from engine.recipe import EngineConfig

UPDATES, EVERY = 40, 2


@pytest.fixture(scope="module")
def world() -> World:
    return join(EngineConfig(device="cpu"))


class Engine(torch.nn.Linear):
    """A model that stands for the DeepSpeed engine, too."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def zero_optimization_stage(self) -> int:
        return 0


def evaluated(world: World, share: float, update_seconds: list[float], cost: list[float]) -> Any:
    """Run the schedule against a clock of our own; returns (update, time before, time after) of each
    evaluation, and what was said."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    done: list[tuple[int, float, float]] = []
    said: list[str] = []
    model = Engine()

    def evaluate(update: int, *_: Any) -> dict[str, float]:
        before = clock.now
        clock.now += cost[len(done) % len(cost)]
        done.append((update, before - 100, clock.now - 100))
        return {}

    task: Any = SimpleNamespace(model=model, evaluate=evaluate, pictures=lambda *_: None)
    logs: Any = SimpleNamespace(say=said.append, writer=None, event=lambda *_, **__: None)
    config = EngineConfig(updates=UPDATES, evaluate_every=EVERY, evaluate_share=share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "time", clock)
        schedule = Evaluation(task, config, world, model, logs, Compilation(model, config, world.device))
        for update in range(1, UPDATES + 1):
            clock.now += update_seconds[update % len(update_seconds)]
            schedule.run_if_due(update)
    return done, said


seconds = st.floats(0.01, 10.0)


@settings(max_examples=40, deadline=None)
@example(0.02, [1.0], [0.1])
@example(1.0, [0.01], [10.0])
@given(st.floats(0.001, 1.0), st.lists(seconds, min_size=1, max_size=5), st.lists(seconds, min_size=1))
def test_only_what_fits_the_share_runs_and_the_rest_is_said(
    world: World, share: float, update_seconds: list[float], cost: list[float]
) -> None:
    done, said = evaluated(world, share, update_seconds, cost)
    updates = [update for update, _, _ in done]
    assert updates[0] == EVERY  # its cost is not known yet
    assert updates[-1] == UPDATES
    put_off = [u for u in range(EVERY, UPDATES, EVERY) if u not in updates]
    assert [line.split(":")[0] for line in said] == [f"update {u}" for u in put_off]
    spent = last = 0.0
    for update, before, after in done:
        if update not in (EVERY, UPDATES):
            assert (spent + last) / (before + last) <= share * (1 + 1e-9)
        last = after - before
        spent += last
    if share == 1.0:
        assert not put_off


def test_the_last_one_alone_with_a_share_of_zero(world: World) -> None:
    done, said = evaluated(world, 0.0, [1.0], [0.1])
    assert [update for update, _, _ in done] == [UPDATES]
    assert not said


def test_one_in_fifty_seconds_at_two_percent(world: World, tmp_path: Path) -> None:
    """Evaluations of 0.1 s in a run of 1 s an update: due every 2 s, affordable every 5 s."""
    done, said = evaluated(world, 0.02, [1.0], [0.1])
    assert [update for update, _, _ in done] == [2, 10, 16, 20, 26, 30, 36, 40]
    assert said[0].endswith("with it they would take 4.8% of the time (engine.evaluate_share 0.02)")


def test_generators_go_on_as_if_nothing_had_been_drawn(world: World) -> None:
    def draw(*_: Any) -> dict[str, float]:
        return {"x": float(torch.rand(3).sum() + np.random.rand(3).sum() + random.random())}  # noqa: NPY002

    model = Engine().train()
    task: Any = SimpleNamespace(model=model, evaluate=draw, pictures=draw)
    scores: list[Any] = []
    logs: Any = SimpleNamespace(
        writer=None,
        say=lambda text: None,
        event=lambda *_, **__: None,
        scalars=lambda *values, **_: scores.append(values),
    )
    config = EngineConfig(updates=2, evaluate_every=1, evaluate_share=1.0)
    schedule = Evaluation(task, config, world, model, logs, Compilation(model, config, world.device))
    schedule.run_if_due(1)
    seed_process(5)
    before = draw()
    seed_process(5)
    schedule.run_if_due(2)
    assert draw() == before
    assert [values for _, values in scores] == [scores[0][1]] * 2  # and its own draws are always the same
    assert model.training


def test_an_evaluation_that_moves_beats_the_watchdog(world: World) -> None:
    layer, beats = torch.nn.Linear(2, 2), list[None]()

    def evaluate(*_: Any) -> dict[str, float]:
        for _step in range(5):
            layer(torch.zeros(1, 2))
        return {}

    task: Any = SimpleNamespace(model=Engine(), evaluate=evaluate, pictures=lambda *_: None)
    logs: Any = SimpleNamespace(say=None, writer=None, event=lambda *_, **__: None)
    config = EngineConfig(updates=1)
    compilation = Compilation(task.model, config, world.device)
    Evaluation(task, config, world, task.model, logs, compilation).run_if_due(1, lambda: beats.append(None))
    assert len(beats) == 2 + 5
    evaluate()
    assert len(beats) == 2 + 5
