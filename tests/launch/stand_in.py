"""A worker that trains nothing and loads no library, for tests of what the launcher does with processes.

`python -m stand_in --run RUN [--updates N] [--start S] [--save S] [--loader] [--fault KIND]`. Ranks share a
folder instead of collectives: one that was asked to stop touches `stop`; every rank then goes on to the save.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from engine import watchdog
from engine.signals import StopRequest
from engine.verdict import Verdict, read_attempt, record_failure, write_text, write_verdict
from engine.worker import run_worker

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
MEETING = os.environ.get("MASTER_PORT", "alone")


def fork_loader(run: Path) -> None:
    """A data worker: does nothing, dies with its rank."""
    if os.fork():
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    (run / f"loader-{RANK}").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


def meet(run: Path, attempt: int, where: str) -> None:
    """A barrier that breaks, as a collective does, when another rank has died."""
    (run / f"{where}-{attempt}-{RANK}").write_text(str(os.getpid()))
    for other in range(WORLD):
        pid = run / f"training-{attempt}-{other}"
        while not (run / f"{where}-{attempt}-{other}").exists():
            if pid.exists() and pid.read_text() and not alive(int(pid.read_text())):
                raise RuntimeError("gloo/transport: Connection closed by peer")
            time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not: when it goes depends on the system's first process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def save(run: Path, update: int, seconds: float, attempt: int) -> None:
    """Rank 0 saves while the others wait for it; as long as there is a file `hold`, if not longer."""
    meet(run, attempt, "saving")
    if RANK == 0:
        with open(run / "saves", "a") as saves:
            saves.write(f"{attempt} {update}\n")
        time.sleep(seconds)
        while (run / "hold").exists():
            time.sleep(0.01)
        folder = run / "checkpoints" / f"update-{update:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "complete.json").touch()
    meet(run, attempt, "saved")


def fail(kind: str, update: int) -> None:
    if kind == "out of memory":
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        bytearray(4 << 30)
    elif kind == "error":
        raise ValueError(f"no such thing at update {update}")
    elif kind != "none":
        os.kill(os.getpid(), getattr(signal, kind))


def train(run: Path, given: argparse.Namespace) -> Verdict:
    """Updates of 20 ms until the end or a signal; the end waits until there is no file `on`."""
    time.sleep(given.start)  # imports
    newest = max((int(p.name[7:]) for p in (run / "checkpoints").glob("update-*")), default=0)
    with StopRequest() as stop:
        if RANK == 0:
            write_text(run / "attempt", f"{read_attempt(run) + 1}\n")
            (run / "stop").unlink(missing_ok=True)
            (run / f"opened-{MEETING}").touch()
        while WORLD > 1 and not (run / f"opened-{MEETING}").exists():
            time.sleep(0.01)
        attempt = read_attempt(run)
        watchdog.LEAVE_SECONDS = 1.0
        with watchdog.Watchdog(run, given.hang / 60, attempt, RANK) as guard:
            if given.loader:
                fork_loader(run)
            meet(run, attempt, "training")
            update = newest
            while (update < given.updates or (run / "on").exists()) and not (run / "stop").exists():
                time.sleep(0.02)
                update += 1
                guard.beat(update)
                if stop.asked:
                    (run / "stop").touch()
                if update == given.fault_at and WORLD - 1 == RANK and not (run / "spared").exists():
                    if given.once:
                        (run / "spared").touch()
                    try:
                        fail(given.fault, update)
                    except Exception as error:
                        record_failure(run, error, update)
                        raise
            save(run, update if update >= given.updates else newest + 1, given.save, attempt)
        finished = update >= given.updates
        verdict = Verdict("finished" if finished else "preempted", update, attempt)
        write_verdict(run, verdict, shared=RANK == 0)
    if given.abort:
        os.abort()
    return verdict


def main() -> int:
    """Run as a worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--save", type=float, default=0.1)
    parser.add_argument("--hang", type=float, default=60.0)
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--abort", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--fault", default="none")
    parser.add_argument("--fault_at", type=int, default=3)
    given, _ = parser.parse_known_args()
    return run_worker(lambda: train(given.run, given), given.run)


if __name__ == "__main__":
    sys.exit(main())
