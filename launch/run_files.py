"""What a run folder holds, read without torch while the run goes on or after it died.

Every file may be missing, half written or from an earlier launch; what cannot be read is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARKS = (
    "attempt",
    "verdict.json",
    "launches.jsonl",
    "metrics.jsonl",
    "logs/rank-*.jsonl",
    "checkpoints/update-*",
)
TAILS = 4 << 20  # bytes read of all ranks' logs together
POINTS = 160  # rows of figures looked at for a trend

Row = dict[str, Any]


@dataclass
class Rank:
    """The end of one rank's log.

    Attributes:
        attempt: launch that its last lines are of; 0 where they do not say.
        alive: last line of `engine.logs` that says that the process lives: host, pid, memory.
        steps: last updates of that launch, oldest first.
        events: last other lines of that launch.
        time: of the last line of any kind, seconds since 1970.
    """

    rank: int
    attempt: int = 0
    alive: Row = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    time: float = 0.0


@dataclass
class CheckpointFolder:
    """A checkpoint as its folder shows it.

    Attributes:
        fault: what is wrong with it, "" where every file has the size that is written down; the content is
            looked at by whoever loads it.
        time: of its completion, seconds since 1970.
    """

    name: str
    update: int
    time: float
    fault: str


def is_run(folder: Path) -> bool:
    """Whether a folder holds anything of a run."""
    return any(any(folder.glob(mark)) for mark in MARKS)


def lines(path: Path, last: int | None = None) -> Iterator[Row]:
    """JSON objects of a file, one a line; of its last so many bytes only, if given."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if last is not None and size > last:
                file.seek(size - last)
                file.readline()
            content = file.read()
    except OSError:
        return
    for line in content.splitlines():
        if (row := _row(line)) is not None:
            yield row


def read_json(path: Path) -> Row:
    """A JSON object, {} where there is none to be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_recipe(run: Path) -> Row:
    """The resolved recipe of a run, {} where there is none to be read."""
    import yaml

    try:
        with open(run / "recipe.yaml", encoding="utf-8") as file:
            found = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def ranks_of(run: Path) -> list[Rank]:
    """The ends of the logs of the newest launch's ranks."""
    files = sorted((run / "logs").glob("rank-*.jsonl"))
    share = min(256 << 10, TAILS // max(1, len(files)))
    found = [_rank(path, share) for path in files if re.fullmatch(r"rank-\d+\.jsonl", path.name)]
    newest = max((rank.attempt for rank in found), default=0)
    return [rank for rank in found if rank.attempt == newest]


def _rank(path: Path, share: int) -> Rank:
    rank = Rank(int(path.stem.removeprefix("rank-")))
    for row in lines(path, share):
        kind = row.get("event")
        if not isinstance(row.get("time"), int | float):
            continue
        attempt = row.get("attempt", rank.attempt)
        if attempt != rank.attempt or kind == "start":
            rank.steps, rank.events, rank.alive, rank.attempt = [], [], {}, attempt
        if kind == "alive":
            rank.alive = row
        else:
            (rank.steps if kind == "step" else rank.events).append(row)
        rank.time = row["time"]
    return rank


def figures_of(run: Path) -> list[Row]:
    """Rows of RUN/metrics.jsonl: all of a short file; of a long one the last ones and some evenly spaced
    before them."""
    path = run / "metrics.jsonl"
    try:
        size = path.stat().st_size
    except OSError:
        return []
    if size <= TAILS // 4:
        return list(lines(path))
    rows: list[Row] = []
    with open(path, "rb") as file:
        for point in range(POINTS):
            file.seek(size * point // POINTS)
            file.readline()
            if (row := _row(file.readline())) is not None:
                rows.append(row)
    last = list(lines(path, 64 << 10))
    first = last[0].get("update", 0) if last else 0
    return [row for row in rows if row.get("update", 0) < first] + last


def launches_of(run: Path) -> list[Row]:
    """RUN/launches.jsonl as one row a launch: attempt, host, pid, command, start, and once it has ended end,
    verdict and restart (whether the launcher starts again)."""
    launches: list[Row] = []
    for row in lines(run / "launches.jsonl", 1 << 20):
        if row.get("event") == "launch":
            launches.append({**row, "start": row.get("time")})
        elif row.get("event") == "end" and launches:
            attempt = row.get("attempt") or launches[-1].get("attempt")
            more = {"end": row.get("time"), "restart": bool(row.get("again")), "attempt": attempt}
            launches[-1] |= {"verdict": row.get("verdict"), **more}
    return launches


def checkpoints_of(run: Path) -> list[CheckpointFolder]:
    """The checkpoints a resume would look at, oldest first."""
    folders = (run / "checkpoints").glob("update-*")
    return [_checkpoint(folder) for folder in sorted(f for f in folders if f.name[7:].isdigit())]


def _checkpoint(folder: Path) -> CheckpointFolder:
    complete, fault, time = folder / "complete.json", "", 0.0
    listed = read_json(complete).get("files")
    try:
        time = complete.stat().st_mtime
        if not isinstance(listed, dict):
            listed, fault = {}, "complete.json cannot be read"
        for name, entry in listed.items():
            if not fault and (folder / name).stat().st_size != entry["size"]:
                fault = f"{name} has another size than was written"
    except FileNotFoundError as error:
        fault = f"{Path(error.filename).name} is missing"
    except (OSError, KeyError, TypeError) as error:
        fault = f"it cannot be read ({type(error).__name__})"
    return CheckpointFolder(folder.name, int(folder.name[7:]), time, fault)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
