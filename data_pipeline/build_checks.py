"""What has to be settled before scans are read: names, burned-in text, inputs that are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from data_pipeline.earlier import Earlier
from data_pipeline.errors import UserError
from data_pipeline.journal import Outcome
from data_pipeline.layouts import Case
from data_pipeline.sources import SourceConfig

HEADERLESS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def check_names(sources: Sequence[SourceConfig]) -> None:
    """At least one source, each with a name of its own; else `UserError`."""
    names = Counter(s.name for s in sources)
    if not sources:
        raise UserError("no sources given; name at least one folder of scans")
    if twice := [n for n, count in names.items() if count > 1]:
        raise UserError(f"two sources are called {twice[0]!r}; give each its own name")


def check_missing(earlier: Earlier, wanted: Collection[str], drop: bool) -> None:
    """Refuse to lose samples because their inputs are not found, unless `drop` says so."""
    gone = earlier.missing(wanted)
    if gone and not drop:
        raise UserError(
            f"{len(gone)} inputs of {earlier.place} are no longer found, first {gone[0]['paths'][0]}; bring "
            "them back, or remove their samples with --drop-missing"
        )


def check_burned_in(cases: Sequence[tuple[SourceConfig, Case]]) -> None:
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


def check_undecided(outcomes: Iterable[Outcome]) -> None:
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
