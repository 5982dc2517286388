"""Pretraining runs from one process that has imported PyTorch and DeepSpeed once.

    PYTHONPATH=tests/engine:. python tests/pretrain/forked_runs.py '[[RANKS, DIE_BEFORE, [WORDS, ...]], ...]'

Each launch is a number of ranks, the update before which SIGKILL ends all of them and their loaders at one
moment (null: none), and the command lines of its runs, as after `python -m pretrain`. What torchrun does is
tested elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from forked_ranks import fork_ranks

from engine.distributed import import_deepspeed
from pretrain.__main__ import main
from pretrain.task import PretrainTask


def launch(ranks: int, batch: list[list[str]]) -> int:
    """Do the runs on so many ranks; the largest of their exit codes."""
    return fork_ranks(ranks, lambda: max(main(words) for words in batch))


def killed_launch(ranks: int, batch: list[list[str]], update: int) -> None:
    """The same in a process group that rank 0 kills where it asks for the batch of `update`, once the
    checkpoint before it is complete.
    """
    if not (leader := os.fork()):
        os.setsid()
        plain = PretrainTask.batches

        def batches(self: PretrainTask, start: int, rank: int, world: int) -> Iterator[Any]:
            for step, found in enumerate(plain(self, start, rank, world)):
                if rank == 0 and start + step // self.micro_steps(world) == update:
                    for thread in threading.enumerate():
                        if thread.name == "saver":
                            thread.join()
                    os.killpg(0, signal.SIGKILL)
                yield found

        with patch.object(PretrainTask, "batches", batches):
            launch(ranks, batch)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]) != -signal.SIGKILL:
        raise SystemExit(f"the run ended before update {update}")


if __name__ == "__main__":
    import_deepspeed()
    for ranks, update, batch in json.loads(sys.argv[1]):
        if update is not None:
            killed_launch(ranks, batch, update)
        elif code := launch(ranks, batch):
            sys.exit(code)
