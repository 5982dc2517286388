"""Signals to any process of a launch, at any instant, once and twice: one save, code 75, nothing left alive.

The workers load no library (stand_in.py); tests/engine has the same with real training.
"""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from stand_in import alive

from launch import local

HERE = Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
    return found


class Started:
    """A launcher of its own process, in a session of its own, with two ranks that each have a data worker."""

    def __init__(self, run: Path, *words: str, terminal: int | None = None) -> None:
        arguments = ["--updates", "100000", "--save", "0.2", "--loader", *words]
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from launch.local import run_local;"
            f"sys.exit(run_local('stand_in', None, {arguments!r}, 2, run={str(run)!r}))"
        )
        self.run, self.seen = run, set[psutil.Process]()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env=ENV, stdin=terminal, start_new_session=True,
            preexec_fn=None if terminal is None else _take_terminal,
            stderr=subprocess.PIPE if terminal is None else None,
        )  # fmt: skip
        self.launcher = psutil.Process(self.process.pid)

    def listening(self) -> psutil.Process:
        """The launcher, once it handles signals."""
        wait_for(lambda: self.run.exists())  # made right before
        wait_for(lambda: _handles(self.launcher.pid, TERM))
        return self.launcher

    def agent(self) -> psutil.Process:
        """torchrun, as soon as it is there."""

        def find() -> psutil.Process | None:
            found = [p for p in self._children(self.launcher) if "launch.elastic" in _command(p)]
            return found[0] if found else None

        return wait_for(find)

    def rank(self, number: int) -> psutil.Process:
        """A rank, as soon as it is there."""

        def find() -> psutil.Process | None:
            for child in self._children(self.agent()):
                if _variable(child, "RANK") == str(number):
                    return child
            return None

        return wait_for(find)

    def loader(self, number: int) -> psutil.Process:
        """The data worker of a rank."""
        file = self.run / f"loader-{number}"
        return psutil.Process(int(wait_for(lambda: file.exists() and file.read_text())))

    def train(self) -> None:
        """Wait until both ranks train."""
        for number in range(2):
            self.loader(number)
            wait_for(lambda n=number: list(self.run.glob(f"training-*-{n}")))

    def saving(self) -> None:
        """Wait until a save has begun."""
        wait_for(lambda: (self.run / "saves").exists())

    @contextmanager
    def held(self) -> Iterator[None]:
        """No save ends before this context does."""
        (self.run / "hold").touch()
        yield
        (self.run / "hold").unlink()

    def family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            self.seen |= {self.launcher, *self.launcher.children(recursive=True)}
        return [p for p in self.seen if p.is_running()]

    def ends(self) -> tuple[int, dict[str, Any]]:
        """Wait for the end: exit code and verdict; nothing is left alive."""
        self.family()
        code = self.process.wait(timeout=60)
        wait_for(lambda: not any(alive(process.pid) for process in self.seen), seconds=20)
        return code, json.loads((self.run / "verdict.json").read_text())

    @property
    def saves(self) -> int:
        """Saves that were begun."""
        file = self.run / "saves"
        return len(file.read_text().splitlines()) if file.exists() else 0

    @property
    def saved(self) -> int:
        """Saves that came to their end."""
        return len(list(self.run.glob("checkpoints/update-*/complete.json")))

    def _children(self, process: psutil.Process) -> list[psutil.Process]:
        children = process.children()
        self.seen |= set(children)
        return children


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(*words: str, terminal: int | None = None) -> Started:
        started.append(Started(tmp_path / "run", *words, terminal=terminal))
        return started[-1]

    yield begin
    for one in started:
        for process in one.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        one.process.wait()


TARGETS: dict[str, Callable[[Started], list[psutil.Process]]] = {
    "launcher": lambda s: [s.listening()],
    "torchrun": lambda s: [s.agent()],
    "rank 0": lambda s: [s.rank(0)],
    "rank 1": lambda s: [s.rank(1)],
    "data worker": lambda s: [s.loader(1)],
    "every process": lambda s: s.family(),
}


@pytest.mark.parametrize(
    ("target", "number", "when"),
    [
        ("launcher", TERM, "start"),
        ("torchrun", USR1, "start"),
        ("rank 1", USR1, "start"),
        ("rank 0", USR1, "training"),
        ("data worker", TERM, "training"),
        ("every process", TERM, "training"),
    ],
)  # fmt: skip
def test_a_signal_to_any_process_saves_once_and_ends(
    start: Callable[..., Started], target: str, number: signal.Signals, when: str
) -> None:
    """`start`: the instant at which the process exists."""
    started = start("--start", "0.3" if when == "start" else "0")
    if when != "start":
        started.train()
        time.sleep(random.SystemRandom().uniform(0, 0.1))
    for process in TARGETS[target](started):
        with suppress(psutil.NoSuchProcess):  # of every process the last: the others may have ended
            process.send_signal(number)
    code, verdict = started.ends()
    assert (code, verdict["state"]) == (75, "preempted")
    assert started.saves == started.saved == (0 if verdict["kind"] == "unsaved" else 1)
    assert when == "start" or verdict["kind"] == ""


def test_a_signal_before_any_worker_was_started_has_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run that never began; in one that did, its last verdict stays."""
    monkeypatch.setattr(local, "_name_another", lambda run: os.kill(os.getpid(), TERM))
    for earlier in (None, {"state": "failed", "update": 7, "attempt": 1}):
        run = tmp_path / str(earlier is None)
        if earlier is not None:
            run.mkdir()
            (run / "attempt").write_text("1\n")
            (run / "verdict.json").write_text(json.dumps(earlier))
        assert local.run_local("stand_in", None, [], 2, run=run, env=ENV) == 75
        assert not (run / "launches.jsonl").exists()
        verdict = json.loads((run / "verdict.json").read_text())
        if earlier is None:
            assert (verdict["state"], verdict["kind"], verdict["update"]) == ("preempted", "unsaved", 0)
        else:
            assert verdict == earlier


@pytest.mark.parametrize(
    ("first", "then", "numbers"),
    [("launcher", "every process", (TERM, USR1, TERM)), ("torchrun", "torchrun", (TERM, TERM))],
)
def test_signals_that_come_while_the_first_is_answered_by_a_save_do_not_hurt(
    start: Callable[..., Started], first: str, then: str, numbers: tuple[signal.Signals, ...]
) -> None:
    """torchrun by itself leaves at the second one or the third, and with it the workers."""
    started = start()
    started.train()
    with started.held():
        for process in TARGETS[first](started):
            process.send_signal(TERM)
        started.saving()
        for number in numbers:
            for process in TARGETS[then](started):
                process.send_signal(number)
                wait_for(lambda p=process, n=number: not _pending(p.pid, n))
        time.sleep(1.5)  # what takes torchrun apart, if anything does, has got so far
    code, verdict = started.ends()
    assert (code, verdict["state"], verdict["kind"]) == (75, "preempted", "")
    assert (started.saves, started.saved) == (1, 1)


@pytest.mark.parametrize(("which", "when"), [("launcher", "training"), ("torchrun", "start")])
def test_nothing_outlives_a_killed_launcher_or_torchrun(
    start: Callable[..., Started], which: str, when: str
) -> None:
    started = start("--updates", "40")
    started.rank(1)
    if when == "training":
        started.train()
    family = started.family()
    victim = TARGETS[which](started)[0]
    victim.kill()
    if which == "torchrun":  # the launcher starts it again, and the run finishes
        code, verdict = started.ends()
        assert (code, verdict["state"]) == (0, "finished")
    else:
        started.process.wait()
    wait_for(lambda: not any(alive(process.pid) for process in family), seconds=20)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_a_terminal_saves_and_the_second_ends_now(
    start: Callable[..., Started], presses: int
) -> None:
    """A real terminal: the key goes to its foreground process group, as it does for a person."""
    keyboard, terminal = pty.openpty()
    started = start("--save", "1000" if presses == 2 else "0.2", terminal=terminal)
    started.train()
    started.family()
    os.write(keyboard, b"\x03")
    started.saving()
    if presses == 2:
        os.write(keyboard, b"\x03")
    code, verdict = started.ends()
    assert (code, verdict["state"], started.saves) == (75, "preempted", 1)
    assert (verdict["kind"], started.saved) == (("unsaved", 0) if presses == 2 else ("", 1))
    os.close(keyboard)
    os.close(terminal)


def test_a_signal_to_the_command_before_it_has_imported_anything(tmp_path: Path) -> None:
    recipe = HERE.parents[1] / "recipes" / "pretrain-tiny.yaml"
    words = ["-m", "launch.cli", "pretrain", str(recipe), "--run", str(tmp_path / "run")]
    command = subprocess.Popen([sys.executable, *words], env=ENV, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: _blocks(command.pid, TERM) or _handles(command.pid, TERM))
    command.send_signal(TERM)
    said = command.communicate(timeout=60)[1]
    assert command.returncode == 75, said
    assert "before it had begun" in said


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _mask(pid: int, name: str) -> int:
    with suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1], 16)
    return 0


def _handles(pid: int, number: int) -> bool:
    return bool(_mask(pid, "SigCgt") >> (number - 1) & 1)


def _pending(pid: int, number: int) -> bool:
    return bool((_mask(pid, "SigPnd") | _mask(pid, "ShdPnd")) >> (number - 1) & 1)


def _blocks(pid: int, number: int) -> bool:
    return bool(_mask(pid, "SigBlk") >> (number - 1) & 1)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.Error, OSError):
        return []


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None
