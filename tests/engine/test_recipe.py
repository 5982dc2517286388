from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.recipe import EngineConfig, Frozen, difference, free, identity_of, load_recipe, save_recipe
from engine.schedule import learning_rate, set_learning_rate


class Source(Frozen):
    path: str
    weight: float = 1.0


class Recipe(Frozen):
    engine: EngineConfig = EngineConfig()
    sources: tuple[Source, ...] = ()
    mixture: dict[str, float] | None = None
    scale: tuple[float, float] = (0.5, 4.0)
    run: str = free("", "run folder")


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_base_is_merged_key_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "engine: {lr: 1e-4, updates: 7}\nsources: [{path: one}, {path: two}]\n")
    b = write(tmp_path, "b.yaml", "base: a.yaml\nengine: {updates: 9}\nsources: [{path: three}]\n")
    recipe = load_recipe(b, [], Recipe)
    assert (recipe.engine.lr, recipe.engine.updates) == (1e-4, 9)
    assert [s.path for s in recipe.sources] == ["three"]


def test_command_line_wins_over_file_and_reaches_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "engine: {lr: 1e-4}\nsources: [{path: one}]\n")
    words = ["--engine.lr", "2e-4", "--engine.zero-stage=3", "--engine.compile", "--scale", "1", "2.5",
             "--mixture.CT", "0.25", "--sources.0.weight", "-3"]  # fmt: skip
    recipe = load_recipe(path, words, Recipe)
    assert (recipe.engine.lr, recipe.engine.zero_stage, recipe.engine.compile) == (2e-4, 3, True)
    assert recipe.scale == (1.0, 2.5)
    assert recipe.mixture == {"CT": 0.25}
    assert recipe.sources[0] == Source(path="one", weight=-3.0)


@pytest.mark.parametrize(
    ("text", "words", "parts"),
    [
        ("engine: {updtes: 3}", [], ["a.yaml", "engine.updtes", "`engine.updates`"]),
        ("zero_stage: 2", [], ["a.yaml", "zero_stage", "`engine.zero_stage`"]),
        ("sources: [{path: x, wieght: 2}]", [], ["a.yaml", "sources.0.wieght", "`sources.0.weight`"]),
        ("", ["--engine.lr", "fast"], ["command line", "engine.lr", "'fast'"]),
        ("", ["--engine.precison", "fp32"], ["command line", "engine.precison", "`engine.precision`"]),
        ("engine: {lr: -1}", [], ["a.yaml", "engine.lr", "greater than 0"]),
        ("sources: [{weight: 1}]", [], ["a.yaml", "sources.0.path", "missing"]),
        ("- a list", [], ["a.yaml", "mapping"]),
        ("engine: {lr: [", [], ["a.yaml", "not YAML"]),
        ("base: a.yaml", [], ["a.yaml", "circle"]),
        ("base: gone.yaml", [], ["gone.yaml", "no such recipe"]),
        ("", ["engine.lr", "1"], ["command line", "'engine.lr'"]),
        ("", ["--sources.0.path", "x"], ["sources"]),
    ],
)
def test_a_wrong_recipe_is_one_line_with_file_and_field(
    tmp_path: Path, text: str, words: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, "a.yaml", text), words, Recipe)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_the_file_named_is_the_one_that_holds_the_wrong_key(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "engine: {warmupp: 3}\n")
    with pytest.raises(UserError, match=r"base\.yaml"):
        load_recipe(write(tmp_path, "a.yaml", "base: base.yaml\nengine: {lr: 1}\n"), [], Recipe)


engines = st.builds(
    EngineConfig,
    lr=st.floats(1e-8, 10.0),
    updates=st.integers(1, 10**6),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    zero_stage=st.integers(0, 3),
    compile=st.sampled_from(["auto", True, False]),
    precision=st.sampled_from(["bf16", "fp32"]),
)
recipes = st.builds(
    Recipe,
    engine=engines,
    sources=st.lists(st.builds(Source, path=st.text(max_size=20)), max_size=3).map(tuple),
    mixture=st.none() | st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=3),
)


@given(recipes)
def test_a_saved_recipe_loads_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe(path, [], Recipe) == recipe


@given(recipes, recipes)
def test_difference_is_empty_exactly_when_identity_is_equal(a: Recipe, b: Recipe) -> None:
    assert (difference(a, b) == "") == (identity_of(a) == identity_of(b))
    assert difference(a, yaml.safe_load(yaml.safe_dump(identity_of(a)))) == ""


def test_free_fields_are_not_identity_and_the_rest_is() -> None:
    a, b = Recipe(), Recipe(run="elsewhere", engine=EngineConfig(zero_stage=3, workers=9, compile=True))
    assert difference(a, b) == ""
    c = Recipe(engine=EngineConfig(lr=0.5, seed=4))
    assert difference(a, c) == "engine.lr: 0.001 -> 0.5; engine.seed: 0 -> 4"


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0, 1e-4))
def test_schedule_rises_then_falls_to_its_floor(warmup: int, after: int, floor: float) -> None:
    config = EngineConfig(lr=1e-3, warmup=warmup, updates=warmup + after, min_lr=floor)
    rates = [learning_rate(u, config) for u in range(config.updates + 1)]
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert rates[warmup] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(floor, abs=1e-12)
    assert 0 < rates[0] <= 1e-3


def test_groups_keep_their_own_scale() -> None:
    groups = [{"lr": 0.0}, {"lr": 0.0, "lr_scale": 0.1}]
    set_learning_rate(groups, 2.0)
    assert [g["lr"] for g in groups] == [2.0, 0.2]
