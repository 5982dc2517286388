"""Run one function over many arguments on `dask.distributed` workers, so that a killed worker costs little.

Dask because the same code then runs on the cores of this machine and on any cluster that has a scheduler
(`dask-jobqueue` for Slurm, the Kubernetes operator, `dask scheduler` and `dask worker` by hand).
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError

ALONE = 2  # times that a call may end its worker while nothing else runs there, before it is given up
REPEATS = 3  # times that a call is run again since a worker died with its result, before it is one that kills
ADDRESS = re.compile(r"((tcp|tls|ws|wss|ucx)://)?[^/]+:\d+")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
}

#: glibc gives every freed megabyte back and faults it in again at dask's 64 KiB: 10 to 25 % of a build.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": 1 << 26, "MALLOC_MMAP_THRESHOLD_": 1 << 24}


def fix_threads(count: str | None = None) -> None:
    """Take away what makes bytes depend on the machine: Blosc2 writes BLOSC_NTHREADS into every frame."""
    os.environ.pop("BLOSC_NTHREADS", None)
    os.environ.update(dict.fromkeys(ONE_THREAD, count) if count is not None else {})


@dataclass(frozen=True)
class Lost:
    """In place of a result: the call ended its worker, or its memory, again and again, also alone."""

    times: int


class Pool:
    """Calls a function once for each argument tuple. In this process, or on a dask client's workers.

    `stream` yields (number of the arguments, result or `Lost`) in the order of completion. An exception that
    a call raises ends the work and is raised here.
    """

    def __init__(self, client: Any = None) -> None:
        self.client = client
        self._last, self._asked = 1, -math.inf

    def ordered(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Results in the order of the arguments; a call that keeps ending its worker is a `UserError`."""
        results: list[Any] = [None] * len(arguments)
        for number, result in self.stream(function, arguments):
            if isinstance(result, Lost):
                raise UserError(
                    f"{function.__name__} ended its worker {result.times} times, most likely for memory; "
                    "give the workers more of it or use fewer of them"
                )
            results[number] = result
        return results

    def stream(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        *,
        ended: Sequence[int] | None = None,
        on_kill: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """`ended[n]` is how often call n ended its worker, alone, in an earlier run; `on_kill(n)` reports one
        more."""
        times = list(ended) if ended is not None else [0] * len(arguments)
        suspects: deque[int] = deque(n for n in range(len(arguments)) if times[n])
        first = [n for n in range(len(arguments)) if not times[n]]
        for n, result in self._crowd(function, arguments, first):
            if isinstance(result, Lost):
                suspects.append(n)  # perhaps it only ran beside the one that did it
            else:
                yield n, result
        for n in sorted(suspects):
            while times[n] < ALONE:
                result = next(iter(self._crowd(function, arguments, [n])))[1]
                if not isinstance(result, Lost):
                    yield n, result
                    break
                times[n] += 1
                if on_kill is not None:
                    on_kill(n)
            else:
                yield n, Lost(times[n])

    def _crowd(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """Calls side by side; few are handed out at a time, so that a dying worker takes few with it."""
        if self.client is None:
            yield from ((n, _here(function, arguments[n])) for n in numbers)
            return
        from distributed import as_completed

        waiting = deque(numbers)
        repeats = dict.fromkeys(numbers, 0)
        running: dict[Any, int] = {}
        queue = as_completed(loop=self.client.loop, with_results=False, raise_errors=False)

        def hand_out() -> None:
            while waiting and len(running) < 2 * max(1, self._threads()):  # one waits at the scheduler
                n = waiting.popleft()
                future = self.client.submit(function, *arguments[n], pure=False, retries=0)
                running[future] = n
                queue.add(future)

        hand_out()
        try:
            while running:
                future = next(queue)
                n = running.pop(future)
                if future.status == "lost" and repeats[n] < REPEATS:
                    repeats[n] += 1  # done, but its worker died before the result was taken; the scheduler
                    running[future] = n  # is alive, it said so, and has already set out to run it again
                    queue.add(future)
                    continue
                result = _taken(future)
                del future
                hand_out()
                yield n, result
        finally:
            for future in running:
                future.cancel()

    def _threads(self) -> int:
        if time.monotonic() > self._asked + 1.0:  # a question to the scheduler, too slow for every scan
            info = self.client.scheduler_info(n_workers=-1)["workers"]
            self._last = sum(w["nthreads"] for w in info.values()) or self._last
            self._asked = time.monotonic()
        return self._last


def _here(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except MemoryError:
        return Lost(1)


def _taken(future: Any) -> Any:
    """The result, or `Lost`. A worker may die also while this is under way: dask then runs the call again."""
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    if future.status == "lost":
        return Lost(1)
    try:
        failure = future.exception() if future.status == "error" else None
        if isinstance(failure, KilledWorker | MemoryError):  # not raised: its traceback would hold the future
            return Lost(1)
        return future.result()
    except (KilledWorker, MemoryError):
        return Lost(1)
    except (CancelledError, CommClosedError) as error:  # that of a client without its scheduler
        raise UserError(
            "the connection to the dask scheduler was lost; start the same build again"
        ) from error


@contextmanager
def pool(workers: int, scheduler: str | None = None) -> Iterator[Pool]:
    """A `Pool`: of `workers` processes of one thread each on this machine (0: this process itself), or of the
    dask cluster at the address `scheduler`.
    """
    fix_threads()
    if scheduler is None and workers == 0:
        yield Pool()
        return
    import dask
    from distributed import Client, LocalCluster

    for name in ("distributed", "distributed.client"):  # their warnings show arguments, which are paths, and
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters of them is raised here
    settings = {
        "distributed.scheduler.allowed-failures": 0,  # the calls of a killed worker come back at once
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.comm.timeouts.connect": "30s",
        "distributed.deploy.lost-worker-timeout": "10000h",  # the nanny starts the next one; after this, dask
        # ends it where its worker is not back yet, however often it was killed, and leaves none for the calls
        "distributed.nanny.environ": ONE_THREAD,
        "distributed.nanny.pre-spawn-environ": {**ONE_THREAD, **MALLOC},
        "distributed.worker.daemon": True,
        "distributed.admin.log-length": 0,
        "distributed.scheduler.http.routes": [],  # pages that any user of this machine could read: they
        "distributed.worker.http.routes": [],  # show call stacks and exceptions, which name paths
    }
    with dask.config.set(settings):
        if scheduler is not None:
            if not ADDRESS.fullmatch(scheduler):  # dask would wait for it, and complain for a page
                raise UserError(f"--scheduler {scheduler}: give an address like tcp://HOST:8786")
            try:
                client = Client(scheduler, timeout="20s", set_as_default=False)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"--scheduler {scheduler}: no dask scheduler answers; start one with `dask scheduler`"
                ) from error
            with client:
                _check_cluster(client, scheduler)
                yield Pool(client)
            return
        with _deaf_children():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                protocol="tls",  # with keys made for this run: other users of this machine can reach the
                security=True,  # port, and whoever may talk to a worker may run code in it
                dashboard_address=None,
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # not 8787, which may be taken
                memory_limit=0,  # a scan may take what the machine has; the one too large is retried alone
                silence_logs=logging.CRITICAL,
            )
        with cluster, Client(cluster, set_as_default=False) as client:
            client.register_plugin(_worker_setup())
            yield Pool(client)


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started as the block begins do not hear Ctrl-C; this one hears it a moment later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard)


def _check_cluster(client: Any, scheduler: str) -> None:
    from importlib.metadata import version

    client.wait_for_workers(1, timeout=300)
    client.register_plugin(_worker_setup())
    ours = version("medfm")
    try:
        theirs = client.run(version, "medfm")
    except Exception as error:
        raise UserError(f"--scheduler {scheduler}: its workers have no medfm installed") from error
    if other := sorted({v for v in theirs.values() if v != ours}):
        raise UserError(f"--scheduler {scheduler}: its workers have medfm {other[0]}, here it is {ours}")


def _worker_setup() -> Any:
    """Make every worker, also one started later, quiet and one-threaded, and end it with its parent."""
    from distributed import WorkerPlugin

    class Setup(WorkerPlugin):
        name = "medfm-worker-setup"

        def setup(self, worker: Any) -> None:
            del worker
            fix_threads("1")
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started the build
            logging.getLogger("distributed").setLevel(logging.CRITICAL)

    return Setup()
