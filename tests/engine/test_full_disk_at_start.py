"""A launch whose run folder has no room: one line, at once, and nothing is started again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from saving import ranks

from engine import room
from engine.errors import UserError
from engine.train import _open_run
from launch import local
from launch.local import run_local

MEGABYTE = 1 << 20


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    """A file system of 5 MB, all of which `other` takes."""
    (small_disk / "run").mkdir()
    (small_disk / "other").write_bytes(b"x" * (5 * MEGABYTE - 8192))
    return small_disk


def test_the_launcher_ends_with_one_line_and_starts_nothing(
    full_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "Workers", lambda *_: pytest.fail("workers were started"))
    run = full_disk / "run"
    assert run_local("toy_worker", None, [], run=run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"medfm: error: --run {run}: the disk mounted at {full_disk} is full, ")
    assert "of 5 MiB are free" in line
    assert "nothing there is of this run: delete other files" in line
    assert list(run.iterdir()) == []


def test_what_the_run_itself_takes_is_named(full_disk: Path) -> None:
    run = full_disk / "run"
    (full_disk / "other").unlink()
    saved = run / "checkpoints" / "update-00000010"
    saved.mkdir(parents=True)
    (saved / "rank-00000.safetensors").write_bytes(b"x" * 3 * MEGABYTE)
    (run / "logs").write_bytes(b"x" * MEGABYTE)
    (full_disk / "other").write_bytes(b"x" * (MEGABYTE // 2))
    with pytest.raises(
        UserError, match="this run takes 4 MiB, its checkpoints 3 MiB of it: delete old check"
    ):
        room.check_room(run)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    (full_disk / "other").unlink()
    (run / "logs").unlink()
    room.check_room(run)


def test_a_worker_says_the_same_and_takes_no_number(full_disk: Path) -> None:
    run = full_disk / "run"
    with pytest.raises(UserError, match=re.escape(f"--run {run}: the disk mounted at {full_disk} is full")):
        _open_run(run, ranks(1)[0])
    assert not (run / "attempt").exists()


def test_a_disk_full_of_half_written_checkpoints_is_cleared_and_taken(full_disk: Path) -> None:
    """A kill while the disk was full leaves them, and who starts again should not need to know."""
    run = full_disk / "run"
    scratch = run / "checkpoints" / ".tmp-update-00000010-a1-1"
    scratch.mkdir(parents=True)
    (full_disk / "other").rename(scratch / "rank-00000.safetensors")
    with pytest.raises(UserError):
        room.check_room(run)
    assert room.has_half_written(run)
    assert _open_run(run, ranks(1)[0]) == 1
    assert not scratch.exists()


def test_a_folder_that_cannot_be_written_for_another_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"nothing can be written there \(Not a directory\)"):
        room.check_room(tmp_path / "file" / "run")
