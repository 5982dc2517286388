"""Keyed hashes and the allow-list."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import REASONS, Quarantined, UserError
from data_pipeline.privacy import NUMBERS, KeyedHash, allowed


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


def test_the_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    first, again = KeyedHash.open(tmp_path / "private"), KeyedHash.open(tmp_path / "private")
    assert first.of("path", "x") == again.of("path", "x")
    assert stat.S_IMODE((tmp_path / "private/hash.key").stat().st_mode) == 0o600
    assert KeyedHash.open(tmp_path / "other").of("path", "x") != first.of("path", "x")


@given(
    st.dictionaries(
        st.sampled_from([*NUMBERS, "PatientSex", "Manufacturer", "frame", "PatientName"]), st.text()
    )
)
def test_free_text_passes_no_field(found: dict[str, str]) -> None:
    for name, value in allowed({k: f"Doe {v}" for k, v in found.items()}).items():
        raise AssertionError((name, value))


def test_numbers_and_codes_pass() -> None:
    found = {
        "KVP": "120",
        "EchoTime": "3.4",
        "PatientSex": "F",
        "frame": "2 of 10",
        "PatientAge": "89+",
        "KVPP": "1",
    }
    assert allowed(found) == {k: v for k, v in found.items() if k != "KVPP"}
    assert allowed({"PatientAge": "95"}) == {}


def test_refusals_keep_paths_for_the_console_only(tmp_path: Path) -> None:
    error = Quarantined("truncated", "60 of 100 bytes").at(tmp_path / "Doe.nii")
    assert "Doe" in str(error)
    assert "Doe" not in error.code + error.detail
    assert error.at(Path("other")).path == tmp_path / "Doe.nii"
    with pytest.raises(ValueError, match="not a reason code"):
        Quarantined("because")
    assert all(REASONS.values())
