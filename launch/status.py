"""How a run fares, told from its folder alone: while it goes on, and after it died.

Nothing here imports torch, so that `medfm status` answers within a second.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError
from launch import run_files
from launch.run_files import Rank, Row
from launch.run_state import ENDS, Reading, judge, warnings_of

RECENT = 50  # updates that a rank's times are medians of
SLOWER, SHARE = 1.25, 0.05  # a straggler: so much above the median rank, and this share of an update


@dataclass
class Status:
    """What `medfm status --json` prints.

    Attributes:
        state: new (nothing has begun), starting, running, still (alive, but no update comes), ending,
            restarting, dead (gone without a word), or the state of its verdict.
        summary: one line: what is the matter.
        advice: one line: what to do, "" for nothing.
        warnings: what else a person should know.
        attempt, world: number of the newest launch, and of its processes.
        update, position, total: updates applied, updates' worth of data drawn, updates in the run.
        seconds_per_update: median of the last ones on rank 0; 0 where not known.
        left: seconds to the end at the pace of the last updates; None where it does not move.
        since: seconds since the last line of any rank; None without one.
        figures: the last of each name in RUN/metrics.jsonl; `evaluation`: those of the last evaluation.
        losses: name -> values over the run.
        checkpoint: newest that looks whole: name, update, age in seconds.
        skipped, rollbacks: updates skipped, times the run went back; `bad`: the last ones skipped.
        stragglers: ranks that the others wait for, the slowest first.
        ranks: what is known of each: host, process, memory, median times of an update.
        launches: of RUN/launches.jsonl, oldest first.
        said: last lines for people, with their age.
        disk_free: bytes.
    """

    run: str
    state: str
    summary: str
    advice: str = ""
    warnings: list[str] = field(default_factory=list)
    attempt: int = 0
    world: int = 0
    update: int = 0
    position: int = 0
    total: int = 0
    seconds_per_update: float = 0.0
    left: float | None = None
    since: float | None = None
    figures: Row = field(default_factory=dict)
    evaluation: Row = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    checkpoint: Row = field(default_factory=dict)
    skipped: int = 0
    rollbacks: int = 0
    bad: list[Row] = field(default_factory=list)
    stragglers: list[Row] = field(default_factory=list)
    ranks: list[Row] = field(default_factory=list)
    launches: list[Row] = field(default_factory=list)
    said: list[Row] = field(default_factory=list)
    disk_free: int = 0

    @property
    def over(self) -> bool:
        """Whether nothing more will come by itself."""
        return self.state in ENDS or self.state in ("dead", "new")


def read_status(folder: Path) -> Status:
    """Look at a run folder.

    Raises:
        UserError: it is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the run folder, `--run` of the training")
    if not run_files.is_run(folder):
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and run_files.is_run(p))[:5]
        hint = f"runs in it: {', '.join(inside)}" if inside else "no logs, checkpoints or verdict in it"
        raise UserError(f"{folder}: not a run folder ({hint}); give the run folder, `--run` of the training")
    run = Reading(folder)
    state, summary, advice = judge(run)
    trained = next((row for row in reversed(run.figures) if "loss" in row), {})
    evaluated = next((row for row in reversed(run.figures) if any("evaluate/" in k for k in row)), {})
    total = int(run.engine.get("updates") or 0)
    position = int(trained.get("data/position", 0))
    return Status(
        run=str(folder),
        state=state,
        summary=summary,
        advice=advice,
        warnings=warnings_of(run, state),
        attempt=run.attempt,
        world=run.world,
        update=run.update,
        position=int(run.steps[-1]["position"]) + 1 if run.steps else position,
        total=total,
        seconds_per_update=round(run.pace, 4),
        left=round(_pace(run) * (total - run.update), 1) if state == "running" and run.steps else None,
        since=round(max(0.0, run.now - run.seen), 1) if run.seen else None,
        figures={
            name: value for row in run.figures for name, value in row.items() if "evaluate/" not in name
        },
        evaluation=evaluated,
        losses=_losses(run),
        checkpoint=_checkpoint(run),
        skipped=int(trained.get("optim/skipped", 0)),
        rollbacks=int(trained.get("optim/rollbacks", 0)),
        bad=list(run_files.lines(folder / "bad_updates.jsonl", 64 << 10))[-5:],
        stragglers=stragglers(run.ranks, run.pace),
        ranks=[_rank(rank, run.now) for rank in run.ranks],
        launches=run.launches[-10:],
        said=_said(run),
        disk_free=run.free,
    )


def stragglers(ranks: list[Rank], pace: float) -> list[Row]:
    """Ranks whose own seconds, those in which they wait for no other, are long; an update takes `pace`."""
    own = {rank.rank: _median(rank, "own") for rank in ranks if rank.steps}
    if len(own) < 2:
        return []
    usual = statistics.median_low(own.values())
    slow = [r for r in ranks if r.steps and own[r.rank] > max(SLOWER * usual, usual + SHARE * pace)]
    found = [
        {
            "rank": rank.rank,
            "host": rank.alive.get("host", ""),
            "own": own[rank.rank],
            "usual": usual,
            "waited": _median(rank, "waited"),
        }
        for rank in slow
    ]
    return sorted(found, key=lambda row: -float(row["own"]))


def _median(rank: Rank, name: str) -> float:
    return round(statistics.median(float(step.get(name, 0.0)) for step in rank.steps[-RECENT:]), 4)


def _pace(run: Reading) -> float:
    """Seconds an update takes, with whatever comes between updates."""
    first, last = run.steps[0], run.steps[-1]
    if last["update"] <= first["update"]:
        return run.pace
    return float((last["time"] - first["time"]) / (last["update"] - first["update"]))


def _losses(run: Reading) -> dict[str, list[float]]:
    names = sorted({name for row in run.figures[-3:] for name in row if name.split("/")[0] == "loss"})
    return {name: [row[name] for row in run.figures if isinstance(row.get(name), float)] for name in names}


def _checkpoint(run: Reading) -> Row:
    newest = run.newest
    if newest is None:
        return {}
    return {"name": newest.name, "update": newest.update, "age": round(max(0.0, run.now - newest.time), 1)}


def _rank(rank: Rank, now: float) -> Row:
    row: Row = {"rank": rank.rank, "since": round(max(0.0, now - rank.time), 1)}
    row |= {name: rank.alive[name] for name in ("host", "pid") if name in rank.alive}
    row |= {name: value for name, value in rank.alive.items() if name.endswith("_mib")}
    if rank.steps:
        row["update"] = rank.steps[-1]["update"]
        row |= {name: _median(rank, name) for name in ("seconds", "own", "waited")}
    return row


def _said(run: Reading) -> list[Row]:
    events = run.ranks[0].events if run.ranks else []
    said = [event for event in events if event.get("event") == "message"][-4:]
    return [{"age": round(run.now - float(event["time"]), 1), "text": event["text"]} for event in said]
