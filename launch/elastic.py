"""torchrun, with signals that do not kill a save and an end without a page about the worker that failed.

torchrun meets a second signal by leaving, which kills the workers that still save for the first one. Here a
thread takes the signals and only passes them on; torchrun sees none. Workers inherit them blocked, and let
them in once Python can listen (`engine.signals`).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from engine.signals import ASKED, PARENT, STACKS, die_with_parent
from engine.verdict import LAUNCHED, Verdict, tell_launcher
from engine.worker import end_process

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main() -> int:
    """Run torchrun with this process's arguments; 0, or 1 where a worker failed.

    How each failed worker ended goes to the launcher's file: a killed one leaves no verdict of its own.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {*ASKED, STACKS})
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())
    threading.Thread(target=_pass_on, name="signals", daemon=True).start()

    import logging

    gc.disable()  # what an import makes stays
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    gc.enable()
    logging.disable(logging.ERROR)  # torchrun's lines about a failed worker; the worker has said why
    parser = get_args_parser()
    parser.allow_abbrev = False  # or a worker's own --run would be taken for torchrun's --run-path
    try:
        run(parser.parse_args(["--signals-to-handle", "", *sys.argv[1:]]))
    except ChildFailedError as error:
        _tell(sorted(error.failures.items(), key=lambda item: item[1].timestamp))
        return 1
    return 0


def _pass_on() -> None:
    """Give a signal to every worker, also to one that starts later; end where there is none yet."""
    signal.sigwait(ASKED)
    told: set[int] = set()
    number: object = True
    while True:
        workers = {child.pid for child in psutil.Process().children()}
        if not workers:
            text = "stopped by a signal before it had begun; start again to go on"
            tell_launcher(Verdict("preempted", message=text, kind="unsaved"))
            os._exit(128 + signal.SIGTERM)
        for worker in workers if number is not None else workers - told:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)
        told |= workers
        number = signal.sigtimedwait(ASKED, 0.5)


def _tell(failures: list[tuple[int, ProcessFailure]]) -> None:
    if file := os.environ.get(LAUNCHED):
        with suppress(OSError), open(file, "a", encoding="utf-8") as words:
            for rank, failure in failures:
                words.write(json.dumps({"rank": rank, "code": failure.exitcode}) + "\n")


if __name__ == "__main__":
    end_process(main())
