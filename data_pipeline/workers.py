"""Run one function over many arguments, in this process or in a pool of fresh ones, with a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from data_pipeline.errors import UserError

R = TypeVar("R")


class Map(Protocol):
    """(title, function, list of argument tuples) -> results in the order of the arguments."""

    def __call__(
        self, title: str, function: Callable[..., R], arguments: Sequence[tuple[Any, ...]]
    ) -> list[R]: ...


@contextmanager
def workers(count: int, *, progress: bool) -> Iterator[Map]:
    """A `Map` over `count` processes (1: this one). The order of the results never depends on `count`.

    An exception of any call ends the work and is raised here; a killed process is a `UserError`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pool: ProcessPoolExecutor | None = None
    if count > 1:
        os.environ.setdefault(
            "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1"
        )  # inherited; the processes are the threads
        pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    with Progress(*columns, disable=not progress) as bars:

        def run(title: str, function: Callable[..., R], arguments: Sequence[tuple[Any, ...]]) -> list[R]:
            task = bars.add_task(title, total=len(arguments))
            results: list[Any] = [None] * len(arguments)
            for number, result in _numbered(pool, function, arguments):
                results[number] = result
                bars.advance(task)
            return results

        try:
            yield run
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)


def _numbered(
    pool: ProcessPoolExecutor | None, function: Callable[..., R], arguments: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, R]]:
    if pool is None:
        yield from ((n, function(*a)) for n, a in enumerate(arguments))
        return
    futures = {pool.submit(function, *a): n for n, a in enumerate(arguments)}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a working process was killed, most likely for memory; use fewer --workers"
        ) from error
