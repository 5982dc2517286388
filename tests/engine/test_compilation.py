"""Blocks compiled one by one: shared, watched, left alone by evaluations, their weights named as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from engine.compilation import Compilation, compiled_graphs
from engine.errors import UserError
from engine.recipe import EngineConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Block(nn.Module):
    """Takes a layout as our trunk's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, layout: tuple[tuple[int, int], ...]) -> Tensor:
        parts = x.split([n * length for n, length in layout])
        mixed = [p.view(n, length, 4).cumsum(1).flatten(0, 1) for p, (n, length) in zip(parts, layout)]
        return x + torch.tanh(self.linear(torch.cat(mixed)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def blocks_to_compile(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, rows: int) -> Tensor:
        x = self.stem(torch.arange(4.0 * rows).view(rows, 4) / rows)
        for block in self.blocks:
            x = block(x, ((1, rows),))
        return x.square().sum()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code of another test; graphs are made, but not turned into machine code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8), torch.compiler.set_stance(force_backend="eager"):
        yield


def on(model: nn.Module) -> Compilation:
    return Compilation(model, EngineConfig(compile=True), CPU)


def test_blocks_of_one_kind_share_their_code_and_a_shape_compiles_once() -> None:
    model = Model()
    names = list(model.state_dict())
    truth = {}
    for rows in (5, 6):
        model.zero_grad()
        loss = model(rows)
        loss.backward()
        truth[rows] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]
    on(model)
    assert list(model.state_dict()) == names
    for rows, graphs in ((5, 1), (6, 2), (5, 2), (6, 2)):
        model.zero_grad()
        loss = model(rows)
        loss.backward()
        assert compiled_graphs() == graphs
        torch.testing.assert_close([loss.detach(), *(p.grad for p in model.parameters())], truth[rows])


def test_evaluations_compile_nothing() -> None:
    model = Model()
    compilation = on(model)
    model(5)
    with compilation.paused(), torch.no_grad():
        model(6), model(7)
    model(5)
    assert compiled_graphs() == 1


class Plain(nn.Linear):
    def blocks_to_compile(self) -> list[nn.Module]:
        return [self]


def test_many_shapes_are_all_compiled_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own limit of 8 would have gone over to uncompiled blocks."""
    monkeypatch.setattr("engine.compilation.GRAPHS_TO_EXPECT", 9)
    model = Plain(2, 2)
    compilation = on(model)
    for rows in range(2, 11):
        model(torch.ones(rows, 2))
        assert compilation.warning() is None
    assert compiled_graphs() == 9
    model(torch.ones(11, 2))
    assert "compiled 10 times" in (compilation.warning() or "")
    assert compilation.warning() is None


@pytest.mark.parametrize(
    ("asked", "device", "stage", "expected"),
    [
        ("auto", CPU, 1, "not compiled: engine.compile auto does so on CUDA only"),
        ("auto", CUDA, 3, "not compiled: engine.compile auto does so at ZeRO 0 to 2"),
        ("auto", CUDA, 2, "3 blocks are compiled"),
        (False, CUDA, 0, "not compiled: engine.compile is false"),
        (True, CPU, 3, "3 blocks are compiled"),
    ],
)
def test_what_is_compiled_and_why_not_is_said(
    asked: bool | Literal["auto"],
    device: torch.device,
    stage: Literal[0, 1, 2, 3],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.compilation.missing_tool", lambda: "")
    model = Model()
    compilation = Compilation(model, EngineConfig(compile=asked, zero_stage=stage), device)
    assert expected in compilation.text
    assert compilation.on == all(b._compiled_call_impl is not None for b in model.blocks)


def test_a_model_without_blocks_is_left_alone_unless_asked_for() -> None:
    assert "names none" in Compilation(nn.Linear(2, 2), EngineConfig(compile="auto"), CUDA).text
    with pytest.raises(UserError, match=r"engine\.compile: this model names no blocks"):
        on(nn.Linear(2, 2))


def test_a_gpu_machine_that_cannot_compile_is_found_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Compilation(Model(), EngineConfig(), CUDA)
    assert not found.on
    assert "no C compiler" in found.text
    with pytest.raises(UserError, match=r"engine\.compile: this machine has no C compiler"):
        Compilation(Model(), EngineConfig(compile=True), CUDA)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("sysconfig.get_paths", lambda *_: {"include": str(tmp_path)})
    assert f"Python.h is not in {tmp_path}" in Compilation(Model(), EngineConfig(), CUDA).text
    (tmp_path / "Python.h").touch()
    assert Compilation(Model(), EngineConfig(), CUDA).on
