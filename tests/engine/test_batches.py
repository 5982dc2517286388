"""Batches on their way to the device: what is in them, and that none is lost or changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from engine.batches import Batches, map_tensors


class Row(NamedTuple):
    voxels: Tensor
    name: str


@dataclasses.dataclass
class Windows:
    image: Tensor
    rows: list[Row]
    update: int


def batch(number: int) -> dict[str, Any]:
    row = Row(torch.full((3,), float(number)), "volume-4")
    return {"windows": Windows(torch.arange(4) + number, [row, row], number), "pair": (torch.ones(2), None)}


def test_every_tensor_of_a_batch_is_reached_and_the_rest_stays() -> None:
    doubled = map_tensors(lambda t: t * 2, batch(3))
    windows = doubled["windows"]
    assert isinstance(windows, Windows)
    assert windows.image.tolist() == [6, 8, 10, 12]
    assert [(type(row), row.voxels.tolist(), row.name) for row in windows.rows] == [
        (Row, [6.0] * 3, "volume-4")
    ] * 2
    assert windows.update == 3
    assert doubled["pair"][0].tolist() == [2, 2]
    assert doubled["pair"][1] is None


def test_on_the_cpu_batches_pass_as_they_are_and_none_is_drawn_ahead() -> None:
    made = [batch(n) for n in range(3)]
    source = iter(made)
    batches = Batches(source, torch.device("cpu"))
    for expected in made:
        assert batches.take() is expected
        batches.look_ahead()
    assert batches.seconds_waited() > 0
    assert batches.seconds_waited() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_whole_while_the_device_is_busy() -> None:
    device, size = torch.device("cuda", 0), 1 << 22

    def source() -> Iterator[dict[str, Tensor]]:
        number = 0
        while True:
            yield {"x": torch.full((size,), float(number))}
            number += 1

    batches, means = Batches(source(), device), []
    weight = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        x = batches.take()["x"]
        busy = weight @ weight  # the copy of the next batch runs beside this
        means.append((x + 0 * busy.sum()).mean())
        del x
        batches.look_ahead()
    assert torch.stack(means).tolist() == pytest.approx(list(range(20)))
