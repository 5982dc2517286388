"""torchrun, ending with a plain exit code instead of a page about the worker that failed.

What a worker has to say is in its own output and in RUN/verdict.json; torchrun turns every exit code into 1.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> int:
    """Run torchrun with this process's arguments; 0, or 1 where a worker failed or a signal ended it."""
    try:
        run(parse_args(sys.argv[1:]))
    except (ChildFailedError, SignalException):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
