"""Keep what the libraries say about a file out of consoles and logs: they quote its header and its path.

pydicom and nibabel log and warn through Python; GDCM, ITK, MetaIO, libtiff and OpenJPEG write to stdout and
stderr of the process, past Python. A reader's verdict is its return value or its `Quarantined`, never a line
printed on the way.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("pydicom", "nibabel", "nibabel.global", "PIL", "pylibjpeg", "openjpeg", "libjpeg", "highdicom")


class _Silence:
    """stdout, stderr and warnings of this process, as they were before the first block was entered."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.descriptors: list[tuple[int, int]] = []
        self.streams = sys.stdout, sys.stderr
        self.warnings = warnings.catch_warnings()

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            for name in LOGGERS:
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
            self.warnings = warnings.catch_warnings(action="ignore")
            self.warnings.__enter__()
            _flush()
            null = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):
                try:
                    self.descriptors.append((descriptor, os.dup(descriptor)))
                except OSError:  # closed: a daemon has none
                    continue
                os.dup2(null, descriptor)
            self.streams = sys.stdout, sys.stderr  # these need not be descriptors 1 and 2
            sys.stdout = sys.stderr = os.fdopen(null, "w")

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside > 0:
                return
            _flush()
            sys.stdout.close()
            sys.stdout, sys.stderr = self.streams
            while self.descriptors:
                descriptor, kept = self.descriptors.pop()
                os.dup2(kept, descriptor)
                os.close(kept)
            self.warnings.__exit__(None, None, None)


_silence = _Silence()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Nothing that is printed, warned or logged by a library inside the block is seen; also a decorator.

    stdout and stderr are redirected for the whole process while any thread is inside: use it in the processes
    that read scans. Blocks may nest and overlap.
    """
    _silence.enter()
    try:
        yield
    finally:
        _silence.leave()


def _flush() -> None:
    """Empty every buffer, Python's and C's, so that each line goes where it was meant to when written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # none, closed or gone
            continue
    ctypes.CDLL(None).fflush(None)
