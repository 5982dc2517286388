"""The command line of a worker process: `python -m pretrain` or `finetune RECIPE.yaml --run DIR [fields]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from engine.verdict import Verdict, run_worker


class Arguments(NamedTuple):
    """What a worker was started with: `segment` names a new segment of the run, `overrides` are recipe
    fields."""

    recipe: Path
    run: Path
    segment: str | None
    overrides: list[str]


def split_arguments(words: Sequence[str], module: str) -> Arguments:
    """Read the words after `python -m MODULE`. Raises UserError where recipe or run folder is missing."""
    usage = f"usage: python -m {module} RECIPE.yaml --run DIR [--continue-as NAME] [--section.field value]"
    rest = list(words)
    if not rest or rest[0].startswith("--"):
        raise UserError(f"no recipe given; {usage}")
    recipe = Path(rest.pop(0))
    found: dict[str, str] = {}
    overrides: list[str] = []
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--run", "--continue-as"):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"{name} needs a value; {usage}")
                value = rest.pop(0)
            found[name] = value
        else:
            overrides.append(word)
    if "--run" not in found:
        raise UserError(f"--run DIR is missing: the folder for checkpoints and logs; {usage}")
    return Arguments(recipe, Path(found["--run"]), found.get("--continue-as"), overrides)


def worker_main(
    module: str, work: Callable[[Arguments], Verdict], about: str | None, words: Sequence[str] | None
) -> int:
    """Run one worker and return its exit code.

    Args:
        module: `pretrain` or `finetune`.
        work: trains; raises UserError for wrong input.
        about: what `--help` prints.
        words: the command line after the module; this process's where None.
    """
    arguments = list(sys.argv[1:] if words is None else words)
    if "-h" in arguments or "--help" in arguments:
        print(about)
        return 0
    try:
        run = split_arguments(arguments, module).run
    except UserError:
        run = None
    return run_worker(lambda: work(split_arguments(arguments, module)), run)
