"""Raw scans to a shard dataset: find the cases, read those that are new, complete the dataset.

    sources ── discover ──> jobs ── prepare (workers) ──> journal ── complete ──> dataset

A build that was cut off at any instant goes on when it is started again; the finished dataset is the same to
the byte. Started again on a finished dataset it reads only what is new or changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.build_progress import Progress
from data_pipeline.complete import BuildReport, complete
from data_pipeline.earlier import Earlier
from data_pipeline.errors import UserError
from data_pipeline.journal import Journal, Outcome, Refusal, fingerprint, write_whole
from data_pipeline.layouts import Case, discover
from data_pipeline.locations import files_below, relative
from data_pipeline.manifest import FORMAT_VERSION
from data_pipeline.place import Place
from data_pipeline.privacy import KeyedHash, check_private
from data_pipeline.readers import companions
from data_pipeline.sample import Job, Settings, prepare
from data_pipeline.sources import SourceConfig
from data_pipeline.splits import FRACTIONS, check_fractions
from data_pipeline.workers import Lost, Pool, pool

LEVEL_MIN_VOXELS = 2 * 64**3
STATED = ("name", "licence", "attribution", "label_origin", "burned_in", "deface")  # into dataset.json
#: What is stated of a source and used while a case is read; the rest is in the case itself.
READ_BY = (
    "spacing", "field_mm", "accept_no_form", "accept_secondary", "more_frames", "shear", "voi_lut",
    "burned_in",
    "deface", "label_threshold", "label_geometry", "label_origin", "label_names", "exclude_rois", "geometry",
)  # fmt: skip
HEADERLESS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


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
    place, private = Place(out), _private(out, private)
    _check_names(sources)
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
    journal = Journal(_work(work, private, part))
    with _lock(journal.folder), pool(workers, scheduler) as hands, Progress(progress) as shown:
        shown.stage("looking for scans")
        left: Counter[str] = Counter()
        cases = [(s, case) for s in sources for case in discover(s, hands.ordered, hashes, left)]
        _check_burned_in(cases)
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
        jobs = _jobs(cases, hashes, ids, options)
        if part is not None:
            jobs = [job for job in jobs if int(job.key[:8], 16) % part[1] == part[0] - 1]
        known = earlier.known(jobs, retry)
        _check_missing(earlier, {job.key for job in jobs}, drop_missing)
        settings = Settings(journal, ids, exact, seed, level_min_voxels)
        outcomes = _read([job for job in jobs if job.key not in known], settings, hands, shown)
        content = {sample.row["content_hash"] for outcome in outcomes for sample in outcome.samples}
        if again := earlier.touched(known, content):
            known = {key: case for key, case in known.items() if key not in again}
            outcomes += _read([job for job in jobs if job.key in again], settings, hands, shown)
        _check_undecided(outcomes)
        if part is not None:
            return _finish_part(journal, jobs, outcomes, BuildReport(place.root, private, part=part), started)
        shown.stage("writing shards")
        report = complete(outcomes, known, earlier, journal, place, private, about, hands, shown.count)
        finished = _set_aside(journal.folder)
    shutil.rmtree(finished)
    report.seconds = time.monotonic() - started
    return report


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
    place, private = Place(out), _private(out, private)
    hashes = KeyedHash.open(private)
    main = Journal(_work(None, private, None))
    merged = main.folder / "merged.json"
    folders = [Path(os.path.abspath(p)) for p in parts] or sorted(private.glob("work-*-of-*"))
    with _lock(main.folder):
        there = place.size("dataset.json") is not None
        if merged.is_file() or (there and not any(map(os.path.exists, folders))):
            report = _merged_before(place, private)
        else:
            journals = [Journal(folder) for folder in folders]
            about = _check_parts(journals, hashes)
            if not there:
                _check_strangers(place)
            elif not (main.folder / "build.json").is_file() or main.about() != about:
                raise UserError(f"{place} is complete; merge builds a new dataset: give another --out")
            main.open(about)
            outcomes = [outcome for journal in journals for outcome in _outcomes(journal)]
            _check_undecided(outcomes)
            with pool(workers, scheduler) as hands, Progress(progress) as shown:
                shown.stage("writing shards")
                report = complete(
                    outcomes, {}, Earlier(place), main, place, private, about, hands, shown.count
                )
            write_whole(merged, json.dumps([os.fspath(folder) for folder in folders]).encode())
        for folder in json.loads(merged.read_text()) if merged.is_file() else ():
            shutil.rmtree(folder, ignore_errors=True)
        finished = _set_aside(main.folder)
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


def label_ids(cases: Iterable[Case], before: Mapping[str, int] | None = None) -> dict[str, int]:
    """Dataset-wide ids, from 1, of every label name, in order of first appearance after those of `before`.

    Sources join by name. Names that differ only in case or punctuation are an error, to be answered in the
    recipe by `labels` or `label_names`.
    """
    ids: dict[str, int] = dict(before or {})
    written: dict[str, tuple[str, str]] = {_plain(name): (name, "the dataset") for name in ids}
    for case in cases:
        regions = [case.label_regions or {}, *(label.regions for label in case.dicom_labels)]
        for name in (name for named in regions for name in named):
            other, source = written.setdefault(_plain(name), (name, case.source))
            if other != name:
                raise UserError(
                    f"label names {other!r} (source {source!r}) and {name!r} ({case.source!r}) look alike; "
                    "write them alike in the recipe with labels: {value: name} or label_names: {name: name}"
                )
            ids.setdefault(name, max(ids.values(), default=0) + 1)
    if len(ids) > 254:
        raise UserError(
            f"{len(ids)} label names; a dataset holds at most 254, so build two or leave some sources out"
        )
    return ids


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum()) or name


def _private(out: str | Path, private: Path | None) -> Path:
    text = os.fspath(out)
    if "://" in text:
        default = Path.cwd() / (text.rstrip("/").rsplit("/", 1)[-1] + "-private")
        return Path(os.path.abspath(private)) if private is not None else default
    folder = Path(os.path.abspath(out))
    chosen = (
        Path(os.path.abspath(private)) if private is not None else folder.with_name(folder.name + "-private")
    )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    check_private(folder, chosen)
    return chosen


def _work(work: Path | None, private: Path, part: tuple[int, int] | None) -> Path:
    """The work folder; of a part, one of its own."""
    base = Path(os.path.abspath(work)) if work is not None else private
    if part is None:
        return base / "work"  # below what was named, since it is deleted in the end
    number, count = part
    if not 1 <= number <= count:
        raise UserError(f"--part {number}/{count}: parts are numbered from 1 to N, as 3/16")
    return base / f"work-{number:04d}-of-{count:04d}"


def _set_aside(folder: Path) -> Path:
    """Give a work folder that is no longer needed its name for deletion; half of one, left by a kill, would
    be taken for a build to go on with."""
    finished = folder.with_name(f"finished-{folder.name}")
    os.replace(folder, finished)
    return finished


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the work folder; a second build of it would write between the lines of the first."""
    try:
        shutil.rmtree(folder.with_name(f"finished-{folder.name}"), ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; nothing was built"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another build of this dataset; wait for it to end") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; start the same build again"
        ) from error
    finally:
        os.close(descriptor)


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
        _check_strangers(place)
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


def _check_strangers(place: Place) -> None:
    """Nothing but what a build that was cut off may have left is where a new dataset goes."""
    ours = (".tar", ".partial", ".jsonl", ".parquet", ".html")
    if strangers := [name for name in place.names() if not name.endswith(ours)]:
        raise UserError(
            f"{place} exists and holds other files ({strangers[0]}); choose another --out or empty it"
        )


def _check_missing(earlier: Earlier, wanted: Collection[str], drop: bool) -> None:
    gone = earlier.missing(wanted)
    if gone and not drop:
        raise UserError(
            f"{len(gone)} inputs of {earlier.place} are no longer found, first {gone[0]['paths'][0]}; bring "
            "them back, or remove their samples with --drop-missing"
        )


def _check_names(sources: Sequence[SourceConfig]) -> None:
    names = Counter(s.name for s in sources)
    if not sources:
        raise UserError("no sources given; name at least one folder of scans")
    if twice := [n for n, count in names.items() if count > 1]:
        raise UserError(f"two sources are called {twice[0]!r}; give each its own name")


def _check_burned_in(cases: Sequence[tuple[SourceConfig, Case]]) -> None:
    """Stop before reading where radiographs without a header may have text burned in and nobody decided."""
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


def _check_undecided(outcomes: Iterable[Outcome]) -> None:
    """The same for formats whose header had to be read first."""
    found = Counter(
        o.source for o in outcomes for r in o.refusals if r.code == "burned_in" and r.detail == "undecided"
    )
    if found:
        _burned_in_error(found)


def _burned_in_error(counts: Mapping[str, int]) -> None:
    listed = ", ".join(f"{count} in source {name!r}" for name, count in counts.items())
    raise UserError(
        f"{sum(counts.values())} radiographs ({listed}) do not say that no text is burned in; "
        "look at them and state burned_in: accept, quarantine or mask"
    )


def _jobs(
    cases: Sequence[tuple[SourceConfig, Case]],
    hashes: KeyedHash,
    ids: Mapping[str, int],
    options: Mapping[str, Any],
) -> list[Job]:
    jobs = []
    seen: dict[str, Any] = {}
    build_wide = [FORMAT_VERSION, options["exact"], options["seed"], options["level_min_voxels"]]
    for number, (source, case) in enumerate(cases):
        single = case.series is None or case.files is None or len(case.files) == 1
        place = relative(case.images[0], source.path) if single else ""
        key = hashes.of("case", "\0".join([source.name, case.subject, place, case.series or ""]))[:16]
        if key in seen:
            raise UserError(f"{case.images[0]} is listed twice in source {source.name!r}; remove one entry")
        seen[key] = case.images[0]
        files = _files(case)
        used = {
            name: ids[name]
            for named in (case.label_regions or {}, *(d.regions for d in case.dicom_labels))
            for name in named
        }
        stated = source.model_dump(mode="json", include=set(READ_BY))
        about = replace(case, source="", images=(), files=None, label=None, refused=None, split=None)
        jobs.append(
            Job(
                number,
                case,
                source,
                key,
                hashes.path(case.images[0]),
                hashes.subject(source.name, case.subject)[:16],
                fingerprint(files, [build_wide, stated, repr(about), used, str(case.refused)]),
                sum(size for size, _ in files.values()),
            )
        )
    return jobs


def _files(case: Case) -> dict[str, tuple[int, int]]:
    """{address: (bytes, time)} of every file of a case; a file that is not there has -1."""
    named = [*(case.files or case.images), *([case.label] if case.label is not None else [])]
    named += [label.path for label in case.dicom_labels]
    found = {}
    for path in named:
        folder = case.files is None and path.is_dir()
        for file in files_below(path) if folder else [path, *companions(path)]:
            try:
                about = file.stat()
                when = getattr(about, "st_mtime_ns", None) or int(about.st_mtime * 1e9)
                found[str(file)] = about.st_size, int(when)
            except OSError:
                found[str(file)] = -1, 0
    return found


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


DONE = "done.json"


def _finish_part(
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
