"""Keyed hashes: what they are, and that their key is made once, whole, and outside every dataset."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from data_pipeline import privacy
from data_pipeline.build import build
from data_pipeline.errors import REASONS, Quarantined, UserError
from data_pipeline.privacy import KeyedHash, check_private
from data_pipeline.sources import SourceConfig


@pytest.fixture(autouse=True)
def real_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process draws keys of its own here: forks that draw alike would agree without sharing a key."""
    monkeypatch.setattr(privacy, "secrets", secrets)


def test_the_hash_is_hmac_sha256_and_needs_the_key() -> None:
    one, other = KeyedHash(b"k" * 32), KeyedHash(b"K" * 32)
    expected = hmac.new(b"k" * 32, b"subject\0hospital\0Doe", hashlib.sha256).hexdigest()[:32]
    assert one.subject("hospital", "Doe") == expected
    assert one.subject("hospital", "Doe") != other.subject("hospital", "Doe")
    assert one.subject("hospital", "Doe") != one.subject("clinic", "Doe")
    assert one.of("path", "a") != one.of("subject", "a")
    with pytest.raises(UserError, match="16 bytes"):
        KeyedHash(b"short")


def test_a_path_has_one_hash_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hashes = KeyedHash(b"k" * 32)
    assert hashes.path(Path("a/../b.nii")) == hashes.path(tmp_path / "b.nii")


def test_a_remote_path_is_hashed_by_its_address() -> None:
    UPath = pytest.importorskip("upath").UPath
    hashes = KeyedHash(b"k" * 32)
    assert hashes.path(UPath("memory://scans/a.nii")) == hashes.of("path", "memory://scans/a.nii")


def test_the_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    first, again = KeyedHash.open(tmp_path / "private"), KeyedHash.open(tmp_path / "private")
    assert first.of("path", "x") == again.of("path", "x")
    assert stat.S_IMODE((tmp_path / "private/hash.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
    assert [p.name for p in (tmp_path / "private").iterdir()] == ["hash.key"]
    assert KeyedHash.open(tmp_path / "other").of("path", "x") != first.of("path", "x")


def test_a_folder_left_open_is_closed(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o755)
    (private / "hash.key").write_bytes(b"k" * 32)
    (private / "hash.key").chmod(0o644)
    assert KeyedHash.open(private).of("path", "x") == KeyedHash(b"k" * 32).of("path", "x")
    assert stat.S_IMODE((private / "hash.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


def start(folder: str) -> str:
    return KeyedHash.open(Path(folder)).of("path", "x")


def test_concurrent_starters_get_one_key(tmp_path: Path) -> None:
    with get_context("fork").Pool(8) as pool:
        for n in range(10):
            assert len(set(pool.map(start, [str(tmp_path / f"p{n}")] * 8, chunksize=1))) == 1


@pytest.mark.parametrize("links", [True, False])
def test_no_starter_reads_half_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """With and without hard links, and with a writer that dawdles over the bytes."""
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    slow = os.fsync

    def dawdle(descriptor: int) -> None:
        slow(descriptor)
        privacy.time.sleep(0.01)

    monkeypatch.setattr(os, "fsync", dawdle)
    with ThreadPoolExecutor(12) as pool:
        for n in range(5):
            assert len(set(pool.map(start, [str(tmp_path / f"{links}{n}")] * 12))) == 1
            assert len((tmp_path / f"{links}{n}" / "hash.key").read_bytes()) == 32


def test_an_empty_key_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "KEY_WAIT", 0.1)
    (tmp_path / "hash.key").write_bytes(b"")
    with pytest.raises(UserError, match=r"delete hash\.key"):
        KeyedHash.open(tmp_path)


def test_the_private_folder_is_never_in_the_dataset(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    for inside in (out, out / "private", tmp_path / "link", tmp_path / "link" / "p", tmp_path / "x/../out/p"):
        with pytest.raises(UserError, match="must lie outside"):
            check_private(out, inside)
        with pytest.raises(UserError, match="must lie outside"):
            check_private(tmp_path / "link", inside)
    check_private(out, tmp_path / "out-private")
    scans = SourceConfig(path=tmp_path, name="s", modality="CT")
    for folders in ({"private": tmp_path / "link" / "p"}, {"work": tmp_path / "link" / "w"}):
        with pytest.raises(UserError, match="must lie outside"):
            build([scans], out, progress=False, **folders)  # type: ignore[arg-type]
    assert list(out.iterdir()) == []


def test_a_key_is_never_kept_in_any_dataset(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("manifest.parquet", "dataset.json"):
        (tmp_path / "old" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / "sly").mkdir()
    (tmp_path / "sly" / "hash.key").symlink_to(tmp_path / "old" / "key")
    for inside in (tmp_path / p for p in ("old", "old/deep/er", "link/private", "sly")):
        with pytest.raises(UserError, match="inside the dataset"):
            KeyedHash.open(inside)
    assert sorted(p.name for p in (tmp_path / "old").iterdir()) == ["dataset.json", "manifest.parquet"]


def test_a_folder_that_cannot_hold_the_key_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another private folder") as caught:
        KeyedHash.open(tmp_path / "file" / "private")
    assert "\n" not in str(caught.value)


def test_refusals_keep_paths_for_the_console_only(tmp_path: Path) -> None:
    error = Quarantined("truncated", "60 of 100 bytes").at(tmp_path / "Doe.nii")
    assert "Doe" in str(error)
    assert "Doe" not in error.code + error.detail
    assert error.at(Path("other")).path == tmp_path / "Doe.nii"
    with pytest.raises(ValueError, match="not a reason code"):
        Quarantined("because")
    assert all(REASONS.values())
