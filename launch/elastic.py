"""torchrun, ending with a plain exit code instead of a page about the worker that failed.

What a worker has to say is in its own output and in RUN/verdict.json; torchrun turns every exit code into 1.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run


def main() -> int:
    """Run torchrun with this process's arguments; 0, or 1 where a worker failed or a signal ended it."""
    logging.disable(logging.ERROR)  # torchrun's lines about a failed worker; the worker has said why
    parser = get_args_parser()
    parser.allow_abbrev = False  # or a worker's own --run would be taken for torchrun's --run-path
    try:
        run(parser.parse_args(sys.argv[1:]))
    except (ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
