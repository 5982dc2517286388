"""Recipes: YAML checked by frozen pydantic models.

A recipe is a YAML mapping. `base: other.yaml` (relative to the file that says so) starts from another recipe;
mappings are merged key by key, everything else is replaced. Any field may be set from the command line as
`--encoder.size small`; the value is read as YAML and checked by the same model.

The command-line part is a small dotted parser instead of `tyro`: a recipe holds unions of models, mappings
and lists of models, which tyro turns into subcommands or fixed-length options, and it reports a bad value as
a box of lines and an exit of its own, where a recipe's error is one line that also names the file the value
came from.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import UserError
from engine.verdict import write_text

COMMAND_LINE = "command line"
Schema = TypeVar("Schema", bound=BaseModel)


class Frozen(BaseModel):
    """Base of every recipe section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def free(default: Any, description: str, **bounds: Any) -> Any:
    """A field that does not change the result (paths, logging, micro-batch, ZeRO stage): a resume may change
    it."""
    return Field(default, description=description, json_schema_extra={"free": True}, **bounds)


class EngineConfig(Frozen):
    """How a model is optimised, saved and logged. Fields made with `free` may differ between a run and its
    resume."""

    updates: int = Field(
        1000, ge=1, description="optimizer updates in the whole run; the schedule ends there"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's decay rates of the two moments")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(
        0.05, ge=0, description="decoupled weight decay; a group of the task may set its own"
    )
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 switches clipping off")
    warmup: int = Field(50, ge=0, description="updates of linear warm-up")
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine",
        description="what follows the warm-up; wsd: constant, then a decay, so that a run can be extended",
    )
    decay: int = Field(
        0, ge=0, description="updates of the decay that ends wsd; 0 takes a tenth of `updates`"
    )
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine or the decay")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="bf16: matrix products and what passes between blocks in bfloat16, weights in float32",
    )
    seed: int = Field(0, ge=0, description="of every random choice of the run")
    spike: float = Field(
        10.0,
        ge=0,
        description="an update is skipped whose loss lies this many robust standard deviations above the "
        "median of the last ones; 0 skips none but those that are not finite",
    )
    spike_window: int = Field(
        128, ge=16, description="losses of applied updates that a spike is held against"
    )
    max_bad_updates: int = Field(
        20, ge=1, description="skipped updates in a row after which the run goes back to a checkpoint"
    )
    max_rollbacks: int = Field(2, ge=0, description="times a run goes back in a row before it fails")
    zero_stage: Literal[0, 1, 2, 3] = free(
        1, "what DeepSpeed shards: nothing, moments, + gradients, + parameters"
    )
    activation_checkpointing: bool = free(False, "recompute blocks in the backward pass to save memory")
    compile: Literal["auto"] | bool = free(
        "auto", "compile the blocks one by one with torch.compile; auto does so on CUDA at ZeRO 0 to 2"
    )
    deterministic: bool = free(False, "bit-identical repeats on a GPU, slower; a CPU always repeats")
    checkpoint_every: int = free(500, "updates between checkpoints; 0 saves at the end only", ge=0)
    keep_last: int = free(
        2, "newest checkpoints kept, and as many due ones where stops have asked for others since", ge=1
    )
    keep_every: int = free(
        0, "checkpoints whose update is a multiple of this are kept for ever; 0 for none", ge=0
    )
    log_every: int = free(10, "updates between log lines", ge=1)
    evaluate_every: int = free(
        0, "updates between evaluations and pictures; 0 evaluates at the end only", ge=0
    )
    evaluate_share: float = free(
        0.02,
        "share of a launch's time that evaluations may take: a due one that would exceed it is put off, the "
        "last update's never; 1 puts none off, 0 evaluates at the end only",
        ge=0,
        le=1,
    )
    workers: int = free(1, "loader processes per rank", ge=0)
    threads: int = free(0, "CPU threads per rank; 0 leaves the default", ge=0)
    device: Literal["auto", "cpu", "cuda"] = free("auto", "auto takes CUDA where there is one")
    hang_minutes: float = free(
        15.0, "minutes without a sign of progress after which a launch ends as hung; 0 never", ge=0
    )
    save_minutes: float = free(
        30.0, "minutes for which the last save of a launch is tried again where the storage fails", ge=0
    )
    restarts: int = free(
        3, "how often in a row the launcher starts a failed run again that has not saved since", ge=0, le=3
    )
    min_nodes: int = free(0, "fewest hosts to go on with where some are lost; 0: none may be missing", ge=0)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = free(
        ("tensorboard",), "where figures and pictures go beside RUN/metrics.jsonl"
    )
    tracker_project: str = free("medfm", "project of W&B, experiment of MLflow")


def load_recipe(path: str | Path | None, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read a recipe, apply `--dotted.key value` overrides and check it.

    Args:
        path: YAML file, or None for the schema's defaults.
        overrides: command-line words. `--a.b v`, `--a.b=v`; several values make a list; none means true.
        schema: pydantic model of the whole recipe.

    Raises:
        UserError: unreadable file, unknown key (with the nearest right name) or bad value, in one line with
            its file.
    """
    origin: dict[str, str] = {}
    values = _read(Path(path), (), origin) if path is not None else {}
    for key, value in _parse_overrides(overrides):
        _set(values, key.split("."), value, key)
        origin[key] = COMMAND_LINE
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, schema, origin, str(path) if path else COMMAND_LINE)) from None


def save_recipe(recipe: BaseModel, path: Path) -> None:
    """Write the resolved recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    write_text(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def identity_of(recipe: BaseModel) -> dict[str, Any]:
    """The fields that change the result, as JSON values; those marked free are left out."""
    kept: dict[str, Any] = {}
    dumped = recipe.model_dump(mode="json")
    for name, field in type(recipe).model_fields.items():
        extra = field.json_schema_extra
        if not (isinstance(extra, dict) and extra.get("free")):
            kept[name] = _identity_value(getattr(recipe, name), dumped[name])
    return kept


def difference(old: BaseModel | Mapping[str, Any], new: BaseModel | Mapping[str, Any]) -> str:
    """One line naming every identity field that differs, `lr: 0.001 -> 0.002; ...`; empty if none does."""
    before, after = (dict(leaves(identity_of(r) if isinstance(r, BaseModel) else r)) for r in (old, new))
    keys = [*before, *(k for k in after if k not in before)]
    absent = "(absent)"
    return "; ".join(
        f"{k}: {before.get(k, absent)} -> {after.get(k, absent)}"
        for k in keys
        if before.get(k, absent) != after.get(k, absent)
    )


def _identity_value(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity_of(value)
    if isinstance(value, list | tuple):
        return [_identity_value(v, d) for v, d in zip(value, dumped, strict=True)]
    if isinstance(value, Mapping):
        return {
            d_key: _identity_value(v, dumped[d_key]) for v, d_key in zip(value.values(), dumped, strict=True)
        }
    return dumped


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested recipe by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: Path, seen: tuple[Path, ...], origin: dict[str, str]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(
            f"{path}: `base` goes round in a circle; remove one of {', '.join(p.name for p in seen)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe ({' '.join(str(error).split())})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UserError(
            f"{path}: a recipe is a mapping of names to values; the first line should look like `engine:`"
        )
    base = values.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: base: give the path of one recipe, not {base!r}")
    merged = _read(path.parent / base, (*seen, resolved), origin) if base is not None else {}
    origin.update(dict.fromkeys((key for key, _ in _paths(values)), str(path)))
    _merge(merged, values)
    return merged


def _paths(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"command line: {word!r} is not a recipe field; write --section.field value")
        key, equals, inline = word[2:].partition("=")
        found = [inline] if equals else []
        while not equals and position < len(words) and not words[position].startswith("--"):
            found.append(words[position])
            position += 1
        try:
            parsed = [yaml.safe_load(v) for v in found]
        except yaml.YAMLError:
            raise UserError(f"command line: --{key}: cannot read {' '.join(found)!r} as a value") from None
        yield key.replace("-", "_"), True if not parsed else parsed[0] if len(parsed) == 1 else parsed


def _set(tree: Any, parts: list[str], value: Any, key: str) -> None:
    """Set one dotted key in nested mappings and lists, making mappings on the way."""
    for depth, part in enumerate(parts):
        slot: Any = part
        if isinstance(tree, list):
            if not part.isdigit() or int(part) >= len(tree):
                raise UserError(f"command line: --{key}: {part!r} is not an entry of a list of {len(tree)}")
            slot = int(part)
        if depth == len(parts) - 1:
            tree[slot] = value
            return
        child = tree[slot] if isinstance(tree, list) else tree.get(slot)
        if not isinstance(child, dict | list):
            child = tree[slot] = {}
        tree = child


def _one_line(
    error: ValidationError, schema: type[BaseModel], origin: Mapping[str, str], default: str
) -> str:
    first, *others = error.errors(include_url=False)
    location = [str(part) for part in first["loc"]]
    dotted = ".".join(location)
    file = next(
        (origin[p] for n in range(len(location), 0, -1) if (p := ".".join(location[:n])) in origin), default
    )
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return f"{file}: unknown key `{dotted}`; {_nearest(location, schema)}{more}"
    if first["type"] == "missing":
        return f"{file}: `{dotted}` is missing; set it in the recipe or with --{dotted}{more}"
    message = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    return (
        f"{file}: {dotted}: {message}; got {first.get('input')!r}{more}"
        if dotted
        else f"{file}: {message}{more}"
    )


def _nearest(location: list[str], schema: type[BaseModel]) -> str:
    """Where the misspelt key most likely belongs: nearest name at its own level, else the nearest
    anywhere."""
    every = list(_fields(schema))
    parent, wrong = location[:-1], location[-1]
    section = ".".join(p for p in parent if not p.isdigit() and p in {x for e in every for x in e.split(".")})
    here = [e for e in every if e.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(wrong, [e.rpartition(".")[2] for e in here], n=1):
        return f"did you mean `{'.'.join([*parent, close[0]])}`?"
    if close := difflib.get_close_matches(wrong, [e.rpartition(".")[2] for e in every], n=1):
        return f"did you mean `{next(e for e in every if e.rpartition('.')[2] == close[0])}`?"
    return f"`{section or 'the recipe'}` knows {', '.join(e.rpartition('.')[2] for e in here) or 'no keys'}"


def _fields(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        for model in _models(field.annotation):
            yield from _fields(model, f"{prefix}{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)
