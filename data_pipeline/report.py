"""`report.html`: what is in a dataset, as pictures, histograms and tables, in one file that loads nothing."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.errors import REASONS
from data_pipeline.inspect import plane_picture
from data_pipeline.manifest import Manifest
from data_pipeline.pictures import png, side_by_side
from data_pipeline.storage import ShardReader, invalid_of

PER_MODALITY = 12
SIDE = 160
BINS = 64
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
th { border-bottom: 1px solid; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; display: block; background: #000; } figure { margin: .6rem 0 1.4rem; }
figcaption, .note { opacity: .75; } svg { width: 100%; height: 9rem; }
"""


def report_html(
    manifest: Manifest, refused: Sequence[Mapping[str, str]], left_out: Sequence[Mapping[str, str]]
) -> str:
    """The page for a dataset whose shards are written; the same dataset gives the same text.

    `refused` and `left_out` are the entries of `quarantine.jsonl` and `duplicates.jsonl`.
    """
    reader = ShardReader(manifest.root, manifest)
    info = manifest.info
    parts = [
        f"<h1>{len(manifest)} samples in {len(info['shards'])} shards</h1>",
        "<p class=note>These pictures are patient images: share them as you would the scans.</p>",
        _table(("split, modality, geometry", "samples"), sorted(info["counts"]["by"].items())),
        "<h2>Sources</h2>",
        _sources(manifest),
    ]
    parts += [_modality(manifest, reader, str(m)) for m in sorted(set(manifest.column("modality")))]
    parts += ["<h2>Labels</h2>", _labels(manifest), "<h2>Refused inputs</h2>", _quarantine(refused)]
    parts += ["<h2>Copies left out</h2>", _copies(left_out)]
    done = [(name, count) for name, count in sorted(info["counts"]["notes"].items()) if count]
    parts += ["<h2>What the build did that you should know of</h2>", _table(("what", "count"), done)]
    reader.close()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>medfm dataset</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _sources(manifest: Manifest) -> str:
    counts = Counter(manifest.column("source"))
    subjects = {name: len(set(manifest.column("subject")[manifest.select(source=name)])) for name in counts}
    rows = [
        (
            s["name"],
            counts[s["name"]],
            subjects.get(s["name"], 0),
            s["label_origin"],
            s["licence"],
            s["attribution"],
        )
        for s in manifest.info["sources"]
    ]
    return _table(("source", "samples", "subjects", "label origin", "licence", "attribution"), rows)


def _modality(manifest: Manifest, reader: ShardReader, modality: str) -> str:
    """A sheet of middle slices spread over the samples, and a histogram of their normalised values."""
    rows = manifest.select(modality=modality)
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(PER_MODALITY, len(rows))).astype(int))]
    pictures = []
    counts = np.zeros(BINS)
    for row in chosen.tolist():
        values = manifest.row(row)
        axis = values["axes"][0]
        pictures.append(plane_picture(reader, values, row, axis, values["shape"][1 + axis] // 2, SIDE))
        counts += _histogram(reader, values, row)
    sheet = base64.b64encode(png(side_by_side(pictures, 6))).decode()
    bars = "".join(
        f'<rect x="{n}" y="{100 - h:.2f}" width=".9" height="{h:.2f}" fill="currentColor"/>'
        for n, h in enumerate(counts / max(counts[1:-1].max(initial=0), counts.max() * 0.02, 1e-9) * 95)
    ).replace('y="-', 'y="0" data-cut="-')
    spacing = manifest.column("spacing")[rows]
    low, high = spacing.min(axis=0), spacing.max(axis=0)
    spread = " × ".join(f"{a:.2g}–{b:.2g}" for a, b in zip(low, high))
    return (
        f"<h2>{html.escape(modality)}: {len(rows)} samples</h2>"
        f"<figure><img alt='middle slices' src='data:image/png;base64,{sheet}'>"
        f"<figcaption>{len(chosen)} middle slices; spacing {spread} mm (z, y, x)</figcaption></figure>"
        f'<figure><svg viewBox="0 0 {BINS} 100" preserveAspectRatio="none">{bars}</svg>'
        f"<figcaption>values of these slices between the clip limits, the end bars cut</figcaption></figure>"
    )


def _histogram(reader: ShardReader, values: dict[str, Any], row: int) -> np.ndarray:
    """Shares of the middle slice's valid voxels in `BINS` bins between the clip limits."""
    axis = values["axes"][0]
    shape = values["shape"][1:]
    origin, extent = [0, 0, 0], list(shape)
    origin[axis], extent[axis] = shape[axis] // 2, 1
    plane = reader.read_box(row, "image", 0, origin, extent)
    slope, intercept, low, high, *_ = values["norm"][0]
    real = np.clip(plane[~invalid_of(plane)] * slope + intercept, low, high)
    if not real.size:
        return np.zeros(BINS)
    return np.histogram(real, BINS, (low, high))[0] / real.size


def _labels(manifest: Manifest) -> str:
    present = Counter(name for names in manifest.column("classes") for name in names)
    annotated = Counter(name for names in manifest.column("annotated") for name in names)
    rows = [(i, name, annotated[name], present[name]) for i, name in manifest.info["labels"].items()]
    return _table(("id", "name", "samples looked at", "samples with it"), rows)


def _quarantine(entries: Sequence[Mapping[str, str]]) -> str:
    counts = Counter((e["source"], e["what"], e["code"]) for e in entries)
    rows = [
        (source, what, code, REASONS.get(code, ""), n) for (source, what, code), n in sorted(counts.items())
    ]
    return _table(("source", "what", "code", "reason", "count"), rows) + _details(
        "which", ("input", "source", "what", "code", "detail"), entries
    )


def _copies(entries: Sequence[Mapping[str, str]]) -> str:
    counts = sorted(Counter(e["label"] for e in entries).items())
    return _table(("label of the copy", "count"), counts) + _details(
        "which", ("kept", "left_out", "label"), entries
    )


def _details(title: str, names: Sequence[str], entries: Sequence[Mapping[str, str]]) -> str:
    """A folded table of the first thousand entries."""
    if not entries:
        return ""
    rows = sorted(tuple(e.get(name, "") for name in names) for e in entries)[:1000]
    return f"<details><summary>{title} (by keyed hash)</summary>{_table(names, rows)}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "<p>None.</p>"
    titles = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if isinstance(v, int) else ''}>{html.escape(str(v))}</td>" for v in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{titles}</tr>{body}</table>"
