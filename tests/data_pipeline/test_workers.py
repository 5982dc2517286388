"""Workers that are killed with results that nobody has taken yet: the calls are run again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from data_pipeline.workers import Pool, pool


@pytest.fixture(scope="module")
def hands() -> Iterator[Pool]:
    with pool(1) as hands:
        yield hands


def wait(hands: Pool, true: Callable[[list[str]], bool]) -> None:
    """Until what the client knows of its calls is so."""
    for _ in range(3000):
        if true([state.status for state in hands.client.futures.values()]):
            return
        time.sleep(0.01)
    raise AssertionError(hands.client.futures)


def test_a_worker_that_is_long_in_coming_back_is_waited_for(
    hands: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine under load, or killed again as dask looks after it: it looks at once here, not after 15 s."""
    loop = hands.client.loop.asyncio_loop
    call_later, looked = loop.call_later, threading.Event()

    def soon(delay: float, callback: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if "_update_worker_status" in getattr(callback, "__qualname__", ""):
            looked.set()
            delay = delay if delay > 86400 else 0
        return call_later(delay, callback, *arguments, **more)

    monkeypatch.setattr(loop, "call_later", soon)
    (pid,) = hands.client.run(os.getpid).values()
    os.kill(pid, signal.SIGKILL)
    assert looked.wait(30)
    hands.client.wait_for_workers(1, timeout=30)
    assert pid not in hands.client.run(os.getpid).values()


@pytest.mark.parametrize("repeats", [3, 0])  # after the last one they are run alone
def test_a_worker_killed_with_results_not_yet_taken(
    repeats: int, hands: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.workers.REPEATS", repeats)
    results = hands.stream(os.getpid, [()] * 5)
    n, pid = next(results)
    wait(hands, lambda states: states == ["finished"] * 2)
    os.kill(pid, signal.SIGKILL)
    wait(hands, lambda states: "lost" in states)
    others = dict(results)
    assert sorted([n, *others]) == list(range(5))
    assert {*map(type, others.values())} == {int}
    assert pid not in others.values()


def test_a_worker_killed_while_a_result_is_taken(hands: Pool, tmp_path: Path) -> None:
    """And killed again by the same call, which dask repeats by itself."""

    def call(path: Path) -> int:  # goes to the worker as it stands
        import os
        import signal

        path.mkdir(exist_ok=True)
        (path / str(len(os.listdir(path)))).touch()
        if len(os.listdir(path)) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    results = hands.stream(call, [(tmp_path / "a",), (tmp_path / "b",)])
    pid = next(results)[1]
    wait(hands, lambda states: states == ["finished"])
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    (_, other), *rest = results
    killer.join()
    assert not rest
    assert isinstance(other, int)
    assert other != pid
    assert sorted(len(os.listdir(path)) for path in tmp_path.iterdir()) == [1, 3]


def test_the_connection_to_the_scheduler_is_lost(hands: Pool) -> None:
    results = hands.stream(time.sleep, [(0,), (3,)])
    next(results)
    comm = hands.client.scheduler_comm.comm
    hands.client.loop.add_callback(comm.abort)
    with pytest.raises(UserError, match="connection to the dask scheduler was lost"):
        next(results)
