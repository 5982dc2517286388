"""Which sample comes i-th and which crop is cut from it: a pure function of (manifest, mixture, seed, i).

A batch is `groups` groups; a group is the smallest unit a rank can take and has a constant composition:
`RowSpec.rows` rows of `RowSpec.k` crops for each stratum, a geometry and row class. Group g of every update
forms lane g, which has its own samples. In each stratum of a lane, every prefix holds each source less than
one crop from its share; over all strata the error is below one for each stratum that the source shares with
another. Nothing here knows of ranks, workers or history, so a resume is one integer and every split of the
work gives the same sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data_pipeline.crops import MAX_RESIDUAL, Box, Floats, window_box, zoomed_box
from data_pipeline.epochs import Cell, shard_starts
from data_pipeline.errors import UserError
from data_pipeline.geometry import PATCH, TokenConfig, Triple, largest_box
from data_pipeline.rng import uniforms
from data_pipeline.schedule import MixtureConfig, compose, lane_table, source_table, stratum_shares

KINDS = ("volume", "slab", "planar")
#: Of the rule by which samples are drawn; a run that was started under another is not resumed silently.
ORDER_VERSION = 2


class Columns(Protocol):
    """What the order reads of a manifest; `row` only for crops placed over labelled voxels."""

    hash: str

    def __len__(self) -> int: ...
    def column(self, name: str) -> np.ndarray: ...
    def row(self, i: int) -> dict[str, Any]: ...


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

    manifest: anything with `column(name)`, `row(i)`, `hash` and a length. rows: manifest rows to draw from (a
    split). tokens: slots of a row and row classes. mixture: weights, zoom range, groups. seed: of every
    choice. window: voxels of a fine-tuning crop, stem order; then every crop is cut at native resolution, one
    a row, at most this large.

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
        rows = np.sort(np.asarray(rows, dtype=np.int64))
        if len(rows) == 0:
            raise UserError(
                "no sample to draw: the selected split, sources or modalities of the dataset are empty"
            )
        self.sources, source = _source_codes(manifest, rows, mixture)
        self.wanted = _wanted(self.sources, source, mixture)
        kept = self.wanted[source] > 0
        self.left_out = int(len(rows) - kept.sum())
        rows, source = rows[kept], source[kept]

        self._map_columns()
        kind = _kinds(manifest, rows)
        counted = self._row_classes(rows, kind)
        strata, stratum = np.unique(kind * 1024 + counted, return_inverse=True)
        kinds, ks = [KINDS[code // 1024] for code in strata.tolist()], (strata % 1024).tolist()

        counts = np.zeros((len(self.sources), len(strata)))
        np.add.at(counts, (source, stratum), 1)
        present = counts.sum(axis=1) > 0
        natural = self.wanted[present, None] * counts[present] / counts[present].sum(axis=1, keepdims=True)
        per_group = compose(natural.sum(axis=0).tolist(), ks, mixture.rows_per_group)
        self.composition = tuple(
            self._row_spec(kind_name, k, n) for kind_name, k, n in zip(kinds, ks, per_group)
        )
        crops = np.array([spec.crops for spec in self.composition], dtype=np.float64)
        shares = np.zeros_like(counts)
        shares[present] = stratum_shares(self.wanted[present], counts[present], crops)
        self.group_size = int(crops.sum())
        self.groups = mixture.groups
        self.batch_size = self.groups * self.group_size
        self._ends = np.cumsum(crops).astype(int).tolist()
        self._base = [source_table(shares[:, j]) for j in range(len(strata))]
        #: Share of crops of each source that the composition gives, beside `wanted`.
        self.weights = self._table_shares() @ (crops / crops.sum())
        self.counts = counts.astype(int)
        self._lane = lru_cache(maxsize=None)(self._lane_schedule)
        self._cells = self._deal(rows, source, stratum)

    def _map_columns(self) -> None:
        self._shape = self.manifest.column("shape")
        self._spacing = self.manifest.column("spacing")
        self._axes = self.manifest.column("axes")
        self._levels = _level_columns(self.manifest)

    def __getstate__(self) -> dict[str, Any]:
        mapped = {"_lane", "_shape", "_spacing", "_axes", "_levels"}
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_columns()
        self._lane = lru_cache(maxsize=None)(self._lane_schedule)

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
        """All crops of one group of one update, in the order of its composition."""
        first = update * self.batch_size + group * self.group_size
        return [self.draw(first + j) for j in range(self.group_size)]

    def substitute(self, i: int, attempt: int) -> Draw:
        """A crop in place of the i-th, whose sample is damaged: of the same source, stratum and lane."""
        group, spec, slot, cell, _ = self._locate(i)
        low, high = cell.lane_range(group)
        u = uniforms(self.seed, i, f"substitute-{attempt}", 1)[0]
        return self._crop(
            i, int(cell.rows[low + int(u * (high - low))]), group, spec, slot, 0, f"crop-{attempt}"
        )

    def row(self, i: int) -> int:
        """Manifest row of the i-th crop; in a fraction of the time of `draw`."""
        group, _, _, cell, n = self._locate(i)
        return cell.sample(group, n // self.mixture.crops_per_volume)[0]

    def cells(self) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """Rows of each cell by its (number of the source, number of the `RowSpec`)."""
        for at, cell in sorted(self._cells.items()):
            yield at, cell.rows

    def source_of(self, i: int) -> str:
        """Name of the source that the i-th crop comes from (the sample is not looked up)."""
        group, spec, slot = self._place(i)
        return self.sources[self._source_at(group, spec, self._nth(i, spec, slot))[0]]

    def _place(self, i: int) -> tuple[int, int, int]:
        group, j = divmod(i % self.batch_size, self.group_size)
        spec = 0
        while j >= self._ends[spec]:
            spec += 1
        return group, spec, j - self._ends[spec] + self.composition[spec].crops

    def _nth(self, i: int, spec: int, slot: int) -> int:
        return i // self.batch_size * self.composition[spec].crops + slot

    def _source_at(self, group: int, spec: int, n: int) -> tuple[int, int]:
        """Source of the n-th crop of a lane in a stratum, and how many of that source the lane had before."""
        source, before, per_period = self._lane(group, spec)
        period, position = divmod(n, len(source))
        code = int(source[position])
        return code, period * per_period[code] + int(before[position])

    def _locate(self, i: int) -> tuple[int, int, int, Cell, int]:
        group, spec, slot = self._place(i)
        source, n = self._source_at(group, spec, self._nth(i, spec, slot))
        return group, spec, slot, self._cells[source, spec], n

    def _lane_schedule(self, group: int, spec: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        source = lane_table(*self._base[spec], self.seed, group, str(spec))
        before = np.empty_like(source)
        per_period = [0] * len(self.sources)
        for code in np.unique(source).tolist():
            at = np.flatnonzero(source == code)
            before[at] = np.arange(len(at))
            per_period[code] = len(at)
        return source, before, per_period

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
            if offsets[row] < 0:
                break
            count += 1
        return count

    def _focus(self, row: int, u: Sequence[float]) -> Triple | None:
        """A labelled voxel, stored (z, y, x), listed for a random class; None if none is listed."""
        listed = [entry for entry in self.manifest.row(row).get("foreground") or () if len(entry["voxels"])]
        if not listed:
            return None
        voxels = listed[int(u[0] * len(listed))]["voxels"]
        z, y, x = np.unravel_index(int(voxels[int(u[1] * len(voxels))]), tuple(self._shape[row][1:].tolist()))
        return int(z), int(y), int(x)

    def _row_classes(self, rows: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """Row class of each sample: the most crops a row can hold with room for the whole sample in each."""
        classes = np.ones(len(rows), dtype=np.int64)
        self._oversize = dict.fromkeys(KINDS, False)
        if self.window is not None:
            return classes
        patches = np.array([PATCH[name] for name in KINDS])
        for part in range(0, len(rows), 1 << 18):
            chunk = slice(part, part + (1 << 18))
            stem = np.take_along_axis(
                self._shape[rows[chunk], 1:], self._axes[rows[chunk]].astype(np.int64), axis=1
            )
            tokens = np.prod(-(-stem.astype(np.int64) // patches[kind[chunk]]), axis=1)
            for k in self.tokens.classes:
                classes[chunk][tokens <= self.tokens.slots // k] = k
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
        shard = _factorize(self.manifest, "shard", rows)[1]
        label = source * len(self.composition) + stratum
        by_cell = np.argsort(label, kind="stable")
        labels, first = np.unique(label[by_cell], return_index=True)
        rows32 = rows.astype(np.int32)
        cells = {}
        for code, members in zip(labels.tolist(), np.split(by_cell, first[1:])):
            at = divmod(code, len(self.composition))
            spec = self.composition[at[1]]
            name = f"{self.sources[at[0]]}:{spec.geometry}:{spec.k}"
            cells[at] = Cell(
                rows32[members],
                shard_starts(shard[members]),
                self.groups,
                self.mixture.window_shards,
                self.seed,
                name,
            )
        return cells

    def _table_shares(self) -> np.ndarray:
        """Share of each source in each stratum as the periodic tables give it, (sources, strata)."""
        n = len(self.sources)
        return np.stack([np.bincount(t[0], minlength=n) / len(t[0]) for t in self._base], axis=1)

    def describe(self) -> str:
        """What a group holds, what rounding did to the weights, and how often samples come round."""
        lines = [
            f"batch: {self.groups} groups of {self.group_size} crops = {self.batch_size} crops an update",
            "group: "
            + ", ".join(
                f"{s.rows} × {s.geometry} rows of {s.k} (≤ {s.capacity} tokens)" for s in self.composition
            ),
        ]
        for s, name in enumerate(self.sources):
            if self.wanted[s] == 0:
                lines.append(f"source {name}: weight 0, left out")
                continue
            lines.append(
                f"source {name}: {self.counts[s].sum()} samples, {self.weights[s]:.2%} of crops (wanted "
                f"{self.wanted[s]:.2%}; the difference comes from rounding a group to whole rows)"
            )
        for (source, j), cell in sorted(self._cells.items()):
            spec = self.composition[j]
            per_update = (
                self._table_shares()[source, j] * spec.crops * self.groups / self.mixture.crops_per_volume
            )
            dealt = "dealt by shard" if cell.by_shard else "shared by all lanes (few shards or samples)"
            lines.append(
                f"  {self.sources[source]} {spec.geometry} of {spec.k}: {len(cell.rows)} samples {dealt}, "
                f"an epoch every {len(cell.rows) / per_update:.1f} updates"
            )
        if self.left_out:
            lines.append(f"{self.left_out} samples of weight 0 are never drawn")
        return "\n".join(lines)


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


def _factorize(manifest: Columns, name: str, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Distinct texts of a column in these rows, sorted, and the number of each row's text among them."""
    table = getattr(manifest, "table", None)
    if table is None:
        values = manifest.column(name)[rows]
        encoded = pa.array(values.tolist()).dictionary_encode()
    else:  # straight from the mapped file: no Python text a sample
        encoded = table.column(name).take(pa.array(rows)).combine_chunks().dictionary_encode()
    names = [str(text) for text in encoded.dictionary.to_pylist()]
    ranking = np.argsort(np.argsort(np.array(names), kind="stable"), kind="stable")
    return sorted(names), ranking[encoded.indices.to_numpy(zero_copy_only=False)]


def _kinds(manifest: Columns, rows: np.ndarray) -> np.ndarray:
    """Number in `KINDS` of the geometry of each of these rows."""
    found, codes = _factorize(manifest, "geometry", rows)
    unknown = [name for name in found if name not in KINDS]
    if unknown:
        raise UserError(
            f"manifest: geometry {unknown[0]!r} is not one of {', '.join(KINDS)}; build the dataset again"
        )
    return np.array([KINDS.index(name) for name in found])[codes]


def _source_codes(
    manifest: Columns, rows: np.ndarray, mixture: MixtureConfig
) -> tuple[list[str], np.ndarray]:
    if mixture.by not in ("modality", "source"):
        raise UserError(
            f"mixture.by is {mixture.by!r}; it names the manifest column to weigh by: modality or source"
        )
    return _factorize(manifest, mixture.by, rows)


def _wanted(sources: list[str], source: np.ndarray, mixture: MixtureConfig) -> np.ndarray:
    """Share of crops wanted of each source, summing to 1."""
    if mixture.weights is None:
        share = np.sqrt(np.bincount(source, minlength=len(sources)))
    else:
        named, there = set(mixture.weights), set(sources)
        if named != there:
            odd = sorted(there - named) or sorted(named - there)
            wrong = (
                "has no weight (0 leaves it out)"
                if there - named
                else f"is not in the data ({', '.join(sources)})"
            )
            raise UserError(f"mixture.weights: {mixture.by} {odd[0]!r} {wrong}")
        share = np.array([mixture.weights[name] for name in sources])
    if share.sum() == 0:
        raise UserError("mixture.weights: every source in the data has weight 0; give one of them more")
    return share / share.sum()


def _level_columns(manifest: Columns) -> list[np.ndarray]:
    """Offsets of the reduced levels by row, −1 where there is none; empty for a manifest without them."""
    try:
        return [manifest.column("l1_offset"), manifest.column("l2_offset")]
    except KeyError:
        return []
