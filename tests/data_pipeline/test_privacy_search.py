"""The search for planted identifiers can fail: each place it looks into, each encoding, and a builder that
keeps one element too many."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from hashlib import md5, sha256
from pathlib import Path

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from planted import (
    DATE,
    DAY,
    FAMILY,
    GIVEN,
    JAPANESE,
    LATIN,
    NAME,
    NUMBER,
    PATIENT,
    SENTENCE,
    STREET,
    TEXTS,
    everything,
    finds,
    inside,
    leaks,
)
from planted_dicom import plant, put, save, true_header, voxels

from data_pipeline import privacy
from data_pipeline.build import build
from data_pipeline.readers import dicom
from data_pipeline.sources import SourceConfig


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-16", "utf-32", "latin-1"])
def test_every_word_is_found_in_every_encoding_and_case(encoding: str) -> None:
    for text in TEXTS:
        if encoding == "latin-1" and text == JAPANESE:
            continue
        for variant in (text, text.upper(), text.lower(), f"Dr.{text}^^"):
            assert finds(b"\x00\x01abc" + variant.encode(encoding) + b"xyz"), (text, encoding)


def test_names_are_found_in_any_order_and_by_dicom_s_own_encodings() -> None:
    for data in (
        f"{GIVEN} {FAMILY}".encode(),
        f"{GIVEN}^{FAMILY}".upper().encode(),
        JAPANESE.encode("iso2022_jp"),
        JAPANESE.encode("shift_jis"),
        LATIN.encode("latin-1"),
        json.dumps({"name": LATIN}).encode(),
        f'{{"x": "{PATIENT.encode().hex()}"}}'.encode(),
    ):
        assert finds(data), data


@pytest.mark.parametrize("form", ["<i4", ">i4", "<i8", ">i8", "<f4", ">f8", "<f8"])
def test_numbers_are_found_in_binary(form: str) -> None:
    for number in (NUMBER, DAY):
        assert finds(np.array([1, number, 2], form).tobytes())


def test_digests_without_a_key_are_found() -> None:
    """An unkeyed hash of an identity number is undone by trying them all."""
    assert finds(md5(PATIENT.encode()).hexdigest().encode())
    assert finds(sha256(NAME.encode()).hexdigest()[:16].encode())


def test_chance_finds_nothing() -> None:
    random = np.random.default_rng(0)
    assert finds(random.integers(0, 256, 1_000_000, dtype=np.uint8).tobytes()) == []
    assert finds(random.bytes(200_000).hex().encode()) == []


def png(**planted: str) -> bytes:
    text = PngImagePlugin.PngInfo()
    for key, value in planted.items():
        text.add_text(key, value, zip=True)
    file = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def test_each_place_is_opened(tmp_path: Path) -> None:
    """One find planted, packed so that the raw file does not show it, in each kind of place."""
    hidden = np.zeros((1, 4, 40, 40), np.uint8)
    hidden[0, 1, :1, : len(STREET)] = np.frombuffer(STREET.encode(), np.uint8)
    frame = blosc2.asarray(np.repeat(hidden, 8, 1), chunks=(1, 8, 40, 40)).to_cframe()
    named = blosc2.asarray(np.zeros((4, 4)), meta={"patient": FAMILY.encode().hex()}).to_cframe()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name, data in (("a.b2nd", frame), ("b.b2nd", named)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    table = io.BytesIO()
    pq.write_table(pa.table({"x": [NAME] * 50}), table, compression="zstd")
    titled = io.BytesIO()
    pq.write_table(pa.table({NAME: [1]}), titled)
    report = f"<p>&#90;yxquorth</p><img src='data:image/png;base64,{_base64(png(Comment=SENTENCE * 3))}'>"
    places = {
        "shard.tar": tar.getvalue(),
        "rows.parquet": table.getvalue(),
        "column.parquet": titled.getvalue(),
        "picture.png": png(Author=SENTENCE * 3),
        "report.html": report.encode(),
        "quarantine.jsonl": (json.dumps({"detail": LATIN}) + "\n").encode(),
    }
    for name, data in places.items():
        assert any(finds(part) for _, part in inside(name, data)), name
    assert finds(zlib.compress(SENTENCE.encode() * 3)) == []  # raw bytes alone would not have been enough
    (tmp_path / FAMILY.lower()).mkdir()
    assert any(finds(data) for _, data in everything(tmp_path))


def _base64(data: bytes) -> str:
    from base64 import b64encode

    return b64encode(data).decode()


def one_series(root: Path) -> SourceConfig:
    for z in range(2):
        save(plant(true_header("CT", voxels(z), 2.0 * z, "mutant"), "unicode"), root / f"{z}.dcm")
    return SourceConfig(path=root, name="s", layout="dicom")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    return one_series(tmp_path_factory.mktemp("scans"))


@pytest.mark.parametrize("keyword", ["PatientName", "StudyDate", "InstitutionAddress", "DeviceSerialNumber"])
def test_a_builder_that_keeps_one_element_is_caught(
    source: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keyword: str
) -> None:
    """One more element on the list, of any form, and the search names it."""
    original = dicom.technical_fields

    def leaky(header, notes=None):  # type: ignore[no-untyped-def]
        return {**original(header, notes), keyword: str(header.get(keyword))}

    for module in _modules_with("technical_fields"):
        monkeypatch.setattr(module, "technical_fields", leaky)
    monkeypatch.setitem(privacy.NOTES, keyword, "(?s).*")
    build([source], tmp_path / "leaky", progress=False)
    assert leaks(tmp_path / "leaky")
    monkeypatch.undo()
    build([source], tmp_path / "sound", progress=False)
    assert leaks(tmp_path / "sound") == []


def test_a_build_in_this_process_prints_nothing_of_a_header(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """pydicom warns of an unknown character set by quoting it, in discovery and in reading."""
    header = true_header("CT", voxels(1), 0.0, "charset")
    header.PatientName = NAME
    put(header, 0x00080005, "CS", f"{FAMILY} {PATIENT}")
    path = save(header, tmp_path / "in" / "a.dcm")
    with pytest.warns(UserWarning, match=FAMILY):
        str(pydicom.dcmread(path).PatientName)
    capfd.readouterr()
    build([SourceConfig(path=path.parent, name="s", layout="dicom")], tmp_path / "out", progress=True)
    printed = "".join(capfd.readouterr())
    assert printed
    assert finds(printed.encode()) == []


def _modules_with(name: str) -> list[object]:
    import sys

    return [
        module
        for title, module in list(sys.modules.items())
        if title.startswith("data_pipeline.") and title != "data_pipeline.privacy" and hasattr(module, name)
    ]


def test_text_in_the_unused_bits_of_pixels_is_not_stored(tmp_path: Path) -> None:
    """16 bits allocated, 8 stored: the upper byte of each pixel spells a name; no shard may have it."""
    low = np.stack([voxels(z) & 0xFF for z in range(2)])
    text = np.frombuffer((SENTENCE * 9).encode()[:240], np.uint8).astype(np.uint16)
    written = low.copy()
    written.reshape(2, -1)[:, :240] |= text << 8
    for z in range(2):
        header = true_header("CT", written[z], 2.0 * z, "bits")
        header.BitsStored, header.HighBit = 8, 7
        save(header, tmp_path / "in" / f"{z}.dcm")
    assert finds(np.ascontiguousarray(written[0].view(np.uint8)[:, 1::2]).tobytes())
    source = SourceConfig(path=tmp_path / "in", name="s", layout="dicom", units="arbitrary")
    build([source], tmp_path / "out", progress=False)
    stored = _frames(tmp_path / "out")
    assert stored
    for array in stored:
        np.testing.assert_array_equal(
            array.astype(np.int64) - array.min(), low[None].astype(np.int64) - low.min()
        )


def _frames(root: Path) -> list[np.ndarray]:
    from data_pipeline.storage import decode

    return [decode(data) for place, data in everything(root) if place.endswith(".b2nd")]


def test_a_date_in_a_number_is_caught(
    source: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number's range is what keeps a date out: without it the date is there, and found."""
    monkeypatch.setattr(privacy, "_number", lambda name, text: text if text == DATE else "")
    build([source], tmp_path / "leaky", progress=False)
    assert leaks(tmp_path / "leaky")
