"""A tree of DICOM files of any nesting: a case an image series, with the RTSTRUCT and SEG files that refer to
it.

What belongs together follows from UIDs alone, never from folders. A label belongs to the series whose images
it names, or that it names; only where it names neither, to the one series in its frame of reference.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from data_pipeline.errors import Quarantined, UserError, shown
from data_pipeline.label_names import allowed_name, public_name, stated_name
from data_pipeline.labels import DicomLabel
from data_pipeline.layout_folder import BESIDE
from data_pipeline.layouts import Case, Discovery, stem
from data_pipeline.locations import Location, files_below, relative
from data_pipeline.readers import SUFFIXES
from data_pipeline.readers.dicom_references import References, Structure
from data_pipeline.readers.dicom_series import Header, Series, scan_headers, series_in

BATCH = 256  # files whose headers one call reads


def dicom_tree(find: Discovery, *, count_others: bool = True) -> list[Case]:
    """Every DICOM image series below the folder, by SeriesInstanceUID; objects that are no images, files that
    cannot be read and labels without their images come as refused cases. ``count_others``: files that are not
    DICOM are counted by their suffix."""
    src = find.src
    paths = files_below(src.path, lambda: find.count("folders that cannot be listed"))
    paths = [p for p in paths if src.selects(relative(p, src.path))]
    headers = _headers(find, paths)
    if count_others:
        dicom = {h.path for h in headers}
        for path in paths:
            if path not in dicom:
                find.count(_described(path))
    labels = {h.sop or str(h.path): h for h in reversed(headers) if h.references is not None}
    series, twice = series_in(h for h in headers if h.references is None)
    find.count("files stored twice", twice)

    joined: dict[Location, list[DicomLabel]] = defaultdict(list)  # by the first file of a series
    refused = []
    for header in sorted(labels.values(), key=lambda h: str(h.path)):
        try:
            for one, label in _join(find, header, series):
                own = joined[one.files[0]]
                own.append(replace(label, annotator=len(own)))
        except Quarantined as error:
            refused.append(_refused(find, header.path, header.patient or header.study, error.at(header.path)))
    uses = Counter((one.uid, one.patient) for one in series)
    cases = [
        case
        for one in series
        for case in _cases(find, one, tuple(joined[one.files[0]]), uses[one.uid, one.patient] > 1)
    ]
    refused += [_refused(find, h.path, "", h.bad) for h in headers if h.bad is not None]
    return cases + sorted(refused, key=lambda case: str(case.images[0]))


def _described(path: Location) -> str:
    if path.name.upper() == "DICOMDIR":
        return "DICOMDIR files"
    suffix = path.suffix.lower()
    return f"files that are no DICOM: {suffix if suffix in BESIDE or suffix in SUFFIXES else 'other'}"


def _headers(find: Discovery, paths: list[Location]) -> list[Header]:
    batches = [(tuple(paths[n : n + BATCH]),) for n in range(0, len(paths), BATCH)]
    each = find.each or (lambda function, arguments: [function(*one) for one in arguments])
    return [header for batch in each(scan_headers, batches) for header in batch]


def _cases(find: Discovery, series: Series, labels: tuple[DicomLabel, ...], shared: bool) -> Iterator[Case]:
    # Radiographs of one series (frontal, lateral) are images of their own.
    separate = series.modality == "XR" and series.code is None
    for files in [(path,) for path in series.files] if separate else [series.files]:
        top = files[0] if len(files) == 1 else _common_folder(files)
        yield Case(
            source=find.src.name,
            images=(top,),
            label=None,
            subject=series.patient or series.study or top.name,
            split=None,
            modality=(series.modality,) if series.modality else (),
            series=" ".join([series.uid, series.study, series.code or ""]) if shared else series.uid,
            files=files,
            name=stem(top),
            dicom_labels=labels if series.code is None else (),
            refused=Quarantined(series.code, f"{len(files)} files", path=top) if series.code else None,
        )


def _common_folder(files: tuple[Location, ...]) -> Location:
    if all(isinstance(path, Path) for path in files):
        return Path(os.path.commonpath([str(path.parent) for path in files]))
    return files[0].parent


def _refused(find: Discovery, path: Location, subject: str, error: Quarantined) -> Case:
    return Case(
        find.src.name, (path,), None, subject or path.parent.name, None, (), name=stem(path), refused=error
    )


def _join(find: Discovery, header: Header, series: list[Series]) -> Iterator[tuple[Series, DicomLabel]]:
    """The series that a label refers to, each with the structures drawn in its frame of reference."""
    assert header.references is not None
    refers = header.references
    images = [one for one in series if one.code is None]
    matched = _matching(refers, images)
    matched = [one for one in matched if one.patient == header.patient] or matched
    if not matched:
        raise Quarantined("label_no_image", f"{len(refers.structures)} structures")
    structures = _wanted(find, refers.structures)
    if not structures:
        raise Quarantined("label_empty", f"{len(refers.structures)} structures, all left out")
    found = False
    for one in matched:
        here = [s for s in structures if _same_frame(s, refers, one)]
        if here:
            found = True
            find.count("structures in another frame of reference", len(structures) - len(here))
            instances = refers.instances & one.instances
            yield one, DicomLabel(refers.kind, header.path, _regions(find, here), 0, instances)
    if not found:
        raise Quarantined("label_frame", f"{len(structures)} structures")


def _matching(refers: References, images: list[Series]) -> list[Series]:
    by_images = [one for one in images if refers.instances & one.instances]
    by_series = [one for one in images if one.uid in refers.series]  # its images may have new UIDs
    if by_images or by_series or refers.series or refers.instances:
        return by_images or by_series
    in_frame = [one for one in images if refers.frames_of_reference & one.frames_of_reference]
    return in_frame if len(in_frame) == 1 else []


def _same_frame(structure: Structure, refers: References, series: Series) -> bool:
    """Whether a structure is drawn in the coordinates of the series; true where either states no frame."""
    own = frozenset({structure.frame_of_reference} - {""}) or refers.frames_of_reference
    return not own or not series.frames_of_reference or bool(own & series.frames_of_reference)


def _wanted(find: Discovery, structures: tuple[Structure, ...]) -> list[Structure]:
    """Structures that are anatomy or lesions, and those that the recipe names whatever they are."""
    kept = []
    for structure in structures:
        excluded = any(fnmatchcase(structure.name.lower(), g.lower()) for g in find.src.exclude_rois)
        if (structure.anatomy and not excluded) or stated_name(structure.name, find.src) is not None:
            kept.append(structure)
    find.count("structures excluded", len(structures) - len(kept))
    return kept


def _regions(find: Discovery, structures: list[Structure]) -> dict[str, tuple[int, ...]]:
    regions: dict[str, tuple[int, ...]] = {}
    for structure in structures:
        name = _name(find, structure.name)
        regions[name] = (*regions.get(name, ()), structure.number)
    return regions


def _name(find: Discovery, found: str) -> str:
    """The dataset's name of a ROI or segment: the recipe's, or its words in lower case joined by ``_``."""
    stated = stated_name(found, find.src)
    if stated is not None:
        return stated
    allowed = allowed_name(found)
    if allowed is not None:
        return "_".join(re.findall(r"[a-z0-9]+", allowed.lower()))
    hashes = find.hashes
    if hashes is None:
        raise UserError(
            f"{shown(find.src.path)}: structure {shown(found)!r} is no name of anatomy or lesion that may "
            f"stand in a dataset; state label_names: {{{shown(found)}: name}}"
        )
    return public_name(found, find.src, lambda text: hashes.of("roi", text))
