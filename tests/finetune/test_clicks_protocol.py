"""The clicks protocol with a model that is perfect, blind or stubborn; cases that were seen before."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from finetune import evaluate
from finetune.evaluate import seen_before
from finetune.inference import Predictor
from finetune.promptable import HeadConfig


class Answers(torch.nn.Module):
    """Answers each prompt by `rule(image (Z, Y, X), clicks) -> bool mask`."""

    def __init__(self, rule):
        super().__init__()
        self.config = HeadConfig(window=(16, 16, 16))
        self.encoder = None
        self.prompt = torch.nn.Module()
        self.prompt.base = torch.nn.Parameter(torch.zeros(1))
        self.rule = rule

    def encode(self, image, spacing, geometry, axes, valid):
        return image

    def answer(self, features, prompts, previous):
        mask = self.rule(features[0, 0].numpy(), prompts)
        return torch.from_numpy(np.where(mask, 5.0, -5.0))[None, None].float(), torch.ones(1)


def clicked_value(image, prompts):
    """The region of equal value under the last click: a perfect model for two objects of values 1 and 2."""
    if prompts.points.shape[1] == 0:
        return image > 0
    z, y, x = prompts.points[0, -1].long().tolist()
    return image == image[z, y, x]


def two_objects():
    image = np.zeros((1, 16, 16, 16), np.float32)
    image[0, 2:7, 3:12, 3:12] = 1
    image[0, 7:14, 3:12, 3:12] = 2
    truths = {"a": image[0] == 1, "b": image[0] == 2}
    known = {name: np.ones((16, 16, 16), bool) for name in truths}
    return image, truths, known


def run(rule, clicks=5):
    image, truths, known = two_objects()
    predictor = Predictor(Answers(rule), image, (1.0, 1.0, 1.0), precision="fp32")
    about = {"image": "i", "subject": "s", "set_image_ms": 0.0}
    objects = evaluate._image(predictor, truths, known, about, clicks, False, True, 1.0)
    return {o["object"]: o for o in objects}, evaluate._means(objects, clicks)


def test_a_perfect_model_reaches_the_most_and_its_prompts_matter():
    objects, means = run(clicked_value)
    assert means["dsc"] == [1.0] * 5
    assert means["dsc_auc"] == means["nsd_auc"] == 4.0
    assert means["dsc_wrong_prompt"] == 0.0
    assert means["click_prefers_own"] == 1.0
    union = {
        n: 2 * o["voxels"] / (o["voxels"] + sum(p["voxels"] for p in objects.values()))
        for n, o in objects.items()
    }
    for name, found in objects.items():
        assert found["dsc_no_prompt"] == pytest.approx(union[name])
    assert len(objects["a"]["click_ms"]) == 1  # nothing was wrong after the first click


def test_a_model_that_ignores_prompts_shows_it():
    _, means = run(lambda image, prompts: image > 0)
    assert means["dsc_wrong_prompt"] == means["dsc"][0] == means["dsc_no_prompt"]
    assert means["click_prefers_own"] == 0.5  # the larger object always wins
    assert means["dsc_auc"] == pytest.approx(4 * means["dsc"][0])


def test_the_challenge_gives_no_surface_score_below_a_dice_of_a_fifth():
    _, means = run(lambda image, prompts: np.zeros_like(image, dtype=bool))
    assert means["dsc"] == means["nsd"] == means["nsd_challenge"] == [0.0] * 5


class Columns:
    """A manifest's columns."""

    def __init__(self, **columns):
        self.columns = columns

    def column(self, name):
        return np.array(self.columns[name])


def test_seen_subjects_and_images_are_counted():
    manifest = Columns(subject=["s1", "s2", "s3", "s4"], content_hash=["h1", "h2", "h3", "h4"])
    training = {
        "subject_keys": ["s1"],
        "content_hashes": ["h3"],
        "pretraining": {"subject_keys": ["s1", "s2"], "content_hashes": ["h4"]},
    }
    rows = np.arange(4)
    assert seen_before(manifest, rows, training) == {"seen_in_training": 2, "seen_in_pretraining": 3}
    assert seen_before(manifest, rows, {**training, "pretraining": {}})["seen_in_pretraining"] == 0
    assert (
        seen_before(manifest, rows, {**training, "pretraining": {"samples": 3}})["seen_in_pretraining"]
        is None
    )
    later = {"subject_keys": ["s4"], "content_hashes": [], "pretraining": training}
    assert seen_before(manifest, rows, later) == {"seen_in_training": 1, "seen_in_pretraining": 4}
    assert seen_before(manifest, rows, {})["seen_in_training"] is None
    assert seen_before(manifest, rows, None) == {"seen_in_training": None, "seen_in_pretraining": None}


def test_the_report_is_json():
    _, means = run(clicked_value)
    assert json.loads(json.dumps(means)) == means
    report = {
        "mean": means, "n_objects": 2, "n_images": 1, "n_subjects": 1, "nsd_tolerance_mm": 1.0,
        "seen_in_training": 0, "seen_in_pretraining": None,
        "n_model_labels_left_out": 0, "n_other_channels_left_out": 3,
    }  # fmt: skip
    text = evaluate.describe(report)
    assert "1.000  1.000  1.000  1.000  1.000  4.000" in text
    assert "in pretraining: unknown" in text
    assert "left out, other number of channels: 3 images" in text
