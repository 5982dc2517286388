"""Where figures and pictures of a run can be looked at: TensorBoard, Weights & Biases, MLflow; RUN/pictures.

A tracker is called from a thread of its own (`engine.background`), so that it may wait for a disk or a server
as long as it likes.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.background import Appended, Background
from engine.errors import UserError
from engine.recipe import leaves
from engine.verdict import write_text

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
PICTURES = "pictures"
ROLLBACK = "rollback/attempt"  # how often the run had gone back when a point was made
MOST_WAITING = 64 << 20  # bytes of figures and pictures kept for a tracker that does not take them
CLOSE_SECONDS = {
    "tensorboard": 5.0,
    "wandb": 60.0,
    "mlflow": 30.0,
    PICTURES: 5.0,
}  # for the last entries at the end


@dataclass(frozen=True)
class Scalars:
    """Figures of one update, taken at `time` (seconds since 1970) after so many rollbacks."""

    values: Mapping[str, float]
    update: int
    time: float
    rollbacks: int = 0

    @property
    def size(self) -> int:
        """About the bytes it takes in memory."""
        return 100 * len(self.values) + 100


@dataclass(frozen=True)
class Image:
    """A picture: `pixels` (height, width, 3) uint8."""

    tag: str
    pixels: NDArray[np.uint8]
    update: int
    time: float

    @property
    def size(self) -> int:
        """Bytes it takes in memory."""
        return int(self.pixels.nbytes) + 100


@dataclass(frozen=True)
class Back:
    """The run went back: whatever was logged after `update` is void.

    Attributes:
        undone: the last of the updates that a rollback undid; 0 at the start of a launch, which only repeats
            updates.
        rollbacks: how many there have been, this one included.
    """

    update: int
    time: float
    undone: int = 0
    rollbacks: int = 0
    size: int = 100


Entry = Scalars | Image | Back


class Tracker(Protocol):
    """Takes one entry at a time; an entry whose `take` raises comes again."""

    def take(self, entry: Entry) -> None:
        """Pass one entry on."""
        ...

    def close(self, failed: bool) -> None:
        """The launch has ended, with an exception or without."""
        ...


class Trackers:
    """All trackers of a run, seen as one `engine.task.Writer`.

    Args:
        names: of the trackers.
        run: run folder.
        project: W&B's project, MLflow's experiment.
        recipe: resolved recipe, shown beside the figures.
        tell: called with a tracker's name and what is wrong when it takes no entries, with "" when it does
            again.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        project: str,
        recipe: Mapping[str, Any],
        tell: Callable[[str, str], None],
    ) -> None:
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(run),
            "wandb": lambda: WeightsAndBiases(run, project, recipe),
            "mlflow": lambda: MLflow(run, project, recipe),
            PICTURES: lambda: PictureFiles(run / PICTURES),
        }
        self._rollbacks = 0
        self.threads: dict[str, Background[Entry]] = {}
        self._deliveries = {name: _Delivery(makers[name]) for name in (*names, PICTURES)}
        for name, deliver in self._deliveries.items():
            self.threads[name] = Background(
                name, deliver, tell, lambda entry: entry.size, MOST_WAITING, deliver.close
            )

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Figures of one update."""
        self._put_scalars({tag(name): float(value) for name, value in values.items()}, update)

    def back_to(self, update: int, undone: int = 0, rollbacks: int = 0) -> None:
        """What was logged after `update` is void (see `Back`)."""
        self._rollbacks = rollbacks
        self._put(Back(update, time.time(), undone, rollbacks))

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """One figure, under the very name."""
        self._put_scalars({tag: float(scalar_value)}, global_step)

    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str = "CHW") -> None:
        """A picture of 1 or 3 channels, float from 0 to 1 or uint8, axes as `dataformats` says (CHW, HWC or
        HW)."""
        self._put(Image(tag, as_pixels(img_tensor, dataformats), global_step, time.time()))

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        """A figure of matplotlib; it is drawn here and closed."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close(figure)
        self._put(Image(tag, pixels, global_step, time.time()))

    def close(self, failed: bool) -> list[str]:
        """Pass on what is left, for a while; returns the names of those that did not take it all."""
        for deliver in self._deliveries.values():
            deliver.failed = failed
        for thread in self.threads.values():
            thread.close(0.0)  # all begin to end
        return [name for name, thread in self.threads.items() if not thread.close(CLOSE_SECONDS[name])]

    def _put_scalars(self, values: Mapping[str, float], update: int) -> None:
        self._put(Scalars(values, update, time.time(), self._rollbacks))

    def _put(self, entry: Entry) -> None:
        for thread in self.threads.values():
            thread.put(entry)


def check_installed(names: Sequence[str]) -> None:
    """UserError where the package of a tracker is missing."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"engine.trackers: {name} is not installed; pip install 'medfm[{name}]', or leave it out"
            )


def marked(entry: Scalars | Back) -> dict[str, float]:
    """Figures for a tracker that can neither drop nor overwrite points: those after a rollback, and the
    rollback itself, say after how many they come.
    """
    values = dict(entry.values) if isinstance(entry, Scalars) else {}
    return values | ({ROLLBACK: float(entry.rollbacks)} if entry.rollbacks else {})


def undone_updates(back: Back) -> str:
    """What a rollback made void, for people."""
    return f"updates {back.update + 1} to {back.undone} were undone"


def tag(name: str) -> str:
    """A scalar's name for people to look at: TensorBoard groups by what stands before the first slash.

    `evaluate/val/CT` is `val/CT` there: with several groups of figures an evaluation would be a hundred cards
    in one group.
    """
    own = name.removeprefix("evaluate/")
    return own if "/" in own else name


def as_pixels(image: Any, axes: str = "CHW") -> NDArray[np.uint8]:
    """(height, width, 3) uint8 from a tensor or an array, float from 0 to 1 or uint8."""
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if axes == "HW":
        array, axes = array[..., None], "HWC"
    array = array.transpose([axes.index(axis) for axis in "HWC"])
    if array.dtype != np.uint8:
        array = (array.astype(np.float32) * 255.0).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array[..., :3], (*array.shape[:2], 3)))


class _Delivery:
    """Makes the tracker at the first call, in its thread, and hands the entries on one by one."""

    def __init__(self, make: Callable[[], Tracker]) -> None:
        self._make = make
        self._tracker: Tracker | None = None
        self.failed = False

    def __call__(self, pending: deque[Entry]) -> None:
        if self._tracker is None:
            self._tracker = self._make()
        while pending:
            self._tracker.take(pending[0])
            pending.popleft()

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close(self.failed)


class TensorBoard:
    """Event files in RUN/tensorboard, written by ourselves: TensorBoard's own writer makes training wait once
    ten entries are on their way to a slow disk, and raises in it where the disk is full."""

    def __init__(self, run: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        head = _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._file = Appended(run / "tensorboard" / name, head=head, lines=False)

    def take(self, entry: Entry) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        event = Event(wall_time=entry.time, step=entry.update)
        if isinstance(entry, Back):  # what stands at this step and later is dropped
            event = Event(
                wall_time=entry.time,
                step=entry.update + 1,
                session_log=SessionLog(status=SessionLog.SessionStatus.START),
            )
        elif isinstance(entry, Image):
            height, width, _ = entry.pixels.shape
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=_png(entry.pixels)
            )
            event.summary.value.add(tag=entry.tag, image=image)
        else:
            for name, value in entry.values.items():
                event.summary.value.add(tag=name, simple_value=value)
        self._file.write(_record(event))

    def close(self, failed: bool) -> None:
        self._file.close()


class PictureFiles:
    """Pictures whose tag begins with `pictures/`, as `RUN/pictures/update-%08d-NAME.png`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, entry: Entry) -> None:
        if isinstance(entry, Image) and entry.tag.startswith("pictures/"):
            name = entry.tag.removeprefix("pictures/").replace("/", "-")
            with suppress(FileExistsError):
                self.folder.mkdir()
            (self.folder / f"update-{entry.update:08d}-{name}.png").write_bytes(_png(entry.pixels))

    def close(self, failed: bool) -> None:
        pass


class WeightsAndBiases:
    """A run of W&B, the same over all launches (its id stands in RUN/wandb-id). WANDB_MODE=offline keeps it
    in RUN/wandb until `wandb sync`.

    W&B can rewind a run on some servers only, and neither offline nor by a step of one's own: points that a
    rollback undid stay, and those made after it bear `rollback/attempt`.
    """

    def __init__(self, run: Path, project: str, recipe: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=60.0,
            login_timeout=1.0,  # nobody answers a question in a thread
            finish_timeout=CLOSE_SECONDS["wandb"] / 2,
        )
        self._run = wandb.init(
            project=project,
            name=run.resolve().name,
            id=_kept(run / "wandb-id", lambda: secrets.token_hex(4)),
            resume="allow",
            dir=run,
            config=dict(recipe),
            settings=settings,
        )
        # W&B's own step may only grow, but a run goes back to a checkpoint.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def take(self, entry: Entry) -> None:
        if isinstance(entry, Image):
            self._run.log({entry.tag: self._image(entry.pixels), "update": entry.update})
            return
        if isinstance(entry, Back):
            if not entry.undone:
                return
            self._run.summary[f"rollback/{entry.rollbacks}"] = undone_updates(entry)
        self._run.log({**marked(entry), "update": entry.update})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, the same over all launches (its id stands in RUN/mlflow-id), on the server that
    MLFLOW_TRACKING_URI names, or in RUN/mlruns.

    MLflow deletes no points and takes several of one step: points that a rollback undid stay, those made
    after it are later ones of the same steps, and bear `rollback/attempt`.
    """

    def __init__(self, run: Path, project: str, recipe: Mapping[str, Any]) -> None:
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not address:
            address = (run / "mlruns").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = client = MlflowClient(tracking_uri=address)
        found = client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else client.create_experiment(project)

        def begin() -> str:
            return str(client.create_run(experiment, run_name=run.resolve().name).info.run_id)

        self._id = _kept(run / "mlflow-id", begin)
        client.update_run(self._id, status="RUNNING")
        fields = [Param(_allowed(name), str(value)[:500]) for name, value in leaves(recipe)]
        known = client.get_run(self._id).data.params  # a parameter may not change
        new = [field for field in fields if field.key not in known]
        for first in range(0, len(new), 100):  # as many as a server takes at once
            client.log_batch(self._id, params=new[first : first + 100])

    def take(self, entry: Entry) -> None:
        if isinstance(entry, Image):
            self._client.log_image(self._id, entry.pixels, key=_allowed(entry.tag), step=entry.update)
            return
        if isinstance(entry, Back):
            if not entry.undone:
                return
            self._client.set_tag(self._id, f"rollback.{entry.rollbacks}", undone_updates(entry))
        at = int(entry.time * 1000)
        metrics = [self._metric(_allowed(n), v, at, entry.update) for n, v in marked(entry).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _record(event: Any) -> bytes:
    """One event in the frame of TensorBoard's files: length, checksum, content, checksum."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    frame = io.BytesIO()
    RecordWriter(frame).write(event.SerializeToString())
    return frame.getvalue()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL.Image import fromarray

    file = io.BytesIO()
    fromarray(pixels).save(file, format="png")
    return file.getvalue()


def _kept(path: Path, make: Callable[[], str]) -> str:
    """What stands in the file, or what `make` returns, then written there."""
    if not path.exists():
        write_text(path, make() + "\n")
    return path.read_text(encoding="utf-8").strip()


def _allowed(name: str) -> str:
    """A name of MLflow: letters, digits and _ - . : / and blanks."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
