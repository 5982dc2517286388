"""Whether a launch can begin to write in its run folder; asked before anything is started."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path

from engine.errors import UserError
from engine.memory import size

NEEDED = 1 << 20
"""Bytes of the small files that a launch begins with: its number, the recipe, the first lines of logs."""


def check_room(run: Path) -> None:
    """Make the run folder and see that it takes a small file.

    A run that goes on outlasts a full disk, since it can save later. One that begins has nothing to save, and
    would fail the same way each time it is started again.

    Raises:
        UserError: the disk is full, with what takes room there, or cannot be written.
    """
    probe = run / f".room.{socket.gethostname()}.{os.getpid()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(os.urandom(NEEDED))  # a file system that compresses must keep it
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            text = (
                f"--run {run}: nothing can be written there ({error.strerror}); see how its disk is mounted"
            )
            raise UserError(text) from None
        raise UserError(_full(run, error.errno == errno.EDQUOT)) from None


def has_half_written(run: Path) -> bool:
    """Whether interrupted saves have left files that a launch clears away when it begins."""
    return any((run / "checkpoints").glob(".*-update-*"))


def _full(run: Path, quota: bool) -> str:
    there = next(place for place in (run, *run.absolute().parents) if place.exists())
    disk = there.absolute()
    while not os.path.ismount(disk):
        disk = disk.parent
    own, saved = _bytes_below(run), _bytes_below(run / "checkpoints")
    if quota:
        why = "your quota there is used up"
    else:
        usage = shutil.disk_usage(there)
        why = f"the disk mounted at {disk} is full, {size(usage.free)} of {size(usage.total)} are free"
    what = "nothing there is of this run: delete other files"
    if own:
        takes = f"this run takes {size(own)}, its checkpoints {size(saved)} of it"
        what = f"{takes}: delete old checkpoints or other files"
    return f"--run {run}: {why}, and a launch needs {size(NEEDED)} to begin; {what}, or choose another folder"


def _bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # deleted meanwhile
                continue
    return total
