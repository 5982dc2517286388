"""One series to its acquisitions: whole volumes, each perhaps repeated in time.

The rule, in this order:

1. Frames of one orientation, size and pixel spacing are a stack. Several stacks are several volumes if each
   has at least `MIN_STACK` positions on an even grid; otherwise the series is refused (a three-plane
   localizer is the usual case).
2. Where several frames share a position, the stack is split by the parameters that differ there: b-value (by
   shell), echo, inversion time, flip angle, ImageType, and for CT kernel, kVp and AcquisitionNumber.
3. What still shares a position is a repeat in time (or of gradient directions), told apart by temporal
   position, cardiac phase, trigger time, acquisition number, gradient direction, time, or lastly by the
   instance number. Frames that nothing tells apart are refused.
4. Where no position repeats but the slices are not one even grid, AcquisitionNumber or StackID may split them
   into several that are.

An MR acquisition with fewer positions than another of its stack is incomplete and refused, as is a time point
with fewer than its acquisition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.dicom_acquisition import (
    PARAMETERS,
    TIMES,
    acquisition_number,
    instance_order,
    shells,
    stack_id,
)
from data_pipeline.readers.dicom_frames import Frame
from data_pipeline.readers.dicom_grid import by_position, step_of

TURNED = 2e-3  # largest difference of a direction cosine within a stack
MIN_STACK = 8  # positions that a stack beside another must have; localizers have fewer
MIN_PART = 4  # positions that AcquisitionNumber or StackID must give each part to split an uneven stack


@dataclass(frozen=True)
class Acquisition:
    """Frames ``[t][z]`` on one grid, the LPS mm from slice to slice, and time points left out as
    incomplete."""

    frames: list[list[Frame]]
    step: np.ndarray
    b_value: float | None = None
    left_out: int = 0


def acquisitions(frames: Sequence[Frame], modality: str) -> tuple[list[Acquisition], list[Quarantined]]:
    """The whole acquisitions of a series in a stable order, and why the others were refused.

    Raises `Quarantined` where not one is whole.
    """
    stacks = _stacks(frames)
    if len(stacks) == 1:
        found, refused = _of_stack(stacks[0], modality)
    else:
        found, refused = [], []
        turned = any(np.abs(s[0].orientation - frames[0].orientation).max() > TURNED for s in stacks)
        detail = f"{len(stacks)} orientations or sizes in {len(frames)} slices"
        for stack in stacks:
            try:
                parts, bad = _of_stack(stack, modality)
            except Quarantined:
                parts, bad = [], []
            if not parts or len(by_position(stack)) < MIN_STACK:
                raise Quarantined("mixed_orientation" if turned else "mixed_shape", detail)
            found, refused = found + parts, refused + bad
    if not found:
        raise refused[0]
    return found, refused


def _stacks(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames by shape, pixel spacing and orientation, in order of their first frame."""
    stacks: list[list[Frame]] = []
    for frame in frames:
        for stack in stacks:
            first = stack[0]
            if (
                frame.shape == first.shape
                and np.abs(frame.orientation - first.orientation).max() <= TURNED
                and np.allclose(frame.pixel, first.pixel, rtol=1e-3)
            ):
                stack.append(frame)
                break
        else:
            stacks.append([frame])
    return stacks


def _of_stack(stack: list[Frame], modality: str) -> tuple[list[Acquisition], list[Quarantined]]:
    positions = by_position(stack)
    if len(positions) == len(stack):
        b_value = shells(stack[:1])[id(stack[0])]
        return [replace(part, b_value=b_value) for part in _whole(stack)], []
    b_values = shells(stack)
    keys: list[Callable[[Frame], Hashable]] = [lambda f: b_values[id(f)], *PARAMETERS.values()]
    if modality == "CT":
        keys.append(acquisition_number)
    differing = [key for key in map(cache, keys) if _separates(key, positions)]
    groups = _grouped(stack, lambda f: tuple(key(f) for key in differing))
    most = max(len(by_position(group)) for group in groups)
    found, refused = [], []
    for group in groups:
        try:
            places = len(by_position(group))
            if places < most and (modality == "MR" or places == 1):
                raise Quarantined("missing_slices", f"{places} of {most} positions of an acquisition")
            parts = _whole(group)
        except Quarantined as error:
            refused.append(error)
            continue
        found += [replace(part, b_value=b_values[id(part.frames[0][0])]) for part in parts]
    return found, refused


def _separates(key: Callable[[Frame], Hashable], positions: list[list[Frame]]) -> bool:
    """Whether frames at one position differ in a parameter that does not just number the slices."""
    if not any(len({key(frame) for frame in group}) > 1 for group in positions):
        return False
    members: dict[Hashable, set[int]] = defaultdict(set)
    for n, group in enumerate(positions):
        for frame in group:
            members[key(frame)].add(n)
    return len(positions) == 1 or float(np.median([len(m) for m in members.values()])) > 1


def _whole(group: list[Frame]) -> list[Acquisition]:
    """The acquisition of frames that differ in no parameter, or those its numbers split it into."""
    try:
        times, left_out = _repeats(group)
        return [Acquisition(times, step_of(times[0]), None, left_out)]
    except Quarantined as error:
        for number in (stack_id, acquisition_number):
            parts = _grouped(group, number)
            if len(parts) < 2 or min(len(by_position(part)) for part in parts) < MIN_PART:
                continue
            try:
                return [
                    Acquisition(times, step_of(times[0]), None, left_out)
                    for times, left_out in map(_repeats, parts)
                ]
            except Quarantined:
                continue
        raise error


def _repeats(group: list[Frame]) -> tuple[list[list[Frame]], int]:
    """Frames ``[t][z]`` in order of time, and how many incomplete time points were left out."""
    positions = by_position(group)
    if len(positions) == len(group):
        return [[frame for (frame,) in positions]], 0
    keys = map(cache, TIMES.values())
    varying = [key for key in keys if any(len({key(f) for f in p}) > 1 for p in positions)]
    for candidate in [[key] for key in varying] + ([varying] if len(varying) > 1 else []):
        times = _by_value(positions, candidate)
        whole = [time for time in times if len(time) == len(positions)]
        if whole and len(whole) * 2 >= len(times):
            return whole, len(times) - len(whole)
    if len({len(p) for p in positions}) > 1:
        raise Quarantined("duplicate_slices", f"{len(group)} slices at {len(positions)} positions")

    def order(frame: Frame) -> tuple:
        return (*(_sortable(key(frame)) for key in varying), instance_order(frame))

    ranked = [sorted(p, key=order) for p in positions]
    if any(order(a) == order(b) for p in ranked for a, b in pairwise(p)):
        raise Quarantined(
            "duplicate_slices", f"nothing tells the {len(group)} slices at {len(positions)} positions apart"
        )
    return [list(time) for time in zip(*ranked)], 0


def _by_value(positions: list[list[Frame]], keys: Sequence[Callable[[Frame], Hashable]]) -> list[list[Frame]]:
    """Frames ``[t][z]`` by the value of the keys, ascending; empty where a value repeats at a position."""
    times: dict[tuple, list[Frame]] = defaultdict(list)
    for group in positions:
        values = [tuple(key(frame) for key in keys) for frame in group]
        if len(set(values)) < len(values):
            return []
        for value, frame in zip(values, group):
            times[value].append(frame)
    return [times[value] for value in sorted(times, key=_sortable)]


def _grouped(frames: Iterable[Frame], key: Callable[[Frame], Hashable]) -> list[list[Frame]]:
    """Frames by the value of a key, ascending."""
    groups: dict[Hashable, list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[key(frame)].append(frame)
    return [groups[value] for value in sorted(groups, key=_sortable)]


def _sortable(value: Hashable) -> tuple:
    """Any key as one that sorts among its kind: nothing first, then numbers, then text."""
    if isinstance(value, tuple):
        return (3, tuple(_sortable(v) for v in value))
    if value is None:
        return (0,)
    return (1, float(value)) if isinstance(value, (int, float)) else (2, str(value))
