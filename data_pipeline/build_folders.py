"""Where a build keeps what is not the dataset: the private folder, the work folder, and the lock on it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.place import Place
from data_pipeline.privacy import check_private


def private_folder(out: str | Path, private: Path | None) -> Path:
    """The private folder of a dataset, by default beside it (or here, where it is at an address)."""
    text = os.fspath(out)
    if "://" in text:
        default = Path.cwd() / (text.rstrip("/").rsplit("/", 1)[-1] + "-private")
        return Path(os.path.abspath(private)) if private is not None else default
    folder = Path(os.path.abspath(out))
    chosen = (
        Path(os.path.abspath(private)) if private is not None else folder.with_name(folder.name + "-private")
    )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    check_private(folder, chosen)
    return chosen


def work_folder(work: Path | None, private: Path, part: tuple[int, int] | None) -> Path:
    """The work folder; of a part, one of its own."""
    base = Path(os.path.abspath(work)) if work is not None else private
    if part is None:
        return base / "work"  # below what was named, since it is deleted in the end
    number, count = part
    if not 1 <= number <= count:
        raise UserError(f"--part {number}/{count}: parts are numbered from 1 to N, as 3/16")
    return base / f"work-{number:04d}-of-{count:04d}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the work folder; a second build of it would write between the lines of the first."""
    try:
        shutil.rmtree(folder.with_name(f"finished-{folder.name}"), ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; nothing was built"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another build of this dataset; wait for it to end") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; start the same build again"
        ) from error
    finally:
        os.close(descriptor)


def set_aside(folder: Path) -> Path:
    """Give a work folder that is no longer needed its name for deletion; half of one, left by a kill, would
    be taken for a build to go on with."""
    finished = folder.with_name(f"finished-{folder.name}")
    os.replace(folder, finished)
    return finished


def check_strangers(place: Place) -> None:
    """Nothing but what a build that was cut off may have left is where a new dataset goes."""
    ours = (".tar", ".partial", ".jsonl", ".parquet", ".html")
    if strangers := [name for name in place.names() if not name.endswith(ours)]:
        raise UserError(
            f"{place} exists and holds other files ({strangers[0]}); choose another --out or empty it"
        )
