"""Weights and plan on disk: what loads, what is refused, and what is said."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import AdaptationPlan, Encoder, EncoderConfig, UserError, load_encoder, save_encoder
from model.plan import NormalisationRule, read_plan
from model.weights import inflate_channels

IMAGE, SPACING = torch.randn(1, 1, 16, 8, 24), torch.ones(1, 3)


def build(seed: int = 0, **switches: object) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(EncoderConfig(**{"size": "nano", "depth": 2, "registers": 1, **switches})).eval()


def features(encoder: Encoder, image: torch.Tensor = IMAGE) -> torch.Tensor:
    with torch.no_grad():
        return encoder(image, SPACING)[0]


def change_plan(folder: Path, **changes: object) -> None:
    path = folder / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def test_round_trip_keeps_every_bit_and_the_plan(tmp_path: Path) -> None:
    encoder = build(class_token=True, qk_norm=True, layer_scale=0.1, learned_positions=(2, 2, 2))
    plan = AdaptationPlan(
        architecture=encoder.config, licence="CC-BY-4.0", spacing_range=(0.5, 5.0), stems=("volume",),
        training_data={"sources": ["x"], "samples": 3}, head={"kind": "promptable"},
    )  # fmt: skip
    assert save_encoder(tmp_path / "new" / "folder", encoder, plan) == tmp_path / "new" / "folder"
    loaded = load_encoder(tmp_path / "new" / "folder")
    assert torch.equal(features(loaded), features(encoder))
    assert not loaded.training
    assert loaded.load_report is not None
    assert loaded.load_report.complete
    assert len(loaded.load_report.matched) == len(encoder.state_dict())
    assert loaded.plan is not None
    assert loaded.plan.architecture == encoder.config.explicit()
    assert loaded.plan.versions["torch"]
    assert loaded.plan.model_copy(update={"architecture": plan.architecture, "versions": {}}) == plan
    save_encoder(tmp_path / "again", loaded)  # its own plan goes with it
    assert read_plan(tmp_path / "again" / "plan.json") == loaded.plan
    assert sorted(p.name for p in tmp_path.joinpath("again").iterdir()) == [
        "encoder.safetensors",
        "plan.json",
    ]


def test_a_state_dict_saves_like_its_module(tmp_path: Path) -> None:
    encoder = build()
    save_encoder(tmp_path, encoder.state_dict(), AdaptationPlan(architecture=encoder.config))
    assert torch.equal(features(load_encoder(tmp_path / "encoder.safetensors")), features(encoder))
    with pytest.raises(ValueError, match="plan"):
        save_encoder(tmp_path, encoder.state_dict())


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "shared", build())
    assert (folder / "encoder.safetensors").stat().st_mode == (folder / "plan.json").stat().st_mode


def test_the_newest_complete_checkpoint_of_a_run(tmp_path: Path) -> None:
    encoders = {}
    for update, complete in ((9, True), (10, True), (100, False)):
        folder = tmp_path / "checkpoints" / f"update-{update:08d}"
        encoders[update] = build(update)
        save_encoder(folder, encoders[update])
        if complete:
            (folder / "complete.json").write_text("{}")
    assert torch.equal(features(load_encoder(tmp_path)), features(encoders[10]))
    assert torch.equal(features(load_encoder(tmp_path / "checkpoints")), features(encoders[10]))


def test_the_encoder_of_a_fine_tuned_model(tmp_path: Path) -> None:
    encoder = build()
    save_encoder(tmp_path, encoder)
    (tmp_path / "encoder.safetensors").unlink()
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_file({**state, "head.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert torch.equal(features(load_encoder(tmp_path)), features(encoder))


def test_bf16_and_device(tmp_path: Path) -> None:
    save_encoder(tmp_path, build())
    loaded = load_encoder(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("strict", [True, False])
def test_a_loaded_encoder_trains(tmp_path: Path, strict: bool) -> None:
    save_encoder(tmp_path, build())
    loaded = load_encoder(tmp_path, strict).train()
    loaded(IMAGE, SPACING)[0].square().mean().backward()
    gradients = [
        p.grad for name, p in loaded.named_parameters() if "slab" not in name and "planar" not in name
    ]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(p.is_leaf and p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


@pytest.mark.parametrize("k", [2, 3])
def test_k_equal_channels_give_the_single_channels_features(tmp_path: Path, k: int) -> None:
    save_encoder(tmp_path, build())
    single, several = load_encoder(tmp_path), load_encoder(tmp_path, channels=k)
    torch.testing.assert_close(
        features(several, IMAGE.expand(-1, k, -1, -1, -1)), features(single), rtol=1e-4, atol=1e-5
    )
    assert several.config.channels == several.plan.architecture.channels == k
    state = inflate_channels(single.state_dict(), k)
    for kind, patch in single.config.patch.items():
        assert state[f"stems.{kind}.weight"].shape == (96, k * patch[0] * patch[1] * patch[2])
    save_encoder(tmp_path / "k", several)
    with pytest.raises(UserError, match=f"takes {k} channels"):
        load_encoder(tmp_path / "k", channels=k + 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis_order": "xyz-RAS"}, ("axis_order", "xyz-RAS")),
        ({"token_order": "F"}, ("token_order", "'F'")),
        ({"format_version": 2}, ("format 2", "update medfm")),
        ({"format_version": None}, ("not an adaptation plan",)),
        (
            {"normalisation": {"CT": {"kind": "histogram", "low": 0, "high": 1}}},
            ("normalisation", "histogram"),
        ),
        ({"normalisation": {"US": {"kind": "percentile", "low": 0, "high": 1}}}, ("normalisation", "US")),
        ({"surprise": 1}, ("surprise",)),
        ({"architecture": {"size": "tiny", "wings": 2}}, ("wings",)),
        ({"architecture": {"size": "tiny"}}, ("is not the architecture",)),
        ({"architecture": {"size": "nano", "depth": 3, "registers": 1}}, ("missing", "blocks.2")),
        ({"architecture": {"size": "nano", "depth": 1, "registers": 1}}, ("unexpected", "blocks.1")),
    ],
)
def test_a_plan_that_is_not_understood_or_does_not_fit_is_refused(
    tmp_path: Path, changes: dict, words: tuple[str, ...]
) -> None:
    save_encoder(tmp_path, build())
    change_plan(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_encoder(tmp_path)
    text = one_line(error)
    assert str(tmp_path) in text
    for word in words:
        assert word in text


def test_not_strict_loads_what_fits_and_says_the_rest(tmp_path: Path) -> None:
    encoder = build()
    save_encoder(tmp_path, encoder)
    change_plan(tmp_path, architecture={"size": "nano", "depth": 3, "patch": {"volume": [8, 8, 4]}})
    loaded = load_encoder(tmp_path, strict=False)
    report = loaded.load_report
    assert report is not None
    assert not report.complete
    assert any(name.startswith("blocks.2.") for name in report.missing)
    assert "prefix.tokens" in report.unexpected
    assert report.mismatched == ("stems.volume.weight: (96, 512) in the file, not (96, 256)",)
    assert set(report.matched) | set(report.missing) | {"stems.volume.weight"} == set(loaded.state_dict())
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, encoder.blocks[1].attn.qkv.weight)


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    def refused(path: Path, word: str) -> None:
        with pytest.raises(UserError) as error:
            load_encoder(path)
        assert word in one_line(error)
        assert str(path) in str(error.value)

    refused(tmp_path / "absent", "no such file")
    refused(tmp_path, "nothing to load")
    save_encoder(tmp_path / "a", build())
    plan = tmp_path / "a" / "plan.json"
    text = plan.read_text()
    plan.write_text(text[:40])
    refused(plan.parent, "JSON")
    plan.unlink()
    refused(plan.parent, "not found")
    plan.write_text(text)
    weights = plan.with_name("encoder.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(plan.parent, "damaged")
    pickled = tmp_path / "weights.pt"
    pickled.write_bytes(pickle.dumps({"x": 1}))
    refused(pickled, "only safetensors")


def test_a_killed_save_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(tmp_path, build(0))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model.weights.write_plan", killed)
    with pytest.raises(KeyboardInterrupt):
        save_encoder(tmp_path, build(1, depth=3))
    with pytest.raises(UserError, match="not found"):
        load_encoder(tmp_path)


def test_shared_and_strided_tensors_are_saved_whole(tmp_path: Path) -> None:
    encoder = build()
    own = encoder.state_dict()
    state = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in own.items()}
    save_encoder(tmp_path, state, AdaptationPlan(architecture=encoder.config))
    stored = load_file(tmp_path / "encoder.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in own.items())


def test_rules_must_name_a_known_kind() -> None:
    with pytest.raises(ValueError):
        NormalisationRule(kind="minmax", low=0, high=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="center"):
        NormalisationRule(kind="fixed", low=0, high=1)
    with pytest.raises(ValueError, match="below high"):
        NormalisationRule(kind="percentile", low=99.5, high=0.5)
