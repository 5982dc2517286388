"""Outcomes of every case to a complete dataset: copies joined, subjects split, shards written, all described.

Nothing here depends on how many workers read the cases, in which order, in how many parts, or how often the
build was cut off. `dataset.json` is written last: without it there is no dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.duplicates import Owned, merge_duplicates
from data_pipeline.earlier import Earlier, Known
from data_pipeline.errors import UserError
from data_pipeline.journal import Journal, Outcome, write_whole
from data_pipeline.manifest import FORMAT_VERSION, Manifest, manifest_bytes
from data_pipeline.place import PARTIAL, Place
from data_pipeline.report import report_html
from data_pipeline.sample import SENTENCES
from data_pipeline.shard_writer import SHARD_NAME, ShardPlan, Staged, Written, plan_shards, write_shard
from data_pipeline.splits import Member, assign_subjects, check_leaks
from data_pipeline.workers import Pool

SHARD_BYTES = 1 << 30
POOL_BYTES = 1 << 29  # below this, importing webdataset in every worker takes longer than writing the shards


@dataclass
class BuildReport:
    """What a build did. `text()` is for people; the counts are in `dataset.json` too."""

    out: Path | str
    private: Path
    samples: int = 0
    shards: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)  # by "split modality geometry"
    quarantined: dict[str, int] = field(default_factory=dict)  # by reason code
    notes: dict[str, int] = field(default_factory=dict)  # things done that a person should know of
    sizes: list[str] = field(default_factory=list)  # a line for each modality
    read: int = 0  # cases that were new, changed or unfinished
    part: tuple[int, int] | None = None  # of so many, read but not yet merged

    def text(self) -> str:
        """A few lines for the console."""
        if self.part is not None:
            refused = sum(self.quarantined.values())
            return (
                f"part {self.part[0]} of {self.part[1]}: {self.read} cases read, {self.samples} samples, "
                f"{refused} refused, {self.seconds:.1f} s; when every part is read: "
                f"medfm shards merge --out {self.out}"
            )
        lines = [f"{self.samples} samples in {self.shards} shards, {self.seconds:.1f} s: {self.out}"]
        lines += [f"  {name}: {count}" for name, count in sorted(self.counts.items())]
        lines += [f"  {line}" for line in self.sizes]
        lines += [f"  refused, {code}: {count}" for code, count in sorted(self.quarantined.items())]
        lines += [f"  {name}: {count}" for name, count in sorted(self.notes.items()) if count]
        return "\n".join([*lines, f"  which input is which: {self.private / 'index.jsonl'}"])


def complete(
    outcomes: Sequence[Outcome],
    known: Mapping[str, Known],
    earlier: Earlier,
    journal: Journal,
    out: Place,
    private: Path,
    about: Mapping[str, Any],
    pool: Pool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Write the dataset of `outcomes` (cases read) and `known` ones (of the dataset that is there).

    `about` is what `Journal.about` gives: options, sources, label ids. `progress(done, total)` is called in
    shards. Raises `UserError` where nothing could be used or a subject would be in two splits.
    """
    options, ids = about["options"], about["ids"]
    scratch = journal.folder / "joined"
    scratch.mkdir(exist_ok=True, mode=0o700)
    outcomes = sorted(outcomes, key=lambda o: o.number)
    merged = merge_duplicates([(o, s) for o in outcomes for s in o.samples], ids, scratch)
    owned = merged.samples + [
        (case.outcome, earlier.sample(key)) for case in known.values() for key in case.keys
    ]
    samples, notes = _split(owned, outcomes, known, earlier, about)
    check_leaks(sample.row for sample in samples)
    everything = [*outcomes, *(case.outcome for case in known.values())]
    if not samples:
        counts = dict(Counter(r.code for o in everything for r in o.refusals))
        if earlier:
            raise UserError(f"no sample would be left in {out}: {counts}; delete it if that is what is meant")
        raise UserError(f"no input could be used: {counts}; {_index(private, everything, known)} says why")

    stays, to_write = earlier.staying(samples)
    old = {entry["name"]: entry for entry in earlier.info.get("shards", ())}
    plans = plan_shards(to_write, options["shard_samples"], SHARD_BYTES, list(old))
    out.create()
    written = _write(plans, out, journal, pool, progress)
    rows = stays + [row for shard in written for row in shard.rows]
    entries = [old[name] for name in sorted({row["shard"] for row in stays})] + [w.entry for w in written]
    for entry in entries:
        if out.size(entry["name"]) != entry["size"]:
            raise UserError(
                f"{out}/{entry['name']} is missing or cut short; restore it, or build into another --out"
            )

    inputs = {o.input for o in outcomes}
    left_out = merged.left_out + [
        e for e in earlier.left_out if e["kept"] not in inputs and e["left_out"] not in inputs
    ]
    report = BuildReport(out.root, private, len(rows), len(entries), read=len(outcomes))
    report.counts = dict(Counter(f"{r['split']} {r['modality']} {r['geometry']}" for r in rows))
    report.quarantined = dict(Counter(r.code for o in everything for r in o.refusals))
    report.notes = {**about["left_out"], **_notes(rows, everything, left_out), **notes}
    report.sizes = _sizes(rows)
    files = _describe(out, rows, entries, everything, left_out, report, about)
    _index(
        private, everything, known, {row["key"] for row in rows}
    )  # a dataset without it cannot be added to
    for name, data in files.items():
        out.write(name, data)
    planned = {entry["name"] for entry in entries}
    for name in out.names():  # shards of an earlier state, and what a killed build left half-written
        if (SHARD_NAME.fullmatch(name) and name not in planned) or (
            name[0] == "." and name.endswith(PARTIAL)
        ):
            out.remove(name)
    return report


def _split(
    owned: Sequence[Owned],
    outcomes: Sequence[Outcome],
    known: Mapping[str, Known],
    earlier: Earlier,
    about: Mapping[str, Any],
) -> tuple[list[Staged], dict[str, int]]:
    """Give samples their split and joint subject. Copies that are left out count as their owners' too."""
    before = {
        entry["key"]: earlier.rows[key]["split"]
        for entry in earlier.index.values()
        for key in entry["keys"]
        if key in earlier.rows
    }
    hashes: dict[str, tuple[str, ...]] = {
        o.key: tuple(h for s in o.samples for h in (s.row["content_hash"], s.values_hash)) for o in outcomes
    } | {key: tuple(h for pair in case.hashes for h in pair) for key, case in known.items()}
    cases = [o for o in outcomes if o.samples] + [case.outcome for case in known.values() if case.hashes]
    members = [
        Member((o.source, o.subject), o.subject_hash, hashes[o.key], o.split, before.get(o.key))
        for o in cases
    ]
    options = about["options"]
    default = options["split"]
    fractions = {source["name"]: source.get("split") or default for source in about["sources"]}
    placed, notes = assign_subjects(members, fractions, options["seed"], on_leak=options["on_leak"])
    place_of = {o.key: place for o, place in zip(cases, placed)}
    samples = []
    for owner, sample in owned:
        split, subject = place_of[owner.key]
        row = {**sample.row, "split": split, "subject": subject}
        samples.append(Staged(row, sample.description, sample.frames, sample.values_hash))
    return samples, notes


def _write(
    plans: Sequence[ShardPlan],
    out: Place,
    journal: Journal,
    pool: Pool,
    progress: Callable[[int, int], None],
) -> list[Written]:
    """Write the shards that an interrupted call of the same build has not written yet."""
    folder = journal.folder / "shards"
    found: dict[str, Written] = {}
    for plan in plans:
        marker = folder / f"{plan.name}.json"
        if marker.is_file():
            noted = json.loads(marker.read_text())
            if noted["digest"] == plan.digest() and out.size(plan.name) == noted["entry"]["size"]:
                found[plan.name] = Written(noted["entry"], noted["rows"])
    todo = [plan for plan in plans if plan.name not in found]
    if sum(sample.size for plan in todo for sample in plan.samples) < POOL_BYTES:
        pool = Pool()
    progress(len(found), len(plans))
    for number, shard in pool.stream(write_shard, [(plan, out, folder) for plan in todo]):
        if not isinstance(shard, Written):
            raise UserError(
                f"writing {todo[number].name} ended its worker {shard.times} times, most likely for memory; "
                "start the same build again with fewer workers or fewer --shard-samples"
            )
        plan = todo[number]
        noted = {"digest": plan.digest(), "entry": shard.entry, "rows": shard.rows}
        write_whole(folder / f"{plan.name}.json", json.dumps(noted).encode())
        found[plan.name] = shard
        progress(len(found), len(plans))
    return [found[plan.name] for plan in plans]


def _describe(
    out: Place,
    rows: Sequence[dict[str, Any]],
    entries: Sequence[dict[str, Any]],
    outcomes: Sequence[Outcome],
    left_out: Sequence[dict[str, str]],
    report: BuildReport,
    about: Mapping[str, Any],
) -> dict[str, bytes]:
    """Manifest, quarantine, duplicates, report; last `dataset.json`, which names the hash of each."""
    refused = [
        {"input": o.input, "source": o.source, "what": r.what, "code": r.code}
        | ({"detail": r.detail} if r.detail else {})
        for o in outcomes
        for r in o.refusals
    ]
    files = {
        "manifest.parquet": manifest_bytes(rows),
        "quarantine.jsonl": _lines(refused),
        "duplicates.jsonl": _lines(left_out),
    }
    info: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "labels": {str(i): name for name, i in about["ids"].items()},
        "counts": {
            "samples": len(rows),
            "by": report.counts,
            "refused": report.quarantined,
            "notes": report.notes,
        },
        "built_with": {"medfm": installed("medfm"), "blosc2": installed("blosc2"), **about["options"]},
        "hash_key": about["hash_key"],
        "sources": about["stated"],
        "shards": sorted(entries, key=lambda e: str(e["name"])),
        "manifest_sha256": hashlib.sha256(files["manifest.parquet"]).hexdigest(),
    }
    manifest = Manifest.of(out.root, files["manifest.parquet"], info)
    files["report.html"] = report_html(manifest, refused, left_out).encode()
    info["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {**files, "dataset.json": dataset_json(info)}


def dataset_json(info: Mapping[str, Any]) -> bytes:
    """`dataset.json` with the sha256 of its own text, taken with `check` empty."""
    text = json.dumps({**info, "check": ""}, indent=1, sort_keys=True)
    check = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**info, "check": check}, indent=1, sort_keys=True) + "\n").encode()


def _index(
    private: Path,
    outcomes: Sequence[Outcome],
    known: Mapping[str, Known],
    written: Iterable[str] = (),
) -> Path:
    """The way back from hashes to files, one JSON line a case; also what the next build compares with."""
    places = set(written)
    lines = []
    for outcome in sorted(outcomes, key=lambda o: o.number):
        if outcome.key in known:
            hashes: Sequence[tuple[str, str]] = known[outcome.key].hashes
            keys = [k for k in known[outcome.key].keys if k in places]
        else:
            hashes = [(s.row["content_hash"], s.values_hash) for s in outcome.samples]
            keys = [s.row["key"] for s in outcome.samples if s.row["key"] in places]
        entry = {
            "key": outcome.key,
            "keys": keys,
            "input": outcome.input,
            "subject_hash": outcome.subject_hash,
            "source": outcome.source,
            "subject": outcome.subject,
            "split": outcome.split,
            "paths": list(outcome.paths),
            "label": outcome.label,
            "refused": [r.message for r in outcome.refusals],
            "refusals": [asdict(r) for r in outcome.refusals],
            "notes": dict(outcome.notes),
            "fingerprint": outcome.fingerprint,
            "hashes": [list(pair) for pair in hashes],
        }
        lines.append(json.dumps(entry))
    path = private / "index.jsonl"
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def _lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(f"{line}\n" for line in sorted(json.dumps(e, sort_keys=True) for e in entries)).encode()


def _notes(
    rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome], left_out: Sequence[Mapping[str, str]]
) -> dict[str, int]:
    done: Counter[str] = Counter()
    for outcome in outcomes:
        done.update(outcome.notes)
    labels = Counter(entry["label"] for entry in left_out)
    return {
        **{SENTENCES.get(name, name): count for name, count in sorted(done.items())},
        "duplicates left out": len(left_out),
        "labels added from duplicates": labels["added"],
        "label conflicts between duplicates": labels["conflict"],
        "spacing assumed from a field width": sum(r["spacing_source"] == "assumed" for r in rows),
        "spacing declared, not in the header": sum(r["spacing_source"] == "declared" for r in rows),
        "stored with an error (max_error in the manifest)": sum(r["max_error"] > 0 for r in rows),
        "stored as float32": sum(r["dtype"] == "float32" for r in rows),
        "labelled": sum(r["seg_size"] > 0 for r in rows),
    }


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each modality: samples, medians of size and spacing with their ranges."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["modality"]].append(row)
    lines = []
    for modality, members in sorted(groups.items()):
        shapes = [sorted(r["shape"][1 + axis] for r in members) for axis in range(3)]
        spacings = [sorted(r["spacing"][axis] for r in members) for axis in range(3)]
        middle = len(members) // 2
        size = " × ".join(str(s[middle]) for s in shapes)
        mm = " × ".join(f"{s[middle]:.3g}" for s in spacings)
        span = " × ".join(f"{s[0]:.3g}–{s[-1]:.3g}" for s in spacings)
        lines.append(
            f"{modality}: {len(members)} samples, median {size} voxels of {mm} mm ({span}), z × y × x"
        )
    return lines


def installed(package: str) -> str:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
