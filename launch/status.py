"""How a run fares, told from its folder alone: while it goes on, and after it died.

Nothing here imports torch, so that `medfm status` answers within a second.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError
from engine.verdict import Verdict, read_attempt, read_verdict
from launch import run_files
from launch.run_files import Rank, Row

SILENT = 45.0  # seconds without a line, of ten-second ones, after which a process counts as gone
STARTING = 600.0  # seconds that a launch may take before its first line
RESTARTING = 300.0  # seconds after which a launcher that would start again has not
STILL = 30.0  # seconds an update may take at least before the run counts as not moving
FULL = 16 << 20  # bytes free below which a disk counts as full
SLOWER, SHARE = 1.25, 0.05  # a straggler: so much above the median rank, and this share of an update

ENDS = {
    "finished": "finished",
    "preempted": "stopped and saved",
    "failed": "failed",
    "hung": "ended because it hung",
    "out_of_memory": "ran out of memory",
}


@dataclass
class Status:
    """What `medfm status --json` prints.

    Attributes:
        state: starting, running, still (alive, but no update comes), restarting, dead (gone without a word),
            new (nothing has begun), or the state of its verdict.
        summary: one line: what is the matter.
        advice: one line: what to do, "" for nothing.
        warnings: what else a person should know.
        update, position, total: updates applied, data drawn, updates in the run.
        seconds_per_update: median of the last ones on rank 0; 0 where not known.
        left: seconds to the end at the pace of the last updates; None where it does not move.
        since: seconds since the last line of any rank; None without one.
        figures: of the last line of RUN/metrics.jsonl; `evaluation` the last one's.
        losses: name -> values over the run, for a trend.
        checkpoint: newest that is whole: name, update, age in seconds.
        stragglers, ranks: one entry a rank.
        launches: of RUN/launches.jsonl, oldest first.
        said: last lines for people, with their age.
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


def read_status(run: Path) -> Status:
    """Look at a run folder.

    Raises:
        UserError: it is none.
    """
    if not run.is_dir():
        raise UserError(
            f"{run}: no such folder; give the run folder, that of `--run` or of the recipe's `run`"
        )
    if not run_files.is_run(run):
        inside = sorted(p.name for p in run.iterdir() if p.is_dir() and run_files.is_run(p))[:5]
        hint = f"runs in it: {', '.join(inside)}" if inside else "it has no logs, checkpoints or verdict"
        raise UserError(f"{run}: not a run folder ({hint}); give the folder that was `--run`")
    return _Reading(run).status()


class _Reading:
    """All that was read at one instant, and what follows from it."""

    def __init__(self, run: Path) -> None:
        self.run, self.now = run, time.time()
        self.recipe = run_files.read_recipe(run)
        self.engine: Row = self.recipe.get("engine") or {}
        self.ranks = run_files.ranks_of(run)
        self.figures = run_files.figures_of(run)
        self.launches = list(run_files.lines(run / "launches.jsonl", 1 << 20))
        self.checkpoints = run_files.checkpoints_of(run)
        self.attempt = max([read_attempt(run), *(rank.attempt for rank in self.ranks)])
        self.verdict = self._verdict()
        self.free = shutil.disk_usage(run).free
        self.steps = self.ranks[0].steps if self.ranks else []
        self.pace = statistics.median([s["seconds"] for s in self.steps[-50:]]) if self.steps else 0.0

    def status(self) -> Status:
        state, summary, advice = self._judge()
        last = next((row for row in reversed(self.figures) if "loss" in row), {})
        evaluated = next((row for row in reversed(self.figures) if any("evaluate/" in k for k in row)), {})
        update = max([int(last.get("update", 0)), self._update(), self.verdict.update if self.verdict else 0])
        total = int(self.engine.get("updates") or 0)
        seen = max((rank.time for rank in self.ranks), default=0.0)
        pace = self._wall_pace() if state == "running" else 0.0
        return Status(
            run=str(self.run),
            state=state,
            summary=summary,
            advice=advice,
            warnings=self._warnings(state),
            attempt=self.attempt,
            world=max((int(rank.alive.get("world", 0)) for rank in self.ranks), default=0),
            update=update,
            position=int(self.steps[-1]["position"]) + 1 if self.steps else 0,
            total=total,
            seconds_per_update=round(self.pace, 4),
            left=round(pace * (total - update), 1) if pace and total >= update else None,
            since=round(max(0.0, self.now - seen), 1) if seen else None,
            figures={k: v for k, v in last.items() if not k.startswith("evaluate/")},
            evaluation=evaluated,
            losses=self._losses(),
            checkpoint=self._checkpoint(),
            skipped=int(last.get("optim/skipped", 0)),
            rollbacks=int(last.get("optim/rollbacks", 0)),
            bad=list(run_files.lines(self.run / "bad_updates.jsonl", 64 << 10))[-5:],
            stragglers=self._stragglers(),
            ranks=[self._rank(rank) for rank in self.ranks],
            launches=self.launches[-10:],
            said=self._said(),
            disk_free=self.free,
        )

    def _verdict(self) -> Verdict | None:
        """How the newest launch ended, None where it did not say."""
        found = read_verdict(self.run)
        if found is not None and found.attempt >= self.attempt:
            return found
        last = self.launches[-1] if self.launches else {}
        seen = max((rank.time for rank in self.ranks), default=0.0)
        if last.get("attempt", 0) >= self.attempt and float(last.get("end") or 0.0) >= seen - 1.0:
            try:
                return Verdict(**last["verdict"])
            except (KeyError, TypeError):
                return None
        return None

    def _judge(self) -> tuple[str, str, str]:
        """State, summary and advice."""
        last = self.launches[-1] if self.launches else {}
        again = bool(last.get("restart")) and self.now - float(last.get("end") or 0.0) < RESTARTING
        if self.verdict is not None and not (alive := self._alive()):
            if again and last.get("attempt") == self.verdict.attempt:
                how = ENDS.get(self.verdict.state, self.verdict.state)
                return "restarting", f"{how} ({self.verdict.message}); the launcher starts it again", ""
            return self._ended(self.verdict)
        alive = self._alive()
        if alive:
            return self._going(alive)
        marked = self.run / "attempt"
        begun = marked.stat().st_mtime if marked.exists() else 0.0
        newest = max((rank.attempt for rank in self.ranks), default=0)
        if newest < self.attempt and self.now - begun < STARTING:
            return "starting", f"launch {self.attempt} began {ago(self.now - begun)} ago; no update yet", ""
        if self.attempt == 0:
            return (
                "new",
                "nothing has been started in this folder yet",
                "start it: medfm launch local RECIPE.yaml",
            )
        return self._dead(begun)

    def _ended(self, verdict: Verdict) -> tuple[str, str, str]:
        how = ENDS.get(verdict.state, verdict.state)
        said = f": {verdict.message}" if verdict.message else ""
        if verdict.kind == "user":
            return "failed", f"not started{said}", "correct that, then start it again"
        if verdict.kind == "unsaved":
            how = "stopped before it could save"
        summary = f"{how} at update {verdict.update}{said}"
        advice = {
            "finished": f"weights: medfm export {shlex.quote(str(self.run))} --out DIR",
            "out_of_memory": f"change what the message names, then {self._go_on()}",
            "hung": f"see where in {self.run / 'logs'}/rank-*.stacks.txt, then {self._go_on()}",
            "failed": f"mend what the message names, then {self._go_on()}",
        }.get(verdict.state, self._go_on())
        if verdict.state == "failed" and (self.run / "report.json").exists():
            advice = f"{self.run / 'report.json'} lists the updates that went wrong; {advice}"
        return verdict.state, summary, advice

    def _going(self, alive: list[Rank]) -> tuple[str, str, str]:
        gone = [rank for rank in self.ranks if rank not in alive]
        stopped = [rank for rank in alive if process_state(rank.alive) == "stopped"]
        if not self.steps:
            text = "in its first update"
            began = min((rank.events[0]["time"] for rank in alive if rank.events), default=self.now)
        else:
            text, began = f"at update {self.steps[-1]['update']}", self.steps[-1]["time"]
        still = self.now - began
        doing = self._doing()
        if gone or stopped:
            who = ", ".join(_name(rank) for rank in gone or stopped)
            what = "is gone" if gone else "is stopped by a signal (SIGSTOP)"
            return (
                "still",
                f"{who} {what}, so the others wait, {text} for {ago(still)}",
                self._patience(still),
            )
        if still > max(STILL, 10 * self.pace) and not doing:
            return "still", f"alive, but no update for {ago(still)}, {text}", self._patience(still)
        return "running", doing or ("training" if self.steps else f"{text} for {ago(still)}"), ""

    def _patience(self, still: float) -> str:
        minutes = float(self.engine.get("hang_minutes", 15.0))
        if not minutes:
            return "the watchdog is off (engine.hang_minutes 0): end it yourself with SIGTERM"
        left = max(0.0, 60 * minutes - still)
        return f"the watchdog writes all stacks and ends it after {minutes:g} minutes, in {ago(left)}"

    def _dead(self, begun: float) -> tuple[str, str, str]:
        seen = max((rank.time for rank in self.ranks if rank.attempt == self.attempt), default=0.0) or begun
        update = self._update()
        newest = self._checkpoint()
        lost = (
            f", {update - newest['update']} updates are lost" if newest and update > newest["update"] else ""
        )
        kept = f"{newest['name']} is kept{lost}" if newest else "nothing was saved"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen))
        summary = (
            f"died without a word at update {update}, {when} ({ago(self.now - seen)} ago): "
            f"killed (SIGKILL, power, or the kernel for lack of memory: `dmesg | grep -i killed`); {kept}"
        )
        return "dead", summary, self._go_on()

    def _go_on(self) -> str:
        """How to start the run again."""
        newest = self._checkpoint()
        where = f"goes on from update {newest['update']}" if newest else "begins anew"
        stage = bool({"objective", "tokens", "head", "prompts"} & set(self.recipe))
        world = max((int(rank.alive.get("world", 0)) for rank in self.ranks), default=0)
        if not stage:
            return f"start the same command again; it {where}"
        run = shlex.quote(str(self.run))
        many = f" --processes {world}" if world else ""
        return f"`medfm launch local {run}/recipe.yaml --run {run}{many}` {where}"

    def _alive(self) -> list[Rank]:
        """Ranks of the newest launch whose process lives: by its id on this host, else by its last line."""
        alive = []
        for rank in self.ranks:
            if rank.attempt != self.attempt:
                continue
            if rank.alive.get("host") == socket.gethostname():
                if process_state(rank.alive):
                    alive.append(rank)
            elif self.now - rank.time < SILENT:
                alive.append(rank)
        return alive

    def _doing(self) -> str:
        """What goes on instead of updates, told from the last event."""
        events = self.ranks[0].events if self.ranks else []
        after = [e for e in events if not self.steps or e.get("time", 0) >= self.steps[-1]["time"]]
        if after and after[-1].get("event") == "evaluate" and "seconds" not in after[-1]:
            return f"evaluating for {ago(self.now - after[-1]['time'])}"
        return ""

    def _update(self) -> int:
        return max((int(s["update"]) for rank in self.ranks for s in rank.steps[-1:]), default=0)

    def _wall_pace(self) -> float:
        """Seconds an update takes, whatever comes between updates counted in."""
        if len(self.steps) < 2:
            return self.pace
        first, last = self.steps[0], self.steps[-1]
        return float((last["time"] - first["time"]) / max(1, last["update"] - first["update"]))

    def _losses(self) -> dict[str, list[float]]:
        names = sorted({name for row in self.figures[-3:] for name in row if name.split("/")[0] == "loss"})
        return {
            name: [row[name] for row in self.figures if isinstance(row.get(name), float)] for name in names
        }

    def _checkpoint(self) -> Row:
        whole = [c for c in self.checkpoints if not c.fault]
        if not whole:
            return {}
        newest = whole[-1]
        return {
            "name": newest.name,
            "update": newest.update,
            "age": round(max(0.0, self.now - newest.time), 1),
        }

    def _stragglers(self) -> list[Row]:
        """Ranks whose own seconds, those in which they wait for no other, are long."""
        if len(self.ranks) < 2:
            return []
        own = {
            r.rank: statistics.median([s.get("own", 0.0) for s in r.steps[-50:]] or [0.0]) for r in self.ranks
        }
        usual = statistics.median_low(own.values())
        found = []
        for rank in self.ranks:
            more = own[rank.rank] - usual
            if own[rank.rank] > SLOWER * usual and more > SHARE * self.pace > 0:
                waited = statistics.median([s.get("waited", 0.0) for s in rank.steps[-50:]])
                host = rank.alive.get("host", "")
                found.append(
                    {"rank": rank.rank, "host": host, "own": own[rank.rank], "usual": usual, "waited": waited}
                )
        return sorted(found, key=lambda row: -float(row["own"]))

    def _rank(self, rank: Rank) -> Row:
        row = {"rank": rank.rank, "since": round(max(0.0, self.now - rank.time), 1)}
        row |= {
            k: v for k, v in rank.alive.items() if k not in ("time", "event", "attempt", "world", "update")
        }
        if rank.steps:
            last = rank.steps[-50:]
            row["update"] = rank.steps[-1]["update"]
            row |= {
                k: round(statistics.median([s.get(k, 0.0) for s in last]), 4)
                for k in ("seconds", "own", "waited")
            }
        return row

    def _said(self) -> list[Row]:
        events = self.ranks[0].events if self.ranks else []
        said = [event for event in events if event.get("event") in ("message", "rollback")][-4:]
        texts = [e.get("text") or f"went back to update {e.get('to')}: {e.get('reason', '')}" for e in said]
        return [
            {"age": round(self.now - e.get("time", self.now), 1), "text": t}
            for e, t in zip(said, texts, strict=True)
        ]

    def _warnings(self, state: str) -> list[str]:
        found = []
        disk = os.statvfs(self.run) if hasattr(os, "statvfs") else None
        if self.free < FULL:
            text = (
                f"the disk of {self.run} is full ({self.free >> 20} MiB free): nothing can be saved or logged"
            )
            found.append(
                text
                + (
                    "; make room, the run goes on by itself"
                    if state in ("running", "still")
                    else "; make room first"
                )
            )
        elif disk is not None and disk.f_files and disk.f_favail == 0:
            found.append(f"the disk of {self.run} takes no more files; delete some")
        found += [f"damaged checkpoint {c.name}: {c.fault}" for c in self.checkpoints if c.fault]
        silent = [r for r in self.ranks if state == "running" and self.now - r.time > SILENT]
        if silent and self.free >= FULL:
            longest = max(self.now - rank.time for rank in silent)
            found.append(
                f"{', '.join(map(_name, silent))}: no line for {ago(longest)}; the disk may be slow or gone"
            )
        return found


def process_state(alive: Row) -> str:
    """State of the process that wrote an alive line, on this host: "" where it is gone."""
    import psutil

    try:
        process = psutil.Process(int(alive["pid"]))
        if abs(process.create_time() - float(alive["born"])) > 2.0:
            return ""  # the number is another process's by now
        state = str(process.status())
    except (psutil.Error, KeyError, ValueError):
        return ""
    return "" if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else state


def ago(seconds: float) -> str:
    """A length of time in two units at most: 12 s, 3 min 20 s, 2 h 5 min, 3 days 4 h."""
    left = int(max(0.0, seconds))
    words: list[str] = []
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= length or words or unit == "s":
            words.append(f"{left // length} {unit}")
            left %= length
    return " ".join(words[:2])


def _name(rank: Rank) -> str:
    return (
        f"rank {rank.rank} ({rank.alive.get('host', 'unknown host')}, process {rank.alive.get('pid', '?')})"
    )
