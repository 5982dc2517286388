"""Start a run's processes on this machine and say how it ended."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from engine.errors import UserError
from engine.verdict import LAUNCHED, Verdict, read_attempt, read_verdict, write_verdict

RESTARTS = 3
SHUTDOWN_SECONDS = (
    600  # how long a save may take after a signal; torchrun's own default of 30 would lose a large one
)
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def run_local(
    module: str,
    recipe: Path | str | None,
    overrides: Sequence[str] = (),
    processes: int = 1,
    *,
    run: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    continue_as: str | None = None,
    restarts: int = 0,
) -> int:
    """Run `python -m MODULE RECIPE --run RUN [overrides]` in one or more processes and wait for the end.

    The children die with this process. SIGINT, SIGTERM and SIGUSR1 are passed on, so that the run saves and
    ends; a second SIGINT kills it.

    Args:
        module: "pretrain" or "finetune".
        recipe: YAML file.
        overrides: recipe fields as command-line words.
        processes: workers; more than one start under torchrun.
        run: run folder; the recipe's `run` field where None.
        env: added to the environment of the workers.
        continue_as: name of a new segment.
        restarts: how often in a row a failed or hung run is started again without having saved anew; at most
            3.

    Returns:
        0 finished, 2 wrong input, 3 failed, 4 hung, 5 out of memory, 75 preempted and saved.

    Raises:
        UserError: no run folder, or a number of processes below 1.
        OSError: the run folder cannot be made.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: at least one process is needed")
    folder = Path(run) if run is not None else _folder_of(module, recipe, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(recipe)] if recipe is not None else []
    words += ["--run", str(folder), *overrides]
    if continue_as is not None:
        words += ["--continue-as", continue_as]
    command, environment = _command(module, words, processes), _environment(processes, env)
    failures, saved = 0, _newest(folder)
    while True:
        verdict, stopped = _launch(command, environment, folder)
        failures, saved = (0, _newest(folder)) if _newest(folder) != saved else (failures, saved)
        again = verdict.state in ("failed", "hung") and verdict.kind != "user" and not stopped
        if not again or failures >= min(restarts, RESTARTS):
            break
        failures += 1
        print(
            f"medfm: {verdict.state} ({verdict.message}); starting again ({failures})",
            file=sys.stderr,
            flush=True,
        )
    if verdict.kind == "user":
        print(f"medfm: error: {verdict.message}", file=sys.stderr, flush=True)
    elif verdict.state != "finished":
        print(
            f"medfm: {verdict.state} at update {verdict.update}: {verdict.message}",
            file=sys.stderr,
            flush=True,
        )
    return verdict.exit_code


def _launch(command: Sequence[str], environment: Mapping[str, str], run: Path) -> tuple[Verdict, bool]:
    """One launch: its verdict, and whether this process was told to stop it."""
    (run / "verdict.json").unlink(missing_ok=True)
    before = read_attempt(run)
    # A session of its own: Ctrl-C in the terminal reaches the workers once, through the forwarding below.
    with subprocess.Popen(
        command, env=dict(environment), start_new_session=True, preexec_fn=_die_with_parent
    ) as child:
        with _forwarding(child) as received:
            code = child.wait()
        _sweep(child.pid)
    verdict = read_verdict(run)
    if verdict is None:
        attempt = max(before, read_attempt(run))
        if received and attempt == before:
            verdict = Verdict("preempted", 0, attempt, "stopped before it had begun; start again to go on")
        else:
            text = f"a worker ended without a word (exit code {code}); see {run / 'logs'} and the output"
            verdict = Verdict("failed", attempt=attempt, message=text)
        write_verdict(run, verdict)
    return verdict, bool(received)


@contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on to the child while it runs; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            os.killpg(child.pid, signal.SIGKILL)
        elif child.poll() is None:
            child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sweep(group: int) -> None:
    """Kill what is left of the child's process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _die_with_parent() -> None:
    """In the child: ask the kernel for SIGKILL when the launcher dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _command(module: str, words: Sequence[str], processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", module, *words]
    options = [
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "--signals-to-handle",
        "SIGTERM,SIGINT,SIGUSR1",
    ]
    options += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    return [sys.executable, "-m", "launch.elastic", *options, "-m", module, *words]


def _environment(processes: int, env: Mapping[str, str] | None) -> dict[str, str]:
    """This process's environment, with threads shared out and torchrun's own log lines off."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    }
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "LOGLEVEL": "CRITICAL",
        LAUNCHED: "1",
    }
    return {**defaults, **inherited, **(env or {})}


def _newest(run: Path) -> str:
    return max((p.name for p in (run / "checkpoints").glob("update-*")), default="")


def _folder_of(module: str, recipe: Path | str | None, overrides: Sequence[str]) -> Path:
    """The run folder a recipe names."""
    from engine.recipe import load_recipe

    if module == "pretrain":
        from pretrain.recipe import PretrainRecipe as Schema
    else:
        from finetune.recipe import FinetuneRecipe as Schema  # type: ignore[assignment]
    if folder := getattr(load_recipe(recipe, overrides, Schema), "run", ""):
        return Path(folder)
    raise UserError(f"{recipe}: no run folder; set `run` in the recipe or give --run DIR")
