"""Arrays out of gzipped files are those that the standard library gives, and damage is never missed."""

from __future__ import annotations

import gzip
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import Quarantined
from data_pipeline.readers import gunzip, nifti
from data_pipeline.readers.gunzip import read_array


def voxels(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.asfortranarray(np.random.default_rng(seed).integers(0, 90, shape).astype(dtype))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 999),
    st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    st.sampled_from(["<i2", ">i2", "<f4", "u1", ">f8"]),
    st.integers(0, 400),
    st.integers(0, 9),
    st.lists(st.integers(0, 5000), max_size=3),
    st.sampled_from([b"", b"\0" * 700, b"trailing", b"\x1f"]),
    st.integers(0, 50),
    st.sampled_from([7, 100, 1 << 16]),
)
def test_any_array_of_any_gzip_file(
    tmp_path: Path, seed: int, shape: tuple[int, ...], dtype: str, offset: int, level: int, cuts: list[int],
    garbage: bytes, after: int, piece: int,
) -> None:  # fmt: skip
    """Several members cut anywhere, bytes before and after the array, garbage after the last member."""
    array = voxels(seed, shape, dtype)
    plain = bytes(offset) + array.tobytes(order="F") + bytes(after)
    ends = [*sorted(c for c in cuts if c < len(plain)), len(plain)]
    members = [gzip.compress(plain[a:b], level) for a, b in zip([0, *ends], ends)]
    path = tmp_path / "a.gz"
    path.write_bytes(b"".join(members) + garbage)
    with mock.patch.object(gunzip, "PIECE", piece):
        got = read_array(path, offset, shape, np.dtype(dtype))
    assert got.dtype == array.dtype
    assert got.flags.f_contiguous
    assert got.flags.writeable
    np.testing.assert_array_equal(got, array)


def test_every_cut_and_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    array = voxels(0, (6, 5, 4), "<i2")
    clean = gzip.compress(bytes(352) + array.tobytes(order="F"), 6, mtime=0)
    path = tmp_path / "a.gz"
    for length in range(len(clean)):
        path.write_bytes(clean[:length])
        with pytest.raises(EOFError):
            read_array(path, 352, array.shape, array.dtype)
    for place in range(len(clean)):
        path.write_bytes(clean[:place] + bytes([clean[place] ^ 0x10]) + clean[place + 1 :])
        try:
            got = read_array(path, 352, array.shape, array.dtype)
        except (EOFError, ValueError):
            continue
        assert place < 10  # header fields that say nothing of the data (time, system, flags of speed)
        np.testing.assert_array_equal(got, array)


def test_a_nifti_that_fails_its_checksum_is_refused(tmp_path: Path) -> None:
    import nibabel

    path = tmp_path / "a.nii.gz"
    image = nibabel.Nifti1Image(voxels(1, (26, 25, 24), "<i2"), np.eye(4))
    nibabel.save(image, path)
    np.testing.assert_array_equal(nifti.decode(path).frames[0].T, image.dataobj)
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    with pytest.raises(Quarantined) as refused:
        nifti.decode(path)
    assert refused.value.code == "unreadable"
    path.write_bytes(data[:-20])
    with pytest.raises(Quarantined) as refused:
        nifti.decode(path)
    assert refused.value.code == "truncated"
