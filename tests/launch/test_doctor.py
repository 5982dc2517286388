"""`medfm doctor`: what it finds here, and that a fault reaches the exit code."""

from __future__ import annotations

import socket
from typing import NoReturn

import pytest
import torch

from launch import doctor as room


def test_a_machine_that_runs_these_tests_can_run_medfm() -> None:
    found = {finding.what: finding for finding in room.findings()}
    assert {"Python", "packages", "memory", "disk", "open files", "network", "Blosc2"} <= set(found)
    assert {"GPU", "GPU 0"} & set(found)
    assert found["Blosc2"].level == "ok"
    assert found["Python"].level != "stops"


def test_no_loopback_stops_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert room.doctor() == room.FAILED
    assert "found to stop a run: 1" in capsys.readouterr().out


def test_a_check_that_breaks_is_itself_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> NoReturn:
        raise RuntimeError("odd machine")

    monkeypatch.setattr(room, "_disk", broken)
    assert any("odd machine" in finding.meaning and finding.level == "warning" for finding in room.findings())


def test_a_gpu_machine_that_cannot_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("device_count", 0), ("is_bf16_supported", True)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr("engine.compilation.missing_tool", lambda: "no C compiler")
    (found,) = (finding for finding in room.findings() if finding.what == "torch.compile")
    assert (found.level, found.meaning) == ("warning", "no C compiler; training runs uncompiled, slower")
