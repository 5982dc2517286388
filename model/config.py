"""What an encoder is: size, stems, switches. Frozen, checked, and stored whole in the adaptation plan."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["volume", "slab", "planar"]
Triple = tuple[int, int, int]
PositiveTriple = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]

KINDS: tuple[Kind, ...] = ("volume", "slab", "planar")
PATCH: dict[Kind, Triple] = {"volume": (8, 8, 8), "slab": (2, 16, 16), "planar": (1, 16, 16)}


class Shape(NamedTuple):
    """Transformer size: channels of a token, number of blocks, attention heads a block."""

    width: int
    depth: int
    heads: int


SIZES: dict[str, Shape] = {
    "nano": Shape(96, 4, 3),  # for tests
    "tiny": Shape(192, 12, 3),
    "small": Shape(384, 12, 6),
    "base": Shape(768, 12, 12),
    "large": Shape(1024, 24, 16),
    "huge": Shape(1280, 32, 16),
    "giant": Shape(1408, 40, 16),
}


class EncoderConfig(BaseModel):
    """Plain pre-norm ViT (Dosovitskiy et al. 2021) with three stems.

    `size` names a row of `SIZES`; `width`, `depth` and `heads`, where given, replace that row's numbers. What
    they come to is `config.shape` (also `encoder.width`, `.depth`, `.heads`). Patches are in stem axis order:
    for `slab` the thick axis comes first.

    Switches: `qk_norm` LayerNorm over each head's queries and keys (Dehghani et al. 2023); `swiglu` gated MLP
    at the cost of the plain one (Shazeer 2020); `layer_scale` initial value of a learned gain on every branch
    (Touvron et al. 2021), None for off; `registers` extra learned tokens a sequence (Darcet et al. 2024);
    `class_token` one more, in front; `drop_path` rate at the last block, rising linearly from 0 (Huang et al.
    2016), one choice a sequence and block; `learned_positions` grid (z, y, x) of a learned table that is
    added to the tokens and resized to other grids, None for off; `rotary` "mm" turns queries and keys by the
    token centre in mm along the patient axes, wavelengths log-spaced over `rotary_wavelengths` mm; "index" by
    the token centre in voxels of the crop, spacing unseen, the same wavelengths then in voxels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Literal["nano", "tiny", "small", "base", "large", "huge", "giant"] | None = "tiny"
    width: int | None = Field(default=None, ge=1)
    depth: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    channels: int = Field(default=1, ge=1)
    patch: dict[Kind, PositiveTriple] = Field(default_factory=lambda: dict(PATCH))
    qk_norm: bool = False
    swiglu: bool = False
    layer_scale: float | None = Field(default=None, gt=0)
    registers: int = Field(default=0, ge=0)
    class_token: bool = False
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    learned_positions: PositiveTriple | None = None
    rotary: Literal["mm", "index", "off"] = "mm"
    rotary_wavelengths: tuple[float, float] = (2.0, 2048.0)
    norm_eps: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> EncoderConfig:
        if self.size is None and None in (self.width, self.depth, self.heads):
            raise ValueError("without a size, width, depth and heads must all be given")
        width, _, heads = self.shape
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if self.rotary != "off" and (width // heads % 2 or width // heads < 6):
            raise ValueError(
                f"rotary positions on three axes need an even head width >= 6, not {width // heads}"
            )
        low, high = self.rotary_wavelengths
        if not 0 < low < high:
            raise ValueError(f"rotary_wavelengths must be 0 < shortest < longest, not {low}, {high}")
        if not self.patch:
            raise ValueError("patch names no stem; give at least one of volume, slab, planar")
        return self

    @property
    def shape(self) -> Shape:
        """Width, depth and heads after `size` and what overrides it."""
        named = SIZES[self.size] if self.size is not None else (0, 0, 0)
        return Shape(*(own or other for own, other in zip((self.width, self.depth, self.heads), named)))

    @property
    def mlp_hidden(self) -> int:
        """Hidden channels of the MLP; for SwiGLU of each half: two thirds of that, a multiple of 8."""
        hidden = self.shape.width * self.mlp_ratio
        return int(hidden) if not self.swiglu else max(8, round(hidden * 2 / 3 / 8) * 8)

    def explicit(self) -> EncoderConfig:
        """The same encoder with its numbers written out, so that it means the same when `SIZES` changes."""
        return self.model_copy(update={"size": None, **self.shape._asdict()})
