"""`manifest.parquet`: one row a sample, sorted by shard and offset; mapped once a node for all workers.

The Parquet file is the dataset's own, compressed and portable. At open it is rewritten, once per node and
dataset, as uncompressed Arrow in a cache folder, which every process maps: ten million rows cost no memory
per worker. The copy holds one Arrow stream a column, one after another, so that it is written column by
column.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import UserError
from data_pipeline.remote_files import RemoteFiles

FORMAT_VERSION = 2
OPEN_PATIENCE_S = 60.0  # for a store that does not answer
MEMBERS = ("image", "l1", "l2", "seg", "hide", "idx", "json")
SUFFIX = {
    "image": "b2nd",
    "l1": "l1.b2nd",
    "l2": "l2.b2nd",
    "seg": "seg.b2nd",
    "hide": "hide.b2nd",
    "idx": "idx",
    "json": "json",
}
_FOREGROUND = pa.struct([("class", pa.int32()), ("layer", pa.int32()), ("voxels", pa.list_(pa.int32()))])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("subject", pa.string()),
        ("modality", pa.string()),
        ("modalities", pa.list_(pa.string())),
        ("channels", pa.list_(pa.string())),
        ("sequence", pa.string()),
        ("geometry", pa.string()),
        ("axes", pa.list_(pa.int8(), 3)),
        ("shape", pa.list_(pa.int32(), 4)),
        ("spacing", pa.list_(pa.float32(), 3)),
        ("spacing_source", pa.string()),
        ("dtype", pa.string()),
        ("max_error", pa.float64()),
        ("levels", pa.list_(pa.list_(pa.int8(), 3))),
        ("norm", pa.list_(pa.list_(pa.float64(), 7))),
        *((f"{member}_{what}", pa.int64()) for member in MEMBERS for what in ("offset", "size")),
        ("content_hash", pa.string()),
        ("label_origin", pa.string()),
        ("annotated", pa.list_(pa.string())),
        ("classes", pa.list_(pa.string())),
        ("foreground", pa.list_(_FOREGROUND)),
        ("valid_fraction", pa.float32()),
    ]
)


def cache_folder() -> Path:
    """Where Arrow copies of manifests are kept: `MEDFM_CACHE`, else the user's cache folder, else a
    temporary one.
    """
    wanted = os.environ.get("MEDFM_CACHE")
    home = (
        Path(wanted) if wanted else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "medfm"
    )
    for folder in (
        home,
        Path(tempfile.gettempdir()) / f"medfm-{os.getuid() if hasattr(os, 'getuid') else 0}",
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UserError(f"no writable cache folder: {home} cannot be written; set MEDFM_CACHE to one that can")


def manifest_bytes(rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows, sorted by (shard, image_offset), as a Parquet file."""
    ordered = sorted(rows, key=lambda row: (row["shard"], row["image_offset"]))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ordered, schema=SCHEMA), sink, compression="zstd")
    return bytes(sink.getvalue())


def write_manifest(rows: Iterable[dict[str, Any]], path: Path) -> str:
    """Write `manifest_bytes`; returns the sha256 hex of the file."""
    data = manifest_bytes(rows)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


class Manifest:
    """The rows of a dataset. Open with `Manifest.open`; picklable (a copy maps the same file again).

    Attributes: `root` (folder, or address as text), `hash` (sha256 hex of `manifest.parquet`), `info`
    (`dataset.json`).
    """

    root: Path | str
    hash: str
    info: dict[str, Any]

    def __init__(self, root: Path | str, digest: str, info: dict[str, Any], arrow: Path) -> None:
        self.root, self.hash, self.info, self._arrow = root, digest, info, arrow
        self._map: mmap.mmap | None = None
        self._table: pa.Table | None = None
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, root: str | Path, *, check_shards: bool = True) -> Manifest:
        """Open the dataset at `root` (a local folder or an fsspec address).

        Raises `UserError` when there is no dataset there, its version is unknown, the manifest is not the
        one the dataset was built with, or a shard is missing or has another size than was written.
        """
        text = os.fspath(root)
        place: Path | str = text.rstrip("/") if "://" in text else Path(text)
        parquet = place / "manifest.parquet" if isinstance(place, Path) else _read(place, "manifest.parquet")
        digest, info = _sha256(parquet), _information(place)
        if info.get("manifest_sha256") != digest:
            raise UserError(
                f"manifest.parquet in {root} is not the one that dataset.json names; restore or rebuild it"
            )
        if check_shards and isinstance(place, Path):
            _check_shards(place, info)
        return cls(place, digest, info, _copied(parquet, digest))

    @classmethod
    def of(cls, root: Path | str, parquet: bytes, info: dict[str, Any]) -> Manifest:
        """The manifest of a dataset at `root` whose two files are at hand."""
        digest = _sha256(parquet)
        return cls(root, digest, info, _copied(parquet, digest))

    @property
    def table(self) -> pa.Table:
        """The mapped Arrow table (zero-copy until a column is converted)."""
        if self._table is None:
            with open(self._arrow, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            streams = pa.BufferReader(pa.py_buffer(self._map))
            columns = [pa.ipc.open_stream(streams).read_all().column(0) for _ in SCHEMA]
            self._table = pa.Table.from_arrays(columns, schema=SCHEMA)
        return self._table

    def release(self) -> None:
        """Let go of the pages of the map that this process has touched; they stay in the page cache.

        Pages that no other process has touched count as its own memory, and over a long run that is every
        page.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> np.ndarray:
        """One column: numbers as an array, fixed triples and shapes as (n, 3) or (n, 4), both mapped; the
        rest as objects, equal texts as one and the same.
        """
        if name not in self._columns:
            column = self.table.column(name)
            kind = column.type
            if pa.types.is_fixed_size_list(kind):
                flat = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
                values = flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, kind.list_size)
            elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
                values = column.to_numpy()
            elif pa.types.is_string(kind):
                coded = column.combine_chunks().dictionary_encode(null_encoding="encode")
                values = np.array(coded.dictionary.to_pylist(), object)[coded.indices.to_numpy()]
            else:
                values = np.empty(len(column), object)
                values[:] = column.to_pylist()
            self._columns[name] = values
        return self._columns[name]

    def value(self, i: int, name: str) -> Any:
        """One value of row `i` in Python; a column of texts would take memory for every row."""
        return self.table.column(name)[int(i)].as_py()

    def row(self, i: int) -> dict[str, Any]:
        """Every column of row `i` as Python values."""
        found: dict[str, Any] = self.table.slice(int(i), 1).to_pylist()[0]
        return found

    def select(
        self,
        split: str | None = None,
        source: str | None = None,
        modality: str | None = None,
        labelled: bool | None = None,
    ) -> np.ndarray:
        """Row numbers, ascending, that match every condition given. `labelled`: has a `seg` member."""
        keep = np.ones(len(self), bool)
        for name, wanted in (("split", split), ("source", source), ("modality", modality)):
            if wanted is not None:
                match = pc.fill_null(pc.equal(self.table.column(name), wanted), False)
                keep &= match.to_numpy()
        if labelled is not None:
            keep &= (self.column("seg_size") > 0) == labelled
        return np.flatnonzero(keep)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "hash": self.hash, "info": self.info, "_arrow": self._arrow}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _map=None, _table=None, _columns={})


def _read(place: Path | str, name: str) -> bytes:
    try:
        if isinstance(place, Path):
            return (place / name).read_bytes()
        files = RemoteFiles(place, patience_s=OPEN_PATIENCE_S)
        try:
            return files.whole(name)
        finally:
            files.close()
    except OSError as error:
        raise _no_dataset(place, name) from error


def _no_dataset(place: Path | str, name: str) -> UserError:
    return UserError(
        f"{place} is not a shard dataset: {name} cannot be read; give what `medfm shards build` made"
    )


def _sha256(data: Path | bytes) -> str:
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    try:
        with data.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _no_dataset(data.parent, data.name) from error


def _information(place: Path | str) -> dict[str, Any]:
    try:
        info = json.loads(_read(place, "dataset.json"))
    except ValueError as error:
        raise UserError(
            f"dataset.json in {place} is not valid JSON; restore it or rebuild the dataset"
        ) from error
    if not isinstance(info, dict) or info.get("format_version") != FORMAT_VERSION:
        version = info.get("format_version") if isinstance(info, dict) else None
        raise UserError(
            f"{place} has dataset format {version!r}, not {FORMAT_VERSION}; rebuild it or update medfm"
        )
    return info


def _check_shards(root: Path, info: dict[str, Any]) -> None:
    missing, wrong = [], []
    for shard in info["shards"]:
        try:
            size = (root / shard["name"]).stat().st_size
        except OSError:
            missing.append(shard["name"])
            continue
        if size != shard["size"]:
            wrong.append(f"{shard['name']} ({size} bytes, {shard['size']} written)")
    for fault, names in (("missing", missing), ("of the wrong size", wrong)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"shard {fault} in {root}: {names[0]}{more}; copy it again or rebuild the dataset"
            )


def _copied(parquet: Path | bytes, digest: str) -> Path:
    """The Arrow copy of a manifest; written by the first process of a node that asks for it."""
    path = cache_folder() / f"manifest-{digest[:32]}.columns"
    if not path.is_file():
        with _alone_in(path.parent) as alone:
            if not path.is_file():
                for leftover in path.parent.glob(f"{path.stem}*.partial") if alone else ():
                    leftover.unlink(missing_ok=True)
                _write_columns(parquet, path)
    return path


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """One process of the node at a time; false where the system or the folder has no locks, and work may be
    done twice.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _write_columns(parquet: Path | bytes, path: Path) -> None:
    """Write the manifest uncompressed beside its final name, then rename.

    A column of numbers is one batch, so that it can be used where it is mapped. Others may be of any size and
    are never held whole.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    os.close(handle)
    try:
        with (
            pq.ParquetFile(pa.BufferReader(parquet) if isinstance(parquet, bytes) else parquet) as source,
            pa.OSFile(temporary, "wb") as sink,
        ):
            for field in SCHEMA:
                schema = pa.schema([field])
                parts: Iterator[pa.Table] = (
                    pa.Table.from_batches([batch]).cast(schema)
                    for batch in source.iter_batches(batch_size=1 << 16, columns=[field.name])
                )
                if field.name not in source.schema_arrow.names:  # newer than the dataset
                    absent = pa.nulls(source.metadata.num_rows, field.type)
                    parts = iter([pa.table([absent], schema=schema)])
                if pa.types.is_fixed_size_list(field.type) or pa.types.is_primitive(field.type):
                    parts = iter([pa.concat_tables([schema.empty_table(), *parts]).combine_chunks()])
                with pa.ipc.new_stream(sink, schema) as writer:
                    for part in parts:
                        writer.write_table(part)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (KeyError, ValueError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            "manifest.parquet has other columns than this medfm expects; rebuild the dataset"
        ) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
