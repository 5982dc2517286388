"""A worker process, `python -m pretrain` or `finetune RECIPE.yaml --run DIR [fields]`: its command line, and
how its end becomes a verdict and an exit code."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from engine.errors import UserError
from engine.signals import Stopped, StopRequest, die_with_parent
from engine.verdict import (
    LAUNCHED,
    LOST_ANOTHER,
    USER_ERROR,
    Verdict,
    read_attempt,
    record_failure,
    write_verdict,
)


class Arguments(NamedTuple):
    """What a worker was started with: `segment` names a new segment of the run, `overrides` are recipe
    fields."""

    recipe: Path
    run: Path
    segment: str | None
    overrides: list[str]


def split_arguments(words: Sequence[str], module: str) -> Arguments:
    """Read the words after `python -m MODULE`. Raises UserError where recipe or run folder is missing."""
    usage = f"usage: python -m {module} RECIPE.yaml --run DIR [--continue-as NAME] [--section.field value]"
    rest = list(words)
    if not rest or rest[0].startswith("--"):
        raise UserError(f"no recipe given; {usage}")
    recipe = Path(rest.pop(0))
    found: dict[str, str] = {}
    overrides: list[str] = []
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--run", "--continue-as"):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"{name} needs a value; {usage}")
                value = rest.pop(0)
            found[name] = value
        else:
            overrides.append(word)
    if "--run" not in found:
        raise UserError(f"--run DIR is missing: the folder for checkpoints and logs; {usage}")
    return Arguments(recipe, Path(found["--run"]), found.get("--continue-as"), overrides)


def worker_main(
    module: str, work: Callable[[Arguments], Verdict], about: str | None, words: Sequence[str] | None
) -> int:
    """Run one worker and return its exit code.

    Args:
        module: `pretrain` or `finetune`.
        work: trains; raises UserError for wrong input.
        about: what `--help` prints.
        words: the command line after the module; this process's where None.
    """
    arguments = list(sys.argv[1:] if words is None else words)
    if "-h" in arguments or "--help" in arguments:
        print(about)
        return 0
    try:
        run = split_arguments(arguments, module).run
    except UserError:
        run = None
    return run_worker(lambda: work(split_arguments(arguments, module)), run)


def run_worker(body: Callable[[], Verdict], run: Path | None = None) -> int:
    """Run a worker's body and turn how it ends into a verdict and an exit code.

    A signal that comes before `train` listens ends the worker at once, with the verdict preempted.

    Args:
        body: loads the recipe, builds the task and calls `train`.
        run: the run folder where it is known; the verdict of an error before or in `train` is written there.

    Returns:
        The documented exit code. A `UserError` is one line, printed by the launcher from the verdict, or by
        rank 0 where there is no launcher; anything else comes with its traceback, unless it is the loss of
        another rank.
    """
    die_with_parent()
    try:
        with StopRequest(at_once=True):
            return body().exit_code
    except (Stopped, KeyboardInterrupt) as stop:
        how = f"by {stop} before it had begun" if isinstance(stop, Stopped) else "at once by Ctrl-C"
        text = f"stopped {how}; start again to go on"
        attempt = read_attempt(run) if run is not None else 0
        verdict = Verdict("preempted", attempt=attempt, message=text, kind="unsaved")
        write_verdict(run, verdict)
        return verdict.exit_code
    except UserError as error:
        message = " ".join(str(error).split())
    except BaseException as error:
        verdict = record_failure(run, error)
        # Ranks that met the death of one would bury why it died; their stacks are in RUN/logs.
        if LAUNCHED not in os.environ or not LOST_ANOTHER.search(f"{type(error).__name__}: {error}"):
            traceback.print_exc()
        return verdict.exit_code
    # By every rank: the wrong input may have been met by one of them only, and not by rank 0.
    attempt = read_attempt(run) if run is not None else 0
    write_verdict(run, Verdict("failed", attempt=attempt, message=message, kind="user"))
    if (run is None or LAUNCHED not in os.environ) and os.environ.get("RANK", "0") == "0":
        print(f"medfm: error: {message}", file=sys.stderr, flush=True)
    return USER_ERROR


def end_process(code: int) -> NoReturn:
    """End this process once what is registered for its end is done, without taking the interpreter apart:
    with PyTorch loaded that costs a second, and may crash. Threads that still run end, too."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a reader that has gone, a full disk
            stream.flush()
    os._exit(code)
