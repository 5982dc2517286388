"""Raw scans to a shard dataset: read in parallel, join duplicates and subjects, split, write shards.

The result depends on the sources, the settings and the hash key alone, not on the number of workers. It is
built in `OUT.partial` and renamed when complete; a build that died is started again from nothing by the same
call.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.duplicates import Merged, merge_duplicates
from data_pipeline.errors import UserError
from data_pipeline.layouts import Case, discover, relative
from data_pipeline.manifest import FORMAT_VERSION, write_manifest
from data_pipeline.privacy import KeyedHash
from data_pipeline.report import write_report
from data_pipeline.sample import Job, Outcome, Settings, prepare
from data_pipeline.shard_writer import Staged, plan_shards, write_shard
from data_pipeline.sources import SourceConfig
from data_pipeline.splits import FRACTIONS, Groups, assign, check_fractions, strictest
from data_pipeline.workers import workers as processes

LEVEL_MIN_VOXELS = 2 * 64**3
SHARD_BYTES = 1 << 30
POOL_BYTES = 1 << 28  # below this, starting processes to write takes longer than writing
STATED = ("name", "licence", "attribution", "label_origin", "burned_in")  # of a source, into dataset.json
HEADERLESS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass
class BuildReport:
    """What a build did. `text()` is for people; the counts are in `dataset.json` too."""

    out: Path
    private: Path
    samples: int = 0
    shards: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)  # by "split modality geometry"
    quarantined: dict[str, int] = field(default_factory=dict)  # by reason code
    notes: dict[str, int] = field(default_factory=dict)  # things done that a person should know of

    def text(self) -> str:
        """A few lines for the console."""
        lines = [f"{self.samples} samples in {self.shards} shards, {self.seconds:.1f} s: {self.out}"]
        lines += [f"  {name}: {count}" for name, count in sorted(self.counts.items())]
        lines += [f"  refused, {code}: {count}" for code, count in sorted(self.quarantined.items())]
        lines += [f"  {name}: {count}" for name, count in sorted(self.notes.items()) if count]
        return "\n".join([*lines, f"  which input is which: {self.private / 'index.jsonl'}"])


def build(
    sources: Sequence[SourceConfig],
    out: Path,
    private: Path | None = None,
    *,
    workers: int = 1,
    exact: bool = False,
    seed: int = 0,
    split: Mapping[str, float] | None = None,
    shard_samples: int = 64,
    level_min_voxels: int = LEVEL_MIN_VOXELS,
    progress: bool = True,
) -> BuildReport:
    """Build the dataset `out` (a folder that must not exist) from `sources`.

    `private` (default: OUT-private) receives the hash key and the list of inputs by path with what became of
    each; keep it apart from the dataset. `split` maps names to fractions of subjects; `exact` stores float32
    where 16 bits would lose anything. Volumes above `level_min_voxels` get reduced levels. Raises `UserError`
    before anything is written where a declaration is missing; an input that cannot be trusted is quarantined
    and counted, not raised.
    """
    started = time.monotonic()
    out = Path(os.path.abspath(out))
    private = Path(os.path.abspath(private)) if private is not None else out.with_name(out.name + "-private")
    fractions = dict(split) if split is not None else dict(FRACTIONS)
    check_fractions(fractions)
    _check_names(sources)
    _check_folders(out, private)
    cases = [(source, case) for source in sources for case in discover(source)]
    _check_burned_in(cases)
    ids = label_ids(case for _, case in cases)
    hashes = KeyedHash.open(private)
    jobs = _jobs(cases, hashes)
    with _fresh_folder(out.with_name(out.name + ".partial")) as partial:
        staging = partial / "staging"
        staging.mkdir()
        settings = Settings(staging, ids, exact, seed, level_min_voxels)
        with processes(workers, progress=progress) as each:
            outcomes = each("reading", prepare, [(job, settings) for job in jobs])
        _check_undecided(outcomes, jobs)
        staged = [(jobs[o.number], sample) for o in outcomes for sample in o.samples]
        merged = merge_duplicates(staged, ids)
        samples, split_notes = _assign_splits(merged, fractions, seed)
        plans = plan_shards(samples, shard_samples, SHARD_BYTES)
        small = sum(sample.size for sample in samples) < POOL_BYTES
        with processes(1 if small else workers, progress=progress) as each:
            written = each("writing", write_shard, [(plan, partial) for plan in plans])
        shutil.rmtree(staging)
        rows = [row for _, part in written for row in part]
        _write_private(private, outcomes, jobs, rows)
        report = BuildReport(out, private, len(rows), len(plans))
        report.counts = dict(Counter(f"{r['split']} {r['modality']} {r['geometry']}" for r in rows))
        report.quarantined = dict(Counter(r.code for o in outcomes for r in o.refusals))
        report.notes = {**_notes(rows, samples), **merged.notes, **split_notes}
        if not rows:
            raise UserError(
                f"no input could be used: {report.quarantined}; {private / 'index.jsonl'} says why"
            )
        _write_quarantine(partial / "quarantine.jsonl", outcomes, jobs)
        options = {"seed": seed, "split": fractions, "exact": exact, "shard_samples": shard_samples}
        info = {
            "format_version": FORMAT_VERSION,
            "labels": {str(i): name for name, i in ids.items()},
            "counts": {
                "samples": len(rows),
                "by": report.counts,
                "refused": report.quarantined,
                "notes": report.notes,
            },
            "built_with": {
                "medfm": _version("medfm"),
                "blosc2": _version("blosc2"),
                "level_min_voxels": level_min_voxels,
                **options,
            },
            "sources": [s.model_dump(mode="json", include=set(STATED)) for s in sources],
            "shards": [entry for entry, _ in written],
            "manifest_sha256": write_manifest(rows, partial / "manifest.parquet"),
        }
        (partial / "dataset.json").write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
        write_report(partial)
        os.replace(partial, out)
    report.seconds = time.monotonic() - started
    return report


def build_from_recipe(
    recipe: Path | Sequence[Path],
    out: Path,
    private: Path | None = None,
    *,
    root: Path | None = None,
    workers: int = 1,
    progress: bool = True,
    **changes: Any,
) -> BuildReport:
    """Build from a YAML recipe (see `build_recipe.BuildRecipe`), or from folders of scans as they are.

    `root` replaces the recipe's own: paths in it are relative to that folder. `changes` replace other fields
    of the recipe (seed, exact, split, shard_samples, level_min_voxels, modality, burned_in for sources that
    state none).
    """
    from data_pipeline.build_recipe import read_recipe

    plan = read_recipe(recipe, root, changes)
    options = plan.model_dump(include={"exact", "seed", "split", "shard_samples", "level_min_voxels"})
    return build(plan.sources, out, private, workers=workers, progress=progress, **options)


def label_ids(cases: Iterable[Case]) -> dict[str, int]:
    """Dataset-wide ids, from 1, of every label name, in order of first appearance.

    Sources join by name. Names that differ only in case or punctuation are an error, to be answered in the
    recipe by `labels`.
    """
    ids: dict[str, int] = {}
    written: dict[str, tuple[str, str]] = {}
    for case in cases:
        for name in case.label_regions or ():
            plain = "".join(c for c in name.lower() if c.isalnum()) or name
            other, source = written.setdefault(plain, (name, case.source))
            if other != name:
                raise UserError(
                    f"label names {other!r} (source {source!r}) and {name!r} ({case.source!r}) look alike; "
                    "write them alike with labels: {value: name} in the recipe"
                )
            ids.setdefault(name, len(ids) + 1)
    if len(ids) > 254:
        raise UserError(
            f"{len(ids)} label names; a dataset holds at most 254, so build two or leave some sources out"
        )
    return ids


def _check_names(sources: Sequence[SourceConfig]) -> None:
    names = Counter(s.name for s in sources)
    if not sources:
        raise UserError("no sources given; name at least one folder of scans")
    if twice := [n for n, count in names.items() if count > 1]:
        raise UserError(f"two sources are called {twice[0]!r}; give each its own name")


def _check_folders(out: Path, private: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out or remove it")
    if private == out or private.is_relative_to(out):
        raise UserError(f"the private folder {private} must lie outside the dataset {out}")
    if out.is_dir():
        out.rmdir()


def _check_burned_in(cases: Sequence[tuple[SourceConfig, Case]]) -> None:
    """Stop before reading where radiographs without a header may have text burned in and nobody decided."""
    for source, _ in cases:
        if source.burned_in == "mask":
            raise UserError(
                f"source {source.name!r}: burned_in: mask is not available yet; use burned_in: quarantine, "
                "or accept after looking at the pictures"
            )
    open_cases = Counter(
        source.name
        for source, case in cases
        if source.burned_in is None
        and "XR" in case.modality
        and case.series is None
        and case.images[0].name.lower().endswith(HEADERLESS)
    )
    if open_cases:
        _burned_in_error(open_cases)


def _check_undecided(outcomes: Sequence[Outcome], jobs: Sequence[Job]) -> None:
    """The same for formats whose header had to be read first."""
    found = Counter(
        jobs[o.number].source.name
        for o in outcomes
        for r in o.refusals
        if r.code == "burned_in" and r.detail == "undecided"
    )
    if found:
        _burned_in_error(found)


def _burned_in_error(counts: Mapping[str, int]) -> None:
    listed = ", ".join(f"{count} in source {name!r}" for name, count in counts.items())
    raise UserError(
        f"{sum(counts.values())} radiographs ({listed}) do not say that no text is burned in; "
        "look at them and state burned_in: accept or quarantine"
    )


def _jobs(cases: Sequence[tuple[SourceConfig, Case]], hashes: KeyedHash) -> list[Job]:
    jobs = []
    seen: dict[str, Path] = {}
    for number, (source, case) in enumerate(cases):
        identity = "\0".join(
            [source.name, case.subject, relative(case.images[0], source.path), case.series or ""]
        )
        key = hashes.of("case", identity)[:16]
        if key in seen:
            raise UserError(f"{case.images[0]} is listed twice in source {source.name!r}; remove one entry")
        seen[key] = case.images[0]
        subject = hashes.subject(source.name, case.subject)[:16]
        jobs.append(Job(number, case, source, key, hashes.path(case.images[0]), subject))
    return jobs


def _assign_splits(
    merged: Merged, fractions: Mapping[str, float], seed: int
) -> tuple[list[Staged], dict[str, int]]:
    """Give samples their split and joint subject. Subjects of duplicates are one; stated splits win."""
    groups: Groups = Groups()
    subject_of: dict[tuple[str, str], str] = {}
    stated: dict[Any, set[str]] = defaultdict(set)
    for together in merged.together:
        names = [(job.source.name, job.case.subject) for job in together]
        groups.join(names)
        for name, job in zip(names, together):
            subject_of[name] = job.subject
    every = [job for together in merged.together for job in together]
    for job in every:
        if job.case.split is not None:
            stated[groups.find((job.source.name, job.case.subject))].add(job.case.split)
    chosen: dict[Any, str] = {root: strictest(splits) for root, splits in stated.items()}
    stated_by = {job.source.name: job.source.split for job in every}
    free: dict[str, set[Any]] = defaultdict(set)
    for job in every:
        root = groups.find((job.source.name, job.case.subject))
        if root not in chosen:
            free[root[0]].add(root)
    for source, roots in free.items():  # a subject of several sources follows the one that its root is of
        chosen.update(assign(sorted(roots), stated_by[source] or fractions, seed))
    samples = []
    for job, sample in merged.samples:
        root = groups.find((job.source.name, job.case.subject))
        row = {**sample.row, "split": chosen[root], "subject": subject_of[root]}
        samples.append(Staged(row, sample.description, sample.frames, sample.size))
    notes = {"subjects stated in several splits": sum(len(s) > 1 for s in stated.values())}
    return samples, notes


def _notes(rows: Sequence[dict[str, Any]], samples: Sequence[Staged]) -> dict[str, int]:
    about = [sample.description for sample in samples]
    found = Counter(name for description in about for name in description["provenance"])
    placed = Counter(description.get("label", {}).get("placed") for description in about)
    pet = Counter(
        c["units"] for description in about for c in description["channels"] if c["modality"] == "PT"
    )
    return {
        "sform taken where qform differs by more than a voxel": found["qform_differs"],
        "position unknown, spacing alone taken": found["no_form"],
        "MONOCHROME1 inverted": found["inverted"],
        "PET without SUV, percentiles taken": pet["arbitrary"],
        "labels resampled to the grid of the image": placed["resampled"],
        "labels placed by the image's geometry": placed["image"],
        "spacing assumed from a field width": sum(r["spacing_source"] == "assumed" for r in rows),
        "spacing declared by the recipe": sum(r["spacing_source"] == "declared" for r in rows),
        "stored with an error (max_error in the manifest)": sum(r["max_error"] > 0 for r in rows),
        "stored as float32": sum(r["dtype"] == "float32" for r in rows),
        "labelled": sum(r["seg_size"] > 0 for r in rows),
    }


def _write_quarantine(path: Path, outcomes: Sequence[Outcome], jobs: Sequence[Job]) -> None:
    entries = [
        {"input": jobs[o.number].input, "source": jobs[o.number].source.name, "what": r.what, "code": r.code}
        | ({"detail": r.detail} if r.detail else {})
        for o in outcomes
        for r in o.refusals
    ]
    lines = sorted(json.dumps(entry, sort_keys=True) for entry in entries)
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_private(
    private: Path, outcomes: Sequence[Outcome], jobs: Sequence[Job], rows: Sequence[dict[str, Any]]
) -> None:
    """The way back from hashes to files: one JSON line an input. Stays outside the dataset."""
    places = {row["key"]: row["shard"] for row in rows}
    descriptor = os.open(private / "index.jsonl", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        for outcome in outcomes:
            job = jobs[outcome.number]
            entry = {
                "key": job.key,
                "keys": [s.row["key"] for s in outcome.samples if s.row["key"] in places],
                "input": job.input,
                "subject_hash": job.subject,
                "source": job.source.name,
                "subject": job.case.subject,
                "paths": [os.path.abspath(p) for p in job.case.images],
                "label": None if job.case.label is None else os.path.abspath(job.case.label),
                "refused": [r.message for r in outcome.refusals],
            }
            file.write(json.dumps(entry) + "\n")


@contextmanager
def _fresh_folder(path: Path) -> Iterator[Path]:
    """An empty folder, removed with all it holds when the block fails: it contains patient images."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(parents=True)
        yield path
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(f"{error.filename or path}: {error.strerror or error}; nothing was built") from error
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
