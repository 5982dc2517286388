"""Which sample comes i-th and which crop is cut from it: a pure function of (manifest, mixture, seed, i).

Draw i comes about in five steps, each in constant time:

1. i → update, group g, place j: a batch is `groups` groups of `group_size` crops, drawn one after another.
2. j → stratum (a `RowSpec`: geometry and row class) and slot in its rows: the same in every group.
3. Group g of every update is lane g, and (update, j) a position of it. The table of the lane gives the source
   at that position and n, how many crops of that source and stratum the lane had before (`lane_table.py`).
4. The samples of a source and stratum are a cell. The lane's n-th sample from it is found in its epochs
   (`epochs.py`); with `crops_per_volume` c, the (n // c)-th.
5. Random numbers of i alone choose channel, zoom and box (`rng.py`, `crops.py`).

Nothing here knows of ranks, workers or history, so a resume is one integer and every split of the work gives
the same sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.crops import MAX_RESIDUAL, Box, Floats, window_box, zoomed_box
from data_pipeline.deal import dealing
from data_pipeline.epochs import Cell, samples_per_shard
from data_pipeline.errors import UserError
from data_pipeline.geometry import PATCH, TokenConfig, Triple, largest_box
from data_pipeline.lane_table import LaneTable
from data_pipeline.order_page import description
from data_pipeline.rng import uniforms
from data_pipeline.schedule import MixtureConfig, compose, merge_rare, share_windows, stratum_shares
from data_pipeline.selection import Columns, source_codes, text_codes, wanted_shares

__all__ = ["Columns", "Draw", "Order", "RowSpec", "lanes_of"]

KINDS = ("volume", "slab", "planar")
#: Of the rule by which samples are drawn; a run that was started under another is not resumed silently.
ORDER_VERSION = 2


@dataclass(frozen=True)
class RowSpec:
    """Rows of one kind in a group: `rows` rows of `k` crops, each of up to `capacity` tokens.

    `voxels` is the length of a crop's static voxel buffer: no crop of this kind has more voxels.
    """

    geometry: str
    k: int
    rows: int
    capacity: int = 0
    voxels: int = 0

    @property
    def crops(self) -> int:
        """Crops of this kind in a group."""
        return self.rows * self.k


@dataclass(frozen=True, slots=True)
class Draw:
    """The i-th crop. Stem order is given by `axes`: `stem[a] == stored[axes[a]]`.

    index: i. row: manifest row. group: lane. spec: number of the `RowSpec`. slot: place in it, row · k +
    crop. channel, level: member to read. origin, extent: voxels of that level, stored (z, y, x). grid:
    tokens, stem order. residual: level voxels per output voxel, stem order. start_mm: corner of the first
    output voxel from the corner of the volume, stem order. spacing: output voxel in mm, stem order. repeat:
    epoch of its source.
    """

    index: int
    row: int
    group: int
    spec: int
    slot: int
    channel: int
    level: int
    origin: Triple
    extent: Triple
    grid: Triple
    residual: Floats
    axes: Triple
    start_mm: Floats
    spacing: Floats
    repeat: int


class Order:
    """Draws of one selection of a manifest.

    manifest: anything with `column(name)`, `value(i, name)`, `hash` and a length. rows: manifest rows to draw
    from (a split). tokens: slots of a row and row classes. mixture: weights, zoom range, groups. seed: of
    every choice. window: voxels of a fine-tuning crop, stem order; then every crop is cut at native
    resolution, one a row, at most this large.

    Attributes: `sources` (names), `wanted` (share of crops that the mixture asks for each), `weights` (share
    it gets, exactly, over a period of every lane), `composition`, `group_size`, `groups`, `batch_size`.

    Memory: one int32 a sample, held once a process and shared by forked workers, beside what the manifest
    maps. A draw costs tens of microseconds. Raises UserError for an empty selection and for a mixture that
    the data cannot give.
    """

    def __init__(
        self,
        manifest: Columns,
        rows: np.ndarray,
        tokens: TokenConfig,
        mixture: MixtureConfig,
        seed: int,
        window: Triple | None = None,
    ) -> None:
        self.tokens, self.mixture, self.seed, self.window = tokens, mixture, seed, window
        self.manifest = manifest
        rows = np.asarray(rows).astype(np.int32)
        if len(rows) == 0:
            raise UserError(
                "no sample to draw: the selected split, sources or modalities of the dataset are empty"
            )
        if (rows[1:] < rows[:-1]).any():
            rows = np.sort(rows)
        self.sources, source = source_codes(manifest, rows, mixture.by)
        self.wanted = wanted_shares(self.sources, source, mixture)
        kept = self.wanted[source] > 0
        self.left_out = int(len(rows) - kept.sum())
        if self.left_out:
            rows, source = rows[kept], source[kept]
        del kept

        self._map_columns()
        stratum, shares = self._compose(rows, source)
        self.groups = mixture.groups
        self.group_size = sum(spec.crops for spec in self.composition)
        self.batch_size = self.groups * self.group_size
        self._table = LaneTable(
            shares,
            [spec.crops for spec in self.composition],
            [spec.geometry for spec in self.composition],
            seed,
            self.groups,
        )
        self.weights = self._table.weights
        self._cells = self._deal(rows, source, stratum)

    def _compose(self, rows: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sets `composition`, `counts` and `merged`; the stratum of each row, and each source's share of
        each stratum.
        """
        kind = _kinds(self.manifest, rows)
        code = kind * len(self.tokens.classes) + self._row_classes(rows, kind)
        n = len(KINDS) * len(self.tokens.classes)
        by_code = np.bincount(source.astype(np.int64) * n + code, minlength=len(self.sources) * n)
        by_code = by_code.reshape(-1, n)
        codes = np.flatnonzero(by_code.any(axis=0))
        counts = by_code[:, codes]
        classes = len(self.tokens.classes)
        kinds = [KINDS[c // classes] for c in codes.tolist()]
        ks = [self.tokens.classes[c % classes] for c in codes.tolist()]

        present = counts.any(axis=1)
        by_source = self.wanted[present, None] * counts[present] / counts[present].sum(axis=1)[:, None]
        natural = np.array([math.fsum(column) for column in by_source.T])  # rounded alike everywhere
        joins = merge_rare(kinds, ks, natural.tolist(), self.mixture.rows_per_group)
        left = sorted(set(joins))
        self.merged = [
            (int(counts[:, c].sum()), kinds[c], ks[c], ks[into]) for c, into in enumerate(joins) if c != into
        ]
        into = np.array([left.index(j) for j in joins])
        self.counts = np.stack([counts[:, into == c].sum(axis=1) for c in range(len(left))], axis=1)
        per_group = compose(
            [math.fsum(natural[into == c]) for c in range(len(left))],
            [ks[c] for c in left],
            self.mixture.rows_per_group or len(joins),
        )
        self.composition = tuple(self._row_spec(kinds[c], ks[c], rows) for c, rows in zip(left, per_group))
        shares = np.zeros(self.counts.shape)
        crops = np.array([spec.crops for spec in self.composition], dtype=np.float64)
        shares[present] = stratum_shares(self.wanted[present], self.counts[present].astype(np.float64), crops)
        stratum_of = np.zeros(n, dtype=np.uint8)
        stratum_of[codes] = into
        return stratum_of[code], shares

    def _map_columns(self) -> None:
        self._shape = self.manifest.column("shape")
        self._spacing = self.manifest.column("spacing")
        self._axes = self.manifest.column("axes")
        self._levels = _level_columns(self.manifest)

    def __getstate__(self) -> dict[str, Any]:
        mapped = {"_shape", "_spacing", "_axes", "_levels"}
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_columns()

    @property
    def rows(self) -> np.ndarray:
        """Manifest rows that are drawn, ascending (int32)."""
        return np.sort(np.concatenate([cell.rows for cell in self._cells.values()]))

    def draw(self, i: int) -> Draw:
        """The i-th crop of the run, counted over updates, groups and the places of a group."""
        group, spec, slot, cell, n = self._locate(i)
        row, epoch = cell.sample(group, n // self.mixture.crops_per_volume)
        return self._crop(i, row, group, spec, slot, epoch, "crop")

    def group_draws(self, update: int, group: int) -> list[Draw]:
        """All crops of one group of one update, in the order of the lane; `spec` and `slot` say where each
        goes.
        """
        first = update * self.batch_size + group * self.group_size
        return [self.draw(first + j) for j in range(self.group_size)]

    def substitute(self, i: int, attempt: int) -> Draw:
        """A crop in place of the i-th, whose sample is damaged: of the same source, stratum and lane, from
        what the lane reads around that time.
        """
        group, spec, slot, cell, n = self._locate(i)
        row, epoch = cell.instead(group, n // self.mixture.crops_per_volume, attempt)
        return self._crop(i, row, group, spec, slot, epoch, f"crop-{attempt}")

    def row(self, i: int) -> int:
        """Manifest row of the i-th crop; in a fraction of the time of `draw`."""
        group, _, _, cell, n = self._locate(i)
        return cell.sample(group, n // self.mixture.crops_per_volume)[0]

    def keys(self, update: int) -> list[str]:
        """Keys of an update's samples, in the order of the draws; a damaged one's, not its substitute's."""
        first = update * self.batch_size
        rows = [self.row(i) for i in range(first, first + self.batch_size)]
        return [str(self.manifest.value(row, "key")) for row in rows]

    @property
    def token_slots(self) -> int:
        """Token slots of the crops of an update, filled or not."""
        return self.groups * sum(spec.crops * spec.capacity for spec in self.composition)

    def cells(self) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """Rows of each cell by its (number of the source, number of the `RowSpec`)."""
        for at, cell in sorted(self._cells.items()):
            yield at, cell.rows

    def source_of(self, i: int) -> str:
        """Name of the source that the i-th crop comes from (the sample is not looked up)."""
        return self.sources[self._table.at(*self._lane_position(i))[0]]

    def _lane_position(self, i: int) -> tuple[int, int]:
        update, place = divmod(i, self.batch_size)
        group, j = divmod(place, self.group_size)
        return group, update * self.group_size + j

    def _locate(self, i: int) -> tuple[int, int, int, Cell, int]:
        """Lane, stratum, slot, cell of the i-th crop, and how many of that cell the lane had before."""
        group, position = self._lane_position(i)
        spec, slot = self._table.places[position % self.group_size]
        source, n = self._table.at(group, position)
        return group, spec, slot, self._cells[source, spec], n

    def _crop(self, i: int, row: int, group: int, spec: int, slot: int, epoch: int, purpose: str) -> Draw:
        kind, capacity = self.composition[spec].geometry, self.composition[spec].capacity
        channels, *stored = self._shape[row].tolist()
        a, b, c = self._axes[row].tolist()
        shape = stored[a], stored[b], stored[c]
        u = uniforms(self.seed, i, purpose, 8)
        focus = self._focus(row, u[6:8]) if u[5] < self.mixture.foreground else None
        stem_focus = None if focus is None else (focus[a], focus[b], focus[c])
        if self.window is not None:
            box = window_box(shape, kind, self.window, u, stem_focus)
        else:
            levels = self._level_count(row)
            box = zoomed_box(shape, kind, capacity, self.mixture.scale, levels, u, stem_focus)
        native = self._spacing[row].tolist()
        step = _step(box, kind, (native[a], native[b], native[c]))
        (o0, o1, o2), (r0, r1, r2) = box.origin, box.residual
        return Draw(
            index=i,
            row=row,
            group=group,
            spec=spec,
            slot=slot,
            channel=int(u[4] * channels),
            level=box.level,
            origin=_stored(box.origin, a, b, c),
            extent=_stored(box.extent, a, b, c),
            grid=box.grid,
            residual=box.residual,
            axes=(a, b, c),
            start_mm=(o0 * step[0], o1 * step[1], o2 * step[2]),
            spacing=(step[0] * r0, step[1] * r1, step[2] * r2),
            repeat=epoch,
        )

    def _level_count(self, row: int) -> int:
        count = 1
        for offsets in self._levels:
            if not offsets[row] >= 0:  # −1, or NaN in a column with nulls
                break
            count += 1
        return count

    def _focus(self, row: int, u: Sequence[float]) -> Triple | None:
        """A listed voxel, stored (z, y, x): of a random labelled class, without labels of the content (class
        0); None if none is listed.
        """
        listed = [entry for entry in self.manifest.value(row, "foreground") or () if len(entry["voxels"])]
        listed = [entry for entry in listed if entry["class"] > 0] or listed
        if not listed:
            return None
        voxels = listed[int(u[0] * len(listed))]["voxels"]
        z, y, x = np.unravel_index(int(voxels[int(u[1] * len(voxels))]), tuple(self._shape[row][1:].tolist()))
        return int(z), int(y), int(x)

    def _row_classes(self, rows: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """Number of each sample's row class: the most crops a row can hold with room for the whole sample in
        each (uint8).
        """
        classes = np.zeros(len(rows), dtype=np.uint8)
        self._oversize = dict.fromkeys(KINDS, False)
        if self.window is not None:
            return classes
        patches = np.array([PATCH[name] for name in KINDS])
        for part in range(0, len(rows), 1 << 18):
            chunk = slice(part, part + (1 << 18))
            shape, axes = self._shape[rows[chunk]], self._axes[rows[chunk]].astype(np.int64)
            stem = np.take_along_axis(shape[:, 1:].astype(np.int64), axes, axis=1)
            tokens = np.prod(-(-stem // patches[kind[chunk]]), axis=1)
            for number, k in enumerate(self.tokens.classes):
                classes[chunk][tokens <= self.tokens.slots // k] = number
            for code in np.unique(kind[chunk][tokens > self.tokens.slots]).tolist():
                self._oversize[KINDS[code]] = True
        return classes

    def _row_spec(self, kind: str, k: int, rows: int) -> RowSpec:
        if self.window is not None:
            box = self.window
            capacity = int(np.prod([-(-w // p) for w, p in zip(box, PATCH[kind])]))
            return RowSpec(kind, k, rows, capacity, int(np.prod(box)))
        capacity = self.tokens.slots // k
        high = min(self.mixture.scale[1], MAX_RESIDUAL if k == 1 and self._oversize[kind] else 1.0)
        return RowSpec(kind, k, rows, capacity, largest_box(kind, capacity, high))

    def _deal(self, rows: np.ndarray, source: np.ndarray, stratum: np.ndarray) -> dict[tuple[int, int], Cell]:
        """The cells, with each its part of the shards that a lane may read at a time."""
        shard = text_codes(self.manifest, "shard", rows)[1]
        label = source * len(self.composition) + stratum
        if self.counts.size <= 1 << 16:
            label = label.astype(np.uint16)  # sorted by radix
        by_cell = np.argsort(label, kind="stable")
        ends = np.cumsum(self.counts.ravel())[:-1]
        rows, shard = rows[by_cell], shard[by_cell]
        there = np.flatnonzero(self.counts.ravel())
        parts = [part for part in np.split(rows, ends) if len(part)]
        shards = [part for part in np.split(shard, ends) if len(part)]
        pieces = [samples_per_shard(part) for part in shards]
        per_lane = [-(-len(part) // (self.groups * piece)) for part, piece in zip(parts, pieces)]
        windows = share_windows(self._table.cells.ravel()[there], per_lane, self.mixture.window_shards)
        cells = {}
        for number, part, own, piece, window in zip(there.tolist(), parts, shards, pieces, windows):
            s, c = divmod(number, len(self.composition))
            if self.groups > 1:
                part = part[dealing(own, _first_bytes(self.manifest, part), self.groups)]
            spec = self.composition[c]
            name = f"{self.sources[s]}:{spec.geometry}:{spec.k}"
            cells[s, c] = Cell(part, piece, self.groups, window, self.seed, name)
        return cells

    def epoch_updates(self) -> dict[tuple[int, int], float]:
        """Updates in which every sample of a cell is drawn once; keys as in `cells`."""
        rate = self._table.cells / self._table.length * self.batch_size / self.mixture.crops_per_volume
        return {at: len(rows) / float(rate[at]) for at, rows in self.cells()}

    def describe(self) -> str:
        """What a group holds, what rounding did to the weights, and how often samples come round."""
        return description(self)


def lanes_of(rank: int, world: int, groups: int) -> list[int | None]:
    """Lanes of a rank, contiguous, one a micro-step; None where it has fewer than ceil(groups / world)."""
    if not 0 <= rank < world or groups < 1:
        raise ValueError(f"rank {rank} of {world} with {groups} groups")
    steps = -(-groups // world)
    lanes: list[int | None] = list(range(rank * groups // world, (rank + 1) * groups // world))
    return lanes + [None] * (steps - len(lanes))


def _step(box: Box, kind: str, native: Floats) -> Floats:
    """Size in mm of one voxel of the box's level, stem order."""
    factor = float(1 << box.level)
    thick = native[0] * factor if kind == "volume" else native[0]
    return thick, native[1] * factor, native[2] * factor


def _stored(stem: Triple, a: int, b: int, c: int) -> Triple:
    stored = [0, 0, 0]
    stored[a], stored[b], stored[c] = stem
    return stored[0], stored[1], stored[2]


def _kinds(manifest: Columns, rows: np.ndarray) -> np.ndarray:
    """Number in `KINDS` of the geometry of each of these rows (uint8)."""
    found, codes = text_codes(manifest, "geometry", rows)
    unknown = [name for name in found if name not in KINDS]
    if unknown:
        raise UserError(
            f"manifest: geometry {unknown[0]!r} is not one of {', '.join(KINDS)}; build the dataset again"
        )
    return np.array([KINDS.index(name) for name in found], dtype=np.uint8)[codes]


def _first_bytes(manifest: Columns, rows: np.ndarray) -> np.ndarray:
    """Where each sample begins in its shard, in bytes; 0 for a manifest that does not say."""
    try:
        return manifest.column("json_offset")[rows]
    except KeyError:
        return np.zeros(len(rows), np.int64)


def _level_columns(manifest: Columns) -> list[np.ndarray]:
    """Offsets of the reduced levels by row, −1 where there is none; empty for a manifest without them."""
    try:
        return [manifest.column("l1_offset"), manifest.column("l2_offset")]
    except KeyError:
        return []
