"""A pipeline stage that has the blocks of coming work fetched while the work before it is read."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from typing import Protocol, TypeVar

from data_pipeline.blocks import Block
from data_pipeline.order import Draw
from data_pipeline.shard_cache import CacheConfig, CachedFiles

PULLED = 2  # micro-steps looked at for each one passed on, so that the first batch does not wait for them all


def part_of(config: CacheConfig, workers: int) -> int:
    """Bytes that one worker may have fetched ahead: half of the cache is shared out among those of a machine.

    torchrun tells how many ranks that machine has.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(config.gb * 1e9 / 2 / (ranks * max(1, workers)))


class MicroStep(Protocol):
    """A group of an update, or None where the rank has none left."""

    @property
    def update(self) -> int: ...

    @property
    def group(self) -> int | None: ...


class Draws(Protocol):
    """The part of `Order` that is asked."""

    def group_draws(self, update: int, group: int) -> list[Draw]: ...


Step = TypeVar("Step", bound=MicroStep)


class Prefetch:
    """Passes work on in order, at most `lookahead` micro-steps and `ahead_bytes` of blocks before it is read
    (one micro-step in any case).

    What goes wrong in fetching is raised where a block is read. Work is drawn a second time by whoever reads
    it: a draw costs tens of microseconds, its crop milliseconds.
    """

    def __init__(self, files: CachedFiles, order: Draws, lookahead: int, ahead_bytes: int) -> None:
        self.files, self.order = files, order
        self.lookahead, self.ahead_bytes = lookahead, ahead_bytes

    def __call__(self, source: Iterator[Step]) -> Iterator[Step]:
        ahead: deque[tuple[Step, list[Block]]] = deque()
        wanted: Counter[Block] = Counter()  # by how many of the micro-steps ahead
        size = 0
        try:
            while True:
                for _ in range(PULLED):
                    if ahead and (len(ahead) > self.lookahead or size >= self.ahead_bytes):
                        break
                    step = next(source, None)
                    if step is None:
                        break
                    blocks = self._blocks(step)
                    for block in blocks:
                        size += 0 if wanted[block] else block.size
                        wanted[block] += 1
                        self.files.expect(block)
                    ahead.append((step, blocks))
                if not ahead:
                    return
                step, blocks = ahead.popleft()
                yield step
                for block in blocks:
                    wanted[block] -= 1
                    if not wanted[block]:
                        del wanted[block]
                        size -= block.size
                        self.files.forget(block)
        finally:
            self.files.close()

    def _blocks(self, step: Step) -> list[Block]:
        """Blocks of the samples of a micro-step, in the order in which they are read."""
        if step.group is None:
            return []
        rows = dict.fromkeys(draw.row for draw in self.order.group_draws(step.update, step.group))
        return list(dict.fromkeys(self.files.blocks.of(row) for row in rows))
