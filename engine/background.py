"""Work that training never waits for: threads that take what they are given to disks and servers."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

Item = TypeVar("Item")

EVERY = 0.25  # seconds between deliveries: a killed process loses no more than these
AGAIN, AGAIN_AT_MOST = 1.0, 30.0  # seconds until a delivery that failed is tried again, doubled each time


class Background(Generic[Item]):
    """A thread that delivers items in order; who gives them neither waits nor fails.

    `deliver(pending)` is called four times a second, with items or without, and takes them off the left of
    the deque once they are safe. What it leaves when it raises is tried again. Items wait in memory, up to
    `most` bytes; beyond that they are lost and counted.

    Attributes:
        lost: items that were given and not taken, for want of memory.

    Args:
        name: of the thread, and of where the items go.
        deliver: see above; it may hang.
        tell: called with the name and what is wrong when deliveries begin to fail, with "" when they go on.
        weigh: bytes of an item.
        most: bytes that may wait.
        finish: called last, in the thread.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[deque[Item]], None],
        tell: Callable[[str, str], None],
        weigh: Callable[[Item], int],
        most: int,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.lost = name, 0
        self._deliver, self._tell, self._weigh, self._most = deliver, tell, weigh, most
        self._finish = finish
        self._changed = threading.Condition()
        self._given: deque[Item] = deque()
        self._pending: deque[Item] = deque()
        self._weight = self._asked = self._done = 0
        self._closing = False
        self._failed = 0  # times in a row
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to deliver; items given before wait for it."""
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand over one item."""
        with self._changed:
            weight = self._weigh(item)
            if self._weight + weight > self._most:
                self.lost += 1
                return
            self._weight += weight
            self._given.append(item)

    def flush(self, seconds: float) -> bool:
        """Wait until all that was given is delivered, at most so long; says whether it is."""
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done >= mine, seconds)
            return self._done >= mine and not self._given and not self._pending

    def close(self, seconds: float) -> bool:
        """Deliver what is left, at most so long, and end the thread; says whether nothing was left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive() and not self._pending and not self._given

    def _run(self) -> None:
        while not self._closing:
            with self._changed:
                wait = min(AGAIN_AT_MOST, AGAIN * 2**self._failed) if self._failed else EVERY
                self._changed.wait_for(lambda: self._closing or self._asked > self._done, wait)
            self._round()
        self._round()
        with suppress(Exception):
            self._finish()

    def _round(self) -> None:
        with self._changed:
            asked = self._asked
            self._pending.extend(self._given)
            self._given.clear()
        trouble = ""
        try:
            self._deliver(self._pending)
        except Exception as error:
            trouble = " ".join(f"{type(error).__name__}: {error}".split())
        with self._changed:
            self._weight = sum(map(self._weigh, [*self._pending, *self._given]))
            self._done = asked
            self._changed.notify_all()
        if bool(trouble) != bool(self._failed):
            self._tell(self.name, trouble)
        self._failed = self._failed + 1 if trouble else 0


class Appended:
    """A file that only grows, and comes back when it was deleted.

    Its folder is made where it is missing, the folder's parent is not: that would be the place where a disk
    is no longer mounted.

    Args:
        head: bytes that a new file begins with.
        lines: the file is of lines; one cut off by a kill is ended when the file is opened.
    """

    def __init__(self, path: Path, *, head: bytes = b"", lines: bool = True) -> None:
        self.path, self._head, self._lines = path, head, lines
        self._handle = -1
        self._written = 0
        self._new = False

    def write(self, data: bytes) -> None:
        """Append all of `data`. After an OSError it is to be called again, with data that begin alike: it
        goes on where it stopped, since a full disk takes a part of a line."""
        self._open()
        if self._new:
            data = self._head + data
        while self._written < len(data):
            self._written += os.write(self._handle, memoryview(data)[self._written :])
        self._written, self._new = 0, False

    def close(self) -> None:
        """Close the file; the next `write` opens it again."""
        if self._handle >= 0:
            with suppress(OSError):
                os.close(self._handle)
        self._handle = -1

    def _open(self) -> None:
        if self._handle >= 0:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(self._handle)):
                    return
            self.close()
        self._written = 0
        with suppress(FileExistsError):
            self.path.parent.mkdir()
        self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        size = os.fstat(self._handle).st_size
        self._new = size == 0
        if self._lines and size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")


def deliver_lines(file: Appended) -> Callable[[deque[bytes]], None]:
    """For `Background`: appends lines to a file, many with one call."""

    def deliver(pending: deque[bytes]) -> None:
        while pending:
            count = len(pending)
            file.write(b"".join(pending))
            for _ in range(count):
                pending.popleft()

    return deliver
