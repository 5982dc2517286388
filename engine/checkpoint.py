"""Checkpoints in our own format: named slices, checked when read, whole or not there.

    RUN/checkpoints/update-00000500/
        rank-00000.safetensors …   what each rank owned: "NAME|master", "NAME|exp_avg", "NAME|exp_avg_sq" as
                                   flat float32 slices; rank 0 adds "NAME|frozen" and "NAME|buffer", whole
        state.json                 counts, position, schedule, segments, format version, recipe, manifest hash
        encoder.safetensors, …     weights for use, written by the task
        complete.json              size and hash of every other file, written last

The header of a rank file says for every key its global shape, flat element offset and element count. World
size, ZeRO stage and DeepSpeed version are not in the format: whoever loads reads the ranges it owns,
whichever ranks wrote them. A folder is filled under a hidden name, flushed, and renamed when complete.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.distributed import World
from engine.errors import UserError
from engine.verdict import read_attempt, write_text
from engine.zero_state import MOMENTS, Partition, Slice

FORMAT_VERSION = 1
HASH = "xxh3_128"


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

    def model_state(self) -> dict[str, Tensor]:
        """Every parameter (float32) and persistent buffer of the model, whole, on the CPU."""
        state = {}
        for key, records in self._records.items():
            name, _, kind = key.rpartition("|")
            if kind in ("master", "frozen", "buffer"):
                shape = records[0].shape
                state[name] = self._range(key, 0, torch.Size(shape).numel()).view(shape)
        return state

    def load_moments(self, partition: Partition) -> None:
        """Copy both Adam moments into the slices this rank owns."""
        for owned in partition.slices():
            for kind in MOMENTS:
                target: Tensor = getattr(owned, kind)
                target.copy_(self._range(f"{owned.name}|{kind}", owned.offset, owned.numel))

    def _range(self, key: str, start: int, numel: int) -> Tensor:
        """Elements `start … start + numel` of the flattened tensor, joined from the files that hold them."""
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


def save(
    run: Path,
    world: World,
    attempt: int,
    partition: Partition,
    state: Mapping[str, Any],
    whole: Mapping[str, Tensor],
    export: Callable[[Mapping[str, Tensor], Path], None],
) -> Path:
    """Write a checkpoint together with all ranks; returns its folder once every rank knows that it is
    complete.

    Args:
        run: run folder, seen by all ranks.
        attempt: number of this launch; a later launch takes the right to write away from it.
        partition: what this rank owns.
        state: content of `state.json`; `update` names the folder.
        whole: frozen parameters as "NAME|frozen" and buffers as "NAME|buffer"; rank 0's are written.
        export: writes the weights for use from the whole state dict; called on rank 0.

    Raises:
        RuntimeError: a rank could not write, or a later launch has taken over; nothing was replaced.
    """
    final = run / "checkpoints" / f"update-{int(state['update']):08d}"
    scratch = final.with_name(f".tmp-{final.name}-a{attempt}")

    def open_scratch() -> None:
        if world.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

    def write_rank() -> None:
        file = scratch / f"rank-{world.rank:05d}.safetensors"
        _write_slices(file, partition.slices(), whole if world.rank == 0 else {})
        write_text(file.with_suffix(".report"), json.dumps(_entry(file)))

    def finish() -> None:
        if world.rank == 0:
            _finish(run, scratch, final, world.size, attempt, state, export)

    for stage in (open_scratch, write_rank, finish):
        _together(world, stage, final)
    return final


def newest(run: Path, world: World, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that passes every check, or None where the run has none at all.

    Ranks share the hashing. A damaged checkpoint is named through `warn` and the next older one is tried.

    Raises:
        UserError: there are checkpoints, but none is good; or the newest good one has a newer format.
    """
    folders = world.from_first(sorted((p.name for p in (run / "checkpoints").glob("update-*")), reverse=True))
    reasons = []
    for name in folders:
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


def tidy(run: Path) -> None:
    """Clear what an interrupted save left behind; an old folder that was being replaced gets its name
    back."""
    for left in (run / "checkpoints").glob(".*-update-*"):
        final = left.with_name(left.name.removeprefix(".old-"))
        if left.name.startswith(".old-") and not final.exists():
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)


def prune(run: Path, newest: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every`.

    `newest` is the one just saved. Later ones are damaged and were left out when the run resumed: they
    count for nothing, or they would push out the good one.
    """
    folders = sorted(p for p in (run / "checkpoints").glob("update-*") if p.name <= newest.name)
    for folder in folders[:-keep_last]:
        update = int(folder.name.removeprefix("update-"))
        if not (keep_every and update % keep_every == 0):
            doomed = folder.with_name(f".tmp-{folder.name}-pruned")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _together(world: World, stage: Callable[[], None], final: Path) -> None:
    """Run one stage of a save on every rank; if any fails, all raise, so that none waits for another."""
    failure = ""
    try:
        stage()
    except Exception as error:
        failure = f"rank {world.rank}: {type(error).__name__}: {error}"
    if failures := [f for f in world.gather(failure) if f]:
        raise RuntimeError(f"{final.name} was not saved: {failures[0]}")


def _write_slices(file: Path, slices: Iterator[Slice], whole: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    where: dict[str, dict[str, Any]] = {}
    for part in slices:
        for kind in ("master", *MOMENTS):
            tensors[f"{part.name}|{kind}"] = getattr(part, kind).to("cpu")
            where[f"{part.name}|{kind}"] = {
                "global_shape": part.shape,
                "offset": part.offset,
                "numel": part.numel,
            }
    for key, tensor in whole.items():
        tensors[key] = tensor.detach().to("cpu").contiguous().view(-1)
        where[key] = {"global_shape": tuple(tensor.shape), "offset": 0, "numel": tensor.numel()}
    save_file(tensors, file, metadata={"slices": json.dumps(where)})
    _flush(file)


def _finish(
    run: Path,
    scratch: Path,
    final: Path,
    ranks: int,
    attempt: int,
    state: Mapping[str, Any],
    export: Callable[[Mapping[str, Tensor], Path], None],
) -> None:
    files = {}
    for rank in range(ranks):
        report = scratch / f"rank-{rank:05d}.report"
        files[f"rank-{rank:05d}.safetensors"] = json.loads(report.read_text(encoding="utf-8"))
        report.unlink()
    write_text(
        scratch / "state.json", json.dumps({"format_version": FORMAT_VERSION, **state}, indent=1) + "\n"
    )
    export(Checkpoint(scratch).model_state(), scratch)
    for file in sorted(p for p in scratch.rglob("*") if p.is_file()):
        name = file.relative_to(scratch).as_posix()
        if name not in files:
            _flush(file)
            files[name] = _entry(file)
    write_text(scratch / "complete.json", json.dumps({"hash": HASH, "files": files}, indent=1) + "\n")
    _flush(scratch)
    if (now := read_attempt(run)) != attempt:
        shutil.rmtree(scratch, ignore_errors=True)
        raise RuntimeError(f"launch {now} of this run has taken over from launch {attempt}")
    replaced = final.with_name(f".old-{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    scratch.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def fault(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """What is wrong with this rank's share of a checkpoint's files, or an empty string."""
    try:
        complete = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        listed = complete["files"]
        if complete["hash"] != HASH or "state.json" not in listed:
            return "complete.json is of another kind"
        for name, entry in sorted(listed.items())[rank::ranks]:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if _entry(folder / name) != entry:
                return f"{name} is not what was written (its hash differs)"
    except FileNotFoundError:
        return "complete.json is missing, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"complete.json cannot be read ({type(error).__name__})"
    return ""


def _entry(file: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 23):
            digest.update(block)
    return {"size": file.stat().st_size, HASH: digest.hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
