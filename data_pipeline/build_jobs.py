"""Cases to jobs: what each is called in the dataset, and the fingerprint of all it depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.journal import fingerprint
from data_pipeline.layouts import Case
from data_pipeline.locations import files_below, relative
from data_pipeline.manifest import FORMAT_VERSION
from data_pipeline.privacy import KeyedHash
from data_pipeline.readers import companions
from data_pipeline.sample import Job
from data_pipeline.sources import SourceConfig

#: What is stated of a source and used while a case is read; the rest is in the case itself.
READ_BY = (
    "spacing", "field_mm", "accept_no_form", "accept_secondary", "more_frames", "shear", "voi_lut",
    "burned_in",
    "deface", "label_threshold", "label_geometry", "label_origin", "label_names", "exclude_rois", "geometry",
)  # fmt: skip


def jobs_of(
    cases: Sequence[tuple[SourceConfig, Case]],
    hashes: KeyedHash,
    ids: Mapping[str, int],
    options: Mapping[str, Any],
) -> list[Job]:
    """One job a case, in order. Raises `UserError` where a case is listed twice."""
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
