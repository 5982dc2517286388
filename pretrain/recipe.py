"""The recipe of a pretraining run: every choice, its default and its meaning."""

from __future__ import annotations

from pydantic import Field

from data_pipeline.geometry import TokenConfig
from data_pipeline.order import MixtureConfig
from data_pipeline.shard_cache import CacheConfig
from engine.recipe import EngineConfig, Frozen, free
from model.config import EncoderConfig
from pretrain.objective import AugmentConfig, ObjectiveConfig

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
