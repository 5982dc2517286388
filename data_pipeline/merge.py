"""Parts of a build, read by jobs of their own, to one dataset."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.build_checks import check_undecided
from data_pipeline.build_folders import check_strangers, locked, private_folder, set_aside, work_folder
from data_pipeline.build_progress import Progress
from data_pipeline.complete import BuildReport, complete
from data_pipeline.earlier import Earlier
from data_pipeline.errors import UserError
from data_pipeline.journal import Journal, Outcome, write_whole
from data_pipeline.place import Place
from data_pipeline.privacy import KeyedHash
from data_pipeline.sample import Job
from data_pipeline.workers import pool

DONE = "done.json"


def merge(
    out: str | Path,
    parts: Sequence[Path] = (),
    private: Path | None = None,
    *,
    workers: int = 0,
    scheduler: str | None = None,
    progress: bool = True,
) -> BuildReport:
    """Complete the dataset of which every part has been read (`build(..., part=(i, N))`), and delete the
    parts.

    `parts` are their work folders; by default those in the private folder. Raises `UserError` where a part is
    missing, unfinished, or of another build.
    """
    started = time.monotonic()
    place, private = Place(out), private_folder(out, private)
    hashes = KeyedHash.open(private)
    main = Journal(work_folder(None, private, None))
    merged = main.folder / "merged.json"
    folders = [Path(os.path.abspath(p)) for p in parts] or sorted(private.glob("work-*-of-*"))
    with locked(main.folder):
        there = place.size("dataset.json") is not None
        if merged.is_file() or (there and not any(map(os.path.exists, folders))):
            report = _merged_before(place, private)
        else:
            journals = [Journal(folder) for folder in folders]
            about = _check_parts(journals, hashes)
            if not there:
                check_strangers(place)
            elif not (main.folder / "build.json").is_file() or main.about() != about:
                raise UserError(f"{place} is complete; merge builds a new dataset: give another --out")
            main.open(about)
            outcomes = [outcome for journal in journals for outcome in _outcomes(journal)]
            check_undecided(outcomes)
            with pool(workers, scheduler) as hands, Progress(progress) as shown:
                shown.stage("writing shards")
                report = complete(
                    outcomes, {}, Earlier(place), main, place, private, about, hands, shown.count
                )
            write_whole(merged, json.dumps([os.fspath(folder) for folder in folders]).encode())
        for folder in json.loads(merged.read_text()) if merged.is_file() else ():
            shutil.rmtree(folder, ignore_errors=True)
        finished = set_aside(main.folder)
    shutil.rmtree(finished)
    report.seconds = time.monotonic() - started
    return report


def _merged_before(place: Place, private: Path) -> BuildReport:
    """The report of a merge that was cut off as or after it deleted its parts."""
    info = json.loads(place.read("dataset.json"))
    counts = info["counts"]
    return BuildReport(
        place.root, private, counts["samples"], len(info["shards"]),
        counts=counts["by"], quarantined=counts["refused"], notes=counts["notes"],
    )  # fmt: skip


def finish_part(
    journal: Journal, jobs: Sequence[Job], outcomes: Sequence[Outcome], report: BuildReport, started: float
) -> BuildReport:
    """Note that a part is read to its end, and which outcomes are its own."""
    own = {job.key: [job.fingerprint, job.number, job.case.split] for job in jobs}
    write_whole(journal.folder / DONE, json.dumps(own).encode())
    report.read = len(outcomes)
    report.samples = sum(len(o.samples) for o in outcomes)
    report.quarantined = dict(Counter(r.code for o in outcomes for r in o.refusals))
    report.seconds = time.monotonic() - started
    return report


def _outcomes(journal: Journal) -> list[Outcome]:
    cases = json.loads((journal.folder / DONE).read_text())
    return [
        replace(journal.outcome(key, fingerprint), number=number, split=split)
        for key, (fingerprint, number, split) in cases.items()
    ]


def _check_parts(journals: Sequence[Journal], hashes: KeyedHash) -> dict[str, Any]:
    """What all parts were asked for, if they are the parts of one build and none is missing."""
    if not journals:
        raise UserError("no parts found; give the work folders of `medfm shards build --part i/N`")
    abouts = [journal.about() for journal in journals]
    count = abouts[0]["part"][1]
    numbers = Counter(about["part"][0] for about in abouts)
    if missing := [n for n in range(1, count + 1) if numbers[n] != 1]:
        raise UserError(
            f"part {missing[0]} of {count} is {'there twice' if numbers[missing[0]] else 'missing'}"
        )
    first = {name: value for name, value in abouts[0].items() if name != "part"}
    for journal, about in zip(journals, abouts):
        if not (journal.folder / DONE).is_file():
            raise UserError(
                f"{journal.folder}: part {about['part'][0]} is not finished; start it again first"
            )
        if other := [n for n, value in first.items() if about[n] != value or about["part"][1] != count]:
            raise UserError(
                f"{journal.folder}: is of another build (its {other[0]} differs); build the parts alike"
            )
    if first["hash_key"] != hashes.of("dataset", "key check")[:16]:
        raise UserError(
            "the parts were read with another hash key; give the --private folder they were read with"
        )
    if (found := sum(len(json.loads((j.folder / DONE).read_text())) for j in journals)) != first["cases"]:
        raise UserError(
            f"the parts hold {found} cases of {first['cases']}; build every part from the same sources"
        )
    return first
