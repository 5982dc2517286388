"""Which split a subject goes to: seeded, stable when subjects are added, never dividing a subject."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from data_pipeline.errors import UserError

T = TypeVar("T", bound=Hashable)
FRACTIONS: Mapping[str, float] = {"train": 0.8, "val": 0.1, "test": 0.1}
_STRICTEST = ("test", "val", "train")


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raise `UserError` unless names are plain and the fractions are positive and sum to 1."""
    if any(not name.isalnum() or not value >= 0 for name, value in fractions.items()):
        raise UserError(f"split {dict(fractions)}: names are letters and digits, fractions not negative")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"split {dict(fractions)}: the fractions must sum to 1")


def position(seed: int, subject: Hashable) -> float:
    """A fixed number in [0, 1) for a subject, independent of every other subject."""
    digest = hashlib.blake2b(f"{seed}\0{subject!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


def assign(subjects: Iterable[T], fractions: Mapping[str, float], seed: int) -> dict[T, str]:
    """A split for every subject of one source.

    A subject's split follows from its own `position` alone, so adding subjects moves no other, with one
    exception: with at least as many subjects as splits, a split of non-zero fraction that would be empty
    takes the subject nearest to its range from the largest split.
    """
    check_fractions(fractions)
    splits = [(name, value) for name, value in fractions.items() if value > 0]
    where = {s: position(seed, s) for s in subjects}
    ranges: dict[str, tuple[float, float]] = {}
    total = 0.0
    for name, value in splits:
        ranges[name] = total, total + value
        total += value
    chosen = {
        s: next((name for name, (_, end) in ranges.items() if p < end), splits[-1][0])
        for s, p in where.items()
    }
    members: dict[str, list[T]] = {name: [s for s, c in chosen.items() if c == name] for name, _ in splits}
    if len(where) >= len(splits):
        for name in members:
            if not members[name]:
                largest = max(members, key=lambda other: len(members[other]))
                middle = sum(ranges[name]) / 2
                taken = min(members[largest], key=lambda s: (abs(where[s] - middle), where[s]))
                members[largest].remove(taken)
                members[name].append(taken)
                chosen[taken] = name
    return chosen


def strictest(splits: Iterable[str]) -> str:
    """Of several splits stated for one subject, the one that leaks least: test before val before train."""
    found = sorted(set(splits), key=lambda s: (_STRICTEST.index(s) if s in _STRICTEST else -1, s))
    return found[0]


class Groups:
    """Union-find over subjects: duplicates make their subjects one."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def find(self, item: T) -> T:
        """The representative of an item's group: the smallest of its members."""
        root: Hashable = item
        while (parent := self._parent.setdefault(root, root)) != root:
            root = parent
        while self._parent[item] != root:  # shorten the way for the next call
            self._parent[item], item = root, self._parent[item]  # type: ignore[assignment]
        return root  # type: ignore[return-value]

    def join(self, items: Sequence[T]) -> None:
        """Put all items into one group."""
        roots = sorted({self.find(item) for item in items})  # type: ignore[type-var]
        for root in roots[1:]:
            self._parent[root] = roots[0]
