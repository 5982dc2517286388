"""Probes on a small labelled dataset built here: which images, which voxels, and the same figures for all."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.manifest import SCHEMA, Manifest, manifest_bytes
from data_pipeline.shard_reader import ShardReader
from engine.errors import UserError
from model.config import EncoderConfig
from model.encoder import Encoder
from pretrain.probe import Probe, _encode, _nested_mean
from pretrain.probe_config import ProbeConfig
from pretrain.probe_data import choose, read

ENCODER = EncoderConfig(size=None, width=48, depth=2, heads=2, registers=1)
CPU = torch.device("cpu")
KINDS = ("volume", "slab", "planar")


def organs(generator: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Two ellipsoids, 1 and 2, and a corner of 9, which is neither."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    label = np.zeros(shape, np.uint8)
    for value, centre in ((1, -0.35), (2, 0.4)):
        middle, radius = centre + generator.uniform(-0.1, 0.1, 3), generator.uniform(0.3, 0.45, 3)
        label[sum(((a - m) / r) ** 2 for a, m, r in zip(axes, middle, radius)) < 1] = value
    label[-4:, -4:, -4:] = 9
    return label


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices are slower on more, and two processes then add up alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CT volumes of two organs, and MR stacks with the thick axis last in which only the liver was sought."""
    import nibabel as nib

    from data_pipeline.build import build
    from data_pipeline.sources import SourceConfig

    root = tmp_path_factory.mktemp("scans")
    generator = np.random.default_rng(5)
    for i in range(10):
        split = "train" if i < 6 else "val"
        ct = organs(generator, (26 + i, 30, 34))
        values = np.select([ct == 1, ct == 2], [60, 200], -40) + generator.integers(-30, 30, ct.shape)
        mr = (organs(generator, (40, 6, 56 + i)) == 1).astype(np.int16)
        for name, image, label, spacing in (
            ("ct", values.astype(np.int16), ct, (1.2, 1.2, 1.5)),
            ("mr", 100 + 500 * mr, mr, (0.8, 5.0, 0.8)),
        ):
            folder = root / name / f"{split}_p{i // 2}_{i}"
            folder.mkdir(parents=True)
            affine = np.diag([*spacing, 1])
            nib.save(nib.Nifti1Image(image.transpose(2, 1, 0), affine), folder / "image.nii.gz")
            nib.save(nib.Nifti1Image(label.transpose(2, 1, 0), affine), folder / "label.nii.gz")
    common: dict[str, Any] = {
        "layout": "folder", "include": ("*/image.nii.gz",), "label_glob": "*/label.nii.gz",
        "label_origin": "human", "subject_pattern": "_(p[0-9])_",
        "splits": {"train_*/*": "train", "val_*/*": "val"},
    }  # fmt: skip
    sources = [
        SourceConfig(path=root / "ct", name="ct", modality="CT", units="HU", labels={1: "liver", 2: "spleen"},
                     ignore=(9,), **common),
        SourceConfig(path=root / "mr", name="mr", modality="MR", labels={1: "liver"}, **common),
    ]  # fmt: skip
    out = tmp_path_factory.mktemp("dataset") / "shards"
    build(sources, out, progress=False)
    return out


def encoder_of(seed: int = 0, config: EncoderConfig = ENCODER) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(config)


def config_of(data: Path, **changes: Any) -> ProbeConfig:
    return ProbeConfig(**({"data": str(data), "shots": 4, "cases": 3, "window": 64, "k": 5} | changes))


@pytest.fixture(scope="module")
def probe(labelled: Path) -> Probe:
    return Probe(config_of(labelled), ENCODER)


def test_the_choice_survives_growth_and_keeps_subjects_apart(labelled: Path, probe: Probe) -> None:
    manifest = Manifest.open(labelled)
    args: tuple[Any, ...] = (KINDS, (), ())
    few, all_ = (choose(manifest, "train", *args, most, 0) for most in (3, 99))
    assert [len(rows) for rows in all_.values()] == [6, 6]
    assert all(all_[task][:3] == rows for task, rows in few.items())
    assert all_ != choose(manifest, "train", *args, 99, 1)
    smaller = manifest_bytes(r for i in range(len(manifest)) if (r := manifest.row(i)) and i % 3)
    other = Manifest.of(labelled, smaller, manifest.info)
    for task, rows in choose(other, "train", *args, 99, 0).items():
        kept = [manifest.value(row, "key") for row in all_[task] if row % 3]
        assert [other.value(row, "key") for row in rows] == kept
    subjects = [
        {probe.images[n].subject for places in probe.tasks.values() for n in mine(places)}
        for mine in (lambda p: p.shots, lambda p: p.cases)
    ]
    assert all(subjects)
    assert not subjects[0] & subjects[1]
    taught = {str(manifest.value(row, "subject")) for rows in few.values() for row in rows}
    again = choose(manifest, "train", *args, 99, 0, without=taught)
    assert not taught & {str(manifest.value(row, "subject")) for rows in again.values() for row in rows}


def test_nobody_is_both_learnt_from_and_scored(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.open(labelled)
    rows = [manifest.row(i) for i in range(len(manifest))]
    twice = {row["subject"] for row in rows if row["split"] == "val"}.pop()
    for row in rows:
        row["subject"] = twice if row["split"] == "train" else row["subject"]
    other = Manifest.of(labelled, manifest_bytes(rows), manifest.info)
    monkeypatch.setattr(Manifest, "open", lambda root: other)
    probe = Probe(config_of(labelled), ENCODER)
    for places in probe.tasks.values():
        assert {probe.images[n].subject for n in places.shots} == {twice}
        assert all(probe.images[n].subject != twice for n in places.cases)
    # Of the four images of each source in val; a subject of one source is not one of the other.
    assert sorted(len(places.cases) for places in probe.tasks.values()) == [2, 3]


def test_labels_made_by_a_model_and_images_without_labels_are_left_out(labelled: Path) -> None:
    manifest = Manifest.open(labelled)
    rows = [manifest.row(i) for i in range(len(manifest))]
    assert set(rows[0]) == set(SCHEMA.names)
    for row in rows:
        if row["split"] == "train":
            row["label_origin"], row["classes"] = (
                ("model", row["classes"]) if row["source"] == "ct" else ("", [])
            )
    other = Manifest.of(labelled, manifest_bytes(rows), manifest.info)
    assert choose(other, "train", KINDS, (), (), 9, 0) == {}
    assert len(choose(other, "val", KINDS, (), (), 9, 0)) == 2
    (task,) = choose(other, "val", KINDS, (), ("spleen",), 9, 0)
    assert task.source == "ct"


def test_crops_hold_the_voxels_of_their_labels(labelled: Path) -> None:
    """In the MR stacks intensity follows from the label, so that any shift or turn between them shows."""
    manifest = Manifest.open(labelled)
    reader = ShardReader(labelled, manifest)
    for row in manifest.select(source="mr").tolist():
        about = manifest.row(row)
        for window in (8, 27, 4096):
            image = read(reader, manifest, row, ENCODER, window, (1, 2), 0)
            assert (image.task.geometry, image.patch) == ("slab", (2, 16, 16))
            assert np.prod(image.grid) <= window
            assert image.spacing == pytest.approx((5.0, 0.8, 0.8))
            liver = next(iter(image.annotated))
            assert image.holds(liver)
            patches, truth, known = (
                image.patches(CPU), image.is_class(liver, CPU), image.known(CPU),
            )  # fmt: skip
            middle = (patches[known].min() + patches[known].max()) / 2
            assert torch.equal((patches > middle) & known, truth)
            if window == 4096:
                assert int(known.sum()) == np.prod(about["shape"])
                assert image.inside.sum() == known.sum() < known.numel()  # padded to whole tokens


def test_crops_are_cut_around_the_classes_asked_for(labelled: Path) -> None:
    manifest = Manifest.open(labelled)
    reader = ShardReader(labelled, manifest)
    for row in manifest.select(source="ct").tolist():
        for label in (1, 2):
            image = read(reader, manifest, row, ENCODER, 1, (label,), 0)
            assert image.grid == (1, 1, 1)
            assert image.labels[0, 4, 4, 4] == label


def test_unknown_voxels_are_not_background(probe: Probe) -> None:
    for image in probe.images:
        ignored = (image.labels == 255).any(0)
        known = image._patches(torch.from_numpy(ignored))
        assert not (image.known(CPU) & known).any()
        assert not image.learnable(CPU)[known.any(1)].any()
        assert len(image.annotated) == (2 if image.task.source == "ct" else 1)
    assert any((image.labels == 255).any() for image in probe.images)


def test_features_are_those_of_the_encoder(probe: Probe) -> None:
    encoder = encoder_of().eval()
    for n in (0, len(probe.images) - 1):
        image = probe.images[n]
        voxels = torch.from_numpy(image.voxels.astype(np.float32))
        slope, intercept, low, high, centre, scale, _ = image.norm.tolist()
        x = ((voxels * slope + intercept).clamp(low, high) - centre) / scale
        there = torch.from_numpy(image.inside)
        x = x.where(there, (low - centre) / scale)
        expected = encoder(
            x[None, None], torch.tensor([image.spacing]), image.task.geometry, (1,), valid=there[None],
            axes=image.axes, fill=torch.tensor([[(low - centre) / scale]]),
        )[0]  # fmt: skip
        with torch.no_grad():
            found = _encode(encoder, image, 1, CPU)
        attended = image.attend(CPU)
        torch.testing.assert_close(found[attended], expected[0].flatten(1).T[attended], atol=1e-4, rtol=1e-4)


def test_scores_repeat_and_touch_nothing(probe: Probe) -> None:
    encoder = encoder_of(config=ENCODER.model_copy(update={"drop_path": 0.5})).train()
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = probe.score(encoder, 0, 1, CPU)
    assert encoder.training
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    assert probe.score(encoder.eval(), 0, 1, CPU) == first
    assert set(first) == {
        "probe/knn_dice", "probe/linear_dice", "probe/raw_linear_dice", "probe/linear_dice/liver",
        "probe/linear_dice/spleen", "collapse/rank", "collapse/rank_share", "collapse/cosine",
        *(f"collapse/attention_entropy_{name}" for name in ("min", "mean", "max", "block_min")),
    }  # fmt: skip
    assert all(np.isfinite(value) for value in first.values())
    assert 0.1 < min(first["probe/linear_dice"], first["probe/raw_linear_dice"]) <= 1
    assert probe.alarms(first) == []
    with torch.autocast("cpu", torch.bfloat16):
        rounded = probe.score(encoder, 0, 1, CPU)
    assert rounded != first
    assert rounded == pytest.approx(first, abs=0.1, rel=0.1)


def test_an_encoder_that_sees_more_scores_more(probe: Probe) -> None:
    """Features that only tell how bright a token is, against those of its whole content."""
    seeing, dim = encoder_of(), encoder_of()
    with torch.no_grad():
        for stem in dim.stems.values():
            stem.weight[:] = stem.weight.mean(1, keepdim=True)
    scores = [probe.score(encoder, 0, 1, CPU) for encoder in (dim, seeing)]
    assert scores[0]["probe/linear_dice"] < scores[1]["probe/linear_dice"] - 0.05
    assert scores[0]["collapse/rank"] < scores[1]["collapse/rank"]
    assert scores[0]["probe/raw_linear_dice"] == scores[1]["probe/raw_linear_dice"]


def test_a_collapsed_encoder_raises_the_alarm(probe: Probe) -> None:
    encoder = encoder_of()
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.normal_(std=1000)  # which every token gets alike
    scores = probe.score(encoder, 0, 1, CPU)
    directions, same = probe.alarms(scores)
    assert "collapsed" in directions
    assert "the same" in same
    assert all(np.isfinite(value) for value in scores.values())


def test_a_depth_and_index_positions_may_be_asked_for(labelled: Path, probe: Probe) -> None:
    encoder = encoder_of()
    shallow = Probe(config_of(labelled, depth=1), ENCODER).score(encoder, 0, 1, CPU)
    assert shallow["probe/linear_dice"] != probe.score(encoder, 0, 1, CPU)["probe/linear_dice"]
    index = encoder_of(config=ENCODER.model_copy(update={"rotary": "index"}))
    image = probe.images[0]
    with torch.no_grad():
        expected = _encode(index, image, 0, CPU)
        wide = type(image)(**{**vars(image), "spacing": (9.0, 9.0, 9.0)})
        assert torch.equal(_encode(index, wide, 0, CPU), expected)
        assert not torch.equal(_encode(encoder, wide, 0, CPU), _encode(encoder, image, 0, CPU))


RANK_OF_TWO = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from model.config import EncoderConfig
from model.encoder import Encoder
from pretrain.probe import Probe
from pretrain.probe_config import ProbeConfig

rank, folder, config, encoder = int(sys.argv[1]), Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
encoder = EncoderConfig(**encoder)
probe = Probe(ProbeConfig(**config), encoder)
scores = []
for seed in (0, 1):
    torch.manual_seed(seed)
    scores.append(probe.score(Encoder(encoder), rank, 2, torch.device("cpu")))
(folder / f"scores{rank}.json").write_text(json.dumps(scores))
dist.destroy_process_group()
"""


def test_any_number_of_ranks_gives_the_same_figures(labelled: Path, tmp_path: Path) -> None:
    config = config_of(labelled, shots=3, cases=2)
    words = [str(tmp_path), config.model_dump_json(), ENCODER.model_dump_json()]
    ranks = [subprocess.Popen([sys.executable, "-c", RANK_OF_TWO, str(rank), *words]) for rank in range(2)]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    probe = Probe(config, ENCODER)
    alone = [probe.score(encoder_of(seed), 0, 1, CPU) for seed in (0, 1)]
    assert alone[0] != alone[1]
    for rank in range(2):
        assert json.loads((tmp_path / f"scores{rank}.json").read_text()) == alone


def test_what_is_wrong_is_said_in_one_line(labelled: Path, tmp_path: Path, probe: Probe) -> None:
    for changes, words in (
        ({"sources": ("x",)}, "probes.sources: no 'x'.*ct, mr"),
        ({"classes": ("heart",)}, "probes.classes: no 'heart'.*liver, spleen"),
        ({"depth": 3}, "probes.depth 3: the encoder has 2"),
        ({"split": "nowhere"}, "nothing to score.*0 labelled in 'nowhere'"),
    ):
        with pytest.raises(UserError, match=words) as error:
            Probe(config_of(labelled, **changes), ENCODER)
        assert "\n" not in str(error.value)
    blind = EncoderConfig(size="nano", patch={"planar": (1, 16, 16)})
    with pytest.raises(UserError, match="no labelled image"):
        Probe(config_of(labelled), blind)
    only = Probe(config_of(labelled, classes=("spleen",)), ENCODER)
    assert only.describe() == "probe ct CT volume: spleen; 4 shots, 3 cases"
    assert "ct CT volume: liver, spleen" in probe.describe()
    assert "mr MR slab: liver;" in probe.describe()


def test_a_damaged_image_is_named(labelled: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(labelled, copy)
    manifest = Manifest.open(copy)
    for shard in copy.glob("*ct*.tar"):
        data = bytearray(shard.read_bytes())
        for row in range(len(manifest)):
            if manifest.value(row, "shard") == shard.name:
                start = manifest.value(row, "image_offset")
                data[start + 300 : start + 3000] = bytes(2700)
        shard.write_bytes(data)
    with pytest.raises(UserError, match=r"probes\.data: sample .* is damaged.*medfm shards verify"):
        Probe(config_of(copy), ENCODER)


def test_means_go_over_images_then_subjects() -> None:
    subjects = ["a", "a", "b", "c", "d"]
    assert _nested_mean(subjects, [1.0, 0.0, 0.2, None, None]) == pytest.approx(0.35)
    assert _nested_mean(subjects, [None] * 5) is None
