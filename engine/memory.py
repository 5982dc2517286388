"""What a run needs of memory and where it goes, said before it starts and where it was too much.

The prediction counts tensors of one rank at the worst moment of an update: when the loss is computed, and
once more when the last gradient is reduced. It needs neither a step nor a device. What it leaves out: the
libraries' own memory on a GPU, gaps between blocks of the allocator, evaluations, a reduced bucket for the
moment that a thread of Gloo is late to give it back. `explain` works from the prediction alone, so that a
launcher can tell of a worker that the kernel has killed.

PyTorch is imported where a device is asked only.
"""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from engine.distributed import World
    from engine.recipe import EngineConfig
    from engine.task import Task

BUCKET = 50_000_000  # elements that ZeRO 1 to 3 reduce at a time, as `engine.optimizer` asks for
DENSE_BUCKET = 500_000_000  # elements that ZeRO 0 reduces at a time
LIVE = 1_000_000_000  # gathered elements that ZeRO 3 keeps, DeepSpeed's own default
POSTPONED = "on a CPU, activations are traced when memory has run out"
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "bytes": 1}


@dataclass(frozen=True)
class Prediction:
    """Bytes of one rank.

    Attributes:
        device: `cpu` or `cuda`.
        parts: by what takes them, at the worst moment of an update; in the memory of the device.
        host: what takes host memory beside that.
        ranks: ranks that share the host's memory.
        settings: what could be set instead, such as `engine.zero_stage 2`, and the total it would make.
        batch_fields: names of the recipe fields that make a micro-step smaller.
        unknown: why activations are not among the parts.
    """

    device: str
    parts: dict[str, int]
    host: dict[str, int]
    ranks: int = 1
    settings: dict[str, int] = field(default_factory=dict)
    batch_fields: str = ""
    unknown: str = ""

    @property
    def total(self) -> int:
        """All parts; on a CPU with what lies in host memory, which is the same."""
        return sum(self.parts.values()) + (sum(self.host.values()) if self.device == "cpu" else 0)

    def text(self) -> str:
        """One line: the total and its parts, largest first."""
        shown = self.parts | (self.host if self.device == "cpu" else {})
        listed = sorted(((n, b) for n, b in shown.items() if b), key=lambda part: -part[1])
        unknown = f"; {self.unknown}" if self.unknown else ""
        return f"{size(self.total)} a rank ({', '.join(f'{n} {size(b)}' for n, b in listed)}{unknown})"


class Limit(NamedTuple):
    """A bound on memory: its name, the bytes of it that one rank may take, and its peak so far."""

    name: str
    bytes: int
    peak: int


def predict(
    task: Task,
    config: EngineConfig,
    world: World,
    *,
    traced: bool = True,
    host: Mapping[str, int] | None = None,
) -> Prediction:
    """Memory of a rank of this run; to be called before the model is wrapped where that cuts its weights into
    parts.

    traced: ask tasks that trace their activations, too, which takes seconds. host: what was found for the
    host before; what the process holds is measured otherwise.
    """
    from engine.optimizer import stage_of  # which asks this module how much it may reduce at a time

    parameters = list(task.model.parameters())
    numel = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    matrices = sum(p.numel() for p in parameters if p.ndim > 1 and p.requires_grad)
    micro_steps = task.micro_steps(world.size)
    activations, unknown = _activations(task, config.activation_checkpointing, traced)

    def parts(stage: int, checkpointing: bool) -> dict[str, int]:
        states = _states(stage, world.size, numel, trained, micro_steps)
        if config.precision == "bf16" and stage < 3:
            states["bf16 copies of weights"] = 2 * matrices
        if not unknown:
            states["activations"] = activations(checkpointing)
        reduced = _reduction(stage, world.size, numel, trained)
        return max(states, reduced | dict.fromkeys(states.keys() - reduced.keys(), 0), key=_sum)

    stage, checkpointing = stage_of(config, world), config.activation_checkpointing
    copies = 3 * [4 * trained // world.size]
    if world.device.type == "cuda":  # pinned memory comes in powers of two
        copies = [1 << (held - 1).bit_length() for held in copies]
    if host is None:
        weights = 4 * numel * (world.device.type == "cpu")
        host = {"copy for the saver": sum(copies), "programs and data": max(0, host_now() - weights)}
    here = Prediction(
        world.device.type,
        parts(stage, checkpointing),
        dict(host),
        _ranks_here(world),
        batch_fields=getattr(task, "batch_fields", ""),
        unknown=unknown,
    )
    other: dict[str, tuple[int, bool]] = {}
    if not checkpointing and callable(getattr(task.model, "set_checkpointing", None)):
        other["engine.activation_checkpointing true"] = stage, True
    if world.size > 1:
        highest = 2 if getattr(task.model, "calls_vary", False) else 3
        other |= {f"engine.zero_stage {s}": (s, checkpointing) for s in range(stage + 1, highest + 1)}
    beside = here.total - _sum(here.parts)
    here.settings.update({name: _sum(parts(*choice)) + beside for name, choice in other.items()})
    return here


def _activations(task: Task, checkpointing: bool, traced: bool) -> tuple[Callable[[bool], int], str]:
    """The task's hook, and why it is of no use where it is not: what is only said must not end a run."""
    hook: Callable[[bool], int] | None = getattr(task, "activation_bytes", None)
    if hook is None:
        return lambda _: 0, "this task does not say what its activations take"
    if getattr(task, "traces_activations", False) and not traced:
        return lambda _: 0, POSTPONED
    try:
        hook(checkpointing)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return lambda _: 0, f"what activations take could not be found ({text})"
    return hook, ""


def _states(stage: int, world: int, numel: int, trained: int, micro_steps: int) -> dict[str, int]:
    """What stands when the loss of an update's last micro-step is computed, activations left out."""
    own = world if stage else 1
    weights = 4 * numel // (world if stage == 3 else 1)
    moments = (8 if stage == 0 else 12) * trained // own
    # Without a second micro-step whole gradients come only as activations go; their reduced parts stay.
    whole = 4 * trained if micro_steps > 1 else 0
    part = 4 * trained // own
    gradients = {0: whole, 1: whole + part, 2: part * (2 if micro_steps > 1 else 1), 3: part}[stage]
    states = {"weights": weights, "moments" if stage == 0 else "masters and moments": moments}
    states["gradients"] = gradients
    if stage:
        states["reduction buffer"] = 4 * min(BUCKET, max(numel, 1024))
    if stage == 3:
        states["gathered weights"] = 4 * min(numel, LIVE)
    return states


def _reduction(stage: int, world: int, numel: int, trained: int) -> dict[str, int]:
    """What stands when the last gradients are reduced and the optimizer steps; activations are gone."""
    states = _states(stage, world, numel, trained, micro_steps=2)
    if stage == 0:
        states["reduction buffer"] = 4 * min(DENSE_BUCKET, trained) * (world > 1)
    elif stage < 3:
        states["gradients"] = 2 * 4 * trained // world  # this rank's, and once more in one piece
    return states


def now(device: torch.device) -> int:
    """Bytes in use: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated(device))
    return host_now()


def peak(device: torch.device) -> int:
    """Most bytes in use so far, as in `now`."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return host_peak()


def host_now() -> int:
    """Bytes of host memory that this process holds."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return host_peak()


def host_peak() -> int:
    """Most bytes of host memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limits(device: torch.device | None, ranks: int = 1) -> list[Limit]:
    """Every bound on the memory of this process; device: None asks for those of the host alone.

    A bound of the host or of its control groups is shared out evenly over `ranks`.
    """
    found = []
    if device is not None and device.type == "cuda":
        import torch

        free, whole = torch.cuda.mem_get_info(device)
        others = whole - free - torch.cuda.memory_reserved(device)
        found.append(Limit(f"memory of {device}", whole - max(0, others), peak(device)))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found.append(Limit("RLIMIT_AS (ulimit -v)", soft, _proc("/proc/self/status", "VmPeak")))
    for folder in _control_groups():
        bound = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if bound is not None and bound < 2**60:
            found.append(Limit(f"memory limit of control group {folder}", bound // ranks, host_peak()))
    if total := _proc("/proc/meminfo", "MemTotal"):
        found.append(Limit("memory of this host", total // ranks, host_peak()))
    return found


def explain(
    prediction: Prediction | None, device: torch.device | None, error: BaseException | str = ""
) -> str:
    """One line for the verdict: predicted and actual peak, the limit, and which settings stay below it.

    device: where the memory ran out; None where only the kernel knows (a killed worker), which means the
    host.
    """
    text = str(error)
    ranks = prediction.ranks if prediction else 1
    on_gpu = device is not None and device.type == "cuda" and "CUDA" in text
    bounds = limits(device if on_gpu else None, ranks)
    limit = bounds[0] if on_gpu else min(bounds, key=lambda bound: bound.bytes - bound.peak, default=None)
    asked = _asked(text)
    said = []
    if prediction is not None:
        said.append(f"predicted {prediction.text()}")
    if limit is not None and device is not None:
        more = f", and {size(asked)} more were asked for" if asked else ""
        said.append(f"peak {size(limit.peak)}{more}")
    if limit is not None:
        share = f", a share of {ranks} ranks" if ranks > 1 and not on_gpu else ""
        said.append(f"limit {size(limit.bytes)} ({limit.name}{share})")
    if prediction is not None and limit is not None:
        said.append(advice(prediction, limit, asked))
    return "out of memory: " + "; ".join(said)


def advice(prediction: Prediction, limit: Limit, asked: int = 0) -> str:
    """What to set so that the rank stays below a limit, and what each setting saves.

    The need is the larger of what was predicted and of what was seen and asked for.
    """
    need = max(prediction.total, limit.peak + asked)
    excess = max(0, need - limit.bytes)
    saved = {name: prediction.total - total for name, total in prediction.settings.items()}
    enough = {name: by for name, by in saved.items() if by >= excess and by > 0}
    listed = " or ".join(f"{name} (saves {size(by)})" for name, by in enough.items())
    if not excess:
        other = f", or set {listed}" if listed else ""
        return f"this rank alone stays below it: look at what else runs there{other}"
    if enough:
        return f"set {listed}; {size(excess)} are missing"
    parts = []
    if best := max((n for n, by in saved.items() if by > 0), key=lambda n: saved[n], default=""):
        parts.append(f"{best} saves {size(saved[best])} of the {size(excess)} that are missing")
    activations = prediction.parts.get("activations", 0)
    left = excess - max(0, saved.get(best, 0))
    if prediction.batch_fields and activations > left:
        share = math.floor(100 * (1 - left / activations))
        parts.append(f"a micro-step of {share} % of its size would fit: lower {prediction.batch_fields}")
    parts.append("or take more ranks or devices with more memory")
    return "; ".join(parts)


def size(number: float) -> str:
    """Bytes for people."""
    unit = "GiB" if number >= 0.1 * UNITS["GiB"] else "MiB"
    return f"{number / UNITS[unit]:.{2 if unit == 'GiB' else 0}f} {unit}"


def _asked(text: str) -> int:
    """Bytes that a failed allocation asked for, from PyTorch's message; 0 where it does not say."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", text)
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def _ranks_here(world: World) -> int:
    import os

    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def _control_groups() -> Iterator[Path]:
    """Folders of this process's control group and those above it, where memory is bounded (v2, then v1)."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / controllers
            folder = top / path.strip("/")
            while folder != top.parent:
                if folder.is_dir():
                    yield folder
                folder = folder.parent


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _proc(file: str, name: str) -> int:
    """A figure of /proc in bytes; 0 where there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _sum(parts: dict[str, Any]) -> int:
    return sum(parts.values())
