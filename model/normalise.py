"""Stored voxel values to the network's input range and back, on the device, always in float32.

A norm is seven numbers (slope, intercept, low, high, center, scale, compress):
real = stored * slope + intercept; v = clip(real, low, high); v = asinh(v / compress) if compress > 0;
output = (v - center) / scale.
"""

from __future__ import annotations

from torch import Tensor, asinh, clamp, compiler, float32, sinh, where


def _columns(norm: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The seven numbers of each sample, float32, shaped to broadcast over `like` (n, ...)."""
    if norm.shape != (like.shape[0], 7):
        raise ValueError(
            f"norm must be ({like.shape[0]}, 7) for values {tuple(like.shape)}, not {tuple(norm.shape)}"
        )
    columns = norm.to(device=like.device, dtype=float32).view(-1, 7, *[1] * (like.ndim - 1))
    return columns.unbind(1)


def may_look(x: Tensor) -> bool:
    """Whether a value may decide what is computed: on a device that would mean waiting, in compiled code a
    break."""
    return x.is_cpu and not compiler.is_compiling()


def _squash(
    real: Tensor, low: Tensor, high: Tensor, center: Tensor, scale: Tensor, compress: Tensor
) -> Tensor:
    value = clamp(real, low, high)
    if not may_look(compress) or bool((compress > 0).any()):  # asinh is costly, so not without need
        value = where(compress > 0, asinh(value / where(compress > 0, compress, 1.0)), value)
    return (value - center) / scale


def normalise(raw: Tensor, norm: Tensor, inside: Tensor | None = None) -> Tensor:
    """Network input from stored values.

    raw: (n, ...) stored values, any real dtype. norm: (n, 7) as above, float64 or float32. inside: bool,
    broadcastable to raw; where False the result is the normalised `low` (air), never 0, which would be mean
    tissue. Returns float32 (n, ...) at every precision of the model.
    """
    slope, intercept, low, high, center, scale, compress = _columns(norm, raw)
    real = raw.to(float32) * slope + intercept
    x = _squash(real, low, high, center, scale, compress)
    if inside is None:
        return x
    return where(inside, x, _squash(low, low, high, center, scale, compress))


def background(norm: Tensor) -> Tensor:
    """The normalised `low` of each sample, which stands in for voxels not there: (n, 7) -> (n,) float32."""
    _, _, low, high, center, scale, compress = norm.to(float32).unbind(1)
    return _squash(low, low, high, center, scale, compress)


def denormalise(x: Tensor, norm: Tensor) -> Tensor:
    """Real values (HU, SUV) from network-range values (n, ...): undoes `normalise` within [low, high]."""
    _, _, low, high, center, scale, compress = _columns(norm, x)
    value = x.to(float32) * scale + center
    value = where(compress > 0, sinh(value) * compress, value)
    return clamp(value, low, high)
