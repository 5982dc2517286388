"""The checkpoint format and its protection, without training: slices cut anywhere, files damaged anyhow."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import checkpoint
from engine.distributed import World, join
from engine.errors import UserError
from engine.recipe import EngineConfig
from engine.snapshot import Snapshot
from engine.tensor_file import entry_of, write_tensors
from engine.verdict import write_text
from engine.zero_state import Slice

SHAPES = {"stem.weight": (3, 5), "norm.bias": (7,), "gate": (), "empty": (0, 4)}


@pytest.fixture(scope="module")
def world() -> World:
    return join(EngineConfig(device="cpu"))


class Cut:
    """A partition that owns `[low, high)` of every parameter's flat elements, as shares of 12ths."""

    def __init__(self, low: int, high: int, seed: float = 0.0) -> None:
        self.whole = {
            n: [torch.arange(torch.Size(s).numel()).float() + seed + k for k in (0.0, 0.25, 0.5)]
            for n, s in SHAPES.items()
        }
        self.low, self.high = low, high

    def slices(self) -> Iterator[Slice]:
        for name, shape in SHAPES.items():
            total = torch.Size(shape).numel()
            start, end = total * self.low // 12, total * self.high // 12
            if start < end or (total == 0 and self.low == 0):
                views = [t[start:end] for t in self.whole[name]]
                yield Slice(name, shape, start, end - start, *views)


def write_rank(file: Path, partition: Cut) -> None:
    snapshot = Snapshot(partition, {}, torch.device("cpu"))  # type: ignore[arg-type]
    snapshot.take(partition, {})  # type: ignore[arg-type]
    write_tensors(file, snapshot.tensors, snapshot.metadata)


def no_export(state: dict[str, Tensor], folder: Path) -> None:
    (folder / "plan.json").write_text("{}")


def store(run: Path, world: World, update: int, attempt: int = 1, seed: float = 0.0) -> Path:
    whole = {"mean|buffer": torch.tensor([1.5, float(update)], dtype=torch.float64)}
    return checkpoint.save(run, world, attempt, Cut(0, 12, seed), {"update": update}, whole, no_export)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path, world: World) -> Path:
    write_text(tmp_path / "attempt", "1\n")
    store(tmp_path, world, 10)
    store(tmp_path, world, 20)
    return tmp_path


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 11), max_size=4), st.lists(st.integers(1, 11), max_size=4))
def test_any_layout_reads_any_other(
    tmp_path_factory: pytest.TempPathFactory, a: list[int], b: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    edges = [0, *sorted(set(a)), 12]
    for rank, (low, high) in enumerate(itertools.pairwise(edges)):
        write_rank(folder / f"rank-{rank:05d}.safetensors", Cut(low, high))
    (folder / "state.json").write_text("{}")
    stored = checkpoint.Checkpoint(folder)
    truth = Cut(0, 12)
    for name, tensor in stored.model_state().items():
        assert tensor.shape == SHAPES[name]
        assert torch.equal(tensor.flatten(), truth.whole[name][0])
    edges = [0, *sorted(set(b)), 12]
    for low, high in itertools.pairwise(edges):
        reader = Cut(low, high, seed=99.0)
        stored.load_moments(reader)  # type: ignore[arg-type]
        for owned in reader.slices():
            for kind, source in zip(checkpoint.MOMENTS, truth.whole[owned.name][1:], strict=True):
                assert torch.equal(getattr(owned, kind), source[owned.offset : owned.offset + owned.numel])
            assert bool((owned.master >= 99.0).all())


def test_newest_is_found_and_buffers_keep_their_type(run: Path, world: World) -> None:
    found = checkpoint.newest(run, world, pytest.fail)
    assert found is not None
    assert found.state["update"] == 20
    assert torch.equal(found.model_state()["mean"], torch.tensor([1.5, 20.0], dtype=torch.float64))


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


def test_only_damaged_ones_are_an_error_never_a_fresh_start(run: Path, world: World) -> None:
    for name in ("update-00000010", "update-00000020"):
        hurt(run / "checkpoints" / name / "rank-00000.safetensors", "flip")
    with pytest.raises(UserError, match=r"no good checkpoint.*update-00000020.*hash") as caught:
        checkpoint.newest(run, world, lambda _: None)
    assert "\n" not in str(caught.value)


def test_the_same_update_can_be_saved_again(run: Path, world: World) -> None:
    store(run, world, 20, seed=5.0)
    found = checkpoint.newest(run, world, pytest.fail)
    assert found is not None
    assert float(found.model_state()["gate"]) == 5.0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["update-00000010", "update-00000020"]


def test_an_older_launch_may_not_write(run: Path, world: World) -> None:
    write_text(run / "attempt", "2\n")
    with pytest.raises(RuntimeError, match="launch 2 of this run has taken over"):
        store(run, world, 30, attempt=1)
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["update-00000010", "update-00000020"]


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


def test_a_failing_export_saves_nothing(run: Path, world: World) -> None:
    def fail(state: dict[str, Tensor], folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(RuntimeError, match=r"update-00000030 was not saved: rank 0: OSError: disk full"):
        checkpoint.save(run, world, 1, Cut(0, 12), {"update": 30}, {}, fail)  # type: ignore[arg-type]
    found = checkpoint.newest(run, world, pytest.fail)
    assert found is not None
    assert found.state["update"] == 20


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
    checkpoint.prune(run, run / "checkpoints" / f"update-{max(updates):08d}", last, every)
    kept = {int(p.name.removeprefix("update-")) for p in (run / "checkpoints").iterdir()}
    assert kept == set(sorted(updates)[-last:]) | {u for u in updates if every and u % every == 0}


def test_pruning_never_prefers_a_damaged_checkpoint_to_the_one_just_saved(
    tmp_path: Path, world: World
) -> None:
    """A run that fell back from a damaged update 9 to 4 and saved 6 keeps 6, whatever `keep_last` says."""
    write_text(tmp_path / "attempt", "1\n")
    for update in (4, 9):
        store(tmp_path, world, update)
    (tmp_path / "checkpoints" / "update-00000009" / "state.json").write_text("")
    saved = store(tmp_path, world, 6)
    checkpoint.prune(tmp_path, saved, keep_last=1, keep_every=0)
    found = checkpoint.newest(tmp_path, world, lambda _: None)
    assert found is not None
    assert found.folder == saved
