"""Identifiers to plant in scans, and a search for them in every byte of a dataset and of what a build prints.

The words occur nowhere else, so that any find is a leak. They are looked for in whatever case, in UTF-8,
Latin-1, UTF-16, UTF-32 and ISO 2022, as hex and as digests without a key; numbers also as binary integers and
floats. `everything` opens what would hide them: tar members, Blosc2 frames, Parquet pages, pictures, JSON and
HTML escapes.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b, md5, sha1, sha256
from pathlib import Path

import blosc2
import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image

FAMILY, GIVEN = "Zyxquorth", "Velmira"
NAME = f"{FAMILY}^{GIVEN}"
PATIENT = "QX7741903ZR"
NUMBER = 7741903
DATE, DAY = "19471231", 19471231
TIME = "235947.774190"
HOSPITAL, STREET, TOWN = "Xanthogate", "Brumblewick", "Qwavenport"
ADDRESS = f"{STREET} Lane 17, {TOWN}"
UID = "1.2.826.0.1.3680043.9.7741903.19471231"
MAIL = "velmira@xanthogate.example"
LATIN = "Jürgøn Pêlzñar"  # in ISO 8859-1
JAPANESE = "山田太郎"  # in ISO 2022 IR 87
SENTENCE = f"{GIVEN} {FAMILY} {PATIENT} {ADDRESS} {DATE}"

WORDS = (FAMILY, GIVEN, PATIENT, HOSPITAL, STREET, TOWN, *LATIN.split(), JAPANESE)
DATES = (DATE, "1947-12-31", "31.12.1947", "12/31/1947", "1947/12/31", "31121947")
TEXTS = (*WORDS, *DATES, str(NUMBER), TIME, UID, FAMILY[::-1])
ENCODINGS = (
    "utf-8",
    "latin-1",
    "utf-16-le",
    "utf-16-be",
    "utf-32-le",
    "utf-32-be",
    "iso2022_jp",
    "shift_jis",
    "euc_jp",
)
HASHED = (NAME, f"{GIVEN}^{FAMILY}", FAMILY, PATIENT, DATE, UID, str(NUMBER))
REPOSITORY = Path(__file__).parents[2]


def needles() -> dict[bytes, str]:
    """What to look for, in bytes whose ASCII letters are lower case -> what it is."""
    found: dict[bytes, str] = {}
    for text in TEXTS:
        for variant in {text, text.lower(), text.upper()}:
            for encoding in ENCODINGS:
                try:
                    found[variant.encode(encoding).lower()] = f"{text} in {encoding}"
                except UnicodeEncodeError:
                    continue
            found[variant.encode().hex().encode()] = f"{text} in hex"
            found[json.dumps(variant)[1:-1].encode().lower()] = f"{text} in JSON"
    for text in HASHED:
        for variant in {text, text.lower(), text.upper()}:
            for digest in (md5, sha1, sha256):
                found[digest(variant.encode()).hexdigest()[:12].encode()] = f"{digest.__name__} of {text}"
            for size in (8, 12, 16, 32, 64):
                value = blake2b(variant.encode(), digest_size=size).hexdigest()
                found[value[:12].encode()] = f"blake2b of {text}"
    return found


def numbers() -> dict[bytes, str]:
    """Binary forms of the planted numbers -> what each is."""
    found = {}
    for number in (NUMBER, DAY):
        for form in ("i", "q", "f", "d"):
            for order in "<>":
                found[struct.pack(order + form, number)] = f"{number} as {order}{form}"
    return found


NEEDLES, BINARY = needles(), numbers()


def finds(data: bytes) -> list[str]:
    """What of the planted is in these bytes."""
    lower = data.lower()
    return [what for needle, what in NEEDLES.items() if needle in lower] + [
        what for needle, what in BINARY.items() if needle in data
    ]


def leaks(folder: Path) -> list[tuple[str, str]]:
    """(place, what) of every planted identifier in a dataset; [] is what a build must give."""
    assert (folder / "dataset.json").is_file(), "there is no dataset to search"
    return [(place, what) for place, data in everything(folder) for what in finds(data)]


def everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(place, bytes) of all there is: names, files as they are, and what is inside them."""
    for path in sorted(folder.rglob("*")):
        place = str(path.relative_to(folder))
        yield f"name {place}", place.encode("utf-8", "surrogateescape")
        if path.is_symlink():
            yield f"link {place}", os.fsencode(os.readlink(path))
        if path.is_file():
            yield from inside(place, path.read_bytes())


def inside(place: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The bytes themselves, then what they unpack to."""
    yield place, data
    if data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for info in tar:
                yield f"{place} {info.name} header", repr(info.get_info()).encode()
                yield from inside(f"{place}/{info.name}", tar.extractfile(info).read())  # type: ignore[union-attr]
    elif data[:4] == b"PAR1":
        file = pq.ParquetFile(io.BytesIO(data))
        yield f"{place} rows", json.dumps(file.read().to_pylist(), ensure_ascii=False, default=str).encode()
        yield f"{place} metadata", repr((file.schema_arrow, file.metadata.metadata, file.metadata)).encode()
        for column in file.read().columns:
            for buffer in (b for chunk in column.chunks for b in chunk.buffers() if b is not None):
                yield f"{place} column", buffer.to_pybytes()
    elif place.endswith(".b2nd"):
        array = blosc2.ndarray_from_cframe(data)
        yield f"{place} voxels", np.ascontiguousarray(array[...]).tobytes()
        about = {name: array.schunk.meta[name] for name in array.schunk.meta}
        yield f"{place} metadata", repr((about, array.schunk.vlmeta[:])).encode()
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        yield from picture(place, data)
    elif place.endswith((".json", ".jsonl", ".html", ".txt", ".log")):
        text = data.decode()
        if place.endswith((".json", ".jsonl")):
            for line in text.splitlines() if place.endswith(".jsonl") else [text]:
                yield f"{place} values", json.dumps(json.loads(line), ensure_ascii=False).encode()
        yield f"{place} unescaped", html.unescape(text).encode()
        for number, found in enumerate(re.findall(r"base64,([A-Za-z0-9+/=]+)", text)):
            yield from inside(f"{place} picture {number}", base64.b64decode(found))


def picture(place: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        yield f"{place} text", repr(image.info).encode()
        yield f"{place} pixels", image.tobytes()
    at = 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind in (b"zTXt", b"iTXt", b"tEXt", b"eXIf"):
            body = data[at + 8 : at + 8 + size]
            yield f"{place} {kind.decode()}", body
            for start in range(len(body)):
                if body[start : start + 1] == b"\x78":
                    try:
                        yield (
                            f"{place} {kind.decode()} inflated",
                            zlib.decompressobj().decompress(body[start:]),
                        )
                    except zlib.error:
                        continue
        at += size + 12


@dataclass(frozen=True)
class Built:
    """What one `medfm shards build` left: the dataset, the private folder, and every byte it printed."""

    out: Path
    private: Path
    printed: bytes
    code: int

    def manifest(self) -> list[dict[str, object]]:
        return list(pq.read_table(self.out / "manifest.parquet").to_pylist())

    def quarantine(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.out / "quarantine.jsonl").read_text().splitlines()]

    def descriptions(self) -> list[dict[str, object]]:
        """Every KEY.json."""
        return [
            json.loads(data)
            for place, data in everything(self.out)
            if ".tar/" in place and place.endswith(".json")
        ]

    def index(self) -> list[dict[str, object]]:
        """The private way back from hashes to paths."""
        return [json.loads(line) for line in (self.private / "index.jsonl").read_text().splitlines()]


def run_build(recipe: dict[str, object], work: Path, *more: str, workers: int = 1) -> Built:
    """Run `medfm shards build` in a process of its own, with its worker in another. Everything that any of
    them writes to stdout or stderr is kept. The hash key is fixed, so that finds do not depend on chance."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out, private = work / "out", work / "private"
    private.mkdir(mode=0o700)
    (private / "hash.key").write_bytes(sha256(b"a key for tests").digest())
    os.utime(private / "hash.key", (1, 1))
    program = "import sys; from launch.cli import main; sys.exit(main())"
    arguments = ["shards", "build", str(work / "recipe.yaml"), "--out", str(out), "--private", str(private)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "1000"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--workers", str(workers), *more],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        check=False,
    )
    return Built(out, private, done.stdout, done.returncode)
