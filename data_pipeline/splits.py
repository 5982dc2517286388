"""Which split a subject goes to: seeded, stable when subjects are added, never dividing a subject.

One person may come under several names: copies of one image make their owners one subject.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from data_pipeline.errors import UserError

T = TypeVar("T", bound=Hashable)
FRACTIONS: Mapping[str, float] = {"train": 0.8, "val": 0.1, "test": 0.1}
_ORDER = ("train", "val", "test")  # of the ranges of positions, however the fractions were written
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


def assign(
    subjects: Iterable[T], fractions: Mapping[str, float], seed: int, filled: Collection[str] = ()
) -> dict[T, str]:
    """A split for every subject of one source.

    A subject's split follows from its own `position` alone, so adding subjects moves no other, with one
    exception: with at least as many subjects as splits, a split of non-zero fraction that would be empty
    takes the subject nearest to its range from the largest split. Splits in `filled` have subjects already.
    """
    check_fractions(fractions)
    order = sorted(fractions, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    splits = [(name, fractions[name]) for name in order if fractions[name] > 0]
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
            if not members[name] and name not in filled:
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


Name = tuple[str, str]  # source, subject in that source


@dataclass(frozen=True)
class Member:
    """What the split of one sample depends on: who it is of, which images equal it, and what was stated.

    `hashes` are those of its content (any two samples that share one are of one subject); `stated` is the
    split that the recipe or dataset gives, `before` the one it had when the dataset was last complete.
    """

    name: Name
    subject: str
    hashes: tuple[str, ...]
    stated: str | None = None
    before: str | None = None


def assign_subjects(
    members: Sequence[Member],
    fractions: Mapping[str, Mapping[str, float]],
    seed: int,
    *,
    on_leak: str = "refuse",
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(split, keyed hash of the joint subject) of every member, and counts to report.

    `fractions` are those of each source. A stated split wins, then the one it had before, then a draw.
    Where one subject is stated in two splits: `UserError`, or, with `on_leak` "strictest", test before
    val before train.
    """
    groups = Groups()
    for member in members:
        groups.join([member.name, *(("", h) for h in member.hashes)])
    roots = [groups.find(member.name) for member in members]
    stated: dict[Any, set[str]] = defaultdict(set)
    before: dict[Any, set[str]] = defaultdict(set)
    people: dict[Any, dict[Name, str]] = defaultdict(dict)
    for member, root in zip(members, roots):
        people[root][member.name] = member.subject
        if member.stated is not None:
            stated[root].add(member.stated)
        if member.before is not None:
            before[root].add(member.before)
    leaks = [root for root, splits in stated.items() if len(splits) > 1]
    if leaks and on_leak == "refuse":
        source, subject = min(people[leaks[0]])
        raise UserError(
            f"{len(leaks)} subjects are stated in two splits, first {subject!r} of source {source!r} "
            f"({', '.join(sorted(stated[leaks[0]]))}), by name or because an image is there twice; correct "
            "the splits, or state on_leak: strictest (test before val before train)"
        )
    chosen = {root: strictest(splits) for root, splits in stated.items()}
    for root, splits in before.items():
        chosen.setdefault(root, strictest(splits))
    free: dict[str, dict[Name, Any]] = defaultdict(dict)
    for root, names in people.items():
        if root not in chosen:
            first = min(names)  # a subject of several sources follows the first of them
            free[first[0]][first] = root
    for source, names in free.items():
        filled = {chosen[root] for root in people if root in chosen and min(people[root])[0] == source}
        for name, split in assign(sorted(names), fractions[source], seed, filled).items():
            chosen[names[name]] = split
    notes = {
        "subjects stated in several splits": len(leaks),
        "subjects moved to another split, as a copy joined them": sum(
            len(splits) > 1 for root, splits in before.items() if root not in stated
        ),
    }
    return [(chosen[root], people[root][min(people[root])]) for root in roots], notes


def check_leaks(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise `UserError` where a subject or a content hash is in two splits. Looks at the rows alone."""
    for column in ("subject", "content_hash"):
        found: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            found[row[column]].add(row["split"])
        leaks = sorted(value for value, splits in found.items() if len(splits) > 1)
        if leaks:
            raise UserError(
                f"leak: {len(leaks)} {'subjects' if column == 'subject' else 'images'} are in two splits, "
                f"first {leaks[0]}; rebuild the dataset"
            )


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
