"""Whether a run goes on, has ended or has died, and what to do about it."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import statistics
import time
from pathlib import Path

from engine.verdict import Verdict, read_attempt, read_verdict
from launch import run_files
from launch.run_files import CheckpointFolder, Rank, Row

SILENT = 45.0  # seconds without a line, of ten-second ones, after which a process counts as gone
RESTARTING = 300.0  # seconds after which a launcher that would start again has not
STARTING = 600.0  # seconds that a launch without a launcher may take before its first line
STILL = 30.0  # seconds an update may take at least before the run counts as not moving
FULL = 16 << 20  # bytes free below which a disk counts as full

ENDS = {
    "finished": "finished",
    "preempted": "ended",
    "failed": "failed",
    "hung": "ended because it hung",
    "out_of_memory": "ran out of memory",
}
Judgement = tuple[str, str, str]
"""State, summary and advice, as in `launch.status.Status`."""


class Reading:
    """A run folder as it was at one instant.

    Attributes:
        ranks: of the newest launch.
        steps: last updates of its first rank.
        pace: median seconds of these.
        verdict: how the newest launch ended, None where it has not said.
        seen: when a rank was last heard of, seconds since 1970; 0 for never.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.now = run, time.time()
        self.recipe = run_files.read_recipe(run)
        self.engine: Row = self.recipe.get("engine") or {}
        self.figures = run_files.figures_of(run)
        self.launches = run_files.launches_of(run)
        self.checkpoints = run_files.checkpoints_of(run)
        ranks = run_files.ranks_of(run)
        self.attempt = max([read_attempt(run), *(rank.attempt for rank in ranks)])
        self.ranks = [rank for rank in ranks if rank.attempt == self.attempt]
        self.steps = self.ranks[0].steps if self.ranks else []
        self.pace = statistics.median([s["seconds"] for s in self.steps[-50:]]) if self.steps else 0.0
        self.seen = max((rank.time for rank in self.ranks), default=0.0)
        self.free = shutil.disk_usage(run).free
        self.verdict = self._verdict()

    @property
    def update(self) -> int:
        """Updates applied."""
        done = [int(s["update"]) for rank in self.ranks for s in rank.steps[-1:]]
        return max([*done, self.verdict.update if self.verdict else 0, *self._logged()])

    @property
    def world(self) -> int:
        """Processes of the newest launch; 0 where not known."""
        return max((int(rank.alive.get("world", 0)) for rank in self.ranks), default=0)

    @property
    def newest(self) -> CheckpointFolder | None:
        """The newest checkpoint that looks whole."""
        return next((c for c in reversed(self.checkpoints) if not c.fault), None)

    def _logged(self) -> list[int]:
        return [int(row["update"]) for row in self.figures[-1:] if "update" in row]

    def _verdict(self) -> Verdict | None:
        last = self.launches[-1] if self.launches else {}
        if "end" in last and self.seen < float(last["end"] or 0.0) + 1.0:
            try:
                return Verdict(**last["verdict"])
            except (KeyError, TypeError):
                return None
        found = read_verdict(self.run)
        return found if found is not None and found.attempt >= self.attempt else None


def judge(run: Reading) -> Judgement:
    """What is the matter with a run."""
    last = run.launches[-1] if run.launches else {}
    if alive := living(run):
        return _going(run, alive)
    if run.verdict is not None and ("end" in last or not _lives(last)):
        if last.get("restart") and run.now - float(last["end"]) < RESTARTING and _lives(last):
            how = ENDS.get(run.verdict.state, run.verdict.state)
            return "restarting", f"{how} ({run.verdict.message}); the launcher starts it again", ""
        return _ended(run, run.verdict)
    begun = float(last.get("start") or 0.0)
    if _lives(last) and "end" not in last:
        if run.seen > begun:
            return "ending", f"its processes ended at update {run.update}; the launcher will say how", ""
        return "starting", f"the launcher began {ago(run.now - begun)} ago; nothing of its processes yet", ""
    begun = max(begun, _changed(run.run / "attempt"))
    if not run.ranks and run.attempt and not run.launches and run.now - begun < STARTING:
        return "starting", f"launch {run.attempt} began {ago(run.now - begun)} ago; no line of it yet", ""
    if not run.attempt and not run.launches:
        return (
            "new",
            "nothing has been started in this folder yet",
            "medfm launch local RECIPE.yaml starts it",
        )
    return _dead(run, max(run.seen, begun))


def _ended(run: Reading, verdict: Verdict) -> Judgement:
    folder, again = run.run, _go_on(run)
    how = ENDS.get(verdict.state, verdict.state)
    if verdict.kind == "user":
        return "failed", f"not started: {verdict.message}", "correct that, then start it again"
    said = f": {verdict.message}" if verdict.message else ""
    if verdict.kind == "unsaved":
        return verdict.state, f"ended{said}", again
    if "killed by SIG" in verdict.message:
        return verdict.state, f"{how} at update {verdict.update}{said}", again
    advice = {
        "finished": f"`medfm export {shlex.quote(str(folder))} --out DIR` writes its weights",
        "out_of_memory": f"change what the message names; then {again}",
        "hung": f"{folder / 'logs'}/rank-*.stacks.txt show where; {again}",
        "failed": f"mend what the message names; then {again}",
    }.get(verdict.state, again)
    if verdict.state == "failed" and (folder / "report.json").exists():
        advice = f"{folder / 'report.json'} lists the updates that went wrong; then {again}"
    return verdict.state, f"{how} at update {verdict.update}{said}", advice


def _going(run: Reading, alive: list[Rank]) -> Judgement:
    gone = [rank for rank in run.ranks if rank not in alive]
    stopped = [rank for rank in alive if state_of(rank.alive) == "stopped"]
    where = f"at update {run.steps[-1]['update']}" if run.steps else "before its first update"
    lines = run.steps[-1:] or [event for rank in run.ranks for event in rank.events[:1]]
    still = run.now - max((float(line["time"]) for line in lines), default=run.now)
    if gone or stopped:
        who = ", ".join(map(name_of, gone or stopped))
        what = "is gone" if gone else "is stopped by a signal"
        advice = _patience(run, still)
        if gone and run.launches and _lives(run.launches[-1]):
            advice = "the launcher ends the others within seconds"
        return "still", f"{who} {what}, and the others wait, {where} for {ago(still)}", advice
    if busy := _evaluating(run) or _saving(run):
        return "running", busy, ""
    if still > max(STILL, 10 * run.pace):
        return "still", f"alive, but no update for {ago(still)}, {where}", _patience(run, still)
    return "running", "training" if run.steps else f"{where} for {ago(still)}", ""


def _evaluating(run: Reading) -> str:
    events = run.ranks[0].events[-1:] if run.ranks else []
    for event in events:
        if event.get("event") == "evaluate" and "seconds" not in event:
            return f"evaluating for {ago(run.now - float(event['time']))}"
    return ""


def _saving(run: Reading) -> str:
    """Of the last save of a launch, which is tried again for long where the storage fails."""
    since = 0.0
    for event in run.ranks[0].events if run.ranks else []:
        if event.get("event") in ("last_save", "checkpoint"):
            since = float(event["time"]) if event["event"] == "last_save" else 0.0
    return f"saving before it ends, for {ago(run.now - since)}" if since else ""


def _patience(run: Reading, still: float) -> str:
    minutes = float(run.engine.get("hang_minutes", 15.0))
    if not minutes:
        return "the watchdog is off (engine.hang_minutes 0): end it yourself with SIGTERM"
    left = max(0.0, 60 * minutes - still)
    return f"the watchdog writes all stacks and ends it after {minutes:g} minutes, in {ago(left)}"


def _dead(run: Reading, seen: float) -> Judgement:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen))
    kept = "nothing was saved"
    if run.newest:
        lost = run.update - run.newest.update
        kept = f"{run.newest.name} is kept" + (f", {lost} updates are lost" if lost > 0 else "")
    summary = (
        f"died without a word at update {run.update}, {when} ({ago(run.now - seen)} ago): killed by SIGKILL, "
        f"by a power cut, or by the kernel for lack of memory (`dmesg | grep -i killed`); {kept}"
    )
    return "dead", summary, _go_on(run)


def _go_on(run: Reading) -> str:
    """How to start the run again, and what it does then."""
    where = f"goes on from update {run.newest.update}" if run.newest else "begins anew"
    folder = shlex.quote(str(run.run))
    if run.launches and run.launches[-1].get("command"):
        return f"`{run.launches[-1]['command']}` {where}"
    if {"objective", "tokens", "head", "prompts"} & set(run.recipe):
        many = f" --processes {run.world}" if run.world else ""
        return f"`medfm launch local {folder}/recipe.yaml --run {folder}{many}` {where}"
    return f"start the same command again; it {where}"


def warnings_of(run: Reading, state: str) -> list[str]:
    """What else a person should know."""
    found = []
    going = state in ("running", "still", "starting")
    files = os.statvfs(run.run) if hasattr(os, "statvfs") else None
    if run.free < FULL:
        then = "make room, the run goes on by itself" if going else "make room first"
        found.append(f"the disk of {run.run} is full ({run.free >> 10} KiB free): no saves, no logs; {then}")
    elif files is not None and files.f_files and not files.f_favail:
        found.append(f"the disk of {run.run} takes no more files; delete some")
    found += [f"damaged checkpoint {c.name}: {c.fault}" for c in run.checkpoints if c.fault]
    alive = run.ranks if state in ("running", "still") else []  # before, they are of the last launch
    silent = [rank for rank in alive if run.now - rank.time > SILENT]
    if silent and run.free >= FULL:
        longest = ago(max(run.now - rank.time for rank in silent))
        who = ", ".join(map(name_of, silent[:3])) + (" and others" if len(silent) > 3 else "")
        found.append(f"{who}: no line for {longest}; the disk may be slow or gone")
    return found


def living(run: Reading) -> list[Rank]:
    """Ranks whose process lives: by its number on this host, elsewhere by its last line."""
    here = socket.gethostname()
    return [
        rank
        for rank in run.ranks
        if (state_of(rank.alive) if rank.alive.get("host") == here else run.now - rank.time < SILENT)
    ]


def _lives(launch: Row) -> bool:
    """Whether the launcher of a launch lives; on another host, whether it may."""
    if launch.get("host") != socket.gethostname():
        return time.time() - float(launch.get("end") or launch.get("start") or 0.0) < STARTING
    return bool(state_of(launch))


def state_of(process: Row) -> str:
    """State of a process of this host, given its number `pid` and when it was `born` or, at the latest,
    the `time` at which it lived; "" where it is gone."""
    import psutil

    try:
        found = psutil.Process(int(process["pid"]))
        born = float(process.get("born") or 0.0)
        other = abs(found.create_time() - born) if born else found.create_time() - float(process["time"])
        state = str(found.status())
    except (psutil.Error, KeyError, ValueError):
        return ""
    return "" if other > 2.0 or state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else state


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def ago(seconds: float) -> str:
    """A length of time in two units at most: 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    left = int(max(0.0, seconds))
    words: list[str] = []
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= length or words or unit == "s":
            words.append(f"{left // length} {unit}")
            left %= length
    return " ".join(words[:2])


def name_of(rank: Rank) -> str:
    """A rank with where it runs."""
    return (
        f"rank {rank.rank} ({rank.alive.get('host', 'unknown host')}, process {rank.alive.get('pid', '?')})"
    )
