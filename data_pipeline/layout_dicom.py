"""A tree of DICOM files of any nesting: a case an image series, whatever the folders."""

from __future__ import annotations

import os
from pathlib import Path

from data_pipeline.errors import Quarantined
from data_pipeline.layouts import Case, Discovery, stem
from data_pipeline.locations import files_below, relative


def dicom_tree(find: Discovery) -> list[Case]:
    """Every DICOM image series below the folder, by SeriesInstanceUID; other DICOM objects come as refused
    cases."""
    from data_pipeline.readers.dicom_series import series_in

    src = find.src
    paths = files_below(src.path, lambda: find.count("folders that cannot be listed"))
    found, bad = series_in(p for p in paths if isinstance(p, Path) and src.selects(relative(p, src.path)))
    cases = []
    for series in found:
        # Radiographs of one series (frontal, lateral) are images of their own.
        images = [(path,) for path in series.files] if series.modality == "XR" else [series.files]
        for files in images:
            single = len(files) == 1
            top = files[0] if single else Path(os.path.commonpath([p.parent for p in files]))
            cases.append(
                Case(
                    source=src.name,
                    images=(top,),
                    label=None,
                    subject=series.patient or series.study or top.name,
                    split=None,
                    modality=(series.modality,) if series.modality else (),
                    series=series.uid,
                    files=files,
                    name=stem(top),
                    refused=Quarantined(series.code, path=top) if series.code else None,
                )
            )
    for path, error in bad:
        cases.append(
            Case(src.name, (path,), None, path.parent.name, None, (), name=stem(path), refused=error)
        )
    return cases
