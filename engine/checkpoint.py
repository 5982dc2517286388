"""Checkpoints in our own format: named slices, checked when read, whole or not there.

    RUN/checkpoints/update-00000500/
        rank-00000.safetensors …   what each rank owned: "NAME|master", "NAME|exp_avg", "NAME|exp_avg_sq" as
                                   flat float32 slices; rank 0 adds "NAME|frozen" and "NAME|buffer", whole
        state.json                 counts, position, schedule, segments, format version, recipe, manifest hash
        encoder.safetensors, …     weights for use, written by the task
        complete.json              size and hash of every other file, written last

The header of a rank file says for every key its global shape, flat element offset and element count. World
size, ZeRO stage and DeepSpeed version are not in the format: whoever loads reads the ranges it owns,
whichever ranks wrote them. A folder is filled under a hidden name, flushed, and renamed when complete (by
`engine/saver.py`). Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.distributed import World
from engine.errors import UserError
from engine.tensor_file import HASH, entry_of, flush
from engine.verdict import read_attempt

FORMAT_VERSION = 1
READ_AGAIN = (1.0, 2.0, 4.0)  # seconds until a file that could not be read is tried again
# Not the fault of a checkpoint: its storage is away, or this process may not or cannot read there.
NOT_DAMAGE = {
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ESHUTDOWN, errno.ENODEV,
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip
WEIGHTS = ("master", "frozen", "buffer")  # kinds of what the model itself holds


class TakenOver(RuntimeError):
    """A later launch of the run has begun: this one may write no checkpoint any more."""


@dataclass(frozen=True)
class Record:
    """Where one flat slice lies."""

    file: Path
    key: str
    shape: tuple[int, ...]
    offset: int
    numel: int


class Checkpoint:
    """A verified checkpoint folder.

    Attributes:
        folder: where it is.
        state: what `state.json` holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self._records: dict[str, list[Record]] = {}
        for file in sorted(folder.glob("rank-*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                slices = json.loads(opened.metadata()["slices"])
            for key, where in slices.items():
                record = Record(file, key, tuple(where["global_shape"]), where["offset"], where["numel"])
                self._records.setdefault(key, []).append(record)
        for records in self._records.values():
            records.sort(key=lambda r: r.offset)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter and persistent buffer of the model."""
        return {name: records[0].shape for name, kind, records in self._by_name() if kind in WEIGHTS}

    def model_state(self) -> dict[str, Tensor]:
        """Every parameter (float32) and persistent buffer of the model, whole, on the CPU."""
        state = {}
        for name, kind, records in self._by_name():
            if kind in WEIGHTS:
                shape = torch.Size(records[0].shape)
                state[name] = self.read(f"{name}|{kind}", 0, shape.numel()).view(shape)
        return state

    def read(self, key: str, start: int, numel: int) -> Tensor:
        """Elements `start … start + numel` of a flattened tensor, joined from the files that hold them.

        Args:
            key: `NAME|master`, `NAME|exp_avg`, `NAME|exp_avg_sq`, `NAME|frozen` or `NAME|buffer`.
            start, numel: in elements.

        Raises:
            UserError: the checkpoint does not hold all of it.
        """
        parts, position = [], start
        for record in self._records.get(key, ()):
            low, high = max(position, record.offset), min(start + numel, record.offset + record.numel)
            if low < high or (numel == 0 and record.numel == 0):
                if low != position:
                    break
                with safe_open(record.file, framework="pt") as opened:
                    parts.append(opened.get_slice(record.key)[low - record.offset : high - record.offset])
                position = high
        if position != start + numel or not parts:
            raise UserError(
                f"{self.folder}: {key} lacks elements {position} to {start + numel}; it is not whole"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _by_name(self) -> Iterator[tuple[str, str, list[Record]]]:
        for key, records in self._records.items():
            name, _, kind = key.rpartition("|")
            yield name, kind, records


def newest(
    run: Path, world: World, warn: Callable[[str], None], at_most: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint that passes every check, or None where the run has none at all.

    Ranks share the hashing. A damaged checkpoint is named through `warn` and the next older one is tried.

    Args:
        run: run folder.
        world: all ranks call this together.
        warn: told of each damaged checkpoint.
        at_most: leave out those of later updates.

    Raises:
        UserError: there are checkpoints, but none is good; or the newest good one has a newer format.
        OSError: they cannot be listed or read, for no fault of theirs.
    """
    folders = sorted(_listed(run), reverse=True)
    names = world.from_first([p.name for p in folders if at_most is None or update_of(p) <= at_most])
    reasons = []
    for name in names:
        folder = run / "checkpoints" / name
        faults = [found for found in world.gather(fault(folder, world.rank, world.size)) if found]
        if not faults:
            checkpoint = Checkpoint(folder)
            if (version := checkpoint.state.get("format_version")) != FORMAT_VERSION:
                raise UserError(
                    f"{folder}: format version {version}; this medfm reads {FORMAT_VERSION}: update it"
                )
            return checkpoint
        reasons.append(f"{folder}: {faults[0]}")
        warn(f"damaged checkpoint left out: {reasons[-1]}")
    if reasons:
        raise UserError(
            f"no good checkpoint in {run / 'checkpoints'} ({reasons[0]}); move it away to start afresh"
        )
    return None


def _listed(run: Path) -> list[Path]:
    """The checkpoint folders; `glob` would take some folders that cannot be read for empty ones."""
    try:
        names = os.listdir(run / "checkpoints")
    except FileNotFoundError:
        return []
    return [run / "checkpoints" / name for name in names if name.startswith("update-")]


def fault(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """What is wrong with this rank's share of a checkpoint's files, or an empty string.

    Raises:
        OSError: they cannot be read, again and again, for no fault of theirs.
    """
    for pause in READ_AGAIN:
        with suppress(OSError):
            return _fault(folder, rank, ranks)
        time.sleep(pause)
    try:
        return _fault(folder, rank, ranks)
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise
        return str(error.strerror)


def _fault(folder: Path, rank: int, ranks: int) -> str:
    name = "complete.json"
    try:
        complete = json.loads((folder / name).read_text(encoding="utf-8"))
        listed = complete["files"]
        if complete["hash"] != HASH or "state.json" not in listed:
            return "complete.json is of another kind"
        for name, entry in sorted(listed.items())[rank::ranks]:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if entry_of(folder / name) != entry:
                return f"{name} is not what was written (its hash differs)"
    except FileNotFoundError:
        return f"{name} is missing" + (", so it was never finished" if name == "complete.json" else "")
    except OSError as error:
        raise OSError(error.errno, f"{name} cannot be read ({error.strerror})", str(folder)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"complete.json cannot be read ({type(error).__name__})"
    return ""


def update_of(folder: Path) -> int:
    """The update after which a checkpoint folder was saved, by its name; -1 where the name has none."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def folder_of(run: Path, update: int) -> Path:
    """Where the checkpoint of an update lies."""
    return run / "checkpoints" / f"update-{update:08d}"


def seal(
    scratch: Path,
    files: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
    export: Callable[[Mapping[str, Tensor], Path], None],
) -> None:
    """Add what makes the ranks' files a checkpoint: state, weights for use, and the list of all files.

    Args:
        scratch: folder with the file of every rank, flushed.
        files: size and hash of those, by name.
        state: content of `state.json`.
        export: writes the weights for use from the whole float32 state dict.

    Raises:
        OSError, UserError: the disk did not take it, or a rank's file is not there.
    """
    for name, entry in files.items():
        if not (scratch / name).is_file():
            raise OSError(f"{scratch / name} is not there; all hosts must see the same run folder")
        if (size := (scratch / name).stat().st_size) != entry["size"]:
            raise OSError(f"{scratch / name} has {size} bytes here instead of {entry['size']}")
    _write(scratch / "state.json", {"format_version": FORMAT_VERSION, **state})
    export(Checkpoint(scratch).model_state(), scratch)
    listed = dict(files)
    for path in sorted(scratch.rglob("*")):
        name = path.relative_to(scratch).as_posix()
        if name not in files:
            flush(path)
            if path.is_file():
                listed[name] = entry_of(path)
    _write(scratch / "complete.json", {"hash": HASH, "files": listed})
    flush(scratch)


def put_in_place(run: Path, attempt: int, scratch: Path, update: int) -> Path:
    """Give a sealed folder its name, in place of an older save of the same update.

    Raises:
        TakenOver: a later launch has begun; nothing was replaced.
        OSError: the disk did not take it, or the run folder is gone.
    """
    final = folder_of(run, update)
    replaced = final.with_name(f".old-{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    if (now := read_attempt(run)) > attempt:
        _remove(scratch)
        raise TakenOver(f"launch {now} of this run has taken over from launch {attempt}")
    if now != attempt:
        raise OSError(f"{run / 'attempt'} does not hold the number of this launch, {attempt}")
    if final.exists():
        final.rename(replaced)
    try:
        scratch.rename(final)
    except OSError:
        with suppress(OSError):
            replaced.rename(final)
        raise
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def tidy(run: Path) -> None:
    """Clear what interrupted saves left behind; an old folder that was being replaced gets its name back.

    What is cleared loses its name first: a writer of the launch before this one that still lives can then
    no longer rename a folder of which half is gone.
    """
    for left in (run / "checkpoints").glob(".*-update-*"):
        final = left.with_name(left.name.removeprefix(".old-"))
        if left.name.startswith(".old-") and not final.exists():
            with suppress(FileNotFoundError):  # given back by its own launch
                left.rename(final)
        else:
            _remove(left)


def prune(
    run: Path,
    newest: Path,
    keep_last: int,
    keep_every: int,
    keep: Callable[[int], bool] = lambda update: False,
) -> None:
    """Delete all but the newest `keep_last` checkpoints, those at multiples of `keep_every` and those that
    `keep` asks for by their update.

    `newest` is the one just saved. Later ones are damaged and were left out when the run resumed: they
    count for nothing, or they would push out the good one.
    """
    folders = sorted(p for p in (run / "checkpoints").glob("update-*") if p.name <= newest.name)
    for folder in folders[:-keep_last]:
        update = update_of(folder)
        if not (keep_every and update % keep_every == 0) and not keep(update):
            _remove(folder)


def set_aside(run: Path, after: int, label: str) -> list[str]:
    """Rename the checkpoints of updates later than `after` to `LABEL-update-…`: they are kept for people, but
    no run resumes from them. Returns their new names; one that has that name already is replaced."""
    names = []
    for folder in sorted((run / "checkpoints").glob("update-*"), reverse=True):
        if update_of(folder) > after:
            aside = folder.with_name(f"{label}-{folder.name}")
            if aside.exists():
                _remove(aside)
            folder.rename(aside)
            names.append(aside.name)
    if names:
        flush(run / "checkpoints")
    return names


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """JSON, in a folder that is there: one that was deleted is not made again."""
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(file)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that none sees half of it."""
    doomed = folder.with_name(f".gone-{folder.name.lstrip('.')}")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
