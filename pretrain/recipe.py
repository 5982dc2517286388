"""The recipe of a pretraining run: every choice, its default and its meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.geometry import TokenConfig
from data_pipeline.order import MixtureConfig
from data_pipeline.shard_cache import CacheConfig
from engine.recipe import EngineConfig, Frozen, free
from model.config import EncoderConfig

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DataConfig(Frozen):
    """Where the shards are and which of them are used."""

    root: str = free("", "folder that `medfm shards build` wrote, or its address (s3://…, https://…)")
    split: str = Field("train", description="split to train on")
    held_out: str = free("val", "split of the evaluation; its samples are never trained on")
    sources: tuple[str, ...] = Field((), description="use these sources only (none given: all)")
    exclude_sources: tuple[str, ...] = Field((), description="leave these sources out")
    exclude_subjects: tuple[str, ...] = Field((), description="leave these subjects (keyed hashes) out")
    max_damage: float = Field(
        0.01, ge=0.0, le=1.0, description="end the run at a higher share of damaged samples"
    )
    cache: CacheConfig = free(CacheConfig(), "copies of shards on a local disk")


class AugmentConfig(Frozen):
    """Random changes of a training crop; off at evaluation."""

    flip: Share = Field(0.5, description="probability of a flip, for each axis by itself")
    gain: float = Field(0.1, ge=0.0, lt=1.0, description="normalised values are multiplied by 1 ± this")
    shift: float = Field(0.1, ge=0.0, description="and moved by ± this")
    gamma: float = Field(0.2, ge=0.0, lt=1.0, description="MR and XR: range to the power exp(± this)")


class ObjectiveConfig(Frozen):
    """Masked autoencoding (He et al. 2022, arXiv 2111.06377) and its decoder."""

    mask_ratio: float = Field(
        0.75, gt=0.0, lt=1.0, description="share of a crop's valid tokens that is hidden"
    )
    masking: Literal["random", "block"] = Field(
        "random", description="hide single tokens, or whole blocks of them"
    )
    mask_block: tuple[int, int, int] = Field((2, 2, 2), description="block size in tokens, stem axis order")
    predict_share: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the hidden tokens that is predicted"
    )
    norm_pix: bool = Field(False, description="score against patches of zero mean and unit variance")
    decoder: Literal["self", "cross"] = Field(
        "self",
        description="self: mask tokens and visible ones attend to each other (MAE); "
        "cross: each mask token reads the visible ones (CrossMAE, Fu et al. 2024)",
    )
    decoder_width: int = Field(384, ge=12, multiple_of=2)
    decoder_depth: int = Field(4, ge=1)
    decoder_heads: int = Field(6, ge=1)
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _heads_fit(self) -> ObjectiveConfig:
        width, rest = divmod(self.decoder_width, self.decoder_heads)
        if rest or width % 2 or width < 6:
            raise ValueError(
                f"decoder_width {self.decoder_width} over decoder_heads {self.decoder_heads}: "
                "rotary positions need heads of an even width of at least 6"
            )
        return self


class EvaluationConfig(Frozen):
    """Held-out loss and pictures during the run; they change no weight."""

    batches: int = free(4, "batches scored, each as large as one in training", ge=1)
    seed: int = free(20_000, "seed of the held-out crops and masks", ge=0)
    pictures: int = free(1, "pictures of each modality", ge=0)


class PretrainRecipe(Frozen):
    """Everything that a pretraining run is made of; `python -m pretrain RECIPE.yaml --run DIR`."""

    data: DataConfig = DataConfig()
    tokens: TokenConfig = TokenConfig()
    mixture: MixtureConfig = MixtureConfig()
    encoder: EncoderConfig = EncoderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    run: str = free("", "folder of this run")
