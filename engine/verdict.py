"""How a launch ended: `RUN/verdict.json` for people, a line in the launcher's own file, and an exit code.

The launcher's file is on a local disk and named by the environment, so that a verdict arrives although the
run folder is full or gone, and two launchers of one run do not mix them up.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["finished", "preempted", "failed", "hung", "out_of_memory"]
USER_ERROR = 2
LAUNCHED = "MEDFM_LAUNCHED"
"""In the environment of workers whose launcher reads their verdict: the file for it."""
LOST_ANOTHER = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|DistBackendError|DistNetworkError|gloo/transport"
)
"""What a rank says that met the death of another one."""
EXIT_CODES: dict[str, int] = {"finished": 0, "failed": 3, "preempted": 75, "hung": 4, "out_of_memory": 5}


@dataclass(frozen=True)
class Verdict:
    """The end of one launch.

    Attributes:
        state: finished; preempted (start again to go on); failed; hung; out_of_memory.
        update: optimizer updates done.
        attempt: which launch of this run it was, from 1.
        message: one line for a person; empty when finished.
        kind: "user" where the recipe or the input is at fault (exit code 2); "unsaved" where a signal ended a
            process before it had anything to save; else "".
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
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def write_verdict(run: Path | None, verdict: Verdict, *, shared: bool = True) -> None:
    """Tell the launcher, then write `RUN/verdict.json`. A disk that fails is said and no more.

    shared: False leaves the run folder to another rank.
    """
    tell_launcher(verdict)
    if run is None or not shared:
        return
    try:
        write_text(run / "verdict.json", json.dumps(asdict(verdict)) + "\n")
    except OSError as error:
        with suppress(OSError):  # that output may lie on the same disk
            print(f"medfm: {run / 'verdict.json'} cannot be written ({error})", file=sys.stderr, flush=True)


def tell_launcher(verdict: Verdict) -> None:
    """Add this rank's verdict to the launcher's file, where there is one."""
    if file := os.environ.get(LAUNCHED):
        line = json.dumps({"rank": int(os.environ.get("RANK", "0")), "verdict": asdict(verdict)}) + "\n"
        with suppress(OSError), open(file, "a", encoding="utf-8") as words:
            words.write(line)


def read_verdict(run: Path) -> Verdict | None:
    """The last verdict of a run folder, or None where there is none that can be read."""
    try:
        return Verdict(**json.loads((run / "verdict.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def last_attempt(run: Path) -> int:
    """Number of the last launch of this run folder; 0 before the first.

    Raises OSError where it cannot be read: a new launch must not take a number that is taken.
    """
    try:
        return int((run / "attempt").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


def read_attempt(run: Path) -> int:
    """The same for those who only look: 0, too, where it cannot be read."""
    try:
        return last_attempt(run)
    except OSError:
        return 0


def record_failure(run: Path | None, error: BaseException, update: int = 0, advice: str = "") -> Verdict:
    """Write the verdict of an exception; in the run folder only where this launch has none yet: the first
    failing rank knows the cause.

    advice: what a person may do about it, added to the message.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = f"{text}; {advice}" if advice else text
    attempt = read_attempt(run) if run is not None else 0
    verdict = Verdict("out_of_memory" if out_of_memory(error) else "failed", update, attempt, text)
    written = read_verdict(run) if run is not None else None
    first = written is None or written.attempt < attempt or written.state == "finished"
    write_verdict(run, verdict, shared=first)
    return verdict if first or written is None else written


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the host or the device, ran out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in _OUT_OF_MEMORY)
    )


_OUT_OF_MEMORY = (
    "can't allocate memory",  # PyTorch's allocator of host memory
    "Cannot allocate memory",  # the system's ENOMEM
    "std::bad_alloc",
    "CUDA out of memory",  # PyTorch's allocator of device memory
    "error: out of memory",  # the CUDA runtime's or driver's own: a context, pinned memory
    "'out of memory'",  # NCCL: Cuda failure 2 'out of memory'
    "Failed to CUDA",  # NCCL: malloc, calloc, host alloc
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
