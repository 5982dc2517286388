"""How a launch ended: `RUN/verdict.json`, and the exit code that says the same."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engine.errors import UserError

State = Literal["finished", "preempted", "failed", "hung", "out_of_memory"]
USER_ERROR = 2
LAUNCHED = "MEDFM_LAUNCHED"  # in the environment of workers whose launcher reads their verdict
EXIT_CODES: dict[str, int] = {"finished": 0, "failed": 3, "preempted": 75, "hung": 4, "out_of_memory": 5}


@dataclass(frozen=True)
class Verdict:
    """The end of one launch.

    Attributes:
        state: finished; preempted (saved, start again); failed; hung; out_of_memory.
        update: optimizer updates done.
        attempt: which launch of this run it was, from 1.
        message: one line for a person; empty when finished.
        kind: "user" where the recipe or the input is at fault (exit code 2), else "".
    """

    state: State
    update: int = 0
    attempt: int = 0
    message: str = ""
    kind: str = ""

    @property
    def exit_code(self) -> int:
        """0 finished, 2 user error, 3 failed, 75 preempted, 4 hung, 5 out of memory."""
        return USER_ERROR if self.kind == "user" else EXIT_CODES[self.state]


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once, so that a reader finds the old text or the new one, and a crash leaves
    one of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def write_verdict(run: Path, verdict: Verdict) -> None:
    """Write `RUN/verdict.json`."""
    write_text(run / "verdict.json", json.dumps(asdict(verdict)) + "\n")


def read_verdict(run: Path) -> Verdict | None:
    """The last verdict of a run folder, or None where there is none that can be read."""
    try:
        return Verdict(**json.loads((run / "verdict.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_attempt(run: Path) -> int:
    """Number of the last launch of this run folder; 0 before the first."""
    try:
        return int((run / "attempt").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def run_worker(body: Callable[[], Verdict], run: Path | None = None) -> int:
    """Run a worker's body and turn how it ends into a verdict file and an exit code.

    Args:
        body: loads the recipe, builds the task and calls `train`.
        run: the run folder where it is known; the verdict of an error before or in `train` is written there.

    Returns:
        The documented exit code. A `UserError` is one line, printed by the launcher from the verdict, or by
        rank 0 where there is no launcher; anything else comes with its traceback.
    """
    try:
        return body().exit_code
    except UserError as error:
        message = " ".join(str(error).split())
    except BaseException as error:
        verdict = record_failure(run, error)
        traceback.print_exc()
        return verdict.exit_code
    # By every rank: the wrong input may have been met by one of them only, and not by rank 0.
    if run is not None:
        write_verdict(run, Verdict("failed", attempt=read_attempt(run), message=message, kind="user"))
    if (run is None or LAUNCHED not in os.environ) and os.environ.get("RANK", "0") == "0":
        print(f"medfm: error: {message}", file=sys.stderr, flush=True)
    return USER_ERROR


def record_failure(run: Path | None, error: BaseException, update: int = 0) -> Verdict:
    """Write the verdict of an exception, unless this launch has one already: the first failing rank knows the
    cause."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    attempt = read_attempt(run) if run is not None else 0
    verdict = Verdict("out_of_memory" if _out_of_memory(error) else "failed", update, attempt, text)
    if run is None:
        return verdict
    written = read_verdict(run)
    if written is None or written.attempt < attempt:
        write_verdict(run, verdict)
        return verdict
    return written if written.state != "finished" else verdict


def _out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
