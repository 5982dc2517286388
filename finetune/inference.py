"""From prompts to a mask on an image of any size.

An image that fits the head's window (or little more) is one window, as in training. In a larger one a
window is laid around the newest prompt; where its change of the mask runs into a side of the window that is
not a side of the image, the view is widened (2x, then 4x coarser), and what the coarse view changed is then
refined at full resolution, window by window, with the coarse logits as the previous prediction. The image
half of each window is kept in a bounded cache, so a click costs the prompt half.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.geometry import PATCH
from finetune.network import Triple, scales_for, window_multiple
from finetune.promptable import Features, PromptableModel
from finetune.prompts import PromptList, collate_prompts

ZOOMS = (1, 2, 4)
ROOM = 2.0  # an image of up to this many times the window's voxels is taken whole
ABSENT = -12.0  # logit where nothing was ever predicted


class View(NamedTuple):
    """A window of the image: `zoom` image voxels per voxel, first image voxel `origin`, `shape` window
    voxels (stem order)."""

    zoom: Triple
    origin: Triple
    shape: Triple


@dataclass
class Patch:
    """A box of logits as it was before a prediction, for undo."""

    box: tuple[slice, slice, slice]
    before: np.ndarray


class Predictor:
    """Logits of one object on one image, prompt by prompt.

    Args:
        net: a model in eval mode.
        image: (c, Z, Y, X) float32 normalised, stem order.
        spacing: mm, stem order.
        geometry, axes: as `PromptableModel.encode` takes them.
        cached_windows: image halves kept, the least recently used dropped first.
        precision: bf16 runs the network under bfloat16 autocast.
    """

    def __init__(
        self,
        net: PromptableModel,
        image: np.ndarray,
        spacing: Sequence[float],
        geometry: str = "volume",
        axes: Sequence[int] = (0, 1, 2),
        cached_windows: int = 8,
        precision: str = "bf16",
    ) -> None:
        if image.ndim != 4 or image.shape[0] != net.config.channels:
            raise ValueError(
                f"image of shape {image.shape} does not have the {net.config.channels} channels of the model"
            )
        self.net = net
        self.image = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        self.shape: Triple = cast(Triple, tuple(image.shape[1:]))
        self.spacing = tuple(float(s) for s in spacing)
        self.geometry = geometry
        self.axes = tuple(axes)
        self.precision = precision
        self.cached_windows = cached_windows
        self._features: OrderedDict[View, Features] = OrderedDict()
        self._fill = self.image.flatten(1).amin(1)
        self.encoded = 0  # image halves computed so far
        patches = PATCH if net.encoder is None else cast(Any, net.encoder).config.patch
        self._patch: Triple = tuple(patches[geometry])
        self.reset()

    def reset(self) -> None:
        """Forget the object; the cache of image halves stays."""
        self.logits = np.full(self.shape, ABSENT, dtype=np.float32)
        self.started = False
        self.iou = 0.0

    @torch.inference_mode()
    def predict(self, prompts: PromptList, newest: PromptList) -> list[Patch]:
        """Update `logits` (Z, Y, X) for all `prompts`, of which `newest` are new since the last call.

        Coordinates are voxels of the image in stem order. Without any prompt the view is the middle of the
        image. Returns what was overwritten, oldest first.
        """
        undo: list[Patch] = []
        first = not self.started
        focus, extent = self._focus(newest or prompts)
        for zoom in ZOOMS:
            view = self._view(focus, zoom)
            if extent is not None and zoom < ZOOMS[-1] and not self._holds(view, *extent):
                continue
            seen = self._seen(view)
            logits, iou = self._look(view, prompts, None if first else seen)
            if zoom == ZOOMS[-1] or not self._runs_out(view, (logits > 0) != (seen > 0)):
                break
        self.iou = iou
        if max(view.zoom) == 1:
            undo.append(self._paste(view, logits))
        else:
            undo.append(self._paste(view, self._enlarge(view, logits)))
            undo += self._refine(undo[0], prompts)
        self.started = True
        return undo

    def undo(self, patches: Sequence[Patch], started: bool, iou: float) -> None:
        """Put back what `predict` overwrote."""
        for patch in reversed(patches):
            self.logits[patch.box] = patch.before
        self.started, self.iou = started, iou

    # Views

    def _multiple(self, shape: Sequence[int], zoom: Triple) -> Triple:
        spacing = [s * k for s, k in zip(self.spacing, zoom)]
        return window_multiple(scales_for(spacing, [n == 1 for n in shape]), self._patch)

    def _zoom(self, factor: int) -> Triple:
        """Zoom per axis: an axis of length 1, or the thick axis of a slab, keeps its resolution."""
        kept = self.geometry == "slab"
        z, y, x = (1 if n == 1 or (kept and a == 0) else factor for a, n in enumerate(self.shape))
        return z, y, x

    def _view(self, focus: Sequence[float], factor: int) -> View:
        zoom = self._zoom(factor)
        reduced = [-(-n // k) for n, k in zip(self.shape, zoom)]
        multiple = self._multiple(self.shape, zoom)
        whole = [-(-n // m) * m for n, m in zip(reduced, multiple)]
        window = [
            1 if n == 1 else -(-w // m) * m for w, m, n in zip(self.net.config.window, multiple, self.shape)
        ]
        if np.prod(whole) <= ROOM * np.prod(window):
            size = whole
        else:
            size = [min(a, b) for a, b in zip(whole, window)]
        origin = []
        for n, k, s, f in zip(self.shape, zoom, size, focus):
            if s * k >= n:
                origin.append(0)
            else:
                first = round((f - (s * k - 1) / 2) / k) * k
                origin.append(int(np.clip(first, 0, -(-(n - s * k) // k) * k)))
        return View(zoom, cast(Triple, tuple(origin)), cast(Triple, tuple(size)))

    def _focus(
        self, prompts: PromptList
    ) -> tuple[list[float], tuple[Sequence[float], Sequence[float]] | None]:
        """Where to look, and the box that must be in view, if one was given."""
        if prompts.boxes:
            low, high = prompts.boxes[-1]
            return [(a + b) / 2 for a, b in zip(low, high)], (low, high)
        if prompts.clicks:
            return list(prompts.clicks[-1][0]), None
        return [(n - 1) / 2 for n in self.shape], None

    def _holds(self, view: View, low: Sequence[float], high: Sequence[float]) -> bool:
        return all(
            o <= a and b < o + s * k for o, s, k, a, b in zip(view.origin, view.shape, view.zoom, low, high)
        )

    def _runs_out(self, view: View, changed: np.ndarray) -> bool:
        """Whether the change of the mask touches a side of the view beyond which the image goes on."""
        for axis in range(3):
            length = view.shape[axis]
            if view.origin[axis] > 0 and changed.take(0, axis).any():
                return True
            end = view.origin[axis] + length * view.zoom[axis]
            if end < self.shape[axis] and changed.take(length - 1, axis).any():
                return True
        return False

    # The network

    def _look(self, view: View, prompts: PromptList, previous: np.ndarray | None) -> tuple[np.ndarray, float]:
        device = self.net.prompt.base.device
        local = PromptList(
            [(self._inside(view, where), sign) for where, sign in prompts.clicks],
            [(self._inside(view, low), self._inside(view, high)) for low, high in prompts.boxes],
        )
        spacing = torch.tensor([[s * k for s, k in zip(self.spacing, view.zoom)]])
        given = collate_prompts([local], spacing).to(device)
        before = None if previous is None else torch.from_numpy(previous)[None, None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features = self._image_half(view, spacing.to(device))
            logits, iou = self.net.answer(features, given, before)
        return logits[0, 0].float().cpu().numpy(), float(iou[0])

    def _inside(self, view: View, where: Sequence[float]) -> tuple[float, float, float]:
        """Image voxel to view voxel: the centre of a coarse voxel is the mean of the fine centres it
        covers."""
        z, y, x = ((w - o + 0.5) / k - 0.5 for w, o, k in zip(where, view.origin, view.zoom))
        return z, y, x

    def _image_half(self, view: View, spacing: Tensor) -> Features:
        if view in self._features:
            self._features.move_to_end(view)
            return self._features[view]
        device = spacing.device
        image, valid = self._cut(self.image, view, self._fill)
        features = self.net.encode(
            image[None].to(device),
            spacing,
            self.geometry,
            self.axes,
            None if valid.all() else valid[None].to(device),
        )
        self.encoded += 1
        self._features[view] = features
        while len(self._features) > self.cached_windows:
            self._features.popitem(last=False)
        return features

    def _cut(self, array: Tensor, view: View, fill: Tensor) -> tuple[Tensor, Tensor]:
        """(c, z, y, x) of a view, averaged over its zoom, and where it lies inside the image."""
        lengths = [s * k for s, k in zip(view.shape, view.zoom)]
        stops = [min(o + n, end) for o, n, end in zip(view.origin, lengths, self.shape)]
        part = array[(slice(None), *(slice(o, e) for o, e in zip(view.origin, stops)))]
        missing = [n - m for n, m in zip(lengths, part.shape[1:])]
        valid = part.new_ones(1, *part.shape[1:])
        tail = [0, missing[2], 0, missing[1], 0, missing[0]]
        if any(missing):
            valid = F.pad(valid, tail)
            part = torch.where(valid > 0, F.pad(part, tail), fill[:, None, None, None])
        if max(view.zoom) > 1:
            part = F.avg_pool3d(part[None], view.zoom, view.zoom)[0]
            valid = F.max_pool3d(valid[None], view.zoom, view.zoom)[0]
        return part, valid[0] > 0

    # Logits between views and the image

    def _box(self, view: View) -> tuple[slice, slice, slice]:
        z, y, x = (
            slice(o, min(o + s * k, n)) for o, s, k, n in zip(view.origin, view.shape, view.zoom, self.shape)
        )
        return z, y, x

    def _seen(self, view: View) -> np.ndarray:
        """The present logits as a view sees them."""
        part, _ = self._cut(torch.from_numpy(self.logits)[None], view, torch.tensor([ABSENT]))
        return part[0].numpy()

    def _enlarge(self, view: View, logits: np.ndarray) -> np.ndarray:
        full = [s * k for s, k in zip(view.shape, view.zoom)]
        grown = F.interpolate(
            torch.from_numpy(logits)[None, None], size=full, mode="trilinear", align_corners=False
        )
        return grown[0, 0].numpy()

    def _paste(self, view: View, logits: np.ndarray) -> Patch:
        box = self._box(view)
        before = self.logits[box].copy()
        self.logits[box] = logits[tuple(slice(0, b.stop - b.start) for b in box)]
        return Patch(box, before)

    def _refine(self, coarse: Patch, prompts: PromptList) -> list[Patch]:
        """Full-resolution windows over what a coarse view changed, its logits going before.

        Windows without any surface of the mask are left as they are.
        """
        box = coarse.box
        changed = (self.logits[box] > 0) != (coarse.before > 0)
        if not changed.any():
            return []
        window = self._view([(n - 1) / 2 for n in self.shape], 1).shape
        starts = []
        for axis in range(3):
            found = np.flatnonzero(changed.any(axis=tuple(a for a in range(3) if a != axis)))
            # A margin of an eighth of a window, so that the surface is not seen at a window's edge.
            margin = window[axis] // 8
            low = max(int(found[0]) + box[axis].start - margin, 0)
            high = min(int(found[-1]) + 1 + box[axis].start + margin, self.shape[axis])
            count = max(1, -(-(high - low) // window[axis]))
            starts.append([low + (high - low - window[axis]) * i // max(count - 1, 1) for i in range(count)])
        undo = []
        for corner in itertools.product(*starts):
            view = self._view([c + (w - 1) / 2 for c, w in zip(corner, window)], 1)
            within = tuple(
                slice(max(v.start - b.start, 0), max(v.stop - b.start, 0))
                for v, b in zip(self._box(view), box)
            )
            seen = self._seen(view)
            if not changed[within].any() or not (seen > 0).any() or (seen > 0).all():
                continue
            logits, _ = self._look(view, prompts, seen)
            undo.append(self._paste(view, logits))
        return undo
