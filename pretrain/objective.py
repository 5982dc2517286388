"""What masked autoencoding is: masks, targets, decoder, and the random changes of its crops."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.recipe import Frozen

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class AugmentConfig(Frozen):
    """Random changes of a training crop; off at evaluation."""

    flip: Share = Field(0.5, description="probability of a flip, for each axis by itself")
    gain: float = Field(0.1, ge=0.0, lt=1.0, description="normalised values are multiplied by 1 ± this")
    shift: float = Field(0.1, ge=0.0, description="and moved by ± this")
    gamma: float = Field(0.2, ge=0.0, lt=1.0, description="MR and XR: range to the power exp(± this)")


class ObjectiveConfig(Frozen):
    """Masked autoencoding (He et al. 2022, arXiv 2111.06377) and its decoder."""

    mask_ratio: float | tuple[float, float] = Field(
        0.75, description="share of a crop's valid tokens that is hidden; [low, high]: drawn for each crop"
    )
    masking: Literal["random", "block"] = Field(
        "random", description="hide single tokens, or whole blocks of them"
    )
    mask_block: tuple[int, int, int] = Field((2, 2, 2), description="block size in tokens, stem axis order")
    predict_share: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the hidden tokens that is predicted"
    )
    norm_pix: bool = Field(False, description="score against patches of zero mean and unit variance")
    gradient_weight: float = Field(
        0.0,
        ge=0.0,
        description="adds this times the squared error of the differences between neighbouring voxels of a "
        "patch",
    )
    decoder: Literal["self", "cross"] = Field(
        "self",
        description="self: mask tokens and visible ones attend to each other (MAE); "
        "cross: each mask token reads the visible ones (CrossMAE, Fu et al. 2024)",
    )
    decoder_width: int = Field(384, ge=12, multiple_of=2)
    decoder_depth: int = Field(4, ge=1)
    decoder_heads: int = Field(6, ge=1)
    augment: AugmentConfig = AugmentConfig()

    @property
    def ratios(self) -> tuple[float, float]:
        """Smallest and largest mask ratio of a crop."""
        return self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio, self.mask_ratio)

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        low, high = self.ratios
        if not 0.0 < low <= high < 1.0:
            raise ValueError(
                f"mask_ratio {self.mask_ratio}: a share between 0 and 1, or two of them, lower first"
            )
        if min(self.mask_block) < 1:
            raise ValueError(f"mask_block {list(self.mask_block)}: a block has at least one token an axis")
        width, rest = divmod(self.decoder_width, self.decoder_heads)
        if rest or width % 2 or width < 6:
            raise ValueError(
                f"decoder_width {self.decoder_width} over decoder_heads {self.decoder_heads}: "
                "rotary positions need heads of an even width of at least 6"
            )
        return self
