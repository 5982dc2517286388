"""Several launches of toy runs from one process that has imported PyTorch and DeepSpeed once.

    python forked_ranks.py '[[1, [WORDS, ...]], [2, [WORDS, ...]]]'

Each launch is a number of ranks and the command lines of its runs (see `toy_worker.one`); a run that signals
itself does so once a launch. Ranks are forked, so that a launch of four costs no four imports; what torchrun
does is tested elsewhere.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
if __name__ == "__main__":
    gc.disable()  # while it imports: half a second

import torch._dynamo  # noqa: F401 - before the fork: AdamW imports it
from toy_worker import one

from engine.distributed import import_deepspeed, leave
from engine.worker import end_process


def fork_ranks(processes: int, body: Callable[[], int]) -> int:
    """Call `body` in so many forked ranks; the largest of the codes it returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank in range(processes):
        if not (child := os.fork()):
            numbers = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
            }
            os.environ.update(address, **{name: str(number) for name, number in numbers.items()})
            code = 1
            try:
                code = body()
                leave()
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        ranks.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks)


def launch(processes: int, batch: list[list[str]]) -> int:
    """Do the runs on so many ranks; the largest of their exit codes."""
    for words in batch:
        (Path(words[words.index("--run") + 1]) / "died").unlink(missing_ok=True)
    return fork_ranks(processes, lambda: max(one(words) for words in batch))


if __name__ == "__main__":
    import_deepspeed()
    gc.enable()
    end_process(max([launch(processes, batch) for processes, batch in json.loads(sys.argv[1])]))
