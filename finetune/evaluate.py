"""The clicks protocol on the labelled samples of a shard dataset.

As in the CVPR 2025 interactive challenge: an optional box, then five clicks, each at the centre of the
largest error of the last mask. DSC and NSD after every click, their area under the click curve (box step
left out), and the two controls a promptable model must beat: itself with no prompt, and itself with a click
in another object.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import Manifest
from data_pipeline.shard_reader import ShardReader
from engine.errors import UserError
from finetune.batch import IGNORE, normalised
from finetune.inference import Predictor
from finetune.metrics import auc, dsc, nested_mean, nsd
from finetune.promptable import PromptableModel
from finetune.prompts import PromptList
from finetune.simulate import centre_click, tight_box
from finetune.weights import load_model

CHALLENGE_TOLERANCE_MM = 2.0
CHALLENGE_LEAST_DSC = 0.2
Object = dict[str, Any]


def evaluate_clicks(
    model: str | Path | PromptableModel,
    data: str | Path | Manifest,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    split: str = "test",
    sources: Sequence[str] = (),
    limit: int | None = None,
    clicks: int = 5,
    box: bool = False,
    controls: bool = True,
    allow_seen: bool = False,
    device: str = "cpu",
    precision: str = "bf16",
) -> dict[str, Any]:
    """Figures per object and their means, ready for JSON.

    Args:
        model: folder of a fine-tuned model, or a model in memory (then nothing is known about what it has
        seen).
        data: shard dataset.
        rows: manifest rows; by default the labelled rows of `split`, of `sources` where any is named, at most
        `limit` of them. Images of another number of channels than the model takes are left out and counted.
        clicks: clicks an object; the area under the curve spans them.
        box: give the tight box first, as a step of its own.
        controls: also predict without a prompt and with another object's click.
        allow_seen: go on where a test subject or image was seen in training.

    Raises:
        UserError: nothing to evaluate, or cases that were seen in training.
    """
    for name, number in (("clicks", clicks), ("limit", limit)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: at least 1")
    manifest = data if isinstance(data, Manifest) else Manifest.open(data)
    net, plan = (model, None) if isinstance(model, PromptableModel) else load_model(model, device)
    chosen = _rows(manifest, rows, split, sources)
    fits = manifest.column("shape")[chosen, 0] == net.config.channels
    if not fits.any():
        raise UserError(
            f"{manifest.root}: the model takes {net.config.channels} channels, which no chosen image has"
        )
    other_channels = int((~fits).sum())
    chosen = chosen[fits] if limit is None else chosen[fits][:limit]
    origin = manifest.column("label_origin")[chosen].astype(str)
    left_out = int((origin == "model").sum())
    chosen = chosen[origin != "model"]
    if len(chosen) == 0:
        raise UserError(
            f"{manifest.root}: all labels there were made by a model, which is no truth to measure against"
        )
    seen = seen_before(manifest, chosen, None if plan is None else plan.training_data)
    if any(seen.values()) and not allow_seen:
        raise UserError(
            f"{manifest.root}: of {len(chosen)} cases, {seen['seen_in_training'] or 0} were seen in training "
            f"and {seen['seen_in_pretraining'] or 0} in pretraining; take another split or pass --allow-seen"
        )
    tolerance = float(np.sort(manifest.column("spacing")[chosen], axis=1)[:, 1].max())
    was_training = net.training
    net.eval()
    objects: list[Object] = []
    try:
        for predictor, truths, known, about in _images(net, manifest, chosen, precision):
            objects += _image(predictor, truths, known, about, clicks, box, controls, tolerance)
    finally:
        net.train(was_training)
    return {
        "protocol": "clicks",
        "n_images": len(chosen),
        "n_objects": len(objects),
        "n_subjects": len(set(manifest.column("subject")[chosen].astype(str))),
        "n_undefined": sum(o["dsc"][-1] is None for o in objects),
        "n_model_labels_left_out": left_out,
        "n_other_channels_left_out": other_channels,
        "nsd_tolerance_mm": tolerance,
        **seen,
        "mean": _means(objects, clicks),
        "objects": objects,
    }


def seen_before(
    manifest: Manifest, rows: np.ndarray, training: dict[str, Any] | None
) -> dict[str, int | None]:
    """How many rows share a subject or an image with fine-tuning and with pretraining; None where the plan
    does not say."""
    subject, content = (manifest.column(name)[rows].astype(str) for name in ("subject", "content_hash"))

    def count(stages: Sequence[dict[str, Any]]) -> int | None:
        told = [s for s in stages if "subject_keys" in s and "content_hashes" in s]
        hit = np.zeros(len(rows), dtype=bool)
        for stage in told:
            hit |= np.isin(subject, stage["subject_keys"]) | np.isin(content, stage["content_hashes"])
        return int(hit.sum()) if hit.any() or len(told) == len(stages) else None

    if training is None:
        return {"seen_in_training": None, "seen_in_pretraining": None}
    # The encoder may come from a fine-tuned model, whose encoder was pretrained, and so on.
    before: list[dict[str, Any]] = []
    while training_before := (before[-1] if before else training).get("pretraining"):
        before.append(training_before)
    return {"seen_in_training": count([training]), "seen_in_pretraining": count(before)}


def _rows(
    manifest: Manifest, rows: Sequence[int] | np.ndarray | None, split: str, sources: Sequence[str]
) -> np.ndarray:
    chosen = manifest.select(split=split, labelled=True) if rows is None else np.asarray(rows)
    if sources:
        held = set(manifest.column("source").astype(str))
        if unknown := [name for name in sources if name not in held]:
            raise UserError(f"{manifest.root}: no source {unknown[0]!r}; it holds {', '.join(sorted(held))}")
        chosen = chosen[np.isin(manifest.column("source")[chosen].astype(str), list(sources))]
    if len(chosen) == 0:
        splits = ", ".join(sorted(set(manifest.column("split").astype(str))))
        raise UserError(
            f"{manifest.root}: no labelled sample in split {split!r}; the dataset holds the splits {splits}"
        )
    return chosen


def _images(
    net: PromptableModel, manifest: Manifest, rows: np.ndarray, precision: str
) -> Iterator[tuple[Predictor, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]]:
    """For each row: a predictor, its objects and known voxels by label name (stem order), and what the row
    is."""
    reader = ShardReader(manifest.root, manifest)
    names: dict[str, str] = manifest.info.get("labels", {})
    shapes, axes_of, spacings = (manifest.column(name) for name in ("shape", "axes", "spacing"))
    for row in rows.tolist():
        a, b, c = (int(v) for v in axes_of[row])
        size = shapes[row][1:].tolist()
        voxels = reader.read_box(row, "image", None, (0, 0, 0), size).transpose(0, 1 + a, 1 + b, 1 + c)
        seg = reader.read_box(row, "seg", None, (0, 0, 0), size).transpose(0, 1 + a, 1 + b, 1 + c)
        norm = np.array([list(n) for n in manifest.column("norm")[row]], dtype=np.float64)
        began = time.perf_counter()
        image, _ = normalised(np.ascontiguousarray(voxels), norm)
        geometry = str(manifest.column("geometry")[row])
        spacing = [float(spacings[row][i]) for i in (a, b, c)]
        predictor = Predictor(net, image, spacing, geometry, (a, b, c), precision=precision)
        truths: dict[str, np.ndarray] = {}
        known: dict[str, np.ndarray] = {}
        for layer in seg:
            for label in np.unique(layer):
                if label not in (0, IGNORE):
                    name = names.get(str(int(label)), str(int(label)))
                    truths[name], known[name] = layer == label, layer != IGNORE
        about = {
            "image": str(manifest.column("key")[row]),
            "subject": str(manifest.column("subject")[row]),
            "set_image_ms": (time.perf_counter() - began) * 1000,
        }
        yield predictor, truths, known, about


def _image(
    predictor: Predictor,
    truths: dict[str, np.ndarray],
    known: dict[str, np.ndarray],
    about: dict[str, Any],
    clicks: int,
    box: bool,
    controls: bool,
    tolerance: float,
) -> list[Object]:
    """All objects of one image by clicks, then the controls."""
    results = []
    first_masks: dict[str, np.ndarray] = {}
    for name, truth in truths.items():
        result, first_masks[name] = _object(predictor, truth, known[name], clicks, box, tolerance)
        results.append({**about, "object": name, "voxels": int(truth.sum()), **result})
    if not controls:
        return results
    predictor.reset()
    predictor.predict(PromptList(), PromptList())
    nothing = predictor.logits > 0
    predictor.reset()
    for result in results:
        name = result["object"]
        result["dsc_no_prompt"] = dsc(nothing & known[name], truths[name])
        others = sorted((o for o in truths if o != name), key=lambda o: -int(truths[o].sum()))
        result["dsc_wrong_prompt"] = None
        result["click_prefers_own"] = None
        if others:
            # The mask that a click in the largest other object gave, held against this one.
            result["dsc_wrong_prompt"] = dsc(first_masks[others[0]] & known[name], truths[name])
            own = int((first_masks[name] & truths[name]).sum())
            result["click_prefers_own"] = all(
                own > int((first_masks[name] & truths[other]).sum()) for other in others
            )
    return results


def _object(
    predictor: Predictor, truth: np.ndarray, known: np.ndarray, clicks: int, box: bool, tolerance: float
) -> tuple[Object, np.ndarray]:
    """Figures by click for one object, and the mask after the first click."""
    predictor.reset()
    prompts = PromptList()
    mask = np.zeros_like(truth)
    result: Object = {"dsc": [], "nsd": [], "nsd_challenge": [], "click_ms": []}
    if box:
        corners = tight_box(truth)
        assert corners is not None
        low, high = ((float(z), float(y), float(x)) for z, y, x in corners)
        prompts.boxes.append((low, high))
        predictor.predict(prompts, PromptList(boxes=[(low, high)]))
        mask = predictor.logits > 0
        result["dsc_box"] = dsc(mask & known, truth)
    first = mask
    for number in range(clicks):
        click = centre_click(mask, truth, known)
        if click is not None:
            (z, y, x), sign = click
            said = ((float(z), float(y), float(x)), sign)
            prompts.clicks.append(said)
            began = time.perf_counter()
            predictor.predict(prompts, PromptList(clicks=[said]))
            result["click_ms"].append((time.perf_counter() - began) * 1000)
            mask = predictor.logits > 0
        if number == 0:
            first = mask
        shown = mask & known
        score = dsc(shown, truth)
        result["dsc"].append(score)
        result["nsd"].append(nsd(shown, truth, predictor.spacing, tolerance))
        strict = nsd(shown, truth, predictor.spacing, CHALLENGE_TOLERANCE_MM)
        result["nsd_challenge"].append(0.0 if score is not None and score <= CHALLENGE_LEAST_DSC else strict)
    result["predicted_iou"] = predictor.iou
    result["dsc_auc"] = auc(result["dsc"])
    result["nsd_auc"] = auc(result["nsd"])
    return result, first


def _means(objects: Sequence[Object], clicks: int) -> dict[str, Any]:
    """Means over objects, then images, then subjects of every figure."""

    def mean(values: Sequence[Any]) -> float | None:
        return nested_mean(
            (o["subject"], o["image"], float(v)) for o, v in zip(objects, values) if v is not None
        )

    means: dict[str, Any] = {
        name: [mean([o[name][i] for o in objects]) for i in range(clicks)]
        for name in ("dsc", "nsd", "nsd_challenge")
    }
    for name in ("dsc_auc", "nsd_auc", "dsc_box", "dsc_no_prompt", "dsc_wrong_prompt", "click_prefers_own"):
        if any(name in o for o in objects):
            means[name] = mean([o.get(name) for o in objects])
    times = [t for o in objects for t in o["click_ms"]]
    means["click_ms"] = float(np.median(times)) if times else None
    return means


def describe(report: dict[str, Any]) -> str:
    """The means of a report as a few lines for people."""
    mean = report["mean"]

    def row(name: str, values: Sequence[float | None]) -> str:
        return f"{name:<22}" + "".join("      –" if v is None else f"{v:7.3f}" for v in values)

    steps = len(mean["dsc"])
    seen = {
        name: "unknown" if report[name] is None else report[name]
        for name in ("seen_in_training", "seen_in_pretraining")
    }
    lines = [
        f"{report['n_objects']} objects, {report['n_images']} images, {report['n_subjects']} subjects",
        f"seen in training: {seen['seen_in_training']}; in pretraining: {seen['seen_in_pretraining']}",
        f"{'clicks':<22}" + "".join(f"{i + 1:7d}" for i in range(steps)) + "    AUC",
        row("DSC", [*mean["dsc"], mean["dsc_auc"]]),
        row(f"NSD at {report['nsd_tolerance_mm']:.2g} mm", [*mean["nsd"], mean["nsd_auc"]]),
    ]
    labels = {
        "dsc_box": "DSC of the box",
        "dsc_no_prompt": "DSC, no prompt",
        "dsc_wrong_prompt": "DSC, other's click",
        "click_prefers_own": "click prefers its own",
    }
    for name, label in labels.items():
        if mean.get(name) is not None:
            lines.append(row(label, [mean[name]]))
    for name, label in (
        ("n_model_labels_left_out", "labels are a model's"),
        ("n_other_channels_left_out", "other number of channels"),
    ):
        if report[name]:
            lines.append(f"left out, {label}: {report[name]} images")
    if mean["click_ms"] is not None:
        lines.append(f"{'median ms a click':<22}{mean['click_ms']:7.0f}")
    return "\n".join(lines)
