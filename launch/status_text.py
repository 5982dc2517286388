"""`medfm status` for people."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from launch.run_state import ago
from launch.status import Status, read_status

BARS = "▁▂▃▄▅▆▇█"
TREND = 24  # characters of a trend
FIGURES = (
    ("optim/lr", "learning rate"),
    ("optim/grad_norm", "gradient norm"),
    ("rate/crops_per_s", "crops/s"),
    ("rate/tokens_per_s", "tokens/s"),
    ("rate/mfu", "MFU"),
    ("rate/data_wait", "waiting for data"),
    ("checkpoint/stall_s", "wait for a save, s"),
    ("memory/device_peak_gib", "device memory, peak GiB"),
    ("memory/host_peak_gib", "host memory, peak GiB"),
)
SHARES = ("rate/mfu", "rate/data_wait")
COLOURS = {"running": 32, "finished": 32, "starting": 33, "restarting": 33, "preempted": 33, "new": 33}


def status(args: argparse.Namespace) -> int:
    """Run `medfm status RUN [--json] [--follow]`."""
    run, terminal = Path(args.run_folder), sys.stdout.isatty()
    try:
        while True:
            now = read_status(run)
            if args.json:
                print(json.dumps(asdict(now)), flush=True)
            else:
                clear = "\x1b[H\x1b[2J" if args.follow and terminal else ""
                print(clear + describe(now, colour=terminal), flush=True)
            if not args.follow or now.over:
                return 0
            time.sleep(args.poll)
            if not (args.json or terminal):
                print()
    except KeyboardInterrupt:
        return 0


def describe(status: Status, colour: bool = False) -> str:
    """The status as lines of text."""
    code = COLOURS.get(status.state, 31)
    state = f"\x1b[1;{code}m{status.state}\x1b[0m" if colour else status.state
    lines = [f"{status.run}: {state.replace('_', ' ')}", f"  {status.summary}"]
    lines += [f"  warning: {text}" for text in status.warnings]
    if status.advice:
        lines.append(f"  next: {status.advice}")
    lines += ["", *_progress(status), *_checkpoint(status), *_losses(status), *_figures(status)]
    lines += [*_stragglers(status), *_trouble(status), *_launches(status), *_said(status)]
    return "\n".join(lines).rstrip()


def _progress(status: Status) -> list[str]:
    if not status.update and not status.seconds_per_update:
        return []
    share = f" ({status.update / status.total:.1%})" if status.total else ""
    text = f"  update      {status.update}{f' of {status.total}' if status.total else ''}{share}"
    if status.seconds_per_update:
        text += f", {status.seconds_per_update:.3g} s each"
    if status.left is not None:
        text += f", {ago(status.left)} left"
    rest = [f"launch {status.attempt}"] if status.attempt else []
    if status.world:
        hosts = {row["host"] for row in status.ranks if row.get("host")}
        where = f" on {len(hosts)} hosts" if len(hosts) > 1 else ""
        rest.append(f"{status.world} process{'es' if status.world > 1 else ''}{where}")
    if status.since is not None:
        rest.append(f"last heard of {ago(status.since)} ago")
    return [text, f"  launch      {', '.join(rest).removeprefix('launch ')}"]


def _checkpoint(status: Status) -> list[str]:
    if not status.checkpoint:
        return ["  checkpoint  none"] if status.update else []
    newest = status.checkpoint
    return [f"  checkpoint  {newest['name']}, {ago(newest['age'])} old"]


def _losses(status: Status) -> list[str]:
    if not status.losses:
        return []
    width = max(map(len, status.losses))
    lines = ["  loss"]
    for name, values in status.losses.items():
        if values:
            label = (name.partition("/")[2] or "all").ljust(max(3, width - 5))
            lines.append(f"    {label}  {values[-1]:<10.4g} {trend(values)}  from {values[0]:.4g}")
    return lines


def _figures(status: Status) -> list[str]:
    lines = []
    for name, label in FIGURES:
        if (value := status.figures.get(name)) is not None:
            lines.append(f"    {label:<24} {value:.1%}" if name in SHARES else f"    {label:<24} {value:.4g}")
    if lines:
        lines.insert(0, f"  figures of update {status.figures.get('update')}, means since those before")
    scores = {
        k.removeprefix("evaluate/"): v for k, v in status.evaluation.items() if k.startswith("evaluate/")
    }
    if scores:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(scores.items())[:6])
        more = f" and {len(scores) - 6} more" if len(scores) > 6 else ""
        lines.append(f"  evaluation of update {status.evaluation.get('update')}: {shown}{more}")
    return lines


def _stragglers(status: Status) -> list[str]:
    lines = []
    for row in status.stragglers[:5]:
        why = f", {row['waited']:.3g} s of it waiting for data" if row["waited"] > 0.2 * row["own"] else ""
        lines.append(
            f"    rank {row['rank']} ({row['host']}): {row['own']:.3g} s of its own in an update, others "
            f"{row['usual']:.3g} s{why}"
        )
    if len(status.stragglers) > 5:
        lines.append(f"    and {len(status.stragglers) - 5} more ranks")
    return ["  stragglers, which all others wait for", *lines] if lines else []


def _trouble(status: Status) -> list[str]:
    lines = []
    if status.skipped:
        back = f"; went back {_times(status.rollbacks, 'time')}" if status.rollbacks else ""
        lines.append(f"  skipped     {_times(status.skipped, 'update')}{back}; the last ones:")
    for row in status.bad:
        keys = ", ".join(str(key) for key in (row.get("keys") or [])[:3])
        parts = [f"loss {_figure(row.get('loss'))}, norm {_figure(row.get('norm'))}", row.get("reason")]
        parts.append(f"samples {keys}" if keys else "")
        lines.append(f"    position {row.get('position')}: " + ", ".join(filter(None, parts)))
    return lines


def _launches(status: Status) -> list[str]:
    before = status.launches[:-1]
    lines = ["  launches before"] if before else []
    for row in before[-5:]:
        verdict = row.get("verdict") or {}
        if not verdict:
            lines.append(f"    {row.get('attempt')}: its launcher did not say how it ended")
            continue
        how = str(verdict.get("state", "?")).replace("_", " ")
        if verdict.get("kind") != "unsaved":
            how += f" at update {verdict.get('update', '?')}"
        lasted = ago(float(row.get("end") or 0) - float(row.get("start") or 0))
        text = " ".join(str(verdict.get("message", "")).split())[:90]
        lines.append(f"    {row.get('attempt')}: {how} after {lasted}{': ' + text if text else ''}")
    return lines


def _said(status: Status) -> list[str]:
    return (
        ["  said last", *(f"    {ago(row['age'])} ago: {row['text'][:200]}" for row in status.said)]
        if status.said
        else []
    )


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trend(values: Sequence[float]) -> str:
    """The course of some figures in a few characters; not finite ones are left out."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if len(finite) < 2:
        return ""
    count = min(TREND, len(finite))
    edges = [len(finite) * i // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
