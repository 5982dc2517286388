"""The quickstart's stages: each runs `medfm` commands as a person would, with a bar, a log and a time."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

_COUNT = re.compile(r"(\d+)/(\d+)")
_QUIET_SECONDS = 10.0


class CommandFailed(Exception):
    """A command of a stage ended with another code than 0."""

    def __init__(self, words: Sequence[str], code: int, tail: Sequence[str], log: Path) -> None:
        self.code = code
        super().__init__(
            f"`{shlex.join(words)}` ended with code {code}; its log is {log}\n" + "\n".join(tail)
        )


class Stages:
    """Runs stages one after the other. A context manager: no command outlives it.

    Attributes:
        seconds: wall-clock seconds by stage name, in order.
    """

    def __init__(self, out: Path) -> None:
        from rich.console import Console

        self.console = Console()
        self.seconds: dict[str, float] = {}
        self.commands: list[str] = []
        self._logs = out / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._running: list[subprocess.Popen[str]] = []
        self._bars: Any = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self._running:
            if process.poll() is None:
                process.terminate()
        for process in self._running:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Time what happens inside as the stage `name`."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console.rule(f"{len(self.seconds) + 1}. {what}", align="left")
        began = time.monotonic()
        columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[text]}"), TimeElapsedColumn())  # fmt: skip
        with Progress(
            *columns, console=self.console, refresh_per_second=2, disable=not self.console.is_terminal
        ) as self._bars:
            yield
        self.seconds[name] = time.monotonic() - began
        self.console.print(f"   {self.seconds[name]:.0f} s", style="dim")

    def bar(self, title: str, total: int | None = None) -> Bar:
        """A bar of the stage that is open."""
        return Bar(self._bars, self.console, title, total)

    def run(
        self, commands: Mapping[str, Sequence[str]], environment: Mapping[str, str] | None = None
    ) -> None:
        """Run `medfm` with each list of words, all at once; names are for bars and log files.

        Raises:
            CommandFailed: the first that failed; the others are stopped.
        """
        done: list[tuple[Sequence[str], subprocess.Popen[str], threading.Thread, deque[str], Path]] = []
        for name, words in commands.items():
            shown = ["medfm", *words]
            self.commands.append(shlex.join(shown))
            self.console.print(f"   $ {shlex.join(shown)}", style="bold", highlight=False, soft_wrap=True)
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                bufsize=1,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "110", **(environment or {})},
            )
            self._running.append(process)
            log = self._logs / f"{len(self.commands):02d}-{name}.log"
            tail: deque[str] = deque(maxlen=15)
            thread = threading.Thread(
                target=self._follow, args=(process, self.bar(name), log, tail), daemon=True
            )
            thread.start()
            done.append((shown, process, thread, tail, log))
        for said, process, thread, tail, log in done:
            code = process.wait()
            thread.join(timeout=10)
            if code != 0:
                raise CommandFailed(said, code, tail, log)

    @staticmethod
    def _follow(process: subprocess.Popen[str], bar: Bar, log: Path, tail: deque[str]) -> None:
        assert process.stdout is not None
        with log.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.strip():
                    tail.append(line.rstrip())
                    bar.read(line)
        bar.finish()


class Bar:
    """One line of progress: a bar on a terminal, a line of text every ten seconds elsewhere."""

    def __init__(self, bars: Any, console: Any, title: str, total: int | None) -> None:
        self._bars, self._console, self._title, self._total = bars, console, title, total
        self._task = bars.add_task(title, total=total, text="")
        self._said = time.monotonic()

    def read(self, line: str) -> None:
        """Take `12/100` out of a line of a command's output."""
        counted = _COUNT.findall(line)
        if counted and int(counted[-1][1]) > 0:
            done, total = map(int, counted[-1])
            found = re.search(r"loss ([-\d.e+]+)", line)
            self.at(done, total, f"loss {found.group(1)}" if found else "")

    def at(self, done: int, total: int | None = None, text: str = "") -> None:
        """`done` of `total` are finished."""
        self._total = total or self._total
        self._bars.update(self._task, completed=done, total=self._total, text=text)
        if not self._console.is_terminal and time.monotonic() - self._said > _QUIET_SECONDS:
            self._said = time.monotonic()
            self._console.print(f"   {self._title}: {done}/{self._total} {text}", highlight=False)

    def finish(self) -> None:
        """Fill the bar."""
        self._bars.update(self._task, completed=self._total or 1, total=self._total or 1)
