"""What became of each case, kept on disk while a dataset is built: a build goes on where it was cut off.

    WORK/build.json                        options, sources and label ids of the build; which part this is
    WORK/cases/3f/3f0c….FINGERPRINT.json   the outcome of one case, written whole, after its frames
    WORK/frames/3f/3f0c….FINGERPRINT.0.image   Blosc2 frames waiting for their shard
    WORK/kills.jsonl                       cases that ended a worker while it read nothing else
    WORK/shards/NAME.json                  shards that are finished
    WORK/before/                           manifest and description of each dataset that is being added to
    WORK/merged.json                       parts that are in the dataset and may be deleted

A fingerprint covers the input's files (name, size, time) and everything stated about them, so that a changed
scan or recipe is read again and nothing else is. The folder holds real paths and patient images: it lies in
the private folder, readable by its owner only, and is deleted when the dataset is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.frame_index import checksum
from data_pipeline.place import Place
from data_pipeline.shard_writer import Piece, Staged


@dataclass(frozen=True)
class Refusal:
    """An input or label that was not taken. `detail` may stand in the dataset, `message` (with path) may
    not.
    """

    code: str
    detail: str
    message: str
    what: str  # "image" or "label"


@dataclass(frozen=True)
class Outcome:
    """What became of one case. `number` orders cases as they were found; `key`, `input` and `subject_hash`
    are keyed hashes; `subject`, `paths` and `label` are real and stay in private folders. `notes` count what
    was done to its volumes or labels, by name.
    """

    number: int
    key: str
    fingerprint: str
    input: str
    subject_hash: str
    source: str
    subject: str
    split: str | None
    paths: tuple[str, ...]
    label: str | None
    samples: tuple[Staged, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)


class Journal:
    """The work folder of one build, or of one part of it. Picklable: workers write through it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, about: Mapping[str, Any]) -> None:
        """Start or go on. `about` is what the whole build is asked to do; a change of it is allowed, since
        fingerprints tell which cases it concerns."""
        for name in ("cases", "frames", "shards", "before"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self.folder / "build.json", json.dumps(about, indent=1, sort_keys=True).encode())

    def about(self) -> dict[str, Any]:
        """What `open` was given. Raises `UserError` where the folder is not that of a build."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "build.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder}: holds no build; give the work folder of `medfm shards build --part i/N`"
            ) from error
        return found

    def done(self) -> set[tuple[str, str]]:
        """Key and fingerprint of every outcome."""
        found = set()
        for entry in _entries(self.folder / "cases"):
            key, _, rest = entry.name.partition(".")
            if rest.endswith(".json"):
                found.add((key, rest.removesuffix(".json")))
        return found

    def stage(self, key: str, fingerprint: str, frame: int, member: str, data: bytes) -> Piece:
        """Keep one Blosc2 frame until its shard is written."""
        folder = self.folder / "frames" / key[:2]
        folder.mkdir(exist_ok=True, mode=0o700)
        name = f"{key}.{fingerprint}.{frame}.{member}"
        write_whole(folder / name, data)
        return Piece(str(folder), name, len(data), check=checksum(data))

    def finish(self, outcome: Outcome) -> None:
        """Record an outcome; its frames are all staged."""
        folder = self.folder / "cases" / outcome.key[:2]
        folder.mkdir(exist_ok=True, mode=0o700)
        content = asdict(outcome)
        for sample in content["samples"]:
            for piece in sample["frames"].values():
                piece["folder"] = os.path.relpath(
                    piece["folder"], self.folder
                )  # parts may be copied elsewhere
        text = json.dumps(content, allow_nan=False)
        write_whole(folder / f"{outcome.key}.{outcome.fingerprint}.json", text.encode())

    def outcome(self, key: str, fingerprint: str) -> Outcome:
        """A recorded outcome. Raises `UserError` where it cannot be read."""
        path = self.folder / "cases" / key[:2] / f"{key}.{fingerprint}.json"
        try:
            content = json.loads(path.read_text())
            samples = tuple(self._sample(s) for s in content.pop("samples"))
            refusals = tuple(Refusal(**r) for r in content.pop("refusals"))
            content["paths"] = tuple(content["paths"])
            return Outcome(**content, samples=samples, refusals=refusals)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: is damaged; delete it and start the same build again") from error

    def holds(self, outcome: Outcome) -> bool:
        """Whether every staged frame of an outcome is there in its size (after a power cut it may not be)."""
        pieces = (piece for sample in outcome.samples for piece in sample.frames.values())
        return all(Place(piece.folder).size(piece.name) == piece.size for piece in pieces)

    def kills(self) -> dict[str, int]:
        """How often each case ended a worker while nothing else was being read."""
        counts: dict[str, int] = {}
        path = self.folder / "kills.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else ():
            key = line.strip()
            counts[key] = counts.get(key, 0) + 1
        return counts

    def killed(self, key: str) -> None:
        """Count one more for `kills`."""
        with (self.folder / "kills.jsonl").open("a") as file:
            file.write(f"{key}\n")

    def _sample(self, content: dict[str, Any]) -> Staged:
        frames = {
            name: Piece(**{**piece, "folder": str(self.folder / piece["folder"])})
            for name, piece in content["frames"].items()
        }
        return Staged(content["row"], content["description"], frames, content["values_hash"])


def fingerprint(files: Mapping[str, tuple[int, int]], stated: Any) -> str:
    """24 hex digits for a case: its files' {name: (size, time)} and what is stated about it (JSON)."""
    text = json.dumps([sorted(files.items()), stated], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is either there with all its bytes or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as outer:
        for part in outer:
            if part.is_dir():
                with os.scandir(part.path) as inner:
                    yield from inner
