"""Raw scans to a shard dataset: find the cases, read those that are new, complete the dataset.

    sources ── discover ──> jobs ── prepare (workers) ──> journal ── complete ──> dataset

A build that was cut off at any instant goes on when it is started again; the finished dataset is the same to
the byte. Started again on a finished dataset it reads only what is new or changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.build_checks import check_burned_in, check_missing, check_names, check_undecided, label_ids
from data_pipeline.build_folders import check_strangers, locked, private_folder, set_aside, work_folder
from data_pipeline.build_jobs import jobs_of
from data_pipeline.build_progress import Progress
from data_pipeline.complete import BuildReport, complete
from data_pipeline.earlier import Earlier
from data_pipeline.errors import UserError
from data_pipeline.journal import Journal, Outcome, Refusal
from data_pipeline.layouts import discover
from data_pipeline.merge import DONE, finish_part
from data_pipeline.place import Place
from data_pipeline.privacy import KeyedHash, check_private
from data_pipeline.sample import Job, Settings, prepare
from data_pipeline.sources import SourceConfig
from data_pipeline.splits import FRACTIONS, check_fractions
from data_pipeline.workers import Lost, Pool, pool

LEVEL_MIN_VOXELS = 2 * 64**3

STATED = ("name", "licence", "attribution", "label_origin", "burned_in", "deface")  # into dataset.json


def build(
    sources: Sequence[SourceConfig],
    out: str | Path,
    private: Path | None = None,
    *,
    workers: int = 0,
    scheduler: str | None = None,
    part: tuple[int, int] | None = None,
    work: Path | None = None,
    exact: bool = False,
    seed: int = 0,
    split: Mapping[str, float] | None = None,
    shard_samples: int = 64,
    level_min_voxels: int = LEVEL_MIN_VOXELS,
    on_leak: str = "refuse",
    drop_missing: bool = False,
    retry: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Build the dataset `out` (a folder or fsspec address) from `sources`, or add to it what is new.

    `private` (default: OUT-private, beside it or in the current folder) receives the hash key, the list of
    inputs by path with what became of each, and, in `work`, the state of an unfinished build; keep it apart
    from the dataset. `workers` processes on this machine (0: this one alone), or the dask cluster at
    `scheduler`. `part` (i, N), 1 <= i <= N, only reads a share of the cases; `merge` then completes the
    dataset. `split` maps names to fractions of subjects; `exact` stores float32 where 16 bits would lose
    anything; volumes above `level_min_voxels` get reduced levels. `drop_missing` removes samples whose inputs
    are gone, `retry` reads refused inputs again. Raises `UserError` before anything is read where a
    declaration is missing; an input that cannot be trusted is quarantined and counted, not raised.
    """
    started = time.monotonic()
    place, private = Place(out), private_folder(out, private)
    check_names(sources)
    fractions = dict(split) if split is not None else dict(FRACTIONS)
    check_fractions(fractions)
    options = {
        "exact": exact,
        "seed": seed,
        "split": fractions,
        "shard_samples": shard_samples,
        "level_min_voxels": level_min_voxels,
        "on_leak": on_leak,
    }
    if work is not None and not place.remote:
        check_private(Path(place.address), Path(os.path.abspath(work)))  # it holds real paths
    hashes = KeyedHash.open(private)
    journal = Journal(work_folder(work, private, part))
    with locked(journal.folder), pool(workers, scheduler) as hands, Progress(progress) as shown:
        shown.stage("looking for scans")
        left: Counter[str] = Counter()
        cases = [(s, case) for s in sources for case in discover(s, hands.ordered, hashes, left)]
        check_burned_in(cases)
        earlier = _earlier(place, private, journal, hashes, options, part)
        ids = label_ids((case for _, case in cases), earlier.labels)
        about = {
            "options": options,
            "ids": ids,
            "hash_key": hashes.of("dataset", "key check")[:16],
            "stated": [s.model_dump(mode="json", include=set(STATED)) for s in sources],
            "sources": [s.model_dump(mode="json", include={"name", "split"}) for s in sources],
            "cases": len(cases),
            "left_out": dict(left),
            "part": list(part) if part is not None else [1, 1],
        }
        journal.open(about)
        (journal.folder / DONE).unlink(missing_ok=True)
        jobs = jobs_of(cases, hashes, ids, options)
        if part is not None:
            jobs = [job for job in jobs if int(job.key[:8], 16) % part[1] == part[0] - 1]
        known = earlier.known(jobs, retry)
        check_missing(earlier, {job.key for job in jobs}, drop_missing)
        settings = Settings(journal, ids, exact, seed, level_min_voxels)
        outcomes = _read([job for job in jobs if job.key not in known], settings, hands, shown)
        content = {sample.row["content_hash"] for outcome in outcomes for sample in outcome.samples}
        if again := earlier.touched(known, content):
            known = {key: case for key, case in known.items() if key not in again}
            outcomes += _read([job for job in jobs if job.key in again], settings, hands, shown)
        check_undecided(outcomes)
        if part is not None:
            return finish_part(journal, jobs, outcomes, BuildReport(place.root, private, part=part), started)
        shown.stage("writing shards")
        report = complete(outcomes, known, earlier, journal, place, private, about, hands, shown.count)
        finished = set_aside(journal.folder)
    shutil.rmtree(finished)
    report.seconds = time.monotonic() - started
    return report


def build_from_recipe(
    recipe: str | Path | Sequence[str | Path],
    out: str | Path,
    private: Path | None = None,
    *,
    root: Path | None = None,
    workers: int = 0,
    progress: bool = True,
    **changes: Any,
) -> BuildReport:
    """Build from a YAML recipe (see `build_recipe.BuildRecipe`), or from folders of scans as they are.

    `root` replaces the recipe's own: paths in it are relative to that folder. `changes` are the other
    arguments of `build`, and fields of the recipe that replace its own (seed, exact, split, shard_samples,
    level_min_voxels, on_leak; modality, burned_in and the like for sources that state none).
    """
    from data_pipeline.build_recipe import read_recipe

    how = {name: changes.pop(name) for name in HOW if name in changes}
    plan = read_recipe(recipe, root, changes)
    options = plan.model_dump(include=set(OPTIONS))
    return build(plan.sources, out, private, workers=workers, progress=progress, **options, **how)


HOW = ("scheduler", "part", "work", "drop_missing", "retry")

OPTIONS = ("exact", "seed", "split", "shard_samples", "level_min_voxels", "on_leak")


def _earlier(
    place: Place,
    private: Path,
    journal: Journal,
    hashes: KeyedHash,
    options: Mapping[str, Any],
    part: tuple[int, int] | None,
) -> Earlier:
    """The dataset that is there, if it is one of ours and asked for in the same way."""
    address = hashlib.blake2b(os.fsencode(place.address), digest_size=8).hexdigest()
    before = journal.folder / "before" / address
    before.mkdir(parents=True, exist_ok=True, mode=0o700)
    earlier = Earlier.open(place, private / "index.jsonl", before)
    if not earlier:
        check_strangers(place)
        return earlier
    if part is not None:
        raise UserError(f"{place} is complete; --part builds a new dataset, add to this one without it")
    if earlier.info["hash_key"] != hashes.of("dataset", "key check")[:16]:
        raise UserError(
            f"{place} was built with another hash key; give its own --private folder, or another --out"
        )
    for name, value in options.items():
        if name not in ("on_leak", "shard_samples") and earlier.info["built_with"].get(name) != value:
            raise UserError(
                f"{place} was built with {name} {earlier.info['built_with'].get(name)}, asked for is {value}"
                "; give another --out, or the same value"
            )
    return earlier


def _read(jobs: Sequence[Job], settings: Settings, hands: Pool, shown: Progress) -> list[Outcome]:
    """Outcomes of the jobs, in their order: recorded ones, and the rest read by the workers."""
    journal = settings.journal
    done = journal.done()
    before = {j.key: _recorded(journal, j) for j in jobs if (j.key, j.fingerprint) in done}
    todo = [job for job in jobs if job.key not in before or not journal.holds(before[job.key])]
    shown.stage("reading", len(jobs), len(jobs) - len(todo))
    kills = journal.kills()
    results = hands.stream(
        prepare,
        [(job, settings) for job in todo],
        ended=[kills.get(job.key, 0) for job in todo],
        on_kill=lambda n: journal.killed(todo[n].key),
    )
    for number, codes in results:
        job = todo[number]
        if isinstance(codes, Lost):
            message = f"{job.case.images[0]}: ended its worker or had no memory, {codes.times} times, alone"
            refusal = Refusal("kills_workers", "", message, "image")
            journal.finish(job.outcome(refusals=(refusal,)))
            codes = ["kills_workers"]
        shown.read(job.size, codes)
    read = {job.key for job in todo}
    return [_recorded(journal, job) if job.key in read else before[job.key] for job in jobs]


def _recorded(journal: Journal, job: Job) -> Outcome:
    """The outcome of a job, with the place and split that the case has now: they change without the case."""
    outcome = journal.outcome(job.key, job.fingerprint)
    return replace(outcome, number=job.number, split=job.case.split)
