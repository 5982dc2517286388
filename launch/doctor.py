"""`medfm doctor`: what on this machine will stop a run, found in seconds and without starting one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "stops"]
FAILED = 3
_GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how bad it is, and what it means or what to do."""

    what: str
    level: Level
    meaning: str


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if not sys.platform.startswith("linux"):
        return Finding(
            "Python", "warning", f"{version} on {sys.platform}: segment and export work; training needs Linux"
        )
    return Finding("Python", "ok", version)


def _packages() -> Iterator[Finding]:
    """Versions without importing: deepspeed alone takes seconds."""
    absent, found = [], []
    for name in (
        "torch",
        "torchvision",
        "timm",
        "deepspeed",
        "webdataset",
        "blosc2",
        "SimpleITK",
        "pydicom",
        "monai",
    ):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        yield Finding("packages", "stops", f"not installed: {', '.join(absent)}; run `pip install medfm`")
    yield Finding("packages", "ok", ", ".join(found))
    missing = [name for name in ("gdcm", "openjpeg", "jpeg_ls") if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding(
            "DICOM decoders",
            "warning",
            f"not installed: {', '.join(missing)}; compressed series cannot be read",
        )
    else:
        yield Finding("DICOM decoders", "ok", "GDCM, OpenJPEG, JPEG-LS")


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import torchvision  # type: ignore[import-untyped]  # noqa: F401
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        yield Finding(
            "torch", "stops", f"does not import with torchvision: {reason}; install matching builds of both"
        )
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            level: Level = "ok" if free > 0.9 * total else "warning"
            note = "" if level == "ok" else "; another program holds the rest"
            yield Finding(
                f"GPU {number}", level, f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free{note}"
            )
        if not torch.cuda.is_bf16_supported():
            yield Finding("bf16", "warning", "this GPU has no bf16; set engine.precision: fp32")
        from engine.compilation import missing_tool

        if lacking := missing_tool():
            yield Finding("torch.compile", "warning", f"{lacking}; training runs uncompiled, slower")
    elif torch.version.cuda and Path("/proc/driver/nvidia").exists():
        yield Finding(
            "GPU",
            "stops",
            f"a driver is there and torch {torch.__version__} cannot use it; check `nvidia-smi`",
        )
    else:
        yield Finding("GPU", "warning", "none: training runs on the CPU, for small models only")
    if torch.distributed.is_available() and not torch.distributed.is_gloo_available():
        yield Finding("gloo", "stops", "this torch has no gloo backend; several CPU processes cannot train")


def _memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available / _GIB
    level: Level = "stops" if free < 1 else "warning" if free < 4 else "ok"
    yield Finding(
        "memory",
        level,
        f"{free:.1f} GiB available, {len(os.sched_getaffinity(0))} CPU cores for this process",
    )
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free / _GIB
        level = "stops" if shared < 0.06 else "warning" if shared < 1 else "ok"
        advice = "" if level == "ok" else "; loader workers pass batches there (docker: --shm-size=8g)"
        yield Finding("/dev/shm", level, f"{shared:.2f} GiB free{advice}")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / _GIB
    level: Level = "stops" if free < 1 else "warning" if free < 10 else "ok"
    yield Finding("disk", level, f"{free:.1f} GiB free in the working folder")
    try:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            (Path(folder) / "a").write_bytes(b"1")
            os.rename(Path(folder) / "a", Path(folder) / "b")
    except OSError as error:
        yield Finding(
            "working folder",
            "warning",
            f"cannot be written ({error.strerror}); give --out and --run elsewhere",
        )


def _files() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Finding(
            "open files", "warning", f"limit {soft}; raise it with `ulimit -n 4096` before a large dataset"
        )
    return Finding("open files", "ok", f"limit {soft}")


def _loopback() -> Finding:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as error:
        return Finding(
            "network", "stops", f"no TCP to 127.0.0.1 ({error}); the processes of a run cannot meet"
        )
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return Finding(
            "network",
            "warning",
            "the machine's own name does not resolve; set GLOO_SOCKET_IFNAME=lo for one node",
        )
    return Finding("network", "ok", "processes can meet on 127.0.0.1")


def _codec() -> Finding:
    import numpy as np

    from data_pipeline.storage import decode, encode

    voxels = np.arange(2 * 40 * 40 * 40, dtype=np.int16).reshape(2, 40, 40, 40)
    first, second = encode(voxels, (1, 32, 32, 32)), encode(voxels, (1, 32, 32, 32))
    if first != second or not np.array_equal(decode(first), voxels):
        return Finding("Blosc2", "stops", "does not give back what it was given, or not the same bytes twice")
    return Finding("Blosc2", "ok", "round trip exact, bytes repeat")


def findings() -> list[Finding]:
    """Every check of this machine; a check that cannot run is itself a finding."""
    out: list[Finding] = []
    checks: list[Callable[[], Finding | Iterator[Finding]]] = [
        _python, _packages, _torch, _memory, _disk, _files, _loopback, _codec,
    ]  # fmt: skip
    for check in checks:
        try:
            found = check()
            out += [found] if isinstance(found, Finding) else list(found)
        except Exception as error:
            out.append(
                Finding(
                    check.__name__.strip("_"),
                    "warning",
                    f"could not be checked ({type(error).__name__}: {error})",
                )
            )
    return out


def doctor() -> int:
    """Print the findings; 0, or 3 where something stops a run."""
    from rich.console import Console
    from rich.table import Table

    found = findings()
    table = Table("", "checked", "found", title="medfm doctor")
    sign = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "stops": "[red]stops a run[/]"}
    for finding in found:
        table.add_row(sign[finding.level], finding.what, finding.meaning)
    Console().print(table)
    stops = sum(finding.level == "stops" for finding in found)
    print(f"found to stop a run: {stops}" if stops else "nothing found that will stop a run")
    return FAILED if stops else 0
