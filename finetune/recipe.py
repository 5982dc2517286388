"""The recipe of a fine-tuning run: every choice, its default and its meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from data_pipeline.order import MixtureConfig
from data_pipeline.shard_cache import CacheConfig
from engine.recipe import EngineConfig, Frozen
from finetune.promptable import HeadConfig
from model.config import EncoderConfig

Share = Annotated[float, Field(ge=0.0, le=1.0)]
FREE: Any = {"free": True}  # changes no weight of the trained network


class DataConfig(Frozen):
    """Where the labelled shards are and which of them are used."""

    root: str = Field(
        "",
        json_schema_extra=FREE,
        description="folder that `medfm shards build` wrote, or its address (s3://…, https://…)",
    )
    split: str = Field("train", description="split to train on")
    held_out: str = Field("val", description="split of the evaluation during the run; never trained on")
    sources: tuple[str, ...] = Field((), description="use these sources only (none given: all)")
    modalities: tuple[str, ...] = Field((), description="use these modalities only (none given: all)")
    cases: int = Field(
        0, ge=0, description="train on this many labelled cases, drawn by case_seed; 0 for all"
    )
    case_seed: int = Field(0, ge=0, description="seed of that draw")
    max_damage: float = Field(
        0.01, ge=0, le=1, description="end the run at a higher share of damaged samples"
    )
    cache: CacheConfig = Field(
        CacheConfig(), json_schema_extra=FREE, description="copies of shards on a local disk"
    )


class EncoderChoice(Frozen):
    """Which encoder the head stands on and how it is trained."""

    path: str = Field("", description="pretrained encoder (folder, file or run); empty for none")
    config: EncoderConfig | None = Field(
        None, description="shape of an encoder with random weights, without a path"
    )
    from_scratch: bool = Field(False, description="matched control: the architecture at path, random weights")
    mode: Literal["full", "frozen"] = Field("full", description="train the encoder too, or keep it as it is")
    lr_scale: float = Field(0.1, gt=0, description="learning rate of a pretrained encoder over the head's")
    layer_decay: float = Field(0.9, gt=0, le=1, description="further factor for each block below the last")


class PromptTraining(Frozen):
    """The simulated person of training."""

    rounds: tuple[int, int] = Field(
        (1, 4), description="fewest and most predictions per object; drawn uniformly"
    )
    box: Share = Field(0.25, description="probability that the first prompt is a box instead of a click")
    box_jitter: float = Field(0.1, ge=0, description="box faces move by up to this share of the box's length")
    powers: tuple[float, ...] = Field(
        (0.0, 1.0, 4.0), description="clicks fall with probability ~ depth ** one of these"
    )
    from_truth: Share = Field(
        0.1, description="probability that a later click is drawn from the object, not the error"
    )
    minimum_voxels: int = Field(
        8, ge=1, description="objects with fewer voxels in the crop are not asked for"
    )
    iou_weight: float = Field(0.5, ge=0, description="weight of the squared error of the predicted IoU")
    spread: Share = Field(
        0.1, description="weight of the mean over the three first masks beside the best of them"
    )


class AugmentConfig(Frozen):
    """Random changes of a training crop; off at evaluation."""

    flip: Share = Field(0.5, description="probability of a flip along each axis")
    affine: Share = Field(0.7, description="probability of a rotation and zoom")
    degrees: float = Field(
        15.0, ge=0, description="largest rotation about each axis (planar: in the plane only)"
    )
    zoom: float = Field(0.2, ge=0, lt=1, description="sizes change by exp(+-this)")
    gain: float = Field(0.2, ge=0, lt=1, description="normalised values are multiplied by 1 +- this")
    shift: float = Field(0.2, ge=0, description="and moved by +- this")
    gamma: float = Field(0.3, ge=0, description="MR and XR: range to the power exp(+- this)")
    noise: float = Field(0.1, ge=0, description="largest standard deviation of added Gaussian noise")


class EvaluationConfig(Frozen):
    """Clicks on held-out cases during the run; they change no weight."""

    cases: int = Field(
        4, ge=0, json_schema_extra=FREE, description="held-out cases segmented by simulated clicks"
    )
    clicks: int = Field(3, ge=1, json_schema_extra=FREE, description="clicks on each object")


class FinetuneRecipe(Frozen):
    """Everything that a fine-tuning run is made of; `python -m finetune RECIPE.yaml --run DIR`."""

    data: DataConfig = DataConfig()
    encoder: EncoderChoice = EncoderChoice()
    head: HeadConfig = HeadConfig()
    prompts: PromptTraining = PromptTraining()
    augment: AugmentConfig = AugmentConfig()
    mixture: MixtureConfig = MixtureConfig(foreground=1.0, groups=4, rows_per_group=1)
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    run: str = Field("", json_schema_extra=FREE, description="folder of this run")
