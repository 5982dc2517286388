"""The recipe of a pretraining run: every choice, its default and its meaning."""

from __future__ import annotations

from pydantic import Field, model_validator

from data_pipeline.geometry import TokenConfig
from data_pipeline.order import MixtureConfig
from data_pipeline.shard_cache import CacheConfig
from engine.recipe import EngineConfig, Frozen, free
from model.config import EncoderConfig
from pretrain.objective import AugmentConfig, ObjectiveConfig, Share
from pretrain.probe_config import ProbeConfig

__all__ = ["AugmentConfig", "DataConfig", "EvaluationConfig", "ObjectiveConfig", "PretrainRecipe"]


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


class EvaluationConfig(Frozen):
    """Held-out loss and pictures during the run; they change no weight."""

    batches: int = free(4, "batches scored, each as large as one in training", ge=1)
    seed: int = free(20_000, "seed of the held-out crops and masks", ge=0)
    mask_ratios: tuple[Share, ...] = free(
        (0.5, 0.75, 0.9), "mask ratios at which the same crops are scored, beside that of training"
    )
    pictures: int = free(1, "pictures of each modality", ge=0)

    @model_validator(mode="after")
    def _ratios_differ(self) -> EvaluationConfig:
        if not all(0.0 < ratio < 1.0 for ratio in self.mask_ratios):
            raise ValueError(f"mask_ratios {list(self.mask_ratios)}: each lies between 0 and 1")
        if len({f"{ratio:.2f}" for ratio in self.mask_ratios}) < len(self.mask_ratios):
            raise ValueError(
                f"mask_ratios {list(self.mask_ratios)}: two of them are the same to two decimals"
            )
        return self


class PretrainRecipe(Frozen):
    """Everything that a pretraining run is made of; `python -m pretrain RECIPE.yaml --run DIR`."""

    data: DataConfig = DataConfig()
    tokens: TokenConfig = TokenConfig()
    mixture: MixtureConfig = MixtureConfig()
    encoder: EncoderConfig = EncoderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    probes: ProbeConfig = ProbeConfig()
    engine: EngineConfig = EngineConfig()
    run: str = free("", "folder of this run")
