"""The adaptation plan: what somebody must know to use the weights rightly, stored beside them as plan.json.

Idea of a plan beside the weights: nnssl's adaptation_plan.json. Reading one needs no torch.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.config import EncoderConfig
from model.errors import UserError

FORMAT_VERSION = 1
PLAN_FILE = "plan.json"

Modality = Literal["CT", "MR", "XR", "PT"]


class NormalisationRule(BaseModel):
    """How values of one modality reach the network: v = clip(real, low, high); asinh(v / compress) if
    compress > 0; x = (v - center) / scale.

    kind "fixed": the numbers stand here, in real units (HU, SUV). kind "percentile": low and high are these
    percentiles of the whole volume's non-background, center and scale the mean and standard deviation there
    after clipping.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fixed", "percentile"]
    units: str = "arbitrary"
    low: float
    high: float
    center: float | None = None
    scale: float | None = None
    compress: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> NormalisationRule:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        if self.kind == "fixed" and (self.center is None or self.scale is None or not self.scale > 0):
            raise ValueError("a fixed rule states center and a scale above 0")
        return self


DEFAULT_NORMALISATION: dict[Modality, NormalisationRule] = {
    "CT": NormalisationRule(kind="fixed", units="HU", low=-1024, high=3071, center=-200, scale=500),
    "PT": NormalisationRule(kind="fixed", units="SUV", low=0, high=100, center=0.5, scale=1, compress=1),
    "MR": NormalisationRule(kind="percentile", low=0.5, high=99.5),
    "XR": NormalisationRule(kind="percentile", low=0.5, high=99.5),
}


class AdaptationPlan(BaseModel):
    """Everything beside the numbers of the weights.

    axis_order "zyx-LPS": arrays are (c, z, y, x) with x growing to the patient's left, y to posterior, z to
    superior. token_order "C": tokens in C order over (z, y, x), voxels of a token in (c, z, y, x).
    spacing_range: smallest and largest voxel spacing in mm that training saw, over all axes. stems: those
    that training fed. head: configuration of a head stored in the same folder, None for a bare encoder. An
    unknown axis order, token order or normalisation is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    architecture: EncoderConfig
    axis_order: Literal["zyx-LPS"] = "zyx-LPS"
    token_order: Literal["C"] = "C"
    normalisation: dict[Modality, NormalisationRule] = Field(
        default_factory=lambda: dict(DEFAULT_NORMALISATION)
    )
    spacing_range: tuple[float, float] | None = None
    stems: tuple[Literal["volume", "slab", "planar"], ...] = ()
    training_data: dict[str, Any] = Field(default_factory=dict)
    licence: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    head: dict[str, Any] | None = None


def installed_versions() -> dict[str, str]:
    """Versions that a plan records, of what is installed."""
    found = {}
    for name in ("medfm", "torch", "timm", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_plan(path: str | Path) -> AdaptationPlan:
    """Plan from a plan.json; UserError when missing, damaged, newer, or of an order or rule unknown here."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found; weights are read only with the plan that says how to use them"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy the folder again") from None
    number = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(number, int):
        raise UserError(f"{path}: is not an adaptation plan (no format_version)")
    if number > FORMAT_VERSION:
        raise UserError(
            f"{path}: is format {number} and this medfm reads up to {FORMAT_VERSION}; update medfm"
        )
    try:
        return AdaptationPlan.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first thing wrong, in one line, by field name."""
    found = error.errors()[0]
    field = ".".join(str(part) for part in found["loc"])
    if field in ("axis_order", "token_order") or field.startswith("normalisation"):
        return f"{field} {found['input']!r} is unknown to this medfm; refused, as features would be wrong"
    return f"{field}: {found['msg']} (found {found['input']!r})"


def plan_text(plan: AdaptationPlan) -> str:
    """Content of plan.json; architecture numbers are written out, and versions where the plan has none."""
    update = {"architecture": plan.architecture.explicit(), "versions": plan.versions or installed_versions()}
    return json.dumps(plan.model_copy(update=update).model_dump(mode="json"), indent=2) + "\n"


def write_plan(path: str | Path, plan: AdaptationPlan | str) -> None:
    """Write plan.json in one step (temporary file, then rename); plan: or its `plan_text`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(plan if isinstance(plan, str) else plan_text(plan), encoding="utf-8")
    os.replace(temporary, path)


def norm_for(plan: AdaptationPlan, modality: str) -> tuple[float, ...] | None:
    """Norm, for real values, of a modality with a fixed rule; None for a percentile rule."""
    rule = plan.normalisation.get(modality)  # type: ignore[call-overload]
    if rule is None:
        known = ", ".join(plan.normalisation)
        raise UserError(
            f"modality {modality!r} is not in this encoder's plan, which has {known}; name one of those"
        )
    if rule.kind == "percentile":
        return None
    assert rule.center is not None
    assert rule.scale is not None
    return (1.0, 0.0, rule.low, rule.high, rule.center, rule.scale, rule.compress)


def normalise_for(
    plan: AdaptationPlan, modality: str, values: np.ndarray, norm: tuple[float, ...] | None = None
) -> np.ndarray:
    """Network input, float32, from real values (HU, SUV, intensity) of one modality as the plan says.

    values: array of any shape; not finite means no voxel there and becomes the normalised low. norm: (slope,
    intercept, low, high, center, scale, compress) of this volume, needed for a percentile rule (statistics of
    the whole volume, never of a crop) and otherwise taken from the plan. Its slope and intercept lead from
    stored to real values, and are not used here, as values are real already.
    """
    fixed = norm_for(plan, modality)
    if fixed is None and norm is None:
        raise UserError(
            f"{modality} is normalised by statistics of the whole volume; "
            "pass norm=(slope, intercept, low, high, center, scale, compress)"
        )
    chosen = norm if norm is not None else fixed
    assert chosen is not None
    _, _, low, high, center, scale, compress = chosen
    real = np.asarray(values, dtype=np.float32)
    real = np.where(np.isfinite(real), np.clip(real, low, high), np.float32(low))
    if compress > 0:
        real = np.arcsinh(real / np.float32(compress))
    return ((real - np.float32(center)) / np.float32(scale)).astype(np.float32, copy=False)
