"""How the quickstart ends: figures from the run folders, a table, and a self-contained `report.html`."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:.6rem 0}
td,th{border-bottom:1px solid #d5dbe3;padding:.25rem .8rem;text-align:right}
td:first-child,th:first-child{text-align:left}
img,svg{max-width:100%;border-radius:4px}figure{margin:1rem 0}
figcaption{color:#5b6875;font-size:13px}
code,pre{background:#f2f4f7;border-radius:4px;padding:.1rem .3rem;font-size:13px}
pre{padding:.8rem;overflow-x:auto}
"""


def metrics(run: Path) -> list[dict[str, float]]:
    """Lines of RUN/metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def curves(run: Path, prefix: str) -> dict[str, list[tuple[float, float]]]:
    """name -> [(update, value)] of every metric called `prefix`NAME."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in metrics(run):
        for name, value in line.items():
            if name.startswith(prefix):
                found.setdefault(name[len(prefix) :], []).append((float(line["update"]), float(value)))
    return found


def losses(run: Path) -> dict[str, dict[str, float]]:
    """Training loss by modality: `first` logged, and `last`, the mean of the last eighth of the log."""
    found = {}
    for name, points in curves(run, "loss/").items():
        tail = [value for _, value in points[-max(1, len(points) // 8) :]]
        found[name] = {"first": points[0][1], "last": sum(tail) / len(tail)}
    return found


def held_out(run: Path) -> dict[str, dict[str, float]]:
    """Last held-out loss by modality beside the two trivial predictors: `loss`, `mean`, `interpolation`."""
    scores = {name: points[-1][1] for name, points in curves(run, "evaluate/val/").items()}
    found: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        modality, _, kind = name.partition("_")
        if "@" not in name and kind in ("", "mean", "interpolation"):
            found.setdefault(modality, {})[kind or "loss"] = value
    return found


def figure_of(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def print_table(summary: Mapping[str, Any], folder: Path, console: Any) -> None:
    """The figures on the console."""
    from rich.table import Table

    console.rule("result", align="left")
    table = Table(
        "masked autoencoding",
        "first",
        "last",
        "held out",
        "visible mean",
        "interpolation",
        title="loss by modality",
    )
    for name, row in loss_rows(summary):
        table.add_row(name, *row)
    console.print(table)
    if summary["dice"]:
        table = Table(
            "Dice, held-out subjects",
            *(f"{n} click{'s' * (n > 1)}" for n in (1, 3, 5)),
            title="segmentation from clicks",
        )
        for name, row in dice_rows(summary):
            table.add_row(name, *row)
        console.print(table)
    table = Table("stage", "seconds", title="time")
    for name, seconds in summary["stages"].items():
        table.add_row(name, f"{seconds:.0f}")
    table.add_row("all", f"{summary['seconds']:.0f}")
    console.print(table)
    if summary.get("left_out"):
        console.print(summary["left_out"])
    console.print(f"export loaded again: largest difference {summary['export_max_difference']:.3g}")
    console.print(f"report: {folder / 'report.html'}   figures: {folder / 'summary.json'}", soft_wrap=True)


def loss_rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(modality, first, last, held out, and the two trivial predictors) as text."""
    rows = []
    for name, loss in summary["loss"].items():
        held = summary["held_out"].get(name, {})
        values = [loss["first"], loss["last"], held.get("loss"), held.get("mean"), held.get("interpolation")]
        rows.append((name, [figure_of(value) for value in values]))
    return rows


def dice_rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Both models over all objects, then by object."""
    names = {"pretrained": "pretrained encoder", "scratch": "from scratch"}
    rows = [(names[key], [figure_of(value) for value in summary["dice"][key].values()]) for key in names]
    for label in summary["dice_by_object"]["pretrained"]:
        for key, title in names.items():
            values = summary["dice_by_object"][key].get(label, {})
            rows.append((f"{label}, {title}", [figure_of(value) for value in values.values()]))
    return rows


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, x_name: str = "update"
) -> str:
    """An inline SVG of several curves, y from 0."""
    width, height, left, bottom = 640, 260, 52, 34
    points = [point for curve in series.values() for point in curve]
    if not points:
        return "<p>nothing was logged</p>"
    x_most, y_most = max(x for x, _ in points) or 1.0, max(y for _, y in points) * 1.05 or 1.0

    def place(x: float, y: float) -> str:
        across = left + (width - left - 12) * x / x_most
        return f"{across:.1f},{height - bottom - (height - bottom - 26) * y / y_most:.1f}"

    name = html.escape(title)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">']
    parts.append(f'<text x="{left}" y="16" font-size="13" font-weight="600">{name}</text>')
    for step in range(5):
        value = y_most * step / 4
        y = float(place(0, value).split(",")[1])
        parts.append(f'<line x1="{left}" x2="{width - 12}" y1="{y}" y2="{y}" stroke="#e3e8ee"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" font-size="11" text-anchor="end">{value:.2g}</text>')
    for number, (name, curve) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = f'x="{width - 16}" y="{34 + 16 * number}"'
        parts.append(
            f'<text {at} font-size="12" fill="{colour}" text-anchor="end">{html.escape(name)}</text>'
        )
    at, text = f'x="{width / 2}" y="{height - 6}"', f"{x_name} (last: {x_most:.0f})"
    parts.append(f'<text {at} font-size="11" text-anchor="middle">{text}</text>')
    return "".join([*parts, "</svg>"])


def write_report(folder: Path, summary: Mapping[str, Any]) -> Path:
    """`folder`/report.html: tables, loss curves, reconstructions and segmentations, all inside one file."""
    body = ["<h1>medfm quickstart</h1>"]
    body.append(
        f"<p>{summary['seconds']:.0f} s in all. Small networks trained for minutes: this shows that the "
        "parts work together, not what they can reach.</p>"
    )
    body.append("<h2>Masked autoencoding</h2>")
    head = (
        "modality",
        "first",
        "last",
        "held out",
        "mean of visible voxels",
        "interpolation of visible patches",
    )
    body.append(html_table(head, loss_rows(summary)))
    body.append(
        "<p>Squared error of normalised voxels. The last two columns are predictors without parameters, on "
        "the same masks as <i>held out</i>: a network above them has learnt nothing yet.</p>"
    )
    body.append(line_chart(curves(folder / "pretrain", "loss/"), "training loss by modality"))
    pictures = newest_pictures(folder / "pretrain" / "pictures")
    body += [
        image(path, f"{path.stem}: what the network saw, what it drew, what was there") for path in pictures
    ]
    if summary["dice"]:
        body.append("<h2>Segmentation from clicks</h2>")
        body.append(
            html_table(("Dice, held-out subjects", "1 click", "3 clicks", "5 clicks"), dice_rows(summary))
        )
        none, wrong = summary["dice_no_prompt"]["pretrained"], summary["dice_wrong_prompt"]["pretrained"]
        body.append(
            f"<p>Controls, pretrained: no prompt {figure_of(none)}, another object's click "
            f"{figure_of(wrong)}. Each click is placed at the centre of the largest error.</p>"
        )
        for one in summary["segment"]:
            caption = (
                f"{html.escape(one['case'])}, Dice {figure_of(one['dice'])}: label (green), mask of "
                "<code>medfm segment</code> (red), clicks (+); a pale click lies in another slice"
            )
            body.append(image(folder / "segment" / f"{one['case']}.png", caption))
        series = {
            name: curves(folder / f"finetune-{name}", "loss").get("", [])
            for name in ("pretrained", "scratch")
        }
        body.append(line_chart(series, "fine-tuning loss"))
    else:
        body.append(f"<p>{html.escape(str(summary.get('left_out')))}</p>")
    body.append("<h2>Export</h2>")
    difference = f"{summary['export_max_difference']:.3g}"
    body.append(f"<p>Loaded again and run beside the source: largest difference {difference}.</p>")
    body.append("<h2>Time</h2>")
    body.append(
        html_table(("stage", "seconds"), [(name, [f"{s:.0f}"]) for name, s in summary["stages"].items()])
    )
    body.append("<h2>Commands</h2><pre>" + html.escape("\n".join(summary["commands"])) + "</pre>")
    page = '<!doctype html><html lang="en"><meta charset="utf-8"><title>medfm quickstart</title>'
    page += f"<style>{_STYLE}</style>"
    path = folder / "report.html"
    path.write_text(page + "\n".join(body) + "</html>\n", encoding="utf-8")
    return path


def newest_pictures(folder: Path) -> list[Path]:
    """Pictures of the last update that has any."""
    found = sorted(folder.glob("update-*.png"))
    last = found[-1].name.split("-")[1] if found else ""
    return [path for path in found if path.name.split("-")[1] == last]


def image(path: Path, caption: str) -> str:
    """A picture inside the page; `caption` is HTML."""
    if not path.is_file():
        return f"<p>missing picture {html.escape(path.name)}</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{caption}</figcaption></figure>'
    )


def html_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table; the first column is text, the others figures."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for name, values in rows:
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in (name, *values))
        lines.append(f"<tr>{cells}</tr>")
    return "".join([*lines, "</table>"])
