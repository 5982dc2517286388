"""The checkpoint format and its protection, without training: slices cut anywhere, files damaged anyhow."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from saving import CPU, SHAPES, Part, begin_launch, kept, ranks, store

from engine import checkpoint
from engine.distributed import World
from engine.errors import UserError
from engine.snapshot import Snapshot
from engine.tensor_file import DTYPES, entry_of, write_tensors
from engine.verdict import write_text
from engine.zero_state import MOMENTS


@pytest.fixture(scope="module")
def world() -> World:
    return ranks(1)[0]


def write_rank(file: Path, partition: Part) -> None:
    owned: Any = partition
    snapshot = Snapshot(owned, {}, CPU)
    snapshot.take(owned, {})
    write_tensors(file, snapshot.tensors, snapshot.metadata)


@pytest.fixture
def run(tmp_path: Path, world: World) -> Path:
    begin_launch(tmp_path)
    store(tmp_path, 10)
    store(tmp_path, 20)
    return tmp_path


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 11), max_size=4), st.lists(st.integers(1, 11), max_size=4))
def test_any_layout_reads_any_other(
    tmp_path_factory: pytest.TempPathFactory, a: list[int], b: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    edges = [0, *sorted(set(a)), 12]
    for rank, (low, high) in enumerate(itertools.pairwise(edges)):
        write_rank(folder / f"rank-{rank:05d}.safetensors", Part(low, high))
    (folder / "state.json").write_text("{}")
    stored = checkpoint.Checkpoint(folder)
    truth = Part(0, 12)
    for name, tensor in stored.model_state().items():
        assert tensor.shape == SHAPES[name]
        assert torch.equal(tensor.flatten(), truth.whole[name][0])
    edges = [0, *sorted(set(b)), 12]
    for low, high in itertools.pairwise(edges):
        for owned in Part(low, high).slices():
            for kind, source in zip(("master", *MOMENTS), truth.whole[owned.name], strict=True):
                part = stored.read(f"{owned.name}|{kind}", owned.offset, owned.numel)
                assert torch.equal(part, source[owned.offset : owned.offset + owned.numel])
    assert stored.shapes == SHAPES


def test_newest_is_found_and_buffers_keep_their_type(run: Path, world: World) -> None:
    found = checkpoint.newest(run, world, pytest.fail)
    assert found is not None
    assert found.state["update"] == 20
    assert torch.equal(found.model_state()["mean"], torch.tensor([1.5, 2.5], dtype=torch.float64))


def test_a_run_that_goes_back_asks_for_an_older_one(run: Path, world: World) -> None:
    for at_most, update in ((20, 20), (19, 10), (10, 10)):
        found = checkpoint.newest(run, world, pytest.fail, at_most)
        assert found is not None
        assert found.state["update"] == update
    assert checkpoint.newest(run, world, pytest.fail, 9) is None


def test_what_a_run_went_back_from_is_kept_but_not_resumed_from(run: Path, world: World) -> None:
    store(run, 30)
    assert checkpoint.set_aside(run, 10, "bad") == ["bad-update-00000030", "bad-update-00000020"]
    assert checkpoint.set_aside(run, 10, "bad") == []
    store(run, 20, seed=5.0, keep_last=1)
    assert checkpoint.set_aside(run, 10, "bad") == ["bad-update-00000020"]  # a second time
    assert kept(run) == ["bad-update-00000020", "bad-update-00000030"]
    assert (
        float(checkpoint.Checkpoint(run / "checkpoints" / "bad-update-00000020").model_state()["gate"]) == 5
    )
    begin_launch(run)
    assert len(kept(run)) == 2
    assert checkpoint.newest(run, world, pytest.fail) is None


def test_a_part_that_is_not_there_is_an_error(run: Path) -> None:
    found = checkpoint.Checkpoint(run / "checkpoints" / "update-00000020")
    for key, start, numel in (("gate|master", 0, 2), ("stem.weight|master", 14, 2), ("nothing|master", 0, 1)):
        with pytest.raises(UserError, match="it is not whole"):
            found.read(key, start, numel)


def test_an_empty_run_has_none(tmp_path: Path, world: World) -> None:
    assert checkpoint.newest(tmp_path, world, pytest.fail) is None


FILES = ("rank-00000.safetensors", "state.json", "plan.json", "complete.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_damage_is_named_and_the_older_one_used(run: Path, world: World, file: str, damage: str) -> None:
    hurt(run / "checkpoints" / "update-00000020" / file, damage)
    said: list[str] = []
    found = checkpoint.newest(run, world, said.append)
    assert found is not None
    assert found.state["update"] == 10
    assert len(said) == 1
    assert "update-00000020" in said[0]
    assert file in said[0]


def hurt(file: Path, damage: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if damage == "flip" and file.name == "complete.json":
        flipped = content.replace(b'"size"', b'"sise"', 1)
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes({"flip": flipped, "truncate": content[:-3], "empty": b""}[damage])


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_any_flipped_bit_is_found(
    one_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, name: str, where: float, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "update-00000010"
    shutil.copytree(one_checkpoint, folder)
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    if not checkpoint.fault(folder):
        assert name == "complete.json"  # a space that became another
        assert json.loads(content) == json.loads((one_checkpoint / name).read_bytes())


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    begin_launch(run)
    return store(run, 10)


def test_a_file_that_cannot_be_read_is_named(run: Path) -> None:
    folder = run / "checkpoints" / "update-00000020"
    (folder / "plan.json").unlink()
    (folder / "plan.json").symlink_to("/proc/self/mem")
    assert checkpoint.fault(folder).startswith("plan.json ")


@pytest.mark.parametrize(("fails", "number"), [(2, errno.ESTALE), (99, errno.ESTALE), (99, errno.EIO)])
def test_a_storage_that_is_away_is_no_damage(
    run: Path, world: World, monkeypatch: pytest.MonkeyPatch, fails: int, number: int
) -> None:
    """Tried again; then it is an error, not a step back to an older checkpoint, unless the bytes are lost."""
    monkeypatch.setattr(checkpoint, "READ_AGAIN", (0.0, 0.0, 0.0))
    entry_of, failures = checkpoint.entry_of, iter(range(fails))

    def read(file: Path) -> dict[str, Any]:
        if file.parent.name == "update-00000020" and next(failures, None) is not None:
            raise OSError(number, os.strerror(number))
        return entry_of(file)

    monkeypatch.setattr(checkpoint, "entry_of", read)
    if fails > 10 and number == errno.ESTALE:
        with pytest.raises(OSError, match="cannot be read"):
            checkpoint.newest(run, world, print)
    else:
        found = checkpoint.newest(run, world, lambda _: None)
        assert found is not None
        assert found.state["update"] == (20 if fails == 2 else 10)


def test_checkpoints_that_cannot_be_listed_are_no_fresh_start(
    run: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        checkpoint.newest(run, world, print)


def test_a_stream_is_a_safetensors_file_with_the_hash_of_its_bytes(tmp_path: Path) -> None:
    """Of every type, of odd sizes, in more than one block."""
    tensors = {f"of {dtype}": torch.arange(13).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "mät 2": torch.rand(3, 700_001)}
    entry = write_tensors(tmp_path / "stream", tensors, {"about": "ü"})
    assert entry == entry_of(tmp_path / "stream")
    assert entry["size"] == (tmp_path / "stream").stat().st_size
    read = load_file(tmp_path / "stream")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "stream", framework="pt") as opened:
        assert opened.metadata() == {"about": "ü"}
        assert torch.equal(opened.get_slice("mät 2")[1:2], tensors["mät 2"][1:2])


def test_a_type_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="odd: safetensors cannot hold"):
        write_tensors(tmp_path / "x", {"odd": torch.zeros(2, dtype=torch.complex64)}, {})


def test_only_damaged_ones_are_an_error_never_a_fresh_start(run: Path, world: World) -> None:
    for name in ("update-00000010", "update-00000020"):
        hurt(run / "checkpoints" / name / "rank-00000.safetensors", "flip")
    with pytest.raises(UserError, match=r"no good checkpoint.*update-00000020.*hash") as caught:
        checkpoint.newest(run, world, lambda _: None)
    assert "\n" not in str(caught.value)


def test_the_same_update_can_be_saved_again(run: Path, world: World) -> None:
    store(run, 20, seed=5.0)
    found = checkpoint.newest(run, world, pytest.fail)
    assert found is not None
    assert float(found.model_state()["gate"]) == 5.0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["update-00000010", "update-00000020"]


def test_a_save_cut_off_at_any_moment_leaves_the_last_one(run: Path, world: World) -> None:
    folders = run / "checkpoints"
    good = folders / "update-00000020"
    shutil.copytree(good, folders / ".tmp-update-00000030-a1")
    (folders / ".tmp-update-00000030-a1" / "complete.json").unlink()
    good.rename(folders / ".old-update-00000020")  # killed between the two renames of a re-save
    checkpoint.tidy(run)
    found = checkpoint.newest(run, world, pytest.fail)
    assert found is not None
    assert found.folder == good
    assert not list(folders.glob(".*"))


def test_a_newer_format_is_refused_by_name(run: Path, world: World) -> None:
    folder = run / "checkpoints" / "update-00000020"
    state = json.loads((folder / "state.json").read_text()) | {"format_version": 99}
    (folder / "state.json").write_text(json.dumps(state))
    complete = json.loads((folder / "complete.json").read_text())
    complete["files"]["state.json"] = entry_of(folder / "state.json")
    (folder / "complete.json").write_text(json.dumps(complete))
    with pytest.raises(UserError, match="format version 99"):
        checkpoint.newest(run, world, pytest.fail)


@given(st.sets(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_pruning_keeps_the_newest_and_the_milestones(
    tmp_path_factory: pytest.TempPathFactory, updates: set[int], last: int, every: int
) -> None:
    run = tmp_path_factory.mktemp("prune")
    for update in updates:
        (run / "checkpoints" / f"update-{update:08d}").mkdir(parents=True)
    newest = run / "checkpoints" / f"update-{max(updates):08d}"
    checkpoint.prune(run, newest, last, every, keep=lambda update: update == 5)
    left = {checkpoint.update_of(p) for p in (run / "checkpoints").iterdir()}
    milestones = {u for u in updates if u == 5 or (every and u % every == 0)}
    assert left == set(sorted(updates)[-last:]) | milestones


def test_pruning_never_prefers_a_damaged_checkpoint_to_the_one_just_saved(
    tmp_path: Path, world: World
) -> None:
    """A run that fell back from a damaged update 9 to 4 and saved 6 keeps 6, whatever `keep_last` says."""
    write_text(tmp_path / "attempt", "1\n")
    for update in (4, 9):
        store(tmp_path, update)
    (tmp_path / "checkpoints" / "update-00000009" / "state.json").write_text("")
    saved = store(tmp_path, 6)
    checkpoint.prune(tmp_path, saved, keep_last=1, keep_every=0)
    found = checkpoint.newest(tmp_path, world, lambda _: None)
    assert found is not None
    assert found.folder == saved
