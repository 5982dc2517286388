"""One worker of a fine-tuning run: `python -m finetune RECIPE.yaml --run DIR [--section.field value ...]`.

Runs alone or under torchrun. Exit codes: 0 finished, 2 wrong input (one line says what), 3 failed, 4 hung,
5 out of memory, 75 preempted with the state saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError as DataError
from engine.errors import UserError
from engine.recipe import load_recipe
from engine.verdict import Verdict, run_worker
from finetune.recipe import FinetuneRecipe
from model.errors import UserError as ModelError

USAGE = "usage: python -m finetune RECIPE.yaml --run DIR [--continue-as NAME] [--section.field value ...]"


def split_arguments(words: Sequence[str]) -> tuple[Path, Path, str | None, list[str]]:
    """Recipe path, run folder, name of a new segment or None, and the recipe's overrides."""
    rest = list(words)
    if not rest or rest[0].startswith("--"):
        raise UserError(f"no recipe given; {USAGE}")
    recipe = Path(rest.pop(0))
    found: dict[str, str] = {}
    overrides: list[str] = []
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--run", "--continue-as"):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"{name} needs a value; {USAGE}")
                value = rest.pop(0)
            found[name] = value
        else:
            overrides.append(word)
    if "--run" not in found:
        raise UserError(f"--run DIR is missing: the folder for checkpoints and logs; {USAGE}")
    return recipe, Path(found["--run"]), found.get("--continue-as"), overrides


def work(words: Sequence[str]) -> Verdict:
    """Read the recipe, open the data and the encoder, and train."""
    path, run, segment, overrides = split_arguments(words)
    recipe = load_recipe(path, overrides, FinetuneRecipe)
    if not recipe.data.root:
        raise UserError(f"{path}: data.root is not set; give the shard folder: --data.root DIR")
    from engine.train import train
    from finetune.task import FinetuneTask

    try:
        task = FinetuneTask(recipe.model_copy(update={"run": os.fspath(run)}))
        return train(task, recipe.engine, run, continue_as=segment)
    except (DataError, ModelError) as error:
        raise UserError(str(error)) from None


def main(words: Sequence[str] | None = None) -> int:
    """Run one worker; returns the exit code."""
    arguments = list(sys.argv[1:] if words is None else words)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    try:
        run = split_arguments(arguments)[1]
    except UserError:
        run = None
    return run_worker(lambda: work(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
