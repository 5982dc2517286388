"""The recipe of a build: YAML that states what a person knows of each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.errors import UserError
from data_pipeline.sources import SourceConfig

PATHS = ("path", "subjects")  # of a source, relative to the recipe's root
FOR_SOURCES = ("modality", "burned_in", "deface", "spacing", "field_mm", "layout", "labels", "label_origin")


class BuildRecipe(BaseModel):
    """`medfm shards build`: sources and how to store them.

    Paths of sources are relative to `root`, which is relative to the recipe's own folder or given on the
    command line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path | None = Field(None, description="folder that the paths of sources start from")
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    split: dict[str, float] | None = Field(None, description="fractions of subjects; None: 80, 10, 10 %")
    seed: int = 0
    exact: bool = Field(False, description="float32 where 16 bits would lose anything")
    shard_samples: int = Field(64, ge=1, description="most samples in one shard")
    on_leak: Literal["refuse", "strictest"] = Field(
        "refuse", description="a subject stated in two splits: an error, or test before val before train"
    )
    level_min_voxels: int = Field(
        2 * 64**3, ge=0, description="larger volumes get levels reduced 2 and 4 times"
    )


def read_recipe(
    recipe: Path | str | Sequence[Path | str],
    root: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> BuildRecipe:
    """A checked recipe from a YAML file, or from a list of folders and tables (one source each).

    `changes` replace fields of the recipe; those in `FOR_SOURCES` fill what a source leaves open. A source
    without a name is called source-1, source-2, ...: a folder's name is a path, and paths may identify.
    Raises `UserError` in one line, with the nearest right name for an unknown field.
    """
    given = [recipe] if isinstance(recipe, Path | str) else list(recipe)
    if len(given) == 1 and Path(given[0]).suffix.lower() in (".yaml", ".yml"):
        where = Path(given[0])
        data = _yaml(where)
        base = root if root is not None else where.parent / (data.get("root") or ".")
    else:
        where = Path("command line")
        data = {"sources": [{"path": str(path)} for path in given]}
        base = root if root is not None else Path(".")
    for name, value in (changes or {}).items():
        if name not in FOR_SOURCES:
            data[name] = value
    sources = data.get("sources")
    if not isinstance(sources, list) or not all(isinstance(s, dict) for s in sources):
        raise UserError(f"{where}: sources must be a list of mappings, each with a path")
    data["sources"] = [_source(n, s, base, changes or {}) for n, s in enumerate(sources, 1)]
    data["root"] = base
    try:
        return BuildRecipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_error(error)}") from error


def _source(number: int, stated: dict[str, Any], base: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    filled = {name: changes[name] for name in FOR_SOURCES if changes.get(name) is not None}
    source = {"name": f"source-{number}", **filled, **stated}
    for name in PATHS:
        if isinstance(source.get(name), str) and "://" not in source[name]:
            source[name] = base / Path(source[name]).expanduser()
    return source


def _yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}: is not valid YAML{f' (line {mark.line + 1})' if mark else ''}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping with a list of sources")
    return data


def _first_error(error: ValidationError) -> str:
    """The first fault as one line."""
    fault = error.errors()[0]
    place = [str(part) for part in fault["loc"]]
    where = ".".join(place)
    if fault["type"] == "extra_forbidden":
        fields = SourceConfig.model_fields if place[0] == "sources" else BuildRecipe.model_fields
        near = get_close_matches(place[-1], list(fields), 1, 0.5)
        return f"unknown field {where!r}{f'; did you mean {near[0]!r}?' if near else ''}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {' '.join(fault['msg'].split())}{more}"
