"""One worker of a fine-tuning run: `python -m finetune RECIPE.yaml --run DIR [--section.field value ...]`.

Runs alone or under torchrun. Exit codes: 0 finished, 2 wrong input (one line says what), 3 failed, 4 hung,
5 out of memory, 75 preempted with the state saved.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.errors import UserError as DataError
from engine.errors import UserError
from engine.recipe import load_recipe
from engine.verdict import Verdict
from engine.worker import Arguments, end_process, worker_main
from finetune.recipe import FinetuneRecipe
from model.errors import UserError as ModelError


def work(given: Arguments) -> Verdict:
    """Read the recipe, open the data and the encoder, and train."""
    recipe = load_recipe(given.recipe, given.overrides, FinetuneRecipe)
    from engine.train import train
    from finetune.task import open_task

    try:
        task = open_task(recipe, given.run)
        return train(task, recipe.engine, given.run, continue_as=given.segment)
    except (DataError, ModelError) as error:
        raise UserError(str(error)) from None


def main(words: Sequence[str] | None = None) -> int:
    """Run one worker; returns the exit code."""
    return worker_main("finetune", work, __doc__, words)


if __name__ == "__main__":
    end_process(main())
