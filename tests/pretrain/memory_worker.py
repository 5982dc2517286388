"""Measures the live tensors of an update in many settings, and predicts them (tests/engine/test_memory.py).

PYTHONPATH=tests/engine:. python tests/pretrain/memory_worker.py RANKS OUT.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import conftest as hand
from forked_ranks import fork_ranks
from live_bytes import LiveBytes

from engine.distributed import import_deepspeed, join
from engine.memory import predict
from engine.optimizer import switch_on_checkpointing, wrap
from engine.recipe import EngineConfig
from pretrain.cost import activation_bytes

SIZES = {
    "wide": {"width": 192, "depth": 2, "heads": 3},
    "deep": {"width": 96, "depth": 8, "heads": 3, "registers": 2, "drop_path": 0.1},
}
CASES = [
    *[("wide", stage, "fp32", False, 1) for stage in range(3)],
    *[("wide", stage, "bf16", False, 1) for stage in (0, 1)],
    *[("wide", stage, "fp32", False, 2) for stage in (1, 2)],
    *[("deep", stage, "bf16", True, 1) for stage in (0, 2)],
    ("deep", 1, "fp32", False, 1),
    # Last, as ZeRO 3 gives the whole process another `linear`, which keeps other copies of weights.
    *[("wide", 3, precision, False, 1) for precision in ("fp32", "bf16")],
]


class MaeTask:
    """Masked autoencoding of two crops of 216 tokens a micro-step."""

    def __init__(self, size: str, precision: str, micro_steps: int) -> None:
        self.specs = [hand.row_spec("volume", 1, 2, 216)]
        crops = [hand.hand_crop("volume", (48, 48, 48), index=i, slot=i) for i in range(2)]
        self.model, self.batch = hand.build(
            self.specs, crops, encoder=SIZES[size], decoder_width=96, decoder_depth=2
        )
        self.element, self.steps = 2 if precision == "bf16" else 4, micro_steps

    def micro_steps(self, world: int) -> int:
        return self.steps

    def activation_bytes(self, checkpointing: bool) -> int:
        config, objective = self.model.encoder.config, self.model.objective
        return activation_bytes(
            config, objective, self.specs, element=self.element, checkpointing=checkpointing
        )

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]


def measure(size: str, stage: int, precision: Any, checkpointing: bool, micro_steps: int) -> dict[str, Any]:
    """One update, at ZeRO 3 two, as it keeps gathered weights from the second on; the batch not counted."""
    config = EngineConfig(
        precision=precision, zero_stage=stage, activation_checkpointing=checkpointing, device="cpu", threads=1
    )  # type: ignore[arg-type]
    world = join(config)
    gc.collect()
    with LiveBytes() as live:
        task: Any = MaeTask(size, precision, micro_steps)
        predicted = predict(task, config, world)
        if checkpointing:
            switch_on_checkpointing(task.model)
        engine, partition = wrap(task, config, world)
        engine.train()
        for _ in range(2 if stage == 3 else 1):
            for step in range(micro_steps):
                engine.set_gradient_accumulation_boundary(step == micro_steps - 1)
                loss, _ = engine(task.batch)
                engine.backward(loss, scale_wrt_gas=False)
                del loss
            partition.apply(0.5)
    batch = sum(t.numel() * t.element_size() for block in task.batch.values() for t in block)
    return {"parts": predicted.parts, "peak": live.peak - batch}


def body(out: Path) -> int:
    found = {"-".join(map(str, case)): measure(*case) for case in CASES}
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    import_deepspeed()
    sys.exit(fork_ranks(int(sys.argv[1]), lambda: body(Path(sys.argv[2]))))
