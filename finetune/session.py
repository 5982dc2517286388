"""`PromptableSession`: an image, clicks and boxes in any frame, a mask on the image's own grid.

Names follow the tools people know (`set_image`, `predict` of SAM; `add_*`, `undo`, `reset` of nnInteractive).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_pipeline.geometry import geometry_of
from data_pipeline.volume import Volume
from engine.errors import UserError
from finetune.images import normalised_volume, volume_of
from finetune.inference import Patch, Predictor
from finetune.promptable import PromptableModel
from finetune.prompts import PromptList
from finetune.weights import load_model
from model.plan import AdaptationPlan

if TYPE_CHECKING:
    import SimpleITK

Frame = Literal["index", "ras", "lps"]


@dataclass
class _Step:
    """One prompt, and what the prediction that first used it overwrote."""

    clicks: list[Any] = field(default_factory=list)
    boxes: list[Any] = field(default_factory=list)
    patches: list[Patch] | None = None
    before: tuple[bool, float] = (False, 0.0)


class PromptableSession:
    """Segments one object at a time on one image.

    Args:
        model: folder of a fine-tuned model (or its run folder), or a `PromptableModel`.
        device: where the network runs.
        plan: with a `PromptableModel`, its plan; None for the default normalisation.
        precision: "bf16" or "fp32".

    Index prompts are (i, j, k), i fastest, for a path or a SimpleITK image, and in the array's own axis
    order for an ndarray. "ras" and "lps" are mm (x, y, z). Prompts are 0-based voxel centres; boxes are
    inclusive.
    """

    def __init__(
        self,
        model: str | Path | PromptableModel,
        device: str = "cpu",
        plan: AdaptationPlan | None = None,
        precision: Literal["bf16", "fp32"] = "bf16",
    ) -> None:
        if isinstance(model, PromptableModel):
            self.net, self.plan = model.to(device).eval(), plan
        else:
            self.net, self.plan = load_model(model, device)
        self.precision = precision
        self._predictor: Predictor | None = None
        self._volume: Volume | None = None
        self._array_order = False
        self._steps: list[_Step] = []

    def set_image(
        self,
        image: str | Path | Sequence[str | Path] | np.ndarray | SimpleITK.Image,
        spacing: Sequence[float] | None = None,
        modality: str | None = None,
    ) -> None:
        """Take an image; forgets all prompts.

        Args:
            image: a file or DICOM folder (several for several channels), a SimpleITK image, or an array (z,
            y, x) or
                (c, z, y, x) in any axis order, whose axes are taken to run S, P, L.
            spacing: mm, (z, y, x) as the array's axes; needed for an array, and for a file that states none.
            modality: CT, MR, XR or PT, where the file does not say.

        Raises:
            UserError: unreadable, of another number of channels than the model, without spacing or modality.
        """
        volume = volume_of(image, spacing, modality).to_lps()
        if len(volume.channels) != self.net.config.channels:
            raise UserError(
                f"the image has {len(volume.channels)} channels and the model takes "
                f"{self.net.config.channels}; give one file per channel"
            )
        geometry, axes = geometry_of(volume.shape, volume.spacing)
        encoder: Any = self.net.encoder
        if encoder is not None and geometry not in encoder.config.patch:
            raise UserError(f"the model's encoder has no stem for {geometry} images")
        image_lps = normalised_volume(volume, self.plan)
        a, b, c = axes
        self._axes = (a, b, c)
        self._volume = volume
        self._array_order = isinstance(image, np.ndarray)
        self._predictor = Predictor(
            self.net,
            image_lps.transpose(0, 1 + a, 1 + b, 1 + c),
            [volume.spacing[i] for i in axes],
            geometry,
            axes,
            precision=self.precision,
        )
        self._steps = []

    def add_point(self, coord: Sequence[float], positive: bool = True, frame: Frame = "index") -> None:
        """A click inside (`positive`) or outside the object. Raises UserError where it lies outside the
        image."""
        self._steps.append(_Step(clicks=[(self._stem_index(coord, frame), 1 if positive else -1)]))

    def add_box(self, minimum: Sequence[float], maximum: Sequence[float], frame: Frame = "index") -> None:
        """A box around the object: inclusive corners, in any order of corners. Raises UserError outside the
        image."""
        a, b = self._stem_index(minimum, frame), self._stem_index(maximum, frame)
        low, high = [min(p, q) for p, q in zip(a, b)], [max(p, q) for p, q in zip(a, b)]
        self._steps.append(_Step(boxes=[((low[0], low[1], low[2]), (high[0], high[1], high[2]))]))

    def undo(self) -> bool:
        """Take back the last prompt, with what it did to the mask; False where there is none. May be
        repeated."""
        if not self._steps:
            return False
        step = self._steps.pop()
        if step.patches is not None and self._predictor is not None:
            self._predictor.undo(step.patches, *step.before)
            # Prompts that were new in the same prediction are new again; only a prediction's last one holds
            # patches.
            for other in reversed(self._steps):
                if other.patches != []:
                    break
                other.patches = None
        return True

    def reset(self) -> None:
        """Forget all prompts and the mask; the image and what was computed of it stay."""
        self._steps = []
        if self._predictor is not None:
            self._predictor.reset()

    def predict(self) -> np.ndarray:
        """The mask for all prompts so far: bool, on the source grid: (z, y, x) as SimpleITK's array, or the
        array's shape.

        Raises UserError without an image or without a prompt.
        """
        predictor = self._ready()
        if not self._steps:
            raise UserError("no prompt yet; call add_point or add_box before predict")
        new = [step for step in self._steps if step.patches is None]
        if new:
            before = (predictor.started, predictor.iou)
            patches = predictor.predict(_joined(self._steps), _joined(new))
            for step in new:
                step.patches, step.before = [], before
            new[-1].patches = patches
        return self._to_source(predictor.logits > 0)

    @property
    def logits(self) -> np.ndarray:
        """Logits behind the last mask, float32, on the source grid; voxels never looked at hold a low
        value."""
        return self._to_source(self._ready().logits)

    @property
    def iou(self) -> float:
        """The model's own estimate of the IoU of the last mask, 0 to 1."""
        return self._ready().iou

    @property
    def source_affine(self) -> np.ndarray:
        """(4, 4) from the index (i, j, k, 1) on the source grid to LPS mm."""
        self._ready()
        assert self._volume is not None
        return self._volume.source_affine

    def _ready(self) -> Predictor:
        if self._predictor is None:
            raise UserError("no image yet; call set_image first")
        return self._predictor

    def _to_source(self, stem: np.ndarray) -> np.ndarray:
        assert self._volume is not None
        a, b, c = (self._axes.index(i) for i in range(3))
        return self._volume.to_source(stem.transpose(a, b, c))

    def _stem_index(self, coord: Sequence[float], frame: Frame) -> tuple[float, float, float]:
        """Voxel index in stem order of a point in `frame`."""
        self._ready()
        volume = self._volume
        assert volume is not None
        given = tuple(float(v) for v in coord)
        if len(given) != 3 or not all(np.isfinite(given)):
            raise UserError(f"a point is three numbers, not {coord}")
        if frame == "index":
            xyz = given[::-1] if self._array_order else given
            mm = volume.source_affine @ np.array([*xyz, 1.0])
            index = volume.index_of_lps_mm(mm[:3])
        elif frame in ("ras", "lps"):
            sign = np.array([-1.0, -1.0, 1.0]) if frame == "ras" else np.ones(3)
            index = volume.index_of_lps_mm(np.array(given) * sign)
        else:
            raise UserError(f"frame {frame!r} is not one of index, ras, lps")
        zyx = np.asarray(index, dtype=np.float64)[::-1]
        voxel = np.rint(zyx)
        # A hundredth of a voxel of room, so that a point on the rim of the image is not lost to rounding.
        if not all(-0.51 <= v <= n - 0.49 for v, n in zip(zyx, volume.shape)):
            z, y, x = volume.source_shape
            size = f"{z} x {y} x {x} (array order)" if self._array_order else f"{x} x {y} x {z} (i, j, k)"
            unit = "index" if frame == "index" else f"{frame.upper()} mm"
            raise UserError(
                f"the point {given} ({unit}) lies outside the image of {size} voxels; check frame and order"
            )
        voxel = np.clip(voxel, 0, np.array(volume.shape) - 1)
        a, b, c = (float(voxel[i]) for i in self._axes)
        return a, b, c


def _joined(steps: Sequence[_Step]) -> PromptList:
    return PromptList([c for s in steps for c in s.clicks], [b for s in steps for b in s.boxes])


@dataclass(frozen=True)
class Segmented:
    """What `segment` wrote: file, voxels of the mask, its volume and the model's own estimate of the IoU."""

    path: Path
    voxels: int
    millilitres: float
    iou: float

    def __str__(self) -> str:
        size = (
            f"{self.voxels} voxels, {self.millilitres:.3g} ml"
            if self.voxels
            else "EMPTY: nothing was found there"
        )
        return f"{self.path}: {size}; the model expects an IoU of {self.iou:.2f}"


def segment(
    checkpoint: str | Path,
    image: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    points: Sequence[tuple[Sequence[float], bool, Frame]] = (),
    boxes: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
    modality: str | None = None,
    spacing: Sequence[float] | None = None,
    device: str = "cpu",
) -> Segmented:
    """Segment one image and write the mask (uint8, 0 and 1) with the image's exact geometry.

    Args:
        checkpoint: run folder or exported folder of a fine-tuned model.
        image: file or DICOM folder; several for several channels.
        out: any file SimpleITK writes, such as seg.nii.gz.
        points: (coordinates, positive, frame) each, frame one of index (i, j, k), ras, lps (mm).
        boxes: inclusive (minimum, maximum) voxel indices (i, j, k) each.
        modality: where the file does not say.
        spacing: mm of x, y, z where the file states none; fewer numbers: the last one stands for the rest.

    Raises:
        UserError: nothing to segment, a prompt outside the image, or a file that cannot be read or written.
    """
    import SimpleITK

    if not points and not boxes:
        raise UserError("no prompt: give at least one point or box")
    session = PromptableSession(checkpoint, device=device)
    zyx = None if spacing is None else [*spacing, *[spacing[-1]] * (3 - len(spacing))][::-1]
    session.set_image(image, spacing=zyx, modality=modality)
    for coord, positive, frame in points:
        session.add_point(coord, positive, frame)
    for low, high in boxes:
        session.add_box(low, high)
    mask = session.predict()
    affine = session.source_affine
    step = np.linalg.norm(affine[:3, :3], axis=0)
    written = SimpleITK.GetImageFromArray(mask.astype(np.uint8))
    written.SetSpacing([float(s) for s in step])
    written.SetOrigin([float(v) for v in affine[:3, 3]])
    written.SetDirection([float(v) for v in (affine[:3, :3] / step).ravel()])
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(written, str(path))
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[-120:]
        raise UserError(f"{path}: cannot be written ({why}); use a name like seg.nii.gz") from None
    voxels = int(mask.sum())
    return Segmented(path, voxels, voxels * float(np.prod(step)) / 1000, session.iou)
